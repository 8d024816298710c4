"""Engines that cheat in a way of their own draw a remark from `compare`, and an engine that does not cheat draws none."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.request import Status, TokenEvent
from experiments import compare
from experiments.load.driver import LAG_S, drive, skipped
from experiments.load.workload import Item
from experiments.report.verdict import headline
from tests.history_backend import command, history, last_line
from tests.test_drive import Counting

__all__ = ["history"]
WORDS = (
    "model=tiny-llama",
    "workload=fixed",
    "workload.num_requests=3",
    "workload.output_len=24",
    "measure=quick",
    "measure.blocks=3",
    "measure.limits_s=0",
    "measure.warmup_requests=0",
    "correctness.num_requests=1",
)
SLEEP_S = 0.02
"""Of each step, so that a shrunk time is more than `LAG_S` off."""
PACKAGE = f"""
import os
import time
from dataclasses import replace

import historyinfer
from common.engine import Engine
from common.request import Status, TokenEvent

WAY = os.environ["CHEAT_WAY"]
if WAY == "slows":  # its clock, for all that looks the clock up later
    real, zero = time.perf_counter, time.perf_counter()
    time.perf_counter = lambda: zero + 0.7 * (real() - zero)
ADD, STEP = Engine.add, Engine.step
began, runs = 0.0, 0
outputs = {{}}  # of the first run, by request
replayed = []


class ModelRunner(historyinfer.ModelRunner):
    sampled = 0

    def submit(self, batch, *more):
        time.sleep({SLEEP_S})
        return super().submit(batch, *more)

    def _run(self, batch):
        result = super()._run(batch)
        before, self.sampled = self.sampled, self.sampled + len(result.tokens)
        wrong = WAY == "late" and before < 190 <= self.sampled
        return replace(result, tokens=(result.tokens + 1) % 320) if wrong else result


def add(engine, request):
    global began, runs
    if not engine.has_work and not replayed:
        began, runs = time.perf_counter(), runs + 1
    params, number = request.params, request.request_id
    if WAY == "stops" and number == "1":  # at an ordinary token, as if it ended the output
        params = replace(params, stop_token_ids=tuple(range(0, 320, 8)))
    if WAY == "fewer" and number == "1":
        params = replace(params, max_tokens=params.max_tokens - 2)
    if WAY == "skips":
        request = replace(request, prompt_token_ids=request.prompt_token_ids[-1:])
    if WAY == "caches" and runs > 1:
        now, tokens = time.perf_counter(), outputs[number]
        ends = [None] * (len(tokens) - 1) + [Status.FINISHED_LENGTH]
        replayed.extend(TokenEvent(number, token, now, finish=end) for token, end in zip(tokens, ends))
        return
    ADD(engine, replace(request, params=params))


def step(engine, timeout=None):
    events = STEP(engine, timeout)
    for event in events:
        if event.token_id is not None and runs == 1:
            outputs.setdefault(event.request_id, []).append(event.token_id)
    if WAY == "shaves":
        events = [replace(e, time=began + 0.956 * (e.time - began)) for e in events]
    if WAY == "ages":  # all times by the same, in windows so long that their share is small
        events = [replace(e, time=max(began + 0.0005, e.time - 0.045)) for e in events]
    if WAY in ("shrinks", "bends"):  # all times, or all but the last of each request
        events = [replace(e, time=e.time if WAY == "bends" and e.finish else began + 0.7 * (e.time - began)) for e in events]
    events, replayed[:] = replayed + events, []
    return [replace(e, time=time.perf_counter()) for e in events] if WAY == "caches" else events


Engine.add, Engine.step = add, step
if WAY == "caches":
    Engine.has_work = property(lambda engine, before=Engine.has_work.fget: bool(replayed) or before(engine))
