"""Draw the time line of one window: its requests, the batch and the KV pages."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments.display.formatting import number
from experiments.report.charts.canvas import BARS, MUTED, POINTS, colour, draw
from experiments.report.page import Drawing, Table

PHASES = (("sent late", 0.16), ("admission", 0.3), ("prompt", 0.55), ("decode", 1.0))
"""Of a request, with the strength of their colour: until it is sent, until it has a place in the batch, until its first token,
until its last. An engine that does not tell when it gave the place has a longer prompt phase instead."""


def timeline(rows: pd.DataFrame, i: int, label: str, until: float) -> Drawing | None:
    """The requests of engine `i` in one window: bars over time, or counts where there are too many. None if none ran."""
    rows = rows[[len(times) > 0 for times in rows["times"]]]
    if not len(rows):
        return None
    rows = rows.sort_values(["sent", "scheduled"], kind="stable")
    first = np.array([times[0] for times in rows["times"]])
    last = np.array([times[-1] for times in rows["times"]])
    sent = rows["sent"].to_numpy(float)
    started = rows["started"].fillna(rows["sent"]).to_numpy(float) if told(rows, "started", every=False) else sent
    edges = [rows["scheduled"].to_numpy(float), sent, started, first, last]
    spans = [(*phase, edges[n], edges[n + 1]) for n, phase in enumerate(PHASES) if (edges[n + 1] > edges[n]).any()]
    single = len(rows) <= BARS

    def paint(axes: Axes) -> None:
        base = np.zeros(POINTS)
        for _, strength, start, end in spans:
            if single:
                axes.add_collection(PolyCollection(list(boxes(start, end)), facecolors=colour(i), alpha=strength, linewidths=0))
            else:
                at, counts = alive(start, end, until)
                axes.fill_between(at, base, base + counts, color=colour(i), alpha=strength, linewidth=0, step="mid")
                base = base + counts
        axes.set_xlim(0, until)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        if single:
            axes.set_ylim(len(rows), 0)

    totals = [(name, number(float((end - start).mean())), number(float((end - start).max()))) for name, _, start, end in spans]
    most = int(max(alive(sent, last, until)[1], default=0))
    handles = [Line2D([], [], color=colour(i), alpha=strength, linewidth=6, label=name) for name, strength, *_ in spans]
    return draw(
        f"timeline-{i}",
        f"Requests over time: {label}",
        f"{len(rows)} requests, up to {most} at once; mean " + ", ".join(f"{name} {mean} s" for name, mean, _ in totals) + ".",
        paint,
        x="s from the start of the window",
        y="one bar for each request, in the order sent" if single else "requests, by what they are in",
        keys=handles,
        table=Table(("phase", "mean, s", "longest, s"), totals, f"Requests of {label}, one window"),
    )


def boxes(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Bars as float64[n, 4, 2], the n-th in row n."""
    low = np.arange(len(start)) + 0.1
    x, y = np.stack([start, end, end, start], 1), np.stack([low, low, low + 0.8, low + 0.8], 1)
    return np.stack([x, y], 2)


def alive(start: np.ndarray, end: np.ndarray, until: float) -> tuple[np.ndarray, np.ndarray]:
    """`POINTS` times in [0, until], and how many of the intervals [start, end) hold each."""
    at = np.linspace(0, until, POINTS)
    return at, np.searchsorted(np.sort(start), at, "right") - np.searchsorted(np.sort(end), at, "right")


def batch(steps: pd.DataFrame, rows: pd.DataFrame, i: int, label: str, until: float) -> Drawing | None:
    """Requests running and waiting over time. None where the engine does not tell."""
    if not told(steps, "running"):
        return None
    edges, running = over_time(steps, rows, "running", until)
    waiting = over_time(steps, rows, "waiting", until)[1] if told(steps, "waiting") else np.zeros(POINTS)

    def paint(axes: Axes) -> None:
        axes.stairs(running, edges, fill=True, color=colour(i), alpha=0.3, linewidth=0)
        axes.stairs(running, edges, baseline=None, color=colour(i), linewidth=1.6)
        axes.stairs(waiting, edges, baseline=None, color=MUTED, linestyle="dashed", linewidth=1.4)
        axes.set_xlim(0, until)
        axes.set_ylim(0, 1.1 * max(running.max(), waiting.max(), 1))

    most = {name: int(steps[name].max()) if told(steps, name) else 0 for name in ("running", "waiting")}
    means = {"running": float(running.mean()), "waiting": float(waiting.mean())}
    table = [(name, number(means[name]), number(most[name])) for name in means]
    return draw(
        f"batch-{i}",
        f"Batch: {label}",
        f"{len(steps)} steps of {number(float(steps['tokens'].mean()))} tokens on average; over the window, its pauses too, "
        + ", ".join(f"{mean} requests {name} on average, {top} at most" for name, mean, top in table)
        + ".",
        paint,
        x="s from the start of the window",
        y="requests",
        keys=[
            Line2D([], [], color=colour(i), label="running"),
            Line2D([], [], color=MUTED, linestyle="dashed", label="waiting"),
        ],
        table=Table(("requests", "mean over the window", "most"), table, f"Batch of {label}, one window"),
    )


