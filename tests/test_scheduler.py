"""The scheduler by itself, with results made by hand. Numbered checks are those of vLLM's own tests, with their numbers."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.errors import RequestError
from common.interface import Caps, Result
from common.request import STUCK, Request, SamplingParams, Status, TokenEvent
from common.sampling.seeds import mix64
from common.schedule.scheduler import Scheduler
from common.schedule.sequence import LifecycleError, Sequence
from common.schedule.step import Step
from tests.schedule_driver import check_pages, check_sequences, free_pages

EOS = 99


def make_scheduler(**options: Any) -> Scheduler:
    """Page size 16 and a budget of 1024 unless told; `buckets`, `depth` and `pipelined` go into the caps."""
    caps = Caps(
        backend="none",
        device="none",
        dtypes=(),
        kernels=(),
        token_buckets=(buckets := options.pop("buckets", ())),
        decode_buckets=buckets,
        depth=options.pop("depth", 0),
        pipelined=options.pop("pipelined", False),
    )
    numbers = {"num_pages": 1000, "block_size": 16, "max_num_seqs": 16, "max_num_batched_tokens": 1024, "max_model_len": 2048}
    return Scheduler(caps, **(numbers | options))


def request(
    name: str, prompt: Many[int] | int, max_tokens: int | None = 16, salt: str = "", priority: int = 0, **params: Any
) -> Request:
    """`prompt`: tokens, or a number of tokens that no other request has."""
    tokens = [hash_of(name, i) for i in range(prompt)] if isinstance(prompt, int) else list(prompt)
    return Request(
        request_id=name,
        prompt_token_ids=tokens,
        params=SamplingParams(max_tokens=max_tokens, **params),
        eos_token_ids=(EOS,),
        cache_salt=salt,
        priority=priority,
    )


def hash_of(name: str, i: int) -> int:
    return 1000 + mix64(sum(name.encode()), i) % (1 << 30)


def scheduled(step: Step | None) -> dict[str, int]:
    """Tokens of each request in a step."""
    assert step is not None
    return {s.request.request_id: int(n) for s, n in zip(step.seqs, np.diff(step.batch.query_starts), strict=True)}


def land(scheduler: Scheduler, step: Step | None, *tokens: int | list[int]) -> list[TokenEvent]:
    """Give each sampling sequence of the step its token (or tokens), 7 if none are said."""
    assert step is not None
    owners = step.batch.logit_owner.tolist()
    given = [[t] if isinstance(t, int) else t for t in tokens] or [[7]] * len(owners)
    counts = np.zeros(len(step.seqs) + 1, np.int32)
    counts[np.array(owners, np.int32) + 1] = [len(g) for g in given]
    flat = np.array([t for g in given for t in g], np.int32)
    result = Result(tokens=flat, token_starts=counts.cumsum(), finite=np.ones(len(owners), bool))
    return scheduler.update(step, result, 0.0)


def turn(scheduler: Scheduler, *tokens: int | list[int]) -> list[TokenEvent]:
    """One step from schedule to update."""
    return land(scheduler, scheduler.schedule(), *tokens)


def assert_empty(scheduler: Scheduler) -> None:
    check_pages(scheduler)
    check_sequences(scheduler)
    assert not scheduler.live and not scheduler.running and not scheduler.waiting
    assert not scheduler.leaving and not any(scheduler.pool.refs) and len(scheduler.rows.free) == scheduler.max_num_seqs
    assert scheduler.pool.num_free == scheduler.pool.num_pages - 1


# ── pages of requests ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_check_1_prefill() -> None:
    scheduler = make_scheduler(num_pages=11)
    pool, common = scheduler.pool, list(range(48))
    scheduler.add(request("r0", [*common, *[3] * 7]))
    turn(scheduler)
    r0 = scheduler.live["r0"]
    assert r0.pages == [1, 2, 3, 4]
    assert [pool.keys[page] is not None for page in r0.pages] == [True, True, True, False]

    scheduler.add(request("r1", [*common, *[4] * 5]))
    step = scheduler.schedule()
    r1 = scheduler.live["r1"]
    assert r1.pages == [1, 2, 3, 5] and scheduled(step) == {"r0": 1, "r1": 5}
    assert [pool.refs[page] for page in (1, 2, 3)] == [2, 2, 2] and pool.num_free == 5
    land(scheduler, step)

    scheduler.end("r0", Status.FINISHED_ABORT)
    scheduler.end("r1", Status.FINISHED_ABORT)
    assert free_pages(pool) == [5, 4, 6, 7, 8, 9, 10, 3, 2, 1]

    scheduler.add(request("r2", [*common, *[5] * 6]))
    assert scheduled(scheduler.schedule()) == {"r2": 6}
    assert scheduler.live["r2"].pages == [1, 2, 3, 5]
    scheduler.end("r2", Status.FINISHED_ABORT)


def test_check_1_a_request_as_large_as_the_pool_takes_every_page_in_eviction_order() -> None:
    scheduler = make_scheduler(num_pages=11)
    for name, tail in (("r0", 7), ("r1", 5)):
        scheduler.add(request(name, [*range(48), *[tail] * tail]))
        turn(scheduler)
    for name in ("r0", "r1"):
        scheduler.end(name, Status.FINISHED_ABORT)
    scheduler.add(request("r3", 160, max_tokens=1))
    step = scheduler.schedule()
    assert scheduler.live["r3"].pages == [5, 4, 6, 7, 8, 9, 10, 3, 2, 1] and scheduler.pool.num_free == 0
    land(scheduler, step)
    assert_empty(scheduler)


def test_check_3_decode() -> None:
    scheduler = make_scheduler(num_pages=11)
    scheduler.add(request("r0", 55, max_tokens=100))
    turn(scheduler)
    seq, keys = scheduler.live["r0"], scheduler.pool.keys
    assert len(seq.pages) == 4
    for _ in range(4):
        turn(scheduler)
    assert seq.computed == 59 and len(seq.pages) == 4 and keys[seq.pages[-1]] is None
    for _ in range(19):
        turn(scheduler)
    assert seq.computed == 78 and len(seq.pages) == 5
    assert keys[seq.pages[-2]] is not None and keys[seq.pages[-1]] is None


def test_check_4_evict() -> None:
    scheduler = make_scheduler(num_pages=11)
    first, second = list(range(87)), list(range(100, 148))
    scheduler.add(request("r0", first))
    scheduler.add(request("r1", second))
    turn(scheduler)
    assert scheduler.live["r0"].pages == [1, 2, 3, 4, 5, 6] and scheduler.live["r1"].pages == [7, 8, 9]
    scheduler.end("r0", Status.FINISHED_ABORT)
    assert free_pages(scheduler.pool) == [6, 10, 5, 4, 3, 2, 1]
    scheduler.end("r1", Status.FINISHED_ABORT)
    assert free_pages(scheduler.pool) == [6, 10, 5, 4, 3, 2, 1, 9, 8, 7]
    scheduler.add(request("r2", [*first[:32], 5, 5, 5]))
    assert scheduled(scheduler.schedule()) == {"r2": 3} and scheduler.live["r2"].pages == [1, 2, 6]


def test_check_7_an_admission_that_fails_leaves_the_pages_it_would_have_shared_as_they_were() -> None:
    scheduler = make_scheduler(num_pages=7)
    common = list(range(48))
    scheduler.add(request("r0", [*common, 1]))
    turn(scheduler)
    scheduler.add(request("r1", [*common, *[2] * 48], max_tokens=1))  # three hits and three more pages, two are free
    before = (list(scheduler.pool.refs), free_pages(scheduler.pool))
    assert scheduled(scheduler.schedule()) == {"r0": 1}
    assert (list(scheduler.pool.refs), free_pages(scheduler.pool)) == before
    assert scheduler.live["r1"].status is Status.WAITING


def test_check_9_only_requests_of_one_salt_share_pages() -> None:
    scheduler, prompt = make_scheduler(), list(range(50))
    scheduler.add(request("a", prompt, salt="x"))
    turn(scheduler)
    scheduler.add(request("b", prompt, salt="x"))
    scheduler.add(request("c", prompt, salt="y"))
    scheduler.add(request("d", prompt))
    assert scheduled(scheduler.schedule()) == {"a": 1, "b": 2, "c": 50, "d": 50}


def test_check_10_the_prefix_cache_is_not_reset_under_a_running_request() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("r0", 55))
    turn(scheduler)
    assert not scheduler.pool.forget()
    scheduler.end("r0", Status.FINISHED_ABORT)
    assert scheduler.pool.forget() and not any(scheduler.pool.keys)


def test_check_11_without_prefix_caching_nothing_is_published_or_shared() -> None:
    """Check 11's events of stored and removed pages have no counterpart here; its free list is tested in test_pages."""
    scheduler = make_scheduler(prefix_caching=False)
    for name in ("r0", "r1"):
        scheduler.add(request(name, list(range(48))))
        assert scheduled(scheduler.schedule())[name] == 48
        scheduler.end(name, Status.FINISHED_ABORT)
    assert not any(scheduler.pool.keys) and scheduler.prefix_cache_queries == 96 and scheduler.prefix_cache_hits == 0


