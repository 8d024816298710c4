"""What several engines tell of themselves, as if they were one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

GAUGES: Mapping[str, Callable[[Sequence[Any]], Any]] = {
    "num_running": sum,
    "num_waiting": sum,
    "kv_pool_bytes": sum,
    "kv_cache_usage": fmean,
    "rank_bytes": max,
}
"""Entries of `stats` that tell what is, and what those of several come to; all others count since the start, and are added."""


def totals(told: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all entries that any of them tells; for those that do not tell one it is 0, or no part of a mean or a maximum."""
    values: dict[str, list[Any]] = {}
    for stats in told:
        for name, value in stats.items():
            values.setdefault(name, []).append(value)
    return {name: GAUGES.get(name, sum)(several) for name, several in values.items()}
