"""Compute intervals of latencies, of each engine and of the ratio of two. The block is the unit, as for throughputs.

A percentile is taken within each block. The interval is of the geometric mean of these percentiles over blocks. Requests of one
block share its queue, so they are not independent samples, and no interval is computed from them.

The ratio of two engines is taken within a block. The order of a block is random, so a drift of the machine changes the ratio in
a random direction.
The interval of one engine alone takes its blocks as independent, and so does not cover a drift.

Throughputs decide when a run ends. The intervals of a run that ends early are widened for that
(`experiments.measure.blocks.tail`). The interval of a latency that does not vary with throughput is then wider than it need
be: it covers up to 97 % instead of 95 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.load.driver import Window
from experiments.metrics.metrics import latencies, needed
from experiments.metrics.statistics import LEAST_BLOCKS, Estimate, estimate, log_ratios, shared_confidence

PERCENTS = {"median": 50, "p99": 99}
HEADLINED = {f"{name}_{metric}_ms": (metric, name) for metric in ("ttft", "tpot", "itl", "e2el") for name in PERCENTS}
"""Figure → metric, and name of the percentile."""

Blocks = Mapping[str, Sequence[float | None]]
"""Figure → its value in ms in each block, None where a block has too few samples for it."""


def block_percentiles(windows: Sequence[Window]) -> Blocks:
    """Compute the figures of `HEADLINED` in each window."""
    samples = [latencies([row for row in window.rows if row.ok]) for window in windows]
    return {
        figure: [percentile(block[metric], PERCENTS[name]) for block in samples] for figure, (metric, name) in HEADLINED.items()
    }


def percentile(seconds: np.ndarray, percent: int) -> float | None:
    """Compute a percentile in ms; None where the samples are fewer than it needs."""
    return float(np.percentile(seconds, percent)) * 1e3 if len(seconds) >= needed(percent) else None


def intervals(blocks: Blocks, confidence: float, tail: float = 1.0) -> dict[str, Estimate]:
    """Compute the interval of each figure of one engine. `tail` is that of `statistics.compare_all`."""
    logs = {figure: np.log([value for value in values if value]) for figure, values in blocks.items()}
    inner = 1 - tail * (1 - confidence)
    return {
        figure: estimate(logs[figure], inner, confidence, missing(figure, len(logs[figure]), len(values)))
        for figure, values in blocks.items()
    }


def ratios(engines: Mapping[str, Blocks], first: str, confidence: float, tail: float = 1.0) -> dict[str, dict[str, Estimate]]:
    """Compute the ratio of each figure of each engine to that of the engine `first`, by label and figure.

    Below 1 is faster. With several engines the intervals of a figure are widened as those of throughputs are.
    """
    others = [label for label in engines if label != first]
    answer: dict[str, dict[str, Estimate]] = {label: {} for label in others}
    for figure in HEADLINED:
        logs = {label: log_ratios(engines[label][figure], engines[first][figure]) for label in others}
        usable = [each for each in logs.values() if len(each) >= LEAST_BLOCKS]
        inner = shared_confidence(usable, 1 - tail * (1 - confidence))
        for label in others:
            why = missing(figure, len(logs[label]), len(engines[label][figure]))
            answer[label][figure] = estimate(logs[label], inner, 1 - (1 - inner) / tail, why)
    return answer


def missing(figure: str, usable: int, blocks: int) -> str:
    """Return why there is no interval, an empty text where there is one."""
    if usable >= LEAST_BLOCKS:
        return ""
    if blocks < LEAST_BLOCKS:
        return f"fewer than {LEAST_BLOCKS} blocks"
    _, name = HEADLINED[figure]
    return f"a {name} needs {needed(PERCENTS[name])} samples in a block, in {LEAST_BLOCKS} blocks or more"
