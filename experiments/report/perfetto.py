"""Write a run for ui.perfetto.dev: each engine is a process with its requests, scheduler steps, kernels and counters.

The form is Chrome's JSON trace. The windows follow one another in the order in which they ran. The gaps between them are not
to scale. The windows under a profiler come last, and only they have kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

GAP_S = 0.05
COUNTERS = (("running", "requests running"), ("waiting", "requests waiting"), ("pages_used", "pages used"))
STEP_ARGS = ("tokens", "prompt_tokens", "num_seqs", "logit_rows", "kv_tokens")
STEPS = 1
"""The thread of a process on which its steps are drawn."""


def trace(
    rows: pd.DataFrame,
    steps: pd.DataFrame,
    engines: Sequence[str],
    order: Sequence[Sequence[str]],
    kernels: pd.DataFrame | None = None,
) -> dict[str, Any]:
    """The whole trace, to be written as JSON. `order` gives the labels of each block as they ran; where it tells nothing they
    are taken to have alternated. `kernels` are of windows in the last block."""
    begins = starts(rows, steps, engines, order)
    events: list[dict[str, Any]] = []
    for pid, label in enumerate(engines, 1):
        events += [
            {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": label}},
            {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}},
            {"ph": "M", "name": "thread_name", "pid": pid, "tid": STEPS, "args": {"name": "scheduler steps"}},
        ]
        for row in records(rows, label):
            events += request_events(row, pid, begins[label, row["block"]])
        events += step_events(records(steps, label), pid, label, begins)
        if kernels is not None and len(kernels):
            events += kernel_events(records(kernels, label), pid, begins.get((label, rows["block"].max()), 0.0))
    return {"displayTimeUnit": "ms", "traceEvents": events}


def records(frame: pd.DataFrame, label: str) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in record.items()} for record in frame[frame["engine"] == label].to_dict("records")]


def starts(
    rows: pd.DataFrame, steps: pd.DataFrame, engines: Sequence[str], order: Sequence[Sequence[str]]
) -> dict[tuple[str, int], float]:
    """(engine, block) → second at which its window begins."""
    ends: dict[tuple[str, int], float] = {}
    for label, block, sent, times in zip(rows["engine"], rows["block"], rows["sent"], rows["times"], strict=True):
        ends[label, block] = max(ends.get((label, block), 0.0), times[-1] if len(times) else sent)
    if "landed" in steps:
        for (label, block), end in steps.groupby(["engine", "block"])["landed"].max().items():
            ends[label, block] = max(ends.get((label, block), 0.0), end)
    begins, now = {}, 0.0
    for block in sorted({block for _, block in ends}):
        turn = order[block] if block < len(order) else engines if block % 2 == 0 else engines[::-1]
        for label in [*turn, *(name for name in engines if name not in turn)]:
            if (label, block) in ends:
                begins[label, block] = now
                now += ends[label, block] + GAP_S
    return begins


def us(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def request_events(row: Mapping[str, Any], pid: int, begin: float) -> Iterator[dict[str, Any]]:
    """A request as nested slices of a track of its own: the whole, and in it its phases."""
    times, sent = row["times"], row["sent"]
    last = times[-1] if len(times) else sent
    identity = f"{row['block']}/{row['request_id']}"
    args = {
        "prompt tokens": row["prompt_len"],
        "output tokens": len(row["tokens"]),
        "block": row["block"],
        "finish": row["finish"],
    }
    if isinstance(row["error"], str):
        args["error"] = row["error"]
    phases = [("sent late", row["scheduled"], sent)]
    if len(times):
        started = row["started"] if told(row, "started") else sent
        phases += [("admission", sent, started), ("prefill", started, times[0]), ("decode", times[0], last)]
    common = {"cat": "request", "pid": pid, "tid": 0, "id2": {"local": identity}}
    yield {"ph": "b", "name": f"request {identity}", "ts": us(begin + row["scheduled"]), "args": args, **common}
    for name, start, end in phases:
        if end > start:
            yield {"ph": "b", "name": name, "ts": us(begin + start), **common}
            yield {"ph": "e", "name": name, "ts": us(begin + end), **common}
    yield {"ph": "e", "name": f"request {identity}", "ts": us(begin + last), **common}


def step_events(
    steps: Sequence[Mapping[str, Any]], pid: int, label: str, begins: Mapping[tuple[str, int], float]
) -> Iterator[dict[str, Any]]:
    """Steps as slices for the time that each had the device, so that two in flight do not overlap; counters where they land."""
    landed, block = 0.0, None
    for step in steps:
        if step["block"] != block:
            landed, block = 0.0, step["block"]
        begin = begins[label, step["block"]]
        start, end = max(step["submitted"], landed), step["landed"]
        args = {name: step[name] for name in STEP_ARGS if told(step, name)} | {
            "submitted ms before": us(start - step["submitted"]) / 1e3
        }
        name = "prefill" if step.get("prompt_tokens") else "decode"
        place = {"pid": pid, "tid": STEPS, "ts": us(begin + start)}
        yield {"ph": "X", "cat": "step", "name": name, "dur": us(end - start), "args": args, **place}
        for counter, title in COUNTERS:
            if told(step, counter):
                yield {"ph": "C", "name": title, "pid": pid, "ts": us(begin + end), "args": {counter: step[counter]}}
        landed = end


def kernel_events(kernels: Sequence[Mapping[str, Any]], pid: int, begin: float) -> Iterator[dict[str, Any]]:
    """Kernels as slices, one track for each thread. All are whole nanoseconds, so that what nests still does."""
    begin = round(begin, 9)
    tracks = {thread: STEPS + i for i, thread in enumerate(dict.fromkeys(kernel["thread"] for kernel in kernels), 1)}
    for thread, tid in tracks.items():
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": f"kernels: {thread}"}}
    for kernel in kernels:
        start, end = (round(1e9 * (begin + at)) for at in (kernel["start"], kernel["start"] + kernel["duration"]))
        place = {"pid": pid, "tid": tracks[kernel["thread"]], "ts": start / 1e3}
        yield {"ph": "X", "cat": "kernel", "name": kernel["name"], "dur": (end - start) / 1e3, **place}


def told(step: Mapping[str, Any], name: str) -> bool:
    value = step.get(name)
    return value is not None and value == value  # not NaN
