"""Draw the ratio of each engine to the first, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.display.formatting import middle_out, number
from experiments.metrics.statistics import band
from experiments.report.charts.canvas import GRID, MUTED, PAPER, colour, draw, legend, mark, marker
from experiments.report.page import Drawing, Table


def ratio(comparisons: Mapping[str, Mapping[str, Any]], engines: Sequence[str], equivalence: float) -> Drawing | None:
    """Each block's ratio of output throughput to the first engine's, with the ratio of all where that has an interval; a band
    shows which ratios are called equivalent, those within a factor of
    1 + `equivalence` of 1. None without blocks."""
    shown = {label: found for label, found in comparisons.items() if found.get("block_ratios")}
    if not shown:
        return None
    blocks = max(len(found["block_ratios"]) for found in shown.values())
    bounded = [label for label, found in shown.items() if found.get("low") is not None]

    def paint(axes: Axes) -> None:
        axes.axhspan(*band(equivalence), color=GRID, alpha=0.6, linewidth=0)
        axes.axhline(1, color=MUTED, linewidth=1)
        for label, found in shown.items():
            i = engines.index(label)
            ratios = np.array(found["block_ratios"], float)
            x = np.arange(1, len(ratios) + 1)
            axes.plot(x, ratios, marker(i), color=colour(i), markersize=5.5, gid=mark(i), clip_on=False)
            if label in bounded:
                end = blocks + 1.2 + 0.5 * bounded.index(label)
                axes.vlines(end, found["low"], found["high"], color=colour(i), linewidth=2.5, gid=mark(i))
                axes.plot([end], [found["ratio"]], marker(i), color=PAPER, markeredgecolor=colour(i), markersize=8, gid=mark(i))
        axes.set_xlim(0.4, blocks + (1.7 + 0.5 * len(bounded) if bounded else 0.6))
        ticks = list(range(1, blocks + 1, max(1, -(-blocks // 10))))
        middle = [blocks + 1.2 + 0.25 * (len(bounded) - 1)] if bounded else []  # of the marks for all
        axes.set_xticks([*ticks, *middle], [*map(str, ticks), *(["all"] if bounded else [])])

    rows = [
        (
            label,
            str(found.get("verdict") or "–"),
            *(number(found.get(name)) for name in ("ratio", "low", "high", "p_value")),
            str(len(found["block_ratios"])),
        )
        for label, found in shown.items()
    ]
    said = "; ".join(
        f"{row[0]} {row[2]}, " + ("no interval" if found.get("low") is None else f"interval {row[3]} to {row[4]}")
        for row, found in zip(rows, shown.values(), strict=True)
    )
    against = next(iter(shown.values())).get("against", engines[0])
    return draw(
        "ratio",
        f"Output throughput over {middle_out(str(against))}'s",
        f"One mark for each block{', and at the right the ratio of all' if bounded else ''}: {said}.",
        paint,
        x="block",
        y=f"ratio; the band is within a factor of {1 + equivalence:g}",
        keys=legend({engines.index(label): label for label in shown}, line=False),
        table=Table(("engine", "verdict", "ratio", "low", "high", "p", "blocks"), rows, f"Ratio to {against}"),
    )
