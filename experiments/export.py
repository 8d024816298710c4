"""Results as the tools around `vllm bench` read them: `python -m experiments.export RUN_OR_SWEEP`.

Of a run, `vllm/<engine>.json`: every key that `vllm bench serve --save-result --save-detailed` writes, by its name and in its
unit, and all figures of ours. Of a sweep, for each job `vllm/<job>/run=N.json`, N counting its engines, and `summary.json`, and
over all `vllm/summary.csv`: what `vllm bench sweep serve` leaves, and `vllm bench sweep plot` and `plot_pareto` look for.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.config import expect
from common.errors import TandemError
from common.process.exits import USER_ERROR, fail, printing
from experiments.report.rows import counted_rows
from experiments.runs.directory import ROWS, write_json
from experiments.runs.results import RunFiles, is_sweep, open_run, sweep_table

FOLDER = "vllm"

Record = dict[str, Any]


def export(folder: Path | str) -> list[Path]:
    """Write the files of a run or a sweep into its folder. Returns them. Raises `ConfigError` for a folder that is neither."""
    folder = Path(folder)
    return export_sweep(folder) if is_sweep(folder) else export_run(open_run(folder))


def export_run(run: RunFiles) -> list[Path]:
    expect(run.kind != "kernels", f"{run.directory} timed kernels, not requests: there is nothing to export.")
    rows = requests(run)
    return [write(run.directory / FOLDER / f"{label}.json", whole(run, label, rows[label])) for label in run.engines]


def export_sweep(folder: Path) -> list[Path]:
    table = sweep_table(folder)
    done = table[table["status"] == "ok"]
    expect(not done.empty, f"No job of the sweep {folder} is done, so there is nothing to export.")
    swept = [name for name in table.attrs["swept"] if name != "engine"]
    files, summary = [], []
    for name, rows in done.groupby("run", sort=False):
        run, directory = open_run(folder / str(name)), folder / FOLDER / Path(str(name)).name
        each, mine = requests(run), list[Record]()
        for number, row in enumerate(rows.to_dict("records")):
            options = {option: None if pd.isna(row[option]) else row[option] for option in swept} | {"run_number": number}
            engine = run, row["engine"], each[row["engine"]]
            files.append(write(directory / f"run={number}.json", whole(*engine) | options))
            mine.append(brief(*engine) | options)
        files.append(write(directory / "summary.json", mine))
        summary += mine
    pd.DataFrame.from_records(summary).to_csv(folder / FOLDER / "summary.csv")
    return [*files, folder / FOLDER / "summary.csv"]


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)
    return path


def whole(run: RunFiles, label: str, rows: Sequence[Record]) -> Record:
    """Return the figures of `brief` and the lists that `--save-detailed` adds."""
    return brief(run, label, rows) | details(rows)


def brief(run: RunFiles, label: str, rows: Sequence[Record]) -> Record:
    """Return the figures of one engine: the keys of `vllm bench serve` in its order, then all others.

    `rows` are its requests."""
    figures, workload = run.engines[label], run.config["workload"]
    # vLLM counts latencies from the time when a request was sent.
    figures = figures | {key.replace("_from_sent", ""): value for key, value in figures.items() if "_from_sent" in key}
    model = run.results.get("model")
    setting = {
        "date": f"{datetime.fromisoformat(run.environment['date']):%Y%m%d-%H%M%S}",
        "endpoint_type": label,
        "backend": label,
        "label": label,
        "model_id": model,
        "tokenizer_id": model,
        "num_prompts": len(rows),
        "request_rate": workload.get("request_rate") or "inf",
        "burstiness": workload.get("burstiness") or 1.0,
        "max_concurrency": workload.get("concurrency"),
    }
    theirs = {
        "request_goodput": figures.get("goodput"),
        **peaks(rows),
        "rtfx": 0.0,  # seconds of audio per second, of models for speech
        "latencies": [row["times"][-1] - row["sent"] if row["times"] else 0.0 for row in rows],
        "queue_times": [row["sent"] - row["scheduled"] for row in rows],
    }
    shared = run.results if run.kind == "compare" else {}
    known = {key: value for key, value in shared.items() if isinstance(value, (int, float, str))} | figures
    return setting | theirs | {key: value for key, value in known.items() if key not in setting}


def requests(run: RunFiles) -> dict[str, list[Record]]:
    """Return the requests of each engine, block by block, without the dropped blocks.

    Times count from the start of the first block, as if no time had passed between two blocks."""
    path = run.directory / ROWS
    expect(path.exists(), f"{run.directory} holds no {path.name}, which an export needs. Run it again.")
    blocks: dict[str, dict[int, list[Record]]] = {label: {} for label in run.engines}
    for row in counted_rows(run).to_dict("records"):
        blocks.setdefault(row["engine"], {}).setdefault(row["block"], []).append({str(key): each for key, each in row.items()})
    return {label: in_a_row([mine[block] for block in sorted(mine)]) for label, mine in blocks.items()}


def in_a_row(blocks: Sequence[Sequence[Record]]) -> list[Record]:
    """Each block's times moved behind those of the one before."""
    start, moved = 0.0, list[Record]()
    for rows in blocks:
        for row in rows:
            times = {name: row[name] + start for name in ("sent", "scheduled")}
            moved.append(row | times | {"times": [time + start for time in row["times"]]})
        start += max((time for row in rows for time in (row["sent"], *row["times"])), default=0.0)
    return moved


def details(rows: Sequence[Record]) -> Record:
    """One entry for each request. We hand token ids to engines and take token ids: there is no text."""
    return {
        "input_lens": [row["prompt_len"] for row in rows],
        "output_lens": [len(row["tokens"]) for row in rows],
        "ttfts": [row["times"][0] - row["sent"] if row["times"] else 0.0 for row in rows],
        "itls": [np.diff(row["times"]).tolist() for row in rows],
        "start_times": [row["sent"] for row in rows],
        "generated_texts": ["" for _ in rows],
        "generated_ids": [row["tokens"] for row in rows],
        "errors": [row["error"] or "" for row in rows],
    }


def peaks(rows: Sequence[Record]) -> Record:
    """The most output tokens in one second, and the most requests that were under way in one, be it for a part of it."""
    done = [row for row in rows if row["times"] and not row["error"]]
    if not done:
        return {"max_output_tokens_per_s": 0.0, "max_concurrent_requests": 0}
    start = min(row["sent"] for row in done)
    tokens = np.concatenate([row["times"] for row in done]) - start
    first = np.array([row["sent"] for row in done]) - start
    last = np.array([row["times"][-1] for row in done]) - start
    seconds = np.arange(int(last.max()) + 1)
    under_way = (first.astype(int)[:, None] <= seconds) & (seconds <= last.astype(int)[:, None])
    return {
        "max_output_tokens_per_s": float(np.bincount(tokens.astype(int)).max()),
        "max_concurrent_requests": int(under_way.sum(axis=0).max()),
    }


@printing()
def main() -> None:
    """`python -m experiments.export RUN_OR_SWEEP`: prints the files that it wrote."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.export", description="Write a run or a sweep as vllm bench would."
    )
    parser.add_argument(
        "directory", type=Path, help="the folder of a run (it holds results.json) or of a sweep (it holds jobs)"
    )
    try:
        files = export(parser.parse_args().directory)
    except TandemError as error:
        fail(str(error), USER_ERROR)
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    main()
