"""JSON of answers. Long lists are encoded while they grow."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

MARK = secrets.token_hex(16)
"""Holds the place of a `JsonList` while the JSON around it is encoded. No request knows it."""


@dataclass
class JsonList:
    """A list in an answer, as JSON.

    JSON takes a tenth of the memory of the objects. Its parts are short, because Python's lock is held while one is encoded."""

    parts: list[bytes] = field(default_factory=list)
    """JSON of one or more entries each."""

    @classmethod
    def of(cls, entries: Sequence[Any]) -> Self:
        made = cls()
        for begin in range(0, len(entries), 256):
            made.add(entries[begin : begin + 256])
        return made

    def add(self, entries: Sequence[Any] | JsonList) -> int:
        """Append entries and return their size in bytes."""
        if isinstance(entries, JsonList):
            added = entries.parts
        else:
            added = [encode(entries)[1:-1]] if entries else []
        self.parts += added
        return sum(map(len, added))


def encode(message: Any) -> bytes:
    """Return JSON. A lone surrogate, which UTF-8 cannot encode, becomes "?"."""
    lists: list[JsonList] = []

    def mark(value: Any) -> str:
        if not isinstance(value, JsonList):
            raise TypeError(f"{type(value).__name__} has no JSON")
        lists.append(value)
        return MARK

    text = json.dumps(message, ensure_ascii=False, separators=(",", ":"), default=mark).encode(errors="replace")
    if not lists:
        return text
    begin, *around = text.split(f'"{MARK}"'.encode())
    parts = [begin]
    for each, rest in zip(lists, around, strict=True):
        parts += b"[", b",".join(each.parts), b"]", rest
    return b"".join(parts)


def event(message: Any) -> bytes:
    """Return a server-sent event."""
    return b"data: " + encode(message) + b"\n\n"


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can hold: it has no infinity."""
    return max(logprob, -9999.0)
