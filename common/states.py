"""What a decoder makes of prompts that nobody continues: states of whole prompts, and embeddings of them.

A step that shows its insides (`ModelRunner.observe`) runs them, on pages that are held for it alone. It shows the residual
stream under all kernels, equal in bits under native ones; what follows is done here, so embeddings of two engines differ as
their layers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

import numpy as np

from common.errors import shown
from common.interface import ModelRunner
from common.request import SamplingParams, expect
from common.schedule.rows import Rows
from common.weights.checkpoint import Checkpoint

Pooling = Literal["mean", "last"]


def check_pooling(pooling: object) -> None:
    """Raise `RequestError` for anything that is no `Pooling`."""
    known = isinstance(pooling, str) and pooling in get_args(Pooling)
    expect(known, f"pooling must be one of {', '.join(get_args(Pooling))}, got {shown(pooling)}.")


@dataclass(frozen=True, eq=False)
class Pooler:
    """From residual streams to embeddings: the decoder's final norm, pooling, length 1."""

    weight: np.ndarray
    """float32[D]"""
    eps: float

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        weight = checkpoint["model.norm.weight"].dense().astype(np.float32)
        return cls(weight + np.float32(checkpoint.config.norm_offset), checkpoint.config.norm_eps)

    def pool(self, states_TD: np.ndarray, pooling: Pooling) -> np.ndarray:
        """float32[D] of length 1: of all tokens the mean, or the last. One of length 0 stays."""
        x_TD = states_TD[-1:] if pooling == "last" else states_TD
        x_TD = x_TD / np.sqrt(np.mean(np.square(x_TD), axis=-1, keepdims=True) + self.eps) * self.weight
        pooled_D = x_TD.mean(axis=0)
        return (pooled_D / max(np.linalg.norm(pooled_D), 1e-12)).astype(np.float32)


def num_fitting(lengths: Sequence[int], tokens: int, pages: int, page_size: int) -> int:
    """How many prompts of these lengths, from the first on, one step takes; a prompt by itself may take several."""
    counts = np.array(lengths)
    fit = (counts.cumsum() <= tokens) & ((-(-counts // page_size)).cumsum() <= pages)
    return max(int(fit.sum()), 1)


def hidden_states(
    runner: ModelRunner, prompts: Sequence[Sequence[int]], pages: Sequence[Sequence[int]], page_size: int, tokens: int
) -> list[np.ndarray]:
    """The residual stream behind the last layer, float32[T, D] of each prompt, in steps of at most `tokens` tokens: several
    prompts that fit one, or a single prompt. `pages` are held for each; afterwards nobody needs what is in them."""
    name = f"layers.{max(layer for group in runner.kv_groups() for layer in group.layers)}.residual"
    rows = Rows(len(prompts), max(map(len, prompts)), page_size, len(runner.kv_groups()))
    for prompt, held in zip(prompts, pages, strict=True):
        rows.take(np.array(prompt, np.int32), held, SamplingParams(temperature=0.0), 0)
    parts: list[list[np.ndarray]] = [[] for _ in prompts]
    for start in range(0, max(map(len, prompts)), tokens):
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) - start > 1)  # those with one token first
        counts = [min(len(prompts[i]) - start, tokens) for i in order]
        batch = rows.build(order, [start] * len(order), counts, samples=[], fills=[])
        states_TD = runner.observe(batch, (name,))[name]
        for i, states in zip(order, np.split(states_TD, batch.query_starts[1:-1]), strict=True):
            parts[i].append(states)
    return [np.concatenate(each) for each in parts]
