"""Tables, page maps, steps and sources that show themselves in a notebook, and read well as plain text."""

from __future__ import annotations

import difflib
import inspect
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from string import ascii_lowercase
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from common.config import expect
from common.engine import Engine
from common.request import Request, Status
from experiments.console import number

STATES = {"waiting": "#dddddd", "prompt": "#2f6db3", "decode": "#9cc9f0", "preempted": "#e0872f"}
"""What a request does in a step, and its colour."""
PALETTE = ("#9cc9f0", "#f5c78e", "#a9d9a0", "#f0a8b4", "#c9b6e8", "#e6dd8a", "#9fdcd6", "#d3bfa9")
PAGES_A_LINE = 32
DPI = 72
"""Of figures: a notebook holds them as they are."""
NULL, FREE, CACHED, SHARED = "×", "·", "+", "#"


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A title, sentences, and a table whose first column names its rows."""

    title: str
    sentences: tuple[str, ...] = ()
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def _repr_html_(self) -> str:
        def line(tag: str, texts: Sequence[str]) -> str:
            sides = ("left", *["right"] * (len(texts) - 1))
            cells = (
                f'<{tag} style="text-align:{side}">{escape(text)}</{tag}>' for text, side in zip(texts, sides, strict=True)
            )
            return f"<tr>{''.join(cells)}</tr>"

        said = "".join(f"<br>{escape(sentence)}" for sentence in self.sentences)
        body = "".join(line("td", row) for row in self.rows)
        return f"<p><b>{escape(self.title)}</b>{said}</p><table>{line('th', self.header)}{body}</table>"

    def _repr_markdown_(self) -> str:
        rule = ("---", *["---:"] * (len(self.header) - 1))
        table = [
            "| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in (self.header, rule, *self.rows)
        ]
        return "\n".join((f"**{self.title}**", "", *(f"{sentence}  " for sentence in self.sentences), "", *table))

    def __repr__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        sides = ("<", *[">"] * (len(widths) - 1))
        lines = (
            "  ".join(f"{text:{side}{width}}" for text, side, width in zip(line, sides, widths, strict=True)).rstrip()
            for line in (self.header, *self.rows)
        )
        return "\n".join((self.title, *self.sentences, *lines))


def counters(stats: Mapping[str, Any]) -> Shown:
    """An engine's statistics, `engine.stats()`, less the seconds: what it did, not how fast."""
    rows = [(name, number(value)) for name, value in stats.items() if not name.endswith("_seconds")]
    return Shown(title="Engine", header=("", "since its start"), rows=tuple(rows))


@dataclass(frozen=True, kw_only=True)
class PageMap:
    """Who has which page of a pool at one moment."""

    block_size: int
    marks: str
    """Of each page: a letter for the request that holds it, `#` where several do, `+` where nobody does but its content is
    kept for a later request with the same prefix, `·` where it is free, `×` for the null page."""
    tables: tuple[tuple[str, str, int, tuple[int, ...]], ...]
    """Of each running request: its letter, its id, its tokens that have K and V, its pages in order."""

    @property
    def title(self) -> str:
        held = sum(mark not in (NULL, FREE, CACHED) for mark in self.marks)
        cached, free = self.marks.count(CACHED), self.marks.count(FREE)
        size = f"{len(self.marks)} pages of {self.block_size} tokens"
        return f"{size}: {held} held, {cached} kept for their content ({CACHED}), {free} free ({FREE})"

    def _repr_html_(self) -> str:
        colour = {letter: PALETTE[i % len(PALETTE)] for i, (letter, *_) in enumerate(self.tables)}
        colour |= {SHARED: "#8a8a8a", CACHED: "#e8e8e8", FREE: "#ffffff", NULL: "#555555"}
        style = ";color:#111;display:inline-block;width:1.5em;text-align:center;border:1px solid #999;font-family:monospace"
        cells = "".join(
            f'<span title="page {page}" style="background:{colour[mark]}{style}">{mark}</span>'
            for page, mark in enumerate(self.marks)
        )
        lines = "".join(f"<br><code>{escape(line)}</code>" for line in self._lines())
        return f'<div style="max-width:60em"><b>{escape(self.title)}</b><br>{cells}{lines}</div>'

    def __repr__(self) -> str:
        rows = [" ".join(self.marks[at : at + PAGES_A_LINE]) for at in range(0, len(self.marks), PAGES_A_LINE)]
        return "\n".join((self.title, *rows, *self._lines()))

    def _lines(self) -> list[str]:
        return [
            f"{letter}  request {name}: {tokens} tokens in pages {' '.join(map(str, pages))}"
            for letter, name, tokens, pages in self.tables
        ]


def page_map(engine: Engine) -> PageMap:
    """The page tables of the requests that run now, and what the pool does with every other page."""
    pool, running = engine.scheduler.pool, engine.scheduler.running
    letters = [ascii_lowercase[seq.number % 26] for seq in running]
    marks = [NULL, *(FREE if key is None else CACHED for key in pool.keys[1:])]
    for letter, seq in zip(letters, running, strict=True):
        for page in seq.pages:
            marks[page] = letter if pool.refs[page] == 1 else SHARED
    tables = [
        (letter, seq.request.request_id, seq.computed, tuple(seq.pages)) for letter, seq in zip(letters, running, strict=True)
    ]
    return PageMap(block_size=engine.config.block_size, marks="".join(marks), tables=tuple(tables))


