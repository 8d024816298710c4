"""Read the files of runs and sweeps: `open_run`, `list_runs`, and `sweep_table`, one row for each job and engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.config import expect
from common.errors import ConfigError
from experiments.runs.directory import PARTIAL
from experiments.runs.sweep_jobs import JOBS, UNKNOWN, VOLATILE, Job, is_whole, read_jobs

FIRST = ("job", "run", "status", "failure", "engine")
"""Columns of a sweep's table that are always there."""
SCALARS = (int, float, str, bool, type(None))


@dataclass(frozen=True)
class RunFiles:
    """A run, or the whole blocks or shapes of one that was cut short."""

    directory: Path
    config: dict[str, Any]
    """As resolved."""
    environment: dict[str, Any]
    results: dict[str, Any]

    @property
    def kind(self) -> Literal["bench", "compare", "kernels"]:
        if "engines" in self.results:
            return "compare"
        return "kernels" if "shapes" in self.results else "bench"

    @property
    def partial(self) -> bool:
        """Whether it was cut short."""
        return self.directory.name.endswith(PARTIAL)

    @property
    def engines(self) -> dict[str, dict[str, Any]]:
        """The figures of each engine, by label."""
        return self.results["engines"] if self.kind == "compare" else {self.results["engine"]: self.results}

    @property
    def dropped(self) -> dict[int, str]:
        """The reason for each dropped block, by the number of the block (see `experiments.metrics.disturbed`)."""
        return {each["block"]: each["reason"] for each in self.results.get("dropped_blocks") or ()}

    @property
    def counted(self) -> int:
        """The number of blocks that the figures count."""
        return max((len(mine.get("block_output_throughput") or ()) for mine in self.engines.values()), default=0)

    @property
    def blocks(self) -> int:
        """The number of whole blocks, the dropped ones included."""
        return self.counted + len(self.dropped)


def open_run(directory: Path | str) -> RunFiles:
    """The run in `directory`. Raises `ConfigError` for a folder that holds none, or one that has not ended well."""
    directory = Path(directory)
    expect(directory.is_dir(), f"There is no folder {directory}. Give the directory of a run, such as one in runs/.")
    expect(not directory.name.endswith(PARTIAL), cut_short(directory))
    return read_run(directory)


def cut_short(directory: Path) -> str:
    return f"The run in {directory} has not ended, or not well: its name ends in {PARTIAL}. Its logs say how far it came."


def read_run(directory: Path) -> RunFiles:
    """As `open_run`, and of one that was cut short what it kept: of a comparison its whole blocks, of kernels whole shapes."""
    there = (directory / "results.json").exists() or not directory.name.endswith(PARTIAL)
    expect(there, f"{cut_short(directory)} It has no results: no part was whole, or they could not be written.")
    results, environment = (read_json(directory, name) for name in ("results.json", "environment.json"))
    config: Any = OmegaConf.to_container(read_config(directory))
    expect_figures(directory, results)
    return RunFiles(directory, config, environment, results)


