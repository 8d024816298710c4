"""Programs of others that this process runs, and that end when it does, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence

_WATCH = ("/bin/sh", "-c", "read _; kill -s KILL 0")
"""Outlives us: waits until our end of its input closes, and ends the process group that it is in."""


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, and give what it wrote. It and what it starts are in a process group of their own: Ctrl-C at a
    terminal reaches this process alone, and what ends this process ends all of them. Raises `OSError` if it cannot be run."""
    # The signal at a parent's end (`common.process.child.die_with_parent`) reaches the driver of a compiler and not the
    # compiler. The watcher starts before the program, so that the program never runs without a watcher.
    none = subprocess.DEVNULL
    with (
        subprocess.Popen(_WATCH, stdin=subprocess.PIPE, stdout=none, stderr=none, process_group=0) as watcher,
        subprocess.Popen(
            command,
            stdin=none,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            process_group=watcher.pid,
        ) as process,
    ):
        try:
            output, words = process.communicate()
        finally:
            os.killpg(watcher.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output, words)
