"""PyTorch's ranks by `torch.distributed`, as they meet on GPUs: here on a CPU, where gloo takes NCCL's place. The tokens are
those of one rank, and an engine that loses one ends with one line, leaves nothing behind, and is started again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from common.config import EngineConfig
from common.engine import Engine, build_engine
from common.errors import BackendError
from common.interface import load_backend
from common.process import child
from common.process.agents import Agents
from common.replicas.data_parallel import Replicas
from common.replicas.factory import open_engine
from common.request import Request
from tests.backends import checkpoint
from tests.history_backend import ROOT
from tests.ranks import wanted
from tests.test_launch import adopt, all_end, run, two
from tests.test_lost_ranks import CLOCK, ENGINE, MODEL, NOTICED_S, STAGES, alive, others
from tests.test_parallel import KINDS, PROMPTS, TOLERANCE, WIDER
from torchinfer import parallel

__all__ = ["two"]

FRAMEWORK = replace(ENGINE, kernels="framework", max_num_seqs=4)
BOTH = replace(FRAMEWORK, pipeline_parallel_size=2)
SIZES = {"ranks": FRAMEWORK, "stages": replace(STAGES, kernels="framework", max_num_seqs=4), "both": BOTH}
BACKEND = """
from torchinfer import parallel
from torchinfer.runner import ModelRunner

parallel._collective = lambda device: "gloo"
"""
"""A backend that is PyTorch's, but that its ranks meet by gloo, in whatever process it is."""
ALONE = """
import sys, time
from common.engine import build_engine
from tests.backends import checkpoint
from tests.test_collectives import MODEL, SIZES
from tests.test_launch import run
from tests.test_lost_ranks import others

engine = build_engine("gloo", checkpoint(MODEL), SIZES[sys.argv[1]])
run(engine)
print(*[other.pid for other in others(engine.runner)], flush=True)
if sys.argv[2] == "failing":
    engine.runner.group._others[0].tell("nothing that it knows")
while sys.argv[2] == "computing":
    run(engine)
time.sleep(600)
"""
"""A process that keeps an engine, says which its other ranks are, and does what it is told until it ends."""


@pytest.fixture
def gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process PyTorch's ranks meet by it, and those that it starts with them."""
    monkeypatch.setattr(parallel, "_collective", lambda device: "gloo")


