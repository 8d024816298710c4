"""From rows to figures, named and defined as `vllm bench serve` has them, with inter-token times by token, not by chunk.

For a request sent at s whose tokens were seen at t[0..n-1]:
ttft = t[0] - s · tpot = (t[n-1] - t[0]) / (n - 1), n ≥ 2 · itl = t[i] - t[i-1], pooled over requests · e2el = t[n-1] - s.
Throughputs are over the whole window, from its start to the last event. A figure without a sample is None.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.drive import Row, Window

BUSY = 0.05
"""Share of the processors' time above which other programs spoil a measurement: compute threads wait for each other."""
LIMITED = ("roofline", "mbu", "mfu", "decode_roofline", "decode_mbu", "prefill_mfu")
"""Figures that cannot be above 1 (see `experiments.roofline`)."""


def summarize(windows: Sequence[Window]) -> dict[str, Any]:
    """Figures of one engine over its windows: latencies pooled, throughputs as total tokens by total time."""
    rows = [row for window in windows for row in window.rows]
    done = [row for row in rows if row.ok]
    duration = sum(window.duration for window in windows)
    inputs, outputs = sum(row.prompt_len for row in done), sum(len(row.tokens) for row in done)
    figures = {
        "duration": duration,
        "completed": len(done),
        "failed": len(rows) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": rate(len(done), duration),
        "output_throughput": rate(outputs, duration),
        "total_token_throughput": rate(inputs + outputs, duration),
        "block_output_throughput": [
            rate(sum(len(row.tokens) for row in window.rows if row.ok), window.duration) for window in windows
        ],
    }
    for name, samples in latencies(done).items():
        figures |= distribution(name, samples)
    figures |= counters([window.stats for window in windows])
    foreign = sum(window.stats.get("foreign_cpu_seconds", 0.0) for window in windows)
    return figures | {"foreign_cpu_share": rate(foreign, duration * (os.cpu_count() or 1)) or 0.0}


def latencies(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Samples in seconds, by metric."""
    return {
        "ttft": np.array([row.times[0] - row.sent for row in rows]),
        "tpot": np.array([(row.times[-1] - row.times[0]) / (len(row.times) - 1) for row in rows if len(row.times) > 1]),
        "itl": np.concatenate([np.diff(row.times) for row in rows]) if rows else np.array([]),
        "e2el": np.array([row.times[-1] - row.sent for row in rows]),
    }


def distribution(name: str, seconds: np.ndarray) -> dict[str, float | None]:
    """mean, median, population standard deviation, p90 and p99 (linear interpolation), in ms."""
    ms = seconds * 1e3
    some = len(ms) > 0
    return {
        f"mean_{name}_ms": float(np.mean(ms)) if some else None,
        f"median_{name}_ms": float(np.median(ms)) if some else None,
        f"std_{name}_ms": float(np.std(ms)) if some else None,
        f"p90_{name}_ms": float(np.percentile(ms, 90)) if some else None,
        f"p99_{name}_ms": float(np.percentile(ms, 99)) if some else None,
    }


def counters(stats: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What the engine's own counters say about the windows."""
    total: dict[str, float] = {}
    for window in stats:
        for name, value in window.items():
            total[name] = total.get(name, 0) + value
    steps = total.get("steps", 0)
    return {
        "num_steps": int(steps),
        "num_preemptions": int(total.get("num_preemptions", 0)),
        "num_resets": int(total.get("num_resets", 0)),
        "compilations_in_window": int(total.get("compilations", 0)),
        "prefix_cache_hit_rate": rate(total.get("prefix_cache_hits", 0), total.get("prefix_cache_queries", 0)) or 0.0,
        "padded_tokens_share": rate(
            total.get("padded_tokens", 0), total.get("padded_tokens", 0) + total.get("scheduled_tokens", 0)
        ),
        "host_ms_per_step": rate(total["host_seconds"] * 1e3, steps) if "host_seconds" in total else None,
    }


def contaminations(figures: Mapping[str, Any], shares_prefixes: bool) -> list[str]:
    """Why the figures of an engine do not stand for its steady state; empty if they do."""
    reasons = []
    if figures["compilations_in_window"]:
        reasons.append(f"{figures['compilations_in_window']} compilations inside the timed windows")
    if figures["num_resets"]:
        reasons.append(f"{figures['num_resets']} steps raised and were run again")
    if figures["failed"]:
        reasons.append(f"{figures['failed']} requests failed")
    if figures["foreign_cpu_share"] > BUSY and figures["duration"] > 1.0:  # the clock of this figure is coarse
        reasons.append(f"other programs used {figures['foreign_cpu_share']:.0%} of the processors")
    for name in LIMITED:
        if (share := figures.get(name) or 0.0) > 1:
            reasons.append(f"invalid: {name} is {share:.2f}, above what the machine was measured to be capable of")
    if figures["prefix_cache_hit_rate"] > 0.01 and not shares_prefixes:
        reasons.append(f"{figures['prefix_cache_hit_rate']:.0%} of prompt tokens came from a cache that should be cold")
    return reasons


def rate(amount: float, by: float) -> float | None:
    return amount / by if by > 0 else None
