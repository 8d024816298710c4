"""Processes that do what this one does: each is told every call that is made here, in order, and makes the same one.

A call is a frame on the follower's standard input: the length of a header, the header in JSON (a name, arguments, and how many
bytes follow), and these. A follower ends when its input does, even in the middle of a call, so that it cannot outlive us. Of a
call that raises there, the log tells, and the next one comes: what was to be done together fails here too.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from common.errors import BackendError

_ROOT = Path(__file__).parents[1]
_PATIENCE_S = 10.0
"""How long a follower may take to end."""

Call = tuple[str, list[Any], bytes]
Calls = Mapping[str, Callable[..., object]]
"""What a follower can be told to do. What came in bytes is the last argument, where any did."""


class Follower:
    """Our handle on one of them."""

    def __init__(self, main: str, *arguments: Any) -> None:
        """Start the function `main`, as `module:name`, with `arguments` that JSON can hold; it is to call `follow`."""
        module, name = main.split(":")
        code = f"import json, sys; from {module} import {name}; {name}(*json.loads(sys.argv[1]))"
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, name: str, *arguments: Any, data: Sequence[np.ndarray] = ()) -> None:
        """Have it make a call, with the bytes of `data` as its last argument if there are any. Does not wait. Raises
        `BackendError` if it has ended."""
        assert self._process.stdin
        header = json.dumps([name, arguments, sum(x.nbytes for x in data)], separators=(",", ":")).encode()
        try:
            self._process.stdin.write(struct.pack("<I", len(header)) + header)
            for x in data:
                self._process.stdin.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):  # ValueError: it was closed
            raise self._ended() from None

    def settle(self) -> None:
        """Wait until it has made all calls so far. Raises `BackendError` if one of them raised there, or if it has ended."""
        assert self._process.stdout
        self.tell("settle")
        answer = self._process.stdout.readline()
        if not answer.endswith(b"\n"):
            raise self._ended()
        if error := json.loads(answer):
            raise BackendError(f"A process of this engine (pid {self.pid}) failed: {error}")

    def close(self) -> None:
        """End it. Idempotent."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ended(self) -> BackendError:
        code = self._process.wait(_PATIENCE_S)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return BackendError(f"A process of this engine (pid {self.pid}) {how}; its log says more. Make a new engine.")


def follow(calls: Calls, failed: Callable[[], object]) -> None:
    """Make every call that comes, until none can. `failed` is called when one has raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to handle
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is a log, not an answer
    waiting: queue.SimpleQueue[Call] = queue.SimpleQueue()

    def listen() -> None:
        while (call := _read(sys.stdin.buffer)) is not None:
            waiting.put(call)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    error: str | None = None
    while True:
        name, arguments, data = waiting.get()
        if name == "settle":
            answers.write(json.dumps(error).encode() + b"\n")
            answers.flush()
            error = None
            continue
        try:
            calls[name](*arguments, *([data] if data else []))
        except Exception as raised:
            traceback.print_exc()
            error = error or f"{type(raised).__name__}: {raised}"
            failed()


def _read(stream: IO[bytes]) -> Call | None:
    """The next call; None where the stream ends, be it in the middle of one."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    header = stream.read(struct.unpack("<I", head)[0])
    try:
        name, arguments, size = json.loads(header)
    except ValueError:
        return None
    data = stream.read(size)
    return (name, arguments, data) if len(data) == size else None
