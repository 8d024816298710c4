"""The tables of cos and sin, against transformers' frequencies and against angles computed here."""

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common.config import Rope
from common.errors import ConfigError
from common.model.rope import inverse_frequencies, magnitude, rope_tables
from common.weights.config_json import model_config_from_json
from experiments.correctness.reference import rotations
from tests.outside_judge import true_float64

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "llama 3.1": LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 8192},
    "llama 3.2": LLAMA3 | {"factor": 32.0, "rope_theta": 5e5, "original_max_position_embeddings": 8192},
    "yarn of Qwen": YARN | {"rope_theta": 1e6},
    "yarn without truncation": YARN | {"truncate": False},
    "yarn with betas": YARN | {"beta_fast": 20.0, "beta_slow": 2.0},
    "yarn of a tiny context": YARN | {"original_max_position_embeddings": 4},
    "yarn with attention_factor": YARN | {"attention_factor": 1.25},
    "yarn with mscale": YARN | {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn with one mscale": YARN | {"mscale": 0.707},
}
YARN_ROPE = Rope(scaling="yarn", factor=4.0, original_max_position=64)


@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS.keys())
def test_frequencies_and_magnitude_equal_transformers(parameters: dict[str, Any]) -> None:
    config = LlamaConfig(
        rope_parameters=dict(parameters), head_dim=128, max_position_embeddings=131072, architectures=["LlamaForCausalLM"]
    )
    with true_float64():
        expected, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    (rope,) = model_config_from_json(config.to_dict()).ropes
    np.testing.assert_allclose(inverse_frequencies(rope, 128), expected.numpy(), rtol=1e-14)
    assert magnitude(rope) == pytest.approx(scale, rel=1e-15)


@pytest.mark.parametrize(
    "rope", [Rope(), Rope(scaling="linear", factor=3.0), YARN_ROPE, Rope(base=1e6, scaling="llama3", original_max_position=64)]
)
def test_tables_are_exact_angles_rounded_once(rope: Rope) -> None:
    cos, sin = rope_tables(rope, 64, 5000)
    assert cos.dtype == sin.dtype == np.float32 and cos.shape == sin.shape == (5000, 32)
    exact = rotations(rope, 64, 5000)
    # Half a unit in the last place of float32, and 5,000 radians' worth of float64 rounding.
    half_ulp = np.spacing(np.abs(exact.real).astype(np.float32)) / 2
    assert (np.abs(cos - exact.real) <= half_ulp + 2e-12).all()
    half_ulp = np.spacing(np.abs(exact.imag).astype(np.float32)) / 2
    assert (np.abs(sin - exact.imag) <= half_ulp + 2e-12).all()


def test_position_zero_turns_nothing() -> None:
    cos, sin = rope_tables(Rope(), 8, 1)
    assert (cos == 1).all() and (sin == 0).all()


def test_linear_scaling_stretches_positions() -> None:
    np.testing.assert_array_equal(
        rope_tables(Rope(scaling="linear", factor=4.0), 16, 41)[0][::4], rope_tables(Rope(), 16, 11)[0]
    )


def test_yarn_magnitude_is_part_of_the_tables() -> None:
    cos, sin = rope_tables(YARN_ROPE, 16, 10)
    np.testing.assert_allclose(np.hypot(cos, sin), 0.1 * np.log(4.0) + 1, rtol=1e-6)


@pytest.mark.parametrize("wrong", [{"base": 0.0}, {"base": float("nan")}, {"factor": -1.0}, {"scaling": "yarn"}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"must be|needs"):
        Rope(**wrong)
