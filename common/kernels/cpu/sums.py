"""What processes of a machine tell each other inside a step, through memory that all have mapped: `sums.h`, and the way to it.

The memory is a file without a name, of which nothing is left once nobody has it mapped. One process makes it, and all open it
where that one's open files are listed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import numpy as np

from common.config import MAX_RANKS
from common.errors import BackendError
from common.kernels.cpu.build import build

_ALL, _OVER, _DIFFERENT = range(3)  # `Told` in sums.h


@cache
def open_library() -> ctypes.CDLL:
    """Compile and load the exchange. Raises `BackendError` if that fails."""
    try:
        library = ctypes.CDLL(str(build("sums")))
    except (BackendError, OSError) as error:
        raise BackendError(f"Processes share out a model through a library of ours, which cannot be had: {error}") from error
    own = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    library.tandem_meeting_size.argtypes, library.tandem_meeting_size.restype = [ctypes.c_int], ctypes.c_size_t
    library.tandem_add_float32.argtypes = [*own, ctypes.c_void_p, ctypes.c_size_t]
    library.tandem_add_bfloat16.argtypes = [*own, ctypes.c_void_p, ctypes.c_size_t]
    library.tandem_gather.argtypes = [*own, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    library.tandem_leave.argtypes, library.tandem_leave.restype = [ctypes.c_void_p], None
    library.tandem_told.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_uint64)]
    library.tandem_told.restype = None
    return library


class PeerLeft(BackendError):
    """A process has left in the middle of a step."""


class SharedFile(NamedTuple):
    """Where the memory is: what JSON can hold."""

    path: str
    device: int
    inode: int
    """Which file it is. A path by number is another's as soon as the number is."""


class CommStats(NamedTuple):
    """What a rank has told the others since they met."""

    parts: int
    """Arrays; one that is large counts as several."""
    bytes: int
    seconds: float
    """How long that took, waiting included."""


def place_of(file: int) -> SharedFile:
    """Where others find a file of this process, as long as it is open here."""
    status = os.fstat(file)
    return SharedFile(f"/proc/{os.getpid()}/fd/{file}", status.st_dev, status.st_ino)


@contextmanager
def meeting_place(ranks: int) -> Iterator[SharedFile]:
    """Memory for so many ranks, to which others can come until the end. Raises `BackendError` where there can be none."""
    if not hasattr(os, "memfd_create"):
        raise BackendError("Processes share out a model through a file without a name, which only Linux has.")
    size = open_library().tandem_meeting_size(ranks)
    if not size:
        raise BackendError(f"1 to {MAX_RANKS} processes can share out a model, and not {ranks}.")
    file = os.memfd_create("tandem")
    try:
        os.ftruncate(file, size)
        yield place_of(file)
    finally:
        os.close(file)


class SharedMemoryGroup:
    """One rank's end of it. Every rank makes the same calls in the same order, one at a time; they take addresses of contiguous
    memory."""

    def __init__(self, place: SharedFile, rank: int, ranks: int) -> None:
        """Raises `PeerLeft` if it is too late."""
        library = open_library()
        file = open_place(place, os.O_RDWR)
        try:
            memory = mmap.mmap(file, library.tandem_meeting_size(ranks))
        finally:
            os.close(file)
        self.memory = np.frombuffer(memory, np.uint8)
        """What the ranks share, for kernels that exchange something themselves. It stays as long as somebody holds it."""
        self._own = (self.memory.ctypes.data, rank, ranks)
        self._add = {"float32": library.tandem_add_float32, "bfloat16": library.tandem_add_bfloat16}
        self._gather, self._leave, self._told = library.tandem_gather, library.tandem_leave, library.tandem_told

    def add(self, x: int, size: int, dtype: str) -> None:
        """Have so many numbers at `x` be the sum of every rank's, added in the order of ranks in float32. Raises `PeerLeft`."""
        expect_told(self._add[dtype](*self._own, x, size))

    def gather(self, x: int, size: int, every: int) -> None:
        """Every rank's `size` bytes at `x`, in their order, at `every`. Raises `PeerLeft`."""
        expect_told(self._gather(*self._own, x, size, every))

    def leave(self) -> None:
        """Have all ranks' calls raise `PeerLeft`, those that wait at once. Any thread may."""
        self._leave(self._own[0])

    @property
    def told(self) -> CommStats:
        counters = (ctypes.c_uint64 * 3)()
        self._told(*self._own[:2], counters)
        parts, size, nanoseconds = counters
        return CommStats(parts, size, nanoseconds * 1e-9)


def expect_told(told: int) -> None:
    """Raise `PeerLeft` unless a kernel that exchanges something returned that all ranks were told."""
    if told == _OVER:
        raise PeerLeft("A process of this engine has left the step; its log says more.")
    if told == _DIFFERENT:
        raise PeerLeft("The processes of this engine are at different places of a step: their arrays have different sizes.")
    assert told == _ALL


def open_place(place: SharedFile, access: int) -> int:
    """The file that is there, for `os.O_RDWR` and the like. Raises `PeerLeft` if it is no more."""
    try:
        file = os.open(place.path, access | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise PeerLeft(f"The processes of this engine no longer meet at {place.path}: {error}") from error
    status = os.fstat(file)
    if (status.st_dev, status.st_ino) != (place.device, place.inode):
        os.close(file)
        raise PeerLeft(f"The processes of this engine no longer meet at {place.path}, which is another file by now.")
    os.set_blocking(file, True)
    return file
