"""Ranks that are processes, and what is left of them: an engine that loses one starts it again, and its requests lose no token;
and none outlives its engine, however that ends."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from common.config import EngineConfig
from common.engine import Engine, build_engine
from common.errors import BackendError
from common.interface import load_backend
from common.process import child
from common.request import Request, SamplingParams
from tests.backends import checkpoint, engine_config
from tests.history_backend import ROOT

MODEL = "tiny-llama"
ENGINE = engine_config(tensor_parallel_size=2, max_num_seqs=2, max_num_batched_tokens=32, max_model_len=128, num_blocks=32)
STAGES = replace(ENGINE, tensor_parallel_size=1, pipeline_parallel_size=2)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, checkpoint(MODEL).config.vocab_size, length).tolist() for length in (40, 7, 1, 33)]
NOTICED_S = 2.0
"""That a rank is lost."""
AGAIN_S = 10.0
"""Until the engine serves again, beside the load."""
LOADS: list[float] = []
"""Seconds that the loads of `engine` took."""
ENDS: dict[str, Callable[[psutil.Process], object]] = {
    "killed": lambda process: process.kill(),
    "stopped": lambda process: process.suspend(),
    "exited": lambda process: process.send_signal(signal.SIGUSR1),  # which it does not handle
}


class Clock:
    """Seconds in which this process could run: not those in which it was suspended, as on a machine that measures something."""

    def __init__(self) -> None:
        self.seconds = 0.0
        threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(0.01)
            now = time.monotonic()
            self.seconds += min(now - before, 0.2)
            before = now


CLOCK = Clock()


class Heard(logging.Handler):
    """When it was said that something is started again."""

    def __init__(self) -> None:
        super().__init__()
        self.at: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "started again" in record.getMessage():
            self.at.append(CLOCK.seconds)


def others(runner: Any) -> list[psutil.Process]:
    """The ranks of a runner that are not this process."""
    return [psutil.Process(other.pid) for other in runner.group._others]


def alive(processes: Iterable[psutil.Process]) -> bool:
    return any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def run(engine: Engine) -> dict[str, list[int | None]]:
    """Each prompt's continuation, computed from its first token on."""
    engine.reset_prefix_cache()
    params = SamplingParams(max_tokens=6, temperature=0.0)
    asked = [Request(request_id=str(i), prompt_token_ids=prompt, params=params) for i, prompt in enumerate(PROMPTS)]
    return {name: [event.token_id for event in events] for name, events in engine.run(asked).items()}


