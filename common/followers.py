"""Processes that do what this one does: each is told every call that is made here, in order, and makes the same one.

A call is a frame: a name, arguments, and bytes. Of a call that raises there, the log tells, and the next one comes: what was to
be done together fails here too. A process that is stopped is ended: whoever waits for its answer then learns at once that it is
gone, and who waits for it elsewhere is told.
"""

from __future__ import annotations

import logging
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from common import child
from common.errors import BackendError
from common.frames import read_frame, write_frame

log = logging.getLogger(__name__)

Calls = Mapping[str, Callable[..., object]]
"""What a follower can be told to do. What came in bytes is the last argument, where any did."""
TURN_S = 0.25
"""Between two looks at a process. They cost what is beside a step."""


class Ended(BackendError):
    """A process is no more."""


class Follower:
    """Our handle on one of them."""

    def __init__(self, main: str, *arguments: Any, ended: Callable[[Follower], object]) -> None:
        """Start the function `main`, as `module:name`, with `arguments` that JSON can hold; it is to call `follow`. `ended` is
        called on a thread, soon after it has ended."""
        started: Future[subprocess.Popen[bytes]] = Future()
        # The thread that watches it is the one that starts it: it ends with that thread, and any other may be short-lived.
        keep = (started, lambda: ended(self), main, arguments)
        threading.Thread(target=_keep, args=keep, name="follower", daemon=True).start()
        self._process = started.result()

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, name: str, *arguments: Any, data: Sequence[np.ndarray] = ()) -> None:
        """Have it make a call, with the bytes of `data` as its last argument if there are any. Does not wait. Raises `Ended` if
        it is no more."""
        assert self._process.stdin
        parts = [np.ascontiguousarray(x).reshape(-1).view(np.uint8).data for x in data]
        try:
            write_frame(self._process.stdin, {"call": name, "arguments": arguments}, parts)
        except (BrokenPipeError, ValueError):  # ValueError: it was closed
            raise self._ended() from None

    def settle(self) -> None:
        """Wait until it has made all calls so far. Raises `BackendError` if one of them raised there, `Ended` if it is no
        more."""
        assert self._process.stdout
        self.tell("settle")
        answer = read_frame(self._process.stdout)
        if answer is None:
            raise self._ended()
        if error := answer.message["error"]:
            raise BackendError(f"A process of this engine (pid {self.pid}) failed: {error}")

    def close(self) -> None:
        """End it. Idempotent."""
        child.end(self._process)

    def _ended(self) -> Ended:
        how = child.how_it_ended(self._process.wait(child.PATIENCE_S))
        return Ended(f"A process of this engine (pid {self.pid}) {how}; its log says more.")


def _keep(started: Future[subprocess.Popen[bytes]], ended: Callable[[], object], main: str, arguments: Sequence[Any]) -> None:
    """Start a process, end it if it is stopped for long, and tell when it has ended."""
    try:
        process = child.start(main, *arguments)
    except BaseException as error:
        started.set_exception(error)
        return
    started.set_result(process)
    stopped = 0.0
    while process.poll() is None:
        time.sleep(TURN_S)
        stopped = child.stopped_for(process.pid, stopped, TURN_S)
        if stopped >= child.STOPPED_S:
            log.error("A process of this engine (pid %d) was stopped, and is ended.", process.pid)
            process.kill()
            process.wait()
    ended()


def follow(calls: Calls, failed: Callable[[], object]) -> None:
    """Make every call that comes, until none can. `failed` is called when one has raised."""
    child.die_with_parent()
    answers, told = child.listen()
    error: str | None = None
    while True:
        message, data = told.get()
        if message["call"] == "settle":
            write_frame(answers, {"error": error})
            error = None
            continue
        try:
            calls[message["call"]](*message["arguments"], *([data] if data else []))
        except Exception as raised:
            traceback.print_exc()
            error = error or f"{type(raised).__name__}: {raised}"
            failed()
