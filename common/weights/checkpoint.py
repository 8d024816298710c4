"""A checkpoint: a configuration and lazy, canonically named tensors that fit it, whatever the file format.

`open_checkpoint` reads headers only and checks every name and shape, so that whatever comes after can rely on both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import EngineConfig, ModelConfig
from common.errors import CheckpointError, nearest_hint
from common.weights.entry import Entry
from common.weights.gguf import load_gguf
from common.weights.hf import load_directory

MOST_SHOWN = 50
"""Tensors that one message names."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Immutable; `checkpoint[name]` is an Entry, `checkpoint.names()` are those of `expected_shapes(config)`."""

    path: Path
    config: ModelConfig
    entries: Mapping[str, Entry]

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", _checked(self.path, self.config, self.entries))

    def names(self) -> tuple[str, ...]:
        return tuple(self.entries)

    def engine_config(self, **options: Any) -> EngineConfig:
        """Return the `EngineConfig` of loose options, with the dtype in any of vLLM's spellings.

        `auto` is float16 where most weights are stored in it, else bfloat16. `half` and `float` are float16 and float32.
        """
        match options.get("dtype"):
            case "auto":
                halves = sum(math.prod(entry.shape) for entry in self.entries.values() if entry.encoding == "F16")
                total = sum(math.prod(entry.shape) for entry in self.entries.values())
                options["dtype"] = "float16" if 2 * halves > total else "bfloat16"
            case "half":
                options["dtype"] = "float16"
            case "float":
                options["dtype"] = "float32"
        return EngineConfig.of(**options)

    def __getitem__(self, name: str) -> Entry:
        if name not in self.entries:
            raise CheckpointError(f"{self.path} has no tensor {name!r}.{nearest_hint(name, self.entries)}")
        return self.entries[name]


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a GGUF file, or a Hugging Face directory: config.json beside model.safetensors or its shards and their index.

    Raises ConfigError for a model that is described wrongly or not supported. Raises CheckpointError for missing or damaged
    files, and for tensors that do not fit the description, with their number and the first of them.
    """
    path = Path(path)
    if path.is_dir():
        return Checkpoint(path, *load_directory(path))
    if not path.exists():
        raise CheckpointError(f"{path} does not exist. Give a Hugging Face directory or a .gguf file.")
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path} is not a checkpoint: expected a .gguf file, or the directory that holds config.json.")
    return Checkpoint(path, *load_gguf(path))


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name → logical shape of every tensor that a model of this configuration has."""
    c, heads, kv_heads = config, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    if c.has_table:
        shapes["model.embed_tokens.weight"] = (c.vocab_size, c.hidden_size)
    projections = {
        "self_attn.q_proj": (heads, c.hidden_size, c.qkv_bias),
        "self_attn.k_proj": (kv_heads, c.hidden_size, c.qkv_bias),
        "self_attn.v_proj": (kv_heads, c.hidden_size, c.qkv_bias),
        "self_attn.o_proj": (c.hidden_size, heads, c.output_bias),
        "mlp.gate_proj": (c.intermediate_size, c.hidden_size, c.mlp_bias),
        "mlp.up_proj": (c.intermediate_size, c.hidden_size, c.mlp_bias),
        "mlp.down_proj": (c.hidden_size, c.intermediate_size, c.mlp_bias),
    }
    norms = {"input_layernorm": c.hidden_size, "post_attention_layernorm": c.hidden_size}
    if c.sandwich_norms:
        norms |= {"pre_feedforward_layernorm": c.hidden_size, "post_feedforward_layernorm": c.hidden_size}
    if c.qk_norm:
        norms |= {"self_attn.q_norm": c.head_dim, "self_attn.k_norm": c.head_dim}
    for layer in range(c.num_layers):
        prefix = f"model.layers.{layer}"
        for name, (out, into, bias) in projections.items():
            shapes[f"{prefix}.{name}.weight"] = (out, into)
            if bias:
                shapes[f"{prefix}.{name}.bias"] = (out,)
        for name, size in norms.items():
            shapes[f"{prefix}.{name}.weight"] = (size,)
    if c.predicts:
        shapes["model.norm.weight"] = (c.hidden_size,)
    if c.predicts and not c.tie_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    return shapes


def _checked(path: Path, config: ModelConfig, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The expected entries in their canonical order; raises CheckpointError with how many do not fit, and the first of them."""
    expected = expected_shapes(config)
    # Unexpected tensors first: they are rarer than missing ones and explain more.
    problems = [
        f"unexpected {name} {entries[name].shape}" for name in entries if name not in expected and not _harmless(name, config)
    ]
    for name, shape in expected.items():
        if name not in entries:
            problems.append(f"missing {name} {shape}")
        elif entries[name].shape != shape:
            problems.append(f"{name} has shape {entries[name].shape}, expected {shape}")
    if problems:
        more = len(problems) - MOST_SHOWN
        raise CheckpointError(
            f"{path}: {len(problems)} tensor(s) do not fit the {config.family} model that its configuration describes:\n  "
            + "\n  ".join(problems[:MOST_SHOWN] + [f"and {more} more"] * (more > 0))
        )
    return {name: entries[name] for name in expected}


def _harmless(name: str, config: ModelConfig) -> bool:
    """Stored by some tools although nothing reads it: RoPE's frequencies, and the head of a model that ties it."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight")
