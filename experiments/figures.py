"""The figures of one run. Each takes numbers and gives a drawing whose size is bounded, however many requests there were."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.typing import FillStyleType

from experiments.canvas import GRID, INK, MUTED, PAPER, colour, dash, draw, key, logarithmic, mark, marker, shorten, stretch
from experiments.console import number
from experiments.page import Drawing, Table

POINTS = 300
"""Of a curve at most."""
BARS = 80
"""Requests drawn one by one at most; more are drawn as counts over time."""
EQUIVALENT = 0.05
"""Ratios within 1 ± this are called equivalent."""

Samples = Mapping[str, np.ndarray]
"""Label → values; in the order of the engines, whose position gives the colour."""


def curves(axes: Axes, samples: Samples) -> None:
    """Empirical distributions: the share of samples at or below x, at no more than `POINTS` places."""
    for number_, values in enumerate(samples.values()):
        if not len(values):
            continue
        share = np.linspace(0, 1, min(len(values), POINTS) + 1)
        at = np.quantile(values, share[1:], method="inverted_cdf")
        axes.step([at[0], *at], share, where="post", color=colour(number_), linestyle=dash(number_), gid=mark(number_))
    if stretch(np.concatenate(list(samples.values()))):
        logarithmic(axes, "x")
    axes.set_ylim(0, 1.02)


def distribution(name: str, title: str, samples: Samples) -> Drawing | None:
    """Latencies in ms by engine, as empirical distributions. None without a sample."""
    if not any(len(values) for values in samples.values()):
        return None
    rows = [
        (label, f"{len(values):,}", *(number(float(np.quantile(values, q))) for q in (0.5, 0.9)), percentile_99(values))
        for label, values in samples.items()
        if len(values)
    ]
    said = "; ".join(f"{row[0]}: half within {row[2]} ms, nine tenths within {row[3]} ms" for row in rows)
    return draw(
        name,
        title,
        f"Share of samples at or below each latency, one curve for each engine. {said}.",
        lambda axes: curves(axes, samples),
        x="ms",
        y="share of samples at or below",
        keys=[key(i, label) for i, label in enumerate(samples)],
        table=Table(("engine", "samples", "p50, ms", "p90, ms", "p99, ms"), rows, title),
    )


def percentile_99(values: np.ndarray) -> str:
    """With fewer than 100 samples it would be the largest of them under another name."""
    return number(float(np.quantile(values, 0.99))) if len(values) >= 100 else "too few"


def ratio(comparisons: Mapping[str, Mapping[str, Any]], engines: Sequence[str]) -> Drawing | None:
    """Each block's ratio of output throughput to the first engine's, with the interval of the whole. None without blocks."""
    shown = {label: found for label, found in comparisons.items() if found.get("block_ratios")}
    if not shown:
        return None
    blocks = max(len(found["block_ratios"]) for found in shown.values())

    def paint(axes: Axes) -> None:
        axes.axhspan(1 - EQUIVALENT, 1 + EQUIVALENT, color=GRID, alpha=0.6, linewidth=0)
        axes.axhline(1, color=MUTED, linewidth=1)
        for place, (label, found) in enumerate(shown.items()):
            i = engines.index(label)
            ratios = np.array(found["block_ratios"], float)
            x = np.arange(1, len(ratios) + 1)
            axes.plot(x, ratios, marker(i), color=colour(i), markersize=5.5, gid=mark(i), clip_on=False)
            end = blocks + 1.2 + 0.5 * place
            low, mid, high = (found.get(name) for name in ("low", "ratio", "high"))
            if low is not None and high is not None:
                axes.vlines(end, low, high, color=colour(i), linewidth=2.5, gid=mark(i))
            if mid is not None:
                axes.plot([end], [mid], marker(i), color=PAPER, markeredgecolor=colour(i), markersize=8, gid=mark(i))
        axes.set_xlim(0.4, blocks + 1.7 + 0.5 * len(shown))
        step = max(1, -(-blocks // 10))
        ticks = list(range(1, blocks + 1, step))
        axes.set_xticks([*ticks, blocks + 1.2 + 0.25 * (len(shown) - 1)], [*map(str, ticks), "all"])

    rows = [
        (
            label,
            *(number(found.get(name)) for name in ("ratio", "low", "high")),
            *p_and_verdict(found),
            str(len(found["block_ratios"])),
        )
        for label, found in shown.items()
    ]
    said = "; ".join(
        f"{row[0]} {row[1]}, " + ("no interval" if found.get("low") is None else f"interval {row[2]} to {row[3]}")
        for row, found in zip(rows, shown.values(), strict=True)
    )
    against = next(iter(shown.values())).get("against", engines[0])
    return draw(
        "ratio",
        f"Output throughput over {shorten(str(against))}'s",
        f"One mark for each block, and at the right the ratio of all: {said}.",
        paint,
        x="block",
        y=f"ratio; the band is 1 ± {EQUIVALENT:.0%}",
        keys=[key(engines.index(label), label, line=False) for label in shown],
        table=Table(("engine", "ratio", "low", "high", "p", "verdict", "blocks"), rows, f"Ratio to {against}"),
    )


def p_and_verdict(found: Mapping[str, Any]) -> tuple[str, str]:
    return number(found.get("p_value")), str(found.get("verdict") or "–")


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
        keys=[key(i, label, line=False) for i, label in enumerate(shown)],
        table=Table(("engine", each, x, y), rows[: 4 * BARS], title),
    )


def clean(xs: Sequence[float], ys: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of which both are numbers."""
    a, b = np.array(xs, float), np.array(ys, float)
    kept = np.isfinite(a) & np.isfinite(b)
    return a[kept], b[kept]


