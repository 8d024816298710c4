"""Pages on their way between a pool and memory where they lie side by side, and their checksums: `carry.cc`, and the way to it.

It does not hold Python's lock, so that an engine goes on while what came for it is checked.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import xxhash

from common.errors import BackendError
from common.interface import Rows
from common.kernels.cpu.build import build

log = logging.getLogger(__name__)

SHORT = 240
"""Bytes up to which XXH3 is another sum, which the library does not have."""


class Part(NamedTuple):
    """Keys, or values, in both places."""

    rows: Rows
    there: np.ndarray
    """uint8[P, rows, bytes]"""


class _Part(ctypes.Structure):
    """`Part` in carry.cc."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("num_rows", ctypes.c_size_t),
        ("bytes", ctypes.c_size_t),
        ("there", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
    )


@cache
def open_library() -> ctypes.CDLL:
    """Compile and load it. Raises `BackendError` if that fails."""
    try:
        library = ctypes.CDLL(str(build("carry")))
    except OSError as error:
        raise BackendError(f"Pages are copied by a library of ours, which cannot be loaded: {error}") from error
    for carry in (library.tandem_gather, library.tandem_scatter):
        carry.argtypes, carry.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t], None
    library.tandem_sums.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    library.tandem_sums.restype = None
    return library


@cache
def can_carry() -> bool:
    """Whether the library can be had. If not, the log says why."""
    try:
        open_library()
    except BackendError as error:
        log.warning("Pages are not handed over as they lie, which is faster than token by token: %s", error)
        return False
    return True


def gather(parts: Sequence[Part], pages: Sequence[int]) -> list[int]:
    """Have it be `there` what is on the pages. Returns `sums` of all that is there: who copies a page has it in a cache."""
    there = [part.there for part in parts]
    if any(map(_is_short, there)):
        _carry(open_library().tandem_gather, parts, pages, None)
        return sums(there)
    sums_NP = np.empty((len(parts), len(pages)), np.uint64)
    _carry(open_library().tandem_gather, parts, pages, sums_NP)
    return sums_NP.ravel().tolist()


def scatter(parts: Sequence[Part], pages: Sequence[int]) -> None:
    """Have it be on the pages, each of them another one, what is `there`."""
    _carry(open_library().tandem_scatter, parts, pages, None)


def sums(arrays: Sequence[np.ndarray]) -> list[int]:
    """The checksum of each x[i] of one array after the other."""
    held = [x if x[:1].flags.c_contiguous else np.ascontiguousarray(x) for x in arrays]
    if any(map(_is_short, held)) or not can_carry():
        return [sum_of(piece.reshape(-1).view(np.uint8).data) for x in held for piece in x]
    starts = np.concatenate([x.ctypes.data + x.strides[0] * np.arange(len(x)) for x in held])
    sizes = np.repeat([x[0].nbytes for x in held], [len(x) for x in held])
    found = np.empty(len(starts), np.uint64)
    open_library().tandem_sums(starts.ctypes.data, sizes.ctypes.data, len(starts), found.ctypes.data)
    return found.tolist()


def sum_of(data: memoryview) -> int:
    """Against damage; against malice there is the signature. XXH3, for of what is in a cache it costs next to nothing, as a
    plain sum does, which does not see words that have changed places; CRC-32 takes ten times as long."""
    return xxhash.xxh3_64_intdigest(data)


def _is_short(x: np.ndarray) -> bool:
    return x[:1].nbytes <= SHORT


def _carry(do: Callable[..., None], parts: Sequence[Part], pages: Sequence[int], sums_NP: np.ndarray | None) -> None:
    """Raises `IndexError` for a page that the rows do not have, for nobody else would see."""
    which, told = np.array(pages, np.int64), (_Part * len(parts))()
    for i, (rows, there) in enumerate(parts):
        assert there.shape == (len(which), len(rows.starts), rows.bytes) and there.flags.c_contiguous
        if len(which) and not 0 <= which.min() <= which.max() < rows.pages:
            raise IndexError(f"Expected pages 0 to {rows.pages - 1}, got {which.min()} to {which.max()}.")
        own = None if sums_NP is None else sums_NP[i].ctypes.data
        told[i] = _Part(rows.starts.ctypes.data, len(rows.starts), rows.bytes, there.ctypes.data, own)
    do(told, len(told), which.ctypes.data, len(which))
