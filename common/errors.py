"""The errors that a user can cause. Each message states what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence

MAX_HINTED = 256
"""Characters of a name for which the nearest is searched. The time of the search is quadratic in them."""


_JSON_REASONS = {
    "Circular": "it contains itself",
    "Out of range": "it holds NaN or an infinite number",
    "Exceeds": "a number in it has too many digits",
}
"""Beginnings of errors of Python's `json` → the reason."""


class TandemError(Exception):
    """Root of every error that is the caller's to mend; the command line prints it without a traceback and exits with 2."""


class ConfigError(TandemError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class CheckpointError(TandemError, ValueError):
    """Weights or their description are missing, damaged, or inconsistent. Counts all mismatches, and names the first."""


class RequestError(TandemError, ValueError):
    """A request that can never be served as it stands: refused at the door, before anything is allocated. `param` is the field
    that is to blame, where it is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    """A prompt, alone or with the output that it asks for, is longer than the context. A server answers 400 with the code
    `context_length_exceeded`, which clients recognize."""


class QueueFullError(RequestError):
    """A request that could be served, but not now: too many wait before it. A server answers 429."""


class DrainingError(RequestError):
    """A request that came after `drain`: another engine may serve it. A server answers 503."""


class BackendError(TandemError, RuntimeError):
    """A backend cannot do what was asked of it on this machine."""


class EngineGoneError(BackendError):
    """An engine is no more, and another has to be made. A server answers 503."""


class UnavailableError(BackendError):
    """The machine is too busy at the moment, and the same request may succeed later. A server answers 503."""


def nearest_hint(given: str, known: Iterable[str]) -> str:
    """A sentence ` Did you mean 'x'?` for a misspelt name, or the empty string when nothing known is close."""
    if len(given) > MAX_HINTED:
        return ""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def shown(value: object, most: int = 80) -> str:
    """The repr of a value for a message, cut after so many characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4300 digits, or lists nested thousands deep
        return "a value too large to print"
    return text if len(text) <= most else f"{text[:most]}…"


def quoted(value: object, most: int = 80) -> str:
    """The JSON text of a value of a request, cut after `most` characters; the repr where JSON has no such value."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return shown(value, most)
    return text if len(text) <= most else f"{text[:most]}…"


def json_reason(error: Exception) -> str:
    """Return why a text is not JSON, or why a value has no JSON text, given the error of Python's `json`."""
    match error:
        case json.JSONDecodeError():
            return f"{error.msg} at line {error.lineno}, column {error.colno}"
        case UnicodeDecodeError():
            return f"byte {error.start} is not UTF-8"
        case RecursionError():
            return "it is nested too deeply"
        case TypeError():
            return "it holds a value that is no string, number, boolean, null, array or object"
    for begin, reason in _JSON_REASONS.items():
        if str(error).startswith(begin):
            return reason
    return str(error)


def listed(names: Sequence[str], most: int = 10) -> str:
    """Return the first names for a message, and the number of the others."""
    more = len(names) - most
    return ", ".join(shown(name)[1:-1] for name in names[:most]) + (f" and {more} more" if more > 0 else "")


def name_of(error: BaseException) -> str:
    """By which `by_name` makes it, or what it is a kind of, in another process."""
    return next((kind.__name__ for kind in type(error).__mro__ if globals().get(kind.__name__) is kind), type(error).__name__)


def by_name(kind: str, message: str) -> TandemError | None:
    """Return the error that another process raised and sent as class and message; None if it is none of these."""
    known = globals().get(kind)
    return known(message) if isinstance(known, type) and issubclass(known, TandemError) else None
