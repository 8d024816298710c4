"""Draw the distribution of each latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from experiments.display.formatting import number
from experiments.metrics.metrics import latencies
from experiments.report.charts.canvas import POINTS, colour, dash, draw, legend, logarithmic, mark, stretch
from experiments.report.page import Drawing, Table

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
        keys=legend(dict(enumerate(samples))),
        table=Table(("engine", "samples", "p50, ms", "p90, ms", "p99, ms"), rows, title),
    )


def percentile_99(values: np.ndarray) -> str:
    """With fewer than 100 samples it would be the largest of them under another name."""
    return number(float(np.quantile(values, 0.99))) if len(values) >= 100 else "too few"


def samples_ms(rows: pd.DataFrame, engines: Sequence[str]) -> Mapping[str, Samples]:
    """Metric of `experiments.metrics.metrics.latencies` → engine → latencies in ms of the requests that went well."""
    of = lambda label: rows[(rows["engine"] == label) & rows["ok"]] if len(rows) else rows  # noqa: E731
    found = {label: latencies(list(of(label).itertuples())) for label in engines}
    return {what: {label: 1e3 * mine[what] for label, mine in found.items()} for what in latencies([])}
