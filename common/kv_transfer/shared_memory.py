"""Memory that two processes share, and room for so much of it.

A segment has no name: whoever has its descriptor has it, and it is gone with the last process that does, however that ends. Its
size is sealed, so that nobody who reads or writes it finds it shorter than it was; where the system has no such memory it is
this process's alone, and has no descriptor.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import threading
import weakref
from collections import deque
from collections.abc import Callable
from time import monotonic

import numpy as np

SHARES = hasattr(os, "memfd_create")
"""Whether the system has such memory. Linux alone does."""
PATIENCE_S = 0.5
"""Between two words to who is waited for."""
_UNIT = 1 << 21
"""Bytes of which a segment has a whole number, so that more of them can take the place of others."""


class Segment:
    """At least `size` bytes. Closed with `close`; what was lent of it is good until nobody has it any more."""

    def __init__(self, size: int) -> None:
        self.size = -(-size // _UNIT) * _UNIT
        self.descriptor: int | None = None
        self.settled = False
        """Whether nobody else will write to it any more."""
        if not SHARES:
            self._map = mmap.mmap(-1, self.size)
            return
        self.descriptor = os.memfd_create("tandem-pages", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, self.size)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._map = mmap.mmap(self.descriptor, self.size)
        except BaseException:
            self.close()
            raise

    def lend(self, size: int) -> np.ndarray:
        """The first `size` bytes, uint8."""
        return np.frombuffer(self._map, np.uint8, size)

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def open_segment(descriptor: int, most: int) -> np.ndarray:
    """The bytes of another process's segment, uint8. Raises `ValueError` for what is none, or has more than `most` bytes: what
    can become shorter would end whoever reads it."""
    found = os.fstat(descriptor)
    sealed = stat.S_ISREG(found.st_mode) and fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    if not sealed or not 0 < found.st_size <= most:
        raise ValueError(f"expected memory of 1 to {most} bytes that is sealed, got {found.st_size} bytes")
    return np.frombuffer(mmap.mmap(descriptor, found.st_size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE), np.uint8)


class MappingCache:
    """Segments of other processes. The last one stays mapped, for it is likely to come again, and to map and unmap it takes
    almost as long as to fill it. Any thread may ask."""

    def __init__(self) -> None:
        self._last: tuple[tuple[int, int], np.ndarray] | None = None

    def open(self, descriptor: int, most: int) -> np.ndarray:
        """As `open_segment`."""
        found, last = os.fstat(descriptor), self._last
        which = found.st_dev, found.st_ino  # which no other has while this one is mapped
        if last is None or last[0] != which:
            self._last = last = which, open_segment(descriptor, most)
        return last[1]


class SegmentPool:
    """Segments that together have at most `most` bytes, or one alone that has more. Any thread may ask.

    A segment that is free again serves the next who asks: to have the system clear memory first costs as much as to fill it.
    """

    def __init__(self, most: int) -> None:
        self._most, self._used = most, 0
        self._free: list[Segment] = []
        self._queue: deque[object] = deque()
        # A view may go, and give its segment back, wherever Python happens to collect it: in here too.
        self._changed = threading.Condition(threading.RLock())

    def take(self, size: int, waiting: Callable[[], object]) -> tuple[Segment, np.ndarray]:
        """A segment, and `size` bytes of it, which are taken until nobody has a view of them any more. Who asked first is
        served first; while it takes long, `waiting` is called from time to time, and may raise."""
        ticket, due = object(), monotonic() + PATIENCE_S
        with self._changed:
            self._queue.append(ticket)
            try:
                while self._queue[0] is not ticket or not (self._used == 0 or self._used + size <= self._most):
                    self._changed.wait(due - monotonic())
                    if monotonic() >= due:  # whatever has woken us, and however often
                        waiting()
                        due = monotonic() + PATIENCE_S
                segment = self._find(size)
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
            self._used += segment.size
        memory = segment.lend(size)
        weakref.finalize(memory, self._give_back, segment).atexit = False
        return segment, memory

    def _find(self, size: int) -> Segment:
        fitting = [segment for segment in self._free if size <= segment.size <= 2 * size + _UNIT]
        if fitting:
            segment = min(fitting, key=lambda segment: segment.size)
            self._free.remove(segment)
            segment.settled = False
            return segment
        while self._free and self._used + size + sum(segment.size for segment in self._free) > self._most:
            self._free.pop(0).close()
        return Segment(size)

    def _give_back(self, segment: Segment) -> None:
        with self._changed:
            self._used -= segment.size
            if segment.settled:
                self._free.append(segment)
            else:
                segment.close()
            self._changed.notify_all()
