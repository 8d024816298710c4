"""Build the report of a sweep: the finished and failed jobs, every cell, and lines over the options that were swept."""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.display.formatting import number, plural
from experiments.report.charts.scatter import scatter
from experiments.report.findings import end_of
from experiments.report.glossary import GLOSSARY
from experiments.report.notes import BRACKETS
from experiments.report.page import Drawing, Notice, Page, Section, Table, Tone, Verdict
from experiments.report.scaling import curves, scaling_table
from experiments.report.sections import scaling_section, some
from experiments.report.sweep_cells import few, several_codes, status, swept_figure
from experiments.report.sweep_figures import last, over_axis, value
from experiments.report.tables import environment_table
from experiments.runs.results import open_run, records_of, sweep_table
from experiments.runs.sweep_jobs import Job, read_jobs

COLUMNS = (
    ("output_throughput", "output tokens/s"),
    ("ratio", "× first"),
    ("median_ttft_ms", "TTFT median, ms"),
    ("median_tpot_ms", "TPOT median, ms"),
    ("p99_e2el_ms", "end to end p99, ms"),
    ("roofline", "roofline"),
    ("peak_rss_mib", "peak memory, MiB"),
)
"""Figures in the table of all cells, where any cell has them."""
VERDICT = ("verdict", "verdict")
"""The column before the options: a phone has no room for it further right."""
AXES = 4
"""Options that get figures of their own, at most."""
OVER = (
    ("output_throughput", "Output throughput", "tokens/s"),
    ("median_ttft_ms", "Time to first token, median", "ms"),
    ("median_tpot_ms", "Time per output token, median", "ms"),
)
"""Figure, title, unit."""


def sweep_page(folder: Path) -> Page:
    """The page of the sweep in `folder`. Raises `ConfigError` for a folder that is none."""
    table = sweep_table(folder)
    jobs = {job.name: job for job in read_jobs(folder)}
    swept = [str(name) for name in table.attrs["swept"]]
    done = table[table["status"] == "ok"] if len(table) else table
    engines = [str(label) for label in dict.fromkeys(done["engine"])] if len(done) else []
    cells, scaled = cells_table(table, swept), curves(records_of(done), swept)
    bracketed = {key for row in table.to_dict("records") for key in few(row)}
    brackets = f"; {BRACKETS}" if bracketed & {key for key, _ in COLUMNS} else ""
    whole = [run for run in dict.fromkeys(table["run"]) if (folder / run / "results.json").exists()] if len(table) else []
    environments = [open_run(folder / run).environment for run in whole]
    environment = environments[0] if environments else {}
    sections = [
        Section("Cells", f"Every job and engine of the sweep{brackets}.", tables=[cells]),
        Section("Over the swept options", "", some(*over(table, engines, swept))),
        Section(
            "Throughput against latency",
            "Up and to the left is worse: the same work, later.",
            some(clouds(done, engines, swept)),
        ),
        scaling_section(scaled),
        Section("Environment", "Of the first job that ended well.", tables=[environment_table(environment)]),
    ]
    return Page(
        kind="sweep",
        title=folder.resolve().name,
        facts=facts(table, environments),
        verdicts=list(verdicts(table, swept)),
        notices=list(notices(folder, table, jobs)),
        summary=[cells, *map(scaling_table, scaled)],
        sections=[section for section in sections if section.drawings or any(table.rows for table in section.tables)],
        glossary=GLOSSARY,
        command=sweep_command(list(jobs.values()), str(environment.get("command") or "")),
        engines=engines,
    )


def cells_table(table: pd.DataFrame, swept: Sequence[str]) -> Table:
    options = [name for name in swept if name != "engine"]
    judged, shown = (
        [(key, name) for key, name in columns if key in table and table[key].notna().any()] for columns in ([VERDICT], COLUMNS)
    )
    rows = [
        (
            value(row["job"]),
            value(row["engine"]),
            *(swept_figure(key, row) for key, _ in judged),
            *(value(row[name]) for name in options),
            *(swept_figure(key, row) for key, _ in shown),
            status(row),
        )
        for row in table.to_dict("records")
    ]
    return Table(
        ("job", "engine", *(name for _, name in judged), *map(last, options), *(name for _, name in shown), "status"), rows
    )


def facts(table: pd.DataFrame, environments: Sequence[Mapping[str, Any]]) -> list[str]:
    """What all jobs share."""
    said = [plural(table["run"].nunique(), "job")] if len(table) else ["no jobs"]
    for name in ("model", "dtype", "workload"):
        if name in table and len(values := table[name].dropna().unique()) == 1:
            said.append(f"{name} {values[0]}")
    cpus = {environment.get("cpu") for environment in environments}
    return said + [f"on {cpu}" for cpu in cpus if cpu and len(cpus) == 1]


