"""Convert a checkpoint to the form that an outside engine reads: a Hugging Face directory or a GGUF file with the same weights.

Both are written from a `Checkpoint` and cached under a hash of it. The written file is opened again. A model that the format
cannot describe is refused, because the outside engine would serve a slightly different model.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.numpy import save_file

from common.config import ModelConfig, Rope, expect
from common.errors import CheckpointError
from common.model.rope import inverse_frequencies
from common.weights.checkpoint import Checkpoint, open_checkpoint
from common.weights.parameters import NUMPY_DTYPES
from common.weights.zoo import cache_directory

_VERSION = 2
"""Part of the name in the cache: raise it whenever the bytes change."""

Writer = Callable[[Checkpoint, str, Path], None]


def hugging_face_directory(checkpoint: Checkpoint, dtype: str) -> Path:
    """A folder of config.json and model.safetensors in `dtype`, without a tokenizer; its own if the checkpoint is a folder.

    Raises `ConfigError` for a model that a config.json cannot describe, `CheckpointError` if it cannot be written."""
    if checkpoint.path.is_dir():
        return checkpoint.path  # its reader rounds the weights to `dtype` just as we would
    return _cached(checkpoint, dtype, "", write_directory)


def gguf_file(checkpoint: Checkpoint, dtype: str) -> Path:
    """A GGUF file with matrices in `dtype`, vectors in float32, and a vocabulary that spells tokens by their ids: those it is
    to be given.

    Raises `ConfigError` for a model that llama.cpp would not compute as it is, `CheckpointError` if it cannot be written."""
    return _cached(checkpoint, dtype, ".gguf", write_gguf)


def _cached(checkpoint: Checkpoint, dtype: str, suffix: str, write: Writer) -> Path:
    """The converted checkpoint, which appears whole or not at all."""
    target = cache_directory() / f"{checkpoint.path.stem}-{dtype}-{digest(checkpoint)}-v{_VERSION}{suffix}"
    if target.exists():
        return target
    try:
        with tempfile.TemporaryDirectory(prefix=".convert-", dir=target.parent) as scratch:
            os.rename(written(checkpoint, dtype, Path(scratch) / target.name, write), target)
    except OSError as error:
        if not target.exists():  # else another process was first, with the same bytes
            raise CheckpointError(
                f"{checkpoint.path} cannot be converted in {target.parent} ({error}). Is the disk full? TANDEM_CACHE moves it."
            ) from error
    return target


def written(checkpoint: Checkpoint, dtype: str, path: Path, write: Writer) -> Path:
    """Write a checkpoint to `path`, open it again, and see that the model is the same. Raises `ConfigError` if it is not."""
    write(checkpoint, dtype, path)
    _expect_same(checkpoint.config, open_checkpoint(path).config, checkpoint.path)
    return path


def digest(checkpoint: Checkpoint) -> str:
    """64-bit hash of the configuration and of every stored byte: equal digests are equal models."""
    state = xxhash.xxh3_64(repr(checkpoint.config).encode())
    for name in checkpoint.names():
        entry = checkpoint[name]
        state.update(f"{name} {entry.shape} {entry.encoding} {entry.addend} {entry.row_order is None}".encode())
        state.update(np.ascontiguousarray(entry.raw()).view(np.uint8).data)
    return state.hexdigest()


def _expect_same(given: ModelConfig, written: ModelConfig, source: Path) -> None:
    """Raise `ConfigError` unless both compute the same; the name of the family and the special tokens change nothing."""
    before, after = (vars(replace(c, family="", bos_token_id=None, eos_token_ids=())) for c in (given, written))
    lost = ", ".join(f"{name} is {value!r}, not {after[name]!r}" for name, value in before.items() if value != after[name])
    expect(not lost, f"{source} cannot be converted for this engine: its format does not say that {lost}.")


# Hugging Face.

_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "mistral": ("MistralForCausalLM", "mistral"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
"""family → the class of transformers, and its `model_type`."""


def write_directory(checkpoint: Checkpoint, dtype: str, directory: Path) -> None:
    """config.json and model.safetensors, all tensors in `dtype`."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_json(checkpoint.config, dtype), indent=2) + "\n", encoding="utf-8")
    tensors = {name: checkpoint[name].dense().astype(NUMPY_DTYPES[dtype]) for name in checkpoint.names()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})  # which transformers insists on


