"""Choose the order of the engines in each block, and decide when there are enough blocks. Each engine runs once in a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.measure.config import ADAPTIVE_BLOCKS, MeasureConfig
from experiments.metrics.disturbed import no_verdict, too_many
from experiments.metrics.statistics import fewest_blocks

PRECISION = "measure.precision"
"""The option that ends a run whose intervals are narrow."""
ALWAYS = 2
"""Blocks that run whatever the budget says."""
PLANNED = 6
"""Blocks whose orders are drawn together: the fewest that can show a difference."""
ALLOWED = 44 / 64
"""Share of the sequences of the first `PLANNED` orders that do not repeat."""
LATER_LOOKS = 0.6
"""Share of 1 - confidence that an interval leaves out where it ends the run after the first look (see `tail`)."""


def block_order(labels: Sequence[str], number: int, seed: int) -> list[str]:
    """Draw the order of the engines within block `number` (from 0), independently of the other blocks.

    The first `PLANNED` orders are drawn together, because a run may end with them. They are drawn anew while the place of an
    engine before or after the first one repeats. Otherwise a machine with a rhythm of 2, 3, 4, 6, 8 or 12 windows could
    disturb the same engine in each of these blocks.
    """
    if number >= PLANNED:
        drawn = np.random.default_rng([seed, 2, number]).permutation(len(labels))
    else:
        drawn = planned_orders(len(labels), seed)[number]
    return [labels[i] for i in drawn]


def planned_orders(engines: int, seed: int) -> np.ndarray:
    """int[PLANNED, engines]: the orders of the first blocks."""
    rng = np.random.default_rng([seed, 2])
    while True:
        orders = np.array([rng.permutation(engines) for _ in range(PLANNED)])
        places = np.argsort(orders, axis=1)
        if not any(repeats(before) for before in (places[:, 1:] < places[:, :1]).T):
            return orders


def repeats(before: Sequence[bool] | np.ndarray) -> bool:
    """Whether the sequence has a period of 1 to 3, or turns into its opposite after 1 to 3. 20 of 64 sequences do."""
    signs = np.asarray(before)
    same = [signs[period:] == signs[:-period] for period in (1, 2, 3)]
    return any(each.all() or not each.any() for each in same)


def first_look(config: MeasureConfig, comparisons: int) -> int | None:
    """After how many blocks a run of so many comparisons may first end by what it found; None if only at its last."""
    fewest = max(config.blocks, fewest_blocks(comparisons, config.confidence))
    first = fewest + fewest % 2
    return first if first < config.most_blocks else None


def level(config: MeasureConfig, comparisons: int, ended: bool) -> float:
    """The greatest p value of a difference on which not all blocks agree, in a run that has `ended` or only looks whether to.

    To look more often must not mean to be wrong more often. All blocks must agree, then, until a run has ended. Where engines
    do not differ, the first n blocks agree with a probability of 2^(1 - n), divided by `ALLOWED` if the noise is a fixed
    pattern. This is spent once, at the first look: blocks that all agree at a later look agreed then. The end has the rest of
    1 - confidence.
    """
    first = first_look(config, comparisons)
    if first is None:
        return 1 - config.confidence
    spent = comparisons * 2.0 ** (1 - first) / ALLOWED
    return max(0.0, 1 - config.confidence - spent) if ended else 0.0


def tail(config: MeasureConfig, comparisons: int, done: int, stopped_by: str) -> float:
    """Return the share of 1 - confidence that the interval after `done` blocks leaves out.

    A run that stops when its interval is narrow stops rather where the standard deviation came out too small. A plain interval
    of 95 % then covers 92.6 % in the worst case (Starr 1966 found the same of fixed widths). The interval of a run that
    `measure.precision` ends after the first look is therefore one of 97 %. The first look is not selected, and the last one
    ends the run in any case: both have the whole of 1 - confidence.

    The share is calibrated. Under normal noise the mean of n blocks is independent of the standard deviations of all looks
    until n, which alone decide where the run ends. The coverage for a noise of s is thus the mean of 2 Φ(h √N / s) - 1 over
    the half width h and the number of blocks N at the end (Stein 1945; Chow and Robbins 1965). With 0.6 and the default rule
    it lies within 94.5 and 95.3 % for each s. `tests/test_statistics.py` holds drifts, AR(1), bursts and rhythms to 94 to 96 %.
    Bursts and rhythms about as large as `measure.precision`, beside little other noise, are covered in up to 99 %.
    """
    first = first_look(config, comparisons)
    selected = first is not None and done > first and stopped_by == PRECISION
    return LATER_LOOKS if selected else 1.0


def time_left(config: MeasureConfig, done: int, elapsed: float, longest: float) -> float:
    """Seconds, at most, that the blocks asked for still take after `done` of them, the longest of `longest` seconds: those that
    run whatever the budget says, and of the others what it leaves after `elapsed`. 0 or less where that is not known."""
    due = longest * (min(ALWAYS, config.blocks) - done)
    return min(longest * (config.blocks - done), max(config.budget_s - elapsed, due))


def advice(config: MeasureConfig, stopped_by: str, done: int, comparisons: int) -> str:
    """What to set for a verdict where `done` blocks gave none, by the option that ended the run; empty where none did."""
    fewest = fewest_blocks(comparisons, config.confidence)
    wanted = max(config.blocks, fewest)
    if stopped_by == PRECISION:
        return f"More blocks narrow the interval: lower {stopped_by}"
    if not stopped_by or done >= wanted:
        return stopped_by and f"More blocks narrow the interval: raise {stopped_by}"
    most = "measure.blocks" if config.blocks < ADAPTIVE_BLOCKS else "measure.max_blocks"
    allowed = "" if config.most_blocks >= fewest else f"{most}={fewest}"
    if stopped_by == "measure.budget_s":
        return f"Give all {wanted} blocks their time: raise {stopped_by}" + (allowed and f", and write {allowed}")
    return f"Write {allowed}, with a measure.budget_s that has room for them"


class Stop(NamedTuple):
    """Why no further block runs."""

    said: str
    option: str = ""
    """What would have to be set otherwise for more; empty where no option ended it."""


def reason_to_stop(
    config: MeasureConfig,
    done: int,
    elapsed: float,
    longest: float,
    comparisons: int,
    settled: Callable[[], bool],
    disturbed: int = 0,
) -> Stop | None:
    """Why no block follows the `done` that took `elapsed` seconds, the longest of them `longest`; None if one does.

    `done` counts the clean blocks. Each of the `disturbed` blocks (`experiments.metrics.disturbed`) is repeated until
    `measure.max_blocks` are run in sum, or too many of twice `measure.blocks` or more are disturbed.

    `settled` returns whether every interval of the `comparisons` ratios is narrow and none shows an unproven difference. The
    function calls it only where it decides: after an even number of blocks, from the first look on.
    """
    run = done + disturbed
    if run < min(ALWAYS, config.blocks):
        return None
    if run >= 2 * config.blocks and too_many(disturbed, run):
        return Stop(no_verdict(disturbed, run))
    if disturbed and run >= config.max_blocks:
        return Stop(f"all {run} blocks were run, {disturbed} of them disturbed by other programs", "measure.max_blocks")
    extra = done >= config.blocks
    ahead = 2 if extra and done % 2 == 0 else 1
    if done >= config.most_blocks or (extra and not comparisons):
        adaptive = config.blocks >= ADAPTIVE_BLOCKS and comparisons > 0
        said = f"all {done} blocks were run" if done > 1 else "its one block was run"
        return Stop(said, "measure.max_blocks" if adaptive else "measure.blocks")
    if elapsed + ahead * longest > config.budget_s:
        said = f"the budget of {config.budget_s:g} s (measure.budget_s) was used up after {run} blocks"
        said += f", {disturbed} of them disturbed by other programs" if disturbed else ""
        return Stop(said, "measure.budget_s")
    if not extra or done % 2 == 1 or too_many(disturbed, run):
        return None
    first = first_look(config, comparisons)
    if first is not None and done >= first and settled():
        said = f"after {done} blocks every interval of a ratio was narrower than {100 * config.precision:g} % of it"
        return Stop(said, PRECISION)
    return None
