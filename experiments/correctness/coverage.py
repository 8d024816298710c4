"""Choose the part of a timed workload that the float32 pass repeats, and report how much of the timed work that covers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from common.step_log import StepRecord
from experiments.load.workload import Item, Workload

PROMPTS = 7 / 8
"""The share of the token budget that prompts may take. Fewer requests run where they would take more."""
PAUSES_S = 10.0
"""Arrivals and pauses are scaled to end within this time."""


@dataclass(frozen=True)
class Part:
    """Requests of a workload, some of them with shorter outputs."""

    workload: Workload
    numbers: tuple[int, ...]
    """The number of each request in the whole workload."""


def cover(timed: Workload, tokens: int) -> Part:
    """Shorten a workload to about `tokens` prompt and output tokens.

    The schedule stays: arrivals (scaled to `PAUSES_S`), concurrency, and the order of conversations. All requests run if their
    prompts leave room for outputs, else as many as fit, evenly over the lengths. The longest request keeps its whole output.
    The other outputs are shortened by one factor, so that the batch shrinks as it does in the timed windows.
    """
    sizes = [len(item.prompt) + item.output_len for item in timed.items]
    fitting = [i for i, size in enumerate(sizes) if size <= tokens] or [min(range(len(sizes)), key=sizes.__getitem__)]
    low, high = 1, len(fitting)
    while low < high:  # the largest number of requests whose prompts fit
        middle = (low + high + 1) // 2
        prompts = sum(len(timed.items[i].prompt) for i in spread(fitting, sizes, middle))
        low, high = (middle, high) if prompts <= PROMPTS * tokens else (low, middle - 1)
    numbers = spread(fitting, sizes, low)
    longest = max(numbers, key=sizes.__getitem__)
    whole = timed.items[longest].output_len
    room = tokens - whole - sum(len(timed.items[i].prompt) for i in numbers)
    others = sum(timed.items[i].output_len for i in numbers) - whole
    factor = min(1.0, max(0.0, room / others)) if others else 1.0
    scale = min(1.0, PAUSES_S / max(pauses(timed), 1e-9))
    places = {number: place for place, number in enumerate(numbers)}
    items = []
    for number in numbers:
        item, after = timed.items[number], timed.items[number].after
        while after is not None and after not in places:
            after = timed.items[after].after
        length = item.output_len if number == longest else max(1, math.ceil(item.output_len * factor))
        items.append(
            Item(item.arrival * scale, item.prompt, length, None if after is None else places[after], item.think * scale)
        )
    return Part(replace(timed, items=tuple(items)), tuple(numbers))


def sample(timed: Workload, num_requests: int, output_len: int) -> Part:
    """Take requests evenly over the lengths, the longest among them, cut to `output_len` tokens each, all at once."""
    sizes = [len(item.prompt) + item.output_len for item in timed.items]
    numbers = spread(range(len(sizes)), sizes, min(num_requests, len(sizes)))
    items = [Item(0.0, timed.items[i].prompt, min(timed.items[i].output_len, output_len)) for i in numbers]
    return Part(Workload(timed.name, tuple(items)), tuple(numbers))


def spread(numbers: Sequence[int], sizes: Sequence[int], count: int) -> list[int]:
    """Choose `count` of `numbers` at even ranks of their sizes, from the largest to the smallest. Returns them in order."""
    ranked = sorted(numbers, key=lambda number: -sizes[number])
    ranks = np.linspace(0, len(ranked) - 1, count).round().astype(int)
    return sorted(ranked[rank] for rank in ranks)


def pauses(workload: Workload) -> float:
    """Seconds of arrivals and pauses until the last request may be sent."""
    until: list[float] = []
    for item in workload.items:
        until.append(item.arrival if item.after is None else until[item.after] + item.think)
    return max(until)


def step_sizes(steps: Sequence[StepRecord]) -> set[tuple[bool, int]]:
    """The sizes of steps: whether every sequence has one token, and the number of tokens rounded up to a power of two."""
    tokens = [(len(step.counts), int(step.counts.sum())) for step in steps]
    return {(seqs == total, (max(total, 1) - 1).bit_length()) for seqs, total in tokens}


def coverage(
    timed: Workload,
    compared: Mapping[str, Sequence[int]],
    part: Part,
    passed: Mapping[str, Sequence[StepRecord]],
    windows: Mapping[str, Sequence[StepRecord]],
) -> dict[str, Any]:
    """Count the compared work against the timed work, for the engine with the least.

    `compared` has for each engine the compared tokens of each request of `part`; `passed` and `windows` have the steps of each
    engine that logs them, in the pass and in a timed window.
    """
    items = part.workload.items
    longest = [max(len(item.prompt) + n for item, n in zip(items, counts, strict=True)) for counts in compared.values()]
    sizes = [
        (step_sizes(windows[label]) & step_sizes(passed[label]), step_sizes(windows[label]))
        for label in windows & passed.keys()
    ]
    both, all_sizes = min(sizes, key=lambda pair: len(pair[0]) / max(len(pair[1]), 1), default=(None, None))
    return {
        "requests": len(items),
        "timed_requests": len(timed.items),
        "tokens": min(map(sum, compared.values()), default=0),
        "timed_tokens": sum(item.output_len for item in timed.items),
        "longest": min(longest, default=0),
        "timed_longest": timed.longest,
        "step_sizes": None if both is None else len(both),
        "timed_step_sizes": None if all_sizes is None else len(all_sizes),
    }
