"""Run a workload on an engine and record when each token arrived. No framework and no statistic is known here."""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Self

from common.engine import Engine
from common.errors import RequestError
from common.interface import InferenceEngine
from common.request import Logprobs, Request, SamplingParams, TokenEvent
from common.step_log import StepRecord
from experiments.load.arrivals import Agenda
from experiments.load.machine import Watch
from experiments.load.workload import Item

LAG_S = 0.05
"""Seconds that an event may be older than the call of `step` before the one that returned it.

An event that the host saw before that call would have been returned by it. A worker process stamps an event before it sends it,
and the machine may pause the process in between.
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one request. Times are seconds since the start of the window."""

    request_id: str
    prompt_len: int
    output_len: int
    """Tokens asked for."""
    scheduled: float
    """When it was due: it arrived, its conversation had come to it, or a user of a closed loop was free."""
    sent: float
    """When the engine was handed it: never before, and later by what the step at hand still took."""
    started: float | None = None
    """When its first step began; None of an engine that does not report it."""
    times: tuple[float, ...] = ()
    """When the host saw each output token."""
    tokens: tuple[int, ...] = ()
    finish: str | None = None
    """A terminal `Status`; `length` for a request that went well."""
    error: str | None = None
    logprobs: tuple[Logprobs, ...] = ()
    """Of each output token, if asked for."""

    @property
    def ok(self) -> bool:
        """Whether the request gave every token it was asked for."""
        return self.error is None and len(self.tokens) == self.output_len

    def record(self) -> dict[str, Any]:
        """What JSON can hold, not copied any deeper than it must be: there may be millions of tokens."""
        return vars(self) | {"logprobs": [vars(entry) for entry in self.logprobs]}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of `record` and a trip through JSON."""
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
        values["logprobs"] = tuple(Logprobs(**entry) for entry in record["logprobs"])
        return cls(**values)


@dataclass(frozen=True)
class Window:
    """One timed run of a workload."""

    rows: tuple[Row, ...]
    duration: float
    """Seconds from the start to the last event."""
    stats: Mapping[str, float] = field(default_factory=dict)
    """By how much each counter of the engine and of the machine rose (see `Watch`). `driver_seconds` were spent here, outside
    of the engine and awake. `window_seconds` is the time of the window, and `outer_seconds` the same by the clock of the parent
    process. A counter that is not reported is missing."""
    steps: tuple[StepRecord, ...] | None = None
    """The steps of the engine, with times since the start of the window; None of an engine without a step log."""
    bandwidth: float | None = None
    """Bytes of memory that the machine could read in a second beside this window; None if that was not measured."""
    began: float = 0.0
    """When it started, on the clock of `perf_counter` of the process that ran it."""
    dropped: bool = False
    """Whether no figure counts it (see `experiments.metrics.disturbed`)."""

    def record(self) -> dict[str, Any]:
        """What JSON can hold, but for the arrays in `steps`."""
        return vars(self) | {"rows": [row.record() for row in self.rows]}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of `record` and a trip through JSON."""
        steps = record["steps"]
        return cls(
            rows=tuple(map(Row.of, record["rows"])),
            duration=record["duration"],
            stats=record["stats"],
            steps=None if steps is None else tuple(map(StepRecord.of, steps)),
            bandwidth=record["bandwidth"],
            began=record["began"],
        )


