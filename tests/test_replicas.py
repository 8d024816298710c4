"""Replicas behind a router are one engine: same tokens, one end each, whatever becomes of their processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import psutil
import pytest

from common.engine import Engine
from common.errors import BackendError, ConfigError, RequestError, by_name
from common.llm import LLM
from common.process import child
from common.process.agents import AgentLost
from common.replicas.data_parallel import Replicas
from common.replicas.factory import open_engine
from common.replicas.stats import totals
from common.replicas.supervisor import Exited, Ready, Supervisor, SupervisorEvent
from common.replicas.worker import failure
from common.request import Request, SamplingParams, Status, StructuredOutputsParams, TokenEvent, fan_out
from common.system.hardware import thread_settings
from common.text.grammar import Grammars
from common.text.tokenizer import open_tokenizer
from experiments import compare, lab
from tests import history_backend
from tests.backends import checkpoint, engine_config, hidden_states, make_engine
from tests.history_backend import ROOT, command, last_line
from tests.http_server import PATIENCE_S, Awake, Served, serving, until
from tests.http_server import history as history_package
from tests.processes import VOCAB, history, judge, requests, right, running, told
from tests.replica_mains import MODEL, SMALL

__all__ = ["history"]


def all_serve(engine: Replicas) -> bool:
    return all(state.serves for state in engine.replicas)


# ── over a backend without a framework ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def lasting(history: Path) -> Iterator[Replicas]:
    with running(Replicas, SMALL) as engine:
        yield engine


@pytest.fixture
def two(lasting: Replicas, history: Path) -> Iterator[Replicas]:
    """Two replicas that serve, and nothing goes wrong in them any more afterwards."""
    Awake().wait(lambda: all_serve(lasting))
    lasting.step(0)
    lasting._num_requests = 0  # seeds as in a new engine
    yield lasting
    for file in history.iterdir():
        file.unlink()
    for name in list(lasting._live):
        lasting.abort(name)
    while lasting.has_work:
        lasting.step()


def drive(
    engine: Replicas, asked: Sequence[Request], after: int, meanwhile: Callable[[], object]
) -> dict[str, list[TokenEvent]]:
    """Run them all; once `after` tokens are out, do something."""
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in asked}
    for request in asked:
        engine.add(request)
    count = 0
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
            count += 1
            if count == after:
                meanwhile()
    return events


def test_outputs_are_those_of_one_engine_and_both_replicas_have_a_part_in_them(two: Replicas) -> None:
    asked, before = requests(), two.stats()
    events = two.run(asked)
    judge(asked, events)
    stats = two.stats()
    assert all(each["scheduled_tokens"] > 0 for each in stats["replicas"])
    rise = {name: stats[name] - before[name] for name in ("prompt_tokens", "generation_tokens", "num_recomputed")}
    assert rise["prompt_tokens"] == sum(len(request.prompt_token_ids) for request in asked)
    assert rise["generation_tokens"] == sum(len(right(request, i).tokens) for i, request in enumerate(asked))
    assert (rise["num_recomputed"], stats["num_running"], stats["num_waiting"], stats["kv_cache_usage"]) == (0, 0, 0, 0)
    assert two.caps.max_seqs == 16 and not two.caps.observes


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("after", [1, 150, 500])
def test_a_replica_that_ends_on_the_way_costs_nobody_a_token(
    two: Replicas, history: Path, how: signal.Signals, after: int
) -> None:
    (history / "slow").touch()
    asked, lost = requests(), two.stats()["num_replicas_lost"]
    judge(asked, drive(two, asked, after, lambda: os.kill(two.replicas[0].pid, how)))
    stats = two.stats()
    assert stats["num_replicas_lost"] == lost + 1 and stats["num_recomputed"] > 0


def test_requests_wait_where_no_replica_is_left_until_one_has_started_again(two: Replicas, history: Path) -> None:
    (history / "slow").touch()
    asked = requests(8)

    def kill() -> None:
        for state in two.replicas:
            os.kill(state.pid, signal.SIGKILL)

    judge(asked, drive(two, asked, 30, kill))


def test_replicas_that_end_at_once_are_one_death_to_a_request(two: Replicas, history: Path) -> None:
    (history / "slow").touch()
    asked, lost = requests(8), two.stats()["num_replicas_lost"]
    for request in asked:
        two.add(request)
    events = two.step(1.0)
    ended = [psutil.Process(state.pid) for state in two.replicas]
    for process in ended:
        process.kill()
    until(lambda: not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in ended))
    while two.stats()["num_replicas_lost"] < lost + 2:
        events += two.step(0.01)
    assert max(live.deaths for live in two._live.values()) == 1
    while two.has_work:
        events += two.step(0.1)
    judge(asked, {asked_for.request_id: [e for e in events if e.request_id == asked_for.request_id] for asked_for in asked})


def test_one_that_stops_is_noticed_within_two_seconds_though_nobody_asks_and_serves_again_within_ten(two: Replicas) -> None:
    stopped = two.replicas[1].pid
    os.kill(stopped, signal.SIGSTOP)
    clock = Awake()
    assert clock.wait(lambda: two.replicas[1].pid != stopped or not two.replicas[1].serves) < 2
    assert clock.wait(lambda: all_serve(two)) < 12
    assert not psutil.pid_exists(stopped)
    asked = requests(6)
    judge(asked, two.run(asked))


def test_a_hang_outside_a_step_shows_in_the_state_of_the_replica(two: Replicas, history: Path) -> None:
    (history / "hang outside a step").touch()
    (asked,) = requests(1)
    two.add(asked)
    Awake().wait(lambda: max(state.step_seconds for state in two.replicas) > 1.0)
    (history / "hang outside a step").unlink()
    while two.has_work:
        two.step()
    Awake().wait(lambda: max(state.step_seconds for state in two.replicas) < 1.0)


def test_a_killed_one_is_noticed_at_once(two: Replicas) -> None:
    killed = two.replicas[0].pid
    os.kill(killed, signal.SIGKILL)
    assert Awake().wait(lambda: two.replicas[0].pid != killed or not two.replicas[0].serves) < 2


def test_who_has_met_four_dead_replicas_ends_with_one_error_and_others_go_on(two: Replicas, history: Path) -> None:
    (history / "die").touch()
    events = two.run(requests(2))
    for mine in events.values():
        (end,) = mine
        assert end.finish is Status.FINISHED_ERROR and end.error is not None
        assert end.error.startswith("4 replicas have ended while they had this request; the last ended with exit code")
    (history / "die").unlink()
    two._num_requests = 0
    asked = requests(4)
    judge(asked, two.run(asked))


def test_three_accidents_in_a_row_end_no_request(two: Replicas, history: Path) -> None:
    (history / "slow").touch()
    asked = requests(3)
    for request in asked:
        two.add(request)
    events: list[TokenEvent] = []
    for deaths in (1, 2, 3):
        while not (
            at := next((live.replica for live in two._live.values() if live.deaths == deaths - 1 and live.replica), None)
        ):
            events += two.step(0.01)
        while at.link and at.known < at.sent:  # until it counts as a death of its requests
            events += two.step(0.01)
        os.kill(at.keeper.state.pid, signal.SIGKILL)
        while at.link:
            events += two.step(0.01)
    assert max(live.deaths for live in two._live.values()) == 3
    (history / "slow").unlink()
    while two.has_work:
        events += two.step()
    judge(asked, {each.request_id: [event for event in events if event.request_id == each.request_id] for each in asked})


@pytest.mark.parametrize("length", [250, 270])
def test_who_kills_replicas_ends_alone_and_those_beside_it_go_on(two: Replicas, history: Path, length: int) -> None:
    """At the end of its prompt, and behind twenty tokens."""
    asked, lost = requests(6), two.stats()["num_replicas_lost"]
    killer = Request(request_id="k", prompt_token_ids=range(3, 253), params=SamplingParams(max_tokens=60, temperature=0.0))
    (history / "poison").write_text(str(length))
    events = two.run([*asked, killer])
    judge(asked, events)
    *before, end = events["k"]
    assert [event.token_id for event in before] == right(killer, 6).tokens[: length - 250]
    assert end.finish is Status.FINISHED_ERROR and end.error is not None and end.error.startswith("4 replicas have ended")
    assert two.stats()["num_replicas_lost"] == lost + 4


def test_an_abort_reaches_the_replica_and_frees_what_it_held(two: Replicas, history: Path) -> None:
    (history / "slow").touch()
    asked = [
        replace(request, params=replace(request.params, ignore_eos=True, stop_token_ids=()))  # so that none ends by itself
        for request in requests(6, output=400, name="long")
    ]
    for request in asked:
        two.add(request)
    seen: list[TokenEvent] = []
    while len({event.request_id for event in seen}) < 6:
        seen += two.step()
    assert two.abort("long0") and not two.abort("long0") and not two.abort("long")
    assert two.finish("long1", "stop")
    two.add(replace(asked[0], params=replace(asked[0].params, max_tokens=3)))  # the name is free at once
    while "long0" in two._live:
        seen += two.step()
    ends = [(event.request_id, event.finish, event.stop_reason) for event in seen if event.finish]
    assert ends[:2] == [("long0", Status.FINISHED_ABORT, None), ("long1", Status.FINISHED_STOP, "stop")]
    assert [event.token_id for event in seen if event.request_id == "long0"][-3:] == right(asked[0], 0).tokens[:3]
    for request in asked[2:]:
        assert two.abort(request.request_id)
    assert len([event for event in two.step(0) if event.finish]) == 4 and not two.has_work
    Awake().wait(lambda: two.stats()["num_running"] == 0 and two.stats()["kv_cache_usage"] == 0)


def test_continuations_of_one_prompt_run_beside_each_other_and_share_its_pages(two: Replicas) -> None:
    assert two.reset_prefix_cache()
    before = [each["scheduled_tokens"] for each in two.stats()["replicas"]]
    prompt, output = list(range(3, 103)), 100  # so long that the first has not ended, and its pages gone, before the last comes
    fan = fan_out(Request(request_id="fan", prompt_token_ids=prompt, params=SamplingParams(n=4, seed=1, max_tokens=output)))
    judge(fan, two.run(fan))
    after = [each["scheduled_tokens"] for each in two.stats()["replicas"]]
    assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0, 100 + 3 + 4 * (output - 1)]


def test_the_cache_is_forgotten_only_where_nobody_runs(two: Replicas) -> None:
    (asked,) = requests(1)
    long = replace(asked, prompt_token_ids=tuple(range(3, 163)))
    two.add(long)
    assert not two.reset_prefix_cache()
    while two.has_work:
        two.step()
    hits = lambda: two.stats()["prefix_cache_hits"]  # noqa: E731
    before = hits()
    two.run([long])
    assert hits() - before == 144
    assert two.reset_prefix_cache()
    two.run([long])
    assert hits() - before == 144


def test_the_steps_of_all_are_logged_with_the_names_of_their_requests(two: Replicas) -> None:
    two.step_log = log = []
    asked = requests(8)
    try:
        events = two.run(asked)
    finally:
        two.step_log = None
    assert sorted(name for record in log for name in record.started) == sorted(events)
    begin, end = min(r.submitted for r in log), max(r.landed for r in log)
    assert all(begin <= event.time <= end + 1 for mine in events.values() for event in mine)  # one clock
    assert sum(int(record.counts.sum()) for record in log) >= sum(len(r.prompt_token_ids) for r in asked)


def test_deadlines_hold_on_a_replica_and_where_there_is_none(two: Replicas, history: Path) -> None:
    (history / "slow").touch()
    soon = lambda name: Request(  # noqa: E731
        request_id=name, prompt_token_ids=(3, 4), params=SamplingParams(max_tokens=400), deadline=time.perf_counter() + 0.3
    )
    assert two.run([soon("on one")])["on one"][-1].finish is Status.FINISHED_TIMEOUT
    for state in two.replicas:
        os.kill(state.pid, signal.SIGKILL)
    Awake().wait(lambda: not two.step(0) and not any(replica.link for replica in two._replicas))
    (end,) = two.run([replace(soon("on none"), deadline=time.perf_counter())])["on none"]
    assert end.finish is Status.FINISHED_TIMEOUT


def test_conversations_go_back_to_where_their_history_lies(history: Path) -> None:
    """Pages of a replica fit the histories of half the conversations: with round robin each replica would need those of all."""

    def hits(routing: str) -> int:
        config = replace(SMALL, routing=routing, num_blocks=150)
        rng, found = random.Random(0), 0
        texts = [[rng.randrange(3, VOCAB) for _ in range(160)] for _ in range(16)]
        with running(Replicas, config) as engine:
            for turn in range(6):
                order = rng.sample(range(16), 16)
                asked = {f"{turn}-{i}": i for i in order}
                params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
                got = engine.run(Request(request_id=n, prompt_token_ids=texts[i], params=params) for n, i in asked.items())
                for name, i in asked.items():
                    texts[i] += [e.token_id for e in got[name] if e.token_id is not None]
                    texts[i] += [rng.randrange(3, VOCAB) for _ in range(8)]
            found = engine.stats()["prefix_cache_hits"]
        return found

    prefix, round_robin = hits("prefix"), hits("round_robin")
    assert prefix >= 2 * round_robin > 0, (prefix, round_robin)


def test_short_requests_are_spread_while_a_long_prompt_decodes(two: Replicas, history: Path) -> None:
    (history / "slow").touch()
    greedy = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    long = Request(request_id="long", prompt_token_ids=range(3, 303), params=replace(greedy, max_tokens=100))
    two.add(long)
    while not any(event.token_id is not None for event in two.step()):
        pass
    short = [Request(request_id=f"short{i}", prompt_token_ids=(i % VOCAB, 5, 6), params=greedy) for i in range(40)]
    places = []
    for request in short:
        two.add(request)
        places.append(two._live[request.request_id].replica)
    counts = [places.count(replica) for replica in two._replicas]
    two.abort("long")
    two.run([])
    assert sum(counts) == 40 and min(counts) >= 15, counts


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stopped", [False, True])
def test_no_replica_outlives_an_engine_that_is_killed(history: Path, stopped: bool) -> None:
    parent = subprocess.Popen([sys.executable, "-m", "tests.replica_mains"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    others = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(others) == 2
    if stopped:
        others[0].suspend()
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(others, timeout=5)
    assert alive == []


def test_closing_ends_every_process_even_one_that_is_stopped(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "PATIENCE_S", 1.0)
    with running(Replicas, SMALL) as engine:
        pids = [state.pid for state in engine.replicas]
        os.kill(pids[0], signal.SIGSTOP)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    engine.close()


def test_what_keeps_a_replica_from_starting_is_told_as_it_was_raised() -> None:
    with pytest.raises(BackendError, match="Unknown backend 'torhc'"), running(Replicas, SMALL, "torhc"):
        pass
    with (
        pytest.raises(ConfigError, match="max_model_len must not exceed"),
        running(Replicas, replace(SMALL, max_model_len=1 << 20), "torch"),
    ):
        pass
    # Of a kind that only who raises it knows, it is what that is a kind of.
    told = failure(AgentLost("No rank can be started."))
    assert str(by_name(**told)) == "No rank can be started." and type(by_name(**told)) is BackendError


def test_one_that_is_started_again_has_as_many_pages_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages, _ = history_package(tmp_path)
    free = tmp_path / "free"
    (packages / "sitecustomize.py").write_text(
        "import pathlib, common.system.hardware\n"
        f"common.system.hardware.memory_available = lambda: int(pathlib.Path({str(free)!r}).read_text())"
    )
    monkeypatch.setenv("PYTHONPATH", f"{packages}{os.pathsep}{ROOT}")
    page_bytes = 16 * SMALL.block_size
    free.write_text(str(8 * 50 * page_bytes))  # a quarter is for both
    with running(Replicas, replace(SMALL, num_blocks=None)) as engine:
        first = engine.replicas[0].pid
        assert [replica.num_pages for replica in engine._replicas] == [49, 49]  # without the null page
        free.write_text(str(8 * 30 * page_bytes))
        os.kill(first, signal.SIGKILL)
        Awake().wait(lambda: engine.replicas[0].pid != first and all_serve(engine))
        engine.step(0)
        assert [replica.num_pages for replica in engine._replicas] == [49, 49]


def test_one_that_cannot_start_again_is_given_up_and_the_last_takes_all_requests_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages, _ = history_package(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{packages}{os.pathsep}{ROOT}")
    monkeypatch.setattr("common.replicas.supervisor.RETRY_S", 0.01)
    with running(Replicas, SMALL) as engine:
        (packages / "historyinfer" / "__init__.py").write_text("raise SystemExit(9)")
        asked = requests(4, output=200)
        events = drive(engine, asked, 8, lambda: [os.kill(state.pid, signal.SIGKILL) for state in engine.replicas])
        for mine in events.values():
            assert mine[-1].finish is Status.FINISHED_ERROR and [e.finish for e in mine[:-1]] == [None] * (len(mine) - 1)
            assert mine[-1].error == "No replica of this engine is left; the last ended with exit code 9."
        with pytest.raises(BackendError, match="No replica of this engine is left"):
            engine.add(requests(1, name="late")[0])
        assert not engine.has_work


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("garbage", "wrote something else than an answer"),
        ("oversize", "wrote something else than an answer"),
        ("half a frame", "ended with exit code 3"),
        ("silence", "gave no sign of life for 1 s"),
    ],
)
def test_a_process_that_says_what_it_should_not_or_nothing_is_started_again(
    what: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.replicas.supervisor.SILENCE_S", 1.0)
    news: SimpleQueue[SupervisorEvent] = SimpleQueue()
    keeper = Supervisor(0, "tests.replica_mains:chatter", [what], {}, news.put)
    try:
        for _ in range(2):
            assert isinstance(news.get(timeout=PATIENCE_S), Ready)
            gone = news.get(timeout=PATIENCE_S)
            assert isinstance(gone, Exited) and gone.how.startswith(how) and not gone.given_up
    finally:
        keeper.close()
        keeper.join()


def test_counts_of_several_are_added_a_share_is_their_mean_and_what_a_rank_holds_the_most() -> None:
    told = ({"steps": 5, "kv_cache_usage": 0.25, "rank_bytes": 7}, {"kv_cache_usage": 0.75, "rank_bytes": 9}, {"steps": 1})
    assert totals(told) == {"steps": 6, "kv_cache_usage": 0.5, "rank_bytes": 9}


def test_replicas_share_the_threads(two: Replicas) -> None:
    for state in two.replicas:
        assert psutil.Process(state.pid).environ().items() >= thread_settings(1).items()


def test_whoever_looks_into_an_engine_is_told_that_replicas_are_elsewhere() -> None:
    with pytest.raises(ConfigError, match=r"lab\.load"):
        lab.load("model=tiny-llama", "engine=torch", "parallel=dp2")


# ── over both backends ───────────────────────────────────────────────────────────────────────────────────────────────────

REAL = engine_config(kernels="native", num_blocks=128)


@pytest.fixture(scope="module")
def pair(backend: str) -> Iterator[Replicas]:
    with running(Replicas, replace(REAL, data_parallel_size=2, threads=2), backend) as engine:
        yield engine


def one(backend: str) -> Engine:
    return make_engine(backend, MODEL, REAL, pages=128)


def test_both_backends_give_the_events_of_one_engine(pair: Replicas, backend: str) -> None:
    tokenizer = open_tokenizer(checkpoint(MODEL).path)
    with Grammars(tokenizer, tokenizer.eos_token_ids, checkpoint(MODEL).config.vocab_size) as grammars:
        wanted = StructuredOutputsParams(regex="[a-z]{3}-[0-9]{5}")
        held = Request(
            request_id="held",
            prompt_token_ids=(5, 6, 7),
            params=SamplingParams(seed=3, max_tokens=40, structured_outputs=wanted, bad_words=["a"]),
            eos_token_ids=tokenizer.eos_token_ids,
            bad_words=tokenizer.bad_words(("a",)),
            grammar=grammars.compile(wanted),
        )
        asked = [*requests(12, output=20), held]
        wanted_events, events = one(backend).run(asked), pair.run(asked)
    assert {name: told(mine) for name, mine in events.items()} == {name: told(mine) for name, mine in wanted_events.items()}


def test_both_backends_go_on_with_the_same_tokens_when_a_replica_is_killed(pair: Replicas, backend: str) -> None:
    Awake().wait(lambda: all_serve(pair))
    asked = [replace(r, params=replace(r.params, seed=r.params.seed or 7)) for r in requests(12, output=40, name="k")]
    events = drive(pair, asked, 100, lambda: os.kill(pair.replicas[1].pid, signal.SIGKILL))
    wanted = one(backend).run(asked)
    assert {name: told(mine) for name, mine in events.items()} == {name: told(mine) for name, mine in wanted.items()}
    assert pair.stats()["num_recomputed"] > 0
    assert pair.caps.kernel_library is not None


def test_both_backends_show_the_states_of_one_engine(pair: Replicas, backend: str) -> None:
    prompts = [[5, 6, 7, 8], list(range(3, 60)), [9]]
    got = hidden_states(pair, prompts)
    for mine, wanted in zip(got, hidden_states(one(backend), prompts), strict=True):
        assert mine.dtype == np.float32 and np.array_equal(mine, wanted)
    for wrong, says in (([5] * 2100, "Prompt 0 has 2100 tokens"), ([5.5], r"Prompt 0\[0\] must be an integer")):
        with pytest.raises(RequestError, match=says):
            pair.hidden_states([wrong])


def test_states_on_one_replica_stop_no_request_on_another(pair: Replicas, backend: str) -> None:
    """The replica that computes them is stopped, so they cannot come before the tokens of the other."""
    Awake().wait(lambda: all_serve(pair))
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    stream = Request(request_id="stream", prompt_token_ids=(5, 6, 7), params=params)
    pair.add(stream)
    process = psutil.Process(next(r.keeper.state.pid for r in pair._replicas if not r.live))
    process.suspend()
    try:
        states, dropped = pair.hidden_states([[5, 6, 7, 8]]), pair.hidden_states([[9, 10]])
        tokens: list[int | None] = []
        while any(name == "stream" for name in pair._live):
            tokens += [event.token_id for event in pair.step()]
        tokens += [event.token_id for event in pair.step(0)]
        assert len(tokens) == 20 and not states.done() and pair.has_work
        assert dropped.cancel() and not pair.reset_prefix_cache()
    finally:
        process.resume()
    while not states.done():
        pair.step()
    (wanted,) = hidden_states(one(backend), [[5, 6, 7, 8]])
    assert np.array_equal(states.result()[0], wanted)
    pair.step()
    assert not pair.has_work and pair.reset_prefix_cache()


def test_states_are_computed_again_where_their_replica_has_ended(pair: Replicas, backend: str) -> None:
    Awake().wait(lambda: all_serve(pair))
    before = pair.stats()["num_replicas_lost"]
    asked = [pair.hidden_states([[5, 6, 7, i]]) for i in range(4)]
    for state in pair.replicas:
        os.kill(state.pid, signal.SIGKILL)
    while not all(states.done() for states in asked):
        pair.step()
    for i, states in enumerate(asked):
        assert np.array_equal(states.result()[0], hidden_states(one(backend), [[5, 6, 7, i]])[0])
    assert pair.stats()["num_replicas_lost"] == before + 2


# ── what is built on engines ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_library_answers_as_with_one_engine(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(history.parent / "packages"))  # one engine is in this process
    prompts, params = ["the and of", "once upon"], SamplingParams(max_tokens=12, seed=5, n=2)
    small = {"max_num_seqs": 4, "max_model_len": 256, "num_blocks": 64, "device": "cpu"}
    texts = []
    for size in (1, 2):
        with LLM(MODEL, backend="history", data_parallel_size=size, **small) as llm:
            texts.append([[output.text for output in each.outputs] for each in llm.generate(prompts, params)])
            assert len(llm.engine.replicas) == (size if size > 1 else 0)
    del sys.modules["historyinfer"]
    assert texts[0] == texts[1]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Served, Path]]:
    packages, control = history_package(tmp_path)
    options = ("--backend", "history", "--max-model-len", "512", "--data-parallel-size", "2", "--admin")
    with serving(tmp_path, *options, packages=[packages]) as server:
        yield server, control


def test_a_server_over_replicas_loses_nothing_when_they_are_killed_and_tells_of_it(served: tuple[Served, Path]) -> None:
    server, control = served
    body = {"prompt": "the and of ", "max_tokens": 60, "ignore_eos": True, "seed": 3, "temperature": 0.8}
    (whole,) = server.complete(**body)["choices"]
    states = server.client.get("/health").json()["replicas"]
    assert len(states) == 2 and all(state["serves"] for state in states)
    (control / "slow").touch()
    killed: list[int] = []
    text = ""
    with server.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
            if len(text) > 10 and not killed:
                killed = [state["pid"] for state in states]  # one of which has it
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)
    assert text == whole["text"]
    until(lambda: all(state["serves"] for state in server.client.get("/health").json()["replicas"]))
    alive = [state["pid"] for state in server.client.get("/health").json()["replicas"]]
    assert not set(alive) & set(killed)
    raw = server.client.get("/metrics").text
    assert 'tandem:replicas_lost_total{engine="history"' in raw and 'tandem:replica_serves{engine="history"' in raw
    (control / "slow").unlink()
    before = server.metric("prompt_tokens_total")
    used = server.complete(**body)["usage"]["prompt_tokens"]
    assert server.metric("prompt_tokens_total") == before + used
    assert server.metric("request_queue_time_seconds_count") > 0  # it knows when a replica began
    assert server.client.post("/reset_prefix_cache").status_code == 200
    assert server.stop() == 0
    assert not any(map(psutil.pid_exists, (*alive, *killed)))


def test_a_server_without_a_replica_that_serves_is_not_well(served: tuple[Served, Path]) -> None:
    server, _ = served
    for state in server.client.get("/health").json()["replicas"]:
        psutil.Process(state["pid"]).suspend()
    until(lambda: server.client.get("/health").status_code == 503)
    until(lambda: server.client.get("/health").status_code == 200)


def test_a_server_without_a_replica_that_can_start_says_so_and_ends(served: tuple[Served, Path]) -> None:
    server, control = served
    (control / "slow").touch()
    with server.client.stream("POST", "/v1/completions", json={"prompt": "the", "max_tokens": 400, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        (control.parent / "packages" / "historyinfer" / "__init__.py").write_text("raise SystemExit(9)")
        for state in server.client.get("/health").json()["replicas"]:
            os.kill(state["pid"], signal.SIGKILL)
        until(lambda: server.client.get("/health").headers.get("retry-after"))  # others are started
        *_, last, _ = [line for line in lines if line.startswith("data: ")]
    error = json.loads(last[6:])["error"]
    assert (error["code"], error["type"]) == (503, "ServiceUnavailableError") and "this server ends" in error["message"]
    assert server.process.wait(PATIENCE_S) == 1


def test_compare_takes_replicas_as_an_engine_and_adds_up_their_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    history_backend.install(history_backend.PACKAGE, tmp_path, monkeypatch)
    command(
        monkeypatch,
        compare.main,
        "engines=[history,{name:history,data_parallel_size:2}]",
        "model=tiny-llama", "workload=fixed", "workload.num_requests=4", "workload.output_len=5",
        "correctness.num_requests=2", "correctness.output_len=4", "measure.limits_s=0", "measure.blocks=1",
    )  # fmt: skip
    result = last_line(capfd.readouterr().out)
    single, double = result["engines"]["history"], result["engines"]["history-data_parallel_size=2"]
    assert result["unjustified_divergences"] == 0 and result["tokens_equal_share"] == 1.0 and result["failures"] == {}
    assert double["rss_mib"] > 2 * single["rss_mib"]


def test_open_engine_makes_one_engine_where_one_is_asked_for() -> None:
    engine = open_engine("torch", checkpoint(MODEL), engine_config(num_blocks=16, max_model_len=64))
    assert isinstance(engine, Engine) and engine.replicas == ()
    engine.close()
