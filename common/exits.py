"""How a command ends that does not end well: one message on standard error, and an exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import NoReturn

FAILURE = 1
"""An engine, a job of a sweep or the machine failed; a defect of ours too, with its traceback."""
USER_ERROR = 2
GATE = 3
"""A run is whole, and a condition of `fail_if` holds."""
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
READER_GONE = 128 + signal.SIGPIPE


class Terminated(KeyboardInterrupt):
    """SIGTERM: whoever sent it wants an end, and what was done so far kept, as who presses Ctrl-C does."""


@contextmanager
def heeding_sigterm() -> Iterator[None]:
    """SIGTERM within the block raises `Terminated`. For the main thread."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_quietly_at_ctrl_c() -> None:
    """Ctrl-C that nobody handles, as while a command imports what it needs, ends it without a traceback."""
    complain = sys.excepthook

    def told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            sys.exit(exit_code(error))
        complain(kind, error, trace)

    sys.excepthook = told


@contextmanager
def dying_at_ctrl_c() -> Iterator[None]:
    """Ctrl-C within the block ends the process at once: for imports, where the exception that Python makes of it may be raised
    in a callback of a library, which drops it. Whoever handles or ignores Ctrl-C already goes on to."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def exit_code(end: KeyboardInterrupt) -> int:
    """That of a command that was told to end."""
    return TERMINATED if isinstance(end, Terminated) else INTERRUPTED


def fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


@contextmanager
def printing() -> Iterator[None]:
    """Around what prints and flushes: where standard output takes no more, the command ends."""
    try:
        yield
    except BrokenPipeError:
        drop_output()
        sys.exit(READER_GONE)
    except OSError as error:
        drop_output()
        fail(f"Standard output cannot be written: {error.strerror}.", FAILURE)


def drop_output() -> None:
    """What is left to print goes nowhere: Python would try once more as it exits, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def replace_unprintable() -> None:
    """Print `?` for what the encoding of standard output lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
