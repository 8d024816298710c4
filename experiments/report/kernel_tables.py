"""Print the tables of a benchmark of kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from experiments.display.formatting import number
from experiments.kernels.benchmark import FIGURES, Figures
from experiments.report.console import print_doubts, wide_console
from experiments.report.limits import limits_said

TABLE = 140
"""Columns of a line that the tables need."""
NOTE = (
    "Limit: the least time for these MiB at the speed of memory and these GFLOP at the peak of matmul; a cache answers "
    "faster than memory, so that data which fit one may come to more than 1 of it. The framework writes keys and values in "
    "attend, native kernels in project: of these parts only layers, all of them, compares like with like."
)
"""What the tables' figures are of."""


def cell(name: str, values: Figures) -> str:
    """One of `FIGURES` as it is shown."""
    value = values.get(name)
    return f"{number(value[0])}–{number(value[1])}" if isinstance(value, Sequence) else number(value)


def print_tables(result: Mapping[str, Any]) -> None:
    """What spoils them, the tables, and the limits that they rest on."""
    console = wide_console(TABLE)
    print_doubts(console, result["engine"], result["contaminated"], result["unsure"])
    doubt = "[bold red]contaminated:[/] " if result["contaminated"] else ""
    by = f" ({result['kernel_arithmetic']})" if result.get("kernel_arithmetic") else ""
    for shape, operators in result["shapes"].items():
        title = ", ".join([f"{result['engine']}{by}", *(result[key] for key in ("model", "dtype")), shape])
        table = Table(title=f"{doubt}{escape(title)}", title_justify="left")
        table.add_column("all layers")
        for heading in FIGURES.values():
            table.add_column(heading, justify="right")
        for operator, values in operators.items():
            table.add_row(operator, *(cell(name, values) for name in FIGURES))
        console.print(table)
    if result["limits"]:
        console.print(NOTE, style="dim", highlight=False, markup=False)
        console.print(limits_said(result["limits"]), style="dim", highlight=False, markup=False)
