"""The KV pool: pages of keys and values, written and read by slot. State goes in and comes out; the step donates it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from common.config import ModelConfig
from common.interface import Rows, rows_of
from jaxinfer.arrays import gather_to_host

_PAGES = 16
"""Pages of one call."""
_STORED = {"bfloat16": np.uint16, "float16": np.int16}
"""dtype → the integers that a pool holds in its place."""
_COPIES = 16
"""Page copies of one call."""


class KVCache(NamedTuple):
    """One pool per layer, [K, pages, B, H]. Page 0 is the null page.

    Heads come first. So a gather of pages is the operand of a matmul, and devices can share the head axis.

    Numbers of 16 bits are stored as integers (`_STORED`). XLA:CPU computes with such numbers in float32 even where it only
    moves them. It would convert the whole pool before and after every scatter.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]


def make_cache(
    config: ModelConfig, pages: int, page_size: int, dtype: str, device: jax.Device | jax.sharding.Sharding
) -> KVCache:
    """Zeroed pools of `pages` pages, the null page included."""
    shape = (config.num_kv_heads, pages, page_size, config.head_dim)
    stored = _STORED.get(dtype, dtype)
    pool = lambda: tuple(jnp.zeros(shape, stored, device=device) for _ in range(config.num_layers))  # noqa: E731
    return KVCache(pool(), pool())


def _meant(stored: Any) -> Any:
    """Return the dtype of the numbers that a pool of `stored` holds."""
    return {np.dtype(kept): jnp.dtype(dtype) for dtype, kept in _STORED.items()}.get(stored, stored)


def write(cache: KVCache, layer: int, k_TKH: Array, v_TKH: Array, slots: Array) -> KVCache:
    """Put the keys and values of T tokens into their slots (page * B + offset)."""

    def put(pool: Array, x_TKH: Array) -> Array:
        K, _, _, H = pool.shape
        # Slots are valid by construction; padding points into the null page, where several writes may meet.
        x_KTH = lax.bitcast_convert_type(x_TKH, pool.dtype).swapaxes(0, 1)
        return pool.reshape(K, -1, H).at[:, slots].set(x_KTH, mode="promise_in_bounds").reshape(pool.shape)

    return KVCache(_at(cache.k, layer, put(cache.k[layer], k_TKH)), _at(cache.v, layer, put(cache.v[layer], v_TKH)))


def gather(pool: Array, pages: Array) -> Array:
    """Keys or values of n runs of pages: [K, pages, B, H], int32[n, p] -> [K, n, p * B, H]."""
    K, P, B, H = pool.shape
    rows = jnp.arange(K, dtype=jnp.int32)[:, None] * P + pages.reshape(1, -1)
    flat = jnp.take(pool.reshape(K * P, B * H), rows.reshape(-1), axis=0, mode="clip")
    flat = lax.bitcast_convert_type(flat, _meant(pool.dtype))
    return flat.reshape(K, pages.shape[0], -1, H)


@partial(jax.jit, donate_argnums=0)
def copy_pages(cache: KVCache, pairs: Array) -> KVCache:
    """Copy pages from pairs[:, 0] to pairs[:, 1]; (0, 0) does nothing."""
    return jax.tree.map(lambda pool: pool.at[:, pairs[:, 1]].set(pool[:, pairs[:, 0]]), cache)


def copy_all_pages(cache: KVCache, pairs: np.ndarray) -> KVCache:
    """As `copy_pages`, of any number of pairs int32[C, 2], and even of none: it compiles the one program then."""
    for at in range(0, max(len(pairs), 1), _COPIES):
        part = np.zeros((_COPIES, 2), np.int32)
        part[: len(pairs[at : at + _COPIES])] = pairs[at : at + _COPIES]
        cache = copy_pages(cache, part)
    return cache


def read_pages(cache: KVCache, pages: Sequence[int]) -> dict[str, np.ndarray]:
    """Copies `k` and `v`: [L, pages, B, K, H]."""
    parts = [gather_to_host(_take(cache, _some(pages, at))) for at in range(0, max(len(pages), 1), _PAGES)]

    def join(pools: Sequence[tuple[np.ndarray, ...]]) -> np.ndarray:
        x_LKPBH = np.concatenate([np.stack(layers) for layers in pools], axis=2)[:, :, : len(pages)]
        return np.moveaxis(x_LKPBH.view(_meant(x_LKPBH.dtype)), 1, 3)

    return {"k": join([part.k for part in parts]), "v": join([part.v for part in parts])}


def write_pages(cache: KVCache, pages: Sequence[int], arrays: dict[str, np.ndarray]) -> KVCache:
    """The inverse of `read_pages`."""
    stored = cache.k[0].dtype

    def cut(x_LPBKH: np.ndarray, at: int) -> tuple[Any, ...]:
        some = np.moveaxis(x_LPBKH[:, at : at + _PAGES].view(stored), 3, 1)
        return tuple(np.pad(some, [(0, 0), (0, 0), (0, _PAGES - some.shape[2]), (0, 0), (0, 0)]))

    for at in range(0, len(pages), _PAGES):
        cache = _put(cache, _some(pages, at), KVCache(cut(arrays["k"], at), cut(arrays["v"], at)))
    return cache


def page_memory(cache: KVCache) -> dict[str, Rows]:
    """Return the addresses of pools on a CPU.

    The caller must own the pools alone, because it writes to them as an operator of a step does.
    """

    def rows(pools: tuple[Array, ...]) -> Rows:
        jax.block_until_ready(pools)
        return rows_of([pool.unsafe_buffer_pointer() for pool in pools], pools[0].shape, pools[0].dtype.itemsize)

    return {name: rows(pools) for name, pools in cache._asdict().items()}


@jax.jit
def _take(cache: KVCache, pages: Array) -> KVCache:
    """Not by a view of the pools from the host: while one is left, they cannot be donated."""
    return jax.tree.map(lambda pool: pool.at[:, pages].get(mode="promise_in_bounds"), cache)


@partial(jax.jit, donate_argnums=0)
def _put(cache: KVCache, pages: Array, x: KVCache) -> KVCache:
    return jax.tree.map(lambda pool, x_KPBH: pool.at[:, pages].set(x_KPBH, mode="promise_in_bounds"), cache, x)


def _some(pages: Sequence[int], at: int) -> np.ndarray:
    """int32[_PAGES]: those from `at` on, and the null page for what is missing. So one program serves any number of them."""
    some = np.zeros(_PAGES, np.int32)
    part = list(pages[at : at + _PAGES])
    some[: len(part)] = part
    return some


def _at(pools: tuple[Array, ...], layer: int, pool: Array) -> tuple[Array, ...]:
    return (*pools[:layer], pool, *pools[layer + 1 :])
