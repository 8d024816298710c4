"""Memory that two processes share: as much of it as there is room for, and nothing of it is left."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import psutil
import pytest

from common.kv_transfer import shared_memory
from common.kv_transfer.shared_memory import SHARES, MappingCache, Segment, SegmentPool, open_segment

MIB = 1 << 20


def never() -> None:
    pytest.fail("there is room")


def test_what_one_writes_the_other_reads() -> None:
    if not SHARES:
        pytest.skip("the system has no memory without a name")
    mine = Segment(5000)
    assert mine.descriptor is not None
    other = open_segment(os.dup(mine.descriptor), mine.size)
    memory = mine.lend(5000)
    other[:5000] = np.arange(5000) % 251
    assert np.array_equal(memory, np.arange(5000) % 251) and len(other) == mine.size >= 5000
    mine.close()
    other[0] = 9  # whoever has it still has it
    assert memory[0] == 9
    with pytest.raises(ValueError, match="expected memory of 1 to 100 bytes"):
        open_segment(os.memfd_create("x"), 100)


def test_one_that_comes_again_is_not_mapped_again_and_one_that_comes_instead_is_looked_at() -> None:
    if not SHARES:
        pytest.skip("the system has no memory without a name")
    others, (one, another) = MappingCache(), (Segment(5000), Segment(5000))
    for segment_, value in ((one, 1), (another, 2)):
        assert segment_.descriptor is not None
        segment_.lend(5000)[:] = value
        memory = others.open(segment_.descriptor, segment_.size)
        assert (memory[:5000] == value).all()
        twin = os.dup(segment_.descriptor)
        assert others.open(twin, segment_.size) is memory
        os.close(twin)
    unsealed = os.memfd_create("x")
    os.ftruncate(unsealed, 5000)
    with pytest.raises((ValueError, OSError)):
        others.open(unsealed, 1 << 30)
    os.close(unsealed)


def test_a_segment_is_taken_until_nobody_has_a_view_of_it() -> None:
    room = SegmentPool(4 * MIB)
    _, memory = room.take(4 * MIB, never)
    view = memory[10:20].view(np.uint16).reshape(5, 1)
    del memory
    done = threading.Event()
    threading.Thread(target=lambda: (room.take(MIB, lambda: None), done.set()), daemon=True).start()
    assert not done.wait(0.2)
    del view
    assert done.wait(10)


def test_one_that_is_settled_is_used_again_and_another_is_not() -> None:
    """Somebody may still write to it."""
    room = SegmentPool(16 * MIB)
    for settled in (True, False):
        one, memory = room.take(3 * MIB, never)
        one.settled = settled
        del memory
        other, memory = room.take(4 * MIB, never)
        assert (other is one) == settled and not other.settled
        assert (one.descriptor is not None) == (settled and SHARES)
        del memory


def test_what_is_kept_for_later_makes_way_for_what_is_asked_for_now() -> None:
    room = SegmentPool(8 * MIB)
    small, memory = room.take(2 * MIB, never)
    small.settled = True
    del memory
    _, memory = room.take(8 * MIB, never)
    assert small.descriptor is None
    del memory


def test_what_is_more_than_there_is_room_for_has_it_alone() -> None:
    room = SegmentPool(MIB)
    _, memory = room.take(5 * MIB, never)
    assert len(memory) == 5 * MIB
    del memory
    room.take(5 * MIB, never)


def test_who_asked_first_is_served_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one that wants much would wait for ever behind those that want little."""
    monkeypatch.setattr(shared_memory, "PATIENCE_S", 0.01)
    room, order, waiting = SegmentPool(8 * MIB), list[int](), set[int]()
    held = [room.take(4 * MIB, never) for _ in range(2)]

    def take(size: int) -> None:
        got = room.take(size * MIB, lambda: waiting.add(size))
        order.append(size)
        del got

    threads = [threading.Thread(target=take, args=[size]) for size in (8, 2, 4)]
    for i, thread in enumerate(threads):
        thread.start()
        while len(waiting) <= i:
            time.sleep(0.01)
    held.pop()  # for which the second would have room
    time.sleep(0.1)
    assert order == []
    held.clear()
    for thread in threads:
        thread.join(10)
    assert order[0] == 8 and sorted(order) == [2, 4, 8]


def test_who_waits_is_heard_of_however_often_others_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "PATIENCE_S", 0.2)
    room, heard, done = SegmentPool(4 * MIB), threading.Event(), threading.Event()
    held = [room.take(2 * MIB, never)]

    def wait() -> None:
        room.take(4 * MIB, heard.set)
        done.set()

    thread = threading.Thread(target=wait)
    thread.start()
    end = time.monotonic() + 10
    while not heard.is_set() and time.monotonic() < end:
        with room._changed:
            room._changed.notify_all()
        time.sleep(0.01)
    assert heard.is_set() and not done.is_set()
    held.clear()
    thread.join(10)
    assert done.is_set()


def test_who_gives_up_waiting_lets_the_next_one_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "PATIENCE_S", 0.01)
    room = SegmentPool(4 * MIB)
    held = room.take(2 * MIB, never)

    def give_up() -> None:
        raise ConnectionError("the other end is gone")

    with pytest.raises(ConnectionError):
        room.take(4 * MIB, give_up)
    room.take(2 * MIB, never)
    del held


def test_no_descriptor_is_left() -> None:
    room, before = SegmentPool(64 * MIB), psutil.Process().num_fds()
    for size in (3, 40, 7, 64, 1):
        one, memory = room.take(size * MIB, never)
        one.settled = size % 2 == 1
        del one, memory
    assert len(room._free) <= 3 and psutil.Process().num_fds() - before <= 2 * len(room._free)  # a mapping has one of its own
