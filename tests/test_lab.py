"""`experiments.lab`: the command line's configuration, engines and runs in a notebook; and that runs show themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from common.errors import ConfigError
from experiments import bench, lab
from experiments.engines.process import EngineFailure
from experiments.engines.spec import engine_spec
from experiments.load.driver import Row, Window
from experiments.metrics.metrics import summarize
from experiments.runs.directory import write_json
from experiments.runs.records import write_rows
from tests.history_backend import history

__all__ = ["history"]
SMALL = ("model=tiny-llama", "workload=fixed", "workload.num_requests=3", "workload.output_len=5", "measure.limits_s=0")

# ── configuration ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_notebook_composes_what_the_command_line_runs_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ("engine=torch", *SMALL, "engine.max_num_seqs=3", "experiment=smoke")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", *overrides, "--cfg", "job"])
    bench.main()
    printed = OmegaConf.create(capsys.readouterr().out)
    assert lab.compose(*overrides, command="bench") == printed
    assert engine_spec(lab.compose(*overrides, command="bench").engine).config.max_num_seqs == 3


def test_a_cell_that_composes_can_be_run_again_and_after_a_mistake() -> None:
    first = lab.compose("workload=single")
    with pytest.raises(ConfigError):
        lab.compose("workload=singel")
    assert lab.compose("workload=single") == first


def test_a_path_is_a_model() -> None:
    assert lab.compose("model=some/where").model.name == "some/where"


@pytest.mark.parametrize(
    ("overrides", "kind", "said"),
    [
        (("workload=raged",), "compare", "Did you mean 'ragged'?"),
        (("engnes=[jax,torch]",), "compare", "Did you mean 'engines'?"),
        (("engine=jax",), "compare", "Did you mean 'engines'?"),
        (("engine.max_num_sqs=3",), "bench", "Did you mean 'max_num_seqs'?"),
        (("seed=[",), "bench", "override"),
        (("-m",), "bench", "override"),
        ((), "bnech", "command must be bench or compare"),
    ],
)
def test_a_mistake_is_told_as_the_command_line_tells_it(overrides: tuple[str, ...], kind: Any, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        lab.compose(*overrides, command=kind)
    assert said in str(raised.value)
    assert (
        raised.value.__context__ is None or raised.value.__suppress_context__
    )  # a notebook shows one error, not Hydra's beneath it


def test_load_gives_the_engine_that_bench_would_time(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(history / "packages"))
    engine = lab.load(searched(history), "engine=history", "model=tiny-llama", "engine.num_blocks=20")
    assert engine.caps.backend == "history"
    assert (engine.scheduler.pool.num_pages, engine.caps.max_model_len) == (20, 512)
    engine.close()


def searched(folder: Path) -> str:
    """The override that makes `engine=history` known."""
    return f"hydra.searchpath=[file://{folder / 'configs'}]"


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bench_runs_the_command_and_gives_its_run(history: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = lab.bench(searched(history), "engine=history", *SMALL, "measure.blocks=2")
    assert type(run) is lab.Run and run.directory.parent == Path("runs")
    assert "block 2 of 2: history" in capsys.readouterr().out  # progress is seen where the cell's output is
    assert run.results == json.loads((run.directory / "results.json").read_text())
    assert run.figures.loc["completed", "history"] == 6
    assert len(run.requests) == 6 and set(run.requests["block"]) == {0, 1}


def test_what_the_user_can_mend_is_raised_as_such(history: Path) -> None:
    with pytest.raises(ConfigError, match="serves 512"):
        lab.bench(searched(history), "engine=history", *SMALL, "workload.prompt_len=600")


def test_a_run_that_a_command_names_is_given_whatever_its_exit_code() -> None:
    for code in (0, 1, 3):
        assert lab._run_directory(code, 'a table\n{"run":"runs/x"}\n', "error: a condition holds") == Path("runs/x")


@pytest.mark.parametrize(
    ("code", "said", "kind", "message"),
    [
        (2, "loading\nerror: Unknown option.\n", ConfigError, "Unknown option."),
        (1, "error: The process died.\n  its log\n", EngineFailure, "The process died.\n  its log"),
        (-9, "loading\n", EngineFailure, "The command ended with exit code -9, and named no run."),
    ],
)
def test_a_command_that_names_no_run_raises_what_it_said(code: int, said: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as raised:
        lab._run_directory(code, "", said)
    assert str(raised.value) == message


def test_a_misspelt_override_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(ConfigError, match="Did you mean 'ragged'"):
        lab.bench("workload=raged")


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def window(speed: float) -> Window:
    """Two requests of four tokens, whose times are divided by `speed`."""
    rows = [
        Row(
            request_id=str(i),
            prompt_len=5,
            output_len=4,
            scheduled=0.0,
            sent=0.5,
            times=tuple((i + 1 + t) / speed for t in range(4)),
            tokens=(1, 2, 3, 4),
            finish="length",
        )
        for i in range(2)
    ]
    return Window(tuple(rows), 6 / speed)


def write_run(directory: Path, speeds: dict[str, float], **results: Any) -> Path:
    """A run directory of one engine, or of several, each of a speed."""
    directory.mkdir(parents=True)
    windows = {label: [window(speed), window(speed)] for label, speed in speeds.items()}
    figures = {label: summarize(each) | {"contaminated": []} for label, each in windows.items()}
    setting = {"model": "tiny-llama", "dtype": "float32", "workload": "fixed", "workload_hash": "abc"}
    if len(speeds) == 1:
        setting |= {"engine": next(iter(speeds)), **next(iter(figures.values()))}
    else:
        setting |= {"engines": figures}
    write_rows(directory, windows)
    (directory / "steps.jsonl").touch()
    (directory / "config.yaml").write_text("model: {name: tiny-llama}\nengines: [jax, torch]\nseed: 0\n")
    write_json(directory / "environment.json", {"cpu": "any"})
    write_json(directory / "results.json", setting | results)
    return directory


def test_a_run_opens_as_what_it_is(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one", {"jax": 1.0}), write_run(tmp_path / "two", {"jax": 1.0, "torch": 2.0})
    assert type(lab.Run.open(one)) is lab.Run
    assert type(lab.Run.open(str(two))) is lab.Comparison
    assert type(lab.Comparison.open(two)) is lab.Comparison
    with pytest.raises(ConfigError, match=r"is a run of bench, not of compare; open it with lab\.Run\.open"):
        lab.Comparison.open(one)
    with pytest.raises(ConfigError):
        lab.Run.open(tmp_path / "none")


def test_figures_are_a_frame_of_numbers(tmp_path: Path) -> None:
    figures = lab.Run.open(write_run(tmp_path / "two", {"jax": 1.0, "torch": 2.0})).figures
    assert figures.loc["output_throughput"].tolist() == [8 / 6, 16 / 6]
    assert "block_output_throughput" not in figures.index and figures.dtypes.eq(float).all()


def test_two_runs_are_put_side_by_side_and_no_more_is_said(tmp_path: Path) -> None:
    this, other = (lab.Run.open(write_run(tmp_path / name, {name: s})) for name, s in (("jax", 1.0), ("torch", 2.0)))
    table = this.compare(other)
    assert list(table.columns) == ["this", "other", "ratio"]
    assert table.loc["output_throughput", "ratio"] == 2 and table.loc["mean_ttft_ms", "ratio"] == 0.5


def test_runs_of_different_requests_or_of_several_engines_are_not_put_side_by_side(tmp_path: Path) -> None:
    this = lab.Run.open(write_run(tmp_path / "a", {"jax": 1.0}))
    other = lab.Run.open(write_run(tmp_path / "b", {"jax": 1.0}, workload_hash="xyz"))
    both = lab.Run.open(write_run(tmp_path / "c", {"jax": 1.0, "torch": 1.0}))
    with pytest.raises(ConfigError, match="different requests"):
        this.compare(other)
    with pytest.raises(ConfigError, match="one engine each"):
        this.compare(both)


SAID = "torch is 2.00 times as fast as jax <95 % interval: 1.9 to 2.1>"


def test_what_may_have_spoilt_a_run_stands_above_its_figures(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "two", {"jax": 1.0, "torch": 2.0})
    results = json.loads((directory / "results.json").read_text())
    results["engines"]["jax"]["unsure"] = ["other programs used 30 % of the processors"]
    (directory / "results.json").write_text(json.dumps(results))
    shown = repr(lab.Run.open(directory))
    assert -1 < shown.index("jax may be contaminated: other programs used 30 %") < shown.index("output tokens/s")


def test_a_comparison_shows_its_verdict_before_its_figures_in_each_form(tmp_path: Path) -> None:
    told = {"against": "jax", "ratio": 2.0, "low": 1.9, "high": 2.1, "verdict": "faster", "said": SAID}
    run = lab.Run.open(
        write_run(tmp_path / "two", {"jax": 1.0, "torch": 2.0}, comparisons={"torch": told}, unjustified_divergences=0)
    )
    assert isinstance(run, lab.Comparison)
    assert run.comparisons.loc["torch", "verdict"] == "faster"
    for shown in (repr(run), run._repr_markdown_()):
        assert -1 < shown.index(SAID) < shown.index("rounding decides") < shown.index("output tokens/s") < shown.index("1.333")
    html = run._repr_html_()
    assert "&lt;95 % interval" in html and "<95" not in html
    assert html.index("interval") < html.index("<table>") and html.count("<tr>") == repr(run).count("\n") - 2


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ({"unjustified_divergences": 2}, "2 divergences that rounding does not explain"),
        ({"unjustified_divergences": 0, "tokens_equal": True}, "every token is the same"),
        ({"failures": {"vllm": {"kind": "Died", "message": "no memory", "log": "vllm.log"}}}, "vllm failed: Died: no memory"),
    ],
)
def test_what_a_reader_must_know_is_said(results: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in repr(lab.Run.open(write_run(tmp_path / "two", {"jax": 1.0, "torch": 2.0}, **results)))


def test_a_contaminated_run_says_why(tmp_path: Path) -> None:
    run = lab.Run.open(write_run(tmp_path / "one", {"jax": 1.0}, contaminated=["3 compilations inside the timed windows"]))
    assert "contaminated jax: 3 compilations inside the timed windows." in run._repr_markdown_()


def test_a_run_is_drawn_with_one_colour_an_engine(tmp_path: Path) -> None:
    figure = lab.Run.open(write_run(tmp_path / "two", {"jax": 1.0, "torch": 2.0})).plot()
    speed, first, between = figure.axes
    legend = first.get_legend()
    assert legend and [text.get_text() for text in legend.get_texts()] == ["jax", "torch"]
    assert [np.asarray(line.get_ydata()).tolist() for line in speed.lines] == [[8 / 6] * 2, [16 / 6] * 2]
    assert sorted(np.asarray(first.lines[0].get_xdata())[1:]) == [1000, 1000, 2000, 2000]  # from when they were due
    assert set(np.asarray(between.lines[1].get_xdata())[1:].round()) == {500}


def test_a_run_of_which_nothing_came_is_drawn_too(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "one", {"jax": 1.0}, block_output_throughput=[None])
    rows = [json.loads(line) | {"times": [], "tokens": []} for line in (directory / "requests.jsonl").read_text().splitlines()]
    (directory / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(lab.Run.open(directory).plot().axes) == 3


def test_rows_and_steps_are_frames(tmp_path: Path) -> None:
    run = lab.Run.open(write_run(tmp_path / "one", {"jax": 1.0}))
    assert run.requests["times"].map(len).tolist() == [4] * 4
    assert isinstance(run.steps, pd.DataFrame) and run.steps.empty
