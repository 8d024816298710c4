"""Runs and sweeps as the harness leaves them, from a small simulation of continuous batching: no engine is started."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

PAGE, PAGES, SEQS = 16, 96, 8
ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00", "command": "python -m experiments.compare 'engines=[jax,torch]'",
    "cpu": "A processor", "cores": 2, "memory_gib": 24.0, "gpus": [], "python": "3.11.7",
    "versions": {"jax": "0.10.2", "torch": "2.13.0"}, "variables": {"CXX": "clang++"},
    "compiler": {"command": "/usr/bin/clang++", "version": "clang 19", "options": "-O3"},
    "commit": "abc123", "tree": "changed", "changed_files": [" M common/engine.py"], "changes_digest": "0123abcd",
}  # fmt: skip
HOSTILE = '</script><img src=x onerror="alert(1)">'
"""A text that a page must show and not obey."""


def simulate(
    rng: np.random.Generator, count: int, ms_per_step: float, output_len: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and steps of one window: requests arrive, at most `SEQS` run, each step gives each of them one token."""
    arrivals = np.cumsum(rng.exponential(2e-3, count))
    prompts, outputs = rng.integers(20, 120, count), rng.integers(2, output_len + 1, count)
    rows: list[dict[str, Any]] = [
        {"request_id": str(i), "prompt_len": int(prompts[i]), "output_len": int(outputs[i]), "scheduled": float(arrivals[i]),
         "sent": 0.0, "times": [], "tokens": [], "finish": "length", "error": None, "logprobs": []}
        for i in range(count)
    ]  # fmt: skip
    steps: list[dict[str, Any]] = []
    running: list[int] = []
    sent, now = 0, 0.0
    while sent < count or running:
        if not running and sent < count:
            now = max(now, arrivals[sent])
        while sent < count and len(running) < SEQS and arrivals[sent] <= now:
            rows[sent]["sent"] = float(max(arrivals[sent], now - 1e-4))
            running.append(sent)
            sent += 1
        fresh = [i for i in running if not rows[i]["tokens"]]
        tokens = sum(int(prompts[i]) for i in fresh) + len(running) - len(fresh)
        begin, now = now, now + 1e-3 * ms_per_step * (1 + tokens / 60) * float(rng.lognormal(0, 0.08))
        for i in running:
            rows[i]["times"].append(now)
            rows[i]["tokens"].append(int(rng.integers(300)))
        kv = sum(int(prompts[i]) + len(rows[i]["tokens"]) for i in running)
        waiting = int(np.searchsorted(arrivals, now)) - sent
        steps.append(
            {"submitted": begin, "landed": now, "tokens": tokens, "prompt_tokens": sum(int(prompts[i]) for i in fresh),
             "num_seqs": len(running), "logit_rows": len(running), "kv_tokens": kv,
             "running": len(running), "waiting": max(0, waiting), "pages_total": PAGES,
             "pages_used": min(PAGES, -(-kv // PAGE) + len(running)), "pages_empty": len(running)}
        )  # fmt: skip
        running = [i for i in running if len(rows[i]["tokens"]) < outputs[i]]
    return rows, steps


def figures(blocks: list[list[dict[str, Any]]], **more: Any) -> dict[str, Any]:
    rows = [row for block in blocks for row in block if row["tokens"]]
    durations = [max(row["times"][-1] for row in block if row["times"]) for block in blocks]
    tokens = [sum(len(row["tokens"]) for row in block) for block in blocks]
    ttft = [1e3 * (row["times"][0] - row["sent"]) for row in rows]
    end = [1e3 * (row["times"][-1] - row["sent"]) for row in rows]
    limits = {"read_bytes_per_s": 1.2e10, "float32_flops_per_s": 1.1e11, "bfloat16_flops_per_s": 2.4e11}
    return {
        "output_throughput": sum(tokens) / sum(durations),
        "block_output_throughput": [n / s for n, s in zip(tokens, durations, strict=True)],
        "median_ttft_ms": float(np.median(ttft)), "p99_ttft_ms": float(np.percentile(ttft, 99)),
        "median_tpot_ms": 4.2, "p99_itl_ms": 9.1, "mean_e2el_ms": float(np.mean(end)), "completed": len(rows), "failed": 0,
        "roofline": 0.41, "mbu": 0.38, "mfu": 0.12,
        "decode_mbu": 0.44, "decode_mfu": 0.06, "prefill_mbu": 0.21, "prefill_mfu": 0.48,
        "intensity": 2.9, "decode_intensity": 1.2, "prefill_intensity": 21.0,
        "peak_rss_mib": 812.4, "limits": {"before": limits, "after": limits}, "contaminated": [],
        "kernel_library": "any-0a1b.so",
    } | more  # fmt: skip


def write_lines(path: Path, windows: Mapping[str, list[list[dict[str, Any]]]]) -> None:
    with path.open("w") as file:
        for engine, blocks in windows.items():
            for block, lines in enumerate(blocks):
                file.writelines(json.dumps({"engine": engine, "block": block} | line) + "\n" for line in lines)


def write_run(
    directory: Path,
    labels: tuple[str, ...] = ("jax", "torch"),
    blocks: int = 6,
    count: int = 40,
    output_len: int = 24,
    **more: Any,
) -> Path:
    """A comparison of `labels`, the later the slower; of one engine, a bench. `more` goes into the results."""
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True)
    rows: dict[str, list[list[dict[str, Any]]]] = {}
    steps: dict[str, list[list[dict[str, Any]]]] = {}
    for i, label in enumerate(labels):
        windows = [simulate(rng, count, 1.6 + 0.25 * i, output_len) for _ in range(blocks)]
        rows[label], steps[label] = [window[0] for window in windows], [window[1] for window in windows]
    write_lines(directory / "requests.jsonl", rows)
    write_lines(directory / "steps.jsonl", {label: mine for label, mine in steps.items() if label != "hf"})
    found = {
        label: figures(
            rows[label], roofline=0.41 - 0.05 * i, mbu=0.38 - 0.05 * i, mfu=0.12 - 0.01 * i, decode_mbu=0.44 - 0.06 * i
        )
        for i, label in enumerate(labels)
    }
    setting = {
        "model": "tiny-llama", "dtype": "float32", "kernels": "auto", "seed": 0, "workload": "chat", "workload_hash": "0" * 32,
        "num_prompts": count, "run": str(directory),
    }  # fmt: skip
    if len(labels) == 1:
        results = {"engine": labels[0]} | setting | found[labels[0]]
    else:
        results = (
            setting | {"engines": found} | compared(rng, found) | {"order": [[*labels][:: (-1) ** b] for b in range(blocks)]}
        )
    (directory / "results.json").write_text(json.dumps(results | more))
    (directory / "config.yaml").write_text("model:\n  name: tiny-llama\nengines: [jax, torch]\nseed: 0\n")
    (directory / "environment.json").write_text(json.dumps(ENVIRONMENT))
    return directory


def compared(rng: np.random.Generator, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What `experiments.compare` says beyond each engine's figures."""
    first, *others = found
    comparisons, agreement = {}, {}
    for label in others:
        ratios = [
            a / b for a, b in zip(found[label]["block_output_throughput"], found[first]["block_output_throughput"], strict=True)
        ]
        ratio, spread = float(np.exp(np.mean(np.log(ratios)))), 2.5 * float(np.std(ratios)) / len(ratios) ** 0.5
        low, high = ratio - spread, ratio + spread
        comparisons[label] = {
            "against": first, "ratio": ratio, "low": low, "high": high, "p_value": 0.031, "verdict": "slower",
            "blocks": len(ratios), "interval": "t", "block_ratios": ratios,
            "said": f"{label} is slower than {first}: {ratio:.2f} times its output throughput, [{low:.2f}, {high:.2f}].",
        }  # fmt: skip
        positions = [
            {"position": p, "mean_abs_logprob_diff": float(1e-6 * (1 + p / 9) * rng.lognormal(0, 0.3)),
             "kld": float(1e-9 * (1 + p / 5) * rng.lognormal(0, 0.5)), "same_share": float(1 - 0.004 * p)}
            for p in range(32)
        ]  # fmt: skip
        agreement[label] = {
            "num_positions": 256, "mean_kld": 2.1e-9, "p99_kld": 1.4e-8, "max_kld": 3.3e-8, "top1_agreement": 0.998,
            "mean_abs_logprob_diff": 2.2e-6, "max_abs_logprob_diff": 1.9e-5, "by_position": positions,
        }  # fmt: skip
    return {
        "ratios": {first: 1.0} | {label: comparison["ratio"] for label, comparison in comparisons.items()},
        "comparisons": comparisons, "failures": {}, "unjustified_divergences": 0, "tokens_equal": True,
        "errors_above_tolerance": 0, "max_abs_logprob_diff": 1.9e-5, "tolerance": 1e-3,
        "first_divergence": None, "compared_tokens": 512, "tokens_equal_share": 1.0,
        "agreement": agreement, "perplexity": {first: 31.27, others[0]: 31.27},
    }  # fmt: skip


def write_sweep(folder: Path, sizes: tuple[int, ...] = (4, 8, 16), engines: tuple[str, ...] = ("jax", "torch")) -> Path:
    """A sweep over engine and number of requests, whose last job failed."""
    jobs = []
    for number, (engine, size) in enumerate((engine, size) for engine in engines for size in sizes):
        job = {"number": number, "digest": f"{number:012x}", "overrides": [f"engine={engine}", f"workload.num_requests={size}"]}
        name = f"{number:03}-{job['digest']}"
        jobs.append(job | {"seconds": 1.0, "failure": None})
        if number < len(sizes) * len(engines) - 1:
            write_run(folder / "jobs" / name, (engine,), blocks=1, count=size, output_len=8, output_throughput=100.0 * size)
    (folder / f"{name}.log").write_text(f"line one\n{HOSTILE}\nout of memory\n")
    jobs[-1]["failure"] = {"kind": "exit code 1", "message": "out of memory", "log": str(folder / f"{name}.log")}
    (folder / "jobs.json").write_text(json.dumps({"jobs": jobs}))
    return folder
