"""Processes that do what this one does: each is told every call that is made here, in order, and makes the same one.

A call is a frame: a name, arguments, and bytes. Of a call that raises there, the log tells, and the next one comes: what was to
be done together fails here too. A process that is stopped is ended: whoever waits for its answer then learns at once that it is
gone, and who waits for it elsewhere is told.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import IO, Any, Protocol

import numpy as np

from common.errors import BackendError
from common.process import child
from common.process.frames import Frame, read_frame, write_frame

Calls = Mapping[str, Callable[..., object]]
"""What a follower can be told to do. What came in bytes is the last argument, where any did; what one returns JSON can hold."""
ENTRY_POINTS = {"jax": "jaxinfer.worker:main", "torch": "torchinfer.worker:main"}
"""The functions that a follower can run, by name. Each is to call `follow`. An agent starts these and nothing else."""


class ProcessExited(BackendError):
    """A process is no more."""


class Process(Protocol):
    """One that was started."""

    pid: int
    here: bool
    """Whether that is its number on this machine."""
    input: IO[bytes]
    output: IO[bytes]

    def watch(self) -> None:
        """Wait until it has ended, and end it if it is stopped for long."""
        ...

    def how_it_ended(self) -> str:
        """As the rest of a sentence."""
        ...

    def end(self) -> None:
        """Close its input, and wait until it has ended. Idempotent."""
        ...


class LocalProcess:
    """One that this process has started."""

    here = True

    def __init__(self, entry: str, *arguments: Any) -> None:
        self._process = child.start(ENTRY_POINTS[entry], *arguments)
        assert self._process.stdin and self._process.stdout
        self.pid, self.input, self.output = self._process.pid, self._process.stdin, self._process.stdout

    def watch(self) -> None:
        child.watch(self._process)

    def how_it_ended(self) -> str:
        return child.how_it_ended(self._process.wait(child.PATIENCE_S))

    def end(self) -> None:
        child.end(self._process)


class WorkerHandle:
    """Our handle on one of them."""

    def __init__(
        self,
        entry: str,
        *arguments: Any,
        ended: Callable[[WorkerHandle], object],
        start: Callable[..., Process] = LocalProcess,
    ) -> None:
        """Start an entry of `ENTRY_POINTS` with `arguments` that JSON can hold. `ended` is called on a thread, soon after the
        process has ended. `start`: where."""
        self._caller = os.getpid()
        started: Future[Process] = Future()
        # The thread that watches it is the one that starts it: it ends with that thread, and any other may be short-lived.
        keep = (started, lambda: ended(self), partial(start, entry, *arguments))
        threading.Thread(target=_keep, args=keep, name="follower", daemon=True).start()
        self._process = started.result()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def here(self) -> bool:
        """Whether that is its number on this machine."""
        return self._process.here

    def tell(self, name: str, *arguments: Any, data: Sequence[np.ndarray] = ()) -> None:
        """Have it make a call, with the bytes of `data` as its last argument if there are any. Does not wait. Raises
        `ProcessExited` if it is no more, `BackendError` in a fork of the process that has started it."""
        child.expect_no_fork(self._caller)
        parts = [np.ascontiguousarray(x).reshape(-1).view(np.uint8).data for x in data]
        try:
            write_frame(self._process.input, {"call": name, "arguments": arguments}, parts)
        except (OSError, ValueError):  # ValueError: it was closed
            raise self._ended() from None

    def settle(self) -> Any:
        """Wait until it has made all calls so far. What the last of them returned there. Raises `BackendError` if one of them
        raised there, `ProcessExited` if it is no more."""
        self.tell("settle")
        if (answer := self._hear()) is None:
            raise self._ended()
        if error := answer.message["error"]:
            raise BackendError(f"A process of this engine (pid {self.pid}) failed: {error}")
        return answer.message["returned"]

    def close(self) -> None:
        """End it, unless a fork of the process that has started it calls this. Idempotent."""
        if os.getpid() != self._caller:
            return
        with suppress(ProcessExited):
            self.tell("end")  # a fork may hold its input open
        self._process.end()

    def _hear(self) -> Frame | None:
        """What it answers; None if it is no more."""
        try:
            return read_frame(self._process.output)
        except OSError:
            return None

    def how_it_ended(self) -> str:
        """A sentence, of one that is no more."""
        return f"A process of this engine (pid {self.pid}) {self._process.how_it_ended()}; its log says more."

    def _ended(self) -> ProcessExited:
        return ProcessExited(self.how_it_ended())


def _keep(started: Future[Process], ended: Callable[[], object], start: Callable[[], Process]) -> None:
    """Start a process, and tell when it has ended."""
    try:
        process = start()
    except BaseException as error:
        started.set_exception(error)
        return
    started.set_result(process)
    process.watch()
    ended()


def follow(calls: Calls, failed: Callable[[], object]) -> None:
    """Make every call that comes, until none can. `failed` is called when one has raised."""
    child.die_with_parent()
    answers, told = child.listen()
    error: str | None = None
    returned: object = None
    while True:
        message, data = told.get()
        if message["call"] == "end":
            os._exit(0)
        if message["call"] == "settle":
            write_frame(answers, {"error": error, "returned": returned})
            error = returned = None
            continue
        try:
            returned = calls[message["call"]](*message["arguments"], *([data] if data else []))
        except Exception as raised:
            traceback.print_exc()
            error = error or f"{type(raised).__name__}: {raised}"
            failed()
