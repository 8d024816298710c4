"""The library that copies pages between pools and memory where they lie side by side, and sums them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import xxhash

from common.interface import Rows, rows_of
from common.kernels.cpu import carry
from common.kernels.cpu.carry import SHORT, Part, gather, scatter, sums
from common.kv_transfer.layout import TOKENS, layouts_of
from tests.history_runner import HistoryRunner

RNG = np.random.default_rng(0)
LINE = 64


def drawn(*shape: int, off: int = 0) -> np.ndarray:
    """Bytes, `off` behind a whole cache line."""
    size = int(np.prod(shape))
    held = RNG.integers(0, 256, size + 2 * LINE, np.uint8)
    at = -held.ctypes.data % LINE + off
    return held[at : at + size].reshape(shape)


def pool_of(rows: int, pages: int, size: int, off: int = 0) -> tuple[np.ndarray, Rows]:
    pool = drawn(rows, pages, size, off=off)
    return pool, rows_of([pool.ctypes.data], (rows, pages, size), 1)


def hashes(pieces: Sequence[np.ndarray]) -> list[int]:
    return [xxhash.xxh3_64_intdigest(piece.tobytes()) for piece in pieces]


# Of one thread and of two, of whole cache lines and not, and from sums of the short kind to those of many blocks.
@pytest.mark.parametrize(
    ("rows", "size"),
    [(1, 1), (1, 64), (3, 80), (4, 60), (1, 241), (4, 64), (3, 1023), (2, 1024), (1, 1088), (5, 2560), (90, 2048), (90, 2000)],
)
@pytest.mark.parametrize("off", [0, 8])
def test_pages_come_out_as_they_lie_and_go_in_again_with_the_sums_that_a_library_of_others_has(
    rows: int, size: int, off: int
) -> None:
    pages = [17, 3, 4, 0, 12, 18, 9, 1]
    (keys, keys_at), (values, values_at) = pool_of(rows, 19, size, off), pool_of(rows, 19, size)
    there = [drawn(len(pages), rows, size, off=off) for _ in "kv"]
    before = keys.copy(), values.copy()
    found = gather([Part(keys_at, there[0]), Part(values_at, there[1])], pages)
    assert all(np.array_equal(x, pool[:, pages].swapaxes(0, 1)) for x, pool in zip(there, before, strict=True))
    assert np.array_equal(keys, before[0]) and np.array_equal(values, before[1])
    assert found == hashes([*there[0], *there[1]]) == sums(there)

    others = pool_of(rows, 30, size, off), pool_of(rows, 30, size)
    right = [pool.copy() for pool, _ in others]
    where = [29, 2, 11, 5, 0, 7, 8, 21]
    scatter([Part(at, x) for (_, at), x in zip(others, there, strict=True)], where)
    for pool, x in zip(right, there, strict=True):
        pool[:, where] = x.swapaxes(0, 1)
    assert all(np.array_equal(pool, held) for (pool, _), held in zip(others, right, strict=True))


def test_pools_of_several_layers_are_one_behind_the_other() -> None:
    layers = [drawn(3, 6, 128) for _ in range(4)]
    rows = rows_of([x.ctypes.data for x in layers], (3, 6, 2, 16), 4)
    there = np.zeros((2, 12, 128), np.uint8)
    gather([Part(rows, there)], [5, 2])
    assert np.array_equal(there, np.concatenate(layers)[:, [5, 2]].swapaxes(0, 1))


@pytest.mark.parametrize("length", [*range(236, 260), 511, 512, 513, *range(1020, 1030), 2048, 65_537, 3 << 20])
def test_a_sum_is_xxh3_of_any_length(length: int) -> None:
    x = drawn(3, length, off=length % 7)
    assert sums([x, x[::-1], x[:1]]) == hashes([*x, *x[::-1], x[0]])


def test_what_does_not_lie_side_by_side_has_the_sum_of_what_it_says() -> None:
    x_LTKH = drawn(3, 50, 4, 64)
    for cut in (x_LTKH[:, 7:40], x_LTKH[:, ::-1], x_LTKH[..., ::2], x_LTKH[:0], x_LTKH[:, :0]):
        assert sums([cut]) == hashes([*cut])


@pytest.mark.parametrize("size", [SHORT // 8, 640])
def test_one_bit_anywhere_makes_another_sum(size: int) -> None:
    x = drawn(1, size)
    (right,) = sums([x])
    for at in range(8 * size):
        x[0, at // 8] ^= 1 << at % 8
        assert sums([x]) != [right]
        x[0, at // 8] ^= 1 << at % 8
    assert sums([x]) == [right]


@pytest.mark.parametrize("page", [-1, 6, 1 << 40])
def test_a_page_that_there_is_not_is_refused_and_nothing_is_written(page: int) -> None:
    pool, rows = pool_of(2, 6, 256)
    before, there = pool.copy(), np.zeros((2, 2, 256), np.uint8)
    for do in (gather, scatter):
        with pytest.raises(IndexError, match=f"Expected pages 0 to 5, got .*{page}"):
            do([Part(rows, there)], [3, page])
    assert np.array_equal(pool, before) and not there.any()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Iterator[None]:
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    for kept in (carry.open_library, carry.can_carry):
        kept.cache_clear()
    yield
    for kept in (carry.open_library, carry.can_carry):
        kept.cache_clear()


def test_without_a_compiler_tokens_are_handed_over_and_have_the_same_sums(
    no_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [layout.form for layout in layouts_of(HistoryRunner(num_pages=4), 16, "m")] == [TOKENS]
    assert caplog.text.count("Pages are not handed over as they lie") == 1 and "C++" in caplog.text
    x = drawn(3, 5000)
    assert sums([x, x[:, :100]]) == hashes([*x, *x[:, :100]])
