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
DEFECT = 4
"""A comparison is whole, and the engines do not compute the same thing."""
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
READER_GONE = 128 + signal.SIGPIPE


class Terminated(KeyboardInterrupt):
    """SIGTERM: whoever sent it wants an end, and what was done so far kept, as who presses Ctrl-C does."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
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
def exit_on_sigint() -> Iterator[None]:
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
    """End the command with a message on standard error, or where that takes none on standard output."""
    for name in ("stderr", "stdout"):
        try:
            print(f"error: {message}", file=getattr(sys, name), flush=True)
            break
        except OSError:
            drop_output(name)
    sys.exit(code)


def expect_output(what: str) -> None:
    """End the command where standard output is closed and nothing else would tell `what`."""
    if sys.stdout is None:
        fail(f"Standard output is closed, so that there is nowhere to write {what}.", USER_ERROR)


@contextmanager
def printing() -> Iterator[None]:
    """Around what prints: where standard output or standard error takes no more, the command ends, and the other says so."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        if not (name := unwritable()):
            raise
        drop_output(name)
        if isinstance(error, BrokenPipeError):
            sys.exit(READER_GONE)
        said = {"stdout": "Standard output", "stderr": "Standard error"}[name]
        fail(f"{said} cannot be written: {error.strerror}.", FAILURE)


def unwritable() -> str | None:
    """Which of `stdout` and `stderr` takes no more, once an attempt has failed: what that left in a buffer is tried again, and
    where there is none, as with -u, an empty line."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            if isinstance(getattr(stream, "buffer", None), io.RawIOBase):
                stream.write("\n")
            if stream is not None:
                stream.flush()
        except OSError:
            return name
    return None


def drop_output(name: str) -> None:
    """What is left to print on `stdout` or `stderr` goes nowhere: Python would try once more as it exits, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), getattr(sys, name).fileno())
    setattr(sys, name, None)


def replace_unprintable() -> None:
    """Print `?` for what the encoding of standard output lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
