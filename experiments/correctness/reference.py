"""The judge: a decoder in plain NumPy and float64, dense, without pages, batches or backends.

Written from the papers and independent of the engines: it imports neither backend nor `common.model.rope`.
Vaswani et al. 2017 (attention), Zhang & Sennrich 2019 (RMSNorm), Su et al. 2021 (RoPE), Shazeer 2020 (GLU),
Ainslie et al. 2023 (grouped queries), Beltagy et al. 2020 (sliding window), Peng et al. 2023 (YaRN), Gemma team 2025 (Gemma 3).
Shape letters: DESIGN §7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import DTypeLike

from common.config import ModelConfig, Rope
from common.weights.checkpoint import Checkpoint

Keep = Callable[[str, np.ndarray], None]
"""Called with the name and the value of what was just computed, as `common.interface.ModelRunner.observe` names them."""

_VOCAB_BLOCK = 1 << 15
"""Rows of the output head that are widened at a time: Gemma's in float64 would be 1.3 GB at once."""


class NumpyModel:
    """A checkpoint whose weights are decoded once, held in float32 as they came, and widened where they are used.

    Another `config` than the checkpoint's own computes with a planted defect."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig | None = None, dtype: DTypeLike = np.float64) -> None:
        self.checkpoint, self.config, self.dtype = checkpoint, config or checkpoint.config, dtype
        self.weights: dict[str, np.ndarray] = {}

    def with_config(self, config: ModelConfig) -> NumpyModel:
        """The same weights, shared, under another configuration."""
        other = NumpyModel(self.checkpoint, config, self.dtype)
        other.weights = self.weights
        return other

    def with_dtype(self, dtype: DTypeLike) -> NumpyModel:
        """The same weights, shared, computed with in another dtype."""
        other = NumpyModel(self.checkpoint, self.config, dtype)
        other.weights = self.weights
        return other

    def logits(
        self, token_ids: Sequence[int], keep: Keep = lambda name, x: None, rows: np.ndarray | slice = slice(None)
    ) -> np.ndarray:
        """Logits after each token of one sequence that starts at position 0, or after those at `rows`: [T] → [R, V]. Tensors
        on the way go to `keep`, for every token."""
        x_TD = self.embed(token_ids)
        keep("embedding", x_TD)
        for layer in range(self.config.num_layers):
            here: Keep = lambda name, x, layer=layer: keep(f"layers.{layer}.{name}", x)  # type: ignore[misc]  # noqa: E731
            n_TD = self.attn_norm(layer, x_TD)
            here("attn_norm", n_TD)
            x_TD = self._add_attention(layer, x_TD, self._attention(layer, n_TD, here))
            here("attn_residual", x_TD)
            m_TD = self.mlp(layer, x_TD)
            here("mlp", m_TD)
            x_TD = x_TD + m_TD
            here("residual", x_TD)
        x_TD = self.final_norm(x_TD)
        keep("final_norm", x_TD)
        logits_RV = self.head(x_TD[rows])
        keep("logits", logits_RV)
        return logits_RV

    # Each operation by itself: from its inputs, tokens or positions first, to its output.

    def embed(self, token_ids: Sequence[int]) -> np.ndarray:
        table_VD = self._stored("model.embed_tokens.weight")
        return table_VD[np.asarray(token_ids)].astype(self.dtype) * self.config.embedding_scale

    def attn_norm(self, layer: int, x_TD: np.ndarray) -> np.ndarray:
        return self._norm(f"model.layers.{layer}.input_layernorm", x_TD)

    def project(self, layer: int, n_TD: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q [T, N, H], k and v [T, K, H] of the tokens at `positions`, rotated."""
        c, prefix, T = self.config, f"model.layers.{layer}.self_attn", len(n_TD)
        q_TNH = self._linear(f"{prefix}.q_proj", n_TD, c.qkv_bias).reshape(T, c.num_heads, c.head_dim)
        k_TKH = self._linear(f"{prefix}.k_proj", n_TD, c.qkv_bias).reshape(T, c.num_kv_heads, c.head_dim)
        v_TKH = self._linear(f"{prefix}.v_proj", n_TD, c.qkv_bias).reshape(T, c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            q_TNH, k_TKH = self._norm(f"{prefix}.q_norm", q_TNH), self._norm(f"{prefix}.k_norm", k_TKH)
        turn_TH = rotations(c.ropes[c.layer_rope[layer]], c.head_dim, int(positions.max(initial=-1)) + 1)[positions]
        turn_TH = turn_TH.astype(np.result_type(self.dtype, np.complex64))
        return _rotate(q_TNH, turn_TH), _rotate(k_TKH, turn_TH), v_TKH

    def attend(self, layer: int, q_TNH: np.ndarray, k_CKH: np.ndarray, v_CKH: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The queries at `positions` over the keys and values of positions 0 to C - 1: [T, N, H]."""
        c = self.config
        query, key = positions[:, None], np.arange(len(k_CKH))[None, :]
        visible = key <= query
        if window := c.layer_window[layer]:
            visible &= query - key < window
        out_TNH = np.empty_like(q_TNH)
        for head in range(c.num_heads):
            shared = head // c.queries_per_kv
            scores = np.where(visible, q_TNH[:, head] @ k_CKH[:, shared].T * c.attention_scale, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out_TNH[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v_CKH[:, shared]
        return out_TNH

    def attn_residual(self, layer: int, x_TD: np.ndarray, out_TNH: np.ndarray) -> np.ndarray:
        return self._add_attention(layer, x_TD, self._combine(layer, out_TNH))

    def mlp(self, layer: int, x_TD: np.ndarray) -> np.ndarray:
        prefix = f"model.layers.{layer}"
        if not self.config.sandwich_norms:
            return self._mlp(prefix, self._norm(f"{prefix}.post_attention_layernorm", x_TD))
        m_TD = self._mlp(prefix, self._norm(f"{prefix}.pre_feedforward_layernorm", x_TD))
        return self._norm(f"{prefix}.post_feedforward_layernorm", m_TD)

    def final_norm(self, x_TD: np.ndarray) -> np.ndarray:
        return self._norm("model.norm", x_TD)

    def head(self, x_RD: np.ndarray) -> np.ndarray:
        c = self.config
        head_VD = self._stored("model.embed_tokens.weight" if c.tie_embeddings else "lm_head.weight")
        blocks = [head_VD[v : v + _VOCAB_BLOCK].astype(self.dtype) for v in range(0, c.vocab_size, _VOCAB_BLOCK)]
        return np.concatenate([x_RD @ block.T for block in blocks], axis=1)

    def _attention(self, layer: int, n_TD: np.ndarray, keep: Keep) -> np.ndarray:
        positions = np.arange(len(n_TD))
        q_TNH, k_TKH, v_TKH = self.project(layer, n_TD, positions)
        for name, x in (("q", q_TNH), ("k", k_TKH), ("v", v_TKH)):
            keep(name, x)
        out_TNH = self.attend(layer, q_TNH, k_TKH, v_TKH, positions)
        keep("attention", out_TNH)
        return self._combine(layer, out_TNH)

    def _combine(self, layer: int, out_TNH: np.ndarray) -> np.ndarray:
        name = f"model.layers.{layer}.self_attn.o_proj"
        return self._linear(name, out_TNH.reshape(len(out_TNH), -1), self.config.output_bias)

    def _add_attention(self, layer: int, x_TD: np.ndarray, a_TD: np.ndarray) -> np.ndarray:
        norm = f"model.layers.{layer}.post_attention_layernorm"
        return x_TD + (self._norm(norm, a_TD) if self.config.sandwich_norms else a_TD)

    def _mlp(self, prefix: str, n_TD: np.ndarray) -> np.ndarray:
        c = self.config
        gate_TF = self._linear(f"{prefix}.mlp.gate_proj", n_TD, c.mlp_bias)
        up_TF = self._linear(f"{prefix}.mlp.up_proj", n_TD, c.mlp_bias)
        return self._linear(f"{prefix}.mlp.down_proj", _ACTIVATIONS[c.activation](gate_TF) * up_TF, c.mlp_bias)

    def _linear(self, name: str, x: np.ndarray, bias: bool) -> np.ndarray:
        y = x @ self._stored(f"{name}.weight").astype(self.dtype).T
        return y + self._stored(f"{name}.bias") if bias else y

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        weight = self._stored(f"{name}.weight").astype(self.dtype) + self.config.norm_offset
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.config.norm_eps) * weight

    def _stored(self, name: str) -> np.ndarray:
        if name not in self.weights:
            self.weights[name] = self.checkpoint[name].dense()
        return self.weights[name]


def rotations(rope: Rope, head_dim: int, positions: int) -> np.ndarray:
    """What RoPE multiplies each pair of a head by, as complex numbers: complex128 [positions, H/2]."""
    angle_per_position = [_frequency(rope, head_dim, pair) for pair in range(head_dim // 2)]
    size = 1.0
    if rope.scaling == "yarn":
        size = 0.1 * math.log(rope.factor) + 1 if rope.attention_factor is None else rope.attention_factor
    return size * np.exp(1j * np.outer(np.arange(positions), angle_per_position))


def _frequency(rope: Rope, head_dim: int, pair: int) -> float:
    """Radians by which position + 1 turns one pair, after the extension of the context."""
    original = rope.base ** (-2 * pair / head_dim)
    if rope.scaling == "none":
        return original
    interpolated = original / rope.factor
    if rope.scaling == "linear":
        return interpolated
    if rope.scaling == "llama3":  # by wavelength, as in the reference code released with Llama 3.1
        wavelength = 2 * math.pi / original
        if wavelength < rope.original_max_position / rope.high_freq_factor:
            return original
        if wavelength > rope.original_max_position / rope.low_freq_factor:
            return interpolated
        turns = rope.original_max_position / wavelength
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return (1 - smooth) * interpolated + smooth * original
    # YaRN: the dimension whose wavelength fits `turns` times into the original context solves base^(2d/H) = L / (2π turns).
    ends = [
        head_dim * math.log(rope.original_max_position / (2 * math.pi * turns), rope.base) / 2
        for turns in (rope.beta_fast, rope.beta_slow)
    ]
    if rope.truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], head_dim - 1)
    if first == last:
        last += 0.001
    ramp = min(max((pair - first) / (last - first), 0.0), 1.0)
    return ramp * interpolated + (1 - ramp) * original


def _rotate(x: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Turn the pairs (x[i], x[i + H/2]) of every head: [T, heads, H] by [T, H/2]."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * turn[:, None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


_ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh}