def test_a_prompt_of_whole_pages_that_is_cached_entirely_computes_its_last_page_anew() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("r0", list(range(64))))
    turn(scheduler)
    scheduler.add(request("r1", list(range(64))))
    assert scheduled(scheduler.schedule()) == {"r0": 1, "r1": 16}
    assert scheduler.prefix_cache_hits == 48 and scheduler.prefix_cache_queries == 128


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("chunk", [1, 15, 16, 17, 100])
def test_pages_at_every_boundary(length: int, chunk: int) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=chunk)
    scheduler.add(request("r", length, max_tokens=34))
    seq = scheduler.live["r"]
    for _ in range(-(-length // chunk) + 33):
        turn(scheduler)
        check_pages(scheduler)
        check_sequences(scheduler)
    assert seq.output == [7] * 34 and seq.status is Status.FINISHED_LENGTH
    assert_empty(scheduler)
    assert len(scheduler.pool.cached) == (length + 33) // 16  # every token but the last has KV


# ── who runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_check_12_concurrent_partial_requests() -> None:
    scheduler = make_scheduler(prefix_caching=False)
    for name in "abc":
        scheduler.add(request(name, 800))
    steps = []
    for _ in range(3):
        step = scheduler.schedule()
        steps.append(scheduled(step))
        land(scheduler, step)
    assert steps == [{"a": 800, "b": 224}, {"a": 1, "b": 576, "c": 447}, {"a": 1, "b": 1, "c": 353}]


@pytest.mark.parametrize(("chunked", "first"), [(True, {"a": 800, "b": 224}), (False, {"a": 800})])
def test_check_13_order_of_arrival_is_kept(chunked: bool, first: dict[str, int]) -> None:
    scheduler = make_scheduler(chunked_prefill=chunked)
    for name, length in zip("abcd", (800, 800, 10, 10), strict=True):
        scheduler.add(request(name, length))
    assert scheduled(scheduler.schedule()) == first


def test_check_14_preemption_of_a_request_with_a_step_in_flight_keeps_that_steps_token() -> None:
    """In vLLM r0 runs on at once in the pages of r1. DESIGN.md stands: they are not reusable before r1's step has landed."""
    scheduler = make_scheduler(num_pages=11, prefix_caching=False, depth=1)
    scheduler.add(request("r0", 80))
    scheduler.add(request("r1", 80))
    first = scheduler.schedule()
    r0, r1 = scheduler.live["r0"], scheduler.live["r1"]
    assert scheduled(first) == {"r0": 80, "r1": 80} and scheduler.pool.num_free == 0
    assert scheduler.schedule() is None  # r0 needs a page, r1 must give way, and its pages are still being written
    assert r0.status is Status.RUNNING and r1.status is Status.PREEMPTED and scheduler.num_preemptions == 1
    assert scheduler.pool.num_free == 0 and r1.row not in scheduler.rows.free
    land(scheduler, first, 0, 42)
    assert r1.output == [42] and scheduler.pool.num_free == 5
    assert scheduled(scheduler.schedule()) == {"r0": 1}


def test_the_youngest_gives_way_and_resumes_with_its_output_as_part_of_its_prompt() -> None:
    scheduler = make_scheduler(num_pages=6, prefix_caching=False)
    scheduler.add(request("old", 31, max_tokens=40))
    scheduler.add(request("young", 31, max_tokens=20))
    turn(scheduler, 1, 2)
    turn(scheduler, 3, 4)  # both stand at 32 tokens with KV, in four of five pages
    step = scheduler.schedule()
    young = scheduler.live["young"]
    assert scheduled(step) == {"old": 1} and young.status is Status.PREEMPTED and young.output == [2, 4]
    while young.status is Status.PREEMPTED:
        land(scheduler, step)
        step = scheduler.schedule()
    assert scheduled(step) == {"young": 33} and young.output == [2, 4]
    land(scheduler, step, 6)
    assert young.output == [2, 4, 6]


def run_short_of_pages(priorities: dict[str, int]) -> Scheduler:
    """Requests of 30 tokens with two pages each and nothing left, that have two tokens each and need a third page now."""
    scheduler = make_scheduler(num_pages=1 + 2 * len(priorities), prefix_caching=False)
    for name, priority in priorities.items():
        scheduler.add(request(name, 30, max_tokens=20, priority=priority))
    turn(scheduler)
    turn(scheduler)
    turn(scheduler)
    assert scheduler.pool.num_free == 0 and scheduler.num_preemptions == 0
    return scheduler


@pytest.mark.parametrize(
    ("priorities", "victim"),
    [
        ({"a": 5, "b": 0}, "a"),
        ({"a": 0, "b": 5}, "b"),
        ({"a": 1, "b": 1}, "b"),
        ({"a": 2, "b": 2, "c": -3}, "b"),
        ({"a": -1, "b": 7, "c": 3}, "b"),
    ],
    ids=str,
)
def test_check_15_the_least_urgent_gives_way_and_among_equals_the_youngest(priorities: dict[str, int], victim: str) -> None:
    scheduler = run_short_of_pages(priorities)
    seqs = dict(scheduler.live)
    step = scheduler.schedule()
    assert [name for name, seq in seqs.items() if seq.status is Status.PREEMPTED] == [victim]
    assert victim not in scheduled(step) and scheduler.num_preemptions == 1


def test_check_15_the_victim_resumes_with_its_output_as_part_of_its_prompt() -> None:
    scheduler = run_short_of_pages({"low": 5, "high": 0})
    low = scheduler.live["low"]
    assert low.output == [7] * 3
    while low.status is not Status.PREEMPTED:
        turn(scheduler)
    while low.status is Status.PREEMPTED:
        step = scheduler.schedule()
        if low.status is Status.PREEMPTED:
            land(scheduler, step)
    assert scheduled(step) == {"low": 33} and low.output == [7] * 3
    assert "high" not in scheduler.live


def test_check_15_admission_goes_by_priority_then_by_arrival() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name, priority in (("a", 3), ("b", 0), ("c", 3), ("d", -2), ("e", 0)):
        scheduler.add(request(name, 3, max_tokens=1, priority=priority))
    admitted = []
    while scheduler.live:
        step = scheduler.schedule()
        admitted += scheduled(step)
        land(scheduler, step)
    assert admitted == ["d", "b", "e", "a", "c"]


def test_an_urgent_request_overtakes_a_preempted_one() -> None:
    scheduler = run_short_of_pages({"old": 0, "low": 5})
    turn(scheduler)
    scheduler.add(request("urgent", 3, priority=1))
    assert scheduler.live["low"].status is Status.PREEMPTED
    assert list(scheduled(scheduler.schedule())) == ["old", "urgent"]


@pytest.mark.parametrize("priority", [1.0, "1", None, True, 2**63, -(2**63) - 1], ids=repr)
def test_a_priority_that_is_no_integer_of_64_bits_is_refused(priority: Any) -> None:
    with pytest.raises(RequestError, match="priority"):
        request("r", 3, priority=priority)


def test_a_request_goes_only_where_its_state_leads() -> None:
    ends = {status for status in Status if status.finished}
    assert {status.value for status in ends} == {"stop", "length", "abort", "timeout", "error"}
    onward = {
        Status.WAITING: {Status.RUNNING, *ends},
        Status.RUNNING: {Status.PREEMPTED, *ends},
        Status.PREEMPTED: {Status.RUNNING, *ends},
    }
    for before in Status:
        for after in Status:
            scheduler = make_scheduler()
            scheduler.add(request("r", 3))
            seq = scheduler.live["r"]
            seq.status = before
            if after in onward.get(before, ()):
                seq.become(after)
                assert seq.status is after
            else:
                with pytest.raises(LifecycleError, match="bug"):
                    seq.become(after)
                assert seq.status is before


def test_one_token_requests_run_before_a_more_urgent_requests_chunk() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=40)
    scheduler.add(request("short", 5))
    turn(scheduler)
    scheduler.add(request("long", 100, priority=-1))
    for _ in range(2):
        step = scheduler.schedule()
        assert list(scheduled(step).items()) == [("short", 1), ("long", 39)]
        assert step is not None and step.batch.num_decodes.tolist() == [1]
        land(scheduler, step)
    assert [seq.request.request_id for seq in scheduler.running] == ["long", "short"]


def test_every_running_request_decodes_even_beside_a_prompt_that_could_use_the_whole_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16, max_num_seqs=4)
    for name in "abc":
        scheduler.add(request(name, 1))
    turn(scheduler)
    scheduler.add(request("long", 100))
    assert scheduled(scheduler.schedule()) == {"a": 1, "b": 1, "c": 1, "long": 13}


