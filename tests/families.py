"""Tiny seeded checkpoints of every model family, saved through `transformers` as a user's directory would be.

Weights are larger than a training run starts from, and norms and biases are random, so that every feature moves the logits:
`DEFECTS` lists, for each family, wrong configurations that a test of an engine must be able to see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils import logging

from common.config import ModelConfig

logging.disable_progress_bar()

BOUND = 1e-4
"""How far an engine's float32 logits may be from the judge's, in standard deviations of the logits."""
VISIBLE = 10 * BOUND
"""How far every planted defect must move them."""

_SHARED: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def _config(kind: type[PretrainedConfig], **fields: Any) -> PretrainedConfig:
    return kind(**(_SHARED | fields))


def _rope(kind: str, base: float = 10_000.0, **fields: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": base} | fields


_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama2": lambda: _config(LlamaConfig, num_key_value_heads=4),
    "llama3": lambda: _config(
        LlamaConfig,
        rope_parameters=_rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ),
    ),
    "smollm": lambda: _config(
        LlamaConfig, num_attention_heads=3, num_key_value_heads=1, hidden_size=48, tie_word_embeddings=True
    ),
    "llama-biases": lambda: _config(LlamaConfig, attention_bias=True, mlp_bias=True),
    "llama-linear": lambda: _config(LlamaConfig, rope_parameters=_rope("linear", factor=4.0)),
    "llama-yarn": lambda: _config(
        LlamaConfig,
        max_position_embeddings=1024,
        rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=256, beta_fast=16.0, beta_slow=1.0),
    ),
    "mistral": lambda: _config(MistralConfig, sliding_window=8),
    "qwen2": lambda: _config(Qwen2Config, tie_word_embeddings=True),
    "qwen2-window": lambda: _config(Qwen2Config, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": lambda: _config(Qwen3Config, head_dim=24),
    "gemma3": lambda: _config(
        Gemma3TextConfig,
        num_hidden_layers=7,
        num_key_value_heads=1,
        # With this and its head_dim all products are a matrix unit's, and some sums have to wait for their second part.
        intermediate_size=480,
        head_dim=32,
        query_pre_attn_scalar=24,
        sliding_window=8,
        tie_word_embeddings=True,
        rope_parameters={
            "full_attention": _rope("linear", 1e6, factor=4.0),
            "sliding_attention": _rope("default", 1e4),
        },
    ),
}

FAMILIES = tuple(_CONFIGS)


def save_family(name: str, directory: Path) -> Path:
    """Make the checkpoint `name` of FAMILIES in `directory`: config.json and model.safetensors, float32, the same each time."""
    config = _CONFIGS[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(FAMILIES.index(name))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                _draw(parameter_name, parameter, unit_norm=name != "gemma3")
    model.save_pretrained(directory)
    return directory


def _draw(name: str, parameter: torch.Tensor, unit_norm: bool) -> None:
    if name.endswith("norm.weight"):
        parameter.normal_(1.0 if unit_norm else 0.0, 0.3)
    elif name.endswith("bias"):
        parameter.normal_(0.0, 0.5)
    elif "embed_tokens" in name:
        parameter.normal_(0.0, 0.1)
    else:
        parameter.normal_(0.0, parameter.shape[1] ** -0.5)


Defect = Callable[[ModelConfig], ModelConfig]


def _set(**fields: Any) -> Defect:
    return lambda config: replace(config, **fields)


def _rope_set(index: int = 0, **fields: Any) -> Defect:
    def plant(config: ModelConfig) -> ModelConfig:
        ropes = list(config.ropes)
        ropes[index] = replace(ropes[index], **fields)
        return replace(config, ropes=tuple(ropes))

    return plant


def _window(change: int) -> Defect:
    return lambda config: replace(config, layer_window=tuple(w + change if w else 0 for w in config.layer_window))


_EVERYWHERE: dict[str, Defect] = {
    "rope base": lambda config: replace(config, ropes=tuple(replace(rope, base=rope.base * 1.1) for rope in config.ropes)),
    "epsilon": lambda config: replace(config, norm_eps=config.norm_eps * 10),
    "activation": lambda config: replace(config, activation="silu" if config.activation == "gelu_tanh" else "gelu_tanh"),
    "attention scale": lambda config: replace(config, attention_scale=config.attention_scale * 1.01),
}
_WINDOWED: dict[str, Defect] = {
    "window + 1": _window(1),
    "window - 1": _window(-1),
    "no window": lambda config: replace(config, layer_window=(0,) * config.num_layers),
}

_OWN: dict[str, dict[str, Defect]] = {
    "llama3": {
        "no rope scaling": _rope_set(scaling="none"),
        "rope factor": _rope_set(factor=7.0),
        "rope low_freq_factor": _rope_set(low_freq_factor=1.5),
        "rope high_freq_factor": _rope_set(high_freq_factor=3.0),
        "rope original_max_position": _rope_set(original_max_position=32),
    },
    "llama-biases": {
        "qkv bias off": _set(qkv_bias=False),
        "output bias off": _set(output_bias=False),
        "mlp bias off": _set(mlp_bias=False),
    },
    "llama-linear": {"no rope scaling": _rope_set(scaling="none"), "rope factor": _rope_set(factor=3.9)},
    "llama-yarn": {
        "no rope scaling": _rope_set(scaling="none"),
        "rope factor": _rope_set(factor=3.9),
        "rope attention_factor": _rope_set(attention_factor=1.0),
        "rope beta_fast": _rope_set(beta_fast=4.0),
        "rope beta_slow": _rope_set(beta_slow=0.1),
        "rope truncate": _rope_set(truncate=False),
        "rope original_max_position": _rope_set(original_max_position=64),
        "linear for yarn": _rope_set(scaling="linear"),
    },
    "mistral": _WINDOWED,
    "qwen2": {"qkv bias off": _set(qkv_bias=False)},
    "qwen2-window": _WINDOWED
    | {"window in every layer": lambda config: replace(config, layer_window=(8,) * config.num_layers)},
    "qwen3": {"qk norm off": _set(qk_norm=False)},
    "gemma3": _WINDOWED
    | {
        "qk norm off": _set(qk_norm=False),
        "norm offset off": _set(norm_offset=0.0),
        "sandwich norms off": _set(sandwich_norms=False),
        "embedding scale off": _set(embedding_scale=1.0),
        "attention scale from head_dim": _set(attention_scale=0.0),
        "no rope scaling": _rope_set(0, scaling="none"),
        "local rope base": _rope_set(1, base=1e6),
        "ropes exchanged": lambda config: replace(config, layer_rope=tuple(1 - i for i in config.layer_rope)),
        "pattern shifted": lambda config: replace(
            config,
            layer_window=config.layer_window[1:] + config.layer_window[:1],
            layer_rope=config.layer_rope[1:] + config.layer_rope[:1],
        ),
    },
}

DEFECTS = {family: _EVERYWHERE | _OWN.get(family, {}) for family in FAMILIES}
"""family → name of a defect → how to plant it in a correct configuration."""
