"""Reading runs and sweeps back, whole, partial and foreign."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from common.errors import ConfigError
from experiments.runs.results import list_runs, open_run, sweep_table, values
from experiments.sweep import __main__ as command
from experiments.sweep.table import finish
from tests.history_backend import last_line
from tests.sample_runs import save_bench, save_compare, save_sweep


def test_a_run_of_either_kind_tells_its_engines(tmp_path: Path) -> None:
    run = open_run(save_bench(tmp_path / "one"))
    assert (run.kind, list(run.engines), run.engines["jax"]["completed"]) == ("bench", ["jax"], 3)
    assert run.config["workload"]["name"] == "fixed" and run.environment["command"] == "python -m experiments.bench"
    run = open_run(str(save_compare(tmp_path / "two")))
    assert (run.kind, list(run.engines)) == ("compare", ["jax", "torch"])


def test_what_is_no_finished_run_is_refused_with_the_reason(tmp_path: Path) -> None:
    def refusal(directory: Path) -> str:
        with pytest.raises(ConfigError) as error:
            open_run(directory)
        return str(error.value)

    assert "no folder" in refusal(tmp_path / "nowhere")
    assert "results.json" in refusal(tmp_path)
    partial = save_bench(tmp_path / "run").rename(tmp_path / "run.partial")
    assert "has not ended" in refusal(partial)
    run = partial.rename(tmp_path / "run")
    config = (run / "config.yaml").read_text()
    for foreign in ("a: [", "- 1", "3", "engine: {name: jax}", "model: {name: tiny-llama}", ""):
        (run / "config.yaml").write_text(foreign)
        assert "config.yaml" in refusal(run)
    (run / "config.yaml").write_text(config)
    (run / "results.json").write_text('{"engine": ')
    assert "no directory of a run" in refusal(run)
    (run / "results.json").write_text('{"foreign": 1}')
    assert "names no engine" in refusal(run)
    (run / "results.json").write_text('{"engines": 3}')
    assert "names no engine" in refusal(run)
    (run / "environment.json").write_text("[]")
    assert "environment.json is no mapping" in refusal(run)
    (run / "environment.json").unlink()
    assert "environment.json" in refusal(run)


def test_all_runs_below_a_folder_are_found_and_nothing_else(tmp_path: Path) -> None:
    save_bench(tmp_path / "b")
    save_compare(tmp_path / "a")
    save_sweep(tmp_path / "sweeps" / "s")
    save_bench(tmp_path / "c").rename(tmp_path / "c.partial")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "results.json").write_text("[1, 2]")
    assert [run.directory.name for run in list_runs(tmp_path)] == ["a", "b", "000-aa"]
    assert list_runs(tmp_path / "nowhere") == []


def test_a_sweep_has_a_row_for_each_job_whatever_became_of_it(tmp_path: Path) -> None:
    table = sweep_table(save_sweep(tmp_path))
    assert list(table["status"]) == ["ok", "failed", "waiting"]
    assert list(table["run"]) == ["jobs/000-aa", "jobs/001-bb", "jobs/002-cc"]
    assert list(table["engine"]) == ["jax", "torch", "torch"]
    assert list(table["failure"].dropna()) == ["killed by SIGKILL: two"]
    assert list(table["output_throughput"].dropna()) == [5 / 3.75]
    assert list(table["engine.max_num_seqs"]) == [8, 8, 8] and "runs" not in table
    assert table.attrs["swept"] == ["engine", "workload.request_rate"]


def test_a_comparison_in_a_sweep_has_a_row_for_each_engine_with_its_verdict(tmp_path: Path) -> None:
    save_compare(tmp_path / "jobs" / "000-aa", failures={"hf": {"kind": "died", "message": "of\nhunger", "log": "hf.log"}})
    table = sweep_table(tmp_path)
    assert list(table["engine"]) == ["jax", "torch", "hf"]
    assert list(table["status"]) == ["ok", "ok", "failed"] and table["failure"][2] == "died: hunger"
    assert table["verdict"][1] == "slower" and (table["ratio_low"][1], table["ratio_high"][1]) == (0.4, 0.6)
    assert list(table["model"]) == ["tiny-llama"] * 3


def test_a_sweep_that_has_no_list_is_told_by_its_runs(tmp_path: Path) -> None:
    save_bench(tmp_path / "jobs" / "1-aa", overrides=["threads=7"])
    save_bench(tmp_path / "jobs" / "10-bb", overrides=["threads=8"])
    table = sweep_table(tmp_path)
    assert list(table["job"]) == [1, 10] and list(table["threads"]) == [7, 8] and table.attrs["swept"] == ["threads"]


def test_a_folder_that_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder of a sweep"):
        sweep_table(tmp_path)
    (tmp_path / "jobs").mkdir()
    assert sweep_table(tmp_path).empty


def test_the_table_survives_both_files_and_failures_end_with_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_sweep(tmp_path / "s")
    monkeypatch.setattr(sys, "argv", ["sweep", str(folder)])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 1
    result = last_line(capsys.readouterr().out)
    assert (result["jobs"], result["ok"], result["failed"], result["waiting"]) == (3, 1, 1, 1)
    assert result["failures"] == {"jobs/001-bb": "killed by SIGKILL: two"}
    parquet, csv = pd.read_parquet(folder / "sweep.parquet"), pd.read_csv(folder / "sweep.csv")
    assert list(parquet["run"]) == list(csv["run"]) and list(parquet.columns) == list(csv.columns)
    assert list(parquet["workload.request_rate"].dropna()) == ["2.5", "fast"]  # a number and a word: a column of words

    # It ends well at last, and the third is not wanted any more.
    save_bench(folder / "jobs" / "001-bb", "torch")
    jobs = json.loads((folder / "jobs.json").read_text())
    jobs["jobs"] = jobs["jobs"][:2]
    jobs["jobs"][1]["failure"] = None
    (folder / "jobs.json").write_text(json.dumps(jobs))
    assert finish(folder)
    assert last_line(capsys.readouterr().out)["ok"] == 2


def test_a_mistake_of_the_user_ends_with_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep", "nowhere"])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 2 and "no folder of a sweep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "column"),
    [
        ("a.b=8", {"a.b": 8}),
        ("+a=2.5", {"a": 2.5}),
        ("a=null", {"a": None}),
        ("a=true", {"a": True}),
        ("a=[1,2]", {"a": "[1,2]"}),
        ("a={b:1}", {"a": "{b:1}"}),
        ("a=b=c", {"a": "b=c"}),
        ("a='x y'", {"a": "x y"}),
        ("a=", {"a": ""}),
        ("a=(", {"a": "("}),
        ("sweep=x", {}),
    ],
)
def test_an_override_is_a_column(word: str, column: dict[str, object]) -> None:
    assert values([word]) == column
