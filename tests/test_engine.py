"""The engine loop over the history-hash runner: events, ends, faults, and how an engine is built."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from time import perf_counter, sleep
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from common.batch import Batch
from common.config import EngineConfig
from common.engine import Engine, build_engine, pool_size
from common.errors import BackendError, ConfigError, DrainingError, QueueFullError, RequestError
from common.request import Request, SamplingParams, Status, TokenEvent, fan_out
from common.sampling.seeds import mix64
from tests.events import drain, tokens
from tests.history_runner import Expected, HistoryRunner, expected

VOCAB = 64


def make_engine(
    *, depth: int = 0, num_pages: int = 100, clock: Callable[[], float] = perf_counter, **options: Any
) -> tuple[Engine, HistoryRunner]:
    runner = HistoryRunner(
        num_pages=num_pages, block_size=4, vocab_size=VOCAB, depth=depth, nan_token=options.pop("nan_token", None)
    )
    numbers = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 100}
    return Engine(runner, EngineConfig(block_size=4, **(numbers | options)), num_pages=num_pages, clock=clock), runner


def request(name: str, prompt: list[int] | range = range(10), *, eos: tuple[int, ...] = (), **params: Any) -> Request:
    params = {"max_tokens": 8, "temperature": 0.0} | params
    return Request(request_id=name, prompt_token_ids=prompt, params=SamplingParams(**params), eos_token_ids=eos)


def right(request: Request, number: int = 0, nan_token: int | None = None) -> Expected:
    return expected(request, vocab_size=VOCAB, max_tokens=90, seed=mix64(0, number), nan_token=nan_token)


def of(events: list[TokenEvent], name: str) -> list[TokenEvent]:
    return [event for event in events if event.request_id == name]


# ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_outputs_are_the_oracles_with_one_terminal_event_each(depth: int) -> None:
    engine, _ = make_engine(depth=depth, num_pages=20)
    requests = [
        request(str(i), [i % 3] * (1 + 5 * i % 40), max_tokens=1 + i % 13, temperature=float(i % 2), eos=(5,))
        for i in range(30)
    ]
    events = engine.run(requests)
    for number, r in enumerate(requests):
        mine, judge = events[r.request_id], right(r, number)
        assert tokens(mine) == judge.tokens
        assert [event.finish for event in mine] == [None] * (len(mine) - 1) + [judge.finish]
        assert [event.time for event in mine] == sorted(event.time for event in mine)
    stats = engine.stats()
    assert stats["prompt_tokens"] == sum(len(r.prompt_token_ids) for r in requests)
    assert stats["generation_tokens"] == sum(len(right(r, i).tokens) for i, r in enumerate(requests))
    assert stats["num_preemptions"] > 0 and stats["kv_cache_usage"] == 0.0
    assert stats["num_running"] == stats["num_waiting"] == stats["num_resets"] == 0
    assert stats["kv_pool_bytes"] == 20 * sum(group.page_bytes for group in engine.runner.kv_groups())
    assert engine.reset_prefix_cache()


def test_logprobs_come_with_those_who_asked_and_with_as_many_as_they_asked_for() -> None:
    engine, _ = make_engine()
    requests = [request(f"{k}", [3, 1, 4], logprobs=k) for k in (None, 0, 5)]
    events = engine.run(requests)
    assert all(event.logprobs is None for event in events["None"])
    for k in (0, 5):
        judge = right(requests[0])
        got = [event.logprobs for event in events[f"{k}"]]
        assert [(x.logprob, x.rank, list(x.top_ids)) for x in got if x] == [
            (y.logprob, y.rank, y.top_ids) for y in (judge.logprobs(i, k, VOCAB) for i in range(8))
        ]


def test_the_same_seed_gives_the_same_tokens_whatever_runs_beside_it() -> None:
    alone, _ = make_engine()
    wanted = request("r", temperature=1.0, top_p=0.9, seed=12345)
    crowd = [request(f"c{i}", [i], temperature=1.0, max_tokens=20) for i in range(7)]
    among, _ = make_engine(num_pages=30)
    assert tokens(alone.run([wanted])["r"]) == tokens(among.run([*crowd, wanted])["r"]) == right(wanted).tokens


def test_time_in_the_runner_and_time_on_the_host_are_told_apart() -> None:
    engine, _ = make_engine()
    engine.run([request("r")])
    stats = engine.stats()
    assert stats["host_seconds"] > 0 and stats["device_seconds"] > 0 and stats["log_seconds"] == 0
    assert stats["steps"] == 8 and stats["scheduled_tokens"] == 10 + 7 and stats["padded_tokens"] == 0


def test_what_the_step_log_takes_is_no_work_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make_engine()
    record = engine._record
    monkeypatch.setattr(engine, "_record", lambda *args: (sleep(0.02), record(*args))[1])
    engine.step_log = []
    engine.run([request("r")])
    stats = engine.stats()
    assert len(engine.step_log) == stats["steps"] == 8
    assert stats["log_seconds"] >= 8 * 0.02 and stats["host_seconds"] < 8 * 0.02


def test_the_prefix_cache_counts_tokens_of_first_admissions() -> None:
    engine, _ = make_engine()
    engine.run([request("a")])
    engine.run([request("b")])
    stats = engine.stats()
    assert (stats["prefix_cache_queries"], stats["prefix_cache_hits"]) == (20, 8)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_log_holds_each_step_that_landed_and_none_is_kept_unasked(depth: int) -> None:
    engine, runner = make_engine(depth=depth)
    engine.run([request("before")])
    assert engine.step_log is None
    engine.step_log = log = []
    before, runner.batches = engine.stats(), []
    engine.run([request(str(i), range(i, i + 13)) for i in range(10)])
    assert len(log) == len(runner.batches) == engine.stats()["steps"] - before["steps"]
    tokens = sum(int(record.counts.sum()) for record in log)
    assert tokens == engine.stats()["scheduled_tokens"] - before["scheduled_tokens"]
    for record, batch in zip(log, runner.batches, strict=True):
        assert record.counts.tolist() == np.diff(batch.query_starts).tolist()
        assert record.kv_lengths.tolist() == batch.kv_lengths.tolist() and record.logit_rows == len(batch.logit_rows)
        assert not any(np.shares_memory(array, batch.buffer) for array in record[3:6])
        assert record.submitted < record.landed
    assert [record.landed for record in log] == sorted(record.landed for record in log)


def test_a_step_that_raised_is_not_in_the_log() -> None:
    engine, runner = make_engine()
    engine.step_log = log = []
    engine.add(request("r", max_tokens=3))
    runner.fail_result = RuntimeError("injected")
    drain(engine)
    assert engine.stats()["num_resets"] == 1 and engine.stats()["steps"] == 4
    assert [record.counts.tolist() for record in log] == [[10], [1], [1]]


def test_the_log_says_how_many_leading_keys_a_later_sequence_has_too() -> None:
    engine, _ = make_engine()
    engine.run([request("first", range(12))])
    engine.step_log = log = []
    engine.run([request(name, [*range(length), 50, 51]) for name, length in (("a", 12), ("b", 8), ("c", 0), ("d", 4))])
    assert [record.shared.tolist() for record in log[-1:]] == [[8, 4, 0, 0]]


# ── ends ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_an_abort_ends_exactly_its_request_with_the_next_step(depth: int, steps: int) -> None:
    engine, _ = make_engine(depth=depth)
    requests = [request(name, [i] * 40) for i, name in enumerate(("r1", "r10", "r1x"))]
    for r in requests:
        engine.add(r)
    events = [event for _ in range(steps) for event in engine.step()]
    assert engine.abort("r1") and not engine.abort("r1") and not engine.abort("r")
    step = engine.step()
    assert [event.finish for event in of(step, "r1")] == [Status.FINISHED_ABORT]
    events += step + drain(engine)
    mine = of(events, "r1")
    assert [event.finish for event in mine] == [None] * (len(mine) - 1) + [Status.FINISHED_ABORT]
    assert tokens(mine) == right(requests[0]).tokens[: len(mine) - 1]
    for number in (1, 2):
        assert tokens(of(events, requests[number].request_id)) == right(requests[number], number).tokens
    assert engine.reset_prefix_cache()


def test_a_request_whose_text_met_a_stop_string_ends_with_stop() -> None:
    engine, _ = make_engine()
    engine.add(request("r"))
    engine.step()
    assert engine.finish("r", "\n\n")
    (event,) = engine.step()
    assert (event.token_id, event.finish, event.stop_reason) == (None, Status.FINISHED_STOP, "\n\n")
    assert not engine.has_work and not engine.finish("r", "\n\n")


def test_an_id_can_be_used_again_once_its_request_was_aborted() -> None:
    engine, _ = make_engine(depth=1)
    engine.add(request("r"))
    engine.step()
    engine.abort("r")
    engine.add(request("r", [7, 7]))
    events = drain(engine)
    assert events[0].finish is Status.FINISHED_ABORT and tokens(events[1:]) == right(request("r", [7, 7])).tokens


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_a_deadline_ends_its_request_whether_it_waits_or_runs_and_keeps_what_it_has(depth: int, steps: int) -> None:
    now = 100.0
    engine, _ = make_engine(depth=depth, clock=lambda: now)
    requests = [request(name, [i] * 40) for i, name in enumerate("abc")]  # the third is only admitted in the third step
    engine.add(requests[0])
    for r in requests[1:]:
        engine.add(replace(r, deadline=101.0))
    events = [event for _ in range(steps) for event in engine.step()]
    assert not any(event.finish for event in events)
    now = 101.0
    step = engine.step()
    for number in (1, 2):
        name = requests[number].request_id
        mine = of(events + step, name)
        assert [event.finish for event in mine] == [None] * (len(mine) - 1) + [Status.FINISHED_TIMEOUT]
        assert mine[-1].token_id is None and tokens(mine) == right(requests[number], number).tokens[: len(mine) - 1]
    rest = drain(engine)
    assert tokens(of(events + step + rest, "a")) == right(requests[0]).tokens
    assert not of(rest, "b") and not of(rest, "c") and engine.reset_prefix_cache()


def test_a_request_whose_deadline_has_passed_already_ends_with_the_next_step_and_computes_nothing() -> None:
    engine, _ = make_engine(clock=lambda: 5.0)
    engine.add(replace(request("late"), deadline=4.0))
    (event,) = engine.step()
    assert event.finish is Status.FINISHED_TIMEOUT and not engine.has_work and engine.stats()["steps"] == 0


def test_deadlines_of_requests_that_have_ended_are_forgotten() -> None:
    engine, _ = make_engine(clock=lambda: 0.0)
    for i in range(200):
        engine.add(replace(request("r"), deadline=1e6 + i))
        engine.abort("r")
    assert len(engine.scheduler.deadlines) <= 4
    engine.add(replace(request("r", max_tokens=2), deadline=1e6))
    assert tokens(drain(engine)) == right(request("r", max_tokens=2)).tokens


@pytest.mark.parametrize("deadline", [float("nan"), float("inf"), "soon", True], ids=repr)
def test_a_deadline_that_is_no_time_is_refused(deadline: Any) -> None:
    with pytest.raises(RequestError, match="deadline"):
        replace(request("r"), deadline=deadline)


def test_while_as_many_wait_as_may_further_requests_are_refused_and_change_nothing() -> None:
    engine, _ = make_engine(max_num_seqs=1, max_waiting=2)
    for name in "abc":  # a is to run at once
        engine.add(request(name))
    before = engine.stats()
    with pytest.raises(QueueFullError, match=r"2 requests wait already, and max_waiting=2"):
        engine.add(request("z"))
    with pytest.raises(RequestError, match="at most") as never:  # what can never be served is told so, full or not
        engine.add(request("d", [1] * 99))
    assert not isinstance(never.value, QueueFullError) and engine.stats() == before
    events = engine.step()
    with pytest.raises(QueueFullError, match=r"2 requests wait already, and max_waiting=2"):
        engine.add(request("z"))
    while not any(event.finish for event in events):
        events += engine.step()
    events += engine.step()  # a has ended, b runs
    engine.add(request("d"))
    events += drain(engine)
    for number, name in enumerate("abcd"):
        assert tokens(of(events, name)) == right(request(name), number).tokens


def test_of_requests_that_come_together_as_many_are_taken_as_run_at_once_and_may_wait() -> None:
    engine, _ = make_engine(max_num_seqs=2, max_waiting=2)
    taken = []
    for name in "abcdefgh":
        with suppress(QueueFullError):
            engine.add(request(name))
            taken.append(name)
    assert taken == [*"abcd"]


def test_a_row_is_not_free_for_others_while_somebody_waits_for_pages() -> None:
    engine, _ = make_engine(num_pages=5, max_num_seqs=8, max_waiting=1)
    for name, token in zip("ab", (1, 2), strict=True):
        engine.add(request(name, [token] * 12, max_tokens=4))  # 3 of the 4 pages
    engine.step()
    assert engine.stats()["num_waiting"] == 1
    with pytest.raises(QueueFullError, match=r"1 requests wait already"):
        engine.add(request("c", max_tokens=4))


def test_the_choices_of_a_request_come_in_with_it_however_few_may_wait() -> None:
    engine, _ = make_engine(max_num_seqs=1, max_waiting=1)
    engine.add(request("a"))
    for name in "bcd":
        engine.add(replace(request(name), parent="a"))
    events = drain(engine)
    assert all(of(events, name)[-1].finish for name in "abcd")


def test_a_draining_engine_takes_nothing_and_finishes_what_it_has() -> None:
    engine, _ = make_engine(max_num_seqs=1)
    for name in "ab":
        engine.add(request(name))
    events = engine.step()
    for _ in range(2):
        engine.drain()
        with pytest.raises(DrainingError):
            engine.add(request("c"))
    events += drain(engine)
    for number, name in enumerate("ab"):
        assert tokens(of(events, name)) == right(request(name), number).tokens
    assert engine.reset_prefix_cache()


@pytest.mark.parametrize("depth", [0, 1])
def test_check_36_an_abort_while_the_final_step_runs_wins(depth: int) -> None:
    """The step that will bring the last token is in flight, or has not been asked for its result."""
    engine, _ = make_engine(depth=depth)
    engine.add(request("r", max_tokens=3))
    events = [event for _ in range(2 + depth) for event in engine.step()]
    assert len(events) == 2
    engine.abort("r")
    events += drain(engine)
    assert [event.finish for event in events] == [None, None, Status.FINISHED_ABORT]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_check_36_every_tenth_of_100_is_aborted_and_the_others_come_out_whole(depth: int) -> None:
    engine, _ = make_engine(depth=depth, num_pages=60)
    requests = [request(f"r{i}", [i % 7] * (1 + i % 20), max_tokens=10) for i in range(100)]
    for r in requests:
        engine.add(r)
    events: dict[str, list[TokenEvent]] = {r.request_id: [] for r in requests}
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
            name, count = event.request_id, len(events[event.request_id])
            if name.endswith("0") and count == 3:
                assert engine.abort(name)
    for i, r in enumerate(requests):
        mine = events[r.request_id]
        assert [event.finish is not None for event in mine] == [False] * (len(mine) - 1) + [True]
        aborted = i % 10 == 0
        assert mine[-1].finish is (Status.FINISHED_ABORT if aborted else Status.FINISHED_LENGTH)
        assert tokens(mine) == right(r, i).tokens[: 3 if aborted else 10]
    again = engine.run([request("r0", max_tokens=4)])["r0"]  # its id is free
    assert len(tokens(again)) == 4 and engine.reset_prefix_cache()


# ── n > 1 ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("num_pages", [12, 100])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_n_continuations_are_the_oracles_and_compute_their_prompt_once(depth: int, num_pages: int, caching: bool) -> None:
    engine, runner = make_engine(depth=depth, num_pages=num_pages, enable_prefix_caching=caching)
    asked = request("r", range(23), n=6, temperature=1.0, seed=9, max_tokens=20)
    fan = fan_out(asked)
    events = engine.run(fan)
    got = [tokens(events[r.request_id]) for r in fan]
    assert got == [right(replace(r, seed=9 + i)).tokens for i, r in enumerate(fan)]
    assert len(set(map(tuple, got))) == 6 and not runner.violations and engine.reset_prefix_cache()
    stats = engine.stats()
    if num_pages == 100:
        assert engine.scheduler.num_forks == 5 and stats["scheduled_tokens"] == 23 + 5 + 6 * 19
    else:
        assert stats["num_preemptions"] > 0


def test_an_engine_refuses_a_request_for_several_continuations() -> None:
    engine, _ = make_engine()
    with pytest.raises(RequestError, match="fan_out"):
        engine.add(request("r", n=2, temperature=1.0))
    assert not engine.has_work


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("where", ["fail_submit", "fail_result"])
@pytest.mark.parametrize("step", [0, 1, 3, 6])
def test_after_a_step_that_raised_everyone_finishes_with_the_same_tokens(depth: int, where: str, step: int) -> None:
    engine, runner = make_engine(depth=depth)
    requests = [request(str(i), [i] * 15, temperature=float(i % 2)) for i in range(5)]
    for r in requests:
        engine.add(r)
    events = [event for _ in range(step) for event in engine.step()]
    setattr(runner, where, RuntimeError("injected"))
    events += drain(engine)
    assert runner.faults == 1 == engine.stats()["num_resets"] and not runner.violations
    for number, r in enumerate(requests):
        mine = of(events, r.request_id)
        assert tokens(mine) == right(r, number).tokens and mine[-1].finish is Status.FINISHED_LENGTH


def test_after_a_step_that_raised_nothing_of_the_old_cache_is_a_hit() -> None:
    engine, runner = make_engine()
    engine.run([request("a")])
    engine.add(request("b"))
    runner.fail_submit = RuntimeError("injected")
    engine.step()
    assert not engine.scheduler.pool.cached
    assert tokens(drain(engine)) == right(request("b")).tokens and not runner.violations


def poisoned_by(*tokens: int) -> Callable[[Batch], BaseException | None]:
    """Every step raises that holds one of the tokens."""
    return lambda batch: RuntimeError(f"one of {tokens} is poison") if np.isin(batch.token_ids, tokens).any() else None


@pytest.mark.parametrize("depth", [0, 1])
def test_a_request_that_makes_every_step_raise_ends_and_the_engine_goes_on(depth: int) -> None:
    engine, runner = make_engine(depth=depth)
    runner.poison_of = poisoned_by(63)
    before, poison = request("before", [1, 2, 3], max_tokens=4), request("poison", [63])
    events = engine.run([before])["before"]
    engine.add(poison)
    (end,) = of(drain(engine), "poison")
    assert end.finish is Status.FINISHED_ERROR and end.error and "(63,) is poison" in end.error
    assert engine.stats()["num_resets"] == 4  # one in company, and three trials
    runner.poison_of = poisoned_by()
    assert tokens(events) == tokens(engine.run([request("after", [1, 2, 3], max_tokens=4)])["after"])
    assert engine.reset_prefix_cache()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("culprits", [[0], [17], [63], [20, 21], [3, 40, 60]], ids=str)
def test_culprits_are_found_by_halving_and_the_others_finish_with_the_same_tokens(
    culprits: list[int], depth: int, late: bool
) -> None:
    engine, runner = make_engine(depth=depth, num_pages=600, max_num_seqs=64, max_num_batched_tokens=100)

    def poison(batch: Batch) -> BaseException | None:
        """A culprit's steps raise once it has 12 tokens."""
        rows = [seq.row for seq in engine.scheduler.running if int(seq.request.request_id) in culprits]
        bad = np.isin(batch.rows, rows)
        return RuntimeError("poison") if (batch.kv_lengths[bad] > 12).any() else None

    runner.poison_of, runner.fails_late = poison, late
    requests = [request(str(i), [i] * (1 + i % 9), max_tokens=20) for i in range(64)]
    events = engine.run(requests)
    for number, r in enumerate(requests):
        mine, wanted = events[r.request_id], right(r, number).tokens
        if number in culprits:
            assert mine[-1].finish is Status.FINISHED_ERROR and tokens(mine) == wanted[: len(mine) - 1]
            assert mine[-1].error and "poison" in mine[-1].error
        else:
            assert mine[-1].finish is Status.FINISHED_LENGTH and tokens(mine) == wanted
    assert runner.faults == engine.stats()["num_resets"] <= 10 * len(culprits) and not runner.violations
    assert engine.reset_prefix_cache()


