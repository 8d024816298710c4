"""The ideas of the scheduler left out one at a time: what each then does step by step, and that no output depends on it.

`tests.schedule_driver` draws the same options at random and judges every step.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from common.config import EngineConfig
from common.engine import Engine
from common.errors import RequestError
from common.request import Request, SamplingParams, Status
from experiments.engines.compose import engine_specs
from experiments.load.workload import Lengths, WorkloadConfig
from experiments.options import resolved
from tests.history_runner import HistoryRunner, expected
from tests.test_configs import composed, hydra_initialized
from tests.test_scheduler import assert_empty, land, make_scheduler, request, scheduled, turn

POLICIES: dict[str, dict[str, Any]] = {
    "baseline": {},
    "static": {"schedule": "static"},
    "dense": {"cache": "dense", "enable_prefix_caching": False},
    "no prefix cache": {"enable_prefix_caching": False},
    "whole prompts": {"enable_chunked_prefill": False},
    "nothing": {"schedule": "static", "cache": "dense", "enable_prefix_caching": False, "enable_chunked_prefill": False},
}


# ── static batches ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nobody_joins_a_static_batch_before_all_of_it_have_ended() -> None:
    scheduler = make_scheduler(schedule="static")
    scheduler.add(request("short", 5, max_tokens=1))
    scheduler.add(request("long", 7, max_tokens=4))
    steps = []
    for number in range(6):
        step = scheduler.schedule()
        steps.append(scheduled(step))
        land(scheduler, step)
        if number == 0:  # half the batch has ended
            scheduler.add(request("late", 3, max_tokens=2))
    assert steps == [{"short": 5, "long": 7}, {"long": 1}, {"long": 1}, {"long": 1}, {"late": 3}, {"late": 1}]
    assert_empty(scheduler)


def test_a_static_batch_has_at_most_max_num_seqs_and_enters_as_fast_as_its_prompts_are_computed() -> None:
    scheduler = make_scheduler(schedule="static", max_num_seqs=3, max_num_batched_tokens=50)
    for name in "abcd":
        scheduler.add(request(name, 40, max_tokens=3))
    steps = []
    while scheduler.live:
        step = scheduler.schedule()
        steps.append(scheduled(step))
        land(scheduler, step)
    assert steps[:3] == [{"a": 40, "b": 10}, {"a": 1, "b": 30, "c": 19}, {"a": 1, "b": 1, "c": 21}]
    assert [sorted(step) for step in steps[3:]] == [["b", "c"], ["c"], ["d"], ["d"], ["d"]]


def test_a_static_batch_is_closed_when_pages_run_out() -> None:
    scheduler = make_scheduler(schedule="static", num_pages=6, prefix_caching=False)
    for name in "abc":
        scheduler.add(request(name, 30, max_tokens=2))
    step = scheduler.schedule()
    assert scheduled(step) == {"a": 30, "b": 30}  # two of five pages each; c lacks one
    land(scheduler, step)
    scheduler.end("a", Status.FINISHED_ABORT)
    assert scheduler.pool.num_free == 3 and scheduled(scheduler.schedule()) == {"b": 1}


def test_a_member_of_a_static_batch_that_was_preempted_comes_back_before_the_next_batch() -> None:
    scheduler = make_scheduler(schedule="static", num_pages=6, prefix_caching=False)
    scheduler.add(request("old", 31, max_tokens=10))
    scheduler.add(request("young", 31, max_tokens=10))
    scheduler.add(request("next", 31, max_tokens=10))
    order: list[str] = []
    while scheduler.live:
        step = scheduler.schedule()
        order += [name for name in scheduled(step) if name not in order[-1:]]
        land(scheduler, step)
    assert scheduler.num_preemptions == 1
    assert order.index("next") > max(i for i, name in enumerate(order) if name == "young")
    assert_empty(scheduler)


def test_the_next_static_batch_waits_for_the_steps_in_flight_of_the_last() -> None:
    scheduler = make_scheduler(schedule="static", depth=1)
    scheduler.add(request("a", 5))
    flying = scheduler.schedule()
    scheduler.end("a", Status.FINISHED_ABORT)
    scheduler.add(request("b", 5))
    assert scheduler.schedule() is None
    land(scheduler, flying)
    assert scheduled(scheduler.schedule()) == {"b": 5}


# ── a dense cache ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_dense_cache_takes_all_pages_a_request_can_need_when_it_starts_and_never_preempts() -> None:
    scheduler = make_scheduler(cache="dense", num_pages=6, prefix_caching=False)
    for name in "ab":
        scheduler.add(request(name, 20, max_tokens=29))  # 48 tokens with KV: three of five pages
    turn(scheduler)
    assert len(scheduler.live["a"].pages) == 3 and scheduler.live["b"].status is Status.WAITING
    while scheduler.live:
        turn(scheduler)
    assert scheduler.num_preemptions == 0
    assert_empty(scheduler)


def test_a_dense_cache_takes_in_the_largest_request_that_a_paged_one_does() -> None:
    for cache in ("paged", "dense"):
        scheduler = make_scheduler(cache=cache, num_pages=4, max_model_len=100, prefix_caching=False)
        scheduler.add(request("r", 40, max_tokens=9))
        with pytest.raises(RequestError, match="at most 9"):
            scheduler.add(request("s", 40, max_tokens=10))
        while scheduler.live:
            turn(scheduler)


def test_without_max_tokens_a_dense_cache_takes_pages_for_the_whole_context() -> None:
    scheduler = make_scheduler(cache="dense", max_model_len=100, prefix_caching=False)
    scheduler.add(request("r", 10, max_tokens=None))
    turn(scheduler)
    assert len(scheduler.live["r"].pages) == 7  # 99 tokens: nothing follows the last


# ── whole prompts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_longer_than_a_step_is_refused_with_the_numbers() -> None:
    scheduler = make_scheduler(chunked_prefill=False, max_num_batched_tokens=100)
    scheduler.add(request("fits", 100))
    with pytest.raises(RequestError, match=r"prompt of 101 tokens .* step of 100 \(max_num_batched_tokens\)"):
        scheduler.add(request("long", 101))
    assert list(scheduler.live) == ["fits"]


def test_a_prompt_waits_for_a_step_with_room_for_all_of_it() -> None:
    scheduler = make_scheduler(chunked_prefill=False, max_num_batched_tokens=100)
    scheduler.add(request("a", 60, max_tokens=3))
    turn(scheduler)
    scheduler.add(request("b", 100, max_tokens=1))
    scheduler.add(request("c", 1, max_tokens=1))
    steps = []
    while scheduler.live:
        step = scheduler.schedule()
        steps.append(scheduled(step))
        land(scheduler, step)
    assert steps == [{"a": 1}, {"a": 1}, {"b": 100}, {"c": 1}]  # beside a there is room for 99, and c does not pass b


def test_only_what_the_prefix_cache_does_not_have_must_fit_a_step() -> None:
    scheduler = make_scheduler(chunked_prefill=False, max_num_batched_tokens=100)
    scheduler.add(request("a", list(range(90)), max_tokens=2))
    turn(scheduler)
    scheduler.add(request("b", [*range(90), *[5] * 10]))
    assert scheduled(scheduler.schedule()) == {"a": 1, "b": 20}


def test_a_preempted_request_that_has_outgrown_a_step_is_computed_in_parts() -> None:
    options = {"chunked_prefill": False, "prefix_caching": False, "max_num_batched_tokens": 32, "num_pages": 6}
    scheduler = make_scheduler(**options)
    scheduler.add(request("old", 20, max_tokens=30))
    scheduler.add(request("young", 20, max_tokens=30))
    young = scheduler.live["young"]
    seen = []
    while scheduler.live:
        step = scheduler.schedule()
        seen.append(scheduled(step).get("young", 0))
        land(scheduler, step)
    assert [count for count in seen if count > 1] == [20, 32] and scheduler.num_preemptions == 1 and young.output == [7] * 30
    assert seen[seen.index(32) + 1] == 1
    assert_empty(scheduler)


def test_a_whole_prompt_is_not_shortened_to_a_bucket() -> None:
    buckets = (64, 256, 512)
    for chunked, count in ((True, 256), (False, 300)):
        scheduler = make_scheduler(chunked_prefill=chunked, buckets=buckets, max_num_batched_tokens=512)
        scheduler.add(request("r", 300))
        assert scheduled(scheduler.schedule()) == {"r": count}


# ── all of them ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("name", POLICIES)
def test_no_output_depends_on_a_policy(name: str, depth: int) -> None:
    runner = HistoryRunner(num_pages=14, block_size=4, vocab_size=50, max_seqs=4, depth=depth)
    config = EngineConfig(block_size=4, max_num_seqs=4, max_num_batched_tokens=24, max_model_len=48, **POLICIES[name])
    engine = Engine(runner, config, num_pages=14)
    requests = [
        Request(
            request_id=f"{i}",
            prompt_token_ids=[*range(8), *range(i, i + 1 + 5 * i % 12)],
            params=SamplingParams(temperature=i % 2, seed=i, max_tokens=1 + 7 * i % 20),
        )
        for i in range(12)
    ]
    events = engine.run(requests)
    for one in requests:
        right = expected(one, vocab_size=50, max_tokens=20, seed=0)
        assert [event.token_id for event in events[one.request_id]] == right.tokens
        assert events[one.request_id][-1].finish is right.finish
    assert not runner.violations and engine.stats()["num_resets"] == 0
    assert (engine.stats()["prefix_cache_hits"] > 0) == config.enable_prefix_caching
    assert_empty(engine.scheduler)


def test_the_experiment_leaves_out_one_idea_at_a_time() -> None:
    config = composed("compare", "experiment=ablations", "ablate.backend=jax", "ablate.num_blocks=99")
    with hydra_initialized():
        *ours, outside = (spec.config for spec in engine_specs(config))
    base, *variants = (asdict(one) for one in ours)
    assert base["num_blocks"] == 99 and (outside.schedule, outside.max_num_seqs) == ("static", base["max_num_seqs"])
    changed = [{name: value for name, value in one.items() if value != base[name]} for one in variants]
    assert changed == [POLICIES[name] for name in ("static", "dense", "no prefix cache", "whole prompts")]
    longest = WorkloadConfig.of(resolved(config.workload))
    assert isinstance(longest.prompt_len, Lengths)
    assert longest.prefix_len + longest.prompt_len.high <= base["max_num_batched_tokens"]  # or a whole prompt is refused
