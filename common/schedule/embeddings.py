"""Compute hidden states and embeddings of prompts that no request continues.

`ModelRunner.observe` runs the prompts on pages that are held for them alone. It returns the residual stream under all kernels,
with equal bits under native ones. This file computes the rest, so embeddings of two engines differ as their layers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Self, get_args

import numpy as np

from common.errors import quoted
from common.interface import ModelRunner, last_residual
from common.request import SamplingParams, expect
from common.schedule.admission import Limits, check_tokens
from common.schedule.request_table import Rows
from common.weights.checkpoint import Checkpoint

Pooling = Literal["mean", "last"]


def check_pooling(pooling: object) -> None:
    """Raise `RequestError` for anything that is no `Pooling`."""
    known = isinstance(pooling, str) and pooling in get_args(Pooling)
    expect(known, f"pooling must be one of {', '.join(get_args(Pooling))}, got {quoted(pooling)}.")


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


def take_prompts(prompts: Sequence[Sequence[int]], limits: Limits, max_seqs: int, vocab_size: int) -> Sequence[Sequence[int]]:
    """Return as many prompts, from the first on, as one step of an engine takes. Raise `RequestError` for one that can never be
    computed."""
    some, most = prompts[:max_seqs], min(limits.max_model_len, limits.num_pages * limits.block_size)
    expect(len(some) > 0, "Expected at least one prompt, got none.")
    for i, prompt in enumerate(some):
        expect(0 < len(prompt) <= most, f"Prompt {i} has {len(prompt)} tokens; expected 1 to {most}.")
    some = some[: num_fitting(list(map(len, some)), limits.budget, limits.num_pages, limits.block_size)]
    for i, prompt in enumerate(some):
        check_tokens(f"Prompt {i}", prompt, vocab_size)
    return some


def num_fitting(lengths: Sequence[int], tokens: int, pages: int, page_size: int) -> int:
    """Return how many prompts of these lengths, from the first on, one step takes; a prompt by itself may take several."""
    counts = np.array(lengths)
    fit = (counts.cumsum() <= tokens) & ((-(-counts // page_size)).cumsum() <= pages)
    return max(int(fit.sum()), 1)


class StatesJob:
    """Prompts whose hidden states an engine computes, several that fit one step or a single one, in pieces between its steps.

    `states` resolves to the residual stream behind the last layer, float32[T, D] of each prompt. Cancel it to drop the job.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], page_size: int) -> None:
        self.prompts, self._page_size = prompts, page_size
        self.states: Future[list[np.ndarray]] = Future()
        self.start_over()

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_pages(self) -> int:
        return sum(-(-len(prompt) // self._page_size) for prompt in self.prompts)

    def start_over(self) -> None:
        """Forget the pages and what was computed."""
        self.pages: list[int] = []
        self._rows: Rows | None = None
        self._start = 0
        self._parts: list[list[np.ndarray]] = [[] for _ in self.prompts]

    def begin(self, runner: ModelRunner, pages: list[int]) -> None:
        """Take `num_pages` pages, whose contents nothing needs afterwards."""
        self.pages, free = pages, iter(pages)
        self._rows = Rows(len(self.prompts), max(map(len, self.prompts)), self._page_size, len(runner.kv_groups()))
        for prompt in self.prompts:
            held = list(islice(free, -(-len(prompt) // self._page_size)))
            self._rows.take(np.array(prompt, np.int32), held, SamplingParams(temperature=0.0), 0)

    def run_piece(self, runner: ModelRunner, tokens: int) -> list[np.ndarray] | None:
        """Run one step of at most `tokens` tokens of each prompt. Return the states if it was the last."""
        assert self._rows
        lengths, start = [len(prompt) for prompt in self.prompts], self._start
        name = last_residual(1 + max(layer for group in runner.kv_groups() for layer in group.layers))
        order = sorted(range(len(lengths)), key=lambda i: lengths[i] - start > 1)  # sequences of one token come first
        counts = [min(lengths[i] - start, tokens) for i in order]
        batch = self._rows.build(order, [start] * len(order), counts, samples=[], fills=[])
        states_TD = runner.observe(batch, (name,))[name]
        for i, states in zip(order, np.split(states_TD, batch.query_starts[1:-1]), strict=True):
            self._parts[i].append(states)
        self._start += tokens
        return [np.concatenate(each) for each in self._parts] if self._start >= max(lengths) else None


def fail(states: Future[list[np.ndarray]], error: BaseException) -> None:
    """Set the exception of a future that may have been cancelled."""
    if states.set_running_or_notify_cancel():
        states.set_exception(error)
