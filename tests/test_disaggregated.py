"""Prompts computed by one process and gone on with by another are one engine: same tokens, one end each, whatever becomes of
either, in whatever state."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from common.errors import BackendError, ConfigError, RequestError
from common.kv_transfer.shared_memory import SHARES
from common.llm import LLM
from common.replicas.disaggregated import Disaggregated
from common.request import Request, SamplingParams, Status, TokenEvent, fan_out
from experiments import compare, lab
from tests import history_backend
from tests.backends import BACKENDS, engine_config, hidden_states, make_engine
from tests.history_backend import ROOT, command, last_line
from tests.http_server import PATIENCE_S, Awake, serving, until
from tests.http_server import history as history_package
from tests.processes import VOCAB, history, judge, requests, right, running, told
from tests.replica_mains import MODEL, PAIR

__all__ = ["history"]


@pytest.fixture(scope="module")
def lasting(history: Path) -> Iterator[Disaggregated]:
    with running(Disaggregated, PAIR) as engine:
        yield engine


@pytest.fixture
def two(lasting: Disaggregated, history: Path) -> Iterator[Disaggregated]:
    """One that computes prompts and one that goes on, which serve; afterwards nothing goes wrong in them any more."""
    Awake().wait(lambda: all(state.serves for state in lasting.replicas))
    lasting.step(0)
    lasting._num_requests = 0  # seeds as in a new engine
    yield lasting
    for file in history.iterdir():
        file.unlink()
    for part in (lasting._prefill, lasting._decode):
        for name in list(part._live):
            lasting.abort(name)
    while lasting.has_work:
        lasting.step()


def drive(
    engine: Disaggregated, asked: Sequence[Request], when: Callable[[int], bool], meanwhile: Callable[[], object]
) -> dict[str, list[TokenEvent]]:
    """Run them all; do something once, as soon as `when` holds of the number of tokens that are out."""
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in asked}
    for request in asked:
        engine.add(request)
    count, done = 0, False
    while engine.has_work:
        if not done and when(count):
            meanwhile()
            done = True
        for event in engine.step():
            events[event.request_id].append(event)
            count += 1
    assert done
    return events


def idle(engine: Disaggregated) -> bool:
    """Whether no page is held in any of them, as far as they have told."""
    engine.step(0)
    return not any(part.stats()["kv_cache_usage"] for part in (engine._prefill, engine._decode))


def test_outputs_are_those_of_one_engine_and_no_prompt_is_computed_twice(two: Disaggregated) -> None:
    asked, before = requests(), two.stats()
    judge(asked, two.run(asked))
    stats = two.stats()
    rise = {name: stats[name] - before[name] for name in before if name != "replicas"}
    prompts = sum(len(request.prompt_token_ids) for request in asked)
    assert rise["prompt_tokens"] == rise["external_prefix_cache_hits"] == prompts
    assert rise["generation_tokens"] == rise["scheduled_tokens"] - prompts + len(asked)
    assert rise["num_recomputed"] == rise["num_replicas_lost"] == 0
    assert (rise["prompts_handed_over"], rise["prompts_recomputed"]) == (len(asked), 0)
    Awake().wait(lambda: idle(two))
    assert two.reset_prefix_cache() and not two.caps.observes


def test_what_only_some_of_them_tell_is_told_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages, _ = history_package(tmp_path)
    (packages / "tellinginfer").mkdir()
    (packages / "tellinginfer" / "__init__.py").write_text(
        "import historyinfer\n"
        "class ModelRunner(historyinfer.ModelRunner):\n"
        "    def stats(self):\n"
        "        return {'communication_seconds': 1.0, 'rank_bytes': 100}\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{packages}{os.pathsep}{ROOT}")
    with running(Disaggregated, replace(PAIR, prefill_parallel_size=2, prefill_backend="telling")) as engine:
        stats = engine.stats()
    assert (stats["communication_seconds"], stats["rank_bytes"], stats["kv_cache_usage"]) == (2.0, 100, 0)
    assert [each.get("rank_bytes") for each in stats["replicas"]] == [100, 100, None]


def test_what_ends_with_its_first_token_goes_nowhere(two: Disaggregated) -> None:
    asked = [
        replace(request, params=replace(request.params, **change))
        for request, change in zip(
            requests(3),
            ({"max_tokens": 1}, {"stop_token_ids": [*range(VOCAB)]}, {"max_tokens": 1, "min_tokens": 1}),
            strict=True,
        )
    ]
    before = two.stats()["replicas"][1]["steps"]
    judge(asked, two.run(asked))
    assert two.stats()["replicas"][1]["steps"] == before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("which", [0, 1], ids=["prefill", "decode"])
@pytest.mark.parametrize("after", [1, 30, *(pytest.param(after, marks=pytest.mark.accept) for after in (0, 300))])
def test_one_that_ends_on_the_way_costs_nobody_a_token(
    two: Disaggregated, history: Path, how: signal.Signals, which: int, after: int
) -> None:
    (history / "slow").touch()
    asked, before = requests(), two.stats()
    judge(asked, drive(two, asked, lambda count: count >= after, lambda: os.kill(two.replicas[which].pid, how)))
    Awake().wait(lambda: two.stats()["num_replicas_lost"] == before["num_replicas_lost"] + 1)
    Awake().wait(lambda: idle(two))
    rise = {name: two.stats()[name] - before[name] for name in ("prompts_handed_over", "prompts_recomputed")}
    assert sum(rise.values()) >= len(asked)  # one may have come over and been computed again


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("which", [0, 1], ids=["prefill", "decode"])
@pytest.mark.parametrize("state", ["reading", "writing"])
def test_one_that_ends_while_pages_are_handed_over_is_noticed_soon_and_costs_nobody_a_token(
    two: Disaggregated, history: Path, how: signal.Signals, which: int, state: str
) -> None:
    """Pages have been accepted and are read, or have come and are written."""
    (history / f"hold {state}").touch()
    asked, lost = requests(6), two.stats()["num_replicas_lost"]

    def end() -> None:
        os.kill(two.replicas[which].pid, how)
        waited = Awake().wait(lambda: not two._hear() and two.stats()["num_replicas_lost"] == lost + 1)
        assert waited < 2
        (history / f"hold {state}").unlink()

    held: list[TokenEvent] = []
    hear = two._hear
    try:
        two._hear = lambda: held.extend(hear()) or []  # type: ignore[method-assign]
        for request in asked:
            two.add(request)
        Awake().wait(lambda: not two._hear() and (history / state).exists())
        end()
    finally:
        two._hear = hear  # type: ignore[method-assign]
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in asked}
    while two.has_work:
        for event in (*held, *two.step()):
            events[event.request_id].append(event)
        held.clear()
    judge(asked, events)
    Awake().wait(lambda: idle(two))


@pytest.mark.parametrize("state", ["reading", "writing"])
def test_a_request_can_be_ended_while_its_pages_are_handed_over_and_they_come_back(
    two: Disaggregated, history: Path, state: str
) -> None:
    (history / f"hold {state}").touch()
    (asked,) = requests(1)
    two.add(asked)
    events: list[TokenEvent] = []
    Awake().wait(lambda: events.extend(two.step(0)) or (history / state).exists())
    assert two.abort(asked.request_id) and not two.abort(asked.request_id)
    events += two.step()
    assert [event.finish for event in events] == [None, Status.FINISHED_ABORT]
    (history / f"hold {state}").unlink()
    assert not two.has_work
    Awake().wait(lambda: idle(two))


def test_a_request_can_be_ended_and_its_name_used_again_while_its_prompt_is_computed(two: Disaggregated, history: Path) -> None:
    (history / "slow").touch()
    request, again = requests(2)
    again = replace(again, request_id=request.request_id)
    two.add(request)
    assert two.finish(request.request_id, "stop")
    two._num_requests = 1
    two.add(again)
    first, *rest = [event for events in two.run([]).values() for event in events]
    assert (first.finish, first.stop_reason) == (Status.FINISHED_STOP, "stop")
    oracle = right(again, 1)
    assert [event.token_id for event in rest] == oracle.tokens
    assert [event.finish for event in rest] == [None] * (len(rest) - 1) + [oracle.finish]


def test_continuations_of_one_prompt_are_those_of_one_engine(two: Disaggregated) -> None:
    params = SamplingParams(n=4, seed=9, max_tokens=12)
    asked = fan_out(Request(request_id="n", prompt_token_ids=[*range(3, 40)], params=params))
    judge(asked, two.run(asked))


def test_steps_are_logged_under_the_names_of_requests(two: Disaggregated) -> None:
    asked = requests(5)
    two.step_log = []
    two.run(asked)
    started = [name for record in two.step_log for name in record.started]
    two.step_log = None
    assert sorted(started) == sorted(request.request_id for request in asked)


def test_more_than_one_of_each(history: Path) -> None:
    with running(Disaggregated, replace(PAIR, prefill_parallel_size=2, data_parallel_size=2)) as engine:
        asked = requests()
        judge(asked, engine.run(asked))
        steps = [told["steps"] for told in engine.stats()["replicas"]]
        assert len(steps) == 4 and all(steps)


def test_pages_stay_where_they_are_while_there_is_no_room_for_them(history: Path) -> None:
    """One transfer at a time; the others neither pile up nor are given up."""
    (history / "no room").touch()
    with running(Disaggregated, replace(PAIR, max_num_seqs=2)) as engine:
        (history / "slow").touch()
        asked = requests(12)
        judge(asked, engine.run(asked))
        stats = engine.stats()
        prompts = sum(len(request.prompt_token_ids) for request in asked)
        assert stats["external_prefix_cache_hits"] == stats["prompt_tokens"] == prompts
        Awake().wait(lambda: idle(engine))
    for file in history.iterdir():
        file.unlink()


def test_no_process_and_no_socket_outlives_an_engine_that_is_killed(history: Path) -> None:
    words = [sys.executable, "-m", "tests.replica_mains", "disaggregated"]
    parent = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    others = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    listening = lambda: [SHARES and f"tandem-{each.pid}-" in Path("/proc/net/unix").read_text() for each in others]  # noqa: E731
    assert listening() == [SHARES] * 2
    others[0].suspend()
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(others, timeout=5)
    assert alive == [] and not any(listening())


def test_where_no_replica_computes_prompts_any_more_the_others_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages, control = history_package(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{packages}{os.pathsep}{ROOT}")
    monkeypatch.setattr("common.replicas.supervisor.RETRY_S", 0.01)
    with running(Disaggregated, PAIR) as engine:
        (control / "slow").touch()
        (packages / "historyinfer" / "__init__.py").write_text("raise SystemExit(9)")
        asked = requests(6)
        judge(asked, drive(engine, asked, lambda count: True, lambda: os.kill(engine.replicas[0].pid, signal.SIGKILL)))
        Awake().wait(lambda: engine.replicas[0].given_up)
        engine._num_requests = 0
        asked = requests(6)
        judge(asked, engine.run(asked))
        whole = sum(len(request.prompt_token_ids) for request in asked)
        assert engine.stats()["prompt_tokens"] == 2 * whole


@pytest.mark.parametrize("kind", [RequestError, BackendError])
def test_a_request_that_the_others_do_not_take_ends_alone(
    two: Disaggregated, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, add = requests(6), two._decode.add

    def some(request: Request, *more: Any) -> None:
        if request.request_id == asked[2].request_id:
            raise kind("not this one")
        add(request, *more)

    monkeypatch.setattr(two._decode, "add", some)
    events = two.run(asked)
    first, end = events.pop(asked[2].request_id)
    assert first.token_id is not None and end.finish is Status.FINISHED_ERROR and end.error == "not this one"
    assert len(events) == 5 and all(mine[-1].finish and mine[-1].error is None for mine in events.values())


def test_what_keeps_one_from_starting_is_told_as_it_was_raised_and_the_others_end() -> None:
    before = {process.pid for process in psutil.Process().children()}
    with pytest.raises(BackendError, match="Unknown backend 'torhc'"), running(Disaggregated, PAIR, "torhc"):
        pass
    with (
        pytest.raises(BackendError, match="Unknown backend 'jxa'"),
        running(Disaggregated, replace(PAIR, prefill_backend="jxa"), "torch"),
    ):
        pass
    assert {process.pid for process in psutil.Process().children()} <= before


def test_whoever_looks_into_an_engine_is_told_that_it_is_elsewhere() -> None:
    with pytest.raises(ConfigError, match=r"lab\.load"):
        lab.load("model=tiny-llama", "engine=torch", "parallel=pd1")


# ── over both backends ───────────────────────────────────────────────────────────────────────────────────────────────────

REAL = engine_config(kernels="native", num_blocks=128)


@pytest.mark.parametrize(("first", "then"), [(a, b) for a in BACKENDS for b in BACKENDS])
def test_one_backend_goes_on_with_the_prompts_of_the_other_as_one_engine_would(first: str, then: str) -> None:
    """Log-probabilities to the bit, of the chosen token and twenty others."""
    asked = [replace(request, params=replace(request.params, logprobs=20)) for request in requests(12, output=20)]
    config = replace(REAL, prefill_parallel_size=1, prefill_backend=first, threads=2)
    with running(Disaggregated, config, then) as engine:
        events = engine.run(asked)
        prompts = sum(len(request.prompt_token_ids) for request in asked)
        assert engine.stats()["external_prefix_cache_hits"] == prompts
        states = hidden_states(engine, [[5, 6, 7, 8]])
    one = make_engine(then, MODEL, REAL, pages=128)
    wanted = one.run(asked)
    assert {name: told(mine) for name, mine in events.items()} == {name: told(mine) for name, mine in wanted.items()}
    assert np.array_equal(states[0], hidden_states(one, [[5, 6, 7, 8]])[0])


# ── what is built on engines ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_library_answers_as_with_one_engine(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(history.parent / "packages"))  # one engine is in this process
    prompts, params = ["the and of", "once upon"], SamplingParams(max_tokens=12, seed=5, n=2)
    small = {"max_num_seqs": 4, "max_model_len": 256, "num_blocks": 64, "device": "cpu"}
    texts = []
    for size in (0, 1):
        with LLM(MODEL, backend="history", prefill_parallel_size=size, **small) as llm:
            texts.append([[output.text for output in each.outputs] for each in llm.generate(prompts, params)])
            assert [state.role for state in llm.engine.replicas] == ["prefill", "decode"][: 2 * size]
    del sys.modules["historyinfer"]
    assert texts[0] == texts[1]


def test_a_server_answers_the_same_when_one_is_killed_and_ends_when_it_cannot_be_started_again(tmp_path: Path) -> None:
    packages, _ = history_package(tmp_path)
    options = ("--backend", "history", "--max-model-len", "512", "--prefill-parallel-size", "1")
    with serving(tmp_path, *options, packages=[packages]) as server:
        body = {"prompt": "the and of ", "max_tokens": 60, "ignore_eos": True, "seed": 3, "temperature": 0.8}
        (whole,) = server.complete(**body)["choices"]
        states = server.client.get("/health").json()["replicas"]
        assert [(state["role"], state["backend"]) for state in states] == [("prefill", "history"), ("decode", "history")]
        raw = server.client.get("/metrics").text
        assert re.search(r"^tandem:prompts_handed_over_total{.*} 1.0$", raw, re.MULTILINE)
        assert re.search(r"^tandem:prompts_recomputed_total{.*} 0.0$", raw, re.MULTILINE)
        assert all(f'replica="{i}",role="{state["role"]}"}} 1.0' in raw for i, state in enumerate(states))
        os.kill(states[0]["pid"], signal.SIGKILL)
        (again,) = server.complete(**body)["choices"]
        assert again["text"] == whole["text"]
        until(lambda: server.client.get("/health").status_code == 200)
        server.wait_idle()
        (packages / "historyinfer" / "__init__.py").write_text("raise SystemExit(9)")
        os.kill(server.client.get("/health").json()["replicas"][0]["pid"], signal.SIGKILL)
        until(lambda: server.client.get("/health").headers.get("retry-after"))  # while it is started
        assert server.process.wait(PATIENCE_S) == 1
    time.sleep(0.1)
    assert not any(psutil.pid_exists(state["pid"]) for state in states)


def test_compare_takes_it_as_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    history_backend.install(history_backend.PACKAGE, tmp_path, monkeypatch)
    command(
        monkeypatch,
        compare.main,
        "engines=[history,{name:history,prefill_parallel_size:1}]",
        "model=tiny-llama", "workload=fixed", "workload.num_requests=4", "workload.output_len=5",
        "correctness.num_requests=2", "correctness.output_len=4", "measure.limits_s=0", "measure.blocks=1",
    )  # fmt: skip
    result = last_line(capfd.readouterr().out)
    assert result["unjustified_divergences"] == 0 and result["tokens_equal_share"] == 1.0 and result["failures"] == {}
    assert set(result["engines"]) == {"history", "history-prefill_parallel_size=1"}
