"""A model in a GGUF file: metadata → ModelConfig, tensors → canonical entries.

What GGUF stores differently is undone here: Llama's q and k rows are permuted, and Gemma's norms are stored as w + 1.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.config import ModelConfig, Rope
from common.errors import ConfigError, nearest_hint, shown
from common.model.rope import inverse_frequencies
from common.weights.config_json import MAX_LAYERS
from common.weights.entry import Entry, map_tensor
from common.weights.gguf_parts import open_parts

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
"""`general.architecture` values understood here. Mistral is stored as llama."""

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
_GEMMA_LAYER_NAMES = _LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ROPE_FACTORS = "rope_freqs.weight"


def load_gguf(path: Path) -> tuple[ModelConfig, dict[str, Entry]]:
    """Return the configuration and the lazy canonical entries of a GGUF model, in one file or in parts.

    Raises CheckpointError or ConfigError."""
    parts = open_parts(path)
    metadata = parts[0].header.metadata
    stored = {tensor.name: (tensor, part) for part in parts for tensor in part.header.tensors}
    data = {
        name: map_tensor(part.file, tensor.offset, tensor.shape, tensor.encoding) for name, (tensor, part) in stored.items()
    }
    factors = data.pop(_ROPE_FACTORS, None)
    try:
        config = model_config_from_metadata(metadata, data, factors)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    architecture = metadata["general.architecture"]
    entries = {}
    for stored_name, array in data.items():
        tensor, part = stored[stored_name]
        name = canonical_name(stored_name, architecture)
        entries[name] = Entry(
            name=name,
            shape=tensor.shape,
            encoding=tensor.encoding,
            stored=array,
            source=part.path,
            row_order=_row_order(name, tensor.shape[0], config) if architecture == "llama" else None,
            addend=-1.0 if architecture == "gemma3" and name.endswith("norm.weight") else 0.0,
        )
    return config, entries


def canonical_name(stored_name: str, architecture: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; an unknown name stays as it is."""
    names = _GEMMA_LAYER_NAMES if architecture == "gemma3" else _LAYER_NAMES
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", stored_name)
    if match and match[2] in names:
        return f"model.layers.{int(match[1])}.{names[match[2]]}.{match[3]}"
    return _NAMES.get(stored_name, stored_name)


