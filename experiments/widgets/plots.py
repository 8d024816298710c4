"""Plot watched steps and runs in a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.widgets.batch import STATES

DPI = 72
"""Of figures: a notebook holds them as they are."""


def plot_batch(watched: pd.DataFrame, num_pages: int | None = None, title: str = "") -> Figure:
    """What `watch` saw: a row for each request, a column for each step, below it the pages that are held. `num_pages` of the
    pool, the null page included, draws its limit."""
    names = list(dict.fromkeys(watched["request"]))
    steps = int(watched["step"].max()) + 1
    grid = np.full((len(names), steps), np.nan)
    grid[watched["request"].map(names.index), watched["step"]] = watched["state"].map(list(STATES).index)
    sizes: dict[str, Any] = {"figsize": (9, 1.8 + 0.25 * len(names)), "height_ratios": (max(len(names), 3), 3), "dpi": DPI}
    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, layout="constrained", **sizes)
    pyplot.close(figure)  # it is returned, and would be shown twice
    top.pcolormesh(
        grid, cmap=ListedColormap(list(STATES.values())), vmin=-0.5, vmax=len(STATES) - 0.5, edgecolors="white", lw=0.4
    )
    top.set(yticks=np.arange(len(names)) + 0.5, yticklabels=names, ylabel="request")
    top.set_title(title, loc="right", fontsize="medium")
    top.invert_yaxis()
    top.legend(
        handles=[Patch(color=colour, label=state) for state, colour in STATES.items()], ncols=4, fontsize="small",
        loc="lower left", bbox_to_anchor=(0, 1), frameon=False,
    )  # fmt: skip
    held = watched.groupby("step")["held"].first().reindex(range(steps), fill_value=0)
    bottom.stairs(held, np.arange(steps + 1), fill=True, color=STATES["decode"])
    if num_pages:
        bottom.axhline(num_pages - 1, color=STATES["preempted"], lw=1)
    bottom.set(xlabel="step", ylabel="pages held", ylim=(0, None), xlim=(0, steps))
    return figure


def plot_run(blocks: Mapping[str, Sequence[float | None]], requests: pd.DataFrame) -> Figure:
    """Plot the output throughput of each engine by block, and the distributions of its TTFT and ITL.

    A distribution is the share of requests or tokens at or below x. As in `experiments.metrics.metrics`, TTFT counts from the
    time when a request is due. `requests` has the columns `engine`, `scheduled` and `times`, in seconds.
    """
    figure, (speed, first, between) = pyplot.subplots(1, 3, figsize=(10, 2.8), dpi=DPI, layout="constrained")
    pyplot.close(figure)
    for place, (label, values) in enumerate(blocks.items()):
        colour = f"C{place}"
        known = [value for value in values if value is not None]
        speed.plot(np.full(len(known), place), known, "o", color=colour, alpha=0.6)
        mine = requests[requests["engine"] == label]
        done = [(due, np.array(times)) for due, times in zip(mine["scheduled"], mine["times"], strict=True) if len(times)]
        between_ms = [1e3 * gap for _, times in done for gap in np.diff(times)]
        for axes, samples in ((first, [1e3 * (times[0] - due) for due, times in done]), (between, between_ms)):
            if len(samples):
                axes.ecdf(samples, color=colour, label=label)
    speed.set(xticks=range(len(blocks)), xticklabels=blocks, xlim=(-0.6, len(blocks) - 0.4), ylim=(0, None))
    speed.set_title("output tokens/s, by block", fontsize="medium")
    first.set_title("time to first token, ms", fontsize="medium")
    between.set_title("time between tokens, ms", fontsize="medium")
    if first.lines:
        first.legend(frameon=False, fontsize="small")
    return figure
