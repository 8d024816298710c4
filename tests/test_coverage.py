"""The float32 pass repeats the timed schedule with shorter outputs, and states its share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from common.step_log import StepRecord
from experiments.correctness.coverage import cover, coverage, sample, step_sizes
from experiments.load.workload import Item, Lengths, Workload, WorkloadConfig, draw

RAGGED = WorkloadConfig(
    name="ragged",
    num_requests=64,
    prompt_len=Lengths(mu=4.7, sigma=0.8, low=8, high=1024),
    output_len=Lengths(mu=4.5, sigma=0.7, low=8, high=512),
)
TIMED = draw(RAGGED, 0, 100)


def total(workload: Workload) -> int:
    return sum(len(item.prompt) + item.output_len for item in workload.items)


def test_all_requests_run_with_shorter_outputs_and_the_longest_is_whole() -> None:
    part = cover(TIMED, 12_288)
    assert part.numbers == tuple(range(64)) and total(part.workload) <= 12_288 + 64
    assert part.workload.longest == TIMED.longest == 1041
    assert [item.prompt for item in part.workload.items] == [item.prompt for item in TIMED.items]
    assert cover(TIMED, 20_000).workload == TIMED


def test_where_prompts_do_not_fit_requests_are_chosen_evenly_over_the_lengths() -> None:
    part = cover(TIMED, 4_096)
    sizes = sorted(len(TIMED.items[n].prompt) + TIMED.items[n].output_len for n in range(64))
    kept = sorted(len(TIMED.items[n].prompt) + TIMED.items[n].output_len for n in part.numbers)
    assert 8 < len(kept) < 64 and (kept[0], kept[-1]) == (sizes[0], sizes[-1]) and total(part.workload) < 4_200
    assert list(part.numbers) == sorted(part.numbers)
    assert len(cover(TIMED, 5).numbers) == 1  # no request fits: the shortest runs


def test_the_schedule_stays() -> None:
    talk = Workload("w", (Item(0.0, (1,) * 9, 8), Item(0.0, (1,) * 30, 8, 0, 30.0), Item(60.0, (1,) * 20, 8)), concurrency=2)
    part = cover(talk, 1000).workload
    assert part.concurrency == 2 and [item.after for item in part.items] == [None, 0, None]
    assert [item.arrival for item in part.items] == [0.0, 0.0, 10.0] and part.items[1].think == 5.0
    two = cover(replace(talk, concurrency=None), 42)  # without the first turn the second waits for none
    assert all(item.after is None or item.after < place for place, item in enumerate(two.workload.items))


def test_a_sample_has_the_longest_request() -> None:
    part = sample(TIMED, 8, 64)
    assert len(part.numbers) == 8 and 10 in part.numbers  # the longest
    assert all(item.output_len <= 64 and item.arrival == 0.0 for item in part.workload.items)


def step(*counts: int) -> StepRecord:
    return StepRecord(0.0, 1.0, len(counts), np.array(counts), np.array(counts), np.zeros(len(counts)))


def test_the_share_is_counted_for_the_engine_with_the_least() -> None:
    timed = Workload("w", (Item(0.0, (1,) * 9, 8), Item(0.0, (1,) * 30, 8)))
    steps = {"jax": [step(9, 30), step(1, 1)], "torch": [step(39), step(1), step(1, 1)]}
    assert step_sizes(steps["torch"]) == {(False, 6), (True, 0), (True, 1)}
    found = coverage(timed, {"torch": [8, 4]}, cover(timed, 100), {"torch": steps["torch"][:2]}, steps)
    assert (found["tokens"], found["timed_tokens"], found["longest"], found["timed_longest"]) == (12, 16, 34, 38)
    assert (found["step_sizes"], found["timed_step_sizes"]) == (2, 3)
    assert coverage(timed, {"hf": [8, 8]}, cover(timed, 100), {}, {})["step_sizes"] is None
