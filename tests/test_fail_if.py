"""`fail_if`: conditions, the keys they may name, and the exit code of a whole run."""

from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from experiments import bench, compare
from experiments.runs.conditions import Condition, check_keys, expect_quotes, look_up, parse, parse_conditions, violations
from tests.history_backend import command, history, last_line

__all__ = ["history"]
RESULT: dict[str, Any] = {
    "ratios": {"torch": 0.874, "torch-kernels=framework": 0.5, "hf": None},
    "comparisons": {"torch": {"high": 0.93, "verdict": "slower", "block_ratios": [0.8, 0.9]}},
    "engines": {"v0.1": {"p99_itl_ms": 12.5}},
    "tokens_equal": False,
    "unjustified_divergences": 0,
}


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("ratios.torch < 0.9", Condition("ratios.torch", "<", 0.9)),
        ("  ratios.torch<0.9 ", Condition("ratios.torch", "<", 0.9)),
        ("unjustified_divergences>0", Condition("unjustified_divergences", ">", 0.0)),
        ("ratios.torch-kernels=framework <= 1e-1", Condition("ratios.torch-kernels=framework", "<=", 0.1)),
        ("comparisons.torch.verdict == slower", Condition("comparisons.torch.verdict", "==", "slower")),
        ("tokens_equal!=true", Condition("tokens_equal", "!=", "true")),
        ("ratios.torch-a=b==-3", Condition("ratios.torch-a=b", "==", -3.0)),
    ],
)
def test_a_condition_is_a_key_a_comparison_and_a_bound(text: str, condition: Condition) -> None:
    assert parse(text) == condition


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["fail_if=[ratios.torch<0.9]"], '["ratios.torch<0.9"]'),
        (["fail_if=ratios.torch < 0.9"], '["ratios.torch < 0.9"]'),
        (["fail_if=ratios.torch", "<", "0.9"], '["ratios.torch < 0.9"]'),
        (["fail_if=[ratios.torch", "<", "0.9]", "seed=1"], '["ratios.torch < 0.9"]'),
        (["fail_if=[ratios.torch<0.9, unjustified_divergences>0]"], '["ratios.torch<0.9", "unjustified_divergences>0"]'),
        (["fail_if=[tokens_equal==false]"], '["tokens_equal==false"]'),
        (["fail_if=['ratios.torch < 0.9]"], '["ratios.torch < 0.9"]'),
        (["fail_if=[ratios.torch"], '["ratios.torch < 0.9"]'),  # as a shell leaves it that redirects: an example
    ],
)
def test_conditions_without_quotes_are_refused_with_how_to_write_them(words: list[str], meant: str) -> None:
    with pytest.raises(ConfigError) as refused:
        expect_quotes(["engines=[jax,torch]", *words])
    assert str(refused.value) == f"Conditions are in quotes, and with them the word: 'fail_if={meant}'"
    expect_quotes([f"fail_if={meant}"])


