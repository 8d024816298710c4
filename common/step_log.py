"""The record of a step that ran, for logs of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from common.batch import Batch


class StepRecord(NamedTuple):
    """What one step was asked to do, and when. How much work that is depends on the model, which an engine does not know."""

    submitted: float
    """On the clock of `perf_counter`, before the runner was called."""
    landed: float
    """When its result was on the host."""
    logit_rows: int
    """R"""
    counts: np.ndarray
    """int32[S]: new tokens of each sequence, each of which writes its K and V."""
    kv_lengths: np.ndarray
    """int32[S]: keys of each sequence once the step has run."""
    shared: np.ndarray
    """int32[S]: how many keys at its start lie in pages that a later sequence of the step has too."""
    prompt_tokens: int | None = None
    """Of `counts`, those of sequences with more than one token or within their prompt. With none the step only decodes.

    The engine fills this field and all below: a batch alone does not determine them.
    """
    running: int | None = None
    """Requests that hold pages and a row."""
    waiting: int | None = None
    """Requests that do not, the preempted among them."""
    pages_used: int | None = None
    pages_total: int | None = None
    pages_empty: int | None = None
    """Held by running requests, but without a token in them even when this step has run."""
    started: tuple[str, ...] = ()
    """The ids of the requests for which this is the first step."""

    @classmethod
    def of(cls, values: Sequence[Any]) -> StepRecord:
        """A record after its trip through JSON, in which arrays and tuples became lists."""
        step = cls(*values)
        counts, kv_lengths, shared = (np.array(by_seq, np.int32) for by_seq in (step.counts, step.kv_lengths, step.shared))
        return step._replace(counts=counts, kv_lengths=kv_lengths, shared=shared, started=tuple(step.started))


def record_step(batch: Batch, block_size: int, submitted: float, landed: float, sharing: bool = True) -> StepRecord:
    """The record of a step, in arrays of its own: a view would keep the whole batch alive. `sharing`: whether any page may be
    in the tables of two sequences."""
    counts = batch.query_starts[1:] - batch.query_starts[:-1]
    shared = shared_pages(batch.page_table[0]) * block_size if sharing else np.zeros_like(counts)  # groups share page numbers
    return StepRecord(submitted, landed, len(batch.logit_rows), counts, batch.kv_lengths.copy(), shared)


def shared_pages(page_table: np.ndarray) -> np.ndarray:
    """int32[S]: how many pages at its start each sequence of a table int32[S, P] has in common with a later one."""
    table = page_table.ravel()
    place = np.arange(len(table), dtype=np.int32)
    last = np.empty(int(table.max(initial=0)) + 1, np.int32)
    last[table] = place  # the last sequence that has a page; as they share prefixes, all but it share a prefix with another
    return ((last[table] != place) & (table > 0)).reshape(page_table.shape).sum(axis=1, dtype=np.int32)
