"""The agenda and the driver: who is sent when, in open and closed loops and in conversations, and what is written down."""

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from common.config import EngineConfig
from common.engine import Engine
from common.errors import RequestError
from common.interface import Caps, InferenceEngine
from common.request import Request, Status, TokenEvent
from experiments.load.arrivals import Agenda
from experiments.load.driver import Row, Window, drive
from experiments.load.workload import Item
from tests.history_runner import HistoryRunner
from tests.host_overhead import IdleRunner


class Counting(InferenceEngine):
    """A live request gets 100, 101, … one a step; a prompt that starts with 13 is refused, one with 66 fails at its third."""

    def __init__(self) -> None:
        self.live: dict[str, tuple[Request, int]] = {}
        self.ended: list[TokenEvent] = []
        self.steps = 0
        self.most = 0

    @property
    def caps(self) -> Caps:
        return Caps(backend="counting", device="none", dtypes=(), kernels=())

    def add(self, request: Request) -> None:
        if request.prompt_token_ids[0] == 13:
            raise RequestError("13 is unlucky")
        self.live[request.request_id] = (request, 0)

    def step(self, timeout: float | None = None) -> list[TokenEvent]:
        self.steps += 1
        self.most = max(self.most, len(self.live))
        events, self.ended = self.ended, []
        for name, (request, done) in list(self.live.items()):
            if request.prompt_token_ids[0] == 66 and done == 2:
                events.append(TokenEvent(name, None, time.perf_counter(), finish=Status.FINISHED_ERROR, error="broke"))
                del self.live[name]
                continue
            last = done + 1 == request.params.max_tokens
            events.append(TokenEvent(name, 100 + done, time.perf_counter(), finish=Status.FINISHED_LENGTH if last else None))
            self.live[name] = (request, done + 1)
            if last:
                del self.live[name]
        return events

    def abort(self, request_id: str) -> bool:
        if request_id not in self.live:
            return False
        del self.live[request_id]
        self.ended.append(TokenEvent(request_id, None, time.perf_counter(), finish=Status.FINISHED_ABORT))
        return True

    @property
    def has_work(self) -> bool:
        return bool(self.live or self.ended)

    def stats(self) -> dict[str, Any]:
        return {"steps": np.int64(self.steps), "name": "counting", "busy": True}

    def reset_prefix_cache(self) -> bool:
        return True

    def close(self) -> None:
        pass


