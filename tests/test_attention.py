"""Paged attention of ragged steps against dense attention in float64, with rubbish in every slot that holds no token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from common.batch import Batch
from common.config import ModelConfig
from tests.backends import Packer, device, device_plan, part

N, K, H = 6, 2, 16
SEQS, TOKENS, LENGTH = 40, 320, 384
"""What the compiled steps have room for."""
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

Sizes = Sequence[tuple[int, int]]
"""(tokens in the cache, tokens in the step) of each sequence."""


def config_of(window: int) -> ModelConfig:
    """Layer 0 sees everything, layer 1 a window."""
    sizes = {"num_heads": N, "num_kv_heads": K, "head_dim": H, "hidden_size": N * H, "intermediate_size": 1, "vocab_size": 9}
    return ModelConfig(family="llama", num_layers=2, max_position=LENGTH, norm_eps=1e-5, layer_window=(0, window), **sizes)


@cache
def attention(backend: str, config: ModelConfig) -> Callable[..., Any]:
    """(q, k, v, plan, pools) → the outputs of both layers."""

    def run(q: Any, k: Any, v: Any, plan: Any, pools: Any) -> tuple[Any, Any]:
        attend = part(backend, "attention").paged_attention(config, plan)
        full, pools = attend(q, k, v, 0, pools)
        return full, attend(q, k, v, 1, pools)[0]

    return jax.jit(run) if backend == "jax" else run


class Case:
    """Sequences of random queries, keys and values; the step's batch, and where everything lies."""

    def __init__(self, sizes: Sizes, page_size: int, dtype: str, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.sizes = sorted(sizes, key=lambda size: size[1] > 1)  # those of one token first
        self.page_size, self.dtype = page_size, dtype
        self.pages = 10_240 // page_size
        packer = Packer(self.pages, page_size, max_len=LENGTH, seed=seed)
        rows = [packer.add(np.zeros(sum(size), np.int32).tolist()) for size in self.sizes]
        self.batch: Batch = packer.step([(row, *size) for row, size in zip(rows, self.sizes, strict=True)])
        draw = lambda n, heads: rng.standard_normal((n, heads, H)).astype(DTYPES[dtype])  # noqa: E731
        self.q = [draw(new, N) for _, new in self.sizes]
        self.k, self.v = ([draw(sum(size), K) for size in self.sizes] for _ in range(2))

    def pools(self, rubbish: float) -> dict[str, np.ndarray]:
        """What is in the cache before the step; `rubbish` where nothing is."""
        out = {}
        for name, sequences in (("k", self.k), ("v", self.v)):
            slots = np.full((self.pages * self.page_size, K, H), rubbish, DTYPES[self.dtype])
            for table, x, (old, _) in zip(self.batch.page_table[0], sequences, self.sizes, strict=True):
                position = np.arange(old)
                slots[table[position // self.page_size] * self.page_size + position % self.page_size] = x[:old]
            out[name] = np.stack([slots.reshape(self.pages, self.page_size, K, H)] * 2)
        return out

    def run(self, backend: str, window: int, rubbish: float = 0.0) -> np.ndarray:
        """What the backend computes: [2 layers, T, N, H]. Padding, where a backend pads, is rubbish too."""
        config, lib, arrays = config_of(window), part(backend, "cache"), part(backend, "arrays")
        room = TOKENS if backend == "jax" else self.batch.num_tokens
        new = lambda xs: np.concatenate([x[old:] for x, (old, _) in zip(xs, self.sizes, strict=True)])  # noqa: E731
        inputs = [np.concatenate(self.q), new(self.k), new(self.v)]
        for i, x in enumerate(inputs):
            inputs[i] = np.full((room, *x.shape[1:]), rubbish, x.dtype)
            inputs[i][: len(x)] = x
        pools = lib.make_cache(config, self.pages, self.page_size, self.dtype, device(backend))
        pools = lib.write_pages(pools, range(self.pages), self.pools(rubbish))
        pages = LENGTH // self.page_size
        plan = device_plan(backend, self.batch, config, self.page_size, tokens=TOKENS, seqs=SEQS, pages=pages)
        outputs = attention(backend, config)(*arrays.to_device(inputs, device(backend)), plan, pools)
        return np.stack([x[: self.batch.num_tokens] for x in arrays.to_host(outputs)])

    def judge(self, window: int) -> tuple[np.ndarray, float]:
        """The same, dense and in float64, and what the engine's dtype may be off by."""
        both, loudest, terms = [], 0.0, 0.0
        for limit in (0, window):
            out = []
            for q, k, v, (old, new) in zip(self.q, self.k, self.v, self.sizes, strict=True):
                q, k, v = (x.astype(np.float64) for x in (q, k, v))
                query, key = old + np.arange(new)[:, None], np.arange(old + new)
                visible = (key <= query) & ((query - key < limit) | (limit == 0))
                k, v = np.repeat(k, N // K, 1), np.repeat(v, N // K, 1)
                scores = np.einsum("tnh,jnh->tnj", q, k) * H**-0.5
                weights = np.where(visible[:, None], np.exp(scores), 0)
                out.append(np.einsum("tnj,jnh->tnh", weights / weights.sum(-1, keepdims=True), v))
                loudest = max(loudest, float(np.abs(v).max()))
                terms = max(terms, float(np.einsum("tnh,jnh->tnj", np.abs(q), np.abs(k)).max()) * H**-0.5)
            both.append(np.concatenate(out))
        if self.dtype == "bfloat16":
            # Scores, weights and outputs are each rounded once, to 8 bits; an error e of a score is one of 2e of the weights.
            bound = 2**-9 * (2 * terms + 2) * loudest * 1.1
        else:
            # Sums of H products and of up to LENGTH weights, each term rounded to 24 bits.
            bound = 2**-24 * (2 * (H + 2) * terms + 2 * LENGTH) * loudest
        return np.stack(both), bound


def ragged(page_size: int, seed: int) -> Sizes:
    """A mix of decodes and chunks, at and beside the boundaries of pages, tiles and key blocks."""
    rng = np.random.default_rng(seed)
    edges = [n for edge in (page_size, 2 * page_size, 64, 128, 256) for n in (edge - 1, edge, edge + 1)]
    lengths = lambda n: rng.choice([0, 1, *edges, *rng.integers(0, 290, 8)], n).tolist()  # noqa: E731
    chunks = rng.permutation([2, 31, 32, 33, 63, 64, 65, int(rng.integers(2, 30))])[:5].tolist()
    return [(old, 1) for old in lengths(25)] + list(zip(lengths(5), chunks, strict=True))


CASES: dict[str, Callable[[int], Sizes]] = {
    "one token": lambda page: [(0, 1)],
    "one decode at each edge of a page": lambda page: [(n, 1) for n in range(2 * page + 2)][:SEQS],
    "one whole prompt": lambda page: [(0, 300)],
    "one long chunk": lambda page: [(77, 290)],
    "prompts of every small size": lambda page: [(0, n) for n in range(1, 24)],
    "many decodes": lambda page: [(9 * n, 1) for n in range(SEQS)],
    "a mix": lambda page: ragged(page, 1),
    "another mix": lambda page: ragged(page, 2),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("page_size", "window"), [(8, 1), (16, 7), (32, 40), (16, 130)])
def test_paged_attention_equals_dense_attention(backend: str, page_size: int, window: int, case: str) -> None:
    case_ = Case(CASES[case](page_size), page_size, "float32")
    right, bound = case_.judge(window)
    assert np.abs(case_.run(backend, window) - right).max() < bound < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["one decode at each edge of a page", "one long chunk", "a mix"])
def test_rubbish_in_unused_slots_changes_nothing(backend: str, case: str, dtype: str) -> None:
    case_ = Case(CASES[case](16), 16, dtype)
    clean = case_.run(backend, 7)
    for rubbish in (np.nan, 1e30, -np.inf):
        assert np.array_equal(case_.run(backend, 7, rubbish), clean)


def test_bfloat16_is_off_by_its_rounding(backend: str) -> None:
    case = Case(ragged(16, 3), 16, "bfloat16")
    out, (right, bound) = case.run(backend, 7), case.judge(7)
    assert out.dtype == DTYPES["bfloat16"]
    assert np.abs(out.astype(np.float64) - right).max() < bound


def test_the_judge_would_see_a_window_that_is_off_by_one(backend: str) -> None:
    case = Case(ragged(16, 1), 16, "float32")
    right, bound = case.judge(40)
    assert np.abs(case.run(backend, 41) - right).max() > 100 * bound