@pytest.fixture(scope="module", params=[ENGINE, STAGES], ids=["ranks", "stages"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    begin = CLOCK.seconds
    engine = build_engine("torch", checkpoint(MODEL), request.param)
    LOADS.append(CLOCK.seconds - begin)
    yield engine
    last = others(engine.runner)
    engine.close()
    assert not alive(last)


@pytest.fixture(scope="module")
def right(engine: Engine) -> dict[str, list[int | None]]:
    return run(engine)


def test_a_step_that_fails_on_one_rank_costs_nobody_a_token(
    engine: Engine, right: dict[str, list[int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls, resets = engine.runner._step, 0, engine.stats()["num_resets"]  # type: ignore[attr-defined]
    sample = step._sample

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("planted")  # while the other rank waits for this one
        return sample(*arguments)

    before = others(engine.runner)
    monkeypatch.setattr(step, "_sample", failing)
    assert run(engine) == right
    assert engine.stats()["num_resets"] == resets + 1 and others(engine.runner) == before


@pytest.mark.parametrize("end", ["killed", "stopped", pytest.param("exited", marks=pytest.mark.accept)])
@pytest.mark.parametrize("state", ["idle", "computing", "passed on", "between steps", "connecting"])
def test_a_rank_that_is_lost_is_started_again_and_costs_nobody_a_token(
    engine: Engine,
    right: dict[str, list[int | None]],
    state: str,
    end: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (other,) = others(engine.runner)
    heard = Heard()
    monkeypatch.setattr(logging.getLogger("torchinfer.parallel"), "handlers", [heard])
    group: Any = engine.runner.group  # type: ignore[attr-defined]
    losses: list[float] = []

    def lose() -> None:
        if not losses:
            losses.append(CLOCK.seconds)
            ENDS[end](other)

    def hand_out(*arguments: Any) -> Any:
        given = whole_hand_out(*arguments)
        if state == "passed on" and not losses:
            group._settle()  # it has done its part, which nobody has taken yet
        lose()
        return given

    def update(*arguments: Any) -> Any:
        events = whole_update(*arguments)
        lose()
        return events

    def join(*place: Any) -> None:
        lose()
        whole_join(*place)

    whole_hand_out, whole_join, whole_update = group._hand_out, group._join, engine.scheduler.update
    if state == "passed on" and group.stages == 1:
        pytest.skip("ranks of one stage end a step together")
    if state == "idle":
        lose()
    elif state in ("computing", "passed on"):
        monkeypatch.setattr(group, "_hand_out", hand_out)
    elif state == "between steps":
        monkeypatch.setattr(engine.scheduler, "update", update)
    else:
        monkeypatch.setattr(group, "_join", join)
        group._part()  # so that the next step fails, and they connect anew
    assert run(engine) == right
    assert len(losses) == len(heard.at) == 1
    assert heard.at[0] - losses[0] < NOTICED_S and CLOCK.seconds - losses[0] < AGAIN_S + LOADS[-1]
    assert others(engine.runner) != [other] and alive(others(engine.runner))


def test_ranks_that_connect_anew_write_to_no_file_of_their_process(engine: Engine, tmp_path: Path) -> None:
    with ExitStack() as stack:
        files = [stack.enter_context((tmp_path / str(i)).open("w")) for i in range(32)]
        for _ in range(2):
            engine.runner.group._rendezvous()  # type: ignore[attr-defined]
        assert [Path(file.name).stat().st_size for file in files] == [0] * 32


@pytest.mark.accept
@pytest.mark.parametrize("lost", [(1,), (0, 2)], ids=["one", "two at once"])
@pytest.mark.parametrize(("ranks", "stages"), [(4, 1), (2, 2)])
def test_of_four_ranks_those_that_are_not_lost_go_on(ranks: int, stages: int, lost: tuple[int, ...]) -> None:
    config = replace(ENGINE, tensor_parallel_size=ranks, pipeline_parallel_size=stages)
    engine = build_engine("torch", checkpoint(MODEL), config)
    try:
        right, before = run(engine), others(engine.runner)
        for each in lost:
            before[each].kill()
        assert run(engine) == right
        after = others(engine.runner)
        assert [a != b for a, b in zip(after, before, strict=True)] == [each in lost for each in range(3)]
    finally:
        engine.close()
    assert not alive([*before, *after])


@pytest.mark.parametrize("config", [ENGINE, STAGES], ids=["ranks", "stages"])
@pytest.mark.parametrize("end", ["killed", "stopped", pytest.param("exited", marks=pytest.mark.accept)])
@pytest.mark.parametrize("state", ["before it has loaded", "loading", "warming up"])
def test_a_rank_that_is_lost_before_its_engine_is_ready_is_one_clear_error(
    state: str, end: str, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner: Any = load_backend("torch", config)
    (other,) = others(runner)
    begin = 0.0

    def lose() -> None:
        nonlocal begin
        begin = CLOCK.seconds
        ENDS[end](other)

    def tell(call: str, *arguments: Any, **data: Any) -> None:
        here = call == {"loading": "load", "warming up": "warmup"}.get(state)
        if here:
            other.suspend()  # it is not to have done its part before it is lost
        whole_tell(call, *arguments, **data)
        if here:
            lose()
            if end == "exited":
                other.resume()

    whole_tell = runner.group._tell
    monkeypatch.setattr(runner.group, "_tell", tell)
    try:
        if state == "before it has loaded":
            lose()
        with pytest.raises(BackendError, match="its log says more") as caught:
            runner.load(checkpoint(MODEL))
            runner.allocate([config.num_blocks])
            runner.warmup()
        assert CLOCK.seconds - begin < NOTICED_S
        if state != "warming up":
            assert re.search(rf"pid {other.pid}\) was killed by SIG(KILL|USR1)", str(caught.value))
    finally:
        runner.close()
    assert not alive([other])


@pytest.mark.accept
def test_an_engine_whose_ranks_cannot_be_started_again_ends_with_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build_engine("torch", checkpoint(MODEL), ENGINE)
    try:
        (other,) = others(engine.runner)
        monkeypatch.setattr(engine.runner.group, "_checkpoint", "/nowhere")  # type: ignore[attr-defined]
        other.kill()
        with pytest.raises(BackendError, match=r"failed: .*/nowhere"):
            run(engine)
    finally:
        engine.close()


def test_a_rank_ends_when_told_to_though_a_fork_of_the_caller_holds_its_input_open() -> None:
    code = (
        "import os, time\n"
        "from common.errors import BackendError\nfrom common.process.workers import ENTRY_POINTS, WorkerHandle\n"
        "ENTRY_POINTS['any'] = 'common.process.workers:follow'\n"
        "rank = WorkerHandle('any', {}, None, ended=lambda rank: None)\n"
        "told, tell = os.pipe()\n"
        "if not (fork := os.fork()):\n"
        "    rank.close()\n"
        "    try:\n"
        "        rank.settle()\n"
        "    except BackendError as error:\n"
        "        os.write(tell, str(error).encode())\n"
        "        time.sleep(600)\n"
        "os.close(tell)\nassert b'is a fork' in os.read(told, 200)\n"
        "rank.settle()\nbegin = time.monotonic()\nrank.close()\nprint(time.monotonic() - begin)\nos.kill(fork, 9)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < child.PATIENCE_S / 2


@pytest.mark.parametrize(
    "stopped", [pytest.param(False, id="running", marks=pytest.mark.accept), pytest.param(True, id="stopped")]
)
def test_nothing_outlives_an_engine_that_is_killed(stopped: bool, tmp_path: Path) -> None:
    code = (
        "import time\n"
        "from common.engine import build_engine\n"
        "from tests.backends import checkpoint\nfrom tests.test_lost_ranks import ENGINE, MODEL, run\n"
        "engine = build_engine('torch', checkpoint(MODEL), ENGINE)\n"
        "run(engine)\nprint('ready', flush=True)\ntime.sleep(600)\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert parent.stdout and parent.stdout.readline() == "ready\n"
    (other,) = psutil.Process(parent.pid).children()
    if stopped:
        other.suspend()
    parent.kill()
    parent.wait()
    begin = CLOCK.seconds
    while alive([other]) and CLOCK.seconds - begin < NOTICED_S:
        time.sleep(0.01)
    assert not alive([other]) and list(tmp_path.iterdir()) == []


def test_ranks_outlive_the_thread_that_made_their_engine(right: dict[str, list[int | None]]) -> None:
    with ThreadPoolExecutor(1) as thread:
        engine = thread.submit(build_engine, "torch", checkpoint(MODEL), ENGINE).result()
    try:
        before = others(engine.runner)
        assert run(engine) == right and others(engine.runner) == before
    finally:
        engine.close()
