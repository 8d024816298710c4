"""A scheduled step until its result has landed: what it requests of the runner for each sequence, and what the result holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from common.batch import KV, Batch, Want
from common.errors import BackendError
from common.interface import Result
from common.request import Logprobs
from common.schedule.request_table import LogitsUpdate, Score
from common.schedule.sequence import Sequence


class KVLoad(NamedTuple):
    """Keys and values that pages are to have before a step."""

    pages: list[int]
    kv: KV


@dataclass(slots=True, eq=False)
class Step:
    """A scheduled step, until its result has landed."""

    seqs: list[Sequence]
    batch: Batch
    started: tuple[str, ...] = ()
    """The ids of requests that were admitted for the first time, and so run their first tokens in it."""
    masks: Callable[[], np.ndarray] | None = None
    """The masks that the batch lacks, uint32[M, W]: to be called once, while the step runs; None where it lacks none."""
    arrivals: list[KVLoad] = field(default_factory=list)
    """To be written before it runs."""


def change_of(seq: Sequence) -> LogitsUpdate:
    """What is done to the logits of its next token."""
    if seq.edits is None:
        return LogitsUpdate(np.empty(0, np.int32), np.empty((0, 3), np.float32), matcher=seq.matcher)
    return LogitsUpdate(*seq.edits.at(seq.output, len(seq.output) + seq.pending), seq.edits.allowed, seq.matcher)


def scores_of(i: int, seq: Sequence, end: int) -> list[Score]:
    """What the step in which it is sequence i, and comes to `end`, is to report on its prompt."""
    known, k = len(seq.scores or ()), seq.request.params.prompt_logprobs or 0
    first, stop = max(seq.computed, known - 1), min(end, len(seq.request.prompt_token_ids) - 1)
    return [Score(i, first, stop, k)] if first < stop else []


def take_scores(step: Step, result: Result, bad: set[int]) -> None:
    """Add what a step reports on prompts to what is known of them, in order."""
    owner = step.batch.logit_owner.tolist()
    for row in np.flatnonzero(step.batch.want & Want.SCORE).tolist():
        seq = step.seqs[owner[row]]
        if owner[row] not in bad and seq.scores is not None:
            seq.scores.append(logprobs_of(result, row, seq.request.params.prompt_logprobs or 0))


def logprobs_of(result: Result, j: int, k: int) -> Logprobs:
    """Return the log-probability of the token of logit row j, with the k likeliest.

    The runner reports logprobs in every step that wants any.
    """
    if result.logprobs is None or result.ranks is None:
        raise BackendError("A request wanted logprobs, and the runner reported none.")
    top_ids, top_logprobs = (), ()
    if k and result.top_ids is not None and result.top_logprobs is not None:
        top_ids, top_logprobs = result.top_ids[j, :k].tolist(), result.top_logprobs[j, :k].tolist()
    return Logprobs(float(result.logprobs[j]), int(result.ranks[j]), top_ids, top_logprobs)
