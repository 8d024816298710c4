"""Processes that do what this one does: each is told every call that is made here, in order, and makes the same one.

A call is a frame: a name, arguments, and bytes. Of a call that raises there, the log tells, and the next one comes: what was to
be done together fails here too.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from common import child
from common.errors import BackendError
from common.frames import read_frame, write_frame

Calls = Mapping[str, Callable[..., object]]
"""What a follower can be told to do. What came in bytes is the last argument, where any did."""


class Follower:
    """Our handle on one of them."""

    def __init__(self, main: str, *arguments: Any) -> None:
        """Start the function `main`, as `module:name`, with `arguments` that JSON can hold; it is to call `follow`."""
        self._process = child.start(main, *arguments)

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, name: str, *arguments: Any, data: Sequence[np.ndarray] = ()) -> None:
        """Have it make a call, with the bytes of `data` as its last argument if there are any. Does not wait. Raises
        `BackendError` if it has ended."""
        assert self._process.stdin
        parts = [np.ascontiguousarray(x).reshape(-1).view(np.uint8).data for x in data]
        try:
            write_frame(self._process.stdin, {"call": name, "arguments": arguments}, parts)
        except (BrokenPipeError, ValueError):  # ValueError: it was closed
            raise self._ended() from None

    def settle(self) -> None:
        """Wait until it has made all calls so far. Raises `BackendError` if one of them raised there, or if it has ended."""
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

    def _ended(self) -> BackendError:
        how = child.how_it_ended(self._process.wait(child.PATIENCE_S))
        return BackendError(f"A process of this engine (pid {self.pid}) {how}; its log says more. Make a new engine.")


def follow(calls: Calls, failed: Callable[[], object]) -> None:
    """Make every call that comes, until none can. `failed` is called when one has raised."""
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
