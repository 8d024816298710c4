"""Which engine runs when, and when they have run often enough. A block is a round in which each engine runs once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from experiments.config import MeasureConfig
from experiments.statistics import fewest_blocks

ALWAYS = 2
"""Blocks that run whatever the budget says."""


def block_order(labels: Sequence[str], number: int, seed: int) -> list[str]:
    """The order within block `number` (from 0): drawn for every pair of blocks, whose second mirrors its first. So a machine
    that drifts wrongs nobody over a pair, and no rhythm of the machine's can match that of the blocks."""
    drawn = [labels[i] for i in np.random.default_rng([seed, 2, number // 2]).permutation(len(labels))]
    return drawn if number % 2 == 0 else drawn[::-1]


def reason_to_stop(
    config: MeasureConfig, done: int, elapsed: float, longest: float, comparisons: int, width: Callable[[], float]
) -> str | None:
    """Why no block follows the `done` that took `elapsed` seconds, the longest of them `longest`; None if one does.

    `width` finds that of the widest interval of the `comparisons` ratios. It is asked only where it decides: after an even
    number of blocks, `config.blocks` at least, of which a difference can be told.
    """
    if done < min(ALWAYS, config.blocks):
        return None
    extra = done >= config.blocks
    ahead = 2 if extra and done % 2 == 0 else 1
    if done >= config.most_blocks or (extra and not comparisons):
        return f"all {done} blocks were run" if done > 1 else "its one block was run"
    if elapsed + ahead * longest > config.budget_s:
        return f"the budget of {config.budget_s:g} s was used up after {done} blocks"
    if not extra or done % 2 == 1:
        return None
    if done >= fewest_blocks(comparisons, config.confidence) and width() <= config.precision:
        return f"after {done} blocks every interval of a ratio was narrower than {config.precision:g}"
    return None
