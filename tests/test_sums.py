"""What ranks of a machine tell each other through shared memory: the same bits for all, and none waits for one that is gone."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import psutil
import pytest
import torch

from common.config import MAX_RANKS
from common.errors import BackendError
from common.kernels.cpu.sums import PeerLeft, SharedMemoryGroup, meeting_place
from common.system.hardware import cores
from tests.history_backend import ROOT

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
PLACE = 1 << 21
"""Bytes after which a part goes in pieces."""
SIZES = (1, 15, 16, 17, 18_432, PLACE // 4 - 1, PLACE // 4, PLACE // 4 + 1, 1_300_000)
NOTICED_S = 2.0


def meet(ranks: int) -> list[SharedMemoryGroup]:
    with meeting_place(ranks) as place:
        return [SharedMemoryGroup(place, rank, ranks) for rank in range(ranks)]


def add(exchange: SharedMemoryGroup, x: np.ndarray) -> None:
    exchange.add(x.ctypes.data, x.size, x.dtype.name)


def gather(exchange: SharedMemoryGroup, x: np.ndarray, ranks: int) -> np.ndarray:
    every = np.empty((ranks, *x.shape), x.dtype)
    exchange.gather(x.ctypes.data, x.nbytes, every.ctypes.data)
    return every


def together(*calls: Callable[[], object]) -> list[object]:
    """What each returns, all called at once."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [done.result() for done in [pool.submit(call) for call in calls]]


def drawn(rng: np.random.Generator, size: int, dtype: str) -> np.ndarray:
    """Of very different magnitudes, so that another order of additions shows."""
    return (rng.standard_normal(size) * 10.0 ** rng.integers(-4, 5, size)).astype(DTYPES[dtype])


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint8)


