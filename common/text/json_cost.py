"""The host work of parsing JSON text, computed before it is parsed: a parser holds Python's lock for the whole text.

A unit of work is about 0.1 µs of one core. A text takes values + (NODE - 1) × (keys + arrays + objects).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from common.errors import RequestError

MAX_UNITS = 1 << 20
"""Of one request, about 0.1 s."""
NODE = 16
"""Units of a key, an array or an object. A plain value takes 1."""

_UNITS = np.zeros(256, np.uint8)
_UNITS[[*b",:[{"]] = 1, NODE - 1, NODE, NODE


def json_units(data: bytes) -> int:
    """Return the units of a text, whether or not it is JSON."""
    if len(data) * NODE <= MAX_UNITS:
        return len(data)  # an upper bound that is within the limit
    text = np.frombuffer(data.replace(b"\\\\", b"  ").replace(b'\\"', b"  "), np.uint8)
    in_string = np.bitwise_xor.accumulate(text == ord('"'))
    return int(_UNITS[text[~in_string]].sum(dtype=np.int64))


def expect_parsable(texts: Iterable[bytes], name: str = "The body", param: str | None = None) -> None:
    """Raise `RequestError` for texts that together take too long to parse. `name` is their name in the message."""
    units = sum(map(json_units, texts))
    if units > MAX_UNITS:
        raise RequestError(
            f"{name} has too many parts: they come to {units} units of work, and a request may have {MAX_UNITS} "
            f"(1 for each value, {NODE} for each key, array and object). Send it in several requests.",
            param,
        )