@pytest.mark.parametrize("depth", [0, 1])
def test_where_every_step_raises_every_request_ends_after_a_bounded_number_of_them(depth: int) -> None:
    engine, runner = make_engine(depth=depth, max_num_seqs=64, max_num_batched_tokens=640, num_pages=400)
    runner.poison_of = lambda batch: RuntimeError("device lost")
    events = engine.run([request(str(i)) for i in range(128)])
    assert {e.finish for es in events.values() for e in es} == {Status.FINISHED_ERROR} and len(events) == 128
    assert all(len(es) == 1 for es in events.values())
    assert engine.stats()["num_resets"] <= 4 * 7 + 2  # log2, not one for each request
    runner.poison_of = poisoned_by()
    assert tokens(engine.run([request("after")])["after"]) == right(request("after"), 128).tokens


def test_requests_that_come_during_a_trial_wait_and_lose_nothing() -> None:
    engine, runner = make_engine()
    runner.poison_of = poisoned_by(63)
    for name, prompt in (("a", [1] * 9), ("bad", [2] * 30 + [63]), ("b", [3] * 9)):
        engine.add(request(name, prompt))
    events = []
    while not engine.scheduler.trials.groups:
        events += engine.step()
    engine.add(request("new"))
    while engine.scheduler.trials.groups:
        assert not engine.scheduler.live["new"].admissions
        events += engine.step()
    events += drain(engine)
    for number, (name, asked) in enumerate((("a", [1] * 9), ("bad", None), ("b", [3] * 9), ("new", range(10)))):
        if asked:
            assert tokens(of(events, name)) == right(request(name, asked), number).tokens
    assert [e.finish for e in of(events, "bad")] == [Status.FINISHED_ERROR]


