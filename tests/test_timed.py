"""Every timed block is compared, and a wrong token in a late one is a defect."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.config import Dtype, EngineConfig
from common.weights import zoo
from common.weights.checkpoint import open_checkpoint
from experiments import compare, diverge
from experiments.correctness.agreement import LEFT_OUT
from experiments.correctness.config import CorrectnessConfig
from experiments.correctness.judge import float64_reference
from experiments.correctness.reference import NumpyModel
from experiments.correctness.timed import HALF_BEHIND, compare_timed, differences, judge_timed, reporting, spread
from experiments.engines.spec import EngineSpec
from experiments.load.driver import Row, Window
from experiments.load.workload import Item, Workload
from experiments.report.console import print_verdict
from experiments.report.findings import correctness
from experiments.report.verdict import headline
from experiments.runs.results import RunFiles
from tests.history_backend import command, history, last_line

__all__ = ["history"]


def window(*outputs: tuple[int, ...], error: str | None = None) -> Window:
    rows = [
        Row(
            request_id=f"{i}",
            prompt_len=2,
            output_len=4,
            scheduled=0.0,
            sent=0.0,
            times=(1.0,) * len(out),
            tokens=out,
            error=error,
        )
        for i, out in enumerate(outputs)
    ]
    return Window(tuple(rows), 1.0)


SOUND = window((1, 2, 3, 4), (5, 6, 7, 8))


def test_differences_name_engine_block_request_and_position() -> None:
    late = {"a": [SOUND] * 3, "b": [SOUND, SOUND, window((1, 2, 3, 4), (5, 6, 9, 8))]}
    (found,) = differences(late)
    assert (found.engine, found.block, found.request, found.position, found.tokens) == ("b", 2, 1, 2, (7, 9))
    (short,) = differences({"a": [SOUND], "b": [window((1, 2, 3), (5, 6, 7, 8))]})
    assert (short.position, short.tokens) == (3, (4, None))
    assert differences({"a": [SOUND], "b": [SOUND]}) == []
    assert differences({"a": [SOUND], "b": [window((), (), error="refused")]}) == []


@pytest.mark.parametrize(
    ("behind", "wrong"),
    [((0.0, 0.001), (False, False)), ((0.0, 0.1), (False, True)), ((0.1, 0.0), (True, False)), ((0.0, np.nan), (False, True))],
)
def test_float64_decides_which_engine_is_wrong(behind: tuple[float, float], wrong: tuple[bool, bool]) -> None:
    windows = {"a": [SOUND, SOUND], "b": [SOUND, window((1, 2, 9, 4), (5, 6, 7, 8))]}
    items = (Item(0.0, (3, 4), 4), Item(0.0, (4, 5), 4))
    workload = Workload("mine", items)
    histories = []

    def reference(history: list[int]) -> np.ndarray:
        histories.append(list(history))
        exact = np.full(16, -9.0)
        exact[0] = -1.0
        exact[[3, 9]] = -1.0 - np.array(behind)
        return exact

    if np.isnan(behind).any():
        reference_of = lambda history: np.full(16, np.nan)  # noqa: E731
        wrong = (True, True)
    else:
        reference_of = reference
    (judged,) = judge_timed(differences(windows), windows, workload, 0, reference_of, 0.002)
    assert judged.wrong == wrong and judged.justified == (not any(wrong))
    if histories:
        assert histories == [[*workload.fresh(1, 0).items[0].prompt, 1, 2]]  # the prompt of that block, not of the first


@pytest.mark.parametrize("token", [-1, 99])
def test_a_number_that_is_no_token_is_unjustified_and_does_not_end_the_comparison(token: int) -> None:
    windows = {"a": [SOUND], "b": [window((1, token, 3, 4), (5, 6, 7, 8))]}
    (found,) = differences(windows)
    workload = Workload("w", (Item(0.0, (1, 2), 4),) * 2)
    (judged,) = judge_timed([found], windows, workload, 0, lambda history: np.zeros(9), HALF_BEHIND)
    assert found.tokens == (2, token) and judged.behind == (0.0, float("inf")) and not judged.justified


@pytest.mark.parametrize("token", [-1, 999])
def test_an_engine_that_reports_no_tokens_at_all_is_a_defect(token: int) -> None:
    """Also where both engines do so. `tokens_equal_share` counts such tokens as different."""
    plan, config = plan_of("bfloat16"), CorrectnessConfig(num_requests=1, output_len=1, tolerance=0.001)
    none = [window((token,) * 4, (token,) * 4)] * 2
    for windows, wrong in (
        ({"a": [SOUND] * 2, "b": none}, ["b"]),
        ({"a": none, "b": [SOUND] * 2}, ["a"]),
        ({"a": none, "b": none}, ["a", "b"]),
    ):
        found = compare_timed(plan, config, windows)
        assert found["timed_differences"] == 4 and found["timed_unjustified"] == 2
        assert set(found["first_timed_difference"]["wrong"]) >= set(wrong)
        assert headline({"unjustified_divergences": 0, "tokens_equal": True} | found).tone == "bad"
        assert set(reporting(windows, plan.engines)) == {"a", "b"}


def test_a_server_that_names_no_tokens_is_not_judged_and_the_verdict_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    plan, config = plan_of("bfloat16"), CorrectnessConfig(num_requests=1, output_len=1, tolerance=0.001)
    served = replace(plan.engines[1], options={"base_url": "http://127.0.0.1:1"})
    plan.engines = (plan.engines[0], served)
    found = compare_timed(plan, config, {"a": [SOUND], "b": [window((-1,) * 4, (-1,) * 4)]})
    said = "timed outputs of b not judged: the server reports no token ids"
    result = {**LEFT_OUT, **found, "dtype": "bfloat16", "engines": {"a": {}, "b": {}}, "tokens_equal_share": None}
    assert headline({**result, "unjustified_divergences": 0, "tokens_equal": True}) == (
        "warn",
        f"every token is the same; {said}",
    )
    print_verdict(result)
    assert said in capsys.readouterr().out
    (first, *_) = correctness(RunFiles(Path("run"), {}, {}, result))
    assert first.tone == "warn" and said in first.said[0].lower() + first.said[1:]
    one = compare_timed(plan, config, {"a": [SOUND], "b": [window((-1, 2, 3, 4), (5, 6, 7, 8))]})
    assert one["timed_unjustified"] == 1 and one["timed_not_compared"] == {}


def test_an_output_that_ends_early_is_unjustified_without_float64() -> None:
    windows = {"a": [SOUND], "b": [window((1, 2, 3), (5, 6, 7, 8))]}
    workload = Workload("mine", (Item(0.0, (3, 4), 4),) * 2)
    (judged,) = judge_timed(differences(windows), windows, workload, 0, lambda history: np.zeros(16), 0.001)
    assert judged.wrong == (False, True)


def plan_of(dtype: Dtype) -> Any:
    """A plan of two engines with native kernels, `a` and `b`, over a seeded model."""
    specs = tuple(EngineSpec(label=label, name=label, config=EngineConfig(dtype=dtype, threads=1)) for label in "ab")
    items = (Item(0.0, (3, 4), 4), Item(0.0, (4, 5), 4))
    checkpoint = open_checkpoint(zoo.resolve("tiny-llama"))
    return SimpleNamespace(checkpoint=checkpoint, engines=specs, workload=Workload("mine", items), seed=0)


@pytest.mark.parametrize(("arithmetic", "suspicious"), [("AVX-512", 1), ("AMX", 0)])
@pytest.mark.parametrize("rank", [1, -1])
def test_bfloat16_blocks_are_judged_by_float64_and_by_bits(rank: int, arithmetic: str, suspicious: int) -> None:
    """The first engine chooses the likeliest token, the other one the second at a near-tie, or the least likely."""
    plan, config = plan_of("bfloat16"), CorrectnessConfig(num_requests=1, output_len=1, tolerance=0.001)
    reference = float64_reference(NumpyModel(plan.checkpoint))
    for token in range(5, 320):
        plan.workload = Workload("mine", (Item(0.0, (3, 4), 4), Item(0.0, (4, token), 4)))
        exact = reference(plan.workload.fresh(1, 0).items[1].prompt)
        ranked = np.argsort(-exact).tolist()
        if exact[ranked[0]] - exact[ranked[1]] < 0.01:
            break
    windows = {
        "a": [SOUND, window((1, 2, 3, 4), (ranked[0], 6, 7, 8))],
        "b": [SOUND, window((1, 2, 3, 4), (ranked[rank], 6, 7, 8))],
    }
    figures = {
        label: {"kernels_used": "native", "kernel_arithmetic": each} for label, each in (("a", "AVX-512"), ("b", arithmetic))
    }
    assert exact[ranked[0]] - exact[ranked[1]] < 0.01 < HALF_BEHIND < exact[ranked[0]] - exact[ranked[-1]]
    found = compare_timed(plan, config, windows, figures)
    assert found["timed_differences"] == 1 and found["timed_unjustified"] == (rank == -1)
    assert found["timed_suspicious"] == suspicious and list(found["timed_suspicions"]) == ["b"] * suspicious
    told = headline({"unjustified_divergences": 0, "tokens_equal": True} | found)
    assert told.tone == ("bad" if rank == -1 else "warn" if suspicious else "good")
    if suspicious and rank == 1:
        assert "block 1, request 1, output token 0" in told.said
    assert compare_timed(plan, config, {"a": windows["a"], "b": windows["a"]}, figures)["timed_suspicious"] == 0


def second_choices(plan: Any, blocks: int, rank: int) -> tuple[dict[str, list[Window]], float]:
    """Windows in which `b` begins each output with the token of a rank, where it is at most 2 nats behind the likeliest.

    Also returns the mean distance behind."""
    reference, behind = float64_reference(NumpyModel(plan.checkpoint)), []
    windows: dict[str, list[Window]] = {"a": [], "b": []}
    for block in range(blocks):
        outputs: dict[str, list[tuple[int, ...]]] = {"a": [], "b": []}
        for item in plan.workload.fresh(block, plan.seed).items:
            exact = reference(list(item.prompt))
            best, *others = np.argsort(-exact)[: rank + 1].tolist()
            token = others[-1] if others and exact[best] - exact[others[-1]] < HALF_BEHIND else best
            behind.append(exact[best] - exact[token])
            outputs["a"].append((best, 2, 3, 4))
            outputs["b"].append((token, 2, 3, 4))
        for label, mine in outputs.items():
            windows[label].append(window(*mine))
    return windows, float(np.mean(behind))


@pytest.mark.parametrize("wrong", ["a", "b"])
def test_tokens_farther_behind_than_rounding_takes_them_are_suspicious(wrong: str) -> None:
    """Each of them is within the limit, so that none is a defect by itself."""
    plan, config = plan_of("bfloat16"), CorrectnessConfig(num_requests=1, output_len=1, tolerance=0.001)
    windows, behind = second_choices(plan, 4, 1)
    if wrong == "a":
        windows = {"a": windows["b"], "b": windows["a"]}
    found = compare_timed(plan, config, windows)
    assert found["timed_unjustified"] == 0 and list(found["timed_suspicions"]) == [wrong] and found["timed_suspicious"] == 1
    assert found["timed_gaps"][wrong]["mean"] == pytest.approx(behind) and behind > 0.1
    result = {"unjustified_divergences": 0, "tokens_equal": True, "dtype": "bfloat16", "tokens_equal_share": 0.0} | found
    told = headline(result)
    assert told.tone == "warn" and f"{wrong} chose tokens" in told.said and "0.0 % of timed output tokens" in told.said
    sound = headline(result | {"timed_suspicions": {}})
    assert sound.tone == "good" and sound.said.startswith("every token is the same; in bfloat16 0.0 %")


def test_differences_that_are_not_judged_do_not_look_like_success(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of("float32")
    windows = {"a": [SOUND], "b": [window((1, 2, 9, 4), (5, 6, 7, 8))]}
    found = compare_timed(plan, CorrectnessConfig(num_requests=0, output_len=1, tolerance=0.001), windows)
    assert found["timed_not_judged"] == "correctness.num_requests=0" and found["timed_unjustified"] is None
    shared = {"dtype": "float32", "engines": {"a": {}, "b": {}}, "tokens_equal_share": 0.75}
    result = {**LEFT_OUT, **found, **shared}
    said = "1 difference of timed outputs not judged: correctness.num_requests=0"
    assert headline(result) == ("warn", said)
    print_verdict(result)
    assert f"outputs: {said}" in capsys.readouterr().out
    (first, *_) = correctness(RunFiles(Path("run"), {}, {}, result))
    assert first.tone == "warn" and said in first.said and "b differs in block 0, request 0, output token 2" in first.said
    alike = compare_timed(plan, CorrectnessConfig(num_requests=0, output_len=1, tolerance=0.001), {"a": [SOUND], "b": [SOUND]})
    assert alike["timed_not_judged"] == "" and headline({**result, **alike}).tone == "calm"


def test_a_sample_of_the_differences_says_that_it_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of("bfloat16")
    windows = {"a": [SOUND] * 20, "b": [window((1, 2, 3, 4), (6, 6, 7, 8))] * 20}
    found = compare_timed(plan, CorrectnessConfig(num_requests=1, output_len=1, tolerance=0.001), windows)
    assert found["timed_differences"] == 20 and found["timed_not_judged"] == "a sample bounds the work"
    shared = {"dtype": "bfloat16", "engines": {"a": {}, "b": {}}, "tokens_equal_share": 0.75}
    print_verdict({**LEFT_OUT, **found, **shared})
    assert "16 of 20 differences of timed outputs judged: a sample bounds the work" in capsys.readouterr().out


def test_the_differences_that_are_judged_are_bounded_and_spread_over_the_blocks() -> None:
    wrong = window((9, 2, 3, 4), (9, 6, 7, 8))
    found = differences({"a": [SOUND] * 40, "b": [wrong] * 40, "c": [wrong] * 2})
    some = spread(found, 8)
    assert [each.block for each in some if each.engine == "b"] == list(range(0, 40, 5))
    assert [each.engine for each in some].count("c") == 4
    short = differences({"a": [SOUND] * 40, "b": [wrong] * 39 + [window((1, 2, 3), (5, 6, 7, 8))]})
    assert spread(short, 2)[-1].block == 39  # an output that ended early needs no float64


LATE = """
import historyinfer
from dataclasses import replace

