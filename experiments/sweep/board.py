"""Show the progress of a sweep on standard error: a bar on a terminal, a line for each job elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

REFRESH_S = 1.0
TAKEN = 50
"""Columns of a terminal's line that the bar, the numbers and the time take, with room to spare."""


def told_apart(jobs: Sequence[Sequence[str]]) -> list[str]:
    """A name for each job: those of its overrides that not all have."""
    common = set.intersection(*(set(overrides) for overrides in jobs)) if len(jobs) > 1 else set()
    return [" ".join(word for word in overrides if word not in common) or "as configured" for overrides in jobs]


class Board:
    """What runs, what is done, and how long the rest may take, going by the jobs that ran until now."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self.done = 0
        self._failed = 0
        self._seconds: list[float] = []
        self._drawn = 0.0
        self._console = Console(stderr=True)
        self._bar = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("", total=len(names))

    def __enter__(self) -> Board:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def skipped(self) -> None:
        """The next job is done already."""
        self.done += 1

    def started(self, number: int) -> None:
        self.say(f"job {number + 1} of {len(self._names)}: {self._names[number]}")
        self._draw("")

    def working(self, log: Path) -> None:
        """Call often: it draws now and then, with the last line that the job has written."""
        if self._console.is_terminal and time.monotonic() - self._drawn > REFRESH_S:
            self._draw(last_line(log))

    def ended(self, seconds: float | None, failure: Mapping[str, Any] | None) -> None:
        self._seconds.append(seconds or 0.0)
        self.done += failure is None
        self._failed += failure is not None
        how = f"failed, {failure['kind']}; its log is {failure['log']}" if failure else "ok"
        self.say("; ".join(filter(None, [f"  {how}, {seconds or 0:.1f} s", self._left()])))

    def _left(self) -> str:
        left = len(self._names) - self.done - self._failed
        if not left or not self._seconds:
            return ""
        return f"{left} left, about {duration(left * sum(self._seconds) / len(self._seconds))}"

    def _draw(self, line: str) -> None:
        self._drawn = time.monotonic()
        counts = ", ".join(filter(None, [f"{self._failed} failed" if self._failed else "", self._left()]))
        room = max(0, self._console.width - len(counts) - TAKEN)
        text = f"{counts} [dim]{escape(line[:room])}[/]"
        self._bar.update(self._task, completed=self.done + self._failed, description=text)
        if self._console.is_terminal:
            self._bar.refresh()


def last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 400))
        lines = file.read().decode(errors="replace").splitlines()
    return lines[-1] if lines else ""


def duration(seconds: float) -> str:
    """Rounded for people: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
