"""A step that fails on a real backend costs time and nothing else: everyone else gets the tokens they would have got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from common.batch import Batch, Mask
from common.engine import Engine
from common.interface import ModelRunner, Result, StepHandle
from common.request import Request, SamplingParams, Status, TokenEvent
from tests.backends import engine_config, make_engine
from tests.events import tokens

MODEL = "tiny-qwen3"
CONFIG = engine_config(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128)
PAGES = 40
POISON = 319
"""A token that none of the good prompts has."""


class Injected(RuntimeError):
    """What our faults raise."""


class Fails(StepHandle):
    """A step whose result cannot be had."""

    def result(self) -> Result:
        raise Injected("while the step ran")


def good() -> list[Request]:
    rng = np.random.default_rng(0)
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.9, "seed": 4, "top_p": 0.9}]
    return [
        Request(
            request_id=f"r{i}",
            prompt_token_ids=rng.integers(0, 300, int(rng.integers(1, 60))).tolist(),
            params=SamplingParams(max_tokens=20, **kinds[i % 2]),
        )
        for i in range(7)
    ]


def engine(backend: str) -> Engine:
    return make_engine(backend, MODEL, CONFIG, pages=PAGES)


def outputs(events: dict[str, list[TokenEvent]]) -> dict[str, tuple[list[int], Status | None]]:
    return {name: (tokens(es), es[-1].finish) for name, es in events.items()}


def ruin(runner: Any) -> None:
    """Leave the runner as a step that dies half way does: JAX has given its state away, PyTorch has overwritten it."""
    for array in jax.tree.leaves(runner.state):
        if isinstance(array, jax.Array):
            array.delete()
        else:
            array.fill_(float("nan") if array.is_floating_point() else -1)


@pytest.mark.parametrize("where", ["before the step", "after the step", "in its result"])
def test_all_requests_finish_with_the_same_tokens(backend: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = outputs(engine(backend).run(good()))
    again = engine(backend)
    submit, count = again.runner.submit, 0

    def faulty(batch: Batch, mask: Mask = None) -> StepHandle:
        nonlocal count
        count += 1
        if count not in (2, 9, 17):
            return submit(batch, mask)
        if where != "before the step":
            submit(batch, mask)
        ruin(again.runner)
        if where == "in its result":
            return Fails()
        raise Injected(where)

    monkeypatch.setattr(again.runner, "submit", faulty)
    assert outputs(again.run(good())) == right
    assert again.stats()["num_resets"] == 3 and count > 20
    assert again.stats()["kv_cache_usage"] == 0.0


def test_a_request_that_always_fails_ends_alone(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = outputs(engine(backend).run(good()))
    again = engine(backend)
    submit = again.runner.submit

    def faulty(batch: Batch, mask: Mask = None) -> StepHandle:
        pending = submit(batch, mask)
        if (batch.token_ids == POISON).any():
            ruin(again.runner)
            raise Injected("this prompt is poison")
        return pending

    monkeypatch.setattr(again.runner, "submit", faulty)
    poison = Request(request_id="bad", prompt_token_ids=[5] * 50 + [POISON], params=SamplingParams(max_tokens=5))
    events = again.run([*good()[:3], poison, *good()[3:]])
    (end,) = events.pop("bad")
    assert end.finish is Status.FINISHED_ERROR and end.error is not None and "this prompt is poison" in end.error
    assert outputs(events) == right


def test_an_interrupt_reaches_the_caller_and_loses_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = outputs(engine(backend).run(good()))
    again = engine(backend)
    submit, count = again.runner.submit, 0

    def interrupted(batch: Batch, mask: Mask = None) -> StepHandle:
        nonlocal count
        count += 1
        pending = submit(batch, mask)
        if count == 5:
            ruin(again.runner)
            raise KeyboardInterrupt
        return pending

    monkeypatch.setattr(again.runner, "submit", interrupted)
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in good()}
    for request in good():
        again.add(request)
    interrupts = 0
    while again.has_work:
        try:
            for event in again.step():
                events[event.request_id].append(event)
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 1 and outputs(events) == right


def test_logits_that_are_not_finite_end_their_request_only(backend: str) -> None:
    right = outputs(engine(backend).run(good()))
    again = engine(backend)
    requests = good()
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    for request in requests:
        again.add(request)
    victim = requests[0].request_id
    while again.has_work:
        for event in again.step():
            events[event.request_id].append(event)
        if len(events[victim]) == 3:
            spoil(again.runner, again.scheduler.live[victim].pages[:1])
    assert [event.finish for event in events[victim]] == [None, None, None, Status.FINISHED_ERROR]
    del events[victim]
    assert outputs(events) == {name: output for name, output in right.items() if name != victim}
    # Its pages are shared with nobody and clean themselves by being written again.
    assert outputs(again.run(requests)) == right


def spoil(runner: ModelRunner, pages: Sequence[int]) -> None:
    """NaN in all keys and values of pages."""
    runner.write_pages(0, pages, {name: np.full_like(x, np.nan) for name, x in runner.read_pages(0, pages).items()})
