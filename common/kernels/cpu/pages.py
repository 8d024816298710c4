"""KV pages as the kernels keep them, and as everyone else sees them.

Keys lie as [L K, pages, H / PAIR, B, PAIR] and values as [L K, pages, B / PAIR, H', PAIR], layer after layer, PAIR being two in
bfloat16 and one in float32, H' being H rounded up to sixteen: sixteen keys' scores, and sixteen dimensions of the output, are
one register each.
"""

from __future__ import annotations

import math

import numpy as np

from common.config import ITEMSIZES, EngineConfig, ModelConfig
from common.kernels.cpu.pack import LANES


def pool_shapes(config: ModelConfig, pages: int, page_size: int, itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the pools of keys and of values, the null page included."""
    heads, H, pair = config.num_layers * config.num_kv_heads, config.head_dim, 4 // itemsize
    return (heads, pages, H // pair, page_size, pair), (heads, pages, page_size // pair, H + -H % LANES, pair)


def page_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Bytes of one page over all layers: more than `common.interface.page_bytes` where the values of a head are padded."""
    itemsize = ITEMSIZES[config.dtype]
    return itemsize * sum(math.prod(shape) for shape in pool_shapes(model, 1, config.block_size, itemsize))


def keys_out(pool: np.ndarray, kv_heads: int) -> np.ndarray:
    """Pages of keys, [L K, p, H / PAIR, B, PAIR] -> [L, p, B, K, H]."""
    heads, p, _, B, _ = pool.shape
    x = pool.reshape(heads // kv_heads, kv_heads, *pool.shape[1:])
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(len(x), p, B, kv_heads, x.shape[3] * x.shape[5])


def values_out(pool: np.ndarray, kv_heads: int, head_dim: int) -> np.ndarray:
    """Pages of values, [L K, p, B / PAIR, H', PAIR] -> [L, p, B, K, H]."""
    heads, p, half, H, pair = pool.shape
    x = pool.reshape(heads // kv_heads, kv_heads, *pool.shape[1:])
    return x.transpose(0, 2, 3, 5, 1, 4).reshape(len(x), p, half * pair, kv_heads, H)[..., :head_dim]


def keys_in(x_LPBKH: np.ndarray, pair: int) -> np.ndarray:
    """The inverse of `keys_out`."""
    L, p, B, K, H = x_LPBKH.shape
    x = x_LPBKH.reshape(L, p, B, K, H // pair, pair).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(L * K, p, H // pair, B, pair)


def values_in(x_LPBKH: np.ndarray, pair: int) -> np.ndarray:
    """The inverse of `values_out`; what pads a head is 0."""
    L, p, B, K, H = x_LPBKH.shape
    x = np.pad(x_LPBKH, [(0, 0)] * 4 + [(0, -H % LANES)])
    width = x.shape[-1]
    x = x.reshape(L, p, B // pair, pair, K, width).transpose(0, 4, 1, 2, 5, 3)
    return x.reshape(L * K, p, B // pair, width, pair)
