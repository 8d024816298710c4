"""Name the figures of an engine that tables and reports show, and format each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.display.formatting import number
from experiments.metrics.metrics import LIMITED

GROUPS = (
    (
        ("output_throughput", "output tokens/s"),
        ("total_token_throughput", "total tokens/s"),
        ("request_throughput", "requests/s"),
        ("steady_output_throughput", "output tokens/s, steady"),
        ("decode_throughput", "output tokens/s, decode steps"),
        ("goodput", "goodput: requests/s within limits"),
        ("duration", "timed, s"),
        ("total_output_tokens", "output tokens"),
        ("num_steps", "steps"),
    ),
    (
        ("mean_queue_ms", "sent late mean, ms"),
        ("mean_admission_ms", "admission mean, ms"),
        ("mean_ttft_ms", "TTFT mean, ms"),
        ("median_ttft_ms", "TTFT median, ms"),
        ("p99_ttft_ms", "TTFT p99, ms"),
        ("mean_tpot_ms", "TPOT mean, ms"),
        ("median_tpot_ms", "TPOT median, ms"),
        ("p99_tpot_ms", "TPOT p99, ms"),
        ("median_itl_ms", "ITL median, ms"),
        ("p99_itl_ms", "ITL p99, ms"),
        ("mean_e2el_ms", "end to end mean, ms"),
        ("median_e2el_ms", "end to end median, ms"),
        ("p99_e2el_ms", "end to end p99, ms"),
    ),
    (
        ("roofline", "roofline: least time / time"),
        ("mbu", "memory bandwidth used (MBU)"),
        ("mfu", "matmul peak used (MFU)"),
        ("decode_roofline", "roofline, decode steps"),
        ("decode_mbu", "MBU, decode steps"),
        ("prefill_mfu", "MFU, steps with prompts"),
        ("host_ms_per_step", "host work a step, ms"),
        ("communication_ms_per_step", "between ranks a step, ms"),
        ("communication_mib_per_step", "between ranks a step, MiB"),
        ("padded_tokens_share", "padding share"),
        ("joules", "energy, J"),
        ("joules_per_token", "energy an output token, J"),
    ),
    (
        ("mean_running", "requests running, mean"),
        ("mean_pages_used_share", "KV pages in use, mean"),
        ("mean_pages_empty_share", "KV pages reserved but empty, mean"),
        ("prefix_cache_hit_rate", "prefix cache hit rate"),
        ("num_preemptions", "preemptions"),
        ("prompts_handed_over", "prompts handed over"),
        ("prompts_recomputed", "prompts computed again"),
    ),
    (
        ("shared_out", "parallel"),
        ("kernels_used", "kernels"),
        ("kernel_arithmetic", "native kernels multiply by"),
        ("stored_weights", "weights as stored in the file"),
        ("weights_mib", "weights, MiB"),
        ("kv_pool_mib", "KV pages, MiB"),
        ("rank_mib", "weights and pages of a rank, MiB"),
        ("rss_mib", "memory after warm-up, MiB"),
        ("peak_load_mib", "peak memory until then, MiB"),
        ("peak_rss_mib", "peak memory, MiB"),
        ("load_s", "load, s"),
        ("warmup_s", "warm-up, s"),
    ),
    (
        ("completed", "completed"),
        ("failed", "failed"),
        ("compilations_in_window", "compilations in window"),
        ("foreign_cpu_share", "other programs' CPU share"),
        ("harness_overhead_share", "harness's share of timed"),
    ),
)
"""Speed, latency, efficiency, the batch and its pages, memory and start, guards: each figure with its name."""
FIGURES = tuple(figure for group in GROUPS for figure in group)
WHERE = {"communication_ms_per_step": "communication_mib_per_step"}
"""Figure → another figure. An engine that has the other one has this one too, even if it does not report it."""


def tells(key: str, engines: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether a table has a row for the figure: an engine reports it, or has it and does not report it."""
    return any(mine.get(key) is not None or mine.get(WHERE.get(key, key)) is not None for mine in engines)


def figure(key: str, figures: Mapping[str, Any]) -> str:
    """Format a figure: a word as it is, a share in percent, a percentile with too few samples in brackets."""
    value = figures.get(key)
    if value is None and figures.get(WHERE.get(key, key)) is not None:
        return "not reported"
    if isinstance(value, str):
        return value
    if value is not None and math.isfinite(value) and (key in LIMITED or key.endswith(("_share", "_rate"))):
        text = f"{value:.1%}" if key in LIMITED and not 0 < value < 0.01 else f"{value:.2%}"
    else:
        text = number(value)
    if key in (figures.get("unsupported") or ()):
        return f"({text})"
    return text + bounds((figures.get("latency_intervals") or {}).get(key))


def bounds(estimate: Mapping[str, Any] | None) -> str:
    """Return the interval of an estimate as ` (860–905)`, an empty text without one."""
    if not estimate or estimate["low"] is None:
        return ""
    return f" ({number(estimate['low'])}–{number(estimate['high'])})"


def latency_times(
    figures: Iterable[str], comparisons: Mapping[str, Mapping[str, Any]], labels: Iterable[str]
) -> list[tuple[str, ...]]:
    """Return a row for each latency of `figures` that has ratios: its name, and the ratio of each engine to the first."""
    names, labels = dict(FIGURES), list(labels)
    found = [(key, [(comparisons.get(label) or {}).get("latencies", {}).get(key) for label in labels]) for key in figures]
    return [
        (names[key].removesuffix(", ms"), *(latency_ratio(each) for each in mine))
        for key, mine in found
        if any(each and each["value"] is not None for each in mine)
    ]


def latency_ratio(estimate: Mapping[str, Any] | None) -> str:
    """Return a ratio and its interval; 1 for the first engine."""
    return "1" if estimate is None else times({"ratio": estimate["value"], "low": estimate["low"], "high": estimate["high"]})


def times(comparison: Mapping[str, Any] | None) -> str:
    """Return the ratio of a comparison and its interval; 1 for the first engine."""
    if comparison is None:
        return "1"
    ratio, low, high = comparison["ratio"], comparison["low"], comparison["high"]
    if ratio is None:
        return number(ratio)
    return f"{ratio:.3f} ({'no interval' if low is None else f'{low:.3f}–{high:.3f}'})"


def kernels_of(figures: Mapping[str, Any]) -> str:
    """Return the kernels that an engine ran, with the instructions that the native kernels multiply by."""
    kind, arithmetic = figures["kernels_used"], figures.get("kernel_arithmetic")
    return f"{kind} ({arithmetic})" if arithmetic else kind
