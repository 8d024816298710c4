"""Keys and values as engines hand them to each other: whole pages as they lie in memory, where both keep them alike; else by
layer, token and KV head, whatever the pages that they lie in.

Pages of any size, ranks of any number and both frameworks come down to the second form, for `ModelRunner.read_pages` joins the
heads of all ranks. The first is as fast as memory is: kernels may keep a page in an order of their own, and to undo that takes
several times as long as to copy it. Letters: L layers of a group · T tokens · P pages · B tokens of a page · K KV heads ·
H head dim; rows are the heads of one layer after another.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import xxhash

from common.interface import ModelRunner

if TYPE_CHECKING:
    from common.weights.checkpoint import Checkpoint

Share = TypeVar("Share")
Came = TypeVar("Came")
TOKENS = "tokens"
SAMPLED = 64
"""Bytes at the start, in the middle and at the end of a tensor by which weights are told apart."""
_AT_ONCE = 1 << 17
"""Bytes of a pool, at least, that are copied by one call, which takes some microseconds apart from them."""


class KV(NamedTuple):
    """Those of the first `tokens` tokens of a sequence, or of some in it."""

    tokens: int
    """T"""
    groups: tuple[Mapping[str, np.ndarray], ...]
    """Of each page group, by name: [L, T, K, H], or whole pages as they lie in memory, uint8[P, rows, bytes]."""
    page: int | None = None
    """B, of pages as they lie; None of tokens."""

    def slice(self, start: int, stop: int) -> KV:
        """Those of the tokens [start, stop) among them. Of pages as they lie, `start` is the first of one."""
        if self.page is None:
            cut = tuple({name: x[:, start:stop] for name, x in group.items()} for group in self.groups)
        else:
            span = slice(start // self.page, -(-stop // self.page))
            cut = tuple({name: x[span] for name, x in group.items()} for group in self.groups)
        return KV(min(stop, self.tokens) - start, cut, self.page)

    def fill(self, other: KV) -> None:
        """Have its arrays hold what those of another do."""
        for mine, theirs in zip(self.groups, other.groups, strict=True):
            for name, x in mine.items():
                np.copyto(x, theirs[name])


class Part(NamedTuple):
    """One array of a group."""

    name: str
    dtype: np.dtype
    outer: tuple[int, ...]
    inner: tuple[int, ...]
    """Its shape before and behind the axis of tokens, or pages."""

    def shape(self, count: int) -> tuple[int, ...]:
        return *self.outer, count, *self.inner

    def num_bytes(self, count: int) -> int:
        return math.prod(self.shape(count)) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A form in which an engine has keys and values. Two engines understand each other if these are equal."""

    model: str
    """What they are computed by: `model_fingerprint`."""
    form: str
    """`TOKENS`, or that of pages: `PageMemory.form`."""
    page: int | None
    """As in `KV`."""
    groups: tuple[tuple[Part, ...], ...]

    @cached_property
    def fingerprint(self) -> str:
        """Equal layouts have the same, and others do not."""
        parts = [[tuple(part._replace(dtype=part.dtype.name)) for part in group] for group in self.groups]  # type: ignore[arg-type]
        told = repr((self.model, sys.byteorder, self.form, self.page, parts))
        return blake2b(told.encode(), digest_size=16).hexdigest()

    def count(self, tokens: int) -> int:
        """Of what its arrays have one each: tokens, or pages for them."""
        return tokens if self.page is None else -(-tokens // self.page)

    def num_bytes(self, tokens: int) -> int:
        return sum(part.num_bytes(self.count(tokens)) for group in self.groups for part in group)

    def tokens_in(self, num_bytes: int) -> int:
        """As many as so many bytes hold, and one, or a page of them, in any case."""
        least = self.page or 1
        return max(1, num_bytes // self.num_bytes(least)) * least

    def pack(self, kv: KV) -> list[memoryview]:
        """Its bytes, in pieces: of each array a layer, or a page, after the other; those of its own memory where they lie side
        by side there."""
        arrays = [group[part.name] for group, parts in zip(kv.groups, self.groups, strict=True) for part in parts]
        return [_bytes_of(piece) for x in arrays for piece in x]

    def sums(self, kv: KV) -> list[int]:
        """The checksum of each piece of `pack`."""
        return [piece_sum(piece) for piece in self.pack(kv)]

    def view(self, memory: np.ndarray, tokens: int) -> KV:
        """Of as many bytes, uint8, as so many tokens have: views of them. The inverse of `pack`."""
        at, groups = 0, []
        for parts in self.groups:
            group = {}
            for part in parts:
                count = self.count(tokens)
                end = at + part.num_bytes(count)
                group[part.name] = memory[at:end].view(part.dtype).reshape(part.shape(count))
                at = end
            groups.append(group)
        return KV(tokens, tuple(groups), self.page)


def layouts_of(runner: ModelRunner, size: int, model: str) -> tuple[Layout, ...]:
    """What a runner that has its pages, of `size` tokens, can give and take; the fastest first. Pages as they lie need no
    arithmetic, and tokens everyone understands."""
    groups = range(len(runner.kv_groups()))
    every = [runner.read_pages(g, []) for g in groups]
    parts = [tuple(Part(name, x.dtype, x.shape[:1], x.shape[3:]) for name, x in none.items()) for none in every]
    tokens = Layout(model=model, form=TOKENS, page=None, groups=tuple(parts))
    memories = [memory for g in groups if (memory := runner.page_memory(g)) is not None]
    if not memories:
        return (tokens,)
    byte = np.dtype(np.uint8)
    parts = [
        tuple(Part(name, byte, (), (sum(map(len, pools)), pools[0].shape[2])) for name, pools in memory.pools.items())
        for memory in memories
    ]
    return Layout(model=model, form=memories[0].form, page=size, groups=tuple(parts)), tokens


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """Of a model's configuration and weights: of each tensor its name, shape, encoding and some of its bytes."""
    digest = blake2b(repr(checkpoint.config).encode(), digest_size=16)
    for name in checkpoint.names():
        entry = checkpoint[name]
        stored = entry.raw().reshape(-1).view(np.uint8)
        digest.update(repr((name, entry.shape, entry.encoding)).encode())
        for at in (0, len(stored) // 2, max(len(stored) - SAMPLED, 0)):
            digest.update(stored[at : at + SAMPLED].tobytes())
    return digest.hexdigest()


def piece_sum(piece: memoryview) -> int:
    """Against damage; against malice there is the signature. XXH3, for of what is in a cache it costs next to nothing, as a
    plain sum does, which does not see words that have changed places; CRC-32 takes ten times as long."""
    return xxhash.xxh3_64_intdigest(piece)


def _bytes_of(x: np.ndarray) -> memoryview:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8).data


class Carrier:
    """Takes keys and values from the pages of a runner, of `size` tokens, and puts them there. By two threads, for one alone
    waits for memory most of the time: a page is many pieces of it. Closed with `close`."""

    def __init__(self, runner: ModelRunner, size: int) -> None:
        self._runner, self._size = runner, size
        self._helper = ThreadPoolExecutor(1, "copy")  # whose thread starts with the first pages

    def read(self, pages: Sequence[int], start: int, kv: KV) -> list[int]:
        """Have `kv` hold what the tokens from `start` on have on a sequence's `pages`. Of pages as they lie, `start` is the
        first of one. Returns `Layout.sums` of it: who has just copied a piece has it in a cache."""
        first, stop = start // self._size, start + kv.tokens
        some = list(pages[first : -(-stop // self._size)])
        if kv.page is not None:
            sums = self._each(_gather, self._runs(some, kv))
        else:
            skipped = start - first * self._size
            pairs: list[tuple[np.ndarray, np.ndarray]] = []
            for g, group in enumerate(kv.groups):
                found = self._runner.read_pages(g, some)
                for name, x_LTKH in group.items():
                    flat = found[name].reshape(len(x_LTKH), -1, *x_LTKH.shape[2:])
                    pairs += zip(x_LTKH, flat[:, skipped : skipped + kv.tokens], strict=True)
            sums = self._each(_copy, pairs)
        return [each for several in sums for each in several]

    def write(self, pages: Sequence[int], kv: KV) -> None:
        """Fill pages, from the first on; what is left of the last nobody reads."""
        some = list(pages[: -(-kv.tokens // self._size)])
        if kv.page is not None:
            self._each(_scatter, self._runs(some, kv))
            return
        missing = len(some) * self._size - kv.tokens
        for g, group in enumerate(kv.groups):
            filled = {name: np.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)]) if missing else x for name, x in group.items()}
            shaped = {name: x.reshape(len(x), len(some), self._size, *x.shape[2:]) for name, x in filled.items()}
            self._runner.write_pages(g, some, shaped)

    def close(self) -> None:
        self._helper.shutdown()

    def _runs(self, pages: Sequence[int], kv: KV) -> list[_Run]:
        """In the order of the pieces of `kv`."""
        runs = []
        for g, group in enumerate(kv.groups):
            memory = self._runner.page_memory(g)
            assert memory
            for name, x in group.items():
                pools = memory.pools[name]
                count = max(1, _AT_ONCE // pools[0][:, 0].nbytes)
                runs += [_Run(x[i : i + count], pools, pages[i : i + count]) for i in range(0, len(pages), count)]
        return runs

    def _each(self, do: Callable[[Share], Came], shares: Sequence[Share]) -> list[Came]:
        """What comes of each. A thread takes the next when it is done with one: the other core may be busy, with the process
        that checks what is copied."""
        done: dict[int, Came] = {}
        left = iter(range(len(shares)))

        def work() -> None:
            for i in left:
                done[i] = do(shares[i])

        help_ = self._helper.submit(work)
        try:
            work()
        finally:
            if not help_.cancel():  # it has begun
                help_.result()
        return [done[i] for i in range(len(shares))]


class _Run(NamedTuple):
    """Pages of one array, one after the other there, that are copied at once."""

    there: np.ndarray
    """In a `KV`: [P, rows, bytes]."""
    pools: Sequence[np.ndarray]
    """Where they lie, each [rows, pages, bytes]."""
    pages: Sequence[int]

    def by_pool(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each pool, where they are to be, or are: [rows, P, bytes]; and the pool."""
        at = 0
        for pool in self.pools:
            yield self.there[:, at : at + len(pool)].swapaxes(0, 1), pool
            at += len(pool)


def _gather(run: _Run) -> list[int]:
    """Returns the checksum of each page."""
    first = run.pages[0]
    for there, pool in run.by_pool():
        # One page is many pieces already, which need not be put together first.
        np.copyto(there, pool[:, first : first + 1] if len(run.pages) == 1 else pool.take(run.pages, 1))
    return [piece_sum(_bytes_of(page)) for page in run.there]


def _scatter(run: _Run) -> None:
    first = run.pages[0]
    for there, pool in run.by_pool():
        pool[:, slice(first, first + 1) if len(run.pages) == 1 else run.pages] = there


def _copy(pair: tuple[np.ndarray, np.ndarray]) -> list[int]:
    there, here = pair
    np.copyto(there, here)
    return [piece_sum(_bytes_of(there))]
