"""`measure.profile`: kernels as each framework's profiler saw them, where the time went, and the files and trace of a run."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.interface import KernelEvent
from experiments import bench
from experiments.engines.process import IsolatedEngine
from experiments.engines.spec import EngineSpec
from experiments.engines.worker import Worker
from experiments.load.profiler import Profile, own_seconds, profiled, time_collectives
from experiments.load.workload import Item, Workload
from experiments.measure.config import MeasureConfig
from experiments.report.writer import write_report
from experiments.runs.records import read_kernels, read_rows
from tests.backends import checkpoint, engine_config, make_engine
from tests.history_backend import command, history, last_line

__all__ = ["history"]
ITEMS = [Item(0.0, tuple(range(7 + i, 20 + i)), 3) for i in range(2)]
DRIFT = 0.1
"""Seconds by which a profiler's clock may run apart from ours; a wrong origin is off by hours."""
NATIVE = engine_config(kernels="native", max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64)
SMALL: tuple[str, ...] = ("engine=history", "model=tiny-llama", "dtype=float32", "workload=fixed", "workload.num_requests=3")
SMALL += ("workload.output_len=20", "measure.limits_s=0", "measure.blocks=1", "measure.profile=true")
PROFILER = """
import time
from common.interface import KernelEvent

def profile(run):
    began = time.perf_counter()
    run()
    return [KernelEvent("matmul", began + i, 0.5, "core") for i in (1, 0)] + [KernelEvent("add", began, 0.125, "core")]
"""


def check_operators(profile: Profile, form: str) -> None:
    """Every operator of every step is there, and over by the time its step has landed: on one clock with the steps."""
    assert profile.window.steps and not profile.left_out
    assert [len(row.tokens) for row in profile.window.rows] == [3, 3]
    for operator in ("embed", "layers", "head", "sample"):
        mine = [kernel for kernel in profile.kernels if kernel.name == form.format(operator)]
        assert len(mine) == len(profile.window.steps), (operator, sorted({kernel.name for kernel in profile.kernels}))
        for at, kernel in enumerate(mine):
            assert kernel.duration >= 0 and kernel.thread
            assert kernel.start + kernel.duration <= profile.window.steps[at].landed + DRIFT


def test_torch_names_its_operators_on_the_clock_of_the_steps() -> None:
    worker = Worker(BytesIO())
    worker._engine = make_engine("torch", "tiny-llama", NATIVE, pages=16)
    items, before = [vars(item) for item in ITEMS], time.perf_counter()
    answer = json.loads(json.dumps(worker.on_profile("torch", items), default=lambda array: array.tolist()))
    profile = Profile.of(answer)
    check_operators(profile, "tandem::{}")
    assert all(before <= profile.window.began + kernel.start + DRIFT for kernel in profile.kernels)
    cut = profiled("torch", worker._engine, ITEMS, most=4)
    assert cut and len(cut.kernels) == 4 and cut.left_out == len(profile.kernels) - 4
    assert worker.on_profile("hf", items) == {}


def test_jax_names_its_operators_on_the_clock_of_the_steps(tmp_path: Path) -> None:
    # In a process of its own: XLA's profile does not tell programs of one name apart, and other tests have left some.
    spec = EngineSpec(label="jax", name="jax", config=NATIVE)
    with IsolatedEngine(spec, tmp_path / "jax.log", 600.0) as engine:
        engine.load(checkpoint("tiny-llama").path)
        before = time.perf_counter()  # one clock for all processes
        profile = engine.profile(Workload("two", tuple(ITEMS)))
    assert profile
    check_operators(profile, "tandem_{}")
    assert all(before <= profile.window.began + kernel.start + DRIFT for kernel in profile.kernels)


@pytest.mark.parametrize("kernels", ["native", "framework"])
def test_jax_tells_how_long_its_ranks_were_at_telling_each_other(kernels: str, tmp_path: Path) -> None:
    spec = EngineSpec(label="jax", name="jax", config=replace(NATIVE, kernels=kernels, tensor_parallel_size=2))
    with IsolatedEngine(spec, tmp_path / "jax.log", 600.0) as engine:
        engine.load(checkpoint("tiny-llama").path)
        told, profile = engine.time_collectives(Workload("two", tuple(ITEMS))), engine.profile(Workload("two", tuple(ITEMS)))
    assert told and profile and profile.window.steps
    assert 0 < told.seconds / 2 < told.step_seconds
    layers = checkpoint("tiny-llama").config.num_layers
    sums = [kernel for kernel in profile.kernels if kernel.name == "all-reduce"]
    each = 2 * len(profile.window.steps) * (2 * layers + 1)  # of each rank two a layer, and the embedding's
    assert len(sums) > 0.8 * each  # the profiler loses one now and then