def in_order(parts: list[np.ndarray]) -> np.ndarray:
    total = parts[0].astype(np.float32)
    for part in parts[1:]:
        total = total + part.astype(np.float32)
    return total.astype(parts[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_has_the_bits_of_the_sum_in_the_order_of_ranks(ranks: int, dtype: str) -> None:
    rng, exchanges = np.random.default_rng(ranks), meet(ranks)
    for size in SIZES * 2:
        parts = [drawn(rng, size, dtype) for _ in range(ranks)]
        right = in_order(parts)
        backwards = not np.array_equal(bits(in_order(parts[::-1])), bits(right))
        together(*(lambda e=e, x=x: add(e, x) for e, x in zip(exchanges, parts, strict=True)))
        for x in parts:
            assert np.array_equal(bits(x), bits(right))
    assert backwards or ranks == 2


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_has_what_each_has_in_the_order_of_ranks(ranks: int) -> None:
    rng, exchanges = np.random.default_rng(ranks), meet(ranks)
    for size in (0, 1, 7, PLACE, 3 * PLACE + 5, 2):
        parts = [rng.integers(0, 256, size).astype(np.uint8) for _ in range(ranks)]
        told = together(*(lambda e=e, x=x: gather(e, x, ranks) for e, x in zip(exchanges, parts, strict=True)))
        for every in told:
            assert np.array_equal(every, np.stack(parts))


def test_a_sum_reads_nothing_and_writes_nothing_beside_its_numbers() -> None:
    exchanges = meet(2)
    whole = [np.full(64, 7, np.float32) for _ in exchanges]
    together(*(lambda e=e, x=x: add(e, x[16:33]) for e, x in zip(exchanges, whole, strict=True)))
    for x in whole:
        assert (x[16:33] == 14).all() and (x[:16] == 7).all() and (x[33:] == 7).all()


def test_more_ranks_than_cores_go_forward() -> None:
    ranks, rounds = min(4 * cores() + 1, MAX_RANKS), 50
    exchanges = meet(ranks)

    def go(exchange: SharedMemoryGroup) -> float:
        x = np.ones(1, np.float32)
        for _ in range(rounds):
            add(exchange, x)
            x /= ranks
        return float(x[0])

    assert together(*(lambda e=e: go(e) for e in exchanges)) == [1.0] * ranks


@pytest.mark.parametrize("ranks", [0, MAX_RANKS + 1])
def test_no_more_ranks_meet_than_there_is_room_for(ranks: int) -> None:
    with pytest.raises(BackendError, match=f"1 to 64 processes can share out a model, and not {ranks}"), meeting_place(ranks):
        pass


def test_callers_that_treat_subnormals_differently_get_the_same_bits() -> None:
    """As XLA's threads and PyTorch's do."""
    first, second = meet(2)
    sums = [np.full(16, 1e-39, np.float32) for _ in range(2)]

    def flushing(flush: bool, exchange: SharedMemoryGroup, x: np.ndarray) -> None:
        torch.set_flush_denormal(flush)  # of this thread
        add(exchange, x)

    together(lambda: flushing(True, first, sums[0]), lambda: flushing(False, second, sums[1]))
    assert np.array_equal(bits(sums[0]), bits(sums[1]))


@pytest.mark.parametrize("waited_s", [0.0, 0.3])
@pytest.mark.parametrize("size", [1, PLACE])
def test_who_waits_for_one_that_leaves_learns_it_and_so_does_whoever_comes_later(size: int, waited_s: float) -> None:
    first, second, third = meet(3)
    x = np.zeros(size, np.float32)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(add, exchange, x.copy()) for exchange in (first, second)]
        time.sleep(waited_s)
        third.leave()
        begin = time.monotonic()
        for wait in waiting:
            with pytest.raises(PeerLeft, match="has left the step"):
                wait.result(NOTICED_S)
        assert time.monotonic() - begin < NOTICED_S
    for exchange in (first, second, third):
        with pytest.raises(PeerLeft, match="has left the step"):
            add(exchange, x)


def test_ranks_that_are_at_different_places_are_told_so() -> None:
    first, second = meet(2)
    x = np.zeros(32, np.float32)
    errors = []

    def note(call: Callable[[], object]) -> None:
        with pytest.raises(PeerLeft) as raised:
            call()
        errors.append(str(raised.value))

    together(lambda: note(lambda: add(first, x[:17])), lambda: note(lambda: add(second, x[:16])))
    assert any("arrays have different sizes" in error for error in errors)


def test_ranks_that_have_left_meet_anew() -> None:
    for _ in range(3):
        exchanges = meet(2)
        parts = [np.float32([1, 2]), np.float32([3, 5])]
        together(*(lambda e=e, x=x: add(e, x) for e, x in zip(exchanges, parts, strict=True)))
        assert parts[0].tolist() == parts[1].tolist() == [4, 7]
        exchanges[1].leave()


def test_who_comes_late_is_told_so_and_touches_no_file_that_has_the_number_by_then(tmp_path: Path) -> None:
    with meeting_place(2) as place:
        pass
    number = int(place.path.rpartition("/")[2])
    with pytest.raises(PeerLeft, match="no longer meet"):
        SharedMemoryGroup(place, 1, 2)
    (tmp_path / "other").write_bytes(b"mine")
    other = os.open(tmp_path / "other", os.O_RDWR)
    os.dup2(other, number)
    with pytest.raises(PeerLeft, match="another file by now"):
        SharedMemoryGroup(place, 1, 2)
    for taken in {other, number}:
        os.close(taken)
    assert (tmp_path / "other").read_bytes() == b"mine"


def test_nothing_is_left_of_a_meeting_whose_ranks_are_gone() -> None:
    gc.collect()  # what other tests have left
    process = psutil.Process()
    held = lambda: (Path("/proc/self/maps").read_text().count("memfd:tandem"), process.num_fds())  # noqa: E731
    before = held()
    exchanges = meet(2)
    assert held() > before
    del exchanges
    assert held() == before


OTHER = """
import json, sys
import numpy as np
from common.kernels.cpu.sums import SharedFile, SharedMemoryGroup
exchange = SharedMemoryGroup(SharedFile(*json.loads(sys.argv[1])), 1, 2)
print("there", flush=True)
x = np.arange(100_000, dtype=np.float32)
for _ in range(20):
    exchange.add(x.ctypes.data, x.size, "float32")
    x /= 2
print(x.tobytes() == np.arange(100_000, dtype=np.float32).tobytes(), flush=True)
sys.stdin.read()
"""


def test_ranks_are_processes_and_one_that_is_killed_is_waited_for_until_it_is_told() -> None:
    with meeting_place(2) as place:
        other = subprocess.Popen(
            [sys.executable, "-c", OTHER, json.dumps(place)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert other.stdout and other.stdout.readline() == "there\n"
        exchange = SharedMemoryGroup(place, 0, 2)
    x = np.arange(100_000, dtype=np.float32)
    for _ in range(20):
        add(exchange, x)
        x /= 2
    assert x.tobytes() == np.arange(100_000, dtype=np.float32).tobytes()
    assert other.stdout.readline() == "True\n"
    other.kill()
    other.communicate()
    threading.Timer(0.1, exchange.leave).start()
    with pytest.raises(PeerLeft):
        add(exchange, x)