def drive(
    engine: InferenceEngine,
    items: Sequence[Item],
    logprobs: int | None = None,
    concurrency: int | None = None,
    mark: Callable[[], None] = lambda: None,
) -> Window:
    """Send each request when it is due (see `Agenda`), greedy and without stopping at EOS, and step until all have ended.

    `mark` is called just before the window and just after it, so that another process can measure the window by its own clock.
    Raises `RequestError` if the engine refuses one, after it has aborted the others.
    """
    requests = [
        Request(
            request_id=f"{number}",
            prompt_token_ids=item.prompt,
            params=SamplingParams(
                temperature=0.0, max_tokens=item.output_len, ignore_eos=True, detokenize=False, logprobs=logprobs
            ),
        )
        for number, item in enumerate(items)
    ]
    agenda = Agenda(items, concurrency)
    sent: dict[int, tuple[float, float]] = {}  # when it was due, and when it was sent
    events: list[TokenEvent] = []
    last_seen = 0.0  # when the driver itself had the last event
    receipts, lag = 0, 0.0  # steps with events, and the sum of the ages of their newest events at receipt
    strays = 0  # events stamped before their request was sent, before the step that may have computed them, or after receipt
    clock = time.perf_counter
    gc.collect()  # garbage of the last window is not this one's to pay for
    before = numbers(engine.stats())
    watch = Watch(engine.caps.device)
    with step_log(engine) as log:
        away = 0.0  # seconds in the engine, or asleep
        mark()
        start = called = clock()
        while agenda.left or engine.has_work:
            while due := agenda.take(clock() - start):
                number, when = due
                begin = clock()
                sent[number] = when, begin - start
                add_or_abort(engine, requests, number)
                away += clock() - begin
            begin = clock()
            wait = None if agenda.next_due is None else max(0.0, agenda.next_due - (begin - start))
            if engine.has_work:
                seen = engine.step(wait)
                away += clock() - begin
                events += seen
                if seen:
                    last_seen, oldest = clock(), called - LAG_S
                    receipts, lag = receipts + 1, lag + last_seen - seen[-1].time
                    strays += sum(not max(oldest, start + sent[int(e.request_id)][1]) <= e.time <= last_seen for e in seen)
                called = begin
                if agenda.listens:
                    for event in seen:
                        if event.finish:
                            agenda.ended(int(event.request_id), event.time - start)
            elif wait is None:
                raise RuntimeError(f"The engine is idle, and {agenda.left} requests wait for the end of others; this is a bug.")
            else:
                time.sleep(wait)
                away += clock() - begin
        whole = clock() - start
        mark()
    machine = watch.rise()
    after = numbers(engine.stats())
    counters = {name: value - before.get(name, 0) for name, value in after.items()} | machine
    counters |= {"window_seconds": whole, "driver_seconds": whole - away, "receipts": receipts, "lag_seconds": lag}
    if "scheduled_tokens" in counters:
        counters["skipped_tokens"] = skipped(items, events, counters)
    duration = events[-1].time - start if events else 0.0
    counters |= {"stray_times": strays, "missing_seconds": max(0.0, last_seen - start - duration) if events else 0.0}
    steps = None if log is None else tuple(since(start, step) for step in log)
    return Window(rows(items, sent, events, start, steps or ()), duration, counters, steps, began=start)


def skipped(items: Sequence[Item], events: Sequence[TokenEvent], counters: Mapping[str, float]) -> float:
    """Return how many tokens fewer went through the model than the outputs need, beside those that caches had.

    A request with n output tokens needs its prompt and n - 1 of them. Tokens that are computed twice hide skipped ones.
    """
    outputs = Counter(int(event.request_id) for event in events if event.token_id is not None)
    needed = sum(len(items[number].prompt) + count - 1 for number, count in outputs.items())
    cached = counters.get("prefix_cache_hits", 0) + counters.get("external_prefix_cache_hits", 0)
    return max(0, needed - counters["scheduled_tokens"] - cached)


def since(start: float, step: StepRecord) -> StepRecord:
    return step._replace(submitted=step.submitted - start, landed=step.landed - start)


@contextlib.contextmanager
def step_log(engine: InferenceEngine) -> Iterator[list[StepRecord] | None]:
    """A list that grows by each step while the block runs; None for an engine that keeps no such log."""
    if not isinstance(engine, Engine):
        yield None
        return
    log: list[StepRecord] = []
    engine.step_log = log
    try:
        yield log
    finally:
        engine.step_log = None


def add_or_abort(engine: InferenceEngine, requests: Sequence[Request], number: int) -> None:
    """Add one request; if it is refused, leave the engine idle as it was found."""
    try:
        engine.add(requests[number])
    except RequestError:
        for request in requests:
            engine.abort(request.request_id)
        while engine.has_work:
            engine.step()
        raise


def numbers(stats: Mapping[str, Any]) -> dict[str, Any]:
    """The counters among an engine's statistics."""
    return {name: value for name, value in stats.items() if isinstance(value, Real) and not isinstance(value, bool)}


def rows(
    items: Sequence[Item],
    sent: Mapping[int, tuple[float, float]],
    events: Sequence[TokenEvent],
    start: float,
    steps: Sequence[StepRecord],
) -> tuple[Row, ...]:
    """Sort what was seen by request."""
    of_request: list[list[TokenEvent]] = [[] for _ in items]
    for event in events:
        of_request[int(event.request_id)].append(event)
    started = {name: step.submitted for step in reversed(steps) for name in step.started}
    return tuple(
        row(number, item, *sent[number], started.get(f"{number}"), of_request[number], start)
        for number, item in enumerate(items)
    )


def row(
    number: int, item: Item, due: float, sent: float, started: float | None, events: Sequence[TokenEvent], start: float
) -> Row:
    """Collect one request's events. A terminal event may bring a token or not."""
    tokens = [event for event in events if event.token_id is not None]
    finish = next((event.finish for event in events if event.finish), None)
    return Row(
        request_id=f"{number}",
        prompt_len=len(item.prompt),
        output_len=item.output_len,
        scheduled=due,
        sent=sent,
        started=started,
        times=tuple(event.time - start for event in tokens),
        tokens=tuple(event.token_id for event in tokens if event.token_id is not None),
        finish=finish.value if finish else None,
        error=next((event.error for event in events if event.error), None),
        logprobs=tuple(event.logprobs for event in tokens if event.logprobs is not None),
    )
