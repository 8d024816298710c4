"""`experiments.compare`: order of blocks, ratios, agreement, labels and messages, and a whole run in real processes."""

import json
from pathlib import Path

import pytest

from experiments import compare
from experiments.agreement import tokens_equal_share, verdict
from experiments.compare import ratios
from experiments.config import MeasureConfig
from experiments.correctness import Agreement, Divergence
from experiments.drive import Row, Window
from experiments.measure import blocks
from tests.history_backend import ROOT, command, history, last_line

__all__ = ["history"]
SMALL = (
    "model=tiny-llama",
    "workload=fixed",
    "workload.num_requests=3",
    "workload.output_len=5",
    "correctness.output_len=4",
    "measure.limits_s=0",
)


def order(count: int, budget_s: float = 60.0, cost_s: float = 0.0) -> str:
    """Which engine runs when, on a clock that a round advances by `cost_s`."""
    config = MeasureConfig(blocks=count, budget_s=budget_s, warmup_requests=0, warmup_output_len=1, limits_s=0.0)
    run: list[str] = []
    for _, engines in blocks(["A", "B"], config, lambda: len(run) / 2 * cost_s):
        run.extend(engines)
    return "".join(run)


def test_blocks_alternate_so_that_drift_wrongs_neither() -> None:
    assert order(1) == "AB"
    assert order(2) == "ABBA"
    assert order(5) == "ABBAABBAAB"


def test_no_round_starts_that_would_end_after_the_budget_and_the_first_always_runs() -> None:
    assert order(9, budget_s=35.0, cost_s=10.0) == "ABBAAB"
    assert order(9, budget_s=0.0, cost_s=10.0) == "AB"


def test_ratios_are_over_the_first_named() -> None:
    assert ratios({"jax": {"output_throughput": 50.0}, "hf": {"output_throughput": 10.0}}) == {"jax": 1.0, "hf": 0.2}
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
    return Agreement(num_tokens=8, num_equal=equal, max_abs_logprob_diff=diff, divergence=divergence)


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


def test_a_verdict_without_a_pass_claims_nothing() -> None:
    assert set(verdict({}).values()) == {None}


def test_compare_runs_both_engines_and_finds_them_equal(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, compare.main, *SMALL, "engines=[history,{name:history,block_size:8}]", "measure.blocks=2")
    result = last_line(capsys.readouterr().out)
    assert set(result["engines"]) == set(result["ratios"]) == {"history", "history-2"}
    assert result["ratios"]["history"] == 1.0
    for figures in result["engines"].values():
        assert figures["completed"] == 6 and len(figures["block_output_throughput"]) == 2 and figures["contaminated"] == []
    throughputs = [figures["output_throughput"] for figures in result["engines"].values()]
    assert result["ratios"]["history-2"] == pytest.approx(throughputs[1] / throughputs[0])
    assert (result["tokens_equal"], result["unjustified_divergences"], result["tokens_equal_share"]) == (True, 0, 1.0)
    assert result["compared_tokens"] == 3 * 4
    directory = Path(result["run"])
    assert json.loads((directory / "results.json").read_text()) == result
    assert len((directory / "requests.jsonl").read_text().splitlines()) == 2 * 2 * 3


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
        ("engines=[]", "engines must be a list"),
        ("engines=history", "engines must be a list"),
        ("engine=history", "Did you mean 'engines'?"),
        ("correctness.num_requests=-1", "correctness.num_requests"),
        ("correctness.tolerance=0", "correctness.tolerance"),
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