class Clock:
    """Time that passes only when it is asked, a microsecond each, or slept away: no load of this machine moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock.read)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    return clock


# The driver.


def test_every_request_gets_its_tokens_in_order_of_time() -> None:
    window = drive(Counting(), [Item(0.0, (1, 2), 3), Item(0.0, (1,), 1)])
    assert [row.tokens for row in window.rows] == [(100, 101, 102), (100,)]
    assert [row.prompt_len for row in window.rows] == [2, 1]
    assert all(row.ok and row.finish == "length" for row in window.rows)
    assert all(row.sent <= row.times[0] and list(row.times) == sorted(row.times) for row in window.rows)
    assert window.duration == max(row.times[-1] for row in window.rows)


def test_counters_are_those_of_the_window_alone() -> None:
    engine = Counting()
    drive(engine, [Item(0.0, (1,), 5)])
    assert drive(engine, [Item(0.0, (1,), 3)]).stats["steps"] == 3


def test_requests_that_arrive_at_once_run_together_and_later_ones_wait_for_their_time(clock: Clock) -> None:
    engine = Counting()
    drive(engine, [Item(0.0, (1,), 2)] * 3)
    assert engine.most == 3
    window = drive(engine, [Item(0.0, (1,), 1), Item(0.05, (1,), 1)])
    assert window.rows[1].sent >= window.rows[1].scheduled == 0.05
    assert engine.steps == 2 + 2  # it slept between the two: it did not step an idle engine


def test_a_refused_request_leaves_the_engine_idle() -> None:
    engine = Counting()
    with pytest.raises(RequestError, match="unlucky"):
        drive(engine, [Item(0.0, (1,), 9), Item(0.0, (13,), 1)])
    assert not engine.has_work
    assert drive(engine, [Item(0.0, (1,), 1)]).rows[0].ok


def test_a_request_that_ends_in_error_is_failed_and_the_others_are_not() -> None:
    failed, fine = drive(Counting(), [Item(0.0, (66,), 5), Item(0.0, (1,), 5)]).rows
    assert (failed.ok, failed.finish, failed.error, len(failed.tokens)) == (False, "error", "broke", 2)
    assert fine.ok


# The agenda.


def taken(agenda: Agenda, now: float) -> list[tuple[int, float]]:
    """All that is due at `now`: number, and since when."""
    found = []
    while due := agenda.take(now):
        found.append(due)
    return found


def test_in_an_open_loop_each_is_due_at_its_arrival_and_waits_for_nobody() -> None:
    agenda = Agenda([Item(0.0, (1,), 1), Item(0.5, (1,), 1), Item(0.2, (1,), 1)])
    assert not agenda.listens
    assert taken(agenda, 0.1) == [(0, 0.0)] and agenda.next_due == 0.2
    assert taken(agenda, 9.0) == [(2, 0.2), (1, 0.5)]
    assert (agenda.left, agenda.next_due) == (0, None)


def test_in_a_closed_loop_one_begins_whenever_one_has_ended() -> None:
    agenda = Agenda([Item(0.0, (1,), 1)] * 4, concurrency=2)
    assert taken(agenda, 1.0) == [(0, 0.0), (1, 0.0)]
    assert agenda.next_due is None and agenda.left == 2
    agenda.ended(1, 3.0)
    assert taken(agenda, 3.5) == [(2, 3.0)]
    agenda.ended(2, 4.0)
    agenda.ended(0, 4.0)
    assert taken(agenda, 4.0) == [(3, 4.0)] and agenda.left == 0


def test_more_users_than_requests_send_all_at_once() -> None:
    assert len(taken(Agenda([Item(0.0, (1,), 1)] * 3, concurrency=9), 0.0)) == 3


def test_a_turn_is_due_when_the_one_before_has_ended_and_was_thought_about() -> None:
    turns = [Item(0.5, (1,), 1), Item(0.5, (1,), 1, after=0, think=2.0), Item(0.5, (1,), 1, after=1)]
    agenda = Agenda(turns)
    assert taken(agenda, 9.0) == [(0, 0.5)] and agenda.next_due is None
    agenda.ended(0, 1.0)
    assert taken(agenda, 2.9) == [] and agenda.next_due == 3.0
    assert taken(agenda, 3.0) == [(1, 3.0)]
    agenda.ended(1, 4.0)
    assert taken(agenda, 4.0) == [(2, 4.0)]


def test_a_user_keeps_to_one_conversation_until_it_is_over() -> None:
    pair = lambda first: [Item(0.0, (1,), 1), Item(0.0, (1,), 1, after=first)]  # noqa: E731
    agenda = Agenda([*pair(0), *pair(2)], concurrency=1)
    order, now = [], 0.0
    while agenda.left:
        ((number, _),) = taken(agenda, now)
        order.append(number)
        now += 1.0
        agenda.ended(number, now)
    assert order == [0, 1, 2, 3]


# The driver with an agenda.


def test_a_closed_loop_keeps_its_users_busy_and_never_has_more_in_flight() -> None:
    engine = Counting()
    window = drive(engine, [Item(0.0, (1,), 1 + number % 3) for number in range(12)], concurrency=3)
    assert engine.most == 3 and all(row.ok for row in window.rows)
    assert most_in_flight(window.rows) == 3
    ends = {row.times[-1] for row in window.rows}
    assert all(row.scheduled in ends for row in window.rows[3:])  # each takes the place of one that had ended


def most_in_flight(rows: Sequence[Row]) -> int:
    """Requests that were sent and had not ended, at the busiest moment."""
    changes = [(row.sent, 1) for row in rows] + [(row.times[-1], -1) for row in rows]
    return max(np.cumsum([change for _, change in sorted(changes)]))


def test_a_turn_is_sent_after_the_end_of_the_one_before_and_its_pause() -> None:
    items = [Item(0.0, (1,), 3), Item(0.0, (1, 2), 2, after=0, think=0.02), Item(0.0, (1,), 2, after=1)]
    one, two, three = drive(Counting(), items).rows
    assert two.scheduled == one.times[-1] + 0.02 and two.sent >= two.scheduled
    assert three.scheduled == two.times[-1] and three.sent >= three.scheduled
    assert all(row.ok for row in (one, two, three))


def test_a_conversation_goes_on_after_a_turn_that_failed() -> None:
    failed, fine = drive(Counting(), [Item(0.0, (66,), 5), Item(0.0, (1,), 2, after=0)]).rows
    assert not failed.ok and fine.ok and fine.sent >= fine.scheduled > 0


def test_an_engine_that_forgets_a_request_is_noticed() -> None:
    class Forgetful(Counting):
        def step(self, timeout: float | None = None) -> list[TokenEvent]:
            self.live.clear()
            return []

    with pytest.raises(RuntimeError, match="1 requests wait for the end of others"):
        drive(Forgetful(), [Item(0.0, (1,), 1)] * 2, concurrency=1)


def test_an_engine_that_waits_is_told_until_when(clock: Clock) -> None:
    class Waiting(Counting):
        told: list[float | None]

        def step(self, timeout: float | None = None) -> list[TokenEvent]:
            self.told.append(timeout)
            return super().step(timeout)

    engine = Waiting()
    engine.told = []
    drive(engine, [Item(0.0, (1,), 2), Item(0.05, (1,), 1)])
    first, *_, last = engine.told
    assert first is not None and 0.04 < first < 0.05
    assert last is None  # nothing else is going to happen


def history_engine(num_pages: int = 200, **options: Any) -> Engine:
    return Engine(HistoryRunner(num_pages=num_pages), EngineConfig(max_model_len=400, **options), num_pages=num_pages)


def test_a_row_tells_when_its_first_step_began() -> None:
    window = drive(history_engine(max_num_seqs=2, max_num_batched_tokens=16), [Item(0.0, tuple(range(40)), 3)] * 5)
    for row in window.rows:
        assert row.started is not None and row.sent <= row.started < row.times[0]
    starts = [row.started or 0.0 for row in window.rows]
    assert starts == sorted(starts) and len(set(starts)) > 2  # two at a time, and their prompts take steps of their own
    assert window.steps and set(starts) <= {step.submitted for step in window.steps}
    assert drive(Counting(), [Item(0.0, (1,), 1)]).rows[0].started is None


def test_a_step_tells_the_load_around_it() -> None:
    items = [Item(0.0, tuple(range(start, start + 30)), 40) for start in range(6)]
    engine = history_engine(num_pages=14, max_num_seqs=4, max_num_batched_tokens=32, enable_prefix_caching=False)
    window = drive(engine, items)
    steps = window.steps or ()
    assert window.stats["num_preemptions"] > 0  # so that someone waits again
    for step in steps:
        assert step.running is not None and step.waiting is not None and 1 <= step.running <= 4
        assert step.pages_used is not None and step.pages_empty is not None and step.pages_total == 13
        assert 0 <= step.pages_empty <= step.pages_used <= 13
        assert step.pages_used - step.pages_empty >= sum(-(-int(length) // 16) for length in step.kv_lengths)
        assert step.prompt_tokens == sum(int(count) for count in step.counts if count > 1)
    assert steps[0].running == 2 and steps[0].waiting == 4  # two prompts into a budget of 32 tokens
    assert steps[0].started == ("0", "1") and sorted(name for step in steps for name in step.started) == list("012345")
    assert sum(step.prompt_tokens or 0 for step in steps) > 6 * 30  # the preempted were computed again


def test_a_prompt_of_one_token_is_a_prompt_all_the_same() -> None:
    first, *others = drive(history_engine(), [Item(0.0, (7,), 3)]).steps or ()
    assert first.prompt_tokens == 1 and [step.prompt_tokens for step in others] == [0, 0]


def test_pages_for_a_prompt_that_is_still_to_be_computed_are_empty() -> None:
    engine = history_engine(max_num_seqs=4, max_num_batched_tokens=16)
    steps = drive(engine, [Item(0.0, tuple(range(64)), 1)]).steps or ()
    assert [(step.pages_used, step.pages_empty) for step in steps] == [(4, 3), (4, 2), (4, 1), (4, 0)]


def test_times_of_steps_and_rows_are_on_one_clock() -> None:
    window = drive(history_engine(), [Item(0.0, tuple(range(20)), 4), Item(0.01, (1, 2), 4)])
    landed = [step.landed for step in window.steps or ()]
    assert {time for row in window.rows for time in row.times} <= set(landed)
    assert min(step.submitted for step in window.steps or ()) >= 0 and max(landed) == window.duration


def test_a_window_survives_the_trip_through_json() -> None:
    window = drive(history_engine(), [Item(0.0, tuple(range(20)), 3), Item(0.0, (1,), 2)], logprobs=2)
    window = Window(window.rows, window.duration, window.stats, window.steps, bandwidth=2.5)
    again = Window.of(json.loads(json.dumps(window.record(), default=lambda array: array.tolist())))
    assert (again.rows, again.duration, again.stats, again.bandwidth) == (window.rows, window.duration, window.stats, 2.5)
    assert window.steps and again.steps
    for one, other in zip(window.steps, again.steps, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    silent = drive(Counting(), [Item(0.0, (1,), 1)])
    assert Window.of(json.loads(json.dumps(silent.record(), default=lambda array: array.tolist()))).steps is None


def test_the_drivers_own_time_is_neither_the_engines_nor_sleep() -> None:
    class Slow(Counting):
        def add(self, request: Request) -> None:
            time.sleep(0.03)
            super().add(request)

        def step(self, timeout: float | None = None) -> list[TokenEvent]:
            time.sleep(0.03)
            return super().step(timeout)

    begin = time.perf_counter()
    window = drive(Slow(), [Item(0.0, (1,), 2), Item(0.2, (1,), 2)])
    elapsed = time.perf_counter() - begin
    assert 0 < window.stats["driver_seconds"] <= elapsed - 6 * 0.03  # two additions and four steps


@pytest.mark.accept
def test_the_driver_takes_less_than_a_tenth_of_a_millisecond_a_step() -> None:
    """Of 64 requests at once: a fiftieth of a step of 5 ms, and no model takes less for so many."""
    engine = Engine(IdleRunner(num_pages=8192), EngineConfig(max_num_seqs=64, max_model_len=2048), num_pages=8192)
    window = drive(engine, [Item(0.0, tuple(range(60)), 300)] * 64)
    assert window.stats["driver_seconds"] / window.stats["steps"] < 1e-4
