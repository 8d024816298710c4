"""Read the requests and steps of the blocks that the figures of a run count, and prepare them for a report.

Every reader of a run goes through `counted_rows` and `counted_steps`. `requests.jsonl` and `steps.jsonl` also have the dropped
blocks and, if a run was interrupted, the windows of a block that did not end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.runs.directory import ROWS
from experiments.runs.records import GIVEN, NEEDED, STEPS, read_rows, read_steps
from experiments.runs.results import RunFiles


def counted_rows(run: RunFiles) -> pd.DataFrame:
    """Return a row for each request of the counted blocks. Raise `ConfigError` if the file is missing or damaged."""
    return counted(read_rows(run.directory), run)


def counted_steps(run: RunFiles) -> pd.DataFrame:
    """Return a row for each step of the counted blocks. Raise `ConfigError` if the file is missing or damaged."""
    return counted(read_steps(run.directory), run)


def counted(frame: pd.DataFrame, run: RunFiles) -> pd.DataFrame:
    """Return the rows of the whole blocks that are not dropped."""
    kept = ~frame["block"].isin(run.dropped)
    return (frame[kept & (frame["block"] < run.blocks)] if run.partial else frame[kept]).reset_index(drop=True)


def rows_of(run: RunFiles) -> pd.DataFrame:
    """Return `counted_rows` with the column `ok`, or no rows if the run wrote none."""
    return with_ok(counted_rows(run) if has(run.directory / ROWS) else pd.DataFrame(columns=NEEDED))


def steps_of(run: RunFiles) -> pd.DataFrame:
    """Return `counted_steps`, or no rows if the run wrote none."""
    return counted_steps(run) if has(run.directory / STEPS) else pd.DataFrame(columns=["engine", "block"])


def with_ok(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the column `ok`: whether a request returned all of its tokens."""
    whole = [
        len(tokens) == wanted and len(times) > 0 for tokens, wanted, times in zip(*(rows[name] for name in GIVEN), strict=True)
    ]
    return rows.assign(ok=rows["error"].isna().to_numpy(bool) & np.array(whole, bool))


def has(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def window_of(frame: pd.DataFrame, label: str | None) -> pd.DataFrame:
    """Return the first counted window of an engine, or of each engine."""
    frame = frame if label is None else frame[frame["engine"] == label]
    return frame[frame["block"] == frame["block"].min()]


def block_points(rows: pd.DataFrame, engines: Sequence[str]) -> dict[str, tuple[list[float], list[float]]]:
    """Engine → output throughput and median end-to-end latency of each block."""
    points: dict[str, tuple[list[float], list[float]]] = {label: ([], []) for label in engines}
    for (label, _), block in rows[rows["ok"].astype(bool)].groupby(["engine", "block"], sort=True):
        ends = np.array([times[-1] for times in block["times"]])
        if label in points and ends.max() > 0:
            points[label][0].append(sum(map(len, block["tokens"])) / ends.max())
            points[label][1].append(float(np.median(ends - block["scheduled"].to_numpy(float))) * 1e3)
    return points
