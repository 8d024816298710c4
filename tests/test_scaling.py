"""How throughput follows ranks: which results are one curve, what is said of it, and where it is shown."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.config import EngineConfig
from experiments.engines.spec import EngineSpec, scale
from experiments.report.charts.scaling import scaling
from experiments.report.console import print_scaling, print_table
from experiments.report.scaling import STRONG, WEAK, Curve, curves, scaling_table
from experiments.report.sections import scaling_section
from experiments.report.writer import write_report
from experiments.sweep.table import finish
from tests.synthetic_run import write_run, write_sweep

ONE: dict[str, Any] = {
    "engine": "torch", "scales_as": "torch-1", "model": "tiny-llama", "dtype": "float32", "workload": "ragged",
    "workload_hash": "a", "num_prompts": 8, "shared_by": "", "ranks": 1, "compute_threads": 2, "device": "cpu",
    "output_throughput": 100.0,
    "num_steps": 10, "duration": 0.1, "weights_mib": 6.0, "kv_pool_mib": 2.0, "rank_mib": 8.0,
}  # fmt: skip
TWO = ONE | {
    "engine": "torch-tp2", "shared_by": "tensor", "ranks": 2, "output_throughput": 80.0, "communication_ms_per_step": 4.0,
    "communication_mib_per_step": 0.5, "rank_mib": 4.1,
}  # fmt: skip
FOUR = TWO | {"engine": "torch-tp4", "ranks": 4, "output_throughput": 50.0}
SPOILT = "is not to be quoted"


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


def test_curves_of_one_engine_are_told_apart_by_their_requests() -> None:
    results = [point | {"num_prompts": count, "workload_hash": str(count)} for count in (32, 64) for point in (ONE, TWO, FOUR)]
    titles = [curve.title for curve in curves(results)]
    assert titles == [
        "torch, tensor parallel: the same 32 requests (strong scaling)",
        "torch, tensor parallel: the same 64 requests (strong scaling)",
        "torch, tensor parallel: 32 requests for each rank (weak scaling)",
        "torch-tp2, tensor parallel: 16 requests for each rank (weak scaling)",
    ]


def test_curves_that_differ_in_an_option_of_a_sweep_alone_are_told_apart_by_it() -> None:
    swept = ["engine.max_num_seqs", "engine.max_model_len", "parallel"]
    results = [
        point | {"scales_as": str(most), "engine.max_num_seqs": most, "engine.max_model_len": None, "parallel": parallel}
        for most in (8.0, 16.0)
        for point, parallel in ((ONE, "none"), (TWO, "tp2"))
    ]
    assert [curve.setting for curve in curves(results, swept)] == ["max_num_seqs=8", "max_num_seqs=16"]
    assert "tensor parallel, max_num_seqs=8: the same" in curves(results, swept)[0].title
    assert [curve.setting for curve in curves(results[:2], swept)] == [""]


def test_weak_scaling_has_no_requests_of_another_kind() -> None:
    results = [
        point | {"workload.prompt_len": length, "num_prompts": count, "workload_hash": f"{length} {count}"}
        for length in (16, 128)
        for point, count in ((ONE, 8), (TWO, 16))
    ]
    found = curves(results, ["workload.prompt_len", "workload.num_requests"])
    assert [[point["workload.prompt_len"] for point in curve.points] for curve in found] == [[16, 16], [128, 128]]
    assert [curve.setting for curve in found] == ["prompt_len=16", "prompt_len=128"]


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
    efficiency = lambda *points: column("efficiency", *points)  # noqa: E731
    assert efficiency(ONE, TWO) == ["100%", "80%"] and efficiency(ONE, more) == ["100%", "75%"]
    devices = [point | {"device": "cuda:any"} for point in (ONE, TWO)]
    assert efficiency(*devices) == ["100%", "40%"]


def test_the_table_tells_what_ranks_say_and_hold() -> None:
    told, share = "between ranks a step, ms", "of the time"
    assert column(told, ONE, TWO) == ["–", "4.000"] and column(share, ONE, TWO) == ["–", "40%"]
    assert column("MiB a step", ONE, TWO) == ["–", "0.5000"]
    assert column("a rank's weights and pages, MiB", ONE, TWO) == ["8.000", "4.100"]
    silent = TWO | {"communication_ms_per_step": None}
    assert column(told, ONE, silent)[1] == "not reported" and column(share, ONE, silent, TWO) == ["–", "–", "40%"]
    profiled = TWO | {"communication_share": 0.25}
    assert (column(told, ONE, profiled)[1], column(share, ONE, profiled)[1]) == ("4.000", "25%")  # of the profiled steps


def column(name: str, *points: dict[str, Any]) -> list[str]:
    """Of the table of a curve."""
    table = scaling_table(Curve(STRONG, "tensor", points))
    return [row[table.columns.index(name)] for row in table.rows]


@pytest.mark.parametrize("reason", [["swapped"], "swapped"])  # in a run, and in the table of a sweep
def test_the_ratio_of_a_contaminated_engine_is_marked_wherever_it_is_shown(
    reason: object, capsys: pytest.CaptureFixture[str]
) -> None:
    (spoilt,) = found = curves([ONE | {"duration": 2.0}, TWO | {"contaminated": reason}])
    assert column("contaminated", *(dict(point) for point in spoilt.points)) == ["no", "contaminated"]
    print_scaling(found)
    printed = " ".join(capsys.readouterr().out.split())
    assert SPOILT in printed and "│ contaminated │" in printed
    drawing = scaling(found, STRONG)
    assert drawing and "0.8000 at 2 (contaminated)" in drawing.alt and ">contaminated<" in drawing.svg
    section = scaling_section(found)
    assert SPOILT in section.intro and "contaminated" in section.tables[0].columns

    clean = curves([ONE, TWO])
    print_scaling(clean)
    drawing = scaling(clean, STRONG)
    assert drawing and "contaminated" not in capsys.readouterr().out + drawing.alt + drawing.svg
    assert "contaminated" not in scaling_section(clean).intro


def test_the_figure_names_each_line_by_what_tells_it_apart() -> None:
    results = [point | {"num_prompts": count, "workload_hash": str(count)} for count in (32, 64) for point in (ONE, TWO)]
    replicas = [point | {"shared_by": "data" if point["shared_by"] else ""} for point in results]
    strong, weak = (scaling(curves(results + replicas[1:]), kind) for kind in (STRONG, WEAK))
    assert strong and legend(strong.svg) == [
        *("tensor, 32 requests", "data, 32 requests", "tensor, 64 requests", "data, 64 requests"),
        "in proportion to threads",
    ]
    assert weak and legend(weak.svg) == ["tensor", "data", "in proportion to threads"]
    assert ">torch: × the first<" in strong.svg and ">torch, 32 a rank: × the first<" in weak.svg
    alone = scaling(curves([ONE, TWO]), STRONG)
    assert alone and legend(alone.svg)[0] == "torch, tensor, 8 requests"
    names = ["torch-max_num_batched_tokens=1024-kernels=framework-max_num_seqs=" + most for most in ("8", "16")]
    long = scaling(curves([point | {"engine": name, "scales_as": name} for name in names for point in (ONE, TWO)]), STRONG)
    assert long and "".join(legend(long.svg)).startswith("".join(names))  # in several lines, and nothing cut


def legend(svg: str) -> list[str]:
    """The names of a figure's lines."""
    return re.findall(r"<text [^>]*>([^<]*)</text>", svg.partition("legend_1")[2])


