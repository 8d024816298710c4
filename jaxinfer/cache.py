"""The KV pool: pages of keys and values, written and read by slot. State goes in and comes out; the step donates it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from common.config import ModelConfig


class KVCache(NamedTuple):
    """One pool a layer, [K, pages, B, H]. Heads come first, so that a gather of pages is a matmul operand as it is, and the
    head axis can be shared out over devices. Page 0 is the null page.

    bfloat16 is kept as uint16: XLA:CPU computes bfloat16 in float32 even where it only moves it, and would convert the whole
    pool there and back around every scatter.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]


def make_cache(
    config: ModelConfig, pages: int, page_size: int, dtype: str, device: jax.Device | jax.sharding.Sharding
) -> KVCache:
    """Zeroed pools of `pages` pages, the null page included."""
    shape = (config.num_kv_heads, pages, page_size, config.head_dim)
    stored = jnp.uint16 if dtype == "bfloat16" else dtype
    pool = lambda: tuple(jnp.zeros(shape, stored, device=device) for _ in range(config.num_layers))  # noqa: E731
    return KVCache(pool(), pool())


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
    flat = lax.bitcast_convert_type(flat, jnp.bfloat16) if pool.dtype == jnp.uint16 else flat
    return flat.reshape(K, pages.shape[0], -1, H)


@partial(jax.jit, donate_argnums=0)
def copy_pages(cache: KVCache, pairs: Array) -> KVCache:
    """Copy pages from pairs[:, 0] to pairs[:, 1]; (0, 0) does nothing."""
    return jax.tree.map(lambda pool: pool.at[:, pairs[:, 1]].set(pool[:, pairs[:, 0]]), cache)


def read_pages(cache: KVCache, pages: Sequence[int]) -> dict[str, np.ndarray]:
    """Copies `k` and `v`: [L, pages, B, K, H]."""

    def take(pools: tuple[Array, ...]) -> np.ndarray:
        host = np.stack([np.asarray(pool)[:, list(pages)] for pool in pools])
        return host.view(jnp.bfloat16) if host.dtype == np.uint16 else host

    return {name: np.moveaxis(take(pools), 1, 3) for name, pools in cache._asdict().items()}


def write_pages(cache: KVCache, pages: Sequence[int], arrays: dict[str, np.ndarray]) -> KVCache:
    """The inverse of `read_pages`."""

    def put(pool: Array, x_PBKH: np.ndarray) -> Array:
        host = np.array(pool)
        host[:, list(pages)] = np.moveaxis(np.ascontiguousarray(x_PBKH).view(host.dtype), 2, 0)
        return jax.device_put(host, pool.sharding)

    return KVCache(*(tuple(map(put, pools, arrays[name])) for name, pools in cache._asdict().items()))


def _at(pools: tuple[Array, ...], layer: int, pool: Array) -> tuple[Array, ...]:
    return (*pools[:layer], pool, *pools[layer + 1 :])
