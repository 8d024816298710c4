"""Compute how close a run came to the limits of this machine.

The limits are measured (`experiments.roofline.limits`), and the work is counted (`experiments.roofline.work`).

The roofline (Williams, Waterman & Patterson 2009, doi:10.1145/1498765.1498785): a step that must move `bytes` and compute
`flops` takes at least max(bytes / bandwidth, flops / peak) seconds. Over `time` seconds: mbu = bytes / (time · bandwidth),
mfu = flops / (time · peak), roofline = Σ limits of the steps / time.

Work that is not needed lowers a figure below 1. Above 1 the speed, the count or a limit is wrong. Weights and KV that fit the
last-level cache are not bound by memory, so the limit does not hold for a model so small.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from common.config import Dtype, ModelConfig
from experiments.load.driver import Window
from experiments.metrics.metrics import INTENSITIES, LIMITED
from experiments.metrics.phases import rate, step_seconds
from experiments.roofline.limits import Limits
from experiments.roofline.work import count, limit_seconds


def efficiency(windows: Iterable[Window], model: ModelConfig, dtype: Dtype, limits: Limits | None) -> dict[str, float | None]:
    """The figures `LIMITED` and `INTENSITIES` of one engine over its windows.

    `roofline`, `mbu` and `mfu` are over all time of the windows, the host's work and the wait for arrivals included. Those of
    `decode` are over the steps in which no sequence had more than one token, and the time that these had the device; those of
    `prefill` over the others and theirs. A window whose own bandwidth was measured is held against that. None where nothing is
    known: no limits were measured, the engine does not tell its steps, or there was no such step.
    """
    windows = list(windows)
    logs = [window.steps for window in windows if window.steps is not None]
    if limits is None or len(logs) < len(windows):
        return dict.fromkeys((*LIMITED, *INTENSITIES))
    steps = [step for log in logs for step in log]
    work = count(steps, model, dtype)
    beside = [limits.bandwidth if window.bandwidth is None else window.bandwidth for window in windows]
    bandwidth, peak = np.repeat(beside, [len(log) for log in logs]), limits.peak(dtype)
    least, reading = limit_seconds(work, bandwidth, peak), work.bytes / bandwidth
    busy = np.concatenate([np.empty(0), *map(step_seconds, logs)])
    decode = np.array([step.counts.max(initial=0) <= 1 for step in steps], bool)
    duration = sum(window.duration for window in windows)
    share = lambda amount, seconds: rate(float(amount), float(seconds))  # noqa: E731
    return {
        "roofline": share(least.sum(), duration),
        "mbu": share(reading.sum(), duration),
        "mfu": share(work.flops.sum(), duration * peak),
        "decode_roofline": share(least[decode].sum(), busy[decode].sum()),
        "decode_mbu": share(reading[decode].sum(), busy[decode].sum()),
        "decode_mfu": share(work.flops[decode].sum(), busy[decode].sum() * peak),
        "prefill_roofline": share(least[~decode].sum(), busy[~decode].sum()),
        "prefill_mbu": share(reading[~decode].sum(), busy[~decode].sum()),
        "prefill_mfu": share(work.flops[~decode].sum(), busy[~decode].sum() * peak),
        "intensity": share(work.flops.sum(), work.bytes.sum()),
        "decode_intensity": share(work.flops[decode].sum(), work.bytes[decode].sum()),
        "prefill_intensity": share(work.flops[~decode].sum(), work.bytes[~decode].sum()),
    }


def no_roofline(windows: Iterable[Window], limits: Limits | None, engines: int) -> str | None:
    """Why there are limits and nothing is held against them, of so many `engines` under one label; None where something is, or
    nobody wanted it."""
    if limits is None or all(window.steps is not None for window in windows):
        return None
    several = f"not measured over several engines: the steps of {engines} overlap"
    return several if engines > 1 else "not measured: it does not tell its steps"
