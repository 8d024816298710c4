"""Find the phases of a window: the steady state of its load in the rows, and pure decode in the engine's steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.step_log import StepRecord
from experiments.load.driver import Row, Window

STEADY = 0.9
"""Share of the users, or of the most requests that were ever in flight, that must be in flight in the steady state."""
LEAST_STEADY = 0.1
"""Share of a window below which its steady state is a moment, and no rate is quoted for it."""


def rate(amount: float, by: float) -> float | None:
    return amount / by if by > 0 else None


# The steady state.


def steady(windows: Sequence[Window], concurrency: int | None = None) -> dict[str, float | None]:
    """The output tokens a second while nearly all users had a request in flight, and which share of the time that was.

    Without users, while nearly as many requests were in flight as ever in that window. In an open loop that may be a moment:
    the rate is None then, rather than one of a moment.
    """
    tokens = seconds = 0.0
    for window in windows:
        mine, span = steady_part(window.rows, concurrency)
        tokens, seconds = tokens + mine, seconds + span
    share = rate(seconds, sum(window.duration for window in windows))
    lasts = share is not None and share >= LEAST_STEADY
    return {"steady_share": share, "steady_output_throughput": rate(tokens, seconds) if lasts else None}


def steady_part(rows: Sequence[Row], concurrency: int | None) -> tuple[int, float]:
    """Output tokens of one window's steady state, and its seconds. A token belongs to the time before it was seen."""
    begins = [row.sent for row in rows if row.times]
    ends = [row.times[-1] for row in rows if row.times]
    if not begins:
        return 0, 0.0
    changes = np.concatenate([np.ones(len(begins), int), -np.ones(len(ends), int)])
    moments = np.array(begins + ends)
    order = np.lexsort((changes, moments))  # at one moment ends come before begins
    moments, active = moments[order], np.cumsum(changes[order])
    full = active >= STEADY * (concurrency or active.max())
    spans = np.diff(moments, append=moments[-1])
    seen = np.concatenate([row.times for row in rows])
    within = np.maximum(np.searchsorted(moments, seen, "left") - 1, 0)  # the span (from, to] that each token was seen in
    return int(full[within].sum()), float(spans[full].sum())


# Steps.


def step_seconds(steps: Sequence[StepRecord]) -> np.ndarray:
    """How long each step had the device: from when it was submitted, or the one before it had landed, until it landed."""
    submitted, landed = np.array([(step.submitted, step.landed) for step in steps]).reshape(-1, 2).T
    return landed - np.maximum(submitted, np.concatenate([[-np.inf], landed[:-1]]))


def of_steps(windows: Sequence[Window]) -> dict[str, float | None]:
    """What the engine's steps say: pure decode, and how full batch and pages were on average over the time of the steps.

    `decode_throughput` is the tokens of the steps that only decode by the time these had the device.
    """
    names = (
        "decode_throughput",
        "mean_running",
        "peak_running",
        "mean_pages_used_share",
        "peak_pages_used_share",
        "mean_pages_empty_share",
    )
    steps = [step for window in windows for step in window.steps or () if step.running is not None]
    if not steps:
        return dict.fromkeys(names)
    column = lambda name: np.array([getattr(step, name) for step in steps], float)  # noqa: E731
    seconds = np.concatenate([step_seconds(window.steps) for window in windows if window.steps])
    running, total = column("running"), column("pages_total")
    used, empty = column("pages_used") / total, column("pages_empty") / total
    decodes = column("prompt_tokens") == 0
    tokens = np.array([step.counts.sum() for step in steps], float)
    mean = lambda values: rate(float(values @ seconds), float(seconds.sum()))  # noqa: E731
    figures = (
        rate(float(tokens[decodes].sum()), float(seconds[decodes].sum())),
        mean(running),
        int(running.max()),
        mean(used),
        float(used.max()),
        mean(empty),
    )
    return dict(zip(names, figures, strict=True))