def config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json as transformers 5 spells it, the inverse of `common.weights.config_json`."""
    c, (architecture, model_type) = config, _ARCHITECTURES[config.family]
    window = max(c.layer_window)
    kinds = ["sliding_attention" if each else "full_attention" for each in c.layer_window]
    values: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": dtype,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_position,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": c.qkv_bias,
        "mlp_bias": c.mlp_bias,
        "rope_parameters": _rope_json(c.ropes[0]),
        "bos_token_id": c.bos_token_id,
        "eos_token_id": list(c.eos_token_ids),
    }
    if c.family == "gemma3":
        return values | {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": round(c.attention_scale**-2),  # transformers takes whole numbers only
            "sliding_window": window,
            "layer_types": kinds,
            "rope_parameters": {
                "full_attention": _rope_json(c.ropes[0]),
                "sliding_attention": _rope_json(c.ropes[1]),
            },
        }
    return values | {
        "hidden_act": "silu",
        "sliding_window": window or None,
        "use_sliding_window": window > 0,
        "layer_types": kinds,
    }


def _rope_json(rope: Rope) -> dict[str, Any]:
    common: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.base}
    if rope.scaling == "none":
        return common
    common |= {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "linear":
        return common
    common["original_max_position_embeddings"] = rope.original_max_position
    if rope.scaling == "llama3":
        return common | {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    yarn = {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    return common | yarn | ({} if rope.attention_factor is None else {"attention_factor": rope.attention_factor})


# GGUF.

_GGUF_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3"}
_STORED = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
_STORED_GEMMA = _STORED | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_gguf(checkpoint: Checkpoint, dtype: str, path: Path) -> None:
    """The metadata is made from the configuration alone, so that one way serves every source."""
    config = checkpoint.config
    expect(
        config.family == "gemma3" or not any(config.layer_window),
        f"{checkpoint.path} has sliding windows, which llama.cpp computes for Gemma 3 alone among the families known here.",
    )
    architecture = _GGUF_ARCHITECTURES[config.family]
    writer = GGUFWriter(path, architecture)
    _add_metadata(writer, config, architecture)
    rope = config.ropes[0]
    if rope.scaling == "llama3":  # told as what each frequency is divided by
        plain = inverse_frequencies(replace(rope, scaling="none"), config.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / inverse_frequencies(rope, config.head_dim)).astype(np.float32))
    for name in checkpoint.names():
        tensor = checkpoint[name].dense()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = _interleaved(tensor, config.head_dim)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            tensor += np.float32(1)
        if tensor.ndim == 1 or dtype == "float32":  # llama.cpp has vectors in float32 only
            writer.add_tensor(_stored_name(name, architecture), tensor)
        else:
            rounded = tensor.astype(NUMPY_DTYPES[dtype]).view(np.uint8)
            writer.add_tensor(_stored_name(name, architecture), rounded, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: GGUFWriter, config: ModelConfig, architecture: str) -> None:
    c, rope = config, config.ropes[0]
    writer.add_block_count(c.num_layers)
    writer.add_context_length(c.max_position)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.vocab_size)
    # llama-server aborts at the first token of a file without a vocabulary. Of the kinds that it knows this one has no end of
    # text: where ends are to be ignored it forbids them, and so would choose other tokens.
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([f"{token} " for token in range(c.vocab_size)])
    writer.add_rope_freq_base(rope.base)
    if c.family == "gemma3":
        writer.add_sliding_window(max(c.layer_window))
        writer.add_float32(f"{architecture}.rope.freq_base_swa", c.ropes[1].base)
    if rope.scaling in ("linear", "yarn"):
        writer.add_string(f"{architecture}.rope.scaling.type", rope.scaling)
        writer.add_rope_scaling_factor(rope.factor)
    if rope.scaling == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position)
        writer.add_float32(f"{architecture}.rope.scaling.yarn_beta_fast", rope.beta_fast)
        writer.add_float32(f"{architecture}.rope.scaling.yarn_beta_slow", rope.beta_slow)


def _interleaved(tensor: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from two halves, (2, H/2), to pairs, (H/2, 2): how GGUF stores q and k of the llama architecture."""
    halves = tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)


def _stored_name(name: str, architecture: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` → `blk.3.attn_q.weight`."""
    names = _STORED_GEMMA if architecture == "gemma3" else _STORED
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{names[rest]}.{kind}"
    return f"{names[stem]}.{kind}"