"""
FIGURES = {"caches": "jumps between blocks", "shrinks": "events have times outside", "bends": "events have times outside"}
FIGURES |= {"shaves": "more time than the events", "ages": "ms before the driver received", "slows": "its clock shows"}
REMARKS = FIGURES | {"stops": "requests failed", "fewer": "requests failed", "skips": "tokens fewer than the prompts"}
"""The remark on the figures of the engine that cheats in each way; none on a token alone."""


def compared(way: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """Compare an honest engine with one that cheats; return the exit code and the result."""
    package = folder / "packages" / "cheatinfer"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text(PACKAGE)
    (folder / "configs" / "engine" / "cheat.yaml").write_text("defaults: [history, _self_]\nname: cheat\n")
    monkeypatch.setenv("CHEAT_WAY", way)
    engines = "engines=[{name: cheat, label: honest}, {name: cheat, label: cheat}]" if way == "" else "engines=[history,cheat]"
    code: Any = 0
    try:
        command(monkeypatch, compare.main, *WORDS, engines, *words)
    except SystemExit as exit:
        code = exit.code
    return code, last_line(capsys.readouterr().out)


@pytest.mark.accept
@pytest.mark.parametrize("way", [*REMARKS, "late"])
def test_a_cheating_engine_is_named(
    way: str, history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = compared(way, history, monkeypatch, capsys)
    cheat = result["engines"].get("cheat", {})
    told = " ".join(
        [*cheat.get("contaminated", ()), *cheat.get("unsure", ()), *(f["message"] for f in result["failures"].values())]
    )
    if way in REMARKS:
        assert REMARKS[way] in told, told
    assert not result["engines"]["history"]["contaminated"]
    if way not in ("shrinks", "bends", "shaves", "ages", "slows"):  # which have the right tokens
        assert code == 4 and result["first_timed_difference"]["engine"] == "cheat"
        assert "cheat differs in block" in headline(result).said
    else:
        assert code == 0 and result["comparisons"]["cheat"]["contaminated"]
    if way == "late":
        assert result["first_timed_difference"]["block"] == 2


@pytest.mark.accept
def test_twenty_runs_of_unchanged_engines_draw_no_remark(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remarks = []
    for seed in range(20):
        code, result = compared("", history, monkeypatch, capsys, f"seed={seed}")
        told = [each for mine in result["engines"].values() for each in mine["contaminated"]]
        if code or told or headline(result).tone != "good" or result["timed_differences"]:
            remarks.append((seed, code, told, headline(result).said))
    assert not remarks, f"{len(remarks)} of 20 runs: {remarks}"


def test_tokens_that_the_model_never_computed_are_counted() -> None:
    items = [Item(0.0, tuple(range(10)), 4), Item(0.0, tuple(range(6)), 1)]
    events = [TokenEvent("0", 1, 0.0)] * 4 + [TokenEvent("1", 1, 0.0, finish=Status.FINISHED_LENGTH)]
    assert skipped(items, events, {"scheduled_tokens": 19}) == 0
    assert skipped(items, events, {"scheduled_tokens": 10}) == 9
    assert skipped(items, events, {"scheduled_tokens": 10, "prefix_cache_hits": 9}) == 0
    assert skipped(items, events, {"scheduled_tokens": 30}) == 0


class Clocked(Counting):
    """Steps of 10 ms, whose events are `lag(step)` seconds too old."""

    def __init__(self, lag: Callable[[int], float]) -> None:
        super().__init__()
        self.lag = lag

    def step(self, timeout: float | None = None) -> list[TokenEvent]:
        time.sleep(0.01)
        return [replace(event, time=event.time - self.lag(self.steps)) for event in super().step(timeout)]


@pytest.mark.parametrize(
    ("lag", "strays"), [(lambda step: 0.0, 0), (lambda step: 0.01, 0), (lambda step: 2 * LAG_S * (step == 12), 1)]
)
def test_event_times_lie_within_the_step_that_may_have_computed_them(lag: Callable[[int], float], strays: int) -> None:
    """A token in the middle is stamped earlier than the step before its own began; the last token is exact."""
    window = drive(Clocked(lag), [Item(0.0, (1,), 20)])
    assert window.stats["stray_times"] == strays
    assert window.stats["missing_seconds"] < LAG_S  # the end alone does not show the token in the middle
