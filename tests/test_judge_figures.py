"""Whole runs on the history engine: every kind of load is sent as it says, and an outside judge finds the same figures."""

import json
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from common.config import EngineConfig
from common.engine import Engine
from experiments import bench
from experiments.load.driver import drive
from experiments.load.workload import Workload, WorkloadConfig, draw
from experiments.metrics.metrics import contaminations, summarize
from experiments.options import resolved
from tests import judge_figures
from tests.history_backend import VOCABULARY, command, history, last_line
from tests.history_runner import HistoryRunner
from tests.test_drive import most_in_flight

__all__ = ["history"]


def workload(name: str, *overrides: str) -> Workload:
    with initialize_config_module("configs", version_base="1.3"):
        config = compose("bench", [f"workload={name}", *overrides])
    return draw(WorkloadConfig.of(resolved(config.workload)), 0, VOCABULARY)


def engine() -> Engine:
    return Engine(HistoryRunner(num_pages=1000, vocab_size=VOCABULARY), EngineConfig(max_model_len=4096), num_pages=1000)


SHORT = ("workload.num_requests=8", "workload.output_len=6")
TINY = {
    "fixed": SHORT,
    "ragged": SHORT,
    "single": (),
    "prefill": ("workload.prompt_len=256",),
    "shared_prefix": SHORT,
    "chat": SHORT,
    "multi_turn": (*SHORT, "workload.think_s=0.01"),
    "long_context": ("workload.num_requests=1", "workload.output_len=3"),
    "poisson": (*SHORT, "workload.request_rate=100"),
    "bursty": (*SHORT, "workload.request_rate=100"),
    "closed_loop": ("workload.num_requests=12", "workload.output_len=6", "workload.concurrency=3"),
}


@pytest.mark.parametrize("name", TINY)
def test_a_named_workload_runs_through_and_is_sent_as_it_says(name: str) -> None:
    asked = workload(name, *TINY[name])
    window = drive(engine(), asked.items, concurrency=asked.concurrency)
    assert all(row.ok and row.sent >= row.scheduled for row in window.rows)
    for item, row in zip(asked.items, window.rows, strict=True):
        if item.after is not None:
            assert row.scheduled == window.rows[item.after].times[-1] + item.think
        elif asked.concurrency is None:
            assert row.scheduled == item.arrival
    assert most_in_flight(window.rows) <= (asked.concurrency or len(asked.items))
    figures = summarize([window], asked.slo, asked.concurrency)
    assert figures["completed"] == len(asked.items)
    assert not [reason for reason in contaminations(figures, asked.shares_prefixes) if "cache" in reason]
    assert (figures["prefix_cache_hit_rate"] > 0.1) == (name in ("shared_prefix", "multi_turn"))


def test_a_closed_loop_uses_all_its_users() -> None:
    asked = workload("closed_loop", *TINY["closed_loop"])
    assert most_in_flight(drive(engine(), asked.items, concurrency=asked.concurrency).rows) == 3


RUN = (
    "engine=history",
    "model=tiny-llama",
    "dtype=float32",
    "measure.limits_s=0",
    "measure.blocks=2",
    "measure.warmup_requests=1",
)
LENGTHS = ("workload.prompt_len.high=64", "workload.output_len.high=20")


@pytest.mark.parametrize(
    "overrides",
    [
        ("workload=closed_loop", *LENGTHS, "workload.slo.ttft_ms=20", "workload.slo.e2el_ms=60"),
        ("workload=bursty", *LENGTHS, "workload.request_rate=200", "workload.slo.tpot_ms=2"),
        ("workload=trace", "workload.trace=load.jsonl"),
    ],
)
def test_the_judge_finds_the_figures_of_a_whole_run(
    overrides: tuple[str, ...], history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [{"arrival": n / 100, "prompt_len": 5 + n, "output_len": 1 + n % 4} for n in range(20)]
    (history / "load.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    command(monkeypatch, bench.main, *RUN, *overrides)
    result = last_line(capsys.readouterr().out)
    rows = judge_figures.read(Path(result["run"]))
    assert len(rows) == 2 * result["num_prompts"] and all(row["sent"] >= row["scheduled"] for row in rows)
    mine = judge_figures.figures(rows, result["slo"])
    assert (mine["goodput"] is None) == (result["slo"] is None)
    assert {name: value for name, value in mine.items() if judge_figures.distance(value, result[name]) > 1e-9} == {}
    assert len(mine) == 9 + 10 * 6
    monkeypatch.setattr(sys, "argv", ["judge_figures", result["run"]])
    judge_figures.main()
    told, apart = capsys.readouterr().out.splitlines()
    assert told.startswith(f"{result['run']} history: 69 figures, at most ") and apart.startswith("  not judged: ")
    assert "decode_throughput" in apart and "output_throughput," not in apart.replace("steady_output_throughput,", "")
    assert 0 < result["harness_overhead_share"] < 1 and result["decode_throughput"] > 0 and result["peak_running"] >= 1


def test_the_judge_says_what_it_leaves_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"engine": "jax", "block": 0, "tokens": [1, 2], "times": [0.5, 1.0], "sent": 0.0, "scheduled": 0.0, "started": 0.1}
    row |= {"error": None, "output_len": 2, "prompt_len": 3}
    (tmp_path / "requests.jsonl").write_text(json.dumps(row) + "\n")
    figures = judge_figures.figures([row]) | {"roofline": 0.5, "slo": None, "contaminated": []}
    comparison = {"against": "jax", "ratio": 0.9, "low": None, "verdict": "undecided", "blocks": 1}
    results = {"engines": {"jax": figures}, "comparisons": {"torch": comparison}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(sys, "argv", ["judge_figures", str(tmp_path)])
    judge_figures.main()
    assert [line for line in capsys.readouterr().out.splitlines() if "not judged" in line] == [
        "  not judged: roofline",
        "  not judged: blocks, ratio, verdict",
    ]


def test_the_judge_notices_a_figure_that_is_off() -> None:
    assert judge_figures.distance(1000.0, 1000.0) == 0.0
    assert judge_figures.distance(1000.0, 1000.001) > 1e-9
    assert judge_figures.distance(None, 1.0) == float("inf") and judge_figures.distance(None, None) == 0.0


@pytest.mark.parametrize("words", [[], ["."], ["nowhere"], ["--rnu=x", "."]])
def test_what_the_judge_cannot_judge_is_refused_with_its_usage(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("results.json").write_text("{}")
    Path("requests.jsonl").touch()
    monkeypatch.setattr(sys, "argv", ["judge_figures", *words])
    with pytest.raises(SystemExit) as exit:
        judge_figures.main()
    assert exit.value.code == 2 and capsys.readouterr().err.startswith("usage: python -m tests.judge_figures ")


def test_an_impossible_load_is_refused_before_anything_runs(
    history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for overrides, said in (
        (("workload=closed_loop", "workload.request_rate=3"), "set one of them to null"),
        (("workload=trace",), "The trace trace.jsonl cannot be read"),
        (("workload=multi_turn", "workload.turns=40", "workload.num_requests=40"), "serves 512"),
    ):
        with pytest.raises(SystemExit) as exit:
            command(monkeypatch, bench.main, *RUN, *overrides)
        assert exit.value.code == 2 and said in capfd.readouterr().err
    assert not (history / "runs").exists()
