"""Print the measured limits of the machine, and the sentences of a report on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from experiments.display.formatting import number
from experiments.metrics.metrics import BUSY, LIMITED
from experiments.report.console import wide_console
from experiments.roofline.limits import READ, SAID, Limits


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
