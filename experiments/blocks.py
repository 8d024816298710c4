"""Which engine runs when, and when they have run often enough. A block is a round in which each engine runs once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.config import ADAPTIVE_BLOCKS, MeasureConfig
from experiments.statistics import fewest_blocks

ALWAYS = 2
"""Blocks that run whatever the budget says."""


def block_order(labels: Sequence[str], number: int, seed: int) -> list[str]:
    """The order within block `number` (from 0): drawn for every pair of blocks, whose second mirrors its first. So a machine
    that drifts wrongs nobody over a pair, and no rhythm of the machine's can match that of the blocks."""
    drawn = [labels[i] for i in np.random.default_rng([seed, 2, number // 2]).permutation(len(labels))]
    return drawn if number % 2 == 0 else drawn[::-1]


def first_look(config: MeasureConfig, comparisons: int) -> int | None:
    """After how many blocks a run of so many comparisons may first end by what it found; None if only at its last."""
    fewest = max(config.blocks, fewest_blocks(comparisons, config.confidence))
    first = fewest + fewest % 2
    return first if first < config.most_blocks else None


def level(config: MeasureConfig, comparisons: int, ended: bool) -> float:
    """The greatest p value of a difference on which not all blocks agree, in a run that has `ended` or only looks whether to.

    To look more often must not mean to be wrong more often. Until a run has ended, then, all blocks must agree. Of engines
    that do not differ they do so with probability 2^(1 - n), which is spent once, at the first look: blocks that all agree at a
    later one did so then. The end has the rest of 1 - confidence.
    """
    first = first_look(config, comparisons)
    if first is None:
        return 1 - config.confidence
    return 1 - config.confidence - comparisons * 2.0 ** (1 - first) if ended else 0.0


def time_left(config: MeasureConfig, done: int, elapsed: float, longest: float) -> float:
    """Seconds, at most, that the blocks asked for still take after `done` of them, the longest of `longest` seconds: those that
    run whatever the budget says, and of the others what it leaves after `elapsed`. 0 or less where that is not known."""
    due = longest * (min(ALWAYS, config.blocks) - done)
    return min(longest * (config.blocks - done), max(config.budget_s - elapsed, due))


def advice(config: MeasureConfig, stopped_by: str, done: int, comparisons: int) -> str:
    """What to set for a verdict where `done` blocks gave none, by the option that ended the run; empty where none did."""
    fewest = fewest_blocks(comparisons, config.confidence)
    wanted = max(config.blocks, fewest)
    if stopped_by == "measure.precision":
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
    config: MeasureConfig, done: int, elapsed: float, longest: float, comparisons: int, settled: Callable[[], bool]
) -> Stop | None:
    """Why no block follows the `done` that took `elapsed` seconds, the longest of them `longest`; None if one does.

    `settled` tells whether every interval of the `comparisons` ratios is narrow, and none shows a difference that is yet to be
    proven. It is asked only where it decides: after an even number of blocks, from the first look on.
    """
    if done < min(ALWAYS, config.blocks):
        return None
    extra = done >= config.blocks
    ahead = 2 if extra and done % 2 == 0 else 1
    if done >= config.most_blocks or (extra and not comparisons):
        adaptive = config.blocks >= ADAPTIVE_BLOCKS and comparisons > 0
        said = f"all {done} blocks were run" if done > 1 else "its one block was run"
        return Stop(said, "measure.max_blocks" if adaptive else "measure.blocks")
    if elapsed + ahead * longest > config.budget_s:
        said = f"the budget of {config.budget_s:g} s (measure.budget_s) was used up after {done} blocks"
        return Stop(said, "measure.budget_s")
    if not extra or done % 2 == 1:
        return None
    first = first_look(config, comparisons)
    if first is not None and done >= first and settled():
        said = f"after {done} blocks every interval of a ratio was narrower than {100 * config.precision:g} % of it"
        return Stop(said, "measure.precision")
    return None
