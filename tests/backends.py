"""Both backends behind one set of helpers, so that a test is written once and judges each.

Modules are reached by name (`part("jax", "sampling")` is `jaxinfer.sampling`): their names and signatures mirror each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from torch.utils import _pytree as pytree

from common.batch import VIEWS, Batch
from common.config import EngineConfig, ModelConfig
from common.engine import Engine
from common.interface import ModelRunner, ServingEngine, load_backend
from common.kernels.cpu.step import pack_step
from common.request import SamplingParams
from common.schedule.request_table import Rows
from common.weights import zoo
from common.weights.checkpoint import Checkpoint, open_checkpoint
from experiments.kernels.operators import padded, part

BACKENDS = ("jax", "torch")
THREADS = 1


@cache
def device(backend: str) -> Any:
    """The CPU of a backend, opened once."""
    return part(backend, "device").open_device("cpu", THREADS)


def to_device(backend: str, tree: Any) -> Any:
    """NumPy arrays to the backend, integers as wide as its step wants them: PyTorch indexes and hashes with int64."""
    if backend == "torch":
        tree = pytree.tree_map(_widened, tree)
    return part(backend, "arrays").to_device(tree, device(backend))


def _widened(x: Any) -> Any:
    return x.astype(np.int64) if isinstance(x, np.ndarray) and x.dtype in (np.int32, np.uint32) else x


def call(backend: str, function: Callable[..., Any], *arrays: Any) -> Any:
    """`function` of NumPy arrays on the backend, its results as NumPy arrays. Compiled under JAX, as the step is."""
    device_arrays = to_device(backend, arrays)
    result = (jax.jit(function) if backend == "jax" else function)(*device_arrays)
    return part(backend, "arrays").to_host(result)


# ── runners and engines ──────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def checkpoint(model: str | Path) -> Checkpoint:
    """A model of the zoo by name, or of a directory, opened once."""
    return open_checkpoint(model if isinstance(model, Path) else zoo.resolve(model))


@cache
def shared_runner(backend: str, model: str | Path, pages: int, config: EngineConfig) -> ModelRunner:
    """A warm runner, made once for all tests that ask for the same: compiling is what costs. Nobody closes it."""
    runner = load_backend(backend, config)
    runner.load(checkpoint(model))
    runner.allocate([pages])
    runner.warmup()
    return runner


def engine_config(**options: Any) -> EngineConfig:
    """Small numbers, so that few shapes are compiled."""
    small = {"dtype": "float32", "kernels": "framework", "device": "cpu", "threads": THREADS}
    small |= {"max_num_seqs": 8, "max_num_batched_tokens": 64}
    return EngineConfig(**(small | {"max_model_len": 256} | options))


def make_engine(
    backend: str, model: str | Path, config: EngineConfig, *, pages: int = 64, few: int = 0, **options: Any
) -> Engine:
    """A fresh engine over the shared runner of `pages` pages, which hold whatever ran before. It sees `few` of them, if given,
    and works under `config` with `options` changed."""
    runner = shared_runner(backend, model, pages, config)
    return Engine(runner, replace(config, **options), num_pages=few or pages)


# ── steps without an engine ──────────────────────────────────────────────────────────────────────────────────────────────


class Packer:
    """Builds steps as the scheduler does, of sequences at chosen places. Pages are dealt out in a shuffled order."""

    def __init__(self, num_pages: int, page_size: int, *, num_rows: int = 64, max_len: int = 1024, seed: int = 0) -> None:
        self.page_size = page_size
        self.free = (1 + np.random.default_rng(seed).permutation(num_pages - 1)).tolist()
        self.rows = Rows(num_rows, max_len, page_size)

    def add(self, token_ids: Sequence[int], *, length: int = 0, seed: int = 0, **params: Any) -> int:
        """The row of a new sequence of these tokens, with pages for `length` of them (default: all)."""
        pages = [self.free.pop() for _ in range(-(-(length or len(token_ids)) // self.page_size))]
        return self.rows.take(np.array(token_ids, np.int32), pages, SamplingParams(**({"temperature": 0.0} | params)), seed)

    def step(
        self,
        plan: Sequence[tuple[int, int, int]],
        samples: Sequence[int] | None = None,
        fills: Sequence[int] = (),
        **views: Any,
    ) -> Batch:
        """A step of (row, start, count) each, those of one token first. `samples`: which ask for a token (default: all);
        `fills`: whose last token only the device knows; `views` replace those of the batch."""
        rows, starts, counts = ([part[i] for part in plan] for i in range(3))
        batch = self.rows.build(rows, starts, counts, list(range(len(rows)) if samples is None else samples), list(fills))
        return Batch.pack(**({name: getattr(batch, name) for name in VIEWS} | views))


def hidden_states(engine: ServingEngine, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Step the engine until it has them."""
    states = engine.hidden_states(prompts)
    while not states.done():
        engine.step()
    return states.result()


