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

from experiments import compare, lab
from experiments.engines.process import IsolatedEngine
from experiments.export import export
from experiments.load.driver import Window
from experiments.measure.blocks import PRECISION, level, reason_to_stop, tail
from experiments.measure.session import Outcome
from experiments.metrics import statistics
from experiments.metrics.disturbed import disturbed_blocks, dropped_blocks, no_verdict
from experiments.metrics.statistics import Comparison, compare_all
from experiments.report.findings import notices
from experiments.report.rows import rows_of, steps_of, window_of
from experiments.report.run_page import facts, whole_parts
from experiments.runs.conditions import parse, violations
from experiments.runs.results import read_run
from tests.history_backend import command, history, last_line
from tests.synthetic_run import write_run
from tests.test_statistics import AS_SHIPPED, blocks_of, noise, tell

__all__ = ["history"]


def window(share: float, duration: float = 10.0) -> Window:
    processors = os.cpu_count() or 1
    return Window((), duration, {"foreign_cpu_seconds": share * duration * processors, "watched_seconds": duration})


def test_a_block_is_disturbed_by_other_programs_alone_whichever_engine_they_ran_beside() -> None:
    assert disturbed_blocks({"a": [window(0.09), window(0.2), window(0.0)], "b": [window(0.0), window(0.0), window(0.5)]}) == {
        1: "other programs used 20% of the processors beside a",
        2: "other programs used 50% of the processors beside b",
    }
    slow = replace(window(0.0), stats={**window(0.0).stats, "compilations": 3, "throttled_seconds": 9.0, "major_faults": 999})
    assert disturbed_blocks({"a": [slow, window(0.5, duration=0.5), Window((), 10.0)]}) == {}


def test_at_most_a_third_of_the_blocks_is_dropped_and_beyond_it_none() -> None:
    found = {0: "x", 3: "y"}
    assert dropped_blocks(found, 6) == found and no_verdict(2, 6) == ""
    assert dropped_blocks(found, 5) == {} and "2 of 5 blocks" in no_verdict(2, 5)


def test_disturbed_blocks_are_repeated_until_they_are_too_many_or_max_blocks_are_run() -> None:
    def stop(done: int, disturbed: int) -> Any:
        return reason_to_stop(replace(AS_SHIPPED, max_blocks=9), done, 0.0, 0.0, 1, lambda: True, disturbed)

    assert stop(4, 2) is None and stop(5, 2) is None and stop(6, 2).option == "measure.precision"
    assert stop(7, 2).option == stop(5, 4).option == "measure.max_blocks"


def test_a_run_goes_on_past_early_bursts_and_ends_where_the_machine_stays_busy() -> None:
    def stop(done: int, disturbed: int) -> Any:
        return reason_to_stop(AS_SHIPPED, done, 0.0, 0.0, 1, lambda: True, disturbed)

    assert stop(3, 3) is None and stop(6, 4) is None and stop(8, 4).option == "measure.precision"
    assert "5 of 12 blocks" in stop(7, 5).said and stop(7, 5).option == ""


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
        monkeypatch.setattr("experiments.metrics.disturbed.COARSE_S", 0.0)

    return plant


WORDS = (
    *("model=tiny-llama", "workload=fixed", "workload.num_requests=2", "workload.output_len=4", "measure.limits_s=0"),
    *("correctness.num_requests=0", "measure.warmup_requests=0", "engines=[history,{name:history,label:other}]"),
)


