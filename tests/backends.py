"""Both backends behind one set of helpers, so that a test is written once and judges each.

Modules are reached by name (`part("jax", "sampling")` is `jaxinfer.sampling`): the mirror makes their names and signatures alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from common.config import EngineConfig, ModelConfig
from common.engine import Engine
from common.interface import ModelRunner, load_backend
from common.request import SamplingParams
from common.schedule.batch import Batch
from common.schedule.rows import Rows
from common.weights import zoo
from common.weights.checkpoint import Checkpoint, open_checkpoint

BACKENDS = ("jax", "torch")
THREADS = 2


def part(backend: str, module: str) -> Any:
    """`jaxinfer.<module>` or `torchinfer.<module>`."""
    return import_module(f"{backend}infer.{module}")


@cache
def device(backend: str) -> Any:
    """The CPU of a backend, opened once."""
    return part(backend, "device").open_device("cpu", THREADS)


def to_device(backend: str, tree: Any) -> Any:
    """NumPy arrays to the backend, integers as wide as its step wants them: PyTorch indexes and hashes with int64."""
    if backend == "torch":
        from torch.utils import _pytree as pytree

        wide = lambda x: x.astype(np.int64) if isinstance(x, np.ndarray) and x.dtype in (np.int32, np.uint32) else x  # noqa: E731
        tree = pytree.tree_map(wide, tree)
    return part(backend, "arrays").to_device(tree, device(backend))


def to_host(backend: str, tree: Any) -> Any:
    """Device arrays as NumPy arrays."""
    return part(backend, "arrays").to_host(tree)


def call(backend: str, function: Callable[..., Any], *arrays: Any) -> Any:
    """`function` of NumPy arrays on the backend, its results as NumPy arrays. Compiled under JAX, as the step is."""
    if backend == "jax":
        import jax

        function = jax.jit(function)
    return to_host(backend, function(*(to_device(backend, array) for array in arrays)))


# ── runners and engines ──────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def checkpoint(name: str | Path) -> Checkpoint:
    """A model of the zoo or a directory, opened once."""
    return open_checkpoint(name if isinstance(name, Path) else zoo.resolve(name))


@cache
def shared_runner(backend: str, model: str | Path, pages: int, config: EngineConfig) -> ModelRunner:
    """A warm runner, made once for all tests that ask for the same: compiling is what costs. Never close it."""
    runner = load_backend(backend, config)
    runner.load(checkpoint(model))
    runner.allocate([pages])
    runner.warmup()
    return runner


def engine_config(**options: Any) -> EngineConfig:
    """Small numbers, so that few shapes are compiled."""
    small = {"dtype": "float32", "device": "cpu", "threads": THREADS, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return EngineConfig(**(small | {"max_model_len": 256} | options))


def make_engine(runner: ModelRunner, config: EngineConfig, pages: int | None = None, **options: Any) -> Engine:
    """A fresh engine over a shared runner, whose pages hold whatever ran before. `options` replace those of `config`."""
    allocated = runner._num_pages  # type: ignore[attr-defined]
    from dataclasses import replace

    return Engine(runner, replace(config, **options), num_pages=pages or allocated)


# ── batches and plans without an engine ──────────────────────────────────────────────────────────────────────────────────


class Packer:
    """Builds steps as the scheduler does, of sequences at chosen places: pages are dealt out in a shuffled order."""

    def __init__(self, num_pages: int, page_size: int, num_rows: int = 64, max_len: int = 1024, seed: int = 0) -> None:
        self.page_size = page_size
        self.free = (1 + np.random.default_rng(seed).permutation(num_pages - 1)).tolist()
        self.rows = Rows(num_rows, max_len, page_size)

    def add(self, token_ids: Sequence[int], length: int | None = None, seed: int = 0, **params: Any) -> int:
        """The row of a new sequence of these tokens, with pages for `length` of them (default: all)."""
        pages = [self.free.pop() for _ in range(-(-(length or len(token_ids)) // self.page_size))]
        return self.rows.take(np.array(token_ids, np.int32), pages, SamplingParams(**({"temperature": 0.0} | params)), seed)

    def step(self, plan: Sequence[tuple[int, int, int]], samples: Sequence[int] | None = None) -> Batch:
        """A step of (row, start, count); those of one token come first. `samples`: which ask for a token (default: all)."""
        rows, starts, counts = (list(column) for column in zip(*plan, strict=True)) if plan else ([], [], [])
        return self.rows.build(rows, starts, counts, list(range(len(rows)) if samples is None else samples), [])
