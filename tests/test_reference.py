"""The NumPy judge agrees with `transformers` to the last digits, and sees every planted defect."""

from pathlib import Path

import numpy as np
import pytest

from common.weights import zoo
from common.weights.checkpoint import open_checkpoint
from experiments.correctness.reference import NumpyModel
from tests.families import DEFECTS, FAMILIES, VISIBLE, save_family
from tests.outside_judge import transformers_logits

PROMPT = np.random.default_rng(0).integers(0, 199, 48).tolist()
ROUNDING = 1e-12
"""Of logits of a few layers in float64, in their standard deviations; 2e-14 is seen."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, save_family(request.param, tmp_path_factory.mktemp(request.param))


def test_logits_equal_transformers(family: tuple[str, Path]) -> None:
    logits = NumpyModel(open_checkpoint(family[1])).logits(PROMPT)
    assert logits.shape == (48, 199) and logits.dtype == np.float64
    assert np.abs(logits - transformers_logits(family[1], PROMPT)).max() < ROUNDING * logits.std()


def test_every_planted_defect_moves_the_logits(family: tuple[str, Path]) -> None:
    name, path = family
    model = NumpyModel(open_checkpoint(path))
    logits = model.logits(PROMPT)
    moved = {
        defect: np.abs(model.with_config(plant(model.config)).logits(PROMPT) - logits).max() / logits.std()
        for defect, plant in DEFECTS[name].items()
    }
    assert moved and {defect: by for defect, by in moved.items() if by < VISIBLE} == {}


def test_a_token_does_not_see_the_future(family: tuple[str, Path]) -> None:
    model = NumpyModel(open_checkpoint(family[1]))
    whole, start = model.logits(PROMPT), model.logits(PROMPT[:20])
    assert np.abs(whole[:20] - start).max() < ROUNDING * whole.std()


def test_float32_stays_within_its_own_rounding(family: tuple[str, Path]) -> None:
    model = open_checkpoint(family[1])
    exact, single = (NumpyModel(model, dtype=dtype).logits(PROMPT) for dtype in (np.float64, np.float32))
    assert single.dtype == np.float32
    assert 0 < np.abs(single - exact).max() < 1e-4 * exact.std()


@pytest.mark.accept  # transformers takes the better part of a minute to read a GGUF file
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_real_weights_give_the_logits_that_transformers_gives(name: str) -> None:
    path = zoo.resolve(name)
    checkpoint = open_checkpoint(path)
    prompt = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, 16).tolist()
    logits = NumpyModel(checkpoint).logits(prompt)
    # transformers keeps the epsilon of the file, which is rounded to float32: 2.5e-8 of it, times thirty layers.
    assert np.abs(logits - transformers_logits(path, prompt)).max() < 1e-8 * logits.std()
