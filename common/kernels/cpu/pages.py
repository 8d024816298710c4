"""KV pages as the kernels keep them, and as everyone else sees them.

Keys lie as [K, pages, H / PAIR, B, PAIR] and values as [K, pages, B / PAIR, H', PAIR], PAIR being two in bfloat16 and one in
float32, H' being H rounded up to sixteen: sixteen keys' scores, and sixteen dimensions of the output, are one register each.
"""

from __future__ import annotations

import numpy as np

from common.config import ModelConfig
from common.kernels.cpu.pack import LANES


def pool_shapes(config: ModelConfig, pages: int, page_size: int, itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one layer's pools of keys and of values, the null page included."""
    K, H, pair = config.num_kv_heads, config.head_dim, 4 // itemsize
    return (K, pages, H // pair, page_size, pair), (K, pages, page_size // pair, H + -H % LANES, pair)


def keys_out(pool: np.ndarray) -> np.ndarray:
    """Pages of keys, [K, p, H / PAIR, B, PAIR] -> [p, B, K, H]."""
    K, p, _, B, _ = pool.shape
    return pool.transpose(1, 3, 0, 2, 4).reshape(p, B, K, -1)


def values_out(pool: np.ndarray, head_dim: int) -> np.ndarray:
    """Pages of values, [K, p, B / PAIR, H', PAIR] -> [p, B, K, H]."""
    K, p, _, H, _ = pool.shape
    return pool.transpose(1, 2, 4, 0, 3).reshape(p, -1, K, H)[..., :head_dim]


def keys_in(x_PBKH: np.ndarray, pair: int) -> np.ndarray:
    """The inverse of `keys_out`."""
    p, B, K, H = x_PBKH.shape
    return x_PBKH.reshape(p, B, K, H // pair, pair).transpose(2, 0, 3, 1, 4)


def values_in(x_PBKH: np.ndarray, pair: int) -> np.ndarray:
    """The inverse of `values_out`; what pads a head is 0."""
    p, B, K, H = x_PBKH.shape
    x = np.pad(x_PBKH, [(0, 0)] * 3 + [(0, -H % LANES)])
    return x.reshape(p, B // pair, pair, K, -1).transpose(3, 0, 1, 4, 2)
