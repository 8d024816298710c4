"""`experiments.compare`: order of blocks, ratios, agreement, labels and messages, and a whole run in real processes."""

import json
import math
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module

from common.exits import TERMINATED, Terminated
from experiments import compare, records
from experiments.agreement import tokens_equal_share, verdict
from experiments.blocks import block_order, level, reason_to_stop, time_left
from experiments.compare import ratios
from experiments.config import MeasureConfig
from experiments.correctness import Agreement, Divergence
from experiments.drive import Row, Window
from experiments.isolate import IsolatedEngine
from experiments.measure import Outcome, measure_config
from experiments.records import read_rows, read_steps
from experiments.statistics import fewest_blocks
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


def config(blocks: int, **more: float) -> MeasureConfig:
    fixed = {"budget_s": 100.0, "warmup_requests": 0, "warmup_output_len": 1, "limits_s": 0.0}
    return MeasureConfig(**{"blocks": blocks} | fixed | more)  # type: ignore[arg-type]


def count(config: MeasureConfig, block_s: float = 1.0, settled: bool = False, comparisons: int = 1) -> tuple[int, str]:
    """How many blocks of `block_s` seconds run, and why no more, where every comparison is `settled` or stays open."""
    done = 0
    while (
        reason := reason_to_stop(config, done, done * block_s, block_s if done else 0.0, comparisons, lambda: settled)
    ) is None:
        done += 1
    return done, reason.said


def option(config: MeasureConfig, *arguments: Any) -> str:
    """What ended it."""
    stop = reason_to_stop(config, *arguments, lambda: True)
    assert stop
    return stop.option


def test_each_block_runs_every_engine_once_and_every_other_mirrors_the_one_before() -> None:
    labels = ["a", "b", "c"]
    orders = [block_order(labels, number, seed=4) for number in range(40)]
    assert all(sorted(order) == labels for order in orders)
    assert all(orders[i + 1] == orders[i][::-1] for i in range(0, 40, 2))
    assert len({tuple(order) for order in orders}) == 6  # every order comes up
    assert orders == [block_order(labels, number, seed=4) for number in range(40)]
    assert orders != [block_order(labels, number, seed=5) for number in range(40)]


def test_two_engines_lead_about_equally_often_over_the_seeds() -> None:
    first = [block_order(["a", "b"], 0, seed)[0] for seed in range(200)]
    assert 70 <= first.count("a") <= 130


def test_blocks_go_on_by_pairs_until_the_interval_is_narrow_or_there_are_enough() -> None:
    assert count(config(6), settled=True) == (6, "after 6 blocks every interval of a ratio was narrower than 0.04")
    assert count(config(7), settled=True)[0] == 8
    assert count(config(6, max_blocks=12)) == (12, "all 12 blocks were run")
    assert count(config(6, max_blocks=9))[0] == 9
    assert count(config(30, max_blocks=30))[0] == 30


def test_without_anything_to_compare_or_with_too_few_blocks_for_it_they_are_as_many_as_asked_for() -> None:
    assert count(config(6), comparisons=0) == (6, "all 6 blocks were run")
    assert count(config(7), comparisons=0)[0] == 7
    assert count(config(1))[0] == 1 and count(config(5))[0] == 5


def test_blocks_go_on_where_fewer_could_not_tell_one_difference_among_so_many() -> None:
    assert [count(config(6), settled=True, comparisons=several)[0] for several in (1, 2, 3, 4)] == [6, 8, 8, 8]
    assert count(config(6, confidence=0.99), settled=True)[0] == 8


def test_looks_on_the_way_leave_less_to_tell_a_difference_by_at_the_end() -> None:
    assert level(config(6), 1, ended=False) == 0  # until then all blocks must agree
    assert level(config(6), 1, ended=True) == pytest.approx(0.05 - 2 / 64)
    assert level(config(6), 2, ended=True) == pytest.approx(0.05 - 2 * 2 / 256)  # two need eight blocks for a first look
    for once in (config(6, max_blocks=6), config(5), config(12, max_blocks=12)):
        assert level(once, 1, ended=True) == pytest.approx(0.05)


