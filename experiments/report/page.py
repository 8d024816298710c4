"""Define the content of a report, and write its two forms: one self-contained HTML page, and Markdown for a pull request.

Everything from outside (labels, logs, names of models) is text and is escaped. Only our own drawings are markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

Tone = Literal["good", "bad", "warn", "calm"]


@dataclass(frozen=True)
class Table:
    """Cells as text. The first column names the row; the others are set right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Drawing:
    """A figure, ready for a page and as files."""

    name: str
    """Of its files, without suffix."""
    title: str
    alt: str
    """What is to be seen, in words."""
    svg: str
    """An element whose colours are CSS variables (`experiments.report.charts.canvas`)."""
    png: bytes
    table: Table | None = None
    """The numbers behind it."""

    @property
    def markup(self) -> Markup:
        return Markup(self.svg)


@dataclass(frozen=True)
class Verdict:
    """One finding: a large figure or word, the word for it, and the sentence that carries it."""

    tone: Tone
    value: str
    word: str
    said: str
    command: str = ""
    """What to run to know more."""


@dataclass(frozen=True)
class Notice:
    """Something the reader must know before believing a number; `log` is the end of a log."""

    tone: Tone
    title: str
    text: str
    log: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    intro: str = ""
    drawings: Sequence[Drawing] = ()
    tables: Sequence[Table] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    """Title → text set in a fixed-width font, folded away."""

    @property
    def anchor(self) -> str:
        return "-".join(self.title.lower().split())


@dataclass(frozen=True)
class Page:
    kind: str
    title: str
    facts: Sequence[str]
    """What was run, in a few words each."""
    verdicts: Sequence[Verdict]
    notices: Sequence[Notice]
    summary: Sequence[Table]
    """The tables that Markdown has too."""
    sections: Sequence[Section]
    glossary: Sequence[tuple[str, str, str]]
    """Term, meaning, formula."""
    command: str
    """Runs it again."""
    engines: Sequence[str] = ()
    """Labels, in the order of their colours."""
    traced: bool = False
    """Whether a trace lies beside it."""

    @property
    def drawings(self) -> list[Drawing]:
        return [drawing for section in self.sections for drawing in section.drawings]


def html(page: Page, css: str, colours: Sequence[str]) -> str:
    """The page as one file, which asks nothing of a network. `css` defines the variables of the drawings; `colours[i]` is that
    of engine i."""
    environment = Environment(
        loader=PackageLoader("experiments.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(page=page, css=Markup(css), colours=colours)


def markdown(page: Page) -> str:
    """Verdict, table, what spoils it, and the command."""
    lines = [f"## {plain(page.title)}", "", " · ".join(map(plain, page.facts)), ""]
    for verdict in page.verdicts:
        lines += [f"- **{plain(verdict.value)} · {plain(verdict.word)}**: {plain(verdict.said)}"]
        lines += ["", f"      {verdict.command}", ""] if verdict.command else []
    for table in page.summary:
        lines += ["", *([plain(table.caption), ""] if table.caption else []), *markdown_table(table), ""]
    for notice in page.notices:
        lines += [f"- **{plain(notice.title)}**: {plain(notice.text)}"]
        if notice.log:
            lines += ["", *("      " + line for line in notice.log.splitlines()), ""]  # indented: nothing in it is markup
    return "\n".join([*lines, "", "Run it again:", "", *("    " + line for line in page.command.splitlines()), ""])


def markdown_table(table: Table) -> list[str]:
    row = lambda cells: "| " + " | ".join(map(plain, cells)) + " |"  # noqa: E731
    return [row(table.columns), "| --- |" + " ---: |" * (len(table.columns) - 1), *map(row, table.rows)]


def plain(text: str) -> str:
    """Text on one line that Markdown takes as it is."""
    text = " ".join(text.split())
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, "\\" + sign)
    return text


def known(pairs: Mapping[str, Any]) -> dict[str, Any]:
    """Without what nobody told."""
    return {name: value for name, value in pairs.items() if value not in (None, "", [], {})}
