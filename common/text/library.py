"""Errors of libraries that are written in Rust, as typed errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import TandemError


@contextmanager
def library_errors(kind: type[TandemError], message: str) -> Iterator[None]:
    """Raise any error of a library as `kind`, with `message` before its own text. Typed errors pass.

    A panic of Rust code is no `Exception` in Python, so that it would end the thread of an engine or of a server. Its class
    cannot be imported."""
    try:
        yield
    except TandemError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{message}: {error}.") from error
