"""Show the progress of a run on standard error: a bar on a terminal, a line from time to time elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from common.interface import Progress as Callback

LINE_PERIOD_S = 10.0


class ProgressReporter:
    """Says on standard error what is going on: bars on a terminal, a line now and then elsewhere.

    It draws only when told something, so that it takes nothing from an engine that is being timed.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            auto_refresh=False,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_line = 0.0

    def __enter__(self) -> ProgressReporter:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        self._console.print(text, style="dim", highlight=False, markup=False)

    def alarm(self, text: str) -> None:
        self._console.print(text, style="bold red", highlight=False, markup=False)

    def block(self, done: int, disturbed: int, planned: int, label: str, left_s: float) -> None:
        """Report the next window. `disturbed` of the `done` blocks are repeated beyond the `planned` ones. `left_s` is the time
        of the blocks that are left, 0 or less if not known."""
        left = f", about {left_s:.0f} s of blocks left" if left_s > 0 else ""
        repeated = f" ({disturbed} disturbed by other programs)" if disturbed else ""
        planned += disturbed
        text = f"block {done + 1}{f' of {planned}' if done < planned else ''}{repeated}: {label}{left}"
        if self._console.is_terminal:
            self._draw("blocks", done, max(planned, done + 1), text)
        else:
            self.say(text)

    def end_blocks(self, reason: str) -> None:
        if "blocks" in self._tasks:
            self._bars.remove_task(self._tasks.pop("blocks"))
            self._bars.refresh()
        self.say(f"stopped: {reason}")

    @contextlib.contextmanager
    def waiting(self, what: str, period_s: float = LINE_PERIOD_S) -> Iterator[None]:
        """Report every `period_s` seconds how long the block has taken, for work that reports nothing while it compiles.

        Another thread does so, hence not while an engine is timed."""
        ended, start = threading.Event(), time.monotonic()

        def report() -> None:
            while not ended.wait(period_s):
                self.say(f"{what}: {time.monotonic() - start:.0f} s so far")

        thread = threading.Thread(target=report, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def progress(self, label: str) -> Callback:
        """A callback for an engine's long work; where there is no total, there are but words."""

        def report(done: int, total: int, what: str) -> None:
            if not total:
                self.say(f"{label}: {what}")
            elif self._console.is_terminal:
                self._draw(label, done, total, f"{label}: {what}")
            elif done == total or time.monotonic() - self._last_line > LINE_PERIOD_S:
                self._last_line = time.monotonic()
                self.say(f"{label}: {what} ({done}/{total})")

        return report

    def _draw(self, label: str, done: int, total: int, what: str) -> None:
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total)
        self._bars.update(self._tasks[label], description=what, completed=done, total=total)
        if done == total:
            self._bars.remove_task(self._tasks.pop(label))
        self._bars.refresh()