def test_nobody_is_admitted_in_a_step_that_preempted() -> None:
    scheduler = make_scheduler(num_pages=4, prefix_caching=False)
    for name in ("a", "b"):
        scheduler.add(request(name, 16, max_tokens=20))
    turn(scheduler)
    scheduler.add(request("c", 1, max_tokens=1))
    assert scheduler.pool.num_free == 1
    step = scheduler.schedule()  # a takes the last page, b gives way; c would fit
    assert scheduled(step) == {"a": 1} and scheduler.pool.num_free == 1
    land(scheduler, step)
    assert scheduler.live["c"].status is Status.WAITING


def test_a_request_that_does_not_fit_yet_is_not_overtaken() -> None:
    scheduler = make_scheduler(num_pages=6)
    scheduler.add(request("a", 40))
    turn(scheduler)
    scheduler.add(request("b", 60))
    scheduler.add(request("c", 1))
    assert scheduled(scheduler.schedule()) == {"a": 1}


@pytest.mark.parametrize(
    ("lengths", "decodes", "expected_total"),
    [
        ([300], 0, 256),  # 256 now and 44 in 64 beat 300 in 512
        ([500], 0, 500),  # 512 now beats 256 and then 256
        ([64], 0, 64),
        ([30], 4, 32),  # 34 in 64; 32 now and 2 beside 4 decodes in 16 anyway
        ([20, 250], 0, 256),
    ],
)
def test_the_last_chunk_is_shortened_to_a_bucket_where_that_pads_less(
    lengths: list[int], decodes: int, expected_total: int
) -> None:
    scheduler = make_scheduler(buckets=(16, 32, 64, 128, 256, 512), max_num_batched_tokens=512)
    for i in range(decodes):
        scheduler.add(request(f"d{i}", 1))
    if decodes:
        turn(scheduler)
    for i, length in enumerate(lengths):
        scheduler.add(request(f"p{i}", length))
    assert sum(scheduled(scheduler.schedule()).values()) == expected_total


