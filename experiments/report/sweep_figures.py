"""Draw the figures of a sweep: the result of each engine over the options that were swept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.typing import LineStyleType

from experiments.display.formatting import number, shortened
from experiments.report.charts.canvas import colour, dash, draw, logarithmic, mark, marker, stretch
from experiments.report.page import Drawing, Table

SERIES = 8
"""Lines in a figure at most; more settings are drawn as their median, one line for each engine."""


@dataclass(frozen=True)
class Series:
    """One line: an engine, with a setting of the options that the x axis does not show."""

    engine: int
    setting: str
    points: pd.DataFrame
    """In the order of the sweep."""


def series(table: pd.DataFrame, engines: Sequence[str], others: Sequence[str]) -> list[Series]:
    """The cells that went well, split by engine and, unless that gives too many lines, by the values of `others`."""
    table = table[table["status"] == "ok"]
    by = ["engine", *others]
    groups = list(table.groupby(by, sort=False, dropna=False)) if len(table) else []
    if len(groups) > SERIES:
        return [Series(i, "median", table[table["engine"] == label]) for i, label in enumerate(engines)]
    return [
        Series(
            engines.index(str(names[0])),
            ", ".join(f"{last(o)}={value(n)}" for o, n in zip(others, names[1:], strict=True)),
            points,
        )
        for names, points in groups
    ]


def last(option: str) -> str:
    """`num_requests` of `workload.num_requests`."""
    return option.rpartition(".")[2]


def value(cell: Any) -> str:
    """A swept value as it was written."""
    if cell is None or cell is pd.NA or (isinstance(cell, float) and np.isnan(cell)):
        return "–"
    return f"{cell:g}" if isinstance(cell, (float, np.floating)) else str(cell)


def is_number(cell: Any) -> bool:
    return isinstance(cell, (int, float, np.number)) and not isinstance(cell, (bool, np.bool_))


def over_axis(
    table: pd.DataFrame, engines: Sequence[str], swept: Sequence[str], axis: str, figure: str, title: str, unit: str
) -> Drawing | None:
    """`figure` over the values of the option `axis`. None where fewer than two values have it."""
    table = table[table[axis].notna()]
    numbers = sorted(set(map(float, table[axis]))) if all(map(is_number, table[axis])) else []
    words = list(dict.fromkeys(map(value, table[axis])))
    lines = []
    for one in series(table, engines, [name for name in swept if name not in (axis, "engine")]):
        points = one.points[one.points[figure].notna()]
        x = [float(v) if numbers else float(words.index(value(v))) for v in points[axis]]
        middle = pd.Series(points[figure].to_numpy(float), x).groupby(level=0).median()
        if len(middle):
            lines.append((one, middle))
    if len({x for _, middle in lines for x in middle.index}) < 2:
        return None

    def paint(axes: Axes) -> None:
        for n, (one, middle) in enumerate(lines):
            line = axes.plot(
                middle.index, middle.to_numpy(), shape_of(n, one, bool(numbers)), markersize=5, gid=mark(one.engine)
            )[0]
            line.set_color(colour(one.engine))
            line.set_linestyle(dash(n) if numbers else "none")
        axes.set_ylim(0, 1.1 * max(middle.max() for _, middle in lines) or 1.0)
        if not numbers:
            axes.set_xticks(range(len(words)), shortened(words, max(3, 48 // len(words))))
            axes.margins(x=0.2)
            return
        scaled = np.array(numbers)
        if stretch(numbers):
            logarithmic(axes, "x")
            scaled = np.log(scaled)
        gaps = np.diff(scaled)
        if gaps.min() > gaps.sum() / 9:  # there is room for each of their labels
            axes.set_xticks(numbers)

    rows = [
        (named(one, engines), value(x) if numbers else words[int(x)], number(float(y)))
        for one, middle in lines
        for x, y in middle.items()
    ]
    names = shortened([named(one, engines) for one, _ in lines])
    best = max(rows, key=lambda row: float(row[2].replace(",", "")))
    return draw(
        f"{figure.replace('_', '-')}-over-{axis.replace('.', '-')}",
        f"{title} over {last(axis)}",
        f"{title} in {unit}, one {'line' if numbers else 'kind of mark'} for each engine and setting. "
        f"The most is {best[2]}, of {best[0]} at {last(axis)}={best[1]}.",
        paint,
        x=axis,
        y=unit,
        keys=[key_of(n, one, name, bool(numbers)) for n, ((one, _), name) in enumerate(zip(lines, names, strict=True))],
        table=Table(("engine", last(axis), unit), rows, f"{title} over {axis}"),
    )


def named(one: Series, engines: Sequence[str]) -> str:
    return f"{engines[one.engine]} {one.setting}".strip()


def shape_of(n: int, one: Series, line: bool) -> str:
    """An engine's marker; without lines, whose dashes tell settings apart, one of the series."""
    return marker(one.engine if line else n)


def key_of(n: int, one: Series, name: str, line: bool) -> Line2D:
    style: LineStyleType = dash(n) if line else "none"
    return Line2D(
        [],
        [],
        color=colour(one.engine),
        linestyle=style,
        marker=shape_of(n, one, line),
        markersize=5,
        label=name,
    )
