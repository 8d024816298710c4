"""Blocks that other programs disturbed: the rule alone, and whole comparisons with a planted burst."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import compare
from experiments.blocks import reason_to_stop
from experiments.drive import Window
from experiments.fail_if import parse, violations
from experiments.isolate import IsolatedEngine
from experiments.measure import Outcome
from experiments.spoilt import disturbed_blocks, dropped_blocks, no_verdict
from tests.history_backend import command, history, last_line
from tests.test_statistics import AS_SHIPPED, blocks_of, many, noise

__all__ = ["history"]


def window(share: float, duration: float = 10.0) -> Window:
    processors = os.cpu_count() or 1
    return Window((), duration, {"foreign_cpu_seconds": share * duration * processors, "watched_seconds": duration})


def test_a_block_is_disturbed_by_other_programs_alone_whichever_engine_they_ran_beside() -> None:
    assert disturbed_blocks({"a": [window(0.09), window(0.2), window(0.0)], "b": [window(0.0), window(0.0), window(0.5)]}) == {
        1: "other programs used 20% of the processors beside a",
        2: "other programs used 50% of the processors beside b",
    }
    slow = replace(window(0.0), stats=window(0.0).stats | {"compilations": 3, "throttled_seconds": 9.0, "major_faults": 999})
    assert disturbed_blocks({"a": [slow, window(0.5, duration=0.5), Window((), 10.0)]}) == {}


def test_at_most_a_third_of_the_blocks_is_dropped_and_beyond_it_none() -> None:
    found = {0: "x", 3: "y"}
    assert dropped_blocks(found, 6) == found and no_verdict(2, 6) == ""
    assert dropped_blocks(found, 5) == {} and "2 of 5 blocks" in no_verdict(2, 5)


def test_disturbed_blocks_are_repeated_until_they_are_too_many_or_max_blocks_are_run() -> None:
    def stop(done: int, disturbed: int) -> Any:
        return reason_to_stop(replace(AS_SHIPPED, max_blocks=9), done, 0.0, 0.0, 1, lambda: True, disturbed)

    assert stop(4, 2) is None and stop(5, 2) is None and stop(6, 2).option == "measure.precision"
    assert "3 of 6 blocks" in stop(3, 3).said and stop(7, 2).option == "measure.max_blocks"


def test_a_condition_on_a_comparison_without_a_verdict_does_not_pass() -> None:
    result = {"comparisons": {"b": {"verdict": "undecided", "contaminated": True}}, "ratios": {"b": 1.0}, "no_verdict": "busy"}
    conditions = [parse("comparisons.b.verdict == slower"), parse("ratios.b < 0.9")]
    assert len(violations(conditions, result)) == 2 and violations(conditions, result | {"no_verdict": ""}) == []
    assert violations([parse("comparisons.b.contaminated == false")], result) == []


@pytest.fixture
def burst(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """Plant other programs in the blocks given by number, beside the second engine, and none in the others."""

    def plant(blocks: set[int]) -> None:
        real, seen = IsolatedEngine.run, dict[str, int]()

        def run(self: IsolatedEngine, *arguments: Any) -> Window:
            mine = real(self, *arguments)
            block = seen[self.spec.label] = seen.get(self.spec.label, -1) + 1
            loud = block in blocks and self.spec.label == "other"
            return replace(mine, stats={**mine.stats, **window(0.5 if loud else 0.0).stats})

        monkeypatch.setattr(IsolatedEngine, "run", run)
        monkeypatch.setattr("experiments.spoilt.COARSE_S", 0.0)

    return plant


WORDS = (
    *("model=tiny-llama", "workload=fixed", "workload.num_requests=2", "workload.output_len=4", "measure.limits_s=0"),
    *("correctness.num_requests=0", "measure.warmup_requests=0", "engines=[history,{name:history,label:other}]"),
)


def test_a_block_with_a_burst_is_dropped_for_both_engines_repeated_and_kept_in_the_rows(
    burst: Callable[[set[int]], None], history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    burst({1})
    command(monkeypatch, compare.main, *WORDS, "measure.blocks=3")
    result = last_line(capsys.readouterr().out)
    (dropped,) = result["dropped_blocks"]
    assert dropped["block"] == 1 and "50% of the processors beside other" in dropped["reason"]
    assert len(result["order"]) == 4 and result["no_verdict"] == ""
    assert result["comparisons"]["other"]["blocks"] == 3 and not result["comparisons"]["other"]["contaminated"]
    assert all(figures["completed"] == 6 for figures in result["engines"].values())
    rows = list(map(json.loads, (Path(result["run"]) / "requests.jsonl").read_text().splitlines()))
    assert len(rows) == 16 and {row["block"] for row in rows if row.get("dropped")} == {1}
    assert sum(row.get("dropped", False) for row in rows) == 4


def test_where_every_block_is_disturbed_there_is_no_verdict_and_fail_if_does_not_pass(
    burst: Callable[[set[int]], None], history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    burst(set(range(40)))
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, compare.main, *WORDS, "measure.blocks=3", 'fail_if=["comparisons.other.verdict == slower"]')
    out, err = capsys.readouterr()
    result = last_line(out)
    assert exit.value.code == 3 and "contaminated: other programs disturbed 3 of 3 blocks" in err
    assert result["dropped_blocks"] == [] and len(result["order"]) == 3
    comparison = result["comparisons"]["other"]
    assert comparison["verdict"] == "undecided" and comparison["blocks"] == 3 and "disturbed" in comparison["said"]


def test_with_random_bursts_dropped_the_interval_covers_the_truth_in_94_to_96_runs_of_100() -> None:
    runs, most = 4000, AS_SHIPPED.max_blocks
    rng = np.random.default_rng(5)
    for scale in (0.01, 0.025, 0.07):
        logs = blocks_of(noise("normal", scale, runs, 4 * most, rng), 0.0, rng)
        loud = rng.random(logs.shape) < 0.15
        logs += loud * rng.choice((-1, 1), logs.shape) * np.log(1.5)
        clean = np.take_along_axis(logs, np.argsort(loud, axis=1, kind="stable"), axis=1)[:, :most]
        mean, half, _, _ = many(clean, flips=False)
        assert 0.94 - 0.007 <= np.mean(abs(mean) <= half) <= 0.96 + 0.007, scale  # two standard errors


def test_figures_of_a_run_cut_short_keep_no_dropped_window() -> None:
    quiet, loud = window(0.0), window(0.5)
    outcome = Outcome({"a": [quiet, loud, quiet], "b": [quiet] * 3}, order=[["a", "b"]] * 3)
    assert outcome.kept() == {"a": [quiet, quiet], "b": [quiet, quiet]} and outcome.no_verdict == ""
