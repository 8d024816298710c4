"""What an engine's process and ours say to each other: JSON in frames, over the child's standard input and output.

A frame is `MAGIC`, four bytes of length, little-endian, then UTF-8.
"""

from __future__ import annotations

import json
import struct
from typing import IO, Any

Message = dict[str, Any]
MAGIC = b"TNDM"
"""Starts every frame: what else gets onto a pipe is taken for no length."""
MAX_FRAME = 1 << 30


class NoFrame(ValueError):
    """What came is something else."""


def write_frame(stream: IO[bytes], message: Message) -> None:
    data = json.dumps(message, separators=(",", ":"), default=lambda array: array.tolist()).encode()
    stream.write(MAGIC + struct.pack("<I", len(data)) + data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> Message | None:
    """The next message; None where the stream ends, be it in the middle of a frame. Raises `NoFrame` for anything else."""
    head = stream.read(len(MAGIC) + 4)
    if head[: len(MAGIC)] != MAGIC[: len(head)]:
        raise NoFrame(f"expected a frame, got {head!r}")
    if len(head) < len(MAGIC) + 4:
        return None
    (length,) = struct.unpack("<I", head[len(MAGIC) :])
    if length > MAX_FRAME:
        raise NoFrame(f"got a frame of {length} bytes, at most {MAX_FRAME} are expected")
    data = stream.read(length)
    if len(data) < length:
        return None
    try:
        message = json.loads(data)
    except ValueError as error:
        raise NoFrame(f"got a frame that is no JSON: {error}") from error
    if not isinstance(message, dict):
        raise NoFrame(f"got a frame with {message!r:.80}")
    return message