def device_plan(backend: str, batch: Batch, config: ModelConfig, page_size: int, *, tokens: int, seqs: int, pages: int) -> Any:
    """The attention plan of a batch on the device; JAX's in the shapes of a bucket for `tokens`, `seqs` and `pages`."""
    attention = part(backend, "attention")
    plan = attention.fit_plan(attention.make_plan(batch, config, page_size), tokens, seqs, pages, True)
    return part(backend, "arrays").to_device(plan, device(backend))


@cache
def model(backend: str, path: str | Path, positions: int = 256) -> Any:
    """The decoder of a checkpoint in float32 on the backend."""
    return part(backend, "weights").load_model(checkpoint(path), "float32", positions, device(backend))


@cache
def _step(backend: str, path: str | Path, page_size: int | None) -> Callable[..., Any]:
    """(token ids, positions, plan, cache) -> logits of every token, and the cache. Without a page size: dense, no plan."""
    lib, attention, config = part(backend, "model"), part(backend, "attention"), checkpoint(path).config

    def run(decoder: Any, token_ids: Any, positions: Any, plan: Any, pools: Any) -> tuple[Any, Any]:
        attend = attention.paged_attention(config, plan) if page_size else attention.dense_attention(config)
        hidden_TD, pools = lib.forward(decoder, token_ids, positions, attend, pools)
        return lib.logits(decoder, hidden_TD), pools

    decoder = model(backend, path)
    if backend == "torch":
        return lambda *args: run(decoder, *args)
    graph, state = nnx.split(decoder)
    compiled = jax.jit(lambda state, *args: run(nnx.merge(graph, state), *args))
    return lambda *args: compiled(state, *args)


def dense_logits(backend: str, path: str | Path, token_ids: Sequence[int]) -> np.ndarray:
    """Logits after every token of one sequence, without pages: [T, V]."""
    ids, positions = to_device(backend, (np.array(token_ids, np.int32), np.arange(len(token_ids), dtype=np.int32)))
    logits, _ = _step(backend, path, None)(ids, positions, None, None)
    return part(backend, "arrays").to_host(logits)


