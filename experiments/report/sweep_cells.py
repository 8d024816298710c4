"""Format the cells of a sweep's table as text, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from experiments.display.formatting import number
from experiments.report.figures_table import figure


def several_codes(table: pd.DataFrame) -> str:
    """Return a message where the jobs of a sweep were computed by different code, else an empty text."""
    if "code" not in table:
        return ""
    jobs = {code: sorted(set(mine["job"])) for code, mine in table.groupby("code")}
    codes = "; ".join(f"{', '.join(map(str, mine))} by code {code}" for code, mine in jobs.items())
    return f"Different code computed the jobs, so their figures do not compare: {codes}." if len(jobs) > 1 else ""


def swept_figure(key: str, row: Mapping[Any, Any]) -> str:
    """A figure of a row of a sweep's table, as that of a run is shown."""
    low, high = (row.get(f"{key}_{end}") for end in ("low", "high"))
    intervals = {} if pd.isna(low) or pd.isna(high) else {key: {"low": low, "high": high}}
    shown = {key: None if pd.isna(row[key]) else row[key], "unsupported": few(row), "latency_intervals": intervals}
    return figure(key, shown)


def status(row: Mapping[Any, Any]) -> str:
    """How a row ended, and whether its figures stand for what they seem to."""
    return f"{row['status']}, contaminated" if isinstance(row.get("contaminated"), str) else str(row["status"])


def few(row: Mapping[Any, Any]) -> set[str]:
    """The percentiles of a row that are of fewer samples than they need."""
    names = row.get("unsupported")
    return set(names.split("; ")) if isinstance(names, str) else set()


def cell(value: object) -> str:
    if pd.isna(value):
        return "–"
    return number(value) if isinstance(value, float) else str(value)
