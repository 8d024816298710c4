"""Keys and values as engines hand them to each other: by layer, token and KV head, whatever the pages that they lie in.

Pages of any size, ranks of any number and both frameworks come down to this one layout, for `ModelRunner.read_pages` joins the
heads of all ranks. Letters: L layers of a group · T tokens · P pages · B tokens of a page · K KV heads · H head dim.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.interface import ModelRunner

if TYPE_CHECKING:
    from common.weights.checkpoint import Checkpoint

SAMPLED = 64
"""Bytes at the start, in the middle and at the end of a tensor by which weights are told apart."""


class KV(NamedTuple):
    """Those of the first `tokens` tokens of a sequence, or of some in it."""

    tokens: int
    """T"""
    groups: tuple[Mapping[str, np.ndarray], ...]
    """Of each page group, by name: [L, T, K, H]."""

    def slice(self, start: int, stop: int) -> KV:
        """Those of the tokens [start, stop) among them."""
        cut = tuple({name: x[:, start:stop] for name, x in group.items()} for group in self.groups)
        return KV(min(stop, self.tokens) - start, cut)


class Part(NamedTuple):
    """One array of a group, in every token."""

    name: str
    dtype: np.dtype
    layers: int
    heads: int
    width: int
    """H"""

    def shape(self, tokens: int) -> tuple[int, int, int, int]:
        return self.layers, tokens, self.heads, self.width

    def num_bytes(self, tokens: int) -> int:
        return math.prod(self.shape(tokens)) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What an engine has of every token. Two engines understand each other if these are equal."""

    model: str
    """What they are computed by: `model_fingerprint`."""
    groups: tuple[tuple[Part, ...], ...]

    @property
    def fingerprint(self) -> str:
        """Equal layouts have the same, and others do not."""
        parts = [[tuple(part._replace(dtype=part.dtype.name)) for part in group] for group in self.groups]  # type: ignore[arg-type]
        return blake2b(repr((self.model, sys.byteorder, parts)).encode(), digest_size=16).hexdigest()

    def num_bytes(self, tokens: int) -> int:
        return sum(part.num_bytes(tokens) for group in self.groups for part in group)

    def pack(self, kv: KV) -> list[memoryview]:
        """Its bytes, part by part."""
        arrays = [group[part.name] for group, parts in zip(kv.groups, self.groups, strict=True) for part in parts]
        return [np.ascontiguousarray(x).reshape(-1).view(np.uint8).data for x in arrays]

    def unpack(self, data: bytes | memoryview, tokens: int) -> KV:
        """The inverse of `pack`, for as many bytes as so many tokens have; its arrays are views of them."""
        at, groups = 0, []
        for parts in self.groups:
            group = {}
            for part in parts:
                end = at + part.num_bytes(tokens)
                group[part.name] = np.frombuffer(data[at:end], np.uint8).view(part.dtype).reshape(part.shape(tokens))
                at = end
            groups.append(group)
        return KV(tokens, tuple(groups))


def join(pieces: Sequence[KV]) -> KV:
    """Those of tokens that follow one another."""
    groups = [
        {name: np.concatenate([piece.groups[g][name] for piece in pieces], axis=1) for name in group}
        for g, group in enumerate(pieces[0].groups)
    ]
    return KV(sum(piece.tokens for piece in pieces), tuple(groups))


def layout_of(runner: ModelRunner, model: str) -> Layout:
    """Of a runner that has its pages."""
    groups = []
    for g in range(len(runner.kv_groups())):
        none = runner.read_pages(g, [])
        groups.append(tuple(Part(name, x.dtype, x.shape[0], x.shape[3], x.shape[4]) for name, x in none.items()))
    return Layout(model=model, groups=tuple(groups))


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


def read_tokens(runner: ModelRunner, pages: Sequence[int], size: int, start: int, stop: int) -> KV:
    """Copies of what the tokens [start, stop) of a sequence have on its `pages` of `size` tokens."""
    first = start // size
    some = list(pages[first : -(-stop // size)])
    groups = []
    for g in range(len(runner.kv_groups())):
        flat = {name: x.reshape(len(x), -1, *x.shape[3:]) for name, x in runner.read_pages(g, some).items()}
        groups.append({name: x[:, start - first * size : stop - first * size] for name, x in flat.items()})
    return KV(stop - start, tuple(groups))


def write_tokens(runner: ModelRunner, pages: Sequence[int], size: int, kv: KV) -> None:
    """Fill pages of `size` tokens, from the first on; what is left of the last holds zeros."""
    some = list(pages[: -(-kv.tokens // size)])
    missing = len(some) * size - kv.tokens
    for g, group in enumerate(kv.groups):
        filled = {name: np.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)]) if missing else x for name, x in group.items()}
        runner.write_pages(g, some, {name: x.reshape(len(x), len(some), size, *x.shape[2:]) for name, x in filled.items()})
