"""Every timed block is compared, and a wrong token in a late one is a defect."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import compare, diverge
from experiments.drive import Row, Window
from experiments.timed import differences, judge_timed
from experiments.workload import Item, Workload
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
    assert differences({"server": [window((-1,), (-1,))], "b": [SOUND]}) == []


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
    (judged,) = judge_timed(differences(windows), windows, workload, 0, reference_of, 0.001)
    assert judged.wrong == wrong and judged.justified == (not any(wrong))
    if histories:
        assert histories == [[*workload.fresh(1, 0).items[0].prompt, 1, 2]]  # the prompt of that block, not of the first


def test_an_output_that_ends_early_is_unjustified_without_float64() -> None:
    windows = {"a": [SOUND], "b": [window((1, 2, 3), (5, 6, 7, 8))]}
    workload = Workload("mine", (Item(0.0, (3, 4), 4),) * 2)
    (judged,) = judge_timed(differences(windows), windows, workload, 0, lambda history: np.zeros(16), 0.001)
    assert judged.wrong == (False, True)


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


@pytest.mark.parametrize(("dtype", "code"), [("float32", 4), pytest.param("bfloat16", None, marks=pytest.mark.accept)])
def test_a_wrong_token_in_a_late_block_is_a_defect(
    dtype: str, code: int | None, history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A block samples 15 tokens, and so does the float32 pass: token 40 of the process is in the last of 3 blocks."""
    package = history / "packages" / "lateinfer"
    package.mkdir()
    (package / "__init__.py").write_text(LATE)
    (history / "configs" / "engine" / "late.yaml").write_text("defaults: [history, _self_]\nname: late\n")
    words = ["model=tiny-llama", "workload=fixed", "workload.num_requests=3", "workload.output_len=5", "measure.limits_s=0"]
    words += ["engines=[history,late]", "measure=quick", "measure.blocks=3", "measure.warmup_requests=0", f"dtype={dtype}"]
    if code is None:
        command(monkeypatch, compare.main, *words)
    else:
        with pytest.raises(SystemExit) as exit:
            command(monkeypatch, compare.main, *words)
        assert exit.value.code == code
    out, err = capsys.readouterr()
    result = last_line(out)
    assert result["unjustified_divergences"] == 0 and result["tokens_equal"] is True  # the pass alone sees nothing
    first = result["first_timed_difference"]
    assert (first["engine"], first["block"]) == ("late", 2) and result["timed_differences"] > 0
    assert f"late differs in block 2, request {first['request']}" in " ".join(out.split())
    assert ("timed: late differs in block 2" in err) == (code == 4)
    assert result["timed_unjustified"] == (1 if code else None)


def test_two_processes_never_keep_a_finding_under_one_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert diverge.keep({"said": "first"}, tmp_path).name == "diverge-1.json"
    listings = iter([{}, {1: tmp_path / "diverge-1.json"}])  # listed before the other process wrote its own
    monkeypatch.setattr(diverge, "findings_of", lambda directory: next(listings))
    assert diverge.keep({"said": "second"}, tmp_path).name == "diverge-2.json"
    assert [json.loads((tmp_path / f"diverge-{i}.json").read_text())["said"] for i in (1, 2)] == ["first", "second"]
    assert len(list(tmp_path.iterdir())) == 2
