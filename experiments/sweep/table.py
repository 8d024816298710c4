"""Write the table and the report of a sweep, and print its table.

A sweep is `python -m experiments.bench -m engine=jax,torch workload.num_requests=8,16`.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from experiments.report.console import print_doubts, print_result, print_rows, print_scaling, wide_console
from experiments.report.figures_table import FIGURES
from experiments.report.notes import BRACKETS
from experiments.report.scaling import curves
from experiments.report.sweep_cells import cell, few, several_codes, status, swept_figure
from experiments.runs.results import records_of, sweep_table

SHOWN = ("output_throughput", "ratio", "verdict", "median_ttft_ms", "median_tpot_ms", "p99_e2el_ms", "peak_rss_mib")
"""Figures of the table that is printed; the files have all."""
HEADINGS = dict(FIGURES) | {"ratio": "× first", "verdict": "verdict", "p99_e2el_ms": "end to end p99, ms"}


def finish(folder: Path) -> bool:
    """Write `sweep.parquet`, `sweep.csv` and the report, print the table and, last, one line of JSON.

    Returns whether all went well: no job failed, and the report could be made.
    """
    table = sweep_table(folder)
    write_table(folder, table)
    from experiments.report.writer import make_report  # imports matplotlib, which takes long

    report = make_report(folder)
    print_sweep(str(folder), table)
    print_scaling(curves(records_of(table[table["status"] == "ok"]), table.attrs["swept"]))
    failed, waiting = (table[table["status"] == status].drop_duplicates("job") for status in ("failed", "waiting"))
    jobs = table["run"].nunique()
    result = {
        "sweep": str(folder),
        "jobs": jobs,
        "ok": jobs - len(failed) - len(waiting),
        "failed": len(failed),
        "waiting": len(waiting),
        "failures": dict(zip(failed["run"], failed["failure"], strict=True)),
        "table": str(folder / "sweep.parquet"),
        "report": report and str(report),
    }
    print_result(result, report or result["table"])
    return report is not None and failed.empty


def write_table(folder: Path, table: pd.DataFrame) -> None:
    """Both files, each whole or as it was."""
    for name, write in (("sweep.parquet", table.to_parquet), ("sweep.csv", table.to_csv)):
        beside = folder / (name + ".new")
        write(beside, index=False)
        beside.replace(folder / name)


def print_sweep(title: str, table: pd.DataFrame) -> None:
    """Print a row for each job and engine: its options, and as many figures as fit. Below are the contaminations."""
    identity = ["job", "engine", *(name for name in table.attrs["swept"] if name != "engine"), "status"]
    headings = {name: name.rpartition(".")[2] for name in identity} | {name: HEADINGS[name] for name in SHOWN if name in table}
    records = table.to_dict("records")
    rows = [
        {name: cell(row[name]) if name in identity else swept_figure(name, row) for name in headings} | {"status": status(row)}
        for row in records
    ]
    print_rows(title, list(headings.values()), [list(row.values()) for row in rows], len(identity))
    console = wide_console()
    if any(few(row) & headings.keys() for row in records):
        console.print(BRACKETS, style="dim", highlight=False)
    for row in records:
        contaminated, unsure = ([row[key]] if isinstance(row.get(key), str) else [] for key in ("contaminated", "unsure"))
        print_doubts(console, f"{row['engine']} of job {cell(row['job'])}", contaminated, unsure)
    if said := several_codes(table):
        console.print(said, style="bold red", highlight=False)
