"""Differences below the tolerance: rounding, or suspicious."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.weights import zoo
from common.weights.checkpoint import open_checkpoint
from experiments.correctness.agreement import TOP_LOGPROBS, Passed, compare
from experiments.correctness.config import CorrectnessConfig
from experiments.correctness.coverage import Part
from experiments.correctness.noise import Measured, Scale, suspicion, suspicion_alone
from experiments.load.workload import Item, Workload
from experiments.report.verdict import headline
from tests.planted import Local, make_local

MEASURED = Measured(
    control=Scale(median=5e-6, largest=2e-5),
    engines={"jax": Scale(median=1e-5, largest=3e-5), "torch": Scale(median=1e-5, largest=3e-5)},
)


@pytest.mark.parametrize(
    ("typical", "largest", "flagged"), [(1.4e-5, 6e-5, False), (4e-4, 9e-4, True), (1.4e-5, 4e-4, True), (0.0, 0.0, False)]
)
def test_a_difference_is_suspicious_far_above_the_rounding_of_the_run(typical: float, largest: float, flagged: bool) -> None:
    told = suspicion("torch", "jax", [typical] * 99 + [largest], MEASURED, same_bits=False)
    assert bool(told) is flagged
    if told:
        assert told.startswith("torch differs from jax by ") and "times the rounding measured in this run" in told


def test_equal_native_kernels_give_equal_bits() -> None:
    assert suspicion("torch", "jax", [0.0, 0.0], MEASURED, same_bits=True) is None
    told = suspicion("torch", "jax", [0.0, 1e-7], MEASURED, same_bits=True)
    assert told and "differs from jax at 1 of 2 positions, by at most 1.0e-07" in told


def test_engines_that_are_wrong_alike_are_suspicious_alone() -> None:
    engines = {"jax": Scale(median=3e-4, largest=1e-3), "torch": Scale(median=1e-5, largest=1e-5)}
    measured = Measured(control=MEASURED.control, engines=engines)
    assert "60 times" in (suspicion_alone("jax", measured) or "") and suspicion_alone("torch", measured) is None


def run(engine: Local, share: Workload) -> Passed:
    caps = {"observes": True, "kernels": [engine.spec.config.kernels], "kernel_arithmetic": "any"}
    return Passed(spec=engine.spec, rows=engine.run(share, logprobs=TOP_LOGPROBS).rows, caps=caps)


def share_of(seed: int) -> Workload:
    rng = np.random.default_rng(seed)
    return Workload("w", tuple(Item(0.0, tuple(rng.integers(0, 250, n).tolist()), 12) for n in (9, 20, 33)))


def judged(first: Passed, second: Passed, path: Path, share: Workload) -> dict[str, Any]:
    plan: Any = SimpleNamespace(checkpoint=open_checkpoint(path), workload=share)
    config = CorrectnessConfig(num_requests=3, output_len=12, tolerance=1e-3)
    return compare({"sound": first, "other": second}, Part(share, (0, 1, 2)), plan, config)


@pytest.fixture(scope="module")
def engines() -> dict[str, Local]:
    model = zoo.resolve("tiny-llama")
    return {kernels: make_local(kernels, "torch", kernels, model) for kernels in ("native", "framework")}


@pytest.mark.parametrize("seeds", [range(1), pytest.param(range(1, 20), marks=pytest.mark.accept)])
def test_sound_engines_are_never_suspicious(seeds: range, engines: dict[str, Local]) -> None:
    for seed in seeds:
        share = share_of(seed)
        native, framework = (run(engine, share) for engine in engines.values())
        for pair in ((native, framework), *([(native, native)] * (seed == 0))):
            found = judged(*pair, zoo.resolve("tiny-llama"), share)
            assert found["suspicious"] == found["errors_above_tolerance"] == found["unjustified_divergences"] == 0
            assert headline(found).tone == "good" and set(found["noise"]) == {"control", "sound", "other"}


@pytest.mark.parametrize("kernels", ["native", "framework"])
def test_an_attention_scale_off_by_a_ten_thousandth_is_suspicious(kernels: str, engines: dict[str, Local]) -> None:
    path, share = zoo.resolve("tiny-llama"), share_of(0)
    found = judged(run(engines[kernels], share), run(make_local("x", "torch", kernels, path, "scale"), share), path, share)
    assert found["tokens_equal"] and found["errors_above_tolerance"] == 0 and found["suspicious"] == 1
    tone, said = headline(found)
    assert tone == "warn" and said.startswith("suspicious: other differs from sound")
