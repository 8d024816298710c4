"""Configuration as frozen dataclasses, checked as they are built. A value that passed here is not checked again.

`ModelConfig` describes what a model computes. It comes from a checkpoint (`config.json` or GGUF metadata), never from a user.
`EngineConfig` describes how it is served. It comes from Hydra, the command line or keyword arguments.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

from common.errors import ConfigError, nearest_hint, shown
from common.unsupported import why_left_out

Dtype = Literal["float32", "bfloat16", "float16"]
ITEMSIZES: Mapping[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element."""
Kernels = Literal["auto", "native", "framework"]
Schedule = Literal["continuous", "static"]
Cache = Literal["paged", "dense"]
Routing = Literal["prefix", "round_robin"]
MAX_RANKS = 64
"""That share out one model."""
MAX_REPLICAS = 64


def expect(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds. Not an assert: it must survive `python -O`."""
    if not condition:
        raise ConfigError(message)


def whole(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether it is an integer in [low, high]. True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def real(value: Any, low: float = -sys.float_info.max, high: float = sys.float_info.max) -> bool:
    """Whether it is a number in [low, high], finite unless infinity is allowed. NaN lies in no range."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding of one kind of layer (Su et al. 2021, arXiv:2104.09864) and its context extension.

    `linear` divides every frequency by `factor`. `llama3` does so only for long wavelengths, with a smooth ramp between
    (Llama 3.1). `yarn` ramps between interpolation and extrapolation and scales q and k (Peng et al. 2023, arXiv:2309.00071).
    """

    base: float = 10_000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """Magnitude of the yarn cos and sin tables; None takes `0.1 ln(factor) + 1`."""
    truncate: bool = True
    """Whether yarn rounds its ramp's ends to whole dimensions."""

    def __post_init__(self) -> None:
        expect(math.isfinite(self.base) and self.base > 0, f"RoPE base must be finite and > 0, got {self.base}.")
        expect(
            math.isfinite(self.factor) and self.factor > 0, f"RoPE scaling factor must be finite and > 0, got {self.factor}."
        )
        if self.scaling == "yarn":
            ramp = self.base > 1 and all(math.isfinite(beta) and beta > 0 for beta in (self.beta_fast, self.beta_slow))
            expect(
                ramp,
                f"yarn RoPE scaling needs base > 1 and finite beta_fast, beta_slow > 0, "
                f"got {self.base}, {self.beta_fast} and {self.beta_slow}.",
            )
            factor = self.attention_factor
            # Beyond it float32 may hold no score: q and k are each multiplied by it.
            expect(factor is None or 0 < factor <= 1e6, f"yarn attention_factor must lie in (0, 1e6], got {factor}.")
        if self.scaling in ("llama3", "yarn"):
            expect(
                self.original_max_position > 0,
                f"RoPE scaling {self.scaling!r} needs original_max_position > 0, got {self.original_max_position}.",
            )
        if self.scaling == "llama3":
            expect(
                0 < self.low_freq_factor < self.high_freq_factor,
                f"llama3 RoPE scaling needs 0 < low_freq_factor < high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}.",
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a decoder computes. One set of switches covers Llama 2/3, SmolLM2, Mistral, Qwen2, Qwen3 and Gemma 3."""

    family: str
    vocab_size: int  # V
    hidden_size: int  # D
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    intermediate_size: int  # F
    max_position: int
    norm_eps: float
    activation: Literal["silu", "gelu_tanh"] = "silu"
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm over each head of q and k before RoPE (Qwen3, Gemma 3)."""
    sandwich_norms: bool = False
    """A second norm after attention and after the MLP, before each residual add (Gemma 3)."""
    norm_offset: float = 0.0
    """Added to every norm weight: Gemma stores w for a norm that multiplies by 1 + w."""
    embedding_scale: float = 1.0
    """Multiplies embeddings after rounding to the model's dtype (Gemma: sqrt(D))."""
    attention_scale: float = 0.0
    """Multiplies q·k; 0 takes head_dim ** -0.5."""
    ropes: tuple[Rope, ...] = (Rope(),)
    layer_rope: tuple[int, ...] = ()
    """Which of `ropes` each layer uses; empty means the first everywhere."""
    layer_window: tuple[int, ...] = ()
    """How many keys, itself included, a query of each layer sees; 0 is all of them; empty means all everywhere."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    embeds: bool = True
    """Whether it begins with tokens: else with the residual stream of the stage before it."""
    predicts: bool = True
    """Whether it ends with logits: else with its residual stream."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"):
            value = getattr(self, name)
            expect(isinstance(value, int) and 0 < value < 2**31, f"{name} must be a positive integer, got {value!r}.")
        expect(self.num_layers <= 4096, f"num_layers must be at most 4096, got {self.num_layers}.")
        expect(self.max_position > 0, f"max_position must be positive, got {self.max_position}.")
        expect(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}.",
        )
        expect(self.head_dim % 2 == 0, f"head_dim must be even for rotary embeddings, got {self.head_dim}.")
        expect(0 < self.norm_eps < 1, f"norm_eps must lie in (0, 1), got {self.norm_eps}.")
        scale = self.attention_scale
        expect(
            isinstance(scale, (int, float)) and math.isfinite(scale) and scale >= 0,
            f"attention_scale must be a finite number ≥ 0, got {scale!r}.",
        )
        for token in (self.bos_token_id, *self.eos_token_ids):
            expect(
                token is None or 0 <= token < self.vocab_size,
                f"bos and eos token ids must lie in the vocabulary [0, {self.vocab_size}), got {token}.",
            )
        object.__setattr__(self, "attention_scale", scale or self.head_dim**-0.5)
        object.__setattr__(self, "layer_rope", self.layer_rope or (0,) * self.num_layers)
        object.__setattr__(self, "layer_window", self.layer_window or (0,) * self.num_layers)
        for name in ("layer_rope", "layer_window"):
            got = len(getattr(self, name))
            expect(got == self.num_layers, f"{name} must name each of the {self.num_layers} layers, got {got}.")
        expect(all(0 <= i < len(self.ropes) for i in self.layer_rope), f"layer_rope must index the {len(self.ropes)} ropes.")
        expect(all(w >= 0 for w in self.layer_window), "layer_window must not be negative.")

    @property
    def queries_per_kv(self) -> int:
        """N / K: how many query heads share one key and value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def has_table(self) -> bool:
        """Whether the embedding is among its tensors: a tied LM head is one too."""
        return self.embeds or (self.predicts and self.tie_embeddings)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a model is served. The names are the ones vLLM users know, where vLLM has one."""

    dtype: Dtype = "bfloat16"
    """Of weights, activations and KV. `float16` has no native kernels."""
    kernels: Kernels = "auto"
    """The implementation of a step: `native` (one C++ source for both engines), `framework` (its own operations), or `auto`.

    `auto` takes `native` where possible. If it takes `framework`, the log states the reason.
    """
    device: str = "auto"
    """Where it computes: auto, cpu, cuda, rocm, xpu or tpu."""
    compile: bool = False
    """Run the PyTorch step under torch.compile. The JAX step is always compiled, so that its engine refuses it."""
    seed: int = 0
    """Draws the seed of each request that brings none."""
    block_size: int = 16
    """B: tokens a page."""
    num_blocks: int | None = None
    """Pages the scheduler may use, the null page included; None sizes it from max_num_seqs and memory."""
    max_model_len: int | None = None
    """Longest prompt plus output, in tokens. None takes the model's limit, or what the KV pool holds where that is less."""
    max_num_seqs: int = 64
    """Requests that run at once."""
    max_num_batched_tokens: int = 512
    """Tokens that a step computes at most."""
    max_waiting: int | None = None
    """Requests that may wait for others to end; while as many do, further ones are refused with `QueueFullError`. The n choices
    of one count once. None: no limit."""
    schedule: Schedule = "continuous"
    """`continuous`: a request joins as soon as there is room. `static`: once all of the batch before it have ended."""
    cache: Cache = "paged"
    """`paged`: a request takes pages as it grows. `dense`: at its start all it can ever need, as a contiguous cache would."""
    enable_prefix_caching: bool = True
    """Whether requests share the pages of what their prompts begin with alike."""
    enable_chunked_prefill: bool = True
    """false: a prompt is computed in one step, and one that is longer than max_num_batched_tokens is refused."""
    threads: int | None = None
    """Compute threads; None takes the cores that this process may use.

    With native kernels, engines of one process may have different numbers. With `kernels=framework`, JAX keeps the first number
    of a process, and PyTorch takes the last.
    """
    tensor_parallel_size: int = 1
    """Ranks that share out every matrix of the model, and the compute threads: devices of one process in JAX, processes in
    PyTorch."""
    pipeline_parallel_size: int = 1
    """Stages that share out the model's layers, each of so many ranks, and the compute threads. As many steps are in flight,
    each of a share of the requests."""
    data_parallel_size: int = 1
    """Replicas of the engine, each a process with a model and pages of its own; they share the compute threads. All other
    numbers are of each of them, but for `max_waiting`."""
    prefill_parallel_size: int = 0
    """Number of engines that only compute prompts, in processes of their own.

    The `data_parallel_size` others continue the requests. With 0 each engine computes the prompts of its own requests.
    """
    prefill_backend: str | None = None
    """Of the engines that compute prompts alone; None takes the same as for the others."""
    routing: Routing = "prefix"
    """Which replica gets a request. `prefix`: the one with the least to do, in which cached prefixes count. `round_robin`: each
    in turn."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", get_args(Dtype)),
            ("kernels", get_args(Kernels)),
            ("schedule", get_args(Schedule)),
            ("cache", get_args(Cache)),
            ("routing", get_args(Routing)),
        ):
            value = getattr(self, name)
            known = isinstance(value, str) and value in allowed
            hint = nearest_hint(value, allowed) if isinstance(value, str) else ""
            expect(known, f"{name} must be one of {', '.join(allowed)}, got {shown(value)}.{hint}")
        for name, low, high in (
            ("block_size", 1, 4096),
            ("max_num_seqs", 1, 65_536),
            ("max_num_batched_tokens", 1, 1 << 20),
            ("tensor_parallel_size", 1, MAX_RANKS),
            ("pipeline_parallel_size", 1, MAX_RANKS),
            ("data_parallel_size", 1, MAX_REPLICAS),
            ("prefill_parallel_size", 0, MAX_REPLICAS),
        ):
            value = getattr(self, name)
            expect(
                whole(value, low, high),
                f"{name} must be an integer in [{low}, {high}], got {value!r}.",
            )
        for name, low, high in (
            ("num_blocks", 2, 1 << 40),
            ("max_model_len", 2, 1 << 30),
            ("max_waiting", 1, 1 << 30),
            ("threads", 1, 1024),
        ):
            value = getattr(self, name)
            expect(
                value is None or whole(value, low, high),
                f"{name} must be an integer in [{low}, {high}], or null, got {value!r}.",
            )
        for name in ("compile", "enable_prefix_caching", "enable_chunked_prefill"):
            value = getattr(self, name)
            expect(isinstance(value, bool), f"{name} must be true or false, got {value!r}.")
        expect(
            self.cache == "paged" or not self.enable_prefix_caching,
            "cache=dense keeps each request's keys and values to itself, so that no prefix can be shared; set "
            "enable_prefix_caching=false with it.",
        )
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            size = getattr(self, name)
            expect(
                size == 1 or not self.compile,
                f"compile=true compiles the step of one rank, got {name}={size}; leave out one.",
            )
        backend = self.prefill_backend
        expect(
            backend is None or (isinstance(backend, str) and self.prefill_parallel_size > 0),
            f"prefill_backend must be a name, with prefill_parallel_size=1 or more, or null, got {shown(backend)} and "
            f"{self.prefill_parallel_size}.",
        )
        expect(isinstance(self.device, str), f"device must be a name such as auto, cpu or cuda, got {self.device!r}.")
        expect(
            self.block_size & (self.block_size - 1) == 0,
            f"block_size must be a power of two (8, 16, 32, …), got {self.block_size}.",
        )
        expect(
            whole(self.seed, 0, 2**64 - 1),
            f"seed must be an integer in [0, 2**64), got {self.seed!r}.",
        )
        expect(
            self.max_num_batched_tokens >= self.max_num_seqs,
            f"max_num_batched_tokens must be at least max_num_seqs, so that every running request can decode in one step; "
            f"got {self.max_num_batched_tokens} and {self.max_num_seqs}.",
        )

    def model_len(self, model: ModelConfig) -> int:
        """Return the most tokens of prompt plus output that the engine may serve of `model`.

        The KV pool may hold fewer (`common.engine.served_len`). Raises `ConfigError` where `max_model_len` exceeds the model.
        """
        asked = self.max_model_len
        expect(
            asked is None or asked <= model.max_position,
            f"max_model_len must not exceed the model's {model.max_position} positions, got {asked}.",
        )
        return asked or model.max_position

    def check_backend(self, name: str) -> None:
        """Raise `ConfigError` for an option that the backend `name` does not have; it need not be imported for that."""
        told = "The jax engine compiles its step always; compile=true is not among its options."
        expect(name != "jax" or not self.compile, told)

    @property
    def ranks(self) -> int:
        """Of all stages that share out a model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @classmethod
    def of(cls, **options: Any) -> Self:
        """Build from loose options. Raises `ConfigError` for an unknown name.

        The error has the nearest known name, or the reason why an option of vLLM is left out.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            reason = why_left_out(name) or f"{nearest_hint(name, known)} Known: {', '.join(known)}."
            expect(name in known, f"Unknown engine option {name!r}. {reason.strip()}")
        return cls(**options)