def occupancy(steps: pd.DataFrame, rows: pd.DataFrame, i: int, label: str, until: float) -> Drawing | None:
    """The share of pages in use over time, and of those that hold no token yet. None where the engine does not tell."""
    if not told(steps, "pages_used") or not told(steps, "pages_total"):
        return None
    pages = max(int(steps["pages_total"].max()), 1)
    edges, used = over_time(steps, rows, "pages_used", until)
    empty = over_time(steps, rows, "pages_empty", until)[1] if told(steps, "pages_empty") else np.zeros(POINTS)
    used, empty = 100 * used / pages, 100 * empty / pages

    def paint(axes: Axes) -> None:
        axes.stairs(used - empty, edges, fill=True, color=colour(i), alpha=0.55, linewidth=0)
        axes.stairs(used, edges, baseline=used - empty, fill=True, color=colour(i), alpha=0.2, linewidth=0)
        axes.stairs(used, edges, baseline=None, color=colour(i), linewidth=1.6)
        axes.set_xlim(0, until)
        axes.set_ylim(0, min(102.0, 1.15 * used.max()) or 1.0)

    top = [float(steps[name].max()) / pages if told(steps, name) else 0.0 for name in ("pages_used", "pages_empty")]
    table = [
        (name, f"{values.mean():.1f}%", f"{most:.1%}")
        for name, values, most in zip(("in use", "held, still empty"), (used, empty), top, strict=True)
    ]
    return draw(
        f"pages-{i}",
        f"Pages in use: {label}",
        f"Of {pages:,} pages {table[0][1]} are in use on average over the window, its pauses too, and {table[0][2]} at most; "
        f"{table[1][1]} are held and still empty.",
        paint,
        x="s from the start of the window",
        y=f"% of {pages:,} pages",
        keys=[
            Line2D([], [], color=colour(i), alpha=0.55, linewidth=6, label="with tokens"),
            Line2D([], [], color=colour(i), alpha=0.2, linewidth=6, label="held, still empty"),
        ],
        table=Table(("pages", "mean over the window", "most"), table, f"Pages of {label}, one window"),
    )


def over_time(steps: pd.DataFrame, rows: pd.DataFrame, column: str, until: float) -> tuple[np.ndarray, np.ndarray]:
    """Edges of `POINTS` equal spans of [0, until], and the mean of a step's figure over the time in each.

    A step's figure holds from when it had the device until the next one has it. While no request of `rows` is in flight, from
    when it was sent to its last token, and no step either, the figure is 0.
    """
    landed = steps["landed"].to_numpy(float)
    begin = np.maximum(steps["submitted"].to_numpy(float), np.concatenate([[-np.inf], landed[:-1]]))
    ran = rows[rows["times"].map(len) > 0]
    starts = np.sort(np.concatenate([begin, ran["sent"].to_numpy(float)]))
    ends = np.sort(np.concatenate([landed, np.array([times[-1] for times in ran["times"]], float)]))
    moments = np.unique(np.concatenate([starts, ends]))
    busy = np.searchsorted(starts, moments, "right") > np.searchsorted(ends, moments, "right")
    last = np.searchsorted(begin, moments, "right") - 1
    values = np.where(busy & (last >= 0), steps[column].to_numpy(float)[last], 0.0)
    areas = np.concatenate([[0.0], np.cumsum(values[:-1] * np.diff(moments))])
    edges = np.linspace(0, until, POINTS + 1)
    return edges, np.diff(np.interp(edges, moments, areas)) * POINTS / until


def told(frame: pd.DataFrame, column: str, every: bool = True) -> bool:
    """Whether each row tells it, or any."""
    return column in frame and len(frame) > 0 and bool(frame[column].notna().agg("all" if every else "any"))
