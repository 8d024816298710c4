"""`experiments.compare`: ratios, labels and messages, and a whole run in real processes."""

import json
import re
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from common.process.exits import TERMINATED, Terminated
from experiments import compare
from experiments.compare import ratios
from experiments.engines.process import IsolatedEngine
from experiments.load.driver import Window
from experiments.measure.session import Outcome
from experiments.metrics.statistics import Criteria, compare_all
from experiments.report.writer import write_report
from experiments.runs import records
from experiments.runs.records import read_rows, read_steps
from tests.history_backend import ROOT, command, history, interruptible, last_line, written

__all__ = ["history"]
SMALL = (
    "model=tiny-llama",
    "workload=fixed",
    "workload.num_requests=3",
    "workload.output_len=5",
    "correctness.output_len=4",
    "measure.limits_s=0",
)


def test_ratios_are_those_of_the_verdicts_and_1_for_the_first() -> None:
    compared = compare_all({"jax": [50.0, 50.0], "hf": [10.0, 40.0], "torch": [None, None]}, Criteria(), seed=0)
    found = ratios(["jax", "hf", "torch"], compared)
    assert found == {"jax": 1.0, "hf": pytest.approx(0.4), "torch": None}  # not 0.5, the ratio of the sums
    assert ratios([], {}) == {} and ratios(["jax"], {}) == {"jax": 1.0}


def test_compare_runs_both_engines_and_finds_them_equal(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, compare.main, *SMALL, "engines=[history,{name:history,block_size:8}]", "measure.blocks=4")
    out = capsys.readouterr().out
    result = last_line(out)
    one, other = "history", "history-block_size=8"
    assert set(result["engines"]) == set(result["ratios"]) == {one, other} and result["failures"] == {}
    for figures in result["engines"].values():
        assert figures["completed"] == 12 and len(figures["block_output_throughput"]) == 4 and figures["contaminated"] == []
    assert (result["tokens_equal"], result["unjustified_divergences"], result["tokens_equal_share"]) == (True, 0, 1.0)
    assert result["compared_tokens"] == 3 * 5 and result["suspicious"] == 0
    assert result["coverage"] == {
        **{"requests": 3, "timed_requests": 3, "tokens": 15, "timed_tokens": 15, "longest": 133, "timed_longest": 133},
        **{"step_sizes": 2, "timed_step_sizes": 2},
    }
    assert "15 of 15 timed tokens compared in 3 of 3 requests, histories up to 133 of 133 tokens" in " ".join(out.split())
    assert [sorted(order) for order in result["order"]] == [[one, other]] * 4 and result["order"][1] == result["order"][0][::-1]
    assert (result["stopped"], result["stopped_by"]) == ("all 4 blocks were run", "measure.blocks")

    (comparison,) = result["comparisons"].values()
    blocks = [figures["block_output_throughput"] for figures in result["engines"].values()]
    assert comparison["block_ratios"] == pytest.approx([b / a for a, b in zip(*blocks, strict=True)])
    assert comparison["low"] < comparison["ratio"] < comparison["high"] and comparison["interval"] == "t"
    assert result["ratios"] == {one: 1.0, other: comparison["ratio"]}
    before = " ".join(out.rpartition("\n{")[0].split())  # the verdict is the last that is printed ahead of the JSON
    assert before.endswith(f"{comparison['said']}.") and comparison["against"] == one
    directory = Path(result["run"])
    assert written(result) == result
    assert len((directory / "requests.jsonl").read_text().splitlines()) == 2 * 4 * 3


def test_a_disk_that_is_full_of_rows_leaves_the_figures_and_says_so_in_one_line(
    history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "write_rows", full)
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, compare.main, *SMALL, "engines=[history,history]", "measure=quick", "correctness.num_requests=0")
    assert exit.value.code == 1
    (partial,) = (history / "runs").iterdir()
    assert partial.suffix == ".partial"
    assert len(json.loads((partial / "results.json").read_text())["engines"]) == 2
    err = capfd.readouterr().err
    (told,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert "No space left on device. Kept in" in told and "results.json" in told and "Traceback" not in err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["block 3", "float32 pass: history-2"])