def test_what_is_in_proportion_is_no_bound_of_weak_scaling_and_the_report_says_why() -> None:
    found = curves([ONE, TWO | {"num_prompts": 16, "workload_hash": "b", "output_throughput": 150.0}])
    drawing, section = scaling(found, WEAK), scaling_section(found)
    assert drawing and "lines may rise above it" in drawing.alt and "efficiency may pass 100 %" in section.intro
    assert column("efficiency", *(dict(point) for point in found[0].points)) == ["100%", "150%"]
    assert scaling(found, STRONG) is None and "efficiency may pass" not in scaling_section(curves([ONE, TWO])).intro


@pytest.mark.parametrize("spoilt", [[], ["swapped"]])
@pytest.mark.parametrize("columns", [40, 60, 80, 100, 120, 200])
def test_a_terminal_cuts_nothing_of_what_names_a_row(
    columns: int, spoilt: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
    label = "torch-tensor_parallel_size=2"
    print_scaling(curves([ONE, TWO | {"engine": label, "contaminated": spoilt}]))
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    shown = [[cell.strip() for cell in line[1:-1].split("│")] for line in lines if line.startswith("│")]
    heading = " ".join(line for line in lines if line.startswith("┃"))
    assert "".join(row[0] for row in shown) == "torch" + label and "…" not in "".join(lines)
    assert all(name in heading for name in ("ranks", "threads")) and max(map(len, lines)) <= columns
    assert bool(spoilt) <= ("contaminated" in heading) or "first" not in heading


def test_a_column_that_tells_nothing_is_left_out_of_a_curve() -> None:
    replicas = TWO | {"communication_ms_per_step": None, "communication_mib_per_step": None}
    columns = scaling_table(Curve(STRONG, "data", [ONE, replicas])).columns
    assert {"between ranks a step, ms", "of the time", "MiB a step"}.isdisjoint(columns) and "efficiency" in columns
    assert {"between ranks a step, ms", "of the time", "MiB a step"} <= {
        *scaling_table(Curve(STRONG, "data", [ONE, TWO])).columns
    }


@pytest.mark.parametrize("spoilt", [[], ["swapped"]])
def test_tokens_ratio_and_efficiency_take_their_room_from_long_names(
    spoilt: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
    label = "torch-data_parallel_size=2-max_num_batched_tokens=1024-enable_chunked_prefill=False"
    print_scaling(curves([ONE, TWO | {"engine": label, "contaminated": spoilt}]))
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    heading = " ".join(line for line in lines if line.startswith("┃"))
    shown = [[cell.strip() for cell in line[1:-1].split("│")] for line in lines if line.startswith("│")]
    assert all(name in heading for name in ("tokens/s", "first", "efficiency")) and max(map(len, lines)) <= 80
    assert "".join(row[0] for row in shown) == "torch" + label
    assert all(any(cell in row for row in shown) for cell in ("100.0", "80.00", "0.8000", "80%"))


def test_a_time_that_an_engine_cannot_tell_is_called_so_in_the_table_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("title", {"jax": {"communication_mib_per_step": 0.5, "contaminated": []}})
    assert "not reported" in capsys.readouterr().out
    print_table("title", {"jax": {"contaminated": []}})
    assert "not reported" not in capsys.readouterr().out


def test_a_comparison_over_ranks_shows_scaling_and_another_does_not(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", ("torch", "torch-2"), blocks=2, count=5, output_len=4)
    write_report(directory)
    assert not (directory / "figures" / "strong-scaling.svg").exists()
    results = json.loads((directory / "results.json").read_text())
    for label, ranks in (("torch", 1), ("torch-2", 2)):
        mine = {"scales_as": "torch-1", "compute_threads": 2, "device": "cpu", "shared_by": "data" * (ranks > 1)}
        results["engines"][label] |= mine | {"ranks": ranks}
    (directory / "results.json").write_text(json.dumps(results))
    page = write_report(directory).read_text()
    assert (
        "torch, data parallel: the same 5 requests (strong scaling)" in page
        and (directory / "figures" / "strong-scaling.svg").exists()
    )
    said = (directory / "report.md").read_text()
    assert "torch, data parallel: the same 5 requests (strong scaling)" in said and "| efficiency |" in said


def test_a_sweep_over_ranks_and_requests_shows_weak_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sweep(tmp_path / "sweep", sizes=(4, 8), engines=("jax", "torch"))
    for job in (folder / "jobs").iterdir():
        results = json.loads((job / "results.json").read_text())
        ranks = results["num_prompts"] // 4
        mine = {"scales_as": results["engine"], "compute_threads": 2, "device": "cpu", "ranks": ranks}
        mine["shared_by"] = "tensor" * (ranks > 1)
        (job / "results.json").write_text(json.dumps(results | mine))
    page = write_report(folder).read_text()
    assert "4 requests for each rank (weak scaling)" in page and (folder / "figures" / "weak-scaling.svg").exists()
    assert "4 requests for each rank (weak scaling)" in (folder / "report.md").read_text()
    capsys.readouterr()
    finish(folder)
    assert "4 requests for each rank (weak scaling)" in capsys.readouterr().out
