"""Run directories as `bench` and `compare` leave them, made up, for those who read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.load.driver import Row, Window
from experiments.metrics.metrics import summarize
from experiments.runs.directory import run_directory
from experiments.runs.records import write_rows
from experiments.runs.sweep_jobs import Job, write_jobs

SETTING = {"model": "tiny-llama", "dtype": "bfloat16", "kernels": "auto", "seed": 0, "workload": "fixed", "num_prompts": 2}


def window(*requests: tuple[float, Sequence[float]]) -> Window:
    """One window of requests, given as when each was sent and when its tokens were seen."""
    rows = tuple(
        Row(
            request_id=str(number),
            prompt_len=10 + number,
            output_len=len(times),
            scheduled=sent / 2,
            sent=sent,
            times=tuple(times),
            tokens=tuple(range(len(times))),
            finish="length",
        )
        for number, (sent, times) in enumerate(requests)
    )
    return Window(rows, max(row.times[-1] for row in rows))


BLOCKS = [window((0.0, (0.2, 0.4, 0.8)), (0.5, (1.5,))), window((0.0, (2.25,)))]


def save_run(directory: Path, results: dict[str, Any], windows: dict[str, list[Window]], overrides: Sequence[str] = ()) -> Path:
    """A whole run in `directory`."""
    environment = {"date": "2026-11-25T10:38:00+00:00", "command": "python -m experiments.bench", "overrides": list(overrides)}
    with run_directory(directory.parent, "unused", directory) as partial:
        (partial / "config.yaml").write_text(
            "engine: {name: jax}\nmodel: {name: tiny-llama}\nworkload: {name: fixed, request_rate: null}\nseed: 0\n"
        )
        (partial / "environment.json").write_text(json.dumps(environment))
        write_rows(partial, windows)
        (partial / "results.json").write_text(json.dumps(results))
    return directory


def save_bench(directory: Path, engine: str = "jax", overrides: Sequence[str] = ()) -> Path:
    results = {"engine": engine, **SETTING, "run": str(directory), **summarize(BLOCKS), "limits": None}
    return save_run(directory, results, {engine: BLOCKS}, overrides)


def save_compare(directory: Path, **more: Any) -> Path:
    """Two engines, torch at half the throughput."""
    figures = {"jax": summarize(BLOCKS), "torch": summarize(BLOCKS)}
    comparison = {"against": "jax", "ratio": 0.5, "low": 0.4, "high": 0.6, "p_value": 0.03, "verdict": "slower", "blocks": 6}
    results = {**SETTING, "run": str(directory), "engines": figures, "comparisons": {"torch": comparison}, **more}
    return save_run(directory, results, dict.fromkeys(figures, BLOCKS))


def save_sweep(folder: Path) -> Path:
    """Three jobs of `bench`: one done, one failed, one not run yet."""
    both = ("engine.max_num_seqs=8", "runs=x")
    jobs = [
        Job(number=0, digest="aa", overrides=("engine=jax", *both, "workload.request_rate=null"), seconds=1.0),
        Job(
            number=1,
            digest="bb",
            overrides=("engine=torch", *both, "workload.request_rate=2.5"),
            failure={"kind": "killed by SIGKILL", "message": "one\ntwo\n", "log": "l"},
        ),
        Job(number=2, digest="cc", overrides=("engine=torch", *both, "workload.request_rate=fast")),
    ]
    save_bench(folder / "jobs" / jobs[0].name)
    write_jobs(folder, jobs)
    return folder
