"""What the steps of an engine needed at least: bytes to move and operations to compute.

A step of T tokens, with R rows of logits, must at least

- read each weight once: all blocks; the embedding rows of its tokens, T·D at most; with R > 0 the last norm and the LM head, of
  which the embedding rows are a part where the two are tied;
- read K and V of every key of earlier steps that one of its tokens sees, once where sequences share its page, and write T new;
- multiply and add, 2 FLOP each: every matrix of the blocks for T tokens, the LM head for R rows, and q·k and p·v for every key
  that a query sees: 2·weights·T + 2·V·D·R + 4·N·H·Σ causal context, the last for each layer
  (the forward pass of Chowdhery et al. 2022, arXiv:2204.02311, appendix B; memory as in Pope et al. 2022, arXiv:2211.05102).

Activations, padding, sampling and whatever the host does are no needed work.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from common.config import ITEMSIZES, Dtype, ModelConfig
from common.step_log import StepRecord
from common.weights.checkpoint import expected_shapes


class Work(NamedTuple):
    """Of each step: float64[n]."""

    bytes: np.ndarray
    """Moved between memory and processor."""
    flops: np.ndarray


def count(steps: Sequence[StepRecord], model: ModelConfig, dtype: Dtype) -> Work:
    """What each step needs at least, with weights and KV in `dtype`. The formulas stand at the top of this file."""
    tokens = np.array([step.counts.sum() for step in steps], np.float64)
    rows = np.array([step.logit_rows for step in steps], np.float64)
    shapes = expected_shapes(model)
    blocks = {name: shape for name, shape in shapes.items() if ".layers." in name}
    head = model.vocab_size * model.hidden_size
    embedded = np.minimum(tokens, model.vocab_size) * model.hidden_size
    weights = sum(map(math.prod, blocks.values())) + (rows > 0) * (head + model.hidden_size)
    weights = weights + np.where((rows > 0) & model.tie_embeddings, 0, embedded)

    keys, context = seen(steps, model)
    kv = 2 * model.num_kv_heads * model.head_dim * (keys + model.num_layers * tokens)

    matrices = sum(math.prod(shape) for shape in blocks.values() if len(shape) == 2)
    flops = 2 * matrices * tokens + 2 * head * rows + 4 * model.num_heads * model.head_dim * context
    return Work((weights + kv) * ITEMSIZES[dtype], flops)


def seen(steps: Sequence[StepRecord], model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Of each step, over all layers: keys of earlier steps that it reads, and pairs of a query and a key that it sees."""
    flat = lambda arrays: np.concatenate([np.empty(0), *arrays])  # noqa: E731
    seqs = [len(step.counts) for step in steps]
    per_step = lambda by_seq: np.bincount(np.arange(len(steps)).repeat(seqs), by_seq, len(steps))  # noqa: E731
    counts, ends, shared = (flat(getattr(step, name) for step in steps) for name in ("counts", "kv_lengths", "shared"))
    old = ends - counts
    keys = context = np.zeros(len(steps))
    for window, layers in Counter(model.layer_window).items():
        sees = window or 1 << 31
        first = np.maximum(old - sees + 1, 0)  # that the first of its new tokens sees
        keys = keys + layers * per_step(np.maximum(old - np.maximum(first, shared), 0))
        context = context + layers * per_step(visible(ends, sees) - visible(old, sees))
    return keys, context


def weights_bytes(model: ModelConfig, dtype: Dtype) -> int:
    """What the model's weights take in `dtype`, each held once."""
    return sum(map(math.prod, expected_shapes(model).values())) * ITEMSIZES[dtype]


def visible(queries: np.ndarray, window: int) -> np.ndarray:
    """Keys that the first `queries` tokens of a sequence see, in sum: Σ min(i, window) for i = 1 … queries."""
    inside = np.minimum(queries, window)
    return inside * (inside + 1) / 2 + (queries - inside) * window


def limit_seconds(work: Work, bandwidth: np.ndarray | float, peak: float) -> np.ndarray:
    """The least time that each step could take on this machine: float64[n]."""
    return np.maximum(work.bytes / bandwidth, work.flops / peak)
