"""The page in a real headless browser: light and dark, on a phone and on a desk. Skipped where there is no Chromium."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from experiments.report.writer import write_report
from tests.browser import Browser, Tab, browse
from tests.synthetic_run import HOSTILE, write_run, write_sweep

PHONE, DESK = 360, 1280
OVERLAPS = """
[...document.querySelectorAll("svg")].flatMap(svg => {
  const box = element => element.getBoundingClientRect(), paper = box(svg);
  const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, box(t)]).filter(([, r]) => r.width > 0);
  const apart = (a, b) => a.right <= b.left + 1 || b.right <= a.left + 1 || a.bottom <= b.top + 1 || b.bottom <= a.top + 1;
  const wide = r => r.left >= paper.left - 1 && r.right <= paper.right + 1;
  const inside = r => wide(r) && r.top >= paper.top - 1 && r.bottom <= paper.bottom + 1;
  return texts.flatMap(([one, a], i) => [
    ...texts.slice(i + 1).filter(([, b]) => !apart(a, b)).map(([other]) => one + " | " + other),
    ...(inside(a) ? [] : [one + " leaves its figure"]),
  ]);
})
"""
"""Pairs of labels of a figure that lie on each other, and labels that are cut off."""
OPEN = "document.querySelectorAll('details').forEach(folded => { folded.open = true })"
SCROLLED = """
[...document.querySelectorAll(".scroll")].map(box => {
  const [name, last] = [box.querySelector("tbody th"), box.querySelector("tbody tr").lastElementChild];
  box.scrollLeft = box.scrollWidth;
  const [outer, first, end] = [box, name, last].map(element => element.getBoundingClientRect());
  box.scrollLeft = 0;
  const named = name === last || Math.abs(first.left - outer.left) <= 1;
  return box.scrollWidth > box.clientWidth ? [outer.right, end.right - outer.right, named] : [outer.right, 0, true];
})
"""
"""Of each table, scrolled to its end where it is wider than its box: where the box ends, how far beyond that the last column
does, and whether the names of rows are still there."""
JUDGED = """
[...document.querySelectorAll(".scroll")].flatMap(box => {
  const at = [...box.querySelectorAll("thead th")].findIndex(heading => heading.textContent === "verdict");
  const cells = at < 0 ? [] : [...box.querySelectorAll("tr")].map(row => row.children[at]);
  return cells.map(cell => cell.getBoundingClientRect().right - box.getBoundingClientRect().right);
})
"""
"""Of each cell of a column of verdicts: how far beyond the box of its table it ends, as the page opens."""
DIM = """
(() => {
  const button = document.querySelector("[data-engine='1']"), mark = document.querySelector(".engine-1");
  const before = getComputedStyle(mark).opacity;
  button.click();
  const after = [getComputedStyle(mark).opacity, button.getAttribute("aria-pressed")];
  button.click();
  return [before, ...after, getComputedStyle(mark).opacity];
})()
"""


@dataclass(frozen=True)
class Seen:
    """What one reader sees of one page."""

    page: str
    width: int
    dark: bool
    complaints: list[dict[str, Any]]
    requests: list[str]
    scroll_width: int
    figures: list[float]
    """Their widths."""
    overlaps: list[str]
    colours: tuple[str, str, str]
    """Of the paper, of the text, and of a label in a figure."""
    dimmed: list[str]
    injected: int
    tables: list[tuple[float, float, bool]]
    """As `SCROLLED` has them."""
    judged: list[float]
    """As `JUDGED` has them."""


def look(browser: Browser, file: Path, width: int, dark: bool) -> Seen:
    tab = Tab(browser, file.as_uri(), width, dark)
    colour = "getComputedStyle(document.querySelector('{}')).{}"
    tab.evaluate(OPEN)
    return Seen(
        page=file.parent.name,
        width=width,
        dark=dark,
        scroll_width=tab.evaluate("document.documentElement.scrollWidth"),
        figures=tab.evaluate("[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().width)"),
        overlaps=tab.evaluate(OVERLAPS),
        colours=tuple(
            tab.evaluate(colour.format(*where))
            for where in (("body", "backgroundColor"), ("body", "color"), ("svg text", "fill"))
        ),
        dimmed=tab.evaluate(DIM),
        injected=tab.evaluate("document.querySelectorAll('img, iframe, object, link[rel=stylesheet]').length"),
        tables=tab.evaluate(SCROLLED),
        judged=tab.evaluate(JUDGED),
        complaints=tab.complaints(),
        requests=tab.requests(),
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    """Two pages as four readers see them. What fails for reasons of the browser is tried again, in a new one."""
    root = tmp_path_factory.mktemp("pages")
    long = "openai_http-a-server-with-a-long-name"
    folders = [
        write_run(root / "run", ("jax", long, HOSTILE), blocks=3, count=12, output_len=6),
        write_sweep(root / "sweep", sizes=(1, 4, 16, 64)),
    ]
    write_run(root / "sweep" / "jobs" / "009-of-two-engines", ("jax", "torch"), blocks=3, count=12, output_len=6)
    files = [write_report(folder) for folder in folders]
    readers = list(product(files, (PHONE, DESK), (False, True)))
    return browse(lambda browser: [look(browser, *reader) for reader in readers])


def test_the_page_loads_without_a_word_in_the_console(seen: list[Seen]) -> None:
    assert len(seen) == 8
    for one in seen:
        assert one.complaints == [], one


def test_nothing_is_fetched_and_nothing_from_outside_is_markup(seen: list[Seen]) -> None:
    for one in seen:
        assert len(one.requests) == 1 and one.requests[0].startswith("file:") and one.injected == 0, one


def test_nothing_is_wider_than_the_screen(seen: list[Seen]) -> None:
    for one in seen:
        assert one.scroll_width <= one.width, (one.page, one.width, one.scroll_width)
        assert len(one.figures) >= 4 and all(200 < figure < one.width for figure in one.figures), one.figures


def test_a_wide_table_scrolls_in_its_own_box_and_on_a_phone_keeps_the_names_of_its_rows(seen: list[Seen]) -> None:
    for one in seen:
        assert len(one.tables) >= 3, one
        for right, beyond, named in one.tables:
            assert right <= one.width and abs(beyond) <= 1 and (named or one.width == DESK), (one.page, one.width, one.tables)


def test_a_verdict_is_seen_without_scrolling_a_table(seen: list[Seen]) -> None:
    for one in seen:
        assert len(one.judged) >= 3 and max(one.judged) <= 0, (one.page, one.width, one.judged)


def test_no_labels_lie_on_each_other_or_are_cut_off(seen: list[Seen]) -> None:
    for one in seen:
        assert one.overlaps == [], (one.page, one.width, one.dark, one.overlaps)


def test_light_and_dark_are_followed_by_page_and_figures(seen: list[Seen]) -> None:
    for one in seen:
        paper, ink, label = (brightness(colour) for colour in one.colours)
        assert (paper < 60 and ink > 200 and label > 140) if one.dark else (paper > 230 and ink < 60 and label < 120), (
            one.colours
        )


def test_an_engine_can_be_dimmed_and_shown_again(seen: list[Seen]) -> None:
    for one in seen:
        assert one.dimmed == ["1", "0.08", "false", "1"]


def brightness(colour: str) -> float:
    """Of `rgb(…)`, in [0, 255]."""
    channels = [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    return sum(channels) / 3