def model_config_from_metadata(
    metadata: dict[str, Any], tensor_names: Collection[str] = (), rope_factors: np.ndarray | None = None
) -> ModelConfig:
    """Return the ModelConfig of GGUF metadata. Raises ConfigError.

    The names of the tensors show what the metadata omits: a separate head, biases. `rope_factors`, float32 [H/2], are the
    divisors of RoPE frequencies in the file.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        hint = nearest_hint(str(architecture), ARCHITECTURES)
        raise ConfigError(
            f"GGUF architecture {shown(architecture)} is not supported.{hint} Supported: {', '.join(ARCHITECTURES)}."
        )
    get = _Metadata(metadata, architecture)
    heads, hidden = get.whole("attention.head_count"), get.whole("embedding_length")
    layers = get.whole("block_count", most=MAX_LAYERS)
    head_dim = get.whole("attention.key_length", hidden // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if get.whole(key, head_dim) != head_dim:
            raise ConfigError(f"{get.name(key)} must equal the head dimension {head_dim}, got {get.whole(key)}.")
    gemma = architecture == "gemma3"
    window = get.whole("attention.sliding_window", 0)
    sliding = tuple(bool((i + 1) % 6) for i in range(layers)) if gemma else (window > 0,) * layers
    rope = _rope(get)
    if rope_factors is not None:
        rope = _with_llama3_factors(rope, head_dim, rope_factors)
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    eos = (get.token_id("eos"), get.token_id("eot"))
    return ModelConfig(
        family=architecture,
        vocab_size=get.whole("vocab_size", len(tokens) or None),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=get.whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=get.whole("feed_forward_length"),
        max_position=get.whole("context_length"),
        norm_eps=get.number("attention.layer_norm_rms_epsilon"),
        activation="gelu_tanh" if gemma else "silu",
        tie_embeddings="output.weight" not in tensor_names,
        qkv_bias="blk.0.attn_q.bias" in tensor_names,
        output_bias="blk.0.attn_output.bias" in tensor_names,
        mlp_bias="blk.0.ffn_gate.bias" in tensor_names,
        qk_norm=architecture in ("qwen3", "gemma3"),
        sandwich_norms=gemma,
        norm_offset=1.0 if gemma else 0.0,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        # Gemma 3 27B alone scales by its hidden size over its heads; the file has no field for it.
        attention_scale=(hidden / heads) ** -0.5 if gemma and layers == 62 else 0.0,
        ropes=(rope, Rope(base=get.number("rope.freq_base_swa", 10_000.0))) if gemma else (rope,),
        layer_rope=tuple(map(int, sliding)) if gemma else (),
        layer_window=tuple(window if slides else 0 for slides in sliding),
        bos_token_id=get.token_id("bos"),
        eos_token_ids=tuple(dict.fromkeys(token for token in eos if token is not None)),
    )


class _Metadata:
    """Typed look-ups under the prefix of an architecture."""

    def __init__(self, metadata: dict[str, Any], architecture: str) -> None:
        self.metadata, self.architecture = metadata, architecture

    def name(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def whole(self, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        return self._whole(self.name(key), default, most)

    def token_id(self, kind: str) -> int | None:
        key = f"tokenizer.ggml.{kind}_token_id"
        return self._whole(key, None, 2**31 - 1) if key in self.metadata else None

    def _whole(self, key: str, default: int | None, most: int) -> int:
        value = self.metadata.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise ConfigError(f"GGUF metadata {key!r} must be a whole number in [0, {most}], got {shown(value)}.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Files hold float32: 1e-05 comes out as 9.999999747378752e-06, and is given back as the 1e-05 that was meant."""
        value = self.metadata.get(self.name(key), default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"GGUF metadata {self.name(key)!r} must be a number, got {shown(value)}.")
        return float(str(np.float32(value)))

    def text(self, key: str, default: str) -> str:
        return str(self.metadata.get(self.name(key), default))


def _rope(get: _Metadata) -> Rope:
    """RoPE of the full-attention layers."""
    base, kind = get.number("rope.freq_base", 10_000.0), get.text("rope.scaling.type", "none")
    if kind == "none":
        return Rope(base=base)
    factor = get.number("rope.scaling.factor", 1.0)
    if kind == "linear":
        return Rope(base=base, scaling="linear", factor=factor)
    if kind == "yarn" and get.number("rope.scaling.attn_factor", 1.0) == 1.0:
        return Rope(
            base=base,
            scaling="yarn",
            factor=factor,
            original_max_position=get.whole("rope.scaling.original_context_length"),
            beta_fast=get.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=get.number("rope.scaling.yarn_beta_slow", 1.0),
        )
    raise ConfigError(
        f"GGUF RoPE scaling {shown(kind)} with these settings is not supported. Supported: none, linear, yarn, llama3."
    )


def _with_llama3_factors(rope: Rope, head_dim: int, factors: np.ndarray) -> Rope:
    """Return the llama3 scaling whose divisors, one per frequency, equal `factors`. Raises ConfigError if none fits.

    Every release of Llama 3 ramps between 1 and 4 turns of 8,192 positions. So the largest divisor determines the scaling.
    """
    scaled = replace(
        rope,
        scaling="llama3",
        factor=float(factors.max()),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=8192,
    )
    expected = inverse_frequencies(rope, head_dim) / inverse_frequencies(scaled, head_dim)
    if rope.scaling != "none" or factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ConfigError(
            f"{_ROPE_FACTORS} holds frequency factors that are not those of Llama 3.1 to 3.3 (LongRoPE, perhaps), "
            "and no other set is supported."
        )
    return scaled


def _row_order(name: str, rows: int, config: ModelConfig) -> np.ndarray | None:
    """Within each head GGUF interleaves the two halves, (H/2, 2), where Hugging Face keeps them apart, (2, H/2)."""
    if not re.search(r"self_attn\.[qk]_proj\.(weight|bias)$", name) or rows % config.head_dim:
        return None
    return np.arange(rows).reshape(-1, config.head_dim // 2, 2).swapaxes(1, 2).ravel()