def paged_logits(
    backend: str,
    path: str | Path,
    prompts: Sequence[Sequence[int]],
    steps: Sequence[Sequence[tuple[int, int, int]]],
    page_size: int,
) -> list[np.ndarray]:
    """Logits after every token of `prompts`, [T, V] each, computed in `steps` of (prompt, start, count)."""
    lib, config = part(backend, "cache"), checkpoint(path).config
    pages = sum(-(-len(prompt) // page_size) for prompt in prompts)
    packer = Packer(pages + 1, page_size)
    rows = [packer.add(prompt) for prompt in prompts]
    pools = lib.make_cache(config, pages + 1, page_size, "float32", device(backend))
    size = max(sum(count for *_, count in step) for step in steps) if backend == "jax" else 0
    out = [np.full((len(prompt), config.vocab_size), np.nan, np.float32) for prompt in prompts]
    for step in steps:
        batch = packer.step([(rows[i], start, count) for i, start, count in step])
        plan = device_plan(backend, batch, config, page_size, tokens=size, seqs=len(prompts), pages=pages)
        room = (max(size, batch.num_tokens),)
        ids, positions = to_device(backend, (padded(batch.token_ids, room), padded(batch.positions, room)))
        logits, pools = _step(backend, path, page_size)(ids, positions, plan, pools)
        host = part(backend, "arrays").to_host(logits)
        for (i, start, count), at in zip(step, batch.query_starts, strict=False):
            out[i][start : start + count] = host[at : at + count]
    return out


def native_logits(
    backend: str,
    path: str | Path,
    prompts: Sequence[Sequence[int]],
    steps: Sequence[Sequence[tuple[int, int, int]]],
    dtype: str = "float32",
    page_size: int = 16,
    rubbish: float = 0.0,
) -> list[np.ndarray]:
    """As `paged_logits`, by the native kernels of the backend. `rubbish` fills every slot of the pool beforehand."""
    kernels, config = part(backend, "kernels"), checkpoint(path).config
    pages = sum(-(-len(prompt) // page_size) for prompt in prompts) + 1
    packer = Packer(pages, page_size)
    rows = [packer.add(prompt) for prompt in prompts]
    weights = native_weights(backend, path, dtype)
    cache = kernels.make_cache(config, pages, page_size, dtype)
    last = np.zeros(len(prompts), np.int32)
    state = part(backend, "step").State(jax.tree.map(lambda pool: _filled(backend, pool, rubbish), cache), last)
    state = state._replace(last_tokens=part(backend, "arrays").to_device(last, device(backend)))
    out = [np.full((len(prompt), config.vocab_size), np.nan, np.float32) for prompt in prompts]
    for plan in steps:
        batch = packer.step([(rows[i], start, count) for i, start, count in plan])
        owner = np.repeat(np.arange(batch.num_seqs), np.diff(batch.query_starts))
        every = {"logit_rows": np.arange(batch.num_tokens), "logit_owner": owner, "want": np.ones(batch.num_tokens)}
        batch = Batch.pack(**({name: getattr(batch, name) for name in VIEWS} | every))
        room = to_device(backend, np.zeros((batch.num_tokens, config.vocab_size), np.float32))
        state = _native_step(backend, path)(weights, state._replace(logits=room), pack_step(batch), batch.num_tokens)
        host = part(backend, "arrays").to_host(state.logits)
        for (i, start, count), at in zip(plan, batch.query_starts, strict=False):
            out[i][start : start + count] = host[at : at + count]
    return out


@cache
def native_weights(backend: str, path: str | Path, dtype: str) -> Any:
    """A checkpoint packed for the native kernels of the backend."""
    kernels = part(backend, "kernels")
    kernels.open_library()
    return kernels.load_weights(checkpoint(path), dtype, 1024)


@cache
def _native_step(backend: str, path: str | Path) -> Callable[..., Any]:
    """(weights, state, packed step, tokens) → the state, with the logits of every token."""
    kernels, config = part(backend, "kernels"), checkpoint(path).config
    if backend == "jax":
        return jax.jit(lambda *args: kernels.forward(config, *args)[0], static_argnums=3)

    def eager(weights: Any, state: Any, step: np.ndarray, tokens: int) -> Any:
        return kernels.forward(config, weights, state, to_tensor(step), tokens)[0]

    return eager


def to_tensor(array: np.ndarray) -> Any:
    """As it is, integers stay int32."""
    return part("torch", "arrays").to_device(array, device("torch"))


def _filled(backend: str, pool: Any, value: float) -> Any:
    """A pool of the same shape full of `value`; bfloat16 of JAX's is kept as integers."""
    if backend == "torch":
        return pool.fill_(value)
    if pool.dtype == np.uint16:
        return jax.numpy.full(pool.shape, np.asarray(value, jax.numpy.bfloat16).view(np.uint16))
    return jax.numpy.full(pool.shape, value, pool.dtype)
