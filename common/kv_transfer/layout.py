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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.batch import KV
from common.interface import ModelRunner
from common.kernels.cpu import carry

if TYPE_CHECKING:
    from common.weights.checkpoint import Checkpoint

TOKENS = "tokens"
SAMPLED = 64
"""Bytes at the start, in the middle and at the end of a tensor by which weights are told apart."""


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
        return [np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data for x in self._arrays(kv) for piece in x]

    def sums(self, kv: KV) -> list[int]:
        """The checksum of each piece of `pack`."""
        return carry.sums(self._arrays(kv))

    def _arrays(self, kv: KV) -> list[np.ndarray]:
        return [group[part.name] for group, parts in zip(kv.groups, self.groups, strict=True) for part in parts]

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
    arithmetic, but a compiler, and tokens everyone understands."""
    groups = range(len(runner.kv_groups()))
    every = [runner.read_pages(g, []) for g in groups]
    parts = [tuple(Part(name, x.dtype, x.shape[:1], x.shape[3:]) for name, x in none.items()) for none in every]
    tokens = Layout(model=model, form=TOKENS, page=None, groups=tuple(parts))
    memories = [memory for g in groups if (memory := runner.page_memory(g)) is not None]
    if not (memories and carry.can_carry()):
        return (tokens,)
    byte = np.dtype(np.uint8)
    parts = [
        tuple(Part(name, byte, (), (len(rows.starts), rows.bytes)) for name, rows in memory.rows.items()) for memory in memories
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


class PageCopier:
    """Takes keys and values from the pages of a runner, of `size` tokens, and puts them there."""

    def __init__(self, runner: ModelRunner, size: int) -> None:
        self._runner, self._size = runner, size

    def read(self, pages: Sequence[int], start: int, kv: KV) -> list[int]:
        """Have `kv` hold what the tokens from `start` on have on a sequence's `pages`. Of pages as they lie, `start` is the
        first of one. Returns `Layout.sums` of it."""
        first, stop = start // self._size, start + kv.tokens
        some = list(pages[first : -(-stop // self._size)])
        if kv.page is not None:
            return carry.gather(self._parts(kv), some)
        skipped, found = start - first * self._size, list[int]()
        for g, group in enumerate(kv.groups):
            read = self._runner.read_pages(g, some)
            for name, x_LTKH in group.items():
                flat = read[name].reshape(len(x_LTKH), -1, *x_LTKH.shape[2:])
                np.copyto(x_LTKH, flat[:, skipped : skipped + kv.tokens])
                found += carry.sums([x_LTKH])
        return found

    def write(self, pages: Sequence[int], kv: KV) -> None:
        """Fill pages, from the first on; what is left of the last nobody reads."""
        some = list(pages[: -(-kv.tokens // self._size)])
        if kv.page is not None:
            carry.scatter(self._parts(kv), some)
            return
        missing = len(some) * self._size - kv.tokens
        for g, group in enumerate(kv.groups):
            filled = {name: np.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)]) if missing else x for name, x in group.items()}
            shaped = {name: x.reshape(len(x), len(some), self._size, *x.shape[2:]) for name, x in filled.items()}
            self._runner.write_pages(g, some, shaped)

    def _parts(self, kv: KV) -> list[carry.Part]:
        """In the order of its pieces."""
        parts = list[carry.Part]()
        for g, group in enumerate(kv.groups):
            memory = self._runner.page_memory(g)
            assert memory
            parts += [carry.Part(memory.rows[name], there) for name, there in group.items()]
        return parts
