"""Processes that this one starts and that end when it does: what all of them have in common, on both ends.

A child reads frames on its standard input, and answers with frames on its standard output. It ends when its input does, even
in the middle of a call, so that it cannot outlive its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import psutil

from common.errors import BackendError
from common.process.frames import read_frame

log = logging.getLogger(__name__)

_ROOT = Path(__file__).parents[2]
PATIENCE_S = 10.0
"""How long a child may take to end."""
STOPPED_S = 0.5
"""That it is stopped (SIGSTOP), after which it counts as dead: whoever stops a whole group goes on with it one by one."""
TURN_S = 0.25
"""Between two looks at a process. They cost what is beside a step."""
PARENTS = (signal.SIGINT, signal.SIGTERM)
"""The parent's to handle, though Ctrl-C, systemd and SLURM tell all processes: it finishes what it has and closes our input."""
_PR_SET_PDEATHSIG = 1


def start(
    main: str, *arguments: Any, environment: Mapping[str, str] | None = None, line: socket.socket | None = None
) -> subprocess.Popen[bytes]:
    """Start the function `main`, as `module:name`, with `arguments` that JSON can hold; it is to call `listen`. `environment`
    is added to ours. With a `line` it hears and answers who is at the other end of that, not this process."""
    module, name = main.split(":")
    # From before what takes long to import.
    ignore_signals = "; ".join(f"signal.signal({int(each)}, signal.SIG_IGN)" for each in PARENTS)
    code = f"import signal; {ignore_signals}; import json, sys; from {module} import {name}; {name}(*json.loads(sys.argv[1]))"
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    way = line.fileno() if line else subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(arguments)],
        stdin=way,
        stdout=way,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | dict(environment or {}),
    )


def expect_no_fork(caller: int) -> None:
    """Raise `BackendError` unless this process is the `caller` of others: what they answer is for that alone."""
    if os.getpid() != caller:
        raise BackendError("This engine was made in another process, of which this one is a fork. Make one here.")


def end(process: subprocess.Popen[bytes]) -> None:
    """Close its input, wait until it has ended, and insist. Idempotent."""
    assert process.stdin and process.stdout
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def how_it_ended(code: int) -> str:
    """A return code of `subprocess` as the rest of a sentence."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class Silence:
    """The time in which a process gave no sign of life, counted in turns of its observer. Time in which the observer itself
    does not run does not count.

    A process whose CPU time advances is alive: it may be starved by others, or a library may hold up all of its threads. So it
    is neither stopped nor idle, and it has `busy_s` instead of `idle_s`.
    """

    def __init__(self, pid: int, idle_s: float, busy_s: float) -> None:
        """`idle_s`: how long it may be silent while it does not compute. `busy_s`: how long in any case."""
        self._pid, self._idle_most, self._busy_most = pid, idle_s, busy_s
        self.end()

    def end(self) -> None:
        """Note a sign of life."""
        self.seconds = self._idle_s = self._stopped_s = 0.0
        self._cpu_s: float | None = None

    def expect(self, idle_s: float) -> None:
        """Change the patience with a process that does not compute."""
        self._idle_most = idle_s

    def go_on(self, turn_s: float) -> str:
        """Note a turn without a sign of life. Returns why the process counts as dead; the empty string while it does not."""
        stopped = False
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._pid)
            stopped, times = process.status() == psutil.STATUS_STOPPED, process.cpu_times()
            before, self._cpu_s = self._cpu_s, times.user + times.system
            if before is None or self._cpu_s > before:
                self._idle_s = self._stopped_s = -turn_s  # of this turn nothing counts
        self.seconds += turn_s
        self._idle_s += turn_s
        self._stopped_s = self._stopped_s + turn_s if stopped else 0.0
        if self._stopped_s >= STOPPED_S:
            return "was stopped"
        if self._idle_s >= self._idle_most:
            return f"gave no sign of life for {self._idle_most:g} s"
        if self.seconds >= self._busy_most:
            return f"gave no sign of life for {self._busy_most:g} s, though it computed"
        return ""


def watch(process: subprocess.Popen[bytes]) -> None:
    """Wait until it has ended, and end it if it is stopped for long."""
    silence = Silence(process.pid, math.inf, math.inf)
    while process.poll() is None:
        time.sleep(TURN_S)
        if silence.go_on(TURN_S):
            log.error("A process of this engine (pid %d) was stopped, and is ended.", process.pid)
            process.kill()
            process.wait()


def listen() -> tuple[IO[bytes], queue.SimpleQueue[Any]]:
    """In the child: where its answers go, and the frames that it is told, as they come. It may put there what else it hears."""
    for each in PARENTS:
        signal.signal(each, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is a log, not an answer
    source = os.fdopen(os.dup(0), "rb")  # not sys.stdin, whose lock a thread that reads would hold as Python ends
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)  # what this process starts is not to hold a line open that it answers on too
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def hear() -> None:
        try:
            while (frame := read_frame(source)) is not None:
                told.put(frame)
        except Exception:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    threading.Thread(target=hear, daemon=True).start()
    return answers, told


def die_with_parent() -> None:
    """In the child: end as soon as the thread that started this process does, even while this process is stopped and cannot see
    that its input ends. Linux alone knows this."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