def test_who_ends_a_run_keeps_the_rows_of_its_windows_that_have_ended(history: Path, how: signal.Signals, when: str) -> None:
    blocks = 4 if "pass" in when else 100_000
    words = [*SMALL, "engines=[history,history]", f"measure.blocks={blocks}", f"measure.max_blocks={blocks}", "report=false"]
    command = [sys.executable, "-m", "experiments.compare", "--config-dir", "configs", *words]
    with interruptible():
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    assert any(when in line for line in process.stderr)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    (partial,) = (history / "runs").iterdir()
    assert process.returncode == 128 + how and errors.endswith(
        f"Interrupted. What was written so far is in runs/{partial.name}.\n"
    )
    rows = read_rows(partial)
    assert {tuple(pair) for pair in rows[["engine", "block"]].to_numpy()} >= set(product(("history", "history-2"), (0, 1)))
    assert (partial / "steps.jsonl").exists()
    result = json.loads((partial / "results.json").read_text())
    (comparison,) = result["comparisons"].values()
    assert comparison["blocks"] == len(result["order"]) >= 2 and result["unjustified_divergences"] is None
    assert (result["stopped"] == "it was interrupted") == ("block" in when)


def test_a_comparison_that_is_interrupted_has_a_report_of_its_whole_blocks(history: Path) -> None:
    words = [*SMALL, "engines=[history,history]", "measure.blocks=100000", "measure.max_blocks=100000"]
    command = [sys.executable, "-m", "experiments.compare", "--config-dir", "configs", *words]
    with interruptible():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    assert any("block 3" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGINT and printed == ""
    (partial,) = (history / "runs").iterdir()
    told = re.search(r"^Report of the (\d+) whole blocks: (.*)$", errors, re.MULTILINE)
    assert told and int(told[1]) >= 2 and Path(told[2]).resolve() == (partial / "report.html").resolve()
    said = (partial / "report.md").read_text()
    assert said.startswith(f"## Partial, of {told[1]} blocks: history against history-2\n")
    assert "It was interrupted" in said and "The run ended before the pass in float32 did" in said
    (partial / "report.md").unlink()
    write_report(partial)
    assert (partial / "report.md").read_text() == said


def test_of_a_run_that_is_cut_short_the_blocks_count_that_all_engines_ended() -> None:
    window = Window((), 1.0)
    outcome = Outcome({"a": [window], "b": []}, order=[["a", "b"]])
    assert outcome.cut_short(None) == 0  # nothing to conclude by
    assert (outcome.windows, outcome.order) == ({"a": [], "b": []}, [])


@pytest.mark.parametrize("moment", [(IsolatedEngine, "close"), (Outcome, "compared"), (records, "write_json")])
def test_an_end_behind_the_last_window_loses_none_of_their_rows(
    history: Path, monkeypatch: pytest.MonkeyPatch, moment: tuple[Any, str]
) -> None:
    """While the engines end, while they are compared, and before the rows are written after the figures."""
    where, name = moment
    original = getattr(where, name)
    came: list[str] = []

    def interrupted(*arguments: Any, **named: Any) -> Any:
        result = original(*arguments, **named)
        if not came and named.get("ended", True):
            came.append(name)
            raise Terminated
        return result

    monkeypatch.setattr(where, name, interrupted)
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, compare.main, *SMALL, "engines=[history,history]", "measure=quick", "correctness.num_requests=0")
    assert exit.value.code == TERMINATED and came
    (partial,) = (history / "runs").iterdir()
    assert partial.suffix == ".partial"
    assert len(read_rows(partial)) == 2 * 3 and len(read_steps(partial)) > 0


def test_the_float32_pass_can_be_left_out(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, compare.main, *SMALL, "engines=[history,history]", "measure=quick", "correctness.num_requests=0")
    result = last_line(capsys.readouterr().out)
    assert result["unjustified_divergences"] is None and result["tokens_equal"] is None


