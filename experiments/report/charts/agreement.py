"""Draw the difference of each engine from the first, by output position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.report.charts.canvas import POINTS, clean, colour, dash, draw, legend, logarithmic, mark, stretch
from experiments.report.page import Drawing, Table


def by_position(
    agreement: Mapping[str, Mapping[str, Any]], engines: Sequence[str], what: str, title: str, y: str
) -> Drawing | None:
    """A figure of the agreement with the first engine at each output position. None where nobody told."""
    told = {
        label: clean(*([at.get(name) for at in found.get("by_position") or ()] for name in ("position", what)))
        for label, found in agreement.items()
    }
    lines = {label: pair for label, pair in told.items() if len(pair[0])}
    if not lines:
        return None
    log = stretch([value for _, ys in lines.values() for value in ys])

    def paint(axes: Axes) -> None:
        for label, (xs, ys) in lines.items():
            i = engines.index(label)
            axes.plot(*thinned(xs, ys), color=colour(i), linestyle=dash(i), gid=mark(i))
        if log:
            logarithmic(axes, "y")
        elif min(ys.min() for _, ys in lines.values()) >= 0:
            axes.set_ylim(bottom=0)

    rows = [(label, str(len(ys)), f"{ys.mean():.3g}", f"{ys.min():.3g}", f"{ys.max():.3g}") for label, (_, ys) in lines.items()]
    said = "; ".join(f"{row[0]}: {row[2]} on average, {row[3]} to {row[4]}" for row in rows)
    return draw(
        f"agreement-{what.replace('_', '-')}",
        title,
        f"{title} against {engines[0]}, by output position. {said}.",
        paint,
        x="position in the output",
        y=y,
        keys=legend({engines.index(label): label for label in lines}),
        table=Table(("engine", "positions", "mean", "least", "most"), rows, title),
    )


def constant(agreement: Mapping[str, Mapping[str, Any]], what: str) -> float | None:
    """The value of a figure of the agreement, if it is the same at all positions of all engines."""
    values = {at[what] for found in agreement.values() for at in found.get("by_position") or () if at.get(what) is not None}
    return values.pop() if len(values) == 1 else None


def thinned(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The means of at most `POINTS` runs of neighbours."""
    if len(xs) <= POINTS:
        return xs, ys
    edges = np.linspace(0, len(xs), POINTS + 1).astype(int)[:-1]
    sizes = np.diff([*edges, len(xs)])
    return np.add.reduceat(xs, edges) / sizes, np.add.reduceat(ys, edges) / sizes