def test_the_option_that_ended_a_run_is_told() -> None:
    assert option(config(6), 40, 0.0, 0.0, 1) == "measure.max_blocks"
    assert option(config(6), 6, 0.0, 0.0, 0) == option(config(5), 5, 0.0, 0.0, 1) == "measure.blocks"
    assert option(config(6), 3, 99.0, 2.0, 1) == option(config(6), 8, 99.0, 2.0, 1) == "measure.budget_s"
    assert option(config(6), 8, 0.0, 0.0, 1) == "measure.precision"


def test_the_interval_is_asked_for_only_where_it_decides() -> None:
    asked = []

    def settled(at: int) -> bool:
        asked.append(at)
        return False

    for done in range(13):
        reason_to_stop(config(7, max_blocks=12), done, 0.0, 0.0, 1, lambda: settled(done))  # noqa: B023 - called at once
    assert asked == [8, 10]


def test_no_block_starts_that_would_end_after_the_budget_and_the_first_two_always_run() -> None:
    said = "the budget of 35 s (measure.budget_s) was used up after 3 blocks"
    assert count(config(6, budget_s=35.0), block_s=10.0) == (3, said)
    assert count(config(6, budget_s=75.0), block_s=10.0)[0] == 6  # a pair more would have ended at 80
    assert count(config(6, budget_s=85.0), block_s=10.0)[0] == 8
    assert count(config(6, budget_s=0.0), block_s=10.0)[0] == 2
    assert count(config(1, budget_s=0.0), block_s=10.0)[0] == 1


def test_by_default_the_fewest_blocks_that_tell_a_difference_fit_the_budget_of_a_slow_machine() -> None:
    with initialize_config_module("configs", version_base="1.3"):
        shipped = measure_config(compose("compare"))
    assert count(shipped, block_s=60.0)[0] >= shipped.blocks == fewest_blocks(1, shipped.confidence)


def test_the_time_left_is_never_more_than_the_budget_has_but_for_the_blocks_that_always_run() -> None:
    six = config(6, budget_s=35.0)
    assert time_left(six, 0, 0.0, 0.0) <= 0  # not known before a block has run
    assert time_left(six, 1, 4.0, 4.0) == 20 and time_left(six, 5, 20.0, 4.0) == 4
    assert time_left(six, 1, 10.0, 10.0) == 25 and time_left(six, 2, 20.0, 10.0) == 15
    assert time_left(six, 1, 40.0, 40.0) == time_left(config(6, budget_s=0.0), 1, 40.0, 40.0) == 40
    assert time_left(config(6, budget_s=math.inf), 1, 10.0, 10.0) == 50
    assert time_left(six, 6, 24.0, 4.0) <= 0  # nobody knows how many more there will be


def test_ratios_are_over_the_first_named() -> None:
    assert ratios({"jax": {"output_throughput": 50.0}, "hf": {"output_throughput": 10.0}}) == {"jax": 1.0, "hf": 0.2}
    assert ratios({}) == {}
    assert ratios({"jax": {"output_throughput": None}, "hf": {"output_throughput": 10.0}}) == {"jax": None, "hf": None}


def window(*outputs: tuple[int, ...]) -> Window:
    rows = [Row(request_id="0", prompt_len=1, output_len=len(t), scheduled=0, sent=0, tokens=t) for t in outputs]
    return Window(tuple(rows), 1.0)


def test_tokens_count_as_equal_until_their_requests_first_difference() -> None:
    first = window((1, 2, 3, 4), (5, 6, 7, 8))
    assert tokens_equal_share({"a": first, "b": first}) == 1.0
    assert tokens_equal_share({"a": first, "b": window((1, 2, 9, 4), (5, 6, 7, 8))}) == 6 / 8
    assert tokens_equal_share({"a": first, "b": first, "c": window((9, 2, 3, 4), (5, 6, 7, 8))}) == 4 / 8


