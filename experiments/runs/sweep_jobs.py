"""Identify the jobs of a sweep, and read and write their list.

The hash of its configuration identifies a job. Its run directory is `jobs/<number>-<hash>/` of the sweep's folder. The list
`jobs.json` holds what was requested and what failed. Only the run directory shows that a job is done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash
from omegaconf import DictConfig, open_dict

from common.errors import ConfigError
from experiments.options import resolved
from experiments.runs.directory import PARTIAL, numbered, write_json

JOBS = "jobs"
OTHER_CODE = "other_code"
"""The folder of a sweep for results that other code computed (`set_aside`)."""
MANIFEST = "jobs.json"
UNKNOWN = "unknown"
"""The code of a run that does not name it."""
VOLATILE = ("runs", "sweep", "report", "table")
"""Options that say where results go and how they are printed, not what they are."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One line of a sweep's list."""

    number: int
    digest: str
    overrides: tuple[str, ...]
    """Of the command line that runs this job alone."""
    seconds: float | None = None
    """How long its last attempt took; None before that ended."""
    failure: Mapping[str, Any] | None = None
    """`kind`, `message` and `log` of its last attempt, and `final` if another would be no better: its figures failed, not it.
    None if it did not fail, or has not ended."""

    @property
    def name(self) -> str:
        return f"{self.number:03}-{self.digest}"


def digest(config: DictConfig) -> str:
    """Twelve hexadecimal digits, equal for configurations that ask for the same run. Raises `ConfigError` for a lack."""
    values = resolved(task_config(config))
    wanted = {key: value for key, value in values.items() if key not in VOLATILE}
    return xxhash.xxh3_128_hexdigest(json.dumps(wanted, sort_keys=True).encode())[:12]


def task_config(config: DictConfig) -> DictConfig:
    """A copy of `config` without Hydra's own part, as a task is given it."""
    copy = config.copy()
    with open_dict(copy):
        copy.pop("hydra", None)
    return copy


def read_jobs(folder: Path) -> list[Job]:
    """The list of a sweep, empty if it has none. Raises `ConfigError` for a file that is no such list."""
    path = folder / MANIFEST
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["jobs"]
        return [Job(**entry | {"overrides": tuple(entry["overrides"])}) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not the list of a sweep's jobs ({error!r}). Choose another name with sweep=NAME."
        ) from error


def write_jobs(folder: Path, jobs: Sequence[Job]) -> None:
    write_json(folder / MANIFEST, {"jobs": [asdict(job) for job in jobs]})


def merged(known: Sequence[Job], wanted: Sequence[tuple[str, tuple[str, ...]]]) -> list[Job]:
    """The list with `wanted`, pairs of digest and overrides: a job that is known keeps its number, a new one gets the next."""
    jobs = {job.digest: job for job in known}
    number = max((job.number for job in known), default=-1)
    for key, overrides in wanted:
        if key in jobs:
            jobs[key] = replace(jobs[key], overrides=overrides)
        else:
            number += 1
            jobs[key] = Job(number=number, digest=key, overrides=overrides)
    return list(jobs.values())


def is_whole(directory: Path) -> bool:
    """Whether a run has ended well and has all its files here."""
    return not directory.name.endswith(PARTIAL) and (directory / "results.json").exists()


def is_done(folder: Path, job: Job) -> bool:
    """Whether a job need not run again: it is whole, it did not fail, and none of its engines did."""
    directory = folder / JOBS / job.name
    if not is_whole(directory) or (job.failure and not job.failure.get("final")):
        return False
    return not json.loads((directory / "results.json").read_text(encoding="utf-8")).get("failures")


def code_of(directory: Path) -> str:
    """Return the digest of the code that computed a run (`experiments.runs.source.code_digest`), or `UNKNOWN`."""
    try:
        return str(json.loads((directory / "environment.json").read_text(encoding="utf-8")).get("code") or UNKNOWN)
    except (OSError, ValueError):
        return UNKNOWN


def set_aside(directory: Path) -> Path:
    """Move the run of a job to the folder `other_code` of its sweep. Return its new path."""
    folder = directory.parent.parent / OTHER_CODE
    folder.mkdir(exist_ok=True)
    names = numbered(f"{directory.name}-{code_of(directory)}")
    target = next(folder / name for name in names if not (folder / name).exists())
    return directory.rename(target)
