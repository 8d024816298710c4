"""Show a table with a title and sentences above it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from experiments.display.formatting import number


@dataclass(frozen=True, kw_only=True)
class DisplayTable:
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


def counters(stats: Mapping[str, Any]) -> DisplayTable:
    """An engine's statistics, `engine.stats()`, less the seconds: what it did, not how fast."""
    rows = [(name, number(value)) for name, value in stats.items() if not name.endswith("_seconds")]
    return DisplayTable(title="Engine", header=("", "since its start"), rows=tuple(rows))