# ── ends ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_check_16a_eos_stops_and_is_no_stop_reason() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("r", 3))
    turn(scheduler, 10)
    (event,) = turn(scheduler, EOS)
    assert (event.token_id, event.finish, event.stop_reason) == (EOS, Status.FINISHED_STOP, None)
    assert_empty(scheduler)


def test_check_16b_a_stop_id_ends_a_burst_and_is_the_stop_reason() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("r", 3, stop_token_ids=[42]))
    events = turn(scheduler, [10, 42, 12])
    assert [e.token_id for e in events] == [10, 42]
    assert (events[-1].finish, events[-1].stop_reason) == (Status.FINISHED_STOP, 42)
    assert_empty(scheduler)


def test_check_16c_tokens_beyond_the_cap_are_dropped() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("r", 3, max_tokens=2))
    events = turn(scheduler, [10, 11, 12])
    assert [(e.token_id, e.finish) for e in events] == [(10, None), (11, Status.FINISHED_LENGTH)]
    assert_empty(scheduler)


def test_check_16d_ignore_eos_goes_on_but_stop_ids_still_end() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("r", 3, ignore_eos=True, stop_token_ids=[42]))
    assert [turn(scheduler, token)[0].finish for token in (EOS, EOS, 42)] == [None, None, Status.FINISHED_STOP]


