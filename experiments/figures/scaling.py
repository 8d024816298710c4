"""Throughput over ranks."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from experiments.canvas import MUTED, colour, dash, draw, key, marker
from experiments.page import Drawing
from experiments.scaling import Curve
from experiments.words import number


def scaling(curves: Sequence[Curve]) -> Drawing | None:
    """How many times the throughput of its first point each point of a curve has, and how many it could have at best. None
    without a curve."""
    if not curves:
        return None

    def paint(axes: Axes) -> None:
        for i, curve in enumerate(curves):
            ranks = [point["ranks"] for point in curve.points]
            axes.plot(ranks, [curve.ideal(point) for point in curve.points], color=MUTED, linewidth=1, linestyle="dotted")
            ours = [curve.speed_up(point) for point in curve.points]
            axes.plot(ranks, ours, marker(i), color=colour(i), markersize=5, linestyle=dash(i))
        axes.set_xticks(sorted({point["ranks"] for curve in curves for point in curve.points}))
        axes.set_ylim(bottom=0)

    said = "; ".join(
        f"{curve.title}, " + ", ".join(f"{number(curve.speed_up(point))} at {point['ranks']}" for point in curve.points)
        for curve in curves
    )
    named = [key(i, curve.name) for i, curve in enumerate(curves)]
    best = Line2D([], [], color=MUTED, linewidth=1, linestyle="dotted", label="at best")
    return draw(
        "scaling",
        "Throughput over ranks",
        f"Times the output throughput of the fewest ranks: {said}. Dotted: what as many threads or devices give at best.",
        paint,
        x="ranks",
        y="× the first",
        keys=[*named, best],
    )
