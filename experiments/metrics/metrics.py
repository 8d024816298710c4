"""From rows to figures, named as `vllm bench serve` names them, with inter-token times by token, not by chunk.

For a request due at d, sent at s, whose first step began at b and whose tokens were seen at t[0..n-1]:
ttft = t[0] - d · tpot = (t[n-1] - t[0]) / (n - 1), n ≥ 2 · itl = t[i] - t[i-1], pooled over requests · e2el = t[n-1] - d ·
queue = s - d · admission = b - s · ttft_from_sent = t[0] - s · e2el_from_sent = t[n-1] - s.

Latencies count from the time when a request is due. The driver of an engine in its own process sends between two steps, so a
request that is due during a step waits for the end of that step. Counted from s, as `vllm bench serve` counts, that wait would
be missing, and engines behind a server would look slower. `ttft_from_schedule` and `e2el_from_schedule` are ttft and e2el.

Throughputs are over the whole window, from its start to the last event. A figure without a sample, or one that neither
the engine nor the machine reports, is None. Of a run that an `Slo` was stated for, `goodput` is the requests a second that meet
all of it, from when they were due.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.load.driver import Row, Window
from experiments.load.workload import NO_SLO, Slo
from experiments.metrics.phases import of_steps, rate, steady

LIMITED = (
    *("roofline", "mbu", "mfu"),
    *("decode_roofline", "decode_mbu", "decode_mfu"),
    *("prefill_roofline", "prefill_mbu", "prefill_mfu"),
)
"""Figures that cannot be above 1 (see `experiments.roofline`)."""
INTENSITIES = ("intensity", "decode_intensity", "prefill_intensity")
"""FLOP a byte of what the steps need."""
PERCENTILES = (50, 90, 99)
BUSY = 0.05
"""Share of the processors' time above which other programs contaminate a measurement: compute threads wait for each other."""
COARSE_S = 1.0
"""Seconds below which processor time, which the system counts in ticks, is too coarse."""
MISSING = 0.01
"""Share of the windows by which two measurements of their time may differ: up to the last event by its time or its receipt, and
by the clock of the engine's process or of the process that asked for the window, ..."""
MISSING_S = 0.02
"""... and seconds below which that is the end of a step, or the time until a process runs."""
LAG_MS = 10.0
"""Age of an event at receipt, in the mean of the steps, above which its time is not when the engine had it. Events of replicas
on as many processors are 2 ms old, others 0.2 ms."""
JUMP = 3.0
"""Factor between two blocks of one engine above which something else than the engine's speed has changed."""
COLD = 0.01
"""Share of prompt tokens that may come from a cache that should have been empty."""
FAULTS = 100
"""Pages read from disk; a few belong to a library that is used for the first time."""
HELD_BACK = 0.01
"""Share of the time that a CPU quota may hold a process back."""


def summarize(windows: Sequence[Window], slo: Slo = NO_SLO, concurrency: int | None = None) -> dict[str, Any]:
    """Figures of one engine over its windows: latencies pooled, throughputs as total tokens by total time. `concurrency` is
    that of a closed loop."""
    rows = [row for window in windows for row in window.rows]
    done = [row for row in rows if row.ok]
    duration = sum(window.duration for window in windows)
    inputs, outputs = sum(row.prompt_len for row in done), sum(len(row.tokens) for row in done)
    figures: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(rows) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": rate(len(done), duration),
        "output_throughput": rate(outputs, duration),
        "total_token_throughput": rate(inputs + outputs, duration),
        "block_output_throughput": [output_throughput(window) for window in windows],
        "goodput": rate(sum(meets(row, slo) for row in done), duration) if slo != NO_SLO else None,
        "slo": {name: limit for name, limit in vars(slo).items() if limit is not None} or None,
    }
    samples = latencies(done)
    for name, seconds in samples.items():
        figures |= distribution(name, seconds)
    figures["unsupported"] = unsupported({name: len(seconds) for name, seconds in samples.items()})
    figures |= steady(windows, concurrency) | of_steps(windows)
    return figures | counters([window.stats for window in windows], duration, outputs)


def output_throughput(window: Window) -> float | None:
    """Output tokens a second, of the requests that went well."""
    return rate(sum(len(row.tokens) for row in window.rows if row.ok), window.duration)


# Requests.