class ModelRunner(historyinfer.ModelRunner):
    _sampled = 0

    def _run(self, batch):
        result = super()._run(batch)
        before, self._sampled = self._sampled, self._sampled + len(result.tokens)
        wrong = before < 40 <= self._sampled
        return replace(result, tokens=(result.tokens + 1) % 320) if wrong else result
"""


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.accept)])
def test_a_wrong_token_in_a_late_block_is_a_defect(
    dtype: str, history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A block samples 15 tokens, and so does the float32 pass: token 40 of the process is in the last of 3 blocks."""
    package = history / "packages" / "lateinfer"
    package.mkdir()
    (package / "__init__.py").write_text(LATE)
    (history / "configs" / "engine" / "late.yaml").write_text("defaults: [history, _self_]\nname: late\n")
    words = ["model=tiny-llama", "workload=fixed", "workload.num_requests=3", "workload.output_len=5", "measure.limits_s=0"]
    words += ["engines=[history,late]", "measure=quick", "measure.blocks=3", "measure.warmup_requests=0", f"dtype={dtype}"]
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, compare.main, *words)
    assert exit.value.code == 4
    out, err = capsys.readouterr()
    result = last_line(out)
    assert result["unjustified_divergences"] == 0 and result["tokens_equal"] is True  # the pass alone sees nothing
    first = result["first_timed_difference"]
    assert (first["engine"], first["block"]) == ("late", 2) and result["timed_differences"] > 0
    assert f"late differs in block 2, request {first['request']}" in " ".join(out.split())
    assert "timed: late differs in block 2" in err and result["timed_unjustified"] == 1


def test_two_processes_never_keep_a_finding_under_one_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert diverge.keep({"said": "first"}, tmp_path).name == "diverge-1.json"
    listings = iter([{}, {1: tmp_path / "diverge-1.json"}])  # listed before the other process wrote its own
    monkeypatch.setattr(diverge, "findings_of", lambda directory: next(listings))
    assert diverge.keep({"said": "second"}, tmp_path).name == "diverge-2.json"
    assert [json.loads((tmp_path / f"diverge-{i}.json").read_text())["said"] for i in (1, 2)] == ["first", "second"]
    assert len(list(tmp_path.iterdir())) == 2
