"""Show the pages of a KV pool at one moment, and the request that holds each."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from string import ascii_lowercase

from common.engine import Engine

PALETTE = ("#9cc9f0", "#f5c78e", "#a9d9a0", "#f0a8b4", "#c9b6e8", "#e6dd8a", "#9fdcd6", "#d3bfa9")
PAGES_A_LINE = 32
NULL, FREE, CACHED, SHARED = "×", "·", "+", "#"


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
