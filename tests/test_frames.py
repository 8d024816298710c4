"""What goes from one process to another arrives whole, or not at all."""

from __future__ import annotations

import io

import numpy as np
import pytest

from common.process.frames import MAGIC, MAX_DATA, NoFrame, read_frame, write_frame


def written(*parts: bytes) -> bytes:
    stream = io.BytesIO()
    write_frame(stream, {"a": [1, 2.5, "ü", float("-inf")], "array": np.arange(2), "scalar": np.float32(0.5)}, parts)
    return stream.getvalue()


def test_a_frame_survives_the_trip() -> None:
    frame = read_frame(io.BytesIO(written(b"abc", memoryview(b"de"))))
    assert frame == ({"a": [1, 2.5, "ü", float("-inf")], "array": [0, 1], "scalar": 0.5}, b"abcde")


def test_a_stream_that_ends_within_a_frame_has_none() -> None:
    data = written(b"abc")
    assert all(read_frame(io.BytesIO(data[:cut])) is None for cut in range(len(data)))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"\xff" * 4, "expected a frame"),
        (b"GET / HTTP/1.1\r\n", "expected a frame"),
        (MAGIC + (1 << 31).to_bytes(4, "little") + bytes(8), "at most"),
        (MAGIC + (2).to_bytes(4, "little") + (MAX_DATA + 1).to_bytes(8, "little") + b"{}", "at most"),
        (MAGIC + (2).to_bytes(4, "little") + bytes(8) + b"{]", "no JSON"),
        (MAGIC + (2).to_bytes(4, "little") + bytes(8) + b"[]", "got a frame with"),
    ],
)
def test_what_is_no_frame_is_refused(data: bytes, told: str) -> None:
    with pytest.raises(NoFrame, match=told):
        read_frame(io.BytesIO(data))
