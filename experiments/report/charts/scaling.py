"""Draw throughput over ranks."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from experiments.display.formatting import middle_out, number
from experiments.report.charts.canvas import LETTERS, MUTED, PAPER, colour, dash, draw, marker
from experiments.report.page import Drawing
from experiments.report.scaling import STRONG, WEAK, Curve, resource

TITLES = {
    STRONG: "Throughput over ranks, the same requests",
    WEAK: "Throughput over ranks, as many requests for each",
}
FIRST = "× the first"
SIZE = 5
"""Of markers, in points."""


def scaling(curves: Sequence[Curve], kind: str) -> Drawing | None:
    """How many times the throughput of its first point each point of the curves of a kind has, beside what would be in
    proportion to threads or devices. Points of contaminated engines are hollow. None without a curve."""
    curves = [curve for curve in curves if curve.kind == kind]
    if not curves:
        return None
    spoilt = any(point.get("contaminated") for curve in curves for point in curve.points)

    def paint(axes: Axes) -> None:
        for i, curve in enumerate(curves):
            ranks = [point["ranks"] for point in curve.points]
            axes.plot(ranks, [curve.ideal(point) for point in curve.points], color=MUTED, linewidth=1, linestyle="dotted")
            ours = [curve.speed_up(point) for point in curve.points]
            axes.plot(ranks, ours, color=colour(i), linestyle=dash(i))
            for point, times in zip(curve.points, ours, strict=True):
                inside = PAPER if point.get("contaminated") else colour(i)
                axes.plot(point["ranks"], times, marker(i), color=colour(i), markerfacecolor=inside, markersize=SIZE)
        axes.set_xticks(sorted({point["ranks"] for curve in curves for point in curve.points}))
        most = max(max(curve.speed_up(point), curve.ideal(point)) for curve in curves for point in curve.points)
        axes.set_ylim(0, 1.1 * most)

    common, names = told_apart(curves)
    said = "; ".join(f"{curve.title}, " + ", ".join(reached(curve, point) for point in curve.points) for curve in curves)
    bound = "; a larger batch gives more tokens/s by itself, so that lines may rise above it" if kind == WEAK else ""
    return draw(
        f"{kind}-scaling",
        TITLES[kind],
        f"Times the output throughput of the fewest ranks: {said}. Dotted: in proportion to threads on a CPU, to devices "
        f"elsewhere{bound}.",
        paint,
        x="ranks",
        y=f"{middle_out(common, LETTERS - len(FIRST) - 2)}: {FIRST}" if common else FIRST,
        keys=[*(key(i, name) for i, name in enumerate(names)), *others(curves, spoilt)],
    )


def told_apart(curves: Sequence[Curve]) -> tuple[str, list[str]]:
    """What all curves have in common, and what tells each from the others; of a curve alone all of it tells."""
    count = {STRONG: "{:g} requests", WEAK: "{:g} a rank"}
    every = [(each.engine, each.shared_by, count[each.kind].format(each.requests), each.setting) for each in curves]
    common = [len(curves) > 1 and len(set(parts)) == 1 for parts in zip(*every, strict=True)]
    pick = lambda parts, wanted: ", ".join(  # noqa: E731
        part for part, shared in zip(parts, common, strict=True) if part and shared == wanted
    )
    return pick(every[0], True), [pick(parts, False) for parts in every]


def reached(curve: Curve, point: Mapping[str, Any]) -> str:
    doubt = " (contaminated)" if point.get("contaminated") else ""
    return f"{number(curve.speed_up(point))} at {point['ranks']}{doubt}"


def key(i: int, name: str) -> Line2D:
    """Of a curve, whose name goes on in the next line rather than lose what tells it apart."""
    style = {"color": colour(i), "linestyle": dash(i), "marker": marker(i), "markersize": SIZE}
    return Line2D([], [], label=textwrap.fill(name, LETTERS - 8), **style)  # type: ignore[arg-type]


def others(curves: Sequence[Curve], spoilt: bool) -> list[Line2D]:
    """Of the legend what is no curve."""
    more = " or ".join(sorted({resource(point) for curve in curves for point in curve.points}))
    dotted = Line2D([], [], color=MUTED, linewidth=1, linestyle="dotted", label=f"in proportion to {more}")
    hollow = Line2D([], [], color=MUTED, linestyle="none", marker="o", markerfacecolor=PAPER, label="contaminated")
    return [dotted, hollow] if spoilt else [dotted]
