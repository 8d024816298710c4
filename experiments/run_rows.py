"""What a report reads of a run beside its results: requests and steps, and what is drawn of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.records import GIVEN, NEEDED, read_rows, read_steps


def rows_of(directory: Path) -> pd.DataFrame:
    """The requests, with `ok` beside them; no rows where the run wrote none."""
    rows = read_rows(directory) if has(directory / "requests.jsonl") else pd.DataFrame(columns=NEEDED)
    whole = [
        len(tokens) == wanted and len(times) > 0 for tokens, wanted, times in zip(*(rows[name] for name in GIVEN), strict=True)
    ]
    return rows.assign(ok=rows["error"].isna().to_numpy(bool) & np.array(whole, bool))


def steps_of(directory: Path) -> pd.DataFrame:
    return read_steps(directory) if has(directory / "steps.jsonl") else pd.DataFrame(columns=["engine", "block"])


def has(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def window_of(frame: pd.DataFrame, label: str | None) -> pd.DataFrame:
    """The first window of an engine, or of each."""
    frame = frame if label is None else frame[frame["engine"] == label]
    return frame[frame["block"] == 0]


def block_points(rows: pd.DataFrame, engines: Sequence[str]) -> dict[str, tuple[list[float], list[float]]]:
    """Engine → output throughput and median end-to-end latency of each block."""
    points: dict[str, tuple[list[float], list[float]]] = {label: ([], []) for label in engines}
    for (label, _), block in rows[rows["ok"].astype(bool)].groupby(["engine", "block"], sort=True):
        ends = np.array([times[-1] for times in block["times"]])
        if label in points and ends.max() > 0:
            points[label][0].append(sum(map(len, block["tokens"])) / ends.max())
            points[label][1].append(float(np.median(ends - block["scheduled"].to_numpy(float))) * 1e3)
    return points
