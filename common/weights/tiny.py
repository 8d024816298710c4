"""Tiny models made from a seed: complete Hugging Face directories for fast tests, the same bytes everywhere.

The weights mean nothing, but every feature of their family is at work: grouped queries, QK norm, sliding windows and so on.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from common.errors import CheckpointError
from common.weights.checkpoint import expected_shapes
from common.weights.config_json import model_config_from_json

_VERSION = 1
"""Part of the directory's name: raise it whenever the bytes change."""

_ENGLISH = (
    "Ġt he Ġa in Ġthe on er Ġs re nd Ġo en at Ġw Ġb or it es is Ġc Ġp ed Ġf ou ing Ġin al ar Ġto Ġof Ġm Ġand Ġd ro le as "
    "Ġh ic om il el ent st Ġl Ġn ve et Ġre ion id ll ow ur Ġis us ct ce ly im ul ch"
)
_PIECES = tuple(_ENGLISH.split(" "))
"""Tokens of more than one byte, each made of two that are tokens too."""
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_VOCAB_SIZE = 256 + len(_PIECES) + len(_SPECIAL)
_END_OF_TEXT, _IM_END = _VOCAB_SIZE - 3, _VOCAB_SIZE - 1

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SHARED = {
    "vocab_size": _VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": _END_OF_TEXT,
    "eos_token_id": [_END_OF_TEXT, _IM_END],
    "torch_dtype": "float32",
}
RECIPES: dict[str, dict[str, Any]] = {
    "tiny-llama": _SHARED
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    },
    "tiny-qwen3": _SHARED
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 3,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
    },
    "tiny-gemma3": _SHARED
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window": 16,
        "sliding_window_pattern": 3,
        "tie_word_embeddings": True,
    },
}
"""name → its config.json."""


def write_tiny(name: str, directory: Path) -> Path:
    """Make the model `name` of RECIPES as a sub-directory of `directory`, unless it is there; returns that sub-directory."""
    target = directory / f"{name}-v{_VERSION}"
    if target.exists():
        return target
    try:
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=directory) as scratch:
            work = Path(scratch) / name
            work.mkdir()
            _write(RECIPES[name], work)
            os.rename(work, target)
    except OSError as error:
        if not target.exists():  # else another process was first, with the same bytes
            raise CheckpointError(f"{name} cannot be made in {directory} ({error}). Set TANDEM_CACHE to another.") from error
    return target


def _write(config: dict[str, Any], directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # Written by Python, and not by the libraries: each raises an error of its own where the disk is full.
    (directory / "model.safetensors").write_bytes(save(_weights(config)))
    (directory / "tokenizer.json").write_text(_tokenizer().to_str(pretty=True), encoding="utf-8")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL[0],
        "eos_token": _SPECIAL[2],
        "pad_token": _SPECIAL[0],
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")


def _weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Uniform values from the raw bits of a counter: unlike a normal draw, no library of mathematics is involved."""
    bits = np.random.PCG64(20_260_101)
    model = model_config_from_json(config)
    weights = {}
    for name, shape in expected_shapes(model).items():
        raw = bits.random_raw(int(np.prod(shape))).reshape(shape)
        centred = (raw >> 40).astype(np.float32) * np.float32(2**-23) - np.float32(1)  # [-1, 1) in steps of 2**-23
        if name.endswith("norm.weight"):
            weights[name] = np.float32(1 - model.norm_offset) + np.float32(0.25) * centred
        else:
            # A power of two near sqrt(3 / fan-in) keeps the size of activations through a projection.
            weights[name] = centred * np.float32(2.0 ** -round(np.log2(np.sqrt(shape[-1] / 3))))
    return weights


def _tokenizer() -> Tokenizer:
    """Byte-level BPE: 256 bytes, a few pieces of English, three special tokens. Every id is text."""
    vocabulary = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *_PIECES])}
    merges = []
    for piece in _PIECES:
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges.append(next(pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return tokenizer