def test_an_engine_of_one_rank_tells_no_time_between_ranks() -> None:
    assert time_collectives("torch", make_engine("torch", "tiny-llama", NATIVE, pages=16), ITEMS) is None


def test_own_time_leaves_out_what_ran_within_and_adds_up() -> None:
    events = [
        KernelEvent("outer", 0.0, 10.0, "a"),
        KernelEvent("inner", 0.0, 4.0, "a"),
        KernelEvent("leaf", 1.0, 1.0, "a"),
        KernelEvent("inner", 4.0, 3.0, "a"),
        KernelEvent("outer", 10.0, 1.0, "a"),
        KernelEvent("leaf", 2.0, 7.0, "b"),
    ]
    spent = own_seconds(reversed(events))
    assert spent == {"leaf": (2, 8.0), "inner": (2, 6.0), "outer": (2, 4.0)}
    assert list(spent) == ["leaf", "inner", "outer"]
    assert sum(seconds for _, seconds in spent.values()) == 11.0 + 7.0


def test_a_run_keeps_the_profile_beside_what_is_counted(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (history / "packages" / "historyinfer" / "profile.py").write_text(PROFILER)
    command(monkeypatch, bench.main, *SMALL)
    result = last_line(capsys.readouterr().out)
    directory = Path(result["run"])
    assert result["completed"] == 3 and len(read_rows(directory)) == 3
    assert [len(tokens) for tokens in read_rows(directory / "profiled")["tokens"]] == [16] * 3
    kernels = read_kernels(directory)
    assert kernels["name"].tolist() == ["matmul", "add", "matmul"] and set(kernels["engine"]) == {"history"}
    assert kernels["start"][2] - kernels["start"][0] == pytest.approx(1)

    page = write_report(directory).read_text()
    assert "Where the time goes" in page and "87.5%" in page  # 0.875 s of 1 s are matmul's own
    events = json.loads((directory / "trace.perfetto.json").read_text())["traceEvents"]
    outer, inner, later = (event for event in events if event.get("cat") == "kernel")
    assert (outer["name"], inner["name"], later["name"]) == ("matmul", "add", "matmul")
    assert outer["ts"] == inner["ts"] and (outer["dur"], inner["dur"]) == pytest.approx((5e5, 1.25e5))
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert tracks[outer["tid"]] == "kernels: core"
    assert len([event for event in events if event["ph"] == "b" and event["name"].startswith("request 1/")]) == 3
    counted_end = max(event["ts"] for event in events if event["ph"] == "e" and event["id2"]["local"].startswith("0/"))
    first = min(event["ts"] for event in events if event["ph"] == "b" and event["id2"]["local"].startswith("1/"))
    assert first >= counted_end


def test_an_engine_without_a_profiler_is_left_out_and_said_so(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, bench.main, *SMALL)
    told = capsys.readouterr()
    directory = Path(last_line(told.out)["run"])
    assert "history has no profiler here" in " ".join(told.err.split())
    assert not (directory / "kernels.jsonl").exists() and not (directory / "profiled").exists()
    assert read_kernels(directory).empty


def test_a_profiler_that_fails_costs_no_figures(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (history / "packages" / "historyinfer" / "profile.py").write_text("def profile(run): raise OSError('no counters')")
    command(monkeypatch, bench.main, *SMALL)
    told = capsys.readouterr()
    result = last_line(told.out)
    assert "no counters" in " ".join(told.err.split()) and result["completed"] == 3 and result["failures"] == {}


def test_whether_to_profile_is_true_or_false() -> None:
    with pytest.raises(ConfigError, match=r"measure\.profile must be true or false, got 'yes'"):
        MeasureConfig(blocks=1, budget_s=1, warmup_requests=0, warmup_output_len=1, limits_s=0, profile="yes")