def test_an_engine_that_samples_wrongly_is_found_out(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second package answers with the oracle's tokens plus one: float64 knows that neither is near the model's choice."""
    package = history / "packages" / "liarinfer"
    package.mkdir()
    package.joinpath("__init__.py").write_text(
        "import historyinfer\n"
        "from dataclasses import replace\n"
        "class ModelRunner(historyinfer.ModelRunner):\n"
        "    def _run(self, batch):\n"
        "        result = super()._run(batch)\n"
        "        return replace(result, tokens=(result.tokens + 1) % 320)\n"
    )
    (history / "configs" / "engine" / "liar.yaml").write_text("defaults: [history, _self_]\nname: liar\n")
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, compare.main, *SMALL, "engines=[history,liar]", "measure=quick")
    out, err = capsys.readouterr()
    assert exit.value.code == 4 and "error: float32 pass: 3 divergences that rounding does not explain." in err
    result = last_line(out)
    assert result["unjustified_divergences"] == 3 and result["tokens_equal"] is False
    assert result["first_divergence"]["position"] == 0 and result["tokens_equal_share"] == 0.0


def test_an_error_of_log_probabilities_is_a_defect_where_every_token_agrees(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = history / "packages" / "offinfer"
    package.mkdir()
    package.joinpath("__init__.py").write_text(
        "import historyinfer\n"
        "class ModelRunner(historyinfer.ModelRunner):\n"
        "    def _logprobs(self, *arguments):\n"
        "        found = super()._logprobs(*arguments)\n"
        "        return found if found[0] is None else (*found[:-1], found[-1] - 0.029)\n"
    )
    (history / "configs" / "engine" / "off.yaml").write_text("defaults: [history, _self_]\nname: off\n")
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, compare.main, *SMALL, "engines=[history,off]", "measure=quick")
    out, err = capsys.readouterr()
    result = last_line(out)
    assert result["tokens_equal"] is True and result["unjustified_divergences"] == 0
    assert result["errors_above_tolerance"] == 15 == result["compared_tokens"]
    assert exit.value.code == 4 and "15 positions with an error of log-probabilities above" in err
    assert "defect: 15 positions" in " ".join(out.split()) and "every token is the same" not in out.partition("{")[0]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engines=[history,histroy]", "Did you mean 'history'?"),
        ("engines=[history,{name:history,compiel:true}]", "Did you mean 'compile'?"),
        ("engines=[history,{compile:true}]", "a mapping with a name"),
        ("engines=[history]", "two engines"),
        ("engines=[history,base]", "Unknown engine 'base'"),
        ("engines=[history,{name:history,kernels:native,compile:true}]", "leave a compiler nothing"),
        ("measure.precision=-1", "measure.precision"),
        ("measure.timeout_s=0", "measure.timeout_s"),
        ("measure.timeout_s=true", "measure.timeout_s"),
        ("measure.budget_s=.nan", "measure.budget_s"),
        ("measure.limits_s=true", "measure.limits_s"),
        ("measure.confidence=95", "measure.confidence"),
        ("measure.equivalence=0", "measure.equivalence"),
        ("measure.max_blocks=0", "measure.max_blocks"),
        ("measure.max_blocks=5", "measure.max_blocks=5 contradicts measure.blocks=6"),
        ('fail_if=["ratios.histroy < 1"]', "Engines: history, history-2"),
        ("engines=[]", "engines must be a list"),
        ("engines=history", "engines must be a list"),
        ("engine=history", "Did you mean 'engines'?"),
        ("engine.max_num_seqs=4", "has no option 'engine.max_num_seqs': each engine takes its own in braces"),
        ("max_num_seqs=4", "'engines=[{name:jax,max_num_seqs:4},{name:torch,max_num_seqs:4}]'"),
        ("--modle=tiny-llama", "There is no option '--modle=tiny-llama'. Did you mean 'model'?"),
        ("correctness.num_requests=-1", "correctness.num_requests"),
        ("correctness.tolerance=0", "correctness.tolerance"),
        ("correctness.tolerance=true", "correctness.tolerance"),
        ("correctness=null", "correctness.num_requests=0, got None"),
        ("report=no", "report must be true or false, got 'no'"),
        ("engines=[history,{name:history,num_blocks:2}]", "history-num_blocks=2 has pages for 16"),
        (
            "engines=[history,{name:history,max_num_seqs:4,max_num_batched_tokens:4,enable_chunked_prefill:false}]",
            "has a prompt of 128 tokens, and engine history-",
        ),
        ("engines=[history,{name:history,block_size:7}]", "block_size"),
        ("engines=[history,{name:history,dtype:bf16}]", "Did you mean 'bfloat16'?"),
    ],
)
def test_a_mistake_is_told_in_one_message_with_exit_code_2_and_no_run_directory(
    override: str, said: str, history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, compare.main, *SMALL, "engines=[history,history]", override)
    assert exit.value.code == 2
    err = capfd.readouterr().err
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and said in told[0] and "Traceback" not in err
    assert not (history / "runs").exists()


def test_both_backends_answer_as_transformers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole path with real arithmetic, on steps so small that few shapes are compiled; speed is not looked at."""
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    small = "max_num_seqs:4,max_num_batched_tokens:16,max_model_len:256"
    engines = f"engines=[hf,{{name:jax,{small}}},{{name:torch,{small}}}]"
    command(monkeypatch, compare.main, *SMALL, engines, "measure=quick", "workload.prompt_len=40")
    result = last_line(capsys.readouterr().out)
    assert result["unjustified_divergences"] == 0 and result["max_abs_logprob_diff"] < 1e-4
    for figures in result["engines"].values():
        assert (figures["completed"], figures["failed"], figures["compilations_in_window"]) == (3, 0, 0)
