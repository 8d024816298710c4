"""config.json of a Hugging Face checkpoint → ModelConfig, in both spellings: before and since transformers 5.

Only the fields named here are read. Anything that names code (`auto_map`, `_target_`, …) is never looked at, and anything that
would change what the model computes and is not supported is refused.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from common.config import ModelConfig, Rope, expect
from common.errors import ConfigError, nearest_hint, quoted
from common.model.rope import yarn_magnitude

Json = dict[str, Any]

MAX_LAYERS = 4096
"""As in ModelConfig; checked before anything is made per layer."""
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
)  # fmt: skip
_MUST_BE_UNSET = (
    "quantization_config", "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention",
)  # fmt: skip


@dataclass(frozen=True)
class _Family:
    """What the class of a model fixes, and its defaults for what a config.json may leave out."""

    name: str
    rope_base: float = 10_000.0
    head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    activation: str = "silu"
    tied: bool = False


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama"),
    "MistralForCausalLM": _Family("mistral"),
    "Qwen2ForCausalLM": _Family("qwen2"),
    "Qwen3ForCausalLM": _Family("qwen3", head_dim=128),
    "Gemma3ForCausalLM": _Family("gemma3", rope_base=1e6, head_dim=256, activation="gelu_pytorch_tanh", tied=True),
}
ARCHITECTURES = tuple(_FAMILIES)


def model_config_from_json(data: Json) -> ModelConfig:
    """ModelConfig of the content of a config.json. Raises ConfigError: what was expected, what came."""
    family = _family(data)
    missing = [name for name in _REQUIRED if data.get(name) is None]
    if missing:
        raise ConfigError(f"The fields {', '.join(missing)} are missing.")
    for name in _MUST_BE_UNSET:
        if data.get(name):
            raise ConfigError(
                f"{name} is set to {quoted(data[name])}, which is not supported: it must be absent, null or false."
            )
    hidden, heads = _whole(data, "hidden_size"), _whole(data, "num_attention_heads")
    layers = _whole(data, "num_hidden_layers", most=MAX_LAYERS)
    gemma = family.name == "gemma3"
    activation = _text(data, "hidden_activation" if gemma else "hidden_act", family.activation)
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"Activation {quoted(activation)} is not supported. Supported: {', '.join(_ACTIVATIONS)}.")
    windows = _windows(data, family, layers)
    ropes = _ropes(data, family)
    attention_bias = _flag(data, "attention_bias", False) if family.name in ("llama", "qwen3", "gemma3") else False
    return ModelConfig(
        family=family.name,
        vocab_size=_whole(data, "vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_whole(data, "num_key_value_heads", heads),
        head_dim=_whole(data, "head_dim", family.head_dim or hidden // max(heads, 1)),
        intermediate_size=_whole(data, "intermediate_size"),
        max_position=_whole(data, "max_position_embeddings"),
        norm_eps=_number(data, "rms_norm_eps", 1e-6),
        activation="gelu_tanh" if _ACTIVATIONS[activation] == "gelu_tanh" else "silu",
        tie_embeddings=_flag(data, "tie_word_embeddings", family.tied),
        qkv_bias=attention_bias or family.name == "qwen2",
        output_bias=attention_bias,
        mlp_bias=_flag(data, "mlp_bias", False) if family.name == "llama" else False,
        qk_norm=family.name in ("qwen3", "gemma3"),
        sandwich_norms=gemma,
        norm_offset=1.0 if gemma else 0.0,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        attention_scale=_attention_scale(data) if gemma else 0.0,
        ropes=ropes,
        layer_rope=tuple(int(window > 0) for window in windows) if gemma else (),
        layer_window=windows,
        bos_token_id=_whole(data, "bos_token_id") if data.get("bos_token_id") is not None else None,
        eos_token_ids=token_ids(data, "eos_token_id"),
    )


def token_ids(data: Json, name: str) -> tuple[int, ...]:
    """A field that holds one token id, a list of them, or nothing."""
    value = data.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        _whole({name: token}, name)
    return tuple(ids)


def _family(data: Json) -> _Family:
    named = data.get("architectures")
    name = named[0] if isinstance(named, list) and len(named) == 1 else named
    if not isinstance(name, str) or name not in _FAMILIES:
        hint = nearest_hint(str(name), ARCHITECTURES)
        raise ConfigError(f"Architecture {quoted(name)} is not supported.{hint} Supported: {', '.join(ARCHITECTURES)}.")
    return _FAMILIES[name]


def _windows(data: Json, family: _Family, layers: int) -> tuple[int, ...]:
    """Keys that each layer sees, 0 for all. transformers 5 lists `layer_types`; before it each family had its own rule."""
    if family.name == "llama":
        return (0,) * layers
    window = _whole(data, "sliding_window", 4096) if data.get("sliding_window", 4096) is not None else 0
    if family.name == "mistral":
        return (window,) * layers
    if family.name != "gemma3" and not _flag(data, "use_sliding_window", False):
        window = 0
    kinds = data.get("layer_types")
    if kinds is None and family.name == "gemma3":
        pattern = _whole(data, "sliding_window_pattern", 6)
        if pattern < 1:
            raise ConfigError(f"sliding_window_pattern must be positive, got {pattern}.")
        kinds = [_kind((i + 1) % pattern != 0) for i in range(layers)]
    elif kinds is None:
        first = _whole(data, "max_window_layers", 28)
        kinds = [_kind(i >= first) for i in range(layers)]
    known = _kind(True), _kind(False)
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
        raise ConfigError(
            f"layer_types must name {_kind(True)} or {_kind(False)} for each of {layers} layers, got {quoted(kinds)}."
        )
    if family.name == "gemma3" and window < 1:
        raise ConfigError(f"sliding_window must be a positive integer, got {quoted(data.get('sliding_window'))}.")
    return tuple(window if kind == _kind(True) else 0 for kind in kinds)


def _kind(slides: bool) -> str:
    return "sliding_attention" if slides else "full_attention"


def _ropes(data: Json, family: _Family) -> tuple[Rope, ...]:
    """The RoPE of every layer, or for Gemma 3 those of its full and of its sliding layers."""
    base = _number(data, "rope_theta", family.rope_base)
    parameters = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ConfigError(f"RoPE parameters must be an object, got {quoted(parameters)}.")
    if family.name != "gemma3":
        nested = [parameters[kind] for kind in (_kind(False), _kind(True)) if kind in parameters]
        if any(each != nested[0] for each in nested):
            raise ConfigError("RoPE that differs between kinds of layers is supported for Gemma 3 only.")
        return (_rope(data, nested[0] if nested else parameters, base),)
    local_base = _number(data, "rope_local_base_freq", 10_000.0)
    if _kind(False) in parameters or _kind(True) in parameters:
        full, sliding = parameters.get(_kind(False)), parameters.get(_kind(True))
    else:
        full, sliding = parameters, None  # the older spelling scales the full layers only
    return _rope(data, full or {}, base), _rope(data, sliding or {}, local_base)


def _rope(data: Json, parameters: Json, base: float) -> Rope:
    if not isinstance(parameters, dict):
        raise ConfigError(f"RoPE parameters must be an object, got {quoted(parameters)}.")
    kind = _text(parameters, "rope_type", _text(parameters, "type", "default"))
    base = _number(parameters, "rope_theta", base)
    for source in (data, parameters):
        if _number(source, "partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError("partial_rotary_factor must be 1: rotating a part of each head is not supported.")
    if kind == "default":
        return Rope(base=base)
    if kind not in ("linear", "llama3", "yarn"):
        hint = nearest_hint(kind, ("linear", "llama3", "yarn"))
        raise ConfigError(f"RoPE scaling {quoted(kind)} is not supported.{hint} Supported: default, linear, llama3, yarn.")
    original = _whole(data, "original_max_position_embeddings", 0) or _whole(
        parameters, "original_max_position_embeddings", _whole(data, "max_position_embeddings")
    )
    if kind == "yarn" and parameters.get("factor") is None:
        factor = _whole(data, "max_position_embeddings") / max(original, 1)
    else:
        factor = _number(parameters, "factor")
    if kind == "linear":
        return Rope(base=base, scaling="linear", factor=factor)
    if kind == "llama3":
        return Rope(
            base=base,
            scaling="llama3",
            factor=factor,
            low_freq_factor=_number(parameters, "low_freq_factor"),
            high_freq_factor=_number(parameters, "high_freq_factor"),
            original_max_position=original,
        )
    return Rope(
        base=base,
        scaling="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=_number(parameters, "beta_fast", 32.0),
        beta_slow=_number(parameters, "beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(parameters, factor),
        truncate=_flag(parameters, "truncate", True),
    )


def _yarn_attention_factor(parameters: Json, factor: float) -> float | None:
    """Given outright, or as the ratio of two magnitudes (DeepSeek's mscale and mscale_all_dim), or left to the rule."""
    if parameters.get("attention_factor") is not None:
        return _number(parameters, "attention_factor")
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        above, below = _number(parameters, "mscale"), _number(parameters, "mscale_all_dim")
        return yarn_magnitude(factor, above) / yarn_magnitude(factor, below)
    return None


def _whole(data: Json, name: str, default: int | None = None, most: int = 2**31 - 1) -> int:
    value = default if data.get(name) is None else data[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ConfigError(f"{name} must be a whole number in [0, {most}], got {quoted(value)}.")
    return value


def _number(data: Json, name: str, default: float | None = None) -> float:
    value = default if data.get(name) is None else data[name]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{name} must be a number, got {quoted(value)}.")
    if not abs(value) <= sys.float_info.max:  # before it is a float: an integer may have any number of digits
        raise ConfigError(f"{name} must be a finite number, got {quoted(value)}.")
    return float(value)


def _attention_scale(data: Json) -> float:
    """Gemma's: of any size whose inverse root float32 has too."""
    value = _number(data, "query_pre_attn_scalar", 256.0)
    expect(1e-30 <= value <= 1e30, f"query_pre_attn_scalar must lie in [1e-30, 1e30], got {value}.")
    return value**-0.5


def _flag(data: Json, name: str, default: bool) -> bool:
    value = default if data.get(name) is None else data[name]
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {quoted(value)}.")
    return value


def _text(data: Json, name: str, default: str) -> str:
    value = default if data.get(name) is None else data[name]
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be a string, got {quoted(value)}.")
    return value
