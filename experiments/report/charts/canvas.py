"""Define the style of every figure: one drawing by matplotlib for light and dark themes, for print and for a phone.

A figure has one pair of axes, with the title and the quantity on the y axis above them, and the legend below. Each engine has
its own color, dash and marker, the same in every figure. Color-blind readers can distinguish the colors.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.typing import LineStyleType

from experiments.display.formatting import shortened
from experiments.report.page import Drawing, Table

INK, MUTED, GRID, PAPER = "#1f2430", "#5c6575", "#dfe3ea", "#fefefe"
ENGINES = ("#1f6fb4", "#d4700f", "#16896a", "#5a2bd0", "#7d1128", "#545006", "#888c96")
DARK = {
    INK: "#e7e9ee",
    MUTED: "#a2abba",
    GRID: "#343b48",
    PAPER: "#191d25",
    **dict(zip(ENGINES, ("#6bb1f2", "#f3a354", "#50cfa5", "#8a66f2", "#e0486a", "#e8e24c", "#d5d9e2"), strict=True)),
}
"""Colour on light paper → on dark."""
VARIABLES = {colour: f"--{name}" for colour, name in zip(DARK, ("ink", "muted", "grid", "paper", *"abcdefg"), strict=True)}
"""Colour → the variable that takes its place in an SVG."""
DASHES: Sequence[LineStyleType] = ("solid", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = "osD^vPX"
SIZE = (5.3, 3.3)
"""Inches: 382 points wide, so that 9-point text is still read on a screen of 390 pixels."""
POINTS = 300
"""Of a curve at most."""
BARS = 80
"""Requests drawn one by one at most; more are drawn as counts over time."""
LETTERS = 64
"""Of a legend's labels that one line has room for, 8 of which each key takes."""
STYLE: dict[Any, Any] = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": PAPER,
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",  # text stays text: it can be found, read aloud, and takes the page's font
    "text.color": INK,
    "text.parse_math": False,  # a label may hold a dollar sign
    "xtick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
}


def colour(number: int) -> str:
    """Of engine `number` of a run; after the seventh they come round again, with another dash."""
    return ENGINES[number % len(ENGINES)]


def dash(number: int) -> LineStyleType:
    return DASHES[number % len(DASHES)]


def marker(number: int) -> str:
    return MARKERS[number % len(MARKERS)]


def mark(number: int) -> str:
    """The `gid` of what belongs to an engine, by which the page dims it."""
    return f"engine-{number}"


def legend(engines: Mapping[int, str], line: bool = True) -> list[Line2D]:
    """The keys of engines, number → label, in a legend."""
    style = lambda i: {"linestyle": dash(i)} if line else {"linestyle": "none", "marker": marker(i)}  # noqa: E731
    names = shortened(list(engines.values()))
    return [Line2D([], [], color=colour(i), label=name, **style(i)) for i, name in zip(engines, names, strict=True)]


def draw(
    name: str,
    title: str,
    alt: str,
    paint: Callable[[Axes], object],
    *,
    x: str,
    y: str,
    keys: Sequence[Line2D] = (),
    table: Table | None = None,
) -> Drawing:
    """Let `paint` draw on new axes. `alt` says what is to be seen, for those who cannot see it; `x` and `y` name the axes."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a label in another script: the reader's font will have it
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        axes.set_axisbelow(True)
        axes.xaxis.set_major_formatter(FuncFormatter(tick))
        axes.yaxis.set_major_formatter(FuncFormatter(tick))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(visible=False, axis="x")
        paint(axes)
        axes.set_title(title, pad=20)
        axes.text(0, 1.03, y, transform=axes.transAxes, color=MUTED, va="bottom")
        axes.set_xlabel(x)
        if keys:
            columns = max(1, LETTERS // (8 + max(len(str(handle.get_label())) for handle in keys)))
            figure.legend(handles=list(keys), loc="outside lower left", ncols=columns, handlelength=2.4)
        svg, png = io.StringIO(), io.BytesIO()
        figure.draw_without_rendering()  # lays it out, once for both files, whose canvases `savefig` would have draw twice
        figure.set_layout_engine("none")
        figure.patch.set_alpha(0)
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
        figure.patch.set_alpha(1)
        figure.dpi = 200
        FigureCanvasAgg(figure).print_png(png)
    return Drawing(
        name=name, title=title, alt=alt, svg=themed(svg.getvalue(), name, title, alt), png=png.getvalue(), table=table
    )


def themed(svg: str, name: str, title: str, alt: str) -> str:
    """An SVG of matplotlib as an element that may stand in a page: with title and description, colours as variables, ids that
    no other figure has, and the reader's font. See `standalone` for a file."""
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'id="(engine-\d+)"', r'class="\1"', svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, 'DejaVu Sans', sans-serif", svg)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda hit: f"var({VARIABLES[hit[0]]})" if hit[0] in VARIABLES else hit[0], svg)
    named = f'<svg role="img" aria-labelledby="{name}-title {name}-alt" '
    head = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-alt">{escape(alt)}</desc>'
    opening, rest = svg.split(">", 1)
    return opening.replace("<svg ", named, 1) + ">" + head + rest


def standalone(svg: str) -> str:
    """A themed SVG as a file that follows its reader's light or dark."""
    opening, rest = svg.split(">", 1)
    return f"{opening}><style>{theme(':root')}</style>{rest}"


def theme(selector: str) -> str:
    """CSS that gives the variables of figures their values."""
    light = "".join(f"{name}:{value};" for value, name in VARIABLES.items())
    dark = "".join(f"{name}:{DARK[value]};" for value, name in VARIABLES.items())
    return f"{selector}{{{light}}}@media (prefers-color-scheme:dark){{{selector}{{{dark}}}}}"


def clean(xs: Sequence[float | None], ys: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of which both are numbers."""
    a, b = np.array(xs, float), np.array(ys, float)
    kept = np.isfinite(a) & np.isfinite(b)
    return a[kept], b[kept]


def stretch(values: Sequence[float] | np.ndarray) -> bool:
    """Whether values are positive and span so much that they want a logarithmic axis."""
    values = np.asarray(values)
    return bool(len(values) and values.min() > 0 and values.max() > 25 * values.min())


def logarithmic(axes: Axes, which: str) -> None:
    """Make axis `x` or `y` logarithmic, with ticks between the powers of ten where there is room."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low) if low > 0 else 6.0
    between = (1.0, 2.0, 5.0) if decades < 2 else (1.0, 3.0) if decades < 3.5 else (1.0,)
    axis.set_major_locator(LogLocator(subs=between, numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(tick))


def tick(value: float, _: object = None) -> str:
    """A number short enough for an axis: 0.05, 12, 3.5k, 2M; 1e-07 where it is small."""
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            unit = 1e3 if letter == "k" else limit
            return f"{value / unit:.4g}{letter}"
    return "0" if size < 1e-300 else f"{value:.4g}" if size >= 1e-3 else f"{value:.0e}"