def verdicts(table: pd.DataFrame, swept: Sequence[str]) -> Iterator[Verdict]:
    """How much is done, and which cell gave the most."""
    by_job = (
        table.groupby("run")["status"].agg(lambda s: "failed" if "failed" in set(s) else s.iloc[0])
        if len(table)
        else pd.Series()
    )
    counts = {status: int((by_job == status).sum()) for status in ("ok", "failed", "waiting")}
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "nothing has run"
    tone = "bad" if counts["failed"] else "warn" if counts["waiting"] or not counts["ok"] else "good"
    yield Verdict(tone, f"{counts['ok']}/{len(by_job)}", "jobs went well", f"{said}.")  # type: ignore[arg-type]
    best = table[table["status"] == "ok"] if len(table) else table
    if "output_throughput" in best and best["output_throughput"].notna().any():
        row = best.loc[best["output_throughput"].idxmax()]
        where = ", ".join(f"{last(name)}={value(row[name])}" for name in swept if name != "engine")
        at = f"{row['engine']}{' at ' if where else ''}{where}"
        yield Verdict(
            "calm", number(float(row["output_throughput"])), "output tokens/s, the most", f"{at} (job {value(row['job'])})."
        )


def notices(folder: Path, table: pd.DataFrame, jobs: dict[str, Job]) -> Iterator[Notice]:
    """Each failure with the end of its log, and what contaminated other cells, or may have."""
    if several := several_codes(table):
        yield Notice("warn", "Jobs of different code", several)
    for row in table.to_dict("records"):
        for key, title in (("contaminated", "is contaminated"), ("unsure", "may be contaminated")):
            if isinstance(why := row.get(key), str):
                tone: Tone = "warn" if key == "contaminated" else "calm"
                yield Notice(tone, f"{row['engine']} of job {value(row['job'])} {title}", f"{why}.")
        if row["status"] != "failed":
            continue
        job = jobs.get(Path(row["run"]).name)
        failure = (job and job.failure) or {}
        log = str(failure.get("log") or "")
        where = [Path(log).parent if log else folder, folder / row["run"], folder]
        name = Path(log or f"{row['engine']}.log").name
        text = next((end for directory in where if (end := end_of(directory / name))), "")
        yield Notice(
            "bad", f"Job {value(row['job'])} failed", str(row["failure"] or ""), text or str(failure.get("message") or "")
        )


def over(table: pd.DataFrame, engines: Sequence[str], swept: Sequence[str]) -> Iterator[Drawing | None]:
    for axis in [name for name in swept if name != "engine"][:AXES]:
        for key, title, unit in OVER:
            if key in table:
                yield over_axis(table, engines, swept, axis, key, title, unit)


def clouds(done: pd.DataFrame, engines: Sequence[str], swept: Sequence[str]) -> Drawing | None:
    """Throughput and latency of each cell."""
    latency = next((name for name in ("median_e2el_ms", "mean_e2el_ms") if name in done), None)
    if latency is None or "output_throughput" not in done:
        return None
    options = [name for name in swept if name != "engine"]
    mine = {label: done[done["engine"] == label] for label in engines}
    points = {
        label: (list(part["output_throughput"].fillna(math.nan)), list(part[latency].fillna(math.nan)))
        for label, part in mine.items()
    }
    return scatter(
        "throughput-latency",
        "Throughput and latency of each cell",
        points,
        x="output tokens/s",
        y=f"{latency.partition('_')[0]} end to end, ms",
        each=", ".join(map(last, options)) or "job",
        names={label: [setting(row, options) for row in part.to_dict("records")] for label, part in mine.items()},
    )


def setting(row: Mapping[Any, Any], options: Sequence[str]) -> str:
    """The swept values of one cell, or its job if nothing but the engine was swept."""
    return ", ".join(value(row[name]) for name in options) or value(row["job"])


def sweep_command(jobs: Sequence[Job], first: str) -> str:
    """One command line for the whole sweep if its jobs are all combinations of some values; else one for each job.

    `first` is the command line of one job: it names the module and the options before the overrides. No folder is named:
    in that of this sweep its jobs are done, and none would run again."""
    if not jobs or not first:
        return ""
    words = [word for word in shlex.split(first) if not any(word in job.overrides for job in jobs) and not names_sweep(word)]
    settings = [[word for word in job.overrides if not names_sweep(word)] for job in jobs]
    choices: dict[str, dict[str, None]] = {}
    for override in itertools.chain(*settings):
        name, _, chosen = override.partition("=")
        choices.setdefault(name, {})[chosen] = None
    alike = all(len(overrides) == len(choices) for overrides in settings)
    if alike and math.prod(len(values) for values in choices.values()) == len(jobs):
        launching = [word for word in words if re.match(r"hydra[./]\S+=", word)]  # -m stands before all that is set
        before = [word for word in words if word not in launching]
        return shlex.join([*before, "-m", *launching, *(f"{name}={','.join(values)}" for name, values in choices.items())])
    return "\n".join(shlex.join([*words, *overrides]) for overrides in settings)


def names_sweep(word: str) -> bool:
    return word.lstrip("+").startswith("sweep=")