@pytest.fixture
def package(gloo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `BACKEND` known as `gloo`, to this process and those that it starts."""
    (tmp_path / "glooinfer").mkdir()
    (tmp_path / "glooinfer" / "__init__.py").write_text(BACKEND)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "glooinfer", raising=False)


@contextmanager
def engine_of(config: EngineConfig, model: Path | str = MODEL) -> Iterator[Engine]:
    engine = build_engine("torch", checkpoint(model), config)
    try:
        yield engine
    finally:
        last = others(engine.runner) if config.ranks > 1 else []
        engine.close()
        assert all_end(last) and not dist.is_initialized()


def computed(config: EngineConfig, model: Path | str, kinds: tuple[dict[str, Any], ...]) -> tuple[list[Any], dict[str, Any]]:
    """The tokens of each prompt under each kind of sampling, with how likely they are where that is asked for; and pages."""
    vocab = checkpoint(model).config.vocab_size
    asked = [([token % vocab for token in prompt], params) for params in kinds for prompt in PROMPTS]
    with engine_of(config, model) as engine:
        requests = [
            Request(request_id=str(i), prompt_token_ids=prompt, params=wanted(max_tokens=4, **params))
            for i, (prompt, params) in enumerate(asked)
        ]
        events = engine.run(requests)
        assert engine.stats()["num_resets"] == 0
        told = [
            [(event.token_id, event.logprobs.logprob if event.logprobs else 0.0) for event in events[request.request_id]]
            for request in requests
        ]
        held = engine.runner.read_pages(0, [1, 2])
        engine.runner.write_pages(0, [30, 31], held)
        again = engine.runner.read_pages(0, [30, 31])
        assert all(np.array_equal(held[name], again[name]) for name in held)
    return told, held


@pytest.mark.parametrize(
    ("family", "size"),
    [
        (None, "both"),
        *(pytest.param(None, size, marks=WIDER) for size in ("ranks", "stages")),
        ("gemma3", "ranks"),  # whose one KV head each of them has
        *(pytest.param("gemma3", size, marks=WIDER) for size in ("stages", "both")),
    ],
)
def test_ranks_that_meet_by_collectives_compute_what_one_does(
    family: str | None, size: str, families: dict[str, Path], gloo: None
) -> None:
    model, kinds = (families[family], KINDS[:3]) if family else (MODEL, KINDS)
    alone = replace(SIZES[size], tensor_parallel_size=1, pipeline_parallel_size=1)
    (right, right_pages), (told, pages) = (computed(config, model, kinds) for config in (alone, SIZES[size]))
    for mine, one in zip(told, right, strict=True):
        assert [token for token, _ in mine] == [token for token, _ in one]
        assert np.abs(np.subtract([x for _, x in mine], [x for _, x in one])).max() < TOLERANCE
    for name, array in right_pages.items():
        assert np.abs(array - pages[name]).max() < 1e-4 and np.any(array)


@pytest.mark.parametrize(
    ("size", "state"),
    [
        pytest.param("ranks", "computing", marks=WIDER),
        ("ranks", "failing"),
        *(pytest.param(size, "idle", marks=WIDER) for size in ("ranks", "both")),
    ],
)
def test_a_rank_that_is_lost_ends_the_first_process_with_one_line(size: str, state: str, package: None) -> None:
    command = [sys.executable, "-c", ALONE, size, state]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as first:  # type: ignore[call-overload]
        assert first.stdout and first.stderr
        ranks = [psutil.Process(int(pid)) for pid in first.stdout.readline().split()]
        time.sleep(0.2)  # it computes by now, if it is to
        begin = CLOCK.seconds
        if state != "failing":
            ranks[0].kill()
        assert first.wait(60) == 1 and CLOCK.seconds - begin < NOTICED_S
        *before, last = first.stderr.read().splitlines()
    how = "ended with exit code 1" if state == "failing" else "was killed by SIGKILL"
    assert last == (
        f"A process of this engine (pid {ranks[0].pid}) {how}; its log says more. The ranks of this engine cannot go on "
        "without it, so this process ends too."
    )
    assert state == "failing" or not before
    assert ranks and all_end(ranks)


@pytest.mark.accept
def test_whoever_keeps_an_engine_that_lost_a_rank_starts_it_again(package: None) -> None:
    engine = open_engine("gloo", checkpoint(MODEL), FRAMEWORK)
    try:
        assert isinstance(engine, Replicas)
        right, first = run(engine), psutil.Process(engine.replicas[0].pid)
        (other,) = first.children()
        other.kill()
        assert run(engine) == right
        assert engine.stats()["num_replicas_lost"] == 1 and not alive([first, other])
        last = [psutil.Process(engine.replicas[0].pid)]
        last += last[0].children()
    finally:
        engine.close()
    assert all_end(last)


def test_on_cpus_an_engine_goes_on_in_its_own_process() -> None:
    engine = open_engine("torch", checkpoint(MODEL), FRAMEWORK)
    assert isinstance(engine, Engine)
    engine.close()


def test_ranks_that_have_met_do_not_start_over_and_are_the_only_ones_of_their_process(gloo: None) -> None:
    with engine_of(FRAMEWORK) as engine:
        with pytest.raises(BackendError, match="has it already, of another engine or its own"):
            load_backend("torch", FRAMEWORK)
        with pytest.raises(BackendError, match="compute together by gloo, and cannot start over"):
            engine.runner.reset()


def test_ranks_of_a_stage_may_be_on_several_machines(two: Agents, gloo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (agent,) = two.all
    with engine_of(FRAMEWORK) as engine:
        right = run(engine)
        assert [seat[1:] for seat in engine.runner.group._seats.values()] == [(2, 1)]  # type: ignore[attr-defined]
    adopt(two._replace(all=[agent._replace(machine="another")]), monkeypatch)
    with engine_of(FRAMEWORK) as engine:
        assert run(engine) == right
        assert [seat[1:] for seat in engine.runner.group._seats.values()] == [(1, 0)]  # type: ignore[attr-defined]


def test_fewer_devices_than_ranks_are_refused_before_one_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "start", lambda *_: pytest.fail("a process was started"))
    monkeypatch.setattr(dist, "is_backend_available", lambda name: name == "nccl")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(BackendError, match=r"needs 4 devices of cuda on this machine, .* PyTorch sees 2\. Change"):
        parallel.start(BOTH, torch.device("cuda"))


def test_a_pytorch_without_the_collectives_of_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_backend_available", lambda name: name != "nccl")
    with pytest.raises(BackendError, match="on cuda need nccl, which this build of PyTorch lacks"):
        parallel.start(BOTH, torch.device("cuda"))