def agreement(position: int | None = None, justified: bool = True, diff: float = 1e-6) -> Agreement:
    divergence = None
    if position is not None:
        divergence = Divergence(position=position, tokens=(1, 2), margin=1e-5, error=1e-5, justified=justified)
    equal = 8 if position is None else position
    return Agreement(num_equal=equal, max_abs_logprob_diff=diff, divergence=divergence)


def test_the_verdict_counts_what_rounding_does_not_explain_and_shows_it_first() -> None:
    good = verdict({"torch": [agreement(), agreement(diff=3e-6)]})
    assert (good["unjustified_divergences"], good["tokens_equal"], good["first_divergence"]) == (0, True, None)
    assert (good["max_abs_logprob_diff"], good["compared_tokens"]) == (3e-6, 16)

    tie = verdict({"torch": [agreement(5), agreement()]})
    assert (tie["unjustified_divergences"], tie["tokens_equal"]) == (0, False)
    assert tie["first_divergence"]["position"] == 5

    bad = verdict({"torch": [agreement(5), agreement(7, justified=False)], "hf": [agreement(), agreement(2, justified=False)]})
    assert bad["unjustified_divergences"] == 2
    first = bad["first_divergence"]
    assert (first["engine"], first["request"], first["position"]) == ("hf", 1, 2)


@pytest.mark.parametrize("diffs", [(0.1, math.nan), (math.nan, 0.1)])
def test_a_difference_that_is_not_finite_is_no_figure_and_no_other_stands_for_it(diffs: tuple[float, float]) -> None:
    assert verdict({"torch": [agreement(diff=diff) for diff in diffs]})["max_abs_logprob_diff"] is None


def test_a_verdict_without_a_pass_claims_nothing() -> None:
    assert set(verdict({}).values()) == {None}


def test_compare_runs_both_engines_and_finds_them_equal(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, compare.main, *SMALL, "engines=[history,{name:history,block_size:8}]", "measure.blocks=4")
    out = capsys.readouterr().out
    result = last_line(out)
    one, other = "history", "history-block_size=8"
    assert set(result["engines"]) == set(result["ratios"]) == {one, other} and result["failures"] == {}
    assert result["ratios"][one] == 1.0
    for figures in result["engines"].values():
        assert figures["completed"] == 12 and len(figures["block_output_throughput"]) == 4 and figures["contaminated"] == []
    throughputs = [figures["output_throughput"] for figures in result["engines"].values()]
    assert result["ratios"][other] == pytest.approx(throughputs[1] / throughputs[0])
    assert (result["tokens_equal"], result["unjustified_divergences"], result["tokens_equal_share"]) == (True, 0, 1.0)
    assert result["compared_tokens"] == 3 * 4
    assert [sorted(order) for order in result["order"]] == [[one, other]] * 4 and result["order"][1] == result["order"][0][::-1]
    assert (result["stopped"], result["stopped_by"]) == ("all 4 blocks were run", "measure.blocks")

    (comparison,) = result["comparisons"].values()
    blocks = [figures["block_output_throughput"] for figures in result["engines"].values()]
    assert comparison["block_ratios"] == pytest.approx([b / a for a, b in zip(*blocks, strict=True)])
    assert comparison["low"] < comparison["ratio"] < comparison["high"] and comparison["interval"] == "t"
    assert " ".join(out.split()).startswith(comparison["said"]) and comparison["against"] == one
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
    assert (partial / "steps.jsonl").exists() and not (partial / "results.json").exists()


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
    command(monkeypatch, compare.main, *SMALL, "engines=[history,liar]", "measure=quick")
    result = last_line(capsys.readouterr().out)
    assert result["unjustified_divergences"] == 3 and result["tokens_equal"] is False
    assert result["first_divergence"]["position"] == 0 and result["tokens_equal_share"] == 0.0


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
