"""Decide which timed blocks are dropped because other programs disturbed them. The rule reads no result of an engine.

A window is disturbed if it lasts more than `COARSE_S` and other programs use more than `DISTURBED` of the processors in it. A
block is disturbed if any window in it is. A disturbed block is dropped for all engines, so the ratios stay paired. A run
repeats it while `measure.budget_s` and `measure.max_blocks` allow. At most `MOST_DROPPED` of the blocks are dropped: beyond
that, the machine is shared throughout. Then no block is dropped, and no verdict is given. A run on such a machine ends after
twice `measure.blocks`.

The rule reads nothing else. Compilations, failures, page faults, heat and CPU quotas depend on the engine, so a rule that reads
them would drop the slow blocks of an engine. They remain reasons for the mark "contaminated". So does a share of other programs
between `BUSY` and `DISTURBED`. The throughput of the memory is measured beside a window and not in it, so it drops no block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.load.driver import Window
from experiments.metrics.metrics import COARSE_S, counters

DISTURBED = 0.1
"""Share of the time of all processors above which other programs disturb a window."""
MOST_DROPPED = 1 / 3
"""Greatest share of the blocks of a run that is dropped."""


def disturbed_blocks(windows: Mapping[str, Sequence[Window]]) -> dict[int, str]:
    """Return the reason for each disturbed block, by its number. `windows` are those of each engine, by label and block."""
    found: dict[int, str] = {}
    for label, mine in windows.items():
        for block, window in enumerate(mine):
            share = foreign_share(window)
            if share > DISTURBED and window.duration > COARSE_S:
                said = f"other programs used {share:.0%} of the processors beside {label}"
                found[block] = f"{found[block]}; {said}" if block in found else said
    return dict(sorted(found.items()))


def foreign_share(window: Window) -> float:
    """Return the share of the time of all processors that other programs used; 0 where the machine does not report it."""
    return counters([window.stats], window.duration, 0)["foreign_cpu_share"] or 0.0


def too_many(disturbed: int, blocks: int) -> bool:
    """Return whether more than `MOST_DROPPED` of the blocks are disturbed."""
    return disturbed > MOST_DROPPED * blocks + 1e-9


def dropped_blocks(disturbed: Mapping[int, str], blocks: int) -> dict[int, str]:
    """Return the disturbed blocks that are dropped: all, or none where they are too many."""
    return {} if too_many(len(disturbed), blocks) else dict(disturbed)


def no_verdict(disturbed: int, blocks: int) -> str:
    """Return why the comparisons of a run are undecided; an empty text where few enough blocks are disturbed."""
    if not too_many(disturbed, blocks):
        return ""
    return f"other programs disturbed {disturbed} of {blocks} blocks, more than a third"