def test_check_17_min_tokens_holds_off_eos_and_stop_ids() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("r", 3, min_tokens=2, stop_token_ids=[42]))
    masked, finish = [], []
    for token in (7, 7, EOS):
        step = scheduler.schedule()
        assert step is not None
        ids, edits = step.batch.edit_ids, step.batch.edits
        masked.append(set() if ids is None or edits is None else set(ids[edits[:, 0] == -np.inf].tolist()))
        finish.append(land(scheduler, step, token)[0].finish)
    assert masked == [{EOS, 42}, {EOS, 42}, set()]
    assert finish == [None, None, Status.FINISHED_STOP]


@pytest.mark.parametrize("token", [EOS, 42])
def test_a_masked_token_is_none_that_was_chosen_but_shows_that_nothing_was_left(token: int) -> None:
    scheduler = make_scheduler()
    scheduler.add(request("r", 3, min_tokens=3, stop_token_ids=[42]))
    turn(scheduler, 7)
    (event,) = turn(scheduler, token)
    assert (event.token_id, event.finish, event.error) == (None, Status.FINISHED_ERROR, STUCK)
    assert_empty(scheduler)


def test_check_17_min_tokens_does_not_hold_off_the_cap() -> None:
    """The case that vLLM lacks: its check for min_tokens came first, and such a request ran on for ever."""
    scheduler = make_scheduler(max_model_len=10)
    scheduler.add(request("r", 6, max_tokens=None, min_tokens=100))
    ends = [turn(scheduler, token)[0].finish for token in (7, 1, 2, 3)]
    assert ends == [None, None, None, Status.FINISHED_LENGTH]
    assert_empty(scheduler)


@pytest.mark.parametrize(
    ("token", "finish"), [(EOS, Status.FINISHED_STOP), (42, Status.FINISHED_STOP), (1, Status.FINISHED_LENGTH)]
)
def test_at_the_cap_a_stopping_token_is_the_reason(token: int, finish: Status) -> None:
    scheduler = make_scheduler()
    scheduler.add(request("r", 3, max_tokens=2, min_tokens=1, stop_token_ids=[42]))
    turn(scheduler, 5)
    assert turn(scheduler, token)[0].finish is finish


def test_check_20_many_requests_leave_nothing_behind() -> None:
    """Without the encoder, which does not exist yet."""
    scheduler = make_scheduler(max_num_batched_tokens=64, num_pages=40, max_num_seqs=8)
    for i in range(40):
        scheduler.add(request(f"r{i}", 1 + 7 * i % 90, max_tokens=1 + i % 9))
    while scheduler.live:
        turn(scheduler)
    assert_empty(scheduler)