@pytest.mark.parametrize("how", ["abort", "interrupt"])
def test_a_trial_survives_an_abort_of_the_suspects_and_an_interrupt(how: str) -> None:
    engine, runner = make_engine(depth=1)
    requests = [request(str(i), [i] * 15) for i in range(5)]
    for r in requests:
        engine.add(r)
    events = engine.step() + engine.step()
    runner.fail_submit = RuntimeError("once")
    events += engine.step()
    assert engine.scheduler.trials.groups
    gone = set()
    if how == "abort":
        gone = {seq.request.request_id for seq in engine.scheduler.trials.groups[-1]}
        assert gone and all(engine.abort(name) for name in gone)
    else:
        runner.fail_submit = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    events += drain(engine)
    for number, r in enumerate(requests):
        wanted = right(r, number).tokens
        got = tokens(of(events, r.request_id))
        assert got == (wanted[: len(got)] if r.request_id in gone else wanted)


@pytest.mark.parametrize(("names", "faults"), [("a", 2), ("a", 3), ("abcd", 3), ("abcd", 4), ("abcd", 8)])
def test_faults_in_a_row_that_come_by_chance_end_nobody(names: str, faults: int) -> None:
    """Some of them where a suspect is alone on trial."""
    engine, runner = make_engine()
    requests = [request(name, [i] * 5, max_tokens=6) for i, name in enumerate(names)]
    for r in requests:
        engine.add(r)
    left = iter(range(faults))
    runner.poison_of = lambda batch: RuntimeError("chance") if next(left, None) is not None else None
    events = drain(engine)
    assert engine.stats()["num_resets"] == faults
    for number, r in enumerate(requests):
        assert tokens(of(events, r.request_id)) == right(r, number).tokens


