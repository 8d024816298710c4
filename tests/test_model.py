"""Both backends' logits against the float64 NumPy model, with pages and without, on every model family and on real weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.reference import NumpyModel
from tests.backends import BACKENDS, checkpoint, dense_logits, paged_logits
from tests.families import BOUND, DEFECTS, FAMILIES, VISIBLE

REAL_BOUND = 1e-3
"""How far float32 logits of the real models may be from float64 ones; both are about 1e-4 off."""

PROMPTS = np.random.default_rng(0).integers(0, 199, (2, 48)).tolist()
# Chunks that begin and end beside page boundaries, alone and beside decodes of the other prompt. (prompt, start, count)
STEPS = (
    [(0, 0, 15)],
    [(0, 15, 1), (1, 0, 9)],
    [(0, 16, 1), (1, 9, 23)],
    [(1, 32, 1), (0, 17, 16)],
    [(0, 33, 1), (1, 33, 1)],
    [(0, 34, 14), (1, 34, 14)],
)
PAGE_SIZE = 8


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_judge_and_every_defect_would_show(
    backend: str, family: str, families: dict[str, Path]
) -> None:
    path = families[family]
    judge = NumpyModel(checkpoint(path))
    exact = [judge.logits(prompt) for prompt in PROMPTS]
    dense = dense_logits(backend, path, PROMPTS[0])
    paged = paged_logits(backend, path, PROMPTS, STEPS, PAGE_SIZE)

    def off(logits: np.ndarray, right: np.ndarray) -> float:
        return float(np.abs(logits - right).max() / exact[0].std())

    assert off(dense, exact[0]) < BOUND
    assert max(map(off, paged, exact)) < BOUND
    wrong = {name: judge.with_config(plant(judge.config)).logits(PROMPTS[0]) for name, plant in DEFECTS[family].items()}
    assert {name: by for name, logits in wrong.items() if (by := off(paged[0], logits)) < VISIBLE} == {}


def check_real_model(backend: str, name: str, prompt: list[int]) -> None:
    exact = NumpyModel(checkpoint(name)).logits(prompt)
    half = len(prompt) // 2
    steps = [[(0, 0, half)], [(0, half, 1)], [(0, half + 1, len(prompt) - half - 1)]]
    (paged,) = paged_logits(backend, name, [prompt], steps, PAGE_SIZE)
    assert np.abs(paged - exact).max() < REAL_BOUND
    assert np.abs(dense_logits(backend, name, prompt) - exact).max() < REAL_BOUND


def test_smollm2_equals_the_judge(backend: str) -> None:
    check_real_model(backend, "smollm2-135m", np.random.default_rng(1).integers(0, 49_152, 19).tolist())


@pytest.mark.accept
@pytest.mark.parametrize("length", [33, 250])
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_real_models_equal_the_judge(backend: str, name: str, length: int) -> None:
    vocab_size = checkpoint(name).config.vocab_size
    check_real_model(backend, name, np.random.default_rng(length).integers(0, vocab_size, length).tolist())


def test_both_backends_are_judged() -> None:
    assert BACKENDS == ("jax", "torch")
