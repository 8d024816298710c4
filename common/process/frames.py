"""What two of our processes say to each other: frames over a pipe, each a message in JSON and bytes that belong to it.

A frame is `MAGIC`, the lengths of both, little-endian in four and eight bytes, then the JSON in UTF-8, then the bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

Message = dict[str, Any]
MAGIC = b"TNDM"
"""Starts every frame: what else gets onto a pipe is taken for no length."""
MAX_MESSAGE = 1 << 30
MAX_DATA = 1 << 34
"""Bytes that a frame may announce."""
_HEAD = struct.Struct("<4sIQ")


class NoFrame(ValueError):
    """What came is something else."""


class Frame(NamedTuple):
    """One that has come."""

    message: Message
    data: bytes


class Source(Protocol):
    """Where frames come from."""

    def read(self, size: int, /) -> bytes:
        """So many bytes; fewer only where the stream ends."""
        ...


class Sink(Protocol):
    """Where they go."""

    def write(self, data: Any, /) -> object: ...

    def flush(self) -> object: ...


def write_frame(stream: Sink, message: Message, data: Sequence[bytes | memoryview] = ()) -> None:
    """Write a frame, the parts of whose `data` stand one behind the other. NumPy's arrays become lists, its numbers numbers."""
    text = json.dumps(message, separators=(",", ":"), default=lambda array: array.tolist()).encode()
    stream.write(_HEAD.pack(MAGIC, len(text), sum(len(part) for part in data)) + text)
    for part in data:
        stream.write(part)
    stream.flush()


def read_frame(stream: Source, most_message: int = MAX_MESSAGE, most_data: int = MAX_DATA) -> Frame | None:
    """The next frame; None where the stream ends, be it in the middle of one. Raises `NoFrame` for anything else, and for one
    that announces more bytes than it may have."""
    head = stream.read(_HEAD.size)
    if head[: len(MAGIC)] != MAGIC[: len(head)]:
        raise NoFrame(f"expected a frame, got {head!r}")
    if len(head) < _HEAD.size:
        return None
    _, length, size = _HEAD.unpack(head)
    if length > most_message or size > most_data:
        raise NoFrame(f"got a frame of {length} and {size} bytes, at most {most_message} and {most_data} are expected")
    text = stream.read(length)
    data = stream.read(size) if size else b""
    if len(text) < length or len(data) < size:
        return None
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NoFrame(f"got a frame that is no JSON: {error}") from error
    if not isinstance(message, dict):
        raise NoFrame(f"got a frame with {message!r:.80}")
    return Frame(message, data)