def test_a_block_with_a_burst_is_dropped_for_both_engines_repeated_and_kept_in_the_rows(
    burst: Callable[[set[int]], None], history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    burst({0})
    command(monkeypatch, compare.main, *WORDS, "measure.blocks=3", "table=all")
    out = capsys.readouterr().out
    result = last_line(out)
    (dropped,) = result["dropped_blocks"]
    assert dropped["block"] == 0 and "50% of the processors beside other" in dropped["reason"]
    assert len(result["order"]) == 4 and result["no_verdict"] == ""
    assert result["comparisons"]["other"]["blocks"] == 3 and not result["comparisons"]["other"]["contaminated"]
    assert all(figures["completed"] == 6 for figures in result["engines"].values())
    rows = list(map(json.loads, (Path(result["run"]) / "requests.jsonl").read_text().splitlines()))
    assert len(rows) == 16 and {row["block"] for row in rows if row.get("dropped")} == {0}
    assert sum(row.get("dropped", False) for row in rows) == 4
    steps = list(map(json.loads, (Path(result["run"]) / "steps.jsonl").read_text().splitlines()))
    assert {step["block"] for step in steps if step.get("dropped")} == {0}
    each_reader_leaves_the_dropped_block_out(Path(result["run"]))
    assert all(len(mine[key]) == 3 for mine in result["engines"].values() for key in mine if key.startswith("block_"))
    assert "Block 0 is dropped, its times are not counted: other programs used 50% of" in out
    assert "block 0 is dropped" in repr(lab.Run.open(result["run"]))
    run = read_run(Path(result["run"]))
    assert "Block 0 is dropped" in [notice.title for notice in notices(run)] and "3 blocks and 1 dropped" in facts(run)


def each_reader_leaves_the_dropped_block_out(run: Path) -> None:
    opened = lab.Run.open(run)
    assert {*opened.requests["block"]} == {*opened.steps["block"]} == {1, 2, 3}
    rows, steps = rows_of(opened.files), steps_of(opened.files)
    assert {*rows["block"]} == {*steps["block"]} == {1, 2, 3}
    assert {*window_of(rows, "other")["block"]} == {*window_of(steps, None)["block"]} == {1}  # the report draws it
    for file in export(run):
        exported = json.loads(file.read_text())
        assert exported["num_prompts"] == len(exported["ttfts"]) == exported["completed"] == 6


def test_of_a_run_that_was_cut_short_the_last_whole_block_counts_although_an_earlier_one_is_dropped(tmp_path: Path) -> None:
    dropped = [{"block": 1, "reason": "busy"}]
    directory = write_run(tmp_path / "run.partial", ("jax", "torch"), blocks=4, count=6, output_len=4, dropped_blocks=dropped)
    results = json.loads((directory / "results.json").read_text())
    for mine in results["engines"].values():  # blocks 0 and 2; block 3 did not end
        mine["block_output_throughput"] = mine["block_output_throughput"][:2]
    (directory / "results.json").write_text(json.dumps(results))
    run = read_run(directory)
    assert {*rows_of(run)["block"]} == {*steps_of(run)["block"]} == {0, 2} and whole_parts(run) == "3 blocks"


def test_where_every_block_is_disturbed_there_is_no_verdict_and_fail_if_does_not_pass(
    burst: Callable[[set[int]], None], history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    burst(set(range(40)))
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, compare.main, *WORDS, "measure.blocks=3", 'fail_if=["comparisons.other.verdict == slower"]')
    out, err = capsys.readouterr()
    result = last_line(out)
    assert exit.value.code == 3 and "contaminated: other programs disturbed 6 of 6 blocks" in err
    assert result["dropped_blocks"] == [] and len(result["order"]) == 6
    comparison = result["comparisons"]["other"]
    assert comparison["verdict"] == "undecided" and comparison["blocks"] == 6 and "disturbed" in comparison["said"]


def run_to_the_end(logs: np.ndarray, loud: np.ndarray, seed: int) -> Comparison | None:
    """Run the blocks of given logarithms under the whole rule; None if too many were disturbed for a verdict."""

    def so_far(ended: bool, stopped_by: str = PRECISION) -> Comparison:
        clean = logs[:blocks][~loud[:blocks]]
        spent = tail(AS_SHIPPED, 1, len(clean), stopped_by)
        return compare_all(tell(clean), AS_SHIPPED.criteria, seed, level(AS_SHIPPED, 1, ended), spent)["b"]

    def settled() -> bool:
        found = so_far(ended=False)
        return found.width <= AS_SHIPPED.precision and not found.unproven

    blocks = disturbed = 0
    while (stop := reason_to_stop(AS_SHIPPED, blocks - disturbed, 0.0, 0.0, 1, settled, disturbed)) is None:
        blocks += 1
        disturbed = int(loud[:blocks].sum())
    return None if no_verdict(disturbed, blocks) else so_far(True, stop.option)


@pytest.mark.accept
@pytest.mark.parametrize("scale", [0.01, 0.025, 0.07])
def test_with_random_bursts_dropped_the_interval_covers_the_truth_in_94_to_96_runs_of_100(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 15 % of the blocks a burst takes a third or more of one engine's throughput. All of them are dropped and repeated."""
    monkeypatch.setattr(statistics, "RESAMPLES", 99)  # the interval does not depend on them
    runs, most = 4000, AS_SHIPPED.max_blocks
    rng = np.random.default_rng(5)
    logs = blocks_of(noise("normal", scale, runs, 2 * most, rng), 0.0, rng)
    loud = rng.random(logs.shape) < 0.15
    logs += loud * rng.choice((-1, 1), logs.shape) * np.log(1.5)
    found = [run_to_the_end(mine, bursts, seed) for seed, (mine, bursts) in enumerate(zip(logs, loud, strict=True))]
    judged = [each for each in found if each]
    covered = np.mean([each.low is not None and each.high is not None and each.low <= 1 <= each.high for each in judged])
    assert len(judged) >= 0.9 * runs and 0.94 - 0.007 <= covered <= 0.96 + 0.007, (len(judged), covered)  # two standard errors
    assert np.mean([each.verdict in ("faster", "slower") for each in judged]) <= 0.05


def test_the_figures_are_over_the_windows_of_clean_blocks() -> None:
    quiet, loud = window(0.0), window(0.5)
    outcome = Outcome({"a": [quiet, loud, quiet], "b": [quiet] * 3}, order=[["a", "b"]] * 3)
    assert outcome.kept() == {"a": [quiet, quiet], "b": [quiet, quiet]} and outcome.no_verdict == ""