def test_a_request_ends_in_whatever_state_it_is_and_gives_everything_back_once() -> None:
    scheduler = make_scheduler(num_pages=5, max_num_batched_tokens=32, prefix_caching=False)
    states = []
    for steps in range(4):  # in the queue, inside its prompt, decoding, preempted
        scheduler.add(request("old", 16, max_tokens=48))
        scheduler.add(request("r", 32, max_tokens=20))
        for _ in range(steps):
            turn(scheduler)
        if steps == 3:
            while scheduler.live["r"].status is not Status.PREEMPTED:
                turn(scheduler)
        states.append((scheduler.live["r"].status, scheduler.live["r"].computed))
        for name in ("r", "old"):
            assert scheduler.end(name, Status.FINISHED_ABORT) and not scheduler.end(name, Status.FINISHED_ABORT)
        assert_empty(scheduler)
    assert states == [(Status.WAITING, 0), (Status.RUNNING, 16), (Status.RUNNING, 32), (Status.PREEMPTED, 0)]


# ── steps in flight ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5])
@pytest.mark.parametrize("depth", [1, 2])
def test_check_24_no_step_is_scheduled_past_max_tokens(max_tokens: int, depth: int) -> None:
    scheduler = make_scheduler(depth=depth)
    for name, length in (("a", 100), ("b", 17)):
        scheduler.add(request(name, length, max_tokens=max_tokens))
    total = {"a": 0, "b": 0}
    flying: list[Step] = []
    while scheduler.live:
        step = scheduler.schedule()
        if step is not None:
            flying.append(step)
            for name, count in scheduled(step).items():
                total[name] += count
        if step is None or len(flying) > depth:
            land(scheduler, flying.pop(0))
    assert total == {"a": 100 + max_tokens - 1, "b": 17 + max_tokens - 1}
    assert_empty(scheduler)


def test_check_24_aborting_the_ith_request_leaves_it_exactly_i_outputs() -> None:
    scheduler = make_scheduler(depth=1)
    seqs: list[Sequence] = []
    for i in range(10):
        scheduler.add(request(f"r{i}", 10, max_tokens=20))
        seqs.append(scheduler.live[f"r{i}"])
    flying = [scheduler.schedule()]
    while scheduler.live or flying:
        for i, seq in enumerate(seqs):
            if len(seq.output) == i and not seq.status.finished:
                scheduler.end(f"r{i}", Status.FINISHED_ABORT)
        step = scheduler.schedule()
        flying += [step] if step else []
        land(scheduler, flying.pop(0))
    assert [len(seq.output) for seq in seqs] == list(range(10))
    assert_empty(scheduler)


def test_check_24_twins_in_one_step_both_compute_and_a_later_one_computes_what_is_left() -> None:
    """vLLM publishes pages as it schedules, so that the second of two equal prompts in one step computes 100 % 16 = 4 tokens.
    DESIGN.md stands: a page is published when it is written. Once it is, the numbers are vLLM's."""
    scheduler, prompt = make_scheduler(depth=1), list(range(100))
    scheduler.add(request("a", prompt))
    scheduler.add(request("b", prompt))
    step = scheduler.schedule()
    assert scheduled(step) == {"a": 100, "b": 100}
    land(scheduler, step)
    scheduler.add(request("c", prompt))
    assert scheduled(scheduler.schedule()) == {"a": 1, "b": 1, "c": 4}


def test_a_page_that_a_step_in_flight_writes_is_no_hit() -> None:
    scheduler, prompt = make_scheduler(depth=1), list(range(100))
    scheduler.add(request("a", prompt))
    scheduler.schedule()
    scheduler.add(request("b", prompt))
    assert scheduled(scheduler.schedule()) == {"a": 1, "b": 100}


def test_check_24_the_next_turn_computes_only_what_follows_the_last_full_page() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("turn-1", list(range(100)), max_tokens=9))
    for token in range(9):
        turn(scheduler, 200 + token)
    conversation = [*range(100), *range(200, 209), *range(300, 320)]
    scheduler.add(request("turn-2", conversation))
    # 108 of the first turn's 109 tokens have KV: six full pages.
    assert scheduled(scheduler.schedule()) == {"turn-2": len(conversation) - 96}


