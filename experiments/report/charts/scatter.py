"""Draw one figure of a run against another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from experiments.display.formatting import number
from experiments.report.charts.canvas import BARS, PAPER, clean, colour, draw, legend, logarithmic, mark, marker, stretch
from experiments.report.page import Drawing, Table

APART = (0.15, 0.07)
"""Shares of width and height by which marks are apart of which each has its name above it."""


def scatter(
    name: str,
    title: str,
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    each: str,
    names: Mapping[str, Sequence[str]] | None = None,
) -> Drawing | None:
    """Two figures of each `each`, as "block", one mark each; engine → (x, y). None without a point.

    `names` of the points, by engine, are given where these are of different settings, whose middle would say nothing."""
    shown = {label: clean(*pair) for label, pair in points.items()}
    if not any(len(xs) for xs, _ in shown.values()):
        return None

    def paint(axes: Axes) -> None:
        for i, (xs, ys) in enumerate(shown.values()):
            axes.plot(xs, ys, marker(i), color=colour(i), markersize=6, markeredgecolor=PAPER, gid=mark(i), linestyle="none")
        axes.grid(visible=True, axis="x")
        axes.margins(0.12)
        for which, side in (("x", 0), ("y", 1)):
            if stretch(np.concatenate([pair[side] for pair in shown.values()])):
                logarithmic(axes, which)
        if names and len(shown) == 1:
            (label,) = shown
            name_marks(axes, points[label], names[label])

    rows = [
        (label, names[label][n] if names else str(n + 1), number(float(a)), number(float(b)))
        for label, pair in points.items()
        for n, (a, b) in enumerate(zip(*pair, strict=True))
        if math.isfinite(a) and math.isfinite(b)
    ]
    middles = "; ".join(
        f"{label}: {number(float(np.median(xs)))} {x} at {number(float(np.median(ys)))} {y}"
        for label, (xs, ys) in shown.items()
        if len(xs)
    )
    said = f"One mark for each {each}." + ("" if names else f" In the middle, {middles}.")
    return draw(
        name,
        title,
        said,
        paint,
        x=x,
        y=y,
        keys=legend(dict(enumerate(shown)), line=False),
        table=Table(("engine", each, x, y), rows[: 4 * BARS], title),
    )


def name_marks(axes: Axes, pair: tuple[Sequence[float], Sequence[float]], names: Sequence[str]) -> None:
    """Write names above marks, unless one is written near by."""
    axes.autoscale_view()
    where = axes.transData + axes.transAxes.inverted()
    written: list[np.ndarray] = []
    for name, x, y in zip(names, *pair, strict=True):
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        at = where.transform((x, y))
        if all((abs(at - other) > APART).any() for other in written):
            axes.annotate(name, (x, y), (0, 6), textcoords="offset points", ha="center", fontsize="small", gid=mark(0))
            written.append(at)
