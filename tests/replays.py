"""A trace run once more, to see whether the same comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from common.batch import Batch
from common.interface import ModelRunner, Result
from common.schedule.trace import retrace


def replay(path: Path, runner: ModelRunner) -> Iterator[tuple[int, Batch, Result, Result]]:
    """Step, batch, recorded result and new result of each step of a trace, as `retrace` repeats it on a loaded `runner`."""
    for step, batch, recorded, pending in retrace(path, runner, lambda _, batch: runner.submit(batch)):
        yield step, batch, recorded, pending.result()
