"""Random work through scheduler, pages and engine, judged after every step: 100,000 of them here, a million in `make fuzz`."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest

from common.config import EngineConfig
from common.engine import Engine
from common.errors import DrainingError, QueueFullError
from common.request import Request, SamplingParams, Status
from common.schedule.fault_isolation import CULPRITS, MOST_RAISED
from tests.history_runner import HistoryRunner
from tests.schedule_driver import Episode

STEPS = 200
"""Of random work in an episode; what is left over is then run to its end."""
WAYS = [(0, False), (1, False), (2, False), (2, True)]
"""Steps in flight, and whether in stages."""


def run_episodes(seeds: Iterable[int], depth: int, pipelined: bool = False) -> Counter:
    """Run one episode a seed; returns totals. A violation names its arguments, so `Episode(…).run(STEPS)` repeats it."""
    totals: Counter = Counter()
    for seed in seeds:
        episode = Episode(seed, depth, pipelined)
        try:
            episode.run(STEPS)
        except Exception as error:
            raise AssertionError(f"Episode({seed}, {depth}, {pipelined}) at step {episode.steps}: {error}") from error
        stats, scheduler = episode.engine.stats(), episode.engine.scheduler
        totals += episode.finished + Counter(
            steps=episode.steps,
            preemptions=stats["num_preemptions"],
            hits=stats["prefix_cache_hits"],
            resets=stats["num_resets"],
            evictions=episode.evictions,
            refused=episode.refused[QueueFullError],
            drained=episode.refused[DrainingError],
            deep=episode.deep,
            trials=episode.on_trial,
            fills=sum(len(batch.fill_at) for batch in episode.batches),
            spoilt=sum("not finite" in error for error in episode.errors),
            culprits=sum("keep raising" in error for error in episode.errors),
            forks=scheduler.num_forks,
            copies=sum(batch.copies.shape[1] for batch in episode.batches),
            changed=sum(batch.adjusts for batch in episode.batches),
            masked=sum(batch.mask_rows is not None for batch in episode.batches),
            scored=sum(batch.score_ids is not None for batch in episode.batches),
            static=scheduler.static,
            dense=scheduler.dense,
            whole=not scheduler.chunked_prefill,
        )
    return totals


def expect_busy(totals: Counter, episodes: int, fills: bool) -> None:
    """The work was worth judging: all that can happen did, and often. `fills`: tokens that only the device knew, too."""
    often = {"steps": 25_500, "deep": 7000} | ({"fills": 9000} if fills else {})
    often |= {"preemptions": 225, "hits": 1500, "evictions": 750, "forks": 225, "copies": 75}
    often |= {"resets": 75, "trials": 1750, "culprits": 75, "spoilt": 115, "refused": 225, "drained": 45}
    often |= {"changed": 2250, "masked": 375, "scored": 375}
    often |= dict.fromkeys(("static", "dense", "whole"), 15) | dict.fromkeys((s for s in Status if s.finished), 40)
    for what, least in often.items():
        assert totals[what] > least * episodes // 120, (what, totals)


@pytest.mark.parametrize(("depth", "pipelined"), WAYS)
def test_random_work_leaves_every_invariant_standing_and_every_output_right(depth: int, pipelined: bool) -> None:
    totals = run_episodes(range(depth * 1000, depth * 1000 + 60), depth, pipelined)
    expect_busy(totals, 60, fills=depth > 0 and not pipelined)


def test_a_request_waits_for_a_parent_that_begins_again_in_the_same_step() -> None:
    """The last suspect of a trial ends: the step sends the others back and admits them anew, and their children wait."""
    Episode(111_098, 1).run(STEPS)


def test_culprits_one_after_another_take_no_innocent_with_them() -> None:
    """One request at a time: two that raise, and then a step that raises by itself, none of which has landed before."""
    runner = HistoryRunner(num_pages=8, vocab_size=32, max_seqs=1)
    config = EngineConfig(max_num_seqs=1, max_num_batched_tokens=8, max_model_len=32)
    engine, by_itself = Engine(runner, config, num_pages=8), iter([True])
    runner.poison_of = lambda batch: RuntimeError("poison") if batch.token_ids[0] < 2 or next(by_itself, False) else None
    events = engine.run(
        Request(request_id=str(i), prompt_token_ids=(i,), params=SamplingParams(max_tokens=3)) for i in range(3)
    )
    ends = [events[str(i)][-1].finish for i in range(3)]
    assert ends == [Status.FINISHED_ERROR, Status.FINISHED_ERROR, Status.FINISHED_LENGTH]
    assert runner.faults == 2 * (1 + MOST_RAISED) + 1


@pytest.mark.parametrize("before", [0, 1, 4])
@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 7, 9, 16, 31, 64])
def test_eight_culprits_side_by_side_take_no_innocent_with_them(max_num_seqs: int, before: int) -> None:
    runner = HistoryRunner(num_pages=300, vocab_size=128, max_seqs=max_num_seqs)
    config = EngineConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=128, max_model_len=32)
    engine = Engine(runner, config, num_pages=300)
    culprits = range(before, before + CULPRITS)
    runner.poison_of = lambda batch: (
        RuntimeError("poison") if np.isin(engine.scheduler.rows.tokens[batch.rows, 0], culprits).any() else None
    )
    numbers = range(before + CULPRITS + max_num_seqs + 1)
    events = engine.run(Request(request_id=str(i), prompt_token_ids=(i,), params=SamplingParams(max_tokens=3)) for i in numbers)
    assert [i for i in numbers if events[str(i)][-1].finish is Status.FINISHED_ERROR] == list(culprits)


def test_a_culprit_that_ends_while_its_step_computes_takes_no_innocent_with_it() -> None:
    """Three in a step that raises, two of them on trial in the next; the client of the one to blame leaves before it lands."""
    runner = HistoryRunner(num_pages=16, vocab_size=32, max_seqs=4, depth=1)
    engine = Engine(runner, EngineConfig(max_num_seqs=4, max_num_batched_tokens=8, max_model_len=32), num_pages=16)
    runner.fails_late = True
    runner.poison_of = lambda batch: RuntimeError("poison") if 2 in engine.scheduler.rows.tokens[batch.rows, 0] else None
    events = []
    for i in range(3):
        engine.add(Request(request_id=str(i), prompt_token_ids=(i,), params=SamplingParams(max_tokens=3)))
    while not (engine._in_flight and [len(group) for group in engine.scheduler.trials.groups] == [2]):
        events += engine.step()
    assert engine.abort("2")
    while engine.has_work:
        events += engine.step()
    ends = {event.request_id: event.finish for event in events if event.finish}
    assert ends == {"0": Status.FINISHED_LENGTH, "1": Status.FINISHED_LENGTH, "2": Status.FINISHED_ABORT}


@pytest.mark.fuzz
@pytest.mark.parametrize(("depth", "pipelined"), WAYS)
def test_a_million_steps_of_random_work(depth: int, pipelined: bool) -> None:
    totals = run_episodes(range(100_000 + depth * 10_000, 100_000 + depth * 10_000 + 1600), depth, pipelined)
    expect_busy(totals, 1600, fills=depth > 0 and not pipelined)


def trajectory(seed: int, depth: int) -> str:
    """A hash of every batch that an episode submits: tokens, pages, rows, order, all of it."""
    episode = Episode(seed, depth)
    episode.run(STEPS)
    return hashlib.sha256(b"".join(batch.buffer.tobytes() for batch in episode.batches)).hexdigest()


def test_the_same_work_takes_the_same_course_in_every_process() -> None:
    """Nothing hangs on the secret of the page keys, on the hash seed of the interpreter, or on time (P19)."""
    here = [trajectory(seed, seed % 3) for seed in range(6)]
    assert here == [trajectory(seed, seed % 3) for seed in range(6)] and len(set(here)) == 6
    program = "from tests.test_fuzz_schedule import trajectory; print([trajectory(s, s % 3) for s in range(6)])"
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == str(here)
