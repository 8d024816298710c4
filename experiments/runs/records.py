"""Write and read the raw rows of a run: one line of JSON for each request and for each step of each window.

Windows under a profiler are in `profiled/`, so that no figure counts them, and their kernels in `kernels.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from common.config import expect
from common.errors import ConfigError
from common.interface import KernelEvent
from common.step_log import StepRecord
from experiments.load.driver import Row, Window
from experiments.load.profiler import Profile
from experiments.runs.directory import ROWS, write_json, write_whole

STEPS, KERNELS = "steps.jsonl", "kernels.jsonl"
PROFILED = "profiled"
"""The folder for requests and steps of the windows under a profiler."""
GIVEN = ("tokens", "output_len", "times")
NEEDED = ("engine", "block", "request_id", "prompt_len", "scheduled", "sent", "finish", "error", *GIVEN)
"""The keys that the row of each request has."""
STEP_COLUMNS = ("submitted", "landed", "tokens", "prompt_tokens", "num_seqs", "logit_rows", "kv_tokens")
LOAD_COLUMNS = ("running", "waiting", "pages_used", "pages_total", "pages_empty")


def write_run(
    directory: Path, result: Mapping[str, Any], windows: Mapping[str, Sequence[Window]], profiles: Mapping[str, Profile]
) -> None:
    """Write the results and rows of a run. The figures come first, in case the disk is too full for the rows."""
    with kept_rows(directory, windows):
        write_json(directory / "results.json", result)
        write_rows(directory, windows)
        write_steps(directory, windows)
    write_profiles(directory, profiles)


@contextmanager
def kept_rows(directory: Path, windows: Mapping[str, Sequence[Window]]) -> Iterator[None]:
    """Write the rows of the `windows` that have ended if an exception ends the block."""
    try:
        yield
    except BaseException:
        if any(windows.values()):
            write_rows(directory, windows)
            write_steps(directory, windows)
        raise


def write_rows(directory: Path, windows: Mapping[str, Sequence[Window]]) -> None:
    """Write one line for each request of each window: `requests.jsonl`.

    Its keys are `engine`, `block`, and the fields of `Row`. The rows of a dropped block also have `"dropped": true`."""
    write_lines(
        directory / ROWS,
        (
            {"engine": engine, "block": block} | row.record() | ({"dropped": True} if window.dropped else {})
            for engine, blocks in windows.items()
            for block, window in enumerate(blocks)
            for row in window.rows
        ),
    )


def write_steps(directory: Path, windows: Mapping[str, Sequence[Window]]) -> None:
    """Write one line for each step of each window, of the engines that log their steps: `steps.jsonl`.

    The steps of a dropped block also have `"dropped": true`."""
    write_lines(
        directory / STEPS,
        (
            {"engine": engine, "block": block} | step_record(step) | ({"dropped": True} if window.dropped else {})
            for engine, blocks in windows.items()
            for block, window in enumerate(blocks)
            for step in window.steps or ()
        ),
    )


def write_profiles(directory: Path, profiles: Mapping[str, Profile]) -> None:
    """Write the window of each engine under its profiler, and its kernels; nothing without profiles."""
    if not profiles:
        return
    write_kernels(directory, {label: profile.kernels for label, profile in profiles.items()})
    (directory / PROFILED).mkdir()
    windows = {label: [profile.window] for label, profile in profiles.items()}
    write_rows(directory / PROFILED, windows)
    write_steps(directory / PROFILED, windows)


def write_kernels(directory: Path, kernels: Mapping[str, Sequence[KernelEvent]]) -> None:
    """Write one line for each kernel: `kernels.jsonl`. Times count from the start of the window, to the nanosecond."""
    write_lines(
        directory / KERNELS,
        (
            {"engine": engine} | kernel._replace(start=round(kernel.start, 9), duration=round(kernel.duration, 9))._asdict()
            for engine, events in kernels.items()
            for kernel in events
        ),
    )


def step_record(step: StepRecord) -> dict[str, Any]:
    """Return a step in numbers, summed over its sequences."""
    return {
        "submitted": step.submitted,
        "landed": step.landed,
        "tokens": int(step.counts.sum()),
        "prompt_tokens": step.prompt_tokens,
        "num_seqs": len(step.counts),
        "logit_rows": step.logit_rows,
        "kv_tokens": int(step.kv_lengths.sum(dtype="int64")),
    } | {name: getattr(step, name) for name in LOAD_COLUMNS}


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    write_whole(path, (json.dumps(record, separators=(",", ":")) + "\n" for record in records))


def read_rows(directory: Path) -> pd.DataFrame:
    """Read `requests.jsonl` whole: a row for each request, with lists in `times`, `tokens` and `logprobs`.

    Readers of a run call `experiments.report.rows.counted_rows`, which leaves out the dropped blocks.
    Raises `ConfigError` where the file is missing, or a line of it is cut short or no request.
    """
    return read_lines(directory / ROWS, ("engine", "block", *Row.__dataclass_fields__), NEEDED)


def read_steps(directory: Path) -> pd.DataFrame:
    """Read `steps.jsonl` whole: a row for each step; none of an engine without a step log. Raises as `read_rows` does."""
    return read_lines(directory / STEPS, ("engine", "block", *STEP_COLUMNS, *LOAD_COLUMNS))


def read_kernels(directory: Path) -> pd.DataFrame:
    """Read `kernels.jsonl`: a row for each kernel; none of a run without profiles. Raises as `read_rows` does."""
    columns = ("engine", *KernelEvent._fields)
    return read_lines(directory / KERNELS, columns) if (directory / KERNELS).exists() else pd.DataFrame(columns=list(columns))


def read_lines(path: Path, columns: Sequence[str], needed: Collection[str] = ("engine",)) -> pd.DataFrame:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Name the directory of a finished run.") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: expected a JSON object, got {line[:80]!r} ({error}).") from error
        whole = isinstance(record, dict) and record.keys() >= set(needed)
        expect(whole, f"{path}, line {number}: expected a JSON object with {', '.join(needed)}, got {line[:80]!r}.")
        records.append(record)
    return pd.DataFrame.from_records(records, columns=list(columns))
