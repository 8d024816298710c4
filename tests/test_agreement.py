"""The third rung of the ladder: how far apart at each position, from whole rows of logits or from what is reported."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.config import EngineConfig
from common.errors import BackendError
from common.request import Logprobs
from common.weights import zoo
from common.weights.checkpoint import open_checkpoint
from experiments import compare
from experiments.correctness.agreement import (
    Base,
    Passed,
    Position,
    alike,
    at_positions,
    coarse_kld,
    pass_through,
    reported,
    small,
    summarise,
    tokens_equal_share,
    verdict,
)
from experiments.correctness.agreement import compare as compare_all
from experiments.correctness.config import CorrectnessConfig
from experiments.correctness.coverage import Part
from experiments.correctness.judge import Agreement, Divergence
from experiments.correctness.observe import Compared
from experiments.correctness.perplexity import TEXT, tokenize
from experiments.display.progress import ProgressReporter
from experiments.engines.spec import EngineSpec
from experiments.load.driver import Row, Window
from experiments.load.workload import Item, Workload
from tests.history_backend import command, history, last_line
from tests.planted import make_local

__all__ = ["history"]
SMALL = ("model=tiny-llama", "workload=fixed", "workload.num_requests=3", "workload.output_len=5", "measure.limits_s=0")


def position(number: int, kld: float, diff: float = 0.0, same: bool = True) -> Position:
    return Position(position=number, kld=kld, logprob_diff=diff, same=same)


def test_positions_are_summed_up_as_a_perplexity_tool_does() -> None:
    klds = [0.001 * i for i in range(100)]
    found = summarise([position(i % 2, kld, diff=2 * kld, same=i != 99) for i, kld in enumerate(klds)])
    assert (found["num_positions"], found["num_nonfinite"], found["top1_agreement"]) == (100, 0, 0.99)
    assert found["mean_kld"] == pytest.approx(np.mean(klds)) and found["max_kld"] == pytest.approx(0.099)
    assert found["p99_kld"] == pytest.approx(np.percentile(klds, 99))
    assert found["mean_abs_logprob_diff"] == pytest.approx(2 * np.mean(klds))
    assert found["max_abs_logprob_diff"] == pytest.approx(0.198)
    even, odd = found["by_position"]
    assert (even["position"], even["same_share"], odd["same_share"]) == (0, 1.0, 0.98)
    assert even["kld"] == pytest.approx(np.mean(klds[::2])) and odd["kld"] == pytest.approx(np.mean(klds[1::2]))


def test_a_position_that_is_not_finite_never_agrees_and_hides_in_no_mean() -> None:
    found = summarise([position(0, 0.5), position(1, math.inf, math.nan, same=False)])
    assert (found["num_nonfinite"], found["top1_agreement"], found["mean_kld"]) == (1, 0.5, 0.5)
    assert found["by_position"][1] == {"position": 1, "mean_abs_logprob_diff": None, "kld": None, "same_share": 0.0}
    every = summarise([position(0, math.inf, math.nan, same=False)])
    assert (every["mean_kld"], every["max_kld"], every["top1_agreement"]) == (None, None, 0.0)
    assert summarise([])["top1_agreement"] is None


def compared(step: int, seq: int, at: int, tokens: tuple[int, int], kld: float = 0.0) -> Compared:
    logprobs = ((-1.0, -2.0), (-1.5, -1.2))
    return Compared(step=step, seq=seq, position=at, tokens=tokens, logprobs=logprobs, error=0.0, kld=kld)


def test_rows_of_steps_become_output_positions_of_requests() -> None:
    share = Workload("w", (Item(0.0, (1, 2, 3), 4), Item(0.0, (1,), 4)))
    rows = [compared(0, 0, 3, (5, 5)), compared(1, 1, 4, (5, 6)), compared(1, 0, 1, (7, 7), math.inf)]
    found = at_positions(rows, [[0], [1, 0]], share)
    assert [p.position for p in found] == [0, 1, 0]
    assert [p.same for p in found] == [True, False, False]
    assert found[0].logprob_diff == pytest.approx(0.5)


def test_reported_tokens_bound_the_divergence_from_below() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        logits = rng.standard_normal((2, 50)) * [[2.0], [1.8]] + rng.standard_normal(50)
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        whole = float((np.exp(logp[0]) * (logp[0] - logp[1])).sum())
        tops = [{int(i): float(row[i]) for i in np.argsort(-row)[:5]} for row in logp]
        assert 0 <= coarse_kld(*tops) <= whole + 1e-12
    assert coarse_kld({1: -1.0}, {1: -1.0}) == 0.0
    assert coarse_kld({1: -0.1}, {1: -2.0}) > 0.5
    assert coarse_kld({1: -1.0}, {2: -1.0}) == 0.0  # nothing known of the same token: nothing claimed
    assert coarse_kld({1: math.nan}, {1: -1.0}) == math.inf


def output(*tops: dict[int, float]) -> Row:
    logprobs = tuple(Logprobs(next(iter(top.values())), 1, list(top), list(top.values())) for top in tops)
    tokens = tuple(next(iter(top)) for top in tops)
    return Row(request_id="0", prompt_len=1, output_len=len(tops), scheduled=0, sent=0, tokens=tokens, logprobs=logprobs)


def test_reported_positions_end_at_the_first_divergence() -> None:
    a = output({1: -0.5, 2: -1.0}, {3: -0.5, 4: -1.0}, {5: -0.5, 6: -1.0})
    b = output({1: -0.6, 2: -1.0}, {4: -0.5, 3: -0.7}, {5: -0.5, 6: -1.0})
    found = reported(a, b)
    assert [(p.position, p.same) for p in found] == [(0, True), (1, False)]
    assert [p.logprob_diff for p in found] == pytest.approx([0.1, 0.2])


def spec(**options: int) -> EngineSpec:
    return EngineSpec(label="x", name="x", config=EngineConfig(**options))


def test_only_engines_of_one_shape_repeat_each_others_steps() -> None:
    assert alike(spec(), spec(threads=1))
    assert not alike(spec(), spec(block_size=32)) and not alike(spec(), spec(num_blocks=99))
    assert alike(small(spec(), 4, "float32"), small(spec(max_num_seqs=32), 4, "float32"))


SHARE = Workload("w", tuple(Item(0.0, tuple(np.random.default_rng(n).integers(0, 250, n).tolist()), 5) for n in (9, 20, 33)))


def test_engines_pass_one_after_the_other_and_the_first_that_comes_through_leaves_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.resolve("tiny-llama")
    text, share = tokenize(open_checkpoint(model), TEXT)[:150], SHARE

    def passed(engine: Any, observes: bool, base: Base | None) -> tuple[Passed, Base]:
        with ProgressReporter() as narrator:
            return pass_through(engine, {"observes": observes}, share, share, text, base, tmp_path, narrator)

    broken = make_local("broken", "torch", "native", model)
    observe = broken.observe

    def refused(what: str, *more: Any, **arguments: Any) -> Any:
        if what == "perplexity":  # when it has recorded its steps and kept their logits
            raise BackendError("no more")
        return observe(what, *more, **arguments)

    monkeypatch.setattr(broken, "observe", refused)
    with pytest.raises(BackendError, match="no more"):
        passed(broken, True, None)
    first, base = passed(make_local("native", "torch", "native", model), True, None)
    second, _ = passed(make_local("framework", "torch", "framework", model), True, base)
    blind, silent = passed(make_local("blind", "torch", "native", model), False, base)
    unseen, _ = passed(make_local("unseen", "torch", "native", model), True, silent)
    assert first.positions is None and second.positions is not None and unseen.positions is None
    found = summarise(second.positions)
    assert (found["num_positions"], found["num_nonfinite"], found["top1_agreement"]) == (15, 0, 1.0)
    assert 0 <= found["mean_kld"] <= found["max_kld"] < 1e-9 and 0 < found["max_abs_logprob_diff"] < 1e-4
    assert [entry["position"] for entry in found["by_position"]] == [0, 1, 2, 3, 4]
    assert first.perplexity == pytest.approx(second.perplexity, rel=1e-5)
    assert blind.positions is None and blind.perplexity is None
    plan: Any = SimpleNamespace(checkpoint=open_checkpoint(model), workload=share)
    config = CorrectnessConfig(num_requests=3, output_len=5, tolerance=1e-3)
    part = Part(share, (0, 1, 2))
    result = compare_all({"a": first, "b": second, "c": blind}, part, plan, config)
    assert result["unjustified_divergences"] == 0 and set(result["perplexity"]) == {"a", "b"}
    assert {label: found["kld_from"] for label, found in result["agreement"].items()} == {
        "b": "logits",
        "c": "top 5 and rest",
    }
    assert compare_all({"b": second}, part, plan, config)["tokens_equal"] is None  # all others failed: nothing is claimed


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


@pytest.mark.parametrize(
    ("ends", "kind", "said"),
    [("os._exit(3)", "died", "exit code 3"), ("raise BackendError('pages of float32 do not fit')", "error", "do not fit")],
)
def test_an_engine_that_fails_in_the_float32_pass_fails_alone(
    ends: str, kind: str, said: str, history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = history / "packages" / "frailinfer"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import os, historyinfer\n"
        "from common.errors import BackendError\n"
        "class ModelRunner(historyinfer.ModelRunner):\n"
        "    def __init__(self, config):\n"
        f"        if config.dtype == 'float32': {ends}\n"
        "        super().__init__(config)\n"
    )
    (history / "configs" / "engine" / "frail.yaml").write_text("defaults: [history, _self_]\nname: frail\n")
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, compare.main, *SMALL, "engines=[history,frail,history]", "measure=quick")
    assert exit.value.code == 1
    result = last_line(capsys.readouterr().out)
    failure = result["failures"]["frail"]
    assert failure["kind"] == kind and said in failure["message"]
    assert set(result["agreement"]) == {"history-2"} and result["tokens_equal"] is True
    assert result["agreement"]["history-2"]["kld_from"] == "top 5 and rest"
    assert result["engines"]["frail"]["completed"] == 3
