"""Draw the engines under the roofline of the machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.typing import FillStyleType

from experiments.display.formatting import number
from experiments.report.charts.canvas import GRID, INK, MUTED, PAPER, colour, draw, legend, logarithmic, mark, marker
from experiments.report.figures_table import figure
from experiments.report.page import Drawing, Table


def roofline(figures: Mapping[str, Mapping[str, Any]], dtype: str) -> Drawing | None:
    """What each engine reached, under the best that the machine did in the run, beside a window, before or after all.
    None where that was not measured. A point is at the FLOP a byte that its steps need, and at a speed of mfu · peak. What is
    said of it in per cent is the figure `roofline`, step by step by the bandwidth beside each window: no share of this roof.
    """
    limits = next((found["limits"] for found in figures.values() if found.get("limits")), None)
    if not limits:
        return None
    best = lambda name: max(found.get(name) or 0.0 for found in limits.values() if found)  # noqa: E731
    beside = [value for mine in figures.values() for value in mine.get("block_read_bytes_per_s") or () if value]
    bandwidth, peak = max([best("read_bytes_per_s"), *beside]), best(f"{dtype}_flops_per_s")
    if not bandwidth or not peak:
        return None
    found: list[tuple[int, str, str, float, float, str]] = []
    for i, (label, mine) in enumerate(figures.items()):
        for phase, prefix in (("whole run", ""), ("decode steps", "decode_"), ("steps with prompts", "prefill_")):
            intensity, mfu = mine.get(f"{prefix}intensity"), mine.get(f"{prefix}mfu")
            if intensity and mfu:
                found.append((i, label, phase, intensity, mfu * peak, figure(f"{prefix}roofline", mine)))
    if not found:
        return None
    knee = peak / bandwidth
    fills: dict[str, FillStyleType] = {"whole run": "full", "decode steps": "none", "steps with prompts": "top"}

    def paint(axes: Axes) -> None:
        at = np.array([*(point[3] for point in found), knee])
        x = np.geomspace(at.min() / 4, at.max() * 8, 60)
        axes.plot(x, np.minimum(x * bandwidth, peak), color=INK, linewidth=1.6)
        axes.axvline(knee, color=GRID, linewidth=1)
        for i, _, phase, intensity, speed, _ in found:
            axes.plot(
                [intensity],
                [speed],
                marker(i),
                color=colour(i),
                markersize=8,
                gid=mark(i),
                fillstyle=fills[phase],
                markerfacecoloralt=PAPER,
            )
        axes.set_xlim(x[0], x[-1])
        axes.set_ylim(min(point[4] for point in found) / 3, peak * 3)
        logarithmic(axes, "x")
        logarithmic(axes, "y")
        axes.text(x[-1], peak * 1.15, f"{number(peak / 1e9)} GFLOP/s  ", color=MUTED, ha="right", va="bottom")

    rows = [(label, phase, number(intensity), number(speed / 1e9), share) for _, label, phase, intensity, speed, share in found]
    said = "; ".join(f"{row[0]}: {row[3]} GFLOP/s, roofline {row[4]}" for row in rows if row[1] == "whole run")
    return draw(
        "roofline",
        f"Roofline, {dtype}",
        f"The roof is {number(bandwidth / 1e9)} GB/s up to {number(knee)} FLOP a byte, then {number(peak / 1e9)} GFLOP/s. "
        f"Whole runs: {said}.",
        paint,
        x="FLOP a byte (full: all, hollow: decode steps, half: prompts)",
        y=f"FLOP/s; the slope is {number(bandwidth / 1e9)} GB/s",
        keys=legend(dict(point[:2] for point in found), line=False),
        table=Table(("engine", "phase", "FLOP a byte", "GFLOP/s", "roofline"), rows, "Under the roofline"),
    )