def test_check_24_under_pressure_every_token_in_flight_is_delivered_once() -> None:
    scheduler = make_scheduler(num_pages=7, depth=1, prefix_caching=False)
    for name in "ab":
        scheduler.add(request(name, 40, max_tokens=30))
    flying: list[Step] = []
    events: list[TokenEvent] = []
    for token in range(1000):
        step = scheduler.schedule()
        flying += [step] if step else []
        if not flying:
            break
        if step is None or len(flying) > 1:
            landing = flying.pop(0)
            events += land(scheduler, landing, *[token] * len(landing.batch.logit_owner))
    assert scheduler.num_preemptions > 0
    for name in "ab":
        mine = [event for event in events if event.request_id == name]
        assert len(mine) == 30 and [event.finish for event in mine] == [None] * 29 + [Status.FINISHED_LENGTH]
    assert_empty(scheduler)


def test_a_token_that_only_the_device_knows_is_filled_from_its_row() -> None:
    scheduler = make_scheduler(depth=1)
    scheduler.add(request("a", [11, 12, 13]))
    scheduler.schedule()
    step = scheduler.schedule()
    assert step is not None
    assert step.batch.fill_at.tolist() == [0] and step.batch.fill_row.tolist() == step.batch.rows.tolist()
    assert step.batch.positions.tolist() == [3] and step.batch.token_ids.tolist() == [0]


def test_in_stages_those_that_decode_take_turns_and_no_token_is_awaited_there() -> None:
    scheduler = make_scheduler(depth=1, pipelined=True)
    for name in "abcd":
        scheduler.add(request(name, 10))
    first = scheduler.schedule()
    assert scheduled(first) == dict.fromkeys("abcd", 10) and scheduler.schedule() is None
    land(scheduler, first)
    turns = [scheduler.schedule(), scheduler.schedule()]
    assert [scheduled(step) for step in turns] == [{"a": 1, "b": 1}, {"c": 1, "d": 1}] and scheduler.schedule() is None
    land(scheduler, turns[0])
    turns.append(scheduler.schedule())
    assert scheduled(turns[2]) == {"a": 1, "b": 1}
    assert not any(len(step.batch.fill_at) for step in turns if step)


def test_in_stages_one_that_is_alone_is_in_every_step_and_its_chunks_follow_each_other_at_once() -> None:
    scheduler = make_scheduler(depth=2, pipelined=True, max_num_batched_tokens=32)
    scheduler.add(request("a", 80))
    chunks = [scheduler.schedule() for _ in range(3)]
    assert [scheduled(step) for step in chunks] == [{"a": 32}, {"a": 32}, {"a": 16}] and scheduler.schedule() is None
    for step in chunks:
        land(scheduler, step)
    assert scheduled(scheduler.schedule()) == {"a": 1} and scheduler.schedule() is None


# ── forks ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def fork(name: str, parent: Request, **changes: Any) -> Request:
    return replace(parent, request_id=name, parent=parent.request_id, **changes)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(
    ("length", "shared", "copied"), [(1, 0, 0), (15, 0, 1), (16, 0, 1), (17, 1, 0), (40, 2, 1), (48, 2, 1)]
)
def test_a_fork_shares_the_prompts_pages_and_computes_its_last_token(
    caching: bool, length: int, shared: int, copied: int
) -> None:
    scheduler = make_scheduler(prefix_caching=caching)
    parent = request("p", length)
    for each in (parent, fork("c1", parent), fork("c2", parent)):
        scheduler.add(each)
    step = scheduler.schedule()
    assert step is not None and scheduled(step) == {"p": length} and not step.batch.copies.size
    land(scheduler, step)
    step = scheduler.schedule()
    assert step is not None and scheduled(step) == {"p": 1, "c1": 1, "c2": 1} and scheduler.num_forks == 2
    p, *children = (scheduler.live[name] for name in ("p", "c1", "c2"))
    for child in children:
        assert child.pages[:shared] == p.pages[:shared] and not set(child.pages[shared:]) & set(p.pages)
        assert len(child.pages) == -(-length // 16)
    assert step.batch.copies.tolist() == [[[p.pages[shared], child.pages[shared]] for child in children] * copied]
    assert step.batch.positions.tolist() == [length, length - 1, length - 1]
    check_pages(scheduler)
    check_sequences(scheduler)
    land(scheduler, step)
    while scheduler.live:
        turn(scheduler)
    assert_empty(scheduler)


@pytest.mark.parametrize("how", ["ended", "aborted", "preempted", "one token"])
def test_where_the_parent_leaves_before_its_prompt_is_shared_the_child_goes_by_itself(how: str) -> None:
    scheduler = make_scheduler(prefix_caching=False, max_num_batched_tokens=32)
    parent = request("p", 40, max_tokens=1 if how == "one token" else 16)
    scheduler.add(parent)
    scheduler.add(fork("c", parent))
    if how == "one token":
        turn(scheduler)
        turn(scheduler)
    elif how != "ended":
        step = scheduler.schedule()
        assert scheduled(step) == {"p": 32}
        land(scheduler, step)
    match how:
        case "preempted":
            scheduler._preempt(scheduler.live["p"])
            scheduler.end("p", Status.FINISHED_ABORT)
        case "ended" | "aborted":
            scheduler.end("p", Status.FINISHED_ABORT)
    assert scheduled(scheduler.schedule()) == {"c": 32} and scheduler.num_forks == 0


def test_a_child_whose_parent_still_computes_the_prompt_holds_up_nobody() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=32)
    parent = request("p", 40)
    for each in (parent, fork("c", parent), request("other", 4)):
        scheduler.add(each)
    steps = []
    for _ in range(3):
        steps.append(scheduled(step := scheduler.schedule()))
        land(scheduler, step)
    assert steps == [{"p": 32}, {"p": 8, "other": 4}, {"p": 1, "other": 1, "c": 1}]


