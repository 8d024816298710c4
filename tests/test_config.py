"""Configuration that cannot work is refused as it is built, with what was expected and what came."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.config import EngineConfig, ModelConfig, Rope
from common.errors import ConfigError

MODEL = ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=32,
    max_position=128,
    norm_eps=1e-5,
)
YARN = {"scaling": "yarn", "factor": 4.0, "original_max_position": 32}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dtype", "float8"),
        ("dtype", np.array(["a", "b"])),
        ("kernels", "nativ"),
        ("device", None),
        ("device", ["cpu"]),
        ("compile", "yes"),
        ("enable_prefix_caching", "no"),
        ("enable_prefix_caching", 1),
        ("enable_chunked_prefill", "off"),
        ("schedule", "statik"),
        ("cache", None),
        ("cache", "dense"),  # with prefix caching, which is on
        ("seed", -1),
        ("seed", 2**64),
        ("seed", True),
        ("seed", 1.5),
        ("block_size", 0),
        ("block_size", 3),
        ("block_size", True),
        ("num_blocks", 1),
        ("num_blocks", 2.0),
        ("max_model_len", 1),
        ("max_waiting", 0),
        ("max_waiting", 1.0),
        ("threads", 0),
        ("threads", 1_000_000),
        ("tensor_parallel_size", 0),
        ("tensor_parallel_size", 65),
        ("tensor_parallel_size", 2.0),
        ("pipeline_parallel_size", 0),
        ("pipeline_parallel_size", 65),
        ("data_parallel_size", 0),
        ("data_parallel_size", 65),
        ("prefill_parallel_size", -1),
        ("prefill_parallel_size", 65),
        ("prefill_backend", "jax"),
        ("routing", "prefx"),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 63),  # below the 64 sequences of the default
    ],
)
def test_an_engine_option_that_cannot_work_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        EngineConfig(**{option: value})


@pytest.mark.parametrize("option", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_a_step_of_several_ranks_is_not_compiled_by_torch(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"compile=true .* {option}=2"):
        EngineConfig(compile=True, **{option: 2})


def test_a_misspelt_engine_option_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'block_size'"):
        EngineConfig.of(blok_size=16)


def test_a_context_longer_than_the_model_has_is_refused() -> None:
    assert EngineConfig().model_len(MODEL) == 128
    with pytest.raises(ConfigError, match="128 positions, got 129"):
        EngineConfig(max_model_len=129).model_len(MODEL)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_kv_heads", 3),
        ("head_dim", 5),
        ("vocab_size", 0),
        ("num_layers", 10**9),
        ("norm_eps", 0.0),
        ("norm_eps", math.nan),
        ("attention_scale", math.nan),
        ("attention_scale", math.inf),
        ("attention_scale", complex(0, 1)),
        ("eos_token_ids", (63, 64)),
        ("eos_token_ids", (-1,)),
        ("bos_token_id", 64),
        ("layer_rope", (0, 1)),
        ("layer_window", (4,)),
    ],
)
def test_a_model_that_cannot_be_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError):
        replace(MODEL, **{field: value})


@pytest.mark.parametrize(
    "options",
    [
        {"base": 0.0},
        {"base": math.nan},
        {"scaling": "linear", "factor": 0.0},
        {"scaling": "llama3", "factor": 8.0},
        {"scaling": "llama3", "factor": 8.0, "original_max_position": 64, "low_freq_factor": 4.0},
        YARN | {"base": 1.0},
        YARN | {"beta_fast": 0.0},
        YARN | {"beta_slow": -1.0},
        *(YARN | {"attention_factor": value} for value in (math.nan, math.inf, 1e308, 0.0, -1.0)),
        YARN | {"original_max_position": 0},
    ],
)
def test_a_rope_that_cannot_be_computed_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Rope(**options)
