"""The KV pool: pages of keys and values, written and read by slot. State goes in and comes out, updated in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.config import ModelConfig
from common.interface import Rows, rows_of
from torchinfer.arrays import to_device, to_host


class KVCache(NamedTuple):
    """One pool per layer, [K, pages, B, H]. Page 0 is the null page.

    Heads come first. So a gather of pages is the operand of a matmul, and devices can share the head axis.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]


def make_cache(config: ModelConfig, pages: int, page_size: int, dtype: str, device: torch.device) -> KVCache:
    """Zeroed pools of `pages` pages, the null page included."""
    shape = (config.num_kv_heads, pages, page_size, config.head_dim)
    pool = lambda: tuple(  # noqa: E731
        torch.zeros(shape, dtype=getattr(torch, dtype), device=device) for _ in range(config.num_layers)
    )
    return KVCache(pool(), pool())


def write(cache: KVCache, layer: int, k_TKH: Tensor, v_TKH: Tensor, slots: Tensor) -> KVCache:
    """Put the keys and values of T tokens into their slots (page * B + offset)."""

    def put(pool: Tensor, x_TKH: Tensor) -> None:
        K, _, _, H = pool.shape
        pool.view(K, -1, H).index_copy_(1, slots, x_TKH.transpose(0, 1))

    put(cache.k[layer], k_TKH)
    put(cache.v[layer], v_TKH)
    return cache


def gather(pool: Tensor, pages: Tensor) -> Tensor:
    """Keys or values of n runs of pages: [K, pages, B, H], int64[n, p] -> [K, n, p * B, H]."""
    K, P, B, H = pool.shape
    flat = pool.view(K, P, B * H).index_select(1, pages.reshape(-1))
    return flat.view(K, pages.shape[0], -1, H)


def copy_pages(cache: KVCache, pairs: Tensor) -> KVCache:
    """Copy pages from pairs[:, 0] to pairs[:, 1]; (0, 0) does nothing."""
    for pool in (*cache.k, *cache.v):
        pool[:, pairs[:, 1]] = pool[:, pairs[:, 0]]
    return cache


def read_pages(cache: KVCache, pages: Sequence[int]) -> dict[str, np.ndarray]:
    """Copies `k` and `v`: [L, pages, B, K, H]."""
    take = lambda pools: to_host(torch.stack([pool[:, list(pages)] for pool in pools]))  # noqa: E731
    return {name: np.moveaxis(take(pools), 1, 3) for name, pools in cache._asdict().items()}


def write_pages(cache: KVCache, pages: Sequence[int], arrays: dict[str, np.ndarray]) -> KVCache:
    """The inverse of `read_pages`."""

    def put(pool: Tensor, x_PBKH: np.ndarray) -> None:
        pool[:, list(pages)] = to_device(np.moveaxis(x_PBKH, 2, 0), pool.device)

    for name, pools in cache._asdict().items():
        for pool, array in zip(pools, arrays[name], strict=True):
            put(pool, array)
    return cache


def page_memory(cache: KVCache) -> dict[str, Rows]:
    """Where pools on a CPU lie."""
    rows = lambda pools: rows_of([pool.data_ptr() for pool in pools], pools[0].shape, pools[0].itemsize)  # noqa: E731
    return {name: rows(pools) for name, pools in cache._asdict().items()}
