"""The gaps between choices that rounding explains, and the error of the control in 16 bits."""

from __future__ import annotations

import numpy as np
import pytest

from common.weights import zoo
from common.weights.checkpoint import open_checkpoint
from experiments.correctness.judge import log_softmax
from experiments.correctness.reference import NumpyModel
from experiments.correctness.rounding import ALLOWED, CHANCE, HALVES, RoundedModel, chance, margin_error

MODEL = NumpyModel(open_checkpoint(zoo.resolve("tiny-llama")))
HISTORY = np.random.default_rng(0).integers(0, 320, 60).tolist()


def test_the_error_grows_with_the_rounding() -> None:
    single, half, brain = (margin_error(MODEL, [HISTORY], dtype) for dtype in ("float32", "float16", "bfloat16"))
    assert single < 1e-5 < half < brain < 0.1 and half == pytest.approx(brain / 8, rel=0.7)  # 11 and 8 bits


def test_gaps_of_rounding_are_not_suspicious_and_gaps_of_second_choices_are() -> None:
    """Two rounded models part at near-ties: their gaps, and the margins of the same positions as gaps."""
    exact = log_softmax(MODEL.logits(HISTORY))
    ranked = -np.sort(-exact, axis=-1)
    seconds = (ranked[:, 0] - ranked[:, 1])[ranked[:, 0] - ranked[:, 1] < 2]
    error = margin_error(MODEL, [HISTORY], "bfloat16")
    chosen = RoundedModel(MODEL, HALVES["bfloat16"]).logits(HISTORY).argmax(axis=-1)
    behind = ranked[:, 0] - np.take_along_axis(exact, chosen[:, None], -1)[:, 0]
    assert chance(behind[behind > 0].tolist(), error, "bfloat16") > 0.5
    for count in (4, 16):
        assert chance(seconds[:count].tolist(), error, "bfloat16") < CHANCE
    assert chance([], error, "bfloat16") == 1.0


@pytest.mark.parametrize("count", [1, 4, 16])
def test_false_alarms_are_as_rare_as_stated(count: int) -> None:
    """An engine with the greatest error that is allowed, whose choice changes where the error exceeds the margin."""
    rng, runs, level = np.random.default_rng(1), 1000, 0.01
    margins, errors = rng.uniform(0, 5, (runs, 800)), rng.normal(0, 1, (runs, 800))
    flipped = [row[where][:count] for row, where in zip(margins, errors > margins, strict=True)]
    assert min(map(len, flipped)) == count
    assert sum(chance((ALLOWED["bfloat16"] * mine).tolist(), 1.0, "bfloat16") < level for mine in flipped) <= level * runs
