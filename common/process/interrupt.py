"""Ctrl-C that waits until what it would tear in two is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def defer_sigint() -> Iterator[Callable[[], None]]:
    """Ctrl-C within the block comes at its end, or where the block calls what it is given; a second one at once, in case
    neither is ever reached.

    Python raises it between any two instructions of the main thread, also where tables that belong together have been changed
    in part. Other threads never see it. To begin a block and to end it takes 20 µs, to call what it is given nothing.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: None
        return
    came: list[tuple[int, FrameType | None]] = []

    def later(number: int, frame: FrameType | None) -> None:
        came.append((number, frame))
        if len(came) > 1:
            now()

    def now() -> None:
        if came:
            last = came[-1]
            came.clear()
            before(*last)

    signal.signal(signal.SIGINT, later)
    try:
        yield now
    finally:
        signal.signal(signal.SIGINT, before)
        now()
