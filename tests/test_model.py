"""Both backends' logits against the float64 NumPy model, with pages and without, on every model family and on real weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from common.text.tokenizer import open_tokenizer
from experiments.correctness.reference import NumpyModel
from experiments.kernels.operators import part
from tests.backends import BACKENDS, call, checkpoint, dense_logits, paged_logits
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


def test_no_gate_is_too_large_for_an_activation(backend: str) -> None:
    """The tanh form of GELU cubes it, for which float32 has no room from 7e12 on."""
    gates = np.array([-3e38, -1.8e13, -7e12, 7e12, 1.8e13, 3e38], np.float32)
    activate = part(backend, "layers").activate
    for kind in ("silu", "gelu_tanh"):
        assert np.array_equal(call(backend, partial(activate, kind=kind), gates), np.maximum(gates, 0))


TEXT = """The lighthouse keeper wrote down the weather every morning before he lit the stove. In the first year he used whole
sentences; later a few words had to do, and in the end there were only numbers: wind, pressure, the height of the
waves. When the ship came in April, the captain asked him what he had learned in eleven winters. He thought about it
for a while and then said that the sea repeats itself, but never exactly, and that one should keep both facts in mind.
They drank tea, 3 cups each at 82.5 degrees, and talked about bread, rope, the price of coal (£14 a ton), and the new
harbour at Sønderby; nobody mentioned the storm. On the way back the captain counted 27 gulls, a seal and half of a
wooden crate marked "FRAGILE - keep dry". He thought of the numbers in the book, row upon row of them, and wondered
whether anyone would ever add them up. def mean(xs): return sum(xs) / len(xs) was what his daughter would have said;
she had left for the city two years ago to study statistics, and wrote on Sundays.
"""


def errors(backend: str, name: str, prompt: list[int]) -> tuple[float, float]:
    """The largest error of a logit, with pages or without: as it is, and in standard deviations of the logits."""
    exact = NumpyModel(checkpoint(name)).logits(prompt)
    half = len(prompt) // 2
    steps = [[(0, 0, half)], [(0, half, 1)], [(0, half + 1, len(prompt) - half - 1)]]
    (paged,) = paged_logits(backend, name, [prompt], steps, PAGE_SIZE)
    worst = max(float(np.abs(logits - exact).max()) for logits in (paged, dense_logits(backend, name, prompt)))
    return worst, worst / float(exact.std())


def text(name: str, length: int) -> list[int]:
    ids = open_tokenizer(checkpoint(name).path).encode(TEXT)
    assert len(ids) >= length
    return ids[:length]


def test_smollm2_equals_the_judge(backend: str) -> None:
    assert errors(backend, "smollm2-135m", text("smollm2-135m", 19))[0] < REAL_BOUND


@pytest.mark.accept
@pytest.mark.parametrize("length", [33, 220])
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_real_models_equal_the_judge(backend: str, name: str, length: int) -> None:
    assert errors(backend, name, text(name, length))[0] < REAL_BOUND


@pytest.mark.accept
@pytest.mark.parametrize("length", [33, 250])
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_real_models_equal_the_judge_on_tokens_that_make_no_sense(backend: str, name: str, length: int) -> None:
    """Random ids drive Gemma's logits to a deviation of 17 to 30, and its rounding with them: the bound is relative."""
    prompt = np.random.default_rng(length).integers(0, checkpoint(name).config.vocab_size, length).tolist()
    assert errors(backend, name, prompt)[1] < BOUND


def test_both_backends_are_judged() -> None:
    assert BACKENDS == ("jax", "torch")