def test_a_command_says_how_conditions_are_written(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("fail_if=[ratios.torch<0.9]", "fail_if=ratios.torch"):
        monkeypatch.setattr("sys.argv", ["compare", word])
        with pytest.raises(SystemExit) as end:
            compare.main()
        assert end.value.code == 2 and """'fail_if=["ratios.torch""" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (["ratios.torch"], "is no condition"),
        (["ratios.torch < "], "is no condition"),
        (["< 0.9"], "is no condition"),
        (["ratios.torch < 0.9 or true"], "is no condition"),
        (["__import__('os') > 0; x"], "is no condition"),
        (["ratios.torch => 0.9"], "unknown comparison '=>'"),
        (["ratios.torch < slow"], "needs a number"),
        (["ratios.torch < nan"], "must be finite"),
        ("ratios.torch < 0.9", "must be a list"),
        ([3], "must be a list"),
        ({"ratios.torch": 0.9}, "must be a list"),
    ],
)
def test_what_is_no_condition_is_refused(wanted: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_conditions(wanted)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ratois.torch < 1", "Did you mean 'ratios'"),
        ("ratios.trch < 1", "Did you mean 'torch'"),
        ("ratios < 1", "no engine"),
        ("ratios.torch-compil < 1", "Did you mean 'torch-compile'"),
        ("comparisons.jax.high < 1", "can never hold"),
        ("comparisons.torch.hihg < 1", "Did you mean 'high'"),
        ("comparisons.torch < 1", "has no ''"),
        ("engines.torch-compile.p99_itl_m > 1", "Did you mean 'p99_itl_ms'"),
        ("ratios.torch.high < 1", "is one figure and has no 'high'"),
    ],
)
def test_a_key_that_no_run_of_these_engines_has_is_refused_beforehand(text: str, said: str) -> None:
    fields = {"comparisons": ["low", "high"], "engines": ["p99_itl_ms"]}
    roots, labels = ["ratios", "comparisons", "engines", "tokens_equal"], ["jax", "torch", "torch-compile"]
    with pytest.raises(ConfigError, match=said):
        check_keys([parse(text)], roots, labels, fields)
    good = ("ratios.torch-compile < 1", "engines.jax.p99_itl_ms > 1", "tokens_equal == false", "comparisons.torch.low < 1")
    check_keys([parse(text) for text in good], roots, labels, fields)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ratios.torch", 0.874),
        ("ratios.torch-kernels=framework", 0.5),
        ("engines.v0.1.p99_itl_ms", 12.5),
        ("comparisons.torch.block_ratios.1", 0.9),
        ("comparisons.torch.block_ratios.2", None),
        ("ratios.hf", None),
        ("ratios.none", None),
        ("tokens_equal.deeper", None),
    ],
)
def test_a_dotted_key_is_looked_up_through_names_with_dots_and_lists(key: str, value: Any) -> None:
    assert look_up(RESULT, key) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ratios.torch < 0.9", "ratios.torch is 0.874."),
        ("ratios.torch < 0.8", None),
        ("comparisons.torch.verdict == slower", "is 'slower'"),
        ("comparisons.torch.verdict == faster", None),
        ("tokens_equal == false", "is False"),
        ("tokens_equal == true", None),
        ("unjustified_divergences > 0", None),
        ("unjustified_divergences >= 0", "is 0."),
        ("ratios.hf < 0.9", "was not measured"),
        ("comparisons.torch.verdict == 3", "is no number but 'slower'"),
    ],
)
def test_a_condition_that_holds_is_told_with_its_value(text: str, said: str | None) -> None:
    told = violations([parse(text)], RESULT)
    assert len(told) == (said is not None) and (said is None or (said in told[0] and text in told[0]))


def test_what_is_no_number_does_not_pass() -> None:
    (told,) = violations([parse("max_abs_logprob_diff > 0.1")], {"max_abs_logprob_diff": float("nan")})
    assert "was not measured" in told


SMALL = ("model=tiny-llama", "workload=fixed", "workload.num_requests=2", "workload.output_len=4", "measure.limits_s=0")


def test_a_gate_that_holds_ends_a_comparison_with_3_after_it_is_written_and_printed(
    history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    gates = (
        'fail_if=["ratios.history-block_size=8 > 0", "engines.history.output_throughput < 0", "tokens_equal != false", '
        '"agreement.history-block_size=8.by_position.0.same_share < 0"]'
    )
    engines = "engines=[history,{name:history,block_size:8}]"
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, compare.main, *SMALL, engines, "measure=quick", "correctness.output_len=2", gates)
    assert exit.value.code == 3
    out, err = capfd.readouterr()
    result = last_line(out)
    assert (Path(result["run"]) / "results.json").exists()
    assert f"ratios.history-block_size=8 is {result['ratios']['history-block_size=8']:.6g}." in err and "> 0" in err
    assert "tokens_equal is True" in err and "output_throughput" not in err


def test_a_gate_on_one_engine(history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    run = (*SMALL, "engine=history", "measure=quick")
    command(monkeypatch, bench.main, *run, 'fail_if=["output_throughput < 0", "failed > 0"]')
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, bench.main, *run, 'fail_if=["completed == 2"]')
    assert exit.value.code == 3 and "completed is 2" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ("comparisons.histroy.low < 1", "Engines: history, history-2"),
        ("engines.history.p99_itl_m > 1", "Did you mean 'p99_itl_ms'"),
        ("comparisons.history-2.hihg < 1", "Did you mean 'high'"),
        ("agreement.history-2.mean_kdl > 0.1", "Did you mean 'mean_kld'"),
        ("agreement.history-2 > 0.1", "has no ''"),
        ("tokens_equl == false", "Did you mean 'tokens_equal'"),
    ],
)
def test_a_gate_that_could_never_hold_is_refused_before_anything_runs(
    gate: str, said: str, history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, compare.main, *SMALL, "engines=[history,history]", f'fail_if=["{gate}"]')
    assert exit.value.code == 2 and said in capfd.readouterr().err
    assert not (history / "runs").exists()


def test_a_gate_on_a_bench_names_its_own_figures(
    history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, bench.main, *SMALL, "engine=history", 'fail_if=["output_througput < 1"]')
    assert exit.value.code == 2 and "Did you mean 'output_throughput'" in capfd.readouterr().err
