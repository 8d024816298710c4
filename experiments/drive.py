"""Run a workload on an engine and write down when each token was seen. Knows no framework, process or statistic."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Self

import numpy as np

from common.engine import Engine, StepRecord
from common.errors import RequestError
from common.interface import InferenceEngine
from common.request import Logprobs, Request, SamplingParams, TokenEvent
from experiments.workload import Item


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one request. Times are seconds since the start of the window."""

    request_id: str
    prompt_len: int
    output_len: int
    """Tokens asked for."""
    scheduled: float
    """When the workload wanted it sent."""
    sent: float
    """When it was handed to the engine."""
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

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict` and a trip through JSON."""
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
    """By how much each counter of the engine rose."""
    steps: tuple[StepRecord, ...] | None = None
    """What the engine did, step by step; None of an engine that does not tell."""
    bandwidth: float | None = None
    """Bytes of memory that the machine could read in a second beside this window; None if that was not measured."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict` and a trip through JSON."""
        rows, steps = tuple(map(Row.of, record["rows"])), record["steps"]
        if steps is not None:
            steps = tuple(StepRecord(*step[:3], *(np.array(by_seq, np.int32) for by_seq in step[3:])) for step in steps)
        return cls(rows, record["duration"], record["stats"], steps)


def drive(engine: InferenceEngine, items: Sequence[Item], logprobs: int | None = None) -> Window:
    """Send each request at its arrival, greedy and deaf to EOS, and step until all have ended.

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
    sent: list[float] = []
    events: list[list[TokenEvent]] = [[] for _ in items]
    gc.collect()  # garbage of the last window is not this one's to pay for
    before = numbers(engine.stats())
    with step_log(engine) as log:
        start = end = time.perf_counter()
        while len(sent) < len(items) or engine.has_work:
            now = time.perf_counter() - start
            while len(sent) < len(items) and items[len(sent)].arrival <= now:
                add_or_abort(engine, requests, len(sent))
                sent.append(time.perf_counter() - start)
            if not engine.has_work:
                time.sleep(max(0.0, items[len(sent)].arrival - (time.perf_counter() - start)))
                continue
            for event in engine.step():
                events[int(event.request_id)].append(event)
                end = event.time
    after = numbers(engine.stats())
    rows = tuple(row(number, item, sent[number], events[number], start) for number, item in enumerate(items))
    counters = {name: value - before.get(name, 0) for name, value in after.items()}
    return Window(rows, end - start, counters, None if log is None else tuple(log))


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
        for request in requests[:number]:
            engine.abort(request.request_id)
        while engine.has_work:
            engine.step()
        raise


def numbers(stats: Mapping[str, Any]) -> dict[str, Any]:
    """The counters among an engine's statistics."""
    return {name: value for name, value in stats.items() if isinstance(value, Real) and not isinstance(value, bool)}


def row(number: int, item: Item, sent: float, events: Sequence[TokenEvent], start: float) -> Row:
    """Collect one request's events. A terminal event may bring a token or not."""
    tokens = [event for event in events if event.token_id is not None]
    finish = next((event.finish for event in events if event.finish), None)
    return Row(
        request_id=f"{number}",
        prompt_len=len(item.prompt),
        output_len=item.output_len,
        scheduled=item.arrival,
        sent=sent,
        times=tuple(event.time - start for event in tokens),
        tokens=tuple(event.token_id for event in tokens if event.token_id is not None),
        finish=finish.value if finish else None,
        error=next((event.error for event in events if event.error), None),
        logprobs=tuple(event.logprobs for event in tokens if event.logprobs is not None),
    )