def watch(engine: Engine, requests: Sequence[Request], arrivals: Sequence[int] = ()) -> pd.DataFrame:
    """Run `requests` on an idle engine and write down what each does in each step. Request i comes before step arrivals[i];
    without `arrivals` all come before the first.

    A row for each live request and step: `step`, `request`, `state` (of `STATES`), `tokens` that it computes, `pages` that it
    holds, and `held`, the pages that anyone holds. This is the loop of `Engine.step` with its parts laid open.
    """
    expect(not engine.has_work, "watch needs an idle engine; this one has requests of its own.")
    expect(
        len(arrivals) in (0, len(requests)), f"arrivals must be one for each of {len(requests)} requests, got {len(arrivals)}."
    )
    expect(engine.caps.depth == 0, f"watch takes one step at a time; this engine keeps {engine.caps.depth} in flight.")
    coming = deque(sorted(zip(arrivals or [0] * len(requests), requests, strict=True), key=lambda pair: pair[0]))
    scheduler, rows, now = engine.scheduler, [], 0
    while coming or scheduler.live:
        while coming and coming[0][0] <= now:
            engine.add(coming.popleft()[1])
        step = scheduler.schedule()
        counts = dict(zip(map(id, step.seqs), np.diff(step.batch.query_starts).tolist(), strict=True)) if step else {}
        held = scheduler.pool.num_pages - 1 - scheduler.pool.num_free
        for seq in scheduler.live.values():
            tokens = counts.get(id(seq), 0)
            busy = "decode" if tokens == 1 and seq.output else "prompt"
            state = "preempted" if seq.status is Status.PREEMPTED else busy if tokens else "waiting"
            rows.append((now, seq.request.request_id, state, tokens, len(seq.pages), held))
        if step:
            scheduler.update(step, engine.runner.submit(step.batch).result(), perf_counter())
        now += 1
    return pd.DataFrame(rows, columns=["step", "request", "state", "tokens", "pages", "held"])


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
    """Output throughput of each engine, a dot for each block, and how its TTFT and ITL are distributed (shares of requests, and
    of tokens, at or below x). `requests` has the columns `engine`, `sent` and `times`, in seconds."""
    figure, (speed, first, between) = pyplot.subplots(1, 3, figsize=(10, 2.8), dpi=DPI, layout="constrained")
    pyplot.close(figure)
    for place, (label, values) in enumerate(blocks.items()):
        colour = f"C{place}"
        known = [value for value in values if value is not None]
        speed.plot(np.full(len(known), place), known, "o", color=colour, alpha=0.6)
        mine = requests[requests["engine"] == label]
        done = [(sent, np.array(times)) for sent, times in zip(mine["sent"], mine["times"], strict=True) if len(times)]
        between_ms = [1e3 * gap for _, times in done for gap in np.diff(times)]
        for axes, samples in ((first, [1e3 * (times[0] - sent) for sent, times in done]), (between, between_ms)):
            if len(samples):
                axes.ecdf(samples, color=colour, label=label)
    speed.set(xticks=range(len(blocks)), xticklabels=blocks, xlim=(-0.6, len(blocks) - 0.4), ylim=(0, None))
    speed.set_title("output tokens/s, by block", fontsize="medium")
    first.set_title("time to first token, ms", fontsize="medium")
    between.set_title("time between tokens, ms", fontsize="medium")
    if first.lines:
        first.legend(frameon=False, fontsize="small")
    return figure


@dataclass(frozen=True)
class Beside:
    """Two sources next to each other; lines that both have are dimmed."""

    left: tuple[str, ...]
    right: tuple[str, ...]

    def pairs(self) -> list[tuple[str, str, bool]]:
        """Lines opposite each other, and whether they are the same."""
        out: list[tuple[str, str, bool]] = []
        for kind, a, b, c, d in difflib.SequenceMatcher(None, self.left, self.right, autojunk=False).get_opcodes():
            left, right = self.left[a:b], self.right[c:d]
            height = max(len(left), len(right))
            both = zip((*left, *[""] * (height - len(left))), (*right, *[""] * (height - len(right))), strict=True)
            out += [(x, y, kind == "equal") for x, y in both]
        return out

    def _repr_html_(self) -> str:
        pre = "margin:0;background:none;white-space:pre-wrap;font-family:monospace"
        cell = f'<td style="text-align:left;padding:0 6px"><pre style="{pre}">{{}}</pre></td>'
        rows = "".join(
            f"<tr{' style=opacity:.5' if same else ''}>{cell.format(escape(x))}{cell.format(escape(y))}</tr>"
            for x, y, same in self.pairs()
        )
        return f'<table style="table-layout:fixed;width:100%;font-size:85%">{rows}</table>'

    def __repr__(self) -> str:
        width = max(map(len, self.left), default=0)
        return "\n".join(f"{x:<{width}} {' ' if same else '|'} {y}".rstrip() for x, y, same in self.pairs())


def beside(left: Any, right: Any) -> Beside:
    """The sources of two functions, classes or modules next to each other."""
    return Beside(*(tuple(inspect.getsource(thing).rstrip().splitlines()) for thing in (left, right)))