def expect_figures(directory: Path, results: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for results that are damaged, or another program's."""
    engines = results.get("engines")
    ours = "engine" in results or (isinstance(engines, dict) and all(isinstance(mine, dict) for mine in engines.values()))
    expect(ours, f"{no_run(directory)} its results.json names no engine, or has no figures of one.")


def read_config(directory: Path) -> DictConfig:
    """Return the configuration of a run. Raise `ConfigError` if it is missing or that of another program."""
    try:
        config = OmegaConf.load(directory / "config.yaml")
    except (OSError, ValueError, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{no_run(directory)} config.yaml cannot be read ({' '.join(str(error).split())}).") from error
    ours = "model" in config and ("engine" in config or "engines" in config)
    expect(ours, f"{no_run(directory)} its config.yaml has no model, or no engine.")
    assert isinstance(config, DictConfig)
    return config


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """A file of a run. Raises `ConfigError` for one that is missing, cut short, or no mapping."""
    try:
        values = json.loads((directory / name).read_text(encoding="utf-8"), parse_constant=not_known)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{no_run(directory)} {name} cannot be read ({error}).") from error
    expect(isinstance(values, dict), f"{no_run(directory)} its {name} is no mapping.")
    return values


def no_run(directory: Path) -> str:
    return f"{directory} is no directory of a run, such as bench and compare make:"


def not_known(constant: str) -> None:
    """NaN and the infinities, which are no JSON: a figure that is not finite is not known."""


def list_runs(folder: Path | str = "runs") -> list[RunFiles]:
    """Every finished run in `folder` and below it, jobs of sweeps too, by path. What is partial or not ours is passed over."""
    runs = []
    for path in sorted(Path(folder).rglob("results.json")):
        try:
            runs.append(open_run(path.parent))
        except ConfigError:
            continue
    return runs


def is_sweep(folder: Path) -> bool:
    return (folder / JOBS).is_dir()


def sweep_table(folder: Path | str) -> pd.DataFrame:
    """One row for each job and engine of a sweep, in the order of the jobs.

    Columns: `job` (number), `run` (directory within the folder), `status` (ok, failed, or waiting: not run yet, or cut short),
    `failure` (why), `engine`, `code` (a digest of the sources), the overrides of any job by name, and every figure that
    is one number or one word;
    `table.attrs["swept"]` names the overrides that not all jobs share. Raises `ConfigError` for a folder that is no sweep.
    """
    folder = Path(folder)
    expect(is_sweep(folder), f"{folder} is no folder of a sweep: it holds no {JOBS}/. Sweeps are made by -m, in runs/sweeps/.")
    listed = {job.name: job for job in read_jobs(folder)}
    found = {path.name for path in (folder / JOBS).iterdir() if is_whole(path)}
    rows: list[dict[str, Any]] = []
    options: list[dict[str, Any]] = []
    for name in sorted(listed.keys() | found, key=lambda name: (len(name), name)):
        job, run = listed.get(name), run_of(folder / JOBS / name)
        overrides = values(job.overrides if job else run.environment.get("overrides", ()) if run else ())
        row = {"job": number_of(name), "run": f"{JOBS}/{name}"}
        rows += [row | rest for rest in (rows_of_run(run, job, overrides) if run else [row_without_run(job, overrides)])]
        options.append(overrides)
    table = pd.DataFrame(rows, columns=list(dict.fromkeys([*FIRST, *(key for row in rows for key in row)])))
    for name, column in table.items():
        kinds = {type(value) for value in column if not pd.isna(value)}
        if len(kinds) > 1 and kinds != {int, float}:  # a file has one type to a column
            table[name] = [None if pd.isna(value) else str(value) for value in column]
    names = dict.fromkeys(name for overrides in options for name in overrides)
    table.attrs["swept"] = [name for name in names if len({repr(overrides.get(name)) for overrides in options}) > 1]
    return table


def records_of(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a sweep's table, each without the cells that have no value."""
    return [{str(key): cell for key, cell in row.items() if not pd.isna(cell)} for row in rows.to_dict("records")]


def run_of(directory: Path) -> RunFiles | None:
    """The run in `directory` if there is a whole one."""
    try:
        return open_run(directory)
    except ConfigError:
        return None


def number_of(name: str) -> int | None:
    """Of a job's directory."""
    head = name.partition("-")[0]
    return int(head) if head.isdigit() else None


def row_without_run(job: Job | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Of a job that has not ended well."""
    failure = job.failure if job else None
    return {"status": "failed" if failure else "waiting", "failure": said(failure), "engine": None, **overrides}


def rows_of_run(run: RunFiles, job: Job | None, overrides: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each engine of a run, and for each that failed in it."""
    shared = scalars(run.results) if run.kind == "compare" else {}
    failures = run.results.get("failures") or {}
    rows = []
    for label in dict.fromkeys((*run.engines, *failures)):
        failure = failures.get(label) or (job.failure if job else None)
        mine = run.engines.get(label, {})
        figures = shared | scalars(mine) | bounds(mine) | joined(mine) | against(run.results, label)
        figures = {name: value for name, value in figures.items() if name not in ("run", "engine")}
        status = {"status": "failed" if failure else "ok", "failure": said(failure), "engine": label}
        status["code"] = run.environment.get("code") or UNKNOWN
        rows.append({**overrides, **status, **figures})
    return [{**{name: row[name] for name in ("status", "failure", "engine")}, **row} for row in rows]


def against(results: Mapping[str, Any], label: str) -> dict[str, Any]:
    """How an engine of a comparison stands to the first: ratio, its interval, and the verdict."""
    comparison = (results.get("comparisons") or {}).get(label) or {}
    wanted = {"ratio": "ratio", "low": "ratio_low", "high": "ratio_high", "p_value": "p_value", "verdict": "verdict"}
    return {name: comparison[key] for key, name in wanted.items() if key in comparison}


def bounds(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the ends of the intervals of latencies, as `median_ttft_ms_low` and `median_ttft_ms_high`."""
    found = (figures.get("latency_intervals") or {}).items()
    return {f"{key}_{end}": each[end] for key, each in found for end in ("low", "high") if each[end] is not None}


def joined(figures: Mapping[str, Any]) -> dict[str, str]:
    """What must be known of an engine's figures, each in one cell."""
    return {key: "; ".join(figures[key]) for key in ("contaminated", "unsure", "unsupported") if figures.get(key)}


def scalars(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, SCALARS)}


def said(failure: Mapping[str, Any] | None) -> str | None:
    """Return a failure as one cell: its kind and the last line of its message."""
    if failure is None:
        return None
    lines = str(failure.get("message", "")).strip().splitlines()
    return ": ".join(part for part in (str(failure.get("kind", "")), lines[-1].strip() if lines else "") if part)


def values(overrides: Sequence[str]) -> dict[str, Any]:
    """Overrides as columns: `workload.num_requests=8` is 8 under `workload.num_requests`. What is no number, word, true, false
    or null stays as it was written."""
    parser = OverridesParser.create()
    columns = {}
    for word in overrides:
        name, _, text = word.lstrip("+~").partition("=")
        try:
            value: Any = parser.parse_override(word).value()
        except HydraException:
            value = text
        if name not in VOLATILE:
            columns[name] = value if isinstance(value, SCALARS) else text
    return columns
