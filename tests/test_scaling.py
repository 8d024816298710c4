"""How throughput follows ranks: which results are one curve, what is said of it, and where it is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.config import EngineConfig
from experiments.config import EngineSpec
from experiments.console import print_table
from experiments.report import write_report
from experiments.scaling import Curve, curves, scale, scaling_table
from experiments.sweep import finish
from tests.synthetic_run import write_run, write_sweep

ONE: dict[str, Any] = {
    "engine": "torch", "scales_as": "torch-1", "model": "tiny-llama", "dtype": "float32", "workload": "ragged",
    "workload_hash": "a", "num_prompts": 8, "shared_by": "", "ranks": 1, "compute_threads": 2, "device": "cpu",
    "output_throughput": 100.0,
    "num_steps": 10, "duration": 0.1, "weights_mib": 6.0, "kv_pool_mib": 2.0,
}  # fmt: skip
TWO = ONE | {
    "engine": "torch-tp2", "shared_by": "tensor", "ranks": 2, "output_throughput": 80.0, "communication_ms_per_step": 4.0,
    "communication_mib_per_step": 0.5, "rank_mib": 4.1,
}  # fmt: skip


def test_what_differs_in_ranks_and_threads_alone_scales_together() -> None:
    spec = EngineSpec(label="torch", name="torch", config=EngineConfig(threads=2))
    change = lambda **options: scale(replace(spec, config=replace(spec.config, **options)))  # noqa: E731
    one, *others = every = (
        scale(spec),
        change(tensor_parallel_size=2),
        change(data_parallel_size=2, tensor_parallel_size=2, threads=4),
        change(pipeline_parallel_size=3, tensor_parallel_size=2),
    )
    assert [each["ranks"] for each in every] == [1, 2, 4, 6]
    assert [each["compute_threads"] for each in every] == [2, 2, 4, 2]
    assert [each["shared_by"] for each in every] == ["", "tensor", "tensor and data", "tensor and pipeline"]
    shown = [None, "tensor 2", "tensor 2, data 2", "tensor 2, pipeline 3"]
    assert [each["shared_out"] for each in every] == shown and change(prefill_parallel_size=1)["shared_out"] == "prefill 1"
    assert {each["scales_as"] for each in others} == {one["scales_as"]}
    assert len({each["scales_as"] for each in (one, change(max_num_seqs=3), scale(replace(spec, name="jax")))}) == 3


def test_results_of_the_same_requests_are_strong_scaling_and_of_as_many_a_rank_weak() -> None:
    twice = TWO | {"workload_hash": "b", "num_prompts": 16, "output_throughput": 150.0}
    found = curves([TWO, ONE, twice])
    assert {(curve.kind, *(point["output_throughput"] for point in curve.points)) for curve in found} == {
        ("strong", 100.0, 80.0),
        ("weak", 100.0, 150.0),
    }


def test_ranks_that_share_out_the_model_and_replicas_are_curves_of_their_own_from_one_beginning() -> None:
    replicas = TWO | {"shared_by": "data", "output_throughput": 120.0}
    found = {curve.shared_by: [point["output_throughput"] for point in curve.points] for curve in curves([ONE, TWO, replicas])}
    assert found == {"tensor": [100.0, 80.0], "data": [100.0, 120.0]}


@pytest.mark.parametrize(
    "change", [{"ranks": 1}, {"scales_as": "jax-1"}, {"model": "other"}, {"workload": "chat"}, {"output_throughput": None}]
)
def test_results_that_differ_in_anything_else_or_not_in_ranks_are_no_curve(change: dict[str, Any]) -> None:
    assert curves([ONE, TWO | change]) == []


def test_efficiency_is_by_thread_on_a_cpu_and_by_rank_elsewhere() -> None:
    more = TWO | {"compute_threads": 4, "output_throughput": 150.0}
    efficiency = lambda *points: [row[6] for row in scaling_table(Curve("strong", "tensor", points)).rows]  # noqa: E731
    assert efficiency(ONE, TWO) == ["100%", "80%"] and efficiency(ONE, more) == ["100%", "75%"]
    devices = [point | {"device": "cuda:any"} for point in (ONE, TWO)]
    assert efficiency(*devices) == ["100%", "40%"]


def test_the_table_tells_what_ranks_say_and_hold() -> None:
    (first, second) = scaling_table(Curve("strong", "tensor", [ONE, TWO])).rows
    assert first[7:] == ("–", "–", "–", "8.000") and second[7:] == ("4.000", "40%", "0.5000", "4.100")
    (_, silent) = scaling_table(Curve("strong", "tensor", [ONE, TWO | {"communication_ms_per_step": None}])).rows
    assert silent[7:9] == ("not told", "–")
    (_, profiled) = scaling_table(Curve("strong", "tensor", [ONE, TWO | {"communication_share": 0.25}])).rows
    assert profiled[7:9] == ("4.000", "25%")  # of the steps under the profiler, and not of the timed ones


def test_a_time_that_an_engine_cannot_tell_is_called_so_in_the_table_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("title", {"jax": {"communication_mib_per_step": 0.5, "contaminated": []}})
    assert "not told" in capsys.readouterr().out
    print_table("title", {"jax": {"contaminated": []}})
    assert "not told" not in capsys.readouterr().out


def test_a_comparison_over_ranks_shows_scaling_and_another_does_not(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", ("torch", "torch-2"), blocks=2, count=5, output_len=4)
    write_report(directory)
    assert not (directory / "figures" / "scaling.svg").exists()
    results = json.loads((directory / "results.json").read_text())
    for label, ranks in (("torch", 1), ("torch-2", 2)):
        mine = {"scales_as": "torch-1", "compute_threads": 2, "device": "cpu", "shared_by": "data" * (ranks > 1)}
        results["engines"][label] |= mine | {"ranks": ranks}
    (directory / "results.json").write_text(json.dumps(results))
    page = write_report(directory).read_text()
    assert (
        "torch, data parallel: the same requests (strong scaling)" in page and (directory / "figures" / "scaling.svg").exists()
    )
    said = (directory / "report.md").read_text()
    assert "torch, data parallel: the same requests (strong scaling)" in said and "| efficiency |" in said


def test_a_sweep_over_ranks_and_requests_shows_weak_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sweep(tmp_path / "sweep", sizes=(4, 8), engines=("jax", "torch"))
    for job in (folder / "jobs").iterdir():
        results = json.loads((job / "results.json").read_text())
        ranks = results["num_prompts"] // 4
        mine = {"scales_as": results["engine"], "compute_threads": 2, "device": "cpu", "ranks": ranks}
        mine["shared_by"] = "tensor" * (ranks > 1)
        (job / "results.json").write_text(json.dumps(results | mine))
    page = write_report(folder).read_text()
    assert "as many requests for each rank (weak scaling)" in page and (folder / "figures" / "scaling.svg").exists()
    assert "as many requests for each rank (weak scaling)" in (folder / "report.md").read_text()
    capsys.readouterr()
    finish(folder)
    assert "as many requests for each rank (weak scaling)" in capsys.readouterr().out