def test_a_request_is_not_given_up_as_long_as_it_gets_tokens_between_faults() -> None:
    engine, runner = make_engine()
    engine.add(request("r", max_tokens=20))
    events = []
    while engine.has_work:
        runner.fail_submit = RuntimeError("every other step")
        events += engine.step() + engine.step()
    assert engine.stats()["num_resets"] >= 5
    assert tokens(events) == right(request("r", max_tokens=20)).tokens


@pytest.mark.parametrize("where", ["fail_submit", "fail_result"])
def test_an_interrupt_is_passed_on_and_the_engine_can_go_on_after_it(where: str) -> None:
    engine, runner = make_engine(depth=1)
    engine.add(request("r"))
    events = engine.step() + engine.step()
    setattr(runner, where, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        drain(engine)
    assert tokens(events + drain(engine)) == right(request("r")).tokens


def test_an_interrupt_while_a_step_is_packed_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make_engine()
    engine.add(request("r"))
    events = engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "pack", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert tokens(events + drain(engine)) == right(request("r")).tokens
    assert not engine.scheduler.leaving and not engine.has_work


def test_a_fault_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    engine, runner = make_engine()
    runner.fail_submit = RuntimeError("injected")
    with caplog.at_level(logging.WARNING):
        engine.run([request("r")])
    (entry,) = caplog.records
    assert entry.exc_info and str(entry.exc_info[1]) == "injected"


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("budget", [8, 32], ids=["in its second chunk", "in its only chunk"])
def test_logits_that_are_not_finite_end_their_request_only_and_its_pages_are_not_shared(depth: int, budget: int) -> None:
    engine, _ = make_engine(depth=depth, nan_token=9, max_num_batched_tokens=budget)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    bad, good = request("bad", prompt), request("good", [1, 1, 2], max_tokens=3)
    events = engine.run([bad, good])
    assert [(e.token_id, e.finish) for e in events["bad"]] == [(None, Status.FINISHED_ERROR)]
    assert events["bad"][0].error and "not finite" in events["bad"][0].error
    assert tokens(events["good"]) == right(good, 1, nan_token=9).tokens
    hits = engine.stats()["prefix_cache_hits"]
    engine.run([request("again", [*prompt[:8], 0])])
    assert engine.stats()["prefix_cache_hits"] == hits == 0


# ── the door ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("token", [-1, VOCAB, 2**31, 2**63, 1.0, True, "5", None], ids=repr)
@pytest.mark.parametrize("where", ["prompt", "stop", "eos"])
def test_token_ids_outside_the_vocabulary_are_refused_and_others_go_on(token: Any, where: str) -> None:
    engine, _ = make_engine()
    engine.add(request("bystander"))
    with pytest.raises(RequestError) as error:
        ids = [1, token, 2]
        engine.add(
            request(
                "bad",
                ids if where == "prompt" else [1],
                eos=ids if where == "eos" else (),
                stop_token_ids=ids if where == "stop" else (),
            )
        )
    if where != "stop" or token in (VOCAB,):  # SamplingParams refuses most bad stop ids before the engine sees them
        assert "[1]" in str(error.value) and json.dumps(token) in str(error.value) and f"[0, {VOCAB})" in str(error.value)
    assert tokens(drain(engine)) == right(request("bystander")).tokens


@pytest.mark.parametrize("token", [10**5000, "x" * 10_000], ids=["number", "text"])
def test_what_a_refusal_shows_of_a_token_id_is_short(token: Any) -> None:
    engine, _ = make_engine()
    with pytest.raises(RequestError, match=r"prompt_token_ids\[1\] must be an integer in") as error:
        engine.add(request("bad", [1, token]))
    assert len(str(error.value)) < 250 and error.value.param == "prompt_token_ids"


def test_a_bias_of_what_is_no_token_is_refused_as_the_map_that_it_is() -> None:
    engine, _ = make_engine()
    with pytest.raises(
        RequestError, match=r"logit_bias must map token ids in \[0, 64\) to numbers, got the ids \[64\]"
    ) as error:
        engine.add(request("bad", logit_bias={3: 1.0, VOCAB: 1.0}))
    assert error.value.param == "logit_bias"


def test_a_refused_request_leaves_no_trace_in_the_counters() -> None:
    engine, _ = make_engine()
    for bad in (request("long", range(64), max_tokens=60), request("r", [VOCAB])):
        with pytest.raises(RequestError):
            engine.add(bad)
    assert not engine.has_work and engine.stats()["prompt_tokens"] == 0 and engine.step() == []


# ── building ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Package:
    """A backend package `historyinfer`, importable while the test runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Any] = []
        self.calls: list[str] = []
        package = self

        class ModelRunner(HistoryRunner):
            def __init__(self, config: EngineConfig) -> None:
                super().__init__(num_pages=1, block_size=config.block_size, max_seqs=config.max_num_seqs)
                self.config = config
                package.made.append(self)

            def load(self, checkpoint: Any, progress: Any = None) -> None:
                package.calls.append("load")
                if checkpoint.path is None:
                    raise BackendError("no weights")

            def allocate(self, pages_per_group: Any) -> None:
                package.calls.append("allocate")
                super().allocate(pages_per_group)

            def warmup(self, progress: Any = None) -> None:
                package.calls.append("warmup")

            def close(self) -> None:
                package.calls.append("close")

        module = ModuleType("historyinfer")
        module.ModelRunner = ModelRunner  # type: ignore[attr-defined]
        module.__spec__ = SimpleNamespace(name="historyinfer")  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, "historyinfer", module)


def checkpoint(path: str | None = "weights") -> Any:
    """As much of a checkpoint as the engine looks at."""
    return SimpleNamespace(path=path, config=SimpleNamespace(max_position=128, vocab_size=VOCAB))


def test_an_engine_is_loaded_allocated_warmed_up_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package(monkeypatch)
    engine = build_engine("history", checkpoint(), EngineConfig(max_num_seqs=2, max_num_batched_tokens=8, block_size=8))
    assert package.calls == ["load", "allocate", "warmup"]
    assert engine.caps.max_model_len == 128
    assert package.made[0].num_pages == 1 + 2 * 16  # two full contexts and the null page
    assert tokens(engine.run([request("r")])["r"]) == right(request("r")).tokens
    engine.close()
    assert package.calls[-1] == "close"


def test_a_runner_that_could_not_be_built_up_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package(monkeypatch)
    with pytest.raises(BackendError, match="no weights"):
        build_engine("history", checkpoint(None), EngineConfig())
    assert package.calls == ["load", "close"]


def test_a_context_longer_than_the_model_has_is_refused_before_a_runner_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package(monkeypatch)
    with pytest.raises(ConfigError, match="128 positions"):
        build_engine("history", checkpoint(), EngineConfig(max_model_len=200))
    assert not package.made


def test_a_backend_that_is_not_there_is_named_with_the_nearest_that_is() -> None:
    with pytest.raises(BackendError, match="Did you mean 'torch'"):
        build_engine("torhc", checkpoint(), EngineConfig())


def test_the_pool_holds_full_contexts_as_far_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=8, block_size=16)
    monkeypatch.setattr("common.engine.memory_available", lambda: 4_000_000)  # of a container, say
    assert pool_size(config, 100, page_bytes=1000) == 1 + 4 * 7
    assert pool_size(config, 100, page_bytes=100_000) == 10  # a quarter of what is available
    monkeypatch.setattr("common.engine.memory_available", lambda: 1 << 40)
    assert pool_size(config, 1 << 14, page_bytes=1 << 20) == 2048  # 2 GiB
    assert pool_size(config, 1 << 16, page_bytes=1 << 20) == 1 + 4096  # one full context, where that is more
    monkeypatch.setattr("common.engine.memory_available", lambda: 1 << 33)
    with pytest.raises(ConfigError, match="no memory for two"):
        pool_size(config, 100, page_bytes=1 << 31)
    assert pool_size(EngineConfig(num_blocks=77), 100, page_bytes=1 << 40) == 77


def test_the_context_is_that_of_the_model_as_far_as_the_pool_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Package(monkeypatch)
    small = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "block_size": 8}
    served = lambda **options: build_engine("history", checkpoint(), EngineConfig(**small, **options)).caps.max_model_len  # noqa: E731
    assert served() == 128
    assert served(max_model_len=100) == 100
    assert served(num_blocks=11) == 80
    assert served(num_blocks=11, max_model_len=100) == 100  # as asked; a request that cannot fit is refused at admission
    assert EngineConfig().model_len(SimpleNamespace(max_position=131_072)) == 131_072
