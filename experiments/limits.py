"""The limits of this machine: how they are printed, and how two measurements are merged.

They are found in a process of its own, by every way there is (`experiments.probes`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from common.config import Dtype
from common.errors import BackendError
from common.system.hardware import cores, thread_settings
from experiments.console import wide_console
from experiments.metrics import BUSY, LIMITED
from experiments.words import number

READ = "read"
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
"""Dtypes whose matrix product is timed. float16 is judged by them too: see `Limits.best`."""
SAID = (
    (f"{READ}_bytes_per_s", "memory read", "GB/s"),
    *((f"{dtype}_flops_per_s", f"matmul {dtype}", "GFLOP/s") for dtype in DTYPES),
)
"""Of `Limits.summary`: key, name, unit in billions."""
SECONDS = 0.15
"""How long each way is repeated where nothing else is asked."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What this machine's processors can do at most: for each limit the ways that were tried, each at its best."""

    ways: Mapping[str, Mapping[str, float]]
    """`read` → way → bytes/s; `float32` and `bfloat16` → way → FLOP/s of a matrix product in that dtype."""
    threads: int
    cache_bytes: int
    """Last-level cache; 0 if the system does not report it."""
    buffer_bytes: int
    """What was read."""
    notes: tuple[str, ...] = ()
    """What could not be tried, and why."""

    def best(self, limit: str) -> tuple[str, float]:
        """Return the fastest way and its rate.

        Numbers of 16 bits may be widened without loss, so float32 counts for them too.
        """
        ways = dict(self.ways.get(limit, {}))
        if limit in ("bfloat16", "float16"):
            ways |= {f"{way}, float32": value for way, value in self.ways["float32"].items()}
        return max(ways.items(), key=lambda item: item[1])

    @property
    def bandwidth(self) -> float:
        """Bytes of memory that can be read in a second."""
        return self.best(READ)[1]

    def peak(self, dtype: Dtype) -> float:
        """FLOP/s of a matrix product."""
        return self.best(dtype)[1]

    def summary(self) -> dict[str, Any]:
        """The best of each, for a result."""
        best = {limit: self.best(limit) for limit in (READ, *DTYPES)}
        figures = {f"{limit}_{'bytes' if limit == READ else 'flops'}_per_s": value for limit, (_, value) in best.items()}
        return figures | {"by": {limit: way for limit, (way, _) in best.items()}, "notes": list(self.notes)}


def better(one: Limits, other: Limits) -> Limits:
    """The better of two measurements for each way: whatever slowed one of them down was no limit."""
    ways = {
        limit: {way: max(mine.get(way, 0.0), other.ways[limit].get(way, 0.0)) for way in (*mine, *other.ways[limit])}
        for limit, mine in one.ways.items()
    }
    return Limits(**{**vars(one), "ways": ways, "notes": tuple(dict.fromkeys(one.notes + other.notes))})


def measure_limits(seconds: float = SECONDS) -> Limits:
    """This machine's limits, found in a process of its own, which imports the frameworks. Raises `BackendError` if it fails."""
    command = [sys.executable, "-m", "experiments.probes", "--seconds", str(seconds)]
    environment = os.environ | thread_settings(cores())
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment)
    if done.returncode:
        raise BackendError(
            f"The machine's limits could not be measured (exit code {done.returncode}); measure.limits_s=0 leaves them out.\n"
            + done.stderr[-2000:]
        )
    return limits_of(json.loads(done.stdout.rstrip("\n").rpartition("\n")[2]))


def limits_of(record: Mapping[str, Any]) -> Limits:
    """The inverse of `dataclasses.asdict` and a trip through JSON."""
    return Limits(**{**record, "notes": tuple(record["notes"])})


def limits_said(limits: Mapping[str, Mapping[str, Any]]) -> str:
    """Of a result's `limits`, the `summary` before and after: `Limits before and after: memory read 33.1 and 32.8 GB/s, …`.
    Of a run that was interrupted, those before."""
    known = [when for when in ("before", "after") if limits[when]]
    both = lambda key: " and ".join(number(limits[when][key] and limits[when][key] / 1e9) for when in known)  # noqa: E731
    return f"Limits {' and '.join(known)}: {', '.join(f'{name} {both(key)} {unit}' for key, name, unit in SAID)}."


def told_limits(engines: Mapping[str, Mapping[str, Any]]) -> str:
    """The same for a run with these figures, and the limits that its shares refer to; empty if they were not measured."""
    said = next((limits_said(figures["limits"]) for figures in engines.values() if figures.get("limits")), "")
    shares = [mine for mine in engines.values() if any(mine.get(name) is not None for name in LIMITED)]
    beside = [value for mine in shares for value in mine.get("block_read_bytes_per_s") or () if value]
    if not said or not beside:
        return said
    span = " to ".join(dict.fromkeys(number(value / 1e9) for value in (min(beside), max(beside))))
    return f"{said} Shares are of the best matmul, and of the memory read beside each window: {span} GB/s."


def say_limits(engines: Mapping[str, Mapping[str, Any]]) -> None:
    """What the machine could do, below the table of a run."""
    if said := told_limits(engines):
        wide_console().print(said, style="dim", highlight=False, markup=False)


def print_limits(limits: Limits, foreign_share: float | None) -> None:
    """Print the result of each way to measure a limit, and the greatest results.

    `foreign_share` is the share of the processors' time that other programs used; None if the machine does not report it."""
    table = Table("limit", "way")
    table.add_column("10⁹ a second", justify="right")
    for limit, ways in limits.ways.items():
        what = "memory read, bytes" if limit == READ else f"matmul {limit}, FLOP"
        for way, value in ways.items():
            table.add_row(what, way, number(value / 1e9))
    console = wide_console()
    console.print(table)
    for limit in limits.ways:
        (way, value), name = limits.best(limit), "bandwidth" if limit == READ else f"peak of {limit}"
        line = f"{name}: {way}, {number(value / 1e9)} {'GB/s' if limit == READ else 'GFLOP/s'}"
        console.print(line, style="bold", highlight=False, markup=False)
    megabytes = f"{limits.buffer_bytes >> 20} MiB read, last-level cache {limits.cache_bytes >> 20} MiB"
    console.print(f"{limits.threads} threads; {megabytes}.", highlight=False)
    for note in limits.notes:
        console.print(note, style="dim", highlight=False)
    if foreign_share is not None and foreign_share > BUSY:
        used = f"Other programs used {foreign_share:.0%} of the processors meanwhile: the machine may do more than this."
        console.print(used, style="bold red", highlight=False)