def latencies(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Samples in seconds, by metric."""
    return {
        "ttft": np.array([row.times[0] - row.scheduled for row in rows]),
        "tpot": np.array([tpot(row) for row in rows if len(row.times) > 1]),
        "itl": np.concatenate([np.diff(row.times) for row in rows]) if rows else np.array([]),
        "e2el": np.array([row.times[-1] - row.scheduled for row in rows]),
        "queue": np.array([row.sent - row.scheduled for row in rows]),
        "admission": np.array([row.started - row.sent for row in rows if row.started is not None]),
        "ttft_from_sent": np.array([row.times[0] - row.sent for row in rows]),
        "e2el_from_sent": np.array([row.times[-1] - row.sent for row in rows]),
        "ttft_from_schedule": np.array([row.times[0] - row.scheduled for row in rows]),
        "e2el_from_schedule": np.array([row.times[-1] - row.scheduled for row in rows]),
    }


def tpot(row: Row) -> float:
    return (row.times[-1] - row.times[0]) / (len(row.times) - 1)


def meets(row: Row, slo: Slo) -> bool:
    """Whether a request that went well did so within the limits."""
    reached = (
        (row.times[0] - row.scheduled, slo.ttft_ms),
        (tpot(row) if len(row.times) > 1 else 0.0, slo.tpot_ms),
        (row.times[-1] - row.scheduled, slo.e2el_ms),
    )
    return all(limit is None or seconds * 1e3 <= limit for seconds, limit in reached)


def distribution(name: str, seconds: np.ndarray) -> dict[str, float | None]:
    """mean, median, population standard deviation and percentiles (linear interpolation), in ms."""
    ms = seconds * 1e3
    keys = [f"{what}_{name}_ms" for what in ("mean", "median", "std", *(f"p{percent}" for percent in PERCENTILES))]
    if not len(ms):
        return dict.fromkeys(keys)
    values = [np.mean(ms), np.median(ms), np.std(ms), *np.percentile(ms, PERCENTILES)]
    return {key: float(value) for key, value in zip(keys, values, strict=True)}


def needed(percent: int) -> int:
    """Samples without which a percentile is no more than the greatest of them: one of so many lies beyond it."""
    return math.ceil(100 / (100 - percent))


def unsupported(counts: Mapping[str, int]) -> list[str]:
    """The percentiles that are given for fewer samples than they need, by how many samples each metric has."""
    return [f"p{percent}_{name}_ms" for name, count in counts.items() for percent in PERCENTILES if 0 < count < needed(percent)]


# Counters.


def counters(stats: Sequence[Mapping[str, float]], duration: float, outputs: int) -> dict[str, Any]:
    """What the counters of the engine, of the driver and of the machine say about windows that lasted `duration` seconds in
    sum and gave `outputs` tokens. A counter that one window lacks is None."""
    names = set.intersection(*map(set, stats)) if stats else set()
    total = {name: sum(window[name] for window in stats) for name in names}
    whole = lambda name: int(total[name]) if name in total else None  # noqa: E731
    share = lambda name, by: rate(total[name], by) if name in total else None  # noqa: E731
    a_step = lambda name, unit: rate(total[name] * unit, total.get("steps", 0)) if name in total else None  # noqa: E731
    if "driver_seconds" in total:
        total["harness_seconds"] = total["driver_seconds"] + total.get("log_seconds", 0.0)
    watched = total.get("watched_seconds", 0.0)
    foreign = share("foreign_cpu_seconds", watched * (os.cpu_count() or 1))
    return {
        "num_steps": whole("steps"),
        "num_preemptions": whole("num_preemptions"),
        "num_resets": whole("num_resets"),
        "compilations_in_window": whole("compilations"),
        "prefix_cache_hit_rate": share("prefix_cache_hits", total.get("prefix_cache_queries", 0)),
        "prompts_handed_over": whole("prompts_handed_over"),
        "prompts_recomputed": whole("prompts_recomputed"),
        "padded_tokens_share": share("padded_tokens", total.get("padded_tokens", 0) + total.get("scheduled_tokens", 0)),
        "host_ms_per_step": a_step("host_seconds", 1e3),
        "communication_ms_per_step": a_step("communication_seconds", 1e3),
        "communication_mib_per_step": a_step("communication_bytes", 2**-20),
        "harness_overhead_share": share("harness_seconds", duration),
        # Processor time is counted in ticks of a hundredth of a second, so a short window may seem to have had more than all.
        "foreign_cpu_share": None if foreign is None else min(foreign, 1.0),
        "major_faults": whole("major_faults"),
        "swapped_out_mib": share("swapped_out_bytes", 2**20),
        "throttled_share": share("throttled_seconds", watched),
        "thermal_throttles": whole("thermal_throttles"),
        "clock_limit_drop_mhz": total.get("clock_limit_drop_mhz"),
        "stray_times": whole("stray_times"),
        "skipped_tokens": whole("skipped_tokens"),
        "missing_share": share("missing_seconds", duration),
        "mean_lag_ms": rate(1e3 * total["lag_seconds"], total["receipts"]) if "lag_seconds" in total else None,
        "clock_gap_share": clock_gap(total),
        "joules": total.get("joules"),
        "joules_cpu": total.get("joules_cpu"),
        "joules_gpu": total.get("joules_gpu"),
        "joules_per_token": share("joules", outputs),
    }


def clock_gap(total: Mapping[str, float]) -> float | None:
    """Return the share of the windows' time, by the clock of the process that asked for them, that the engine's clock lacks."""
    if not {"outer_seconds", "window_seconds"} <= total.keys():
        return None
    return rate(total["outer_seconds"] - total["window_seconds"], total["outer_seconds"])


# Guards.


def contaminations(figures: Mapping[str, Any], shares_prefixes: bool) -> list[str]:
    """Why the figures of an engine do not stand for its steady state; empty if they do. `shares_prefixes` is whether hits of
    the prefix cache are expected."""

    def above(name: str, limit: float) -> bool:
        return (figures.get(name) or 0) > limit

    reasons = []
    if above("compilations_in_window", 0):
        reasons.append(f"{figures['compilations_in_window']} compilations inside the timed windows")
    if above("num_resets", 0):
        reasons.append(f"{figures['num_resets']} steps raised and were run again")
    if above("failed", 0):
        reasons.append(f"{figures['failed']} requests failed")
    if above("foreign_cpu_share", BUSY) and above("duration", COARSE_S):
        reasons.append(f"other programs used {figures['foreign_cpu_share']:.0%} of the processors")
    if above("swapped_out_mib", 0):
        reasons.append(f"{figures['swapped_out_mib']:.1f} MiB of the engine's memory were swapped out")
    if above("major_faults", FAULTS):
        reasons.append(f"{figures['major_faults']} pages were read from disk")
    if above("throttled_share", HELD_BACK):
        reasons.append(f"a CPU quota held the engine back for {figures['throttled_share']:.0%} of the time")
    if above("thermal_throttles", 0):
        reasons.append(f"the processors were slowed down {figures['thermal_throttles']} times because they were too hot")
    if above("clock_limit_drop_mhz", 0):
        reasons.append(f"the highest clock of the processors was lowered by {figures['clock_limit_drop_mhz']:.0f} MHz")
    if above("stray_times", 0):
        reasons.append(f"{figures['stray_times']} events have times outside of those between sending and receiving them")
    if above("skipped_tokens", 0):
        reasons.append(f"the model computed {figures['skipped_tokens']} tokens fewer than the prompts and outputs have")
    if above("missing_share", MISSING) and figures["missing_share"] * figures["duration"] > MISSING_S:
        reasons.append(f"the driver's own clock shows {figures['missing_share']:.1%} more time than the events")
    if above("mean_lag_ms", LAG_MS):
        reasons.append(f"events have times of {figures['mean_lag_ms']:.0f} ms before the driver received them, in the mean")
    if above("duration", COARSE_S):
        reasons += [*jumps(figures), *clocks_apart(figures)]
    for name in LIMITED:
        if above(name, 1):
            reasons.append(f"invalid: {name} is {figures[name]:.2f}, above what the machine was measured to be capable of")
    if above("prefix_cache_hit_rate", COLD) and not shares_prefixes:
        reasons.append(f"{figures['prefix_cache_hit_rate']:.0%} of prompt tokens came from a cache that should be cold")
    return reasons


def jumps(figures: Mapping[str, Any]) -> list[str]:
    """Whether the throughput of an engine differs between its blocks by more than noise of the machine explains."""
    rates = [rate for rate in figures.get("block_output_throughput") or () if rate]
    if len(rates) < 2 or max(rates) <= JUMP * min(rates):
        return []
    return [f"its throughput jumps between blocks, from {min(rates):.3g} to {max(rates):.3g} tokens/s"]


def clocks_apart(figures: Mapping[str, Any]) -> list[str]:
    """Return whether the clock of the engine's process runs slower or faster than that of the process that started it.

    Other programs delay the process that reads the second clock, by up to 100 ms where they use all processors. The limits are
    ten times as large beside them."""
    gap = figures.get("clock_gap_share") or 0.0
    times = 10 if (figures.get("foreign_cpu_share") or 0.0) > BUSY else 1
    if abs(gap) <= times * MISSING or abs(gap) * figures["duration"] <= times * MISSING_S:
        return []
    how = "less" if gap > 0 else "more"
    return [f"its clock shows {abs(gap):.1%} {how} time in the windows than the clock of the process that started it"]


def block_contaminations(windows: Sequence[Window], shares_prefixes: bool) -> list[list[str]]:
    """Return the reasons of `contaminations` for each window alone, so that a burst in one block is not averaged away."""
    return [
        contaminations({"duration": window.duration} | counters([window.stats], window.duration, 0), shares_prefixes)
        for window in windows
    ]


def too_short(figures: Mapping[str, Any]) -> bool:
    """Whether an engine's windows lasted too short a time, all together, to judge what other programs took."""
    return figures.get("duration") is not None and figures["duration"] <= COARSE_S


def unsure(figures: Mapping[str, Any]) -> list[str]:
    """What would contaminate figures, were the time long enough to judge by."""
    share = figures.get("foreign_cpu_share") or 0
    said = [*jumps(figures), *clocks_apart(figures)] if too_short(figures) else []
    if share > BUSY and too_short(figures):
        said.append(f"other programs used {share:.0%} of the processors, but that is too short a time to judge by")
    return said