def test_a_child_does_not_wait_for_a_parent_that_is_less_urgent() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    parent = request("p", 20, priority=1)
    scheduler.add(parent)
    scheduler.add(fork("c", parent, priority=0))
    assert scheduled(scheduler.schedule()) == {"c": 20}


@pytest.mark.parametrize("changes", [{"prompt_token_ids": (1, 2)}, {"cache_salt": "other"}], ids=str)
def test_a_parent_with_another_prompt_or_salt_is_refused(changes: dict[str, Any]) -> None:
    scheduler = make_scheduler()
    parent = request("p", 3)
    scheduler.add(parent)
    with pytest.raises(RequestError, match="parent 'p' has another prompt or cache_salt"):
        scheduler.add(fork("c", parent, **changes))
    scheduler.end("p", Status.FINISHED_ABORT)
    scheduler.add(fork("c", parent, **changes))  # nobody's child


# ── the door ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "numbers"),
    [
        (100, 16, ["100 tokens", "context length is 100", "at most 99"]),
        (90, 16, ["90 prompt tokens", "max_tokens=16", "context length is 100", "at most 10"]),
        (49, 1, ["49 tokens", "needs 4 pages", "has 3 of 16"]),
        (40, 10, ["40 prompt tokens", "max_tokens=10", "need 4 pages", "has 3 of 16", "at most 9"]),
    ],
    ids=["prompt over context", "output over context", "prompt over pool", "output over pool"],
)
def test_a_request_that_can_never_fit_is_refused_with_the_numbers(prompt: int, max_tokens: int, numbers: list[str]) -> None:
    pages = 4 if "pages" in str(numbers) else 50
    scheduler = make_scheduler(num_pages=pages, max_model_len=100)
    with pytest.raises(RequestError) as error:
        scheduler.add(request("big", prompt, max_tokens=max_tokens))
    assert all(number in str(error.value) for number in numbers), str(error.value)
    assert_empty(scheduler)


@pytest.mark.parametrize(("prompt", "max_tokens"), [(48, 1), (40, 9), (1, 48)])
def test_the_largest_request_that_fits_runs_to_its_end_alone(prompt: int, max_tokens: int) -> None:
    scheduler = make_scheduler(num_pages=4, max_model_len=100)
    scheduler.add(request("r", prompt, max_tokens=max_tokens))
    for _ in range(max_tokens):
        (event,) = turn(scheduler)
    assert event.finish is Status.FINISHED_LENGTH and scheduler.num_preemptions == 0
    assert_empty(scheduler)


def test_without_max_tokens_a_request_fills_the_context_or_the_pool() -> None:
    for pages, room in ((50, 100), (4, 49)):
        scheduler = make_scheduler(num_pages=pages, max_model_len=100)
        scheduler.add(request("r", 10, max_tokens=None))
        events = []
        while scheduler.live:
            events += turn(scheduler)
        assert len(events) == room - 10 and events[-1].finish is Status.FINISHED_LENGTH


def test_an_id_is_free_again_once_its_request_has_ended() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("r", 3, max_tokens=1))
    with pytest.raises(RequestError, match="'r' is live already"):
        scheduler.add(request("r", 3))
    turn(scheduler)
    scheduler.add(request("r", 3))


def test_requests_without_a_seed_draw_different_ones_and_the_same_ones_in_the_next_run() -> None:
    drawn = []
    for seed in (0, 0, 1):
        scheduler = make_scheduler(seed=seed)
        for name in "ab":
            scheduler.add(request(name, 3, temperature=1.0))
        scheduler.add(request("own", 3, temperature=1.0, seed=(5 << 32) + 6))
        step = scheduler.schedule()
        assert step is not None and step.batch.seeds is not None
        drawn.append([tuple(seeds) for seeds in step.batch.seeds.tolist()])
    assert drawn[0] == drawn[1] and len({*drawn[0], *drawn[2]}) == 5 and drawn[0][2] == (6, 5)