def roofline(figures: Mapping[str, Mapping[str, Any]], dtype: str) -> Drawing | None:
    """What each engine reached, under what the machine can do. None where that was not measured.

    Over a time t with b bytes and f FLOP: mbu = b / (t · bandwidth) and mfu = f / (t · peak), so the point is at an intensity
    f / b = mfu · peak / (mbu · bandwidth) and a speed mfu · peak.
    """
    limits = next((found["limits"] for found in figures.values() if found.get("limits")), None)
    if not limits:
        return None
    best = lambda name: max(limits[when].get(name) or 0.0 for when in ("before", "after"))  # noqa: E731
    bandwidth, peak = best("read_bytes_per_s"), best(f"{dtype}_flops_per_s")
    if not bandwidth or not peak:
        return None
    found: list[tuple[int, str, str, float, float]] = []
    for i, (label, mine) in enumerate(figures.items()):
        for phase, prefix in (("whole run", ""), ("decode steps", "decode_"), ("steps with prompts", "prefill_")):
            mbu, mfu = mine.get(f"{prefix}mbu"), mine.get(f"{prefix}mfu")
            if mbu and mfu:
                found.append((i, label, phase, mfu * peak / (mbu * bandwidth), mfu * peak))
    if not found:
        return None
    knee = peak / bandwidth
    fills: dict[str, FillStyleType] = {"whole run": "full", "decode steps": "none", "steps with prompts": "top"}

    def paint(axes: Axes) -> None:
        at = np.array([*(point[3] for point in found), knee])
        x = np.geomspace(at.min() / 4, at.max() * 8, 60)
        axes.plot(x, np.minimum(x * bandwidth, peak), color=INK, linewidth=1.6)
        axes.axvline(knee, color=GRID, linewidth=1)
        for i, _, phase, intensity, speed in found:
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

    rows = [
        (label, phase, number(intensity), number(speed / 1e9), f"{speed / min(intensity * bandwidth, peak):.1%}")
        for _, label, phase, intensity, speed in found
    ]
    said = "; ".join(f"{row[0]}: {row[3]} GFLOP/s, {row[4]} of the roof" for row in rows if row[1] == "whole run")
    return draw(
        "roofline",
        f"Roofline, {dtype}",
        f"The roof is {number(bandwidth / 1e9)} GB/s up to {number(knee)} FLOP a byte, then {number(peak / 1e9)} GFLOP/s. "
        f"Whole runs: {said}.",
        paint,
        x="FLOP a byte (full: all, hollow: decode steps, half: prompts)",
        y=f"FLOP/s; the slope is {number(bandwidth / 1e9)} GB/s",
        keys=[key(i, label, line=False) for i, label in enumerate(figures)],
        table=Table(("engine", "phase", "FLOP a byte", "GFLOP/s", "of the roof"), rows, "Under the roofline"),
    )


def by_position(
    agreement: Mapping[str, Mapping[str, Any]], engines: Sequence[str], what: str, title: str, y: str
) -> Drawing | None:
    """A figure of the agreement with the first engine at each output position. None where nobody told."""
    lines = {
        label: clean(
            *zip(*((at["position"], at[what]) for at in found["by_position"] if at.get(what) is not None), strict=True)
        )
        for label, found in agreement.items()
        if any(at.get(what) is not None for at in found.get("by_position") or ())
    }
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
        keys=[key(engines.index(label), label) for label in lines],
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


def samples_ms(rows: pd.DataFrame, engines: Sequence[str], what: str) -> Samples:
    """Engine → latencies in ms of the requests that went well. `what` is ttft, tpot, itl or e2el of `experiments.metrics`."""
    found: dict[str, np.ndarray] = {}
    for label in engines:
        mine = rows[(rows["engine"] == label) & rows["ok"]] if len(rows) else rows
        sent = mine["sent"].to_numpy(float) if len(mine) else np.empty(0)
        times = list(mine["times"]) if len(mine) else []
        first, last = (np.array([t[end] for t in times], float) for end in (0, -1))
        counts = np.array([len(t) for t in times])
        if what == "ttft":
            values = first - sent
        elif what == "e2el":
            values = last - sent
        elif what == "tpot":
            values = ((last - first)[counts > 1]) / (counts[counts > 1] - 1)
        else:
            values = np.concatenate([np.empty(0), *(np.diff(t) for t in times)])
        found[label] = values * 1e3
    return found
