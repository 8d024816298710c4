"""Verdicts of whole comparisons against a known truth: an engine against itself, and against itself a tenth slower.

Real engines in real processes, timed: under `accept` as often as it takes to count, on a machine that does nothing else.
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from common.config import EngineConfig
from common.weights import zoo
from common.weights.checkpoint import open_checkpoint
from experiments.display.progress import ProgressReporter
from experiments.engines.process import IsolatedEngine
from experiments.engines.spec import EngineSpec
from experiments.load.workload import WorkloadConfig, draw
from experiments.measure.config import MeasureConfig
from experiments.measure.session import Outcome, Plan, prepare, run_blocks, vocabulary
from experiments.metrics.statistics import Comparison
from tests.history_backend import ROOT

SLOWED = """
import time
from common.engine import Engine
from torchinfer import ModelRunner

step = Engine.step

def slowed(self, timeout=None):
    "A step takes a ninth longer, so that the engine has nine tenths of its throughput."
    start = time.perf_counter()
    events = step(self, timeout)
    end = time.perf_counter()
    while time.perf_counter() < end + (end - start) / 9:
        pass
    return events

Engine.step = slowed
"""


def make_plan(
    names: tuple[str, str], *, num_requests: int, output_len: int, blocks: int, max_blocks: int, threads: int | None = None
) -> Plan:
    checkpoint = open_checkpoint(zoo.resolve("tiny-llama"))
    config = EngineConfig(max_num_seqs=32, max_num_batched_tokens=256, max_model_len=256, threads=threads)
    wanted = WorkloadConfig(name="fixed", num_requests=num_requests, prompt_len=64, output_len=output_len)
    return Plan(
        model="tiny-llama",
        checkpoint=checkpoint,
        engines=tuple(EngineSpec(label=f"{name}-{i}", name=name, config=config) for i, name in enumerate(names)),
        workload=draw(wanted, 0, *vocabulary(checkpoint)),
        measure=MeasureConfig(
            blocks=blocks, max_blocks=max_blocks, budget_s=600, warmup_requests=32, warmup_output_len=16, limits_s=0
        ),
    )


def compared(plan: Plan, folder: Path, seed: int) -> Comparison:
    """One run: engines in processes of their own, blocks in an order drawn from its own seed until the interval is narrow, and
    the verdict on the second engine."""
    one, other = plan.engines
    outcome = Outcome({one.label: [], other.label: []})
    with (
        ProgressReporter() as narrator,
        IsolatedEngine(one, folder / "one.log", 600.0) as first,
        IsolatedEngine(other, folder / "other.log", 600.0) as second,
    ):
        engines = {one.label: first, other.label: second}
        for engine in engines.values():
            prepare(engine, plan, narrator)
        run_blocks(outcome, engines, replace(plan, seed=seed), narrator)
    assert not outcome.failures
    (comparison,) = outcome.compared(plan, ended=True).values()
    print(comparison.said, flush=True)
    return comparison


@pytest.fixture
def slowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an engine that is `torch` a tenth slower."""
    (tmp_path / "packages" / "slowedinfer").mkdir(parents=True)
    (tmp_path / "packages" / "slowedinfer" / "__init__.py").write_text(SLOWED)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'packages'}:{ROOT}")
    return "slowed"


RUNS = 20
SHORT = {"num_requests": 256, "output_len": 64, "blocks": 6, "max_blocks": 120}
"""Windows of a third of a second, and so many of them that engines are told alike whose ratio varies by 14 % a block."""


def test_a_run_of_the_proof_compares_both_engines(slowed: str, tmp_path: Path) -> None:
    """The machinery of the two below, on windows too short to say anything about speed."""
    plan = make_plan(("torch", slowed), num_requests=2, output_len=4, blocks=3, max_blocks=3)
    comparison = compared(plan, tmp_path, seed=0)
    assert (comparison.against, comparison.blocks) == ("torch-0", 3) and comparison.interval == "t"


@pytest.mark.accept
def test_an_engine_against_itself_is_equivalent_and_never_faster_or_slower(tmp_path: Path) -> None:
    plan = make_plan(("torch", "torch"), **SHORT)
    verdicts = Counter(compared(plan, tmp_path, seed).verdict for seed in range(RUNS))
    assert verdicts["equivalent"] >= 0.9 * RUNS and not verdicts["faster"] and not verdicts["slower"], verdicts


@pytest.mark.accept
def test_an_engine_slowed_by_a_tenth_is_called_slower(slowed: str, tmp_path: Path) -> None:
    """One thread each: others would fall asleep in the pause behind a step, and wake late in the next, which slows an engine by
    more than the pause, and the truth was not known."""
    plan = make_plan(("torch", slowed), **SHORT, threads=1)
    runs = [compared(plan, tmp_path, seed) for seed in range(RUNS)]
    verdicts = Counter(run.verdict for run in runs)
    assert verdicts["slower"] >= 0.9 * RUNS, verdicts
    ratios = [run.ratio for run in runs if run.ratio]
    assert 0.89 <= statistics.median(ratios) <= 0.91, ratios
    # A process may be faster or slower than its twin for its whole life: by less than what is called equivalent.
    assert min(ratios) > 0.9 / 1.05 and max(ratios) < 0.9 * 1.05, ratios
