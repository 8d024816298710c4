"""Tables of cos and sin for rotary position embeddings, made once here so that both engines start from the same bits.

RoPE: Su et al. 2021, arXiv:2104.09864. Linear interpolation: Chen et al. 2023, arXiv:2306.15595.
YaRN: Peng et al. 2023, arXiv:2309.00071, §3. llama3: Grattafiori et al. 2024, arXiv:2407.21783, as released with Llama 3.1.
"""

from __future__ import annotations

import math

import numpy as np

from common.config import Rope


def rope_tables(rope: Rope, head_dim: int, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every angle, float32 [positions, H/2], computed in float64 and rounded once.

    Column i turns the pair (x[i], x[i + H/2]) of a head. YaRN's magnitude is already multiplied in."""
    angles = np.arange(positions, dtype=np.float64)[:, None] * inverse_frequencies(rope, head_dim)
    scale = magnitude(rope)
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of dimensions after context extension, float64 [H/2], falling."""
    plain = rope.base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    stretched = plain / rope.factor
    if rope.scaling == "linear":
        return stretched
    if rope.scaling == "llama3":
        return _blend(plain, stretched, _llama3_keep(rope, plain))
    if rope.scaling == "yarn":
        return _blend(plain, stretched, _yarn_keep(rope, head_dim))
    return plain


def magnitude(rope: Rope) -> float:
    """What cos and sin are multiplied by: 1 except under YaRN (its §3.4)."""
    if rope.scaling != "yarn":
        return 1.0
    return yarn_magnitude(rope.factor) if rope.attention_factor is None else rope.attention_factor


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """`0.1 mscale ln(factor) + 1`, and 1 where nothing is stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _blend(plain: np.ndarray, stretched: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """`keep` is 1 where a frequency stays as it is and 0 where it is stretched in full."""
    return keep * plain + (1 - keep) * stretched


def _llama3_keep(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Linear in the number of turns that a pair makes within the original context."""
    turns = rope.original_max_position * plain / (2 * np.pi)
    return np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)


def _yarn_keep(rope: Rope, head_dim: int) -> np.ndarray:
    """Linear in the index of the pair, between those that make `beta_fast` and `beta_slow` turns."""

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(rope.original_max_position / (times * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # the same step as elsewhere where both ends meet
    return 1 - np.clip((np.arange(head_dim // 2) - low) / width, 0, 1)
