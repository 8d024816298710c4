"""Attention over pages and without them. Softmax in float32; every masked read selects, never multiplies.

Letters: T tokens · S sequences · N query heads · K key/value heads · Q = N / K · H head dim · B page tokens ·
n tiles in flight · C query tokens of a tile.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from common.batch import Batch
from common.config import ModelConfig
from common.schedule.tiles import query_tiles
from jaxinfer.cache import KVCache, gather, write
from jaxinfer.model import Attend

CHUNK = 32
"""C: query tokens of a prefill tile."""
_DECODES, _CHUNKS = 16, 4
"""n: decode tiles, and prefill tiles, that are computed together."""
_KEYS = 128
"""Keys of one block of the inner loop."""
MASKED = -1e30


class Plan(NamedTuple):
    """Where a step's queries and keys lie. Compiled shapes are padded (`plan_shape`)."""

    slots: Array
    """int32[T]; padding writes into the null page."""
    page_table: Array
    """int32[S, pages]"""
    decodes: Array
    """int32[4, tiles]: sequence, first token, count, position of its first token; count 0 is padding."""
    chunks: Array
    """int32[4, tiles], likewise."""
    counts: Array
    """int32[2]: how many tiles of `decodes` and of `chunks` are real."""


def make_plan(batch: Batch, config: ModelConfig, page_size: int) -> Plan:
    """The plan of a batch, of NumPy arrays, not padded yet: `step` puts it into the shapes of its bucket."""
    decodes, chunks = query_tiles(batch, CHUNK)
    fields = [np.stack((t.seq, t.first, t.count, t.position)) for t in (decodes.by_length(), chunks.by_length())]
    counts = np.array([len(decodes), len(chunks)], np.int32)
    return Plan(batch.slots[0], batch.page_table[0], fields[0], fields[1], counts)  # type: ignore[arg-type]


def plan_shape(tokens: int, seqs: int, pages: int, chunked: bool) -> Plan:
    """Return the padded shape of each field for steps of at most `tokens` tokens and `seqs` sequences of `pages` pages.

    `chunked` states whether a sequence may have more than one token.
    """
    whole = lambda tiles, n: tiles if tiles <= n else -(-tiles // n) * n  # noqa: E731
    decodes = whole(seqs, _DECODES)
    chunks = whole(tokens // CHUNK + min(seqs, tokens // 2), _CHUNKS) if chunked else 0
    return Plan((tokens,), (seqs, pages), (4, decodes), (4, chunks), (2,))  # type: ignore[arg-type]


def fit_plan(plan: Plan, tokens: int, seqs: int, pages: int, chunked: bool) -> Plan:
    """A plan of NumPy arrays as steps of such sizes are compiled for: padded (`plan_shape`)."""
    pad = lambda x, shape: np.pad(x, [(0, most - size) for size, most in zip(x.shape, shape, strict=True)])  # noqa: E731
    return Plan(*map(pad, plan, plan_shape(tokens, seqs, pages, chunked)))  # type: ignore[arg-type]


def paged_attention(config: ModelConfig, plan: Plan) -> Attend:
    """Attention of packed tokens over their sequences' pages; writes the new keys and values first."""
    scale, Q = config.attention_scale, config.queries_per_kv

    def attend(q_TNH: Array, k_TKH: Array, v_TKH: Array, layer: int, cache: KVCache) -> tuple[Array, KVCache]:
        cache = write(cache, layer, k_TKH, v_TKH, plan.slots)
        window = config.layer_window[layer]
        T, N, H = q_TNH.shape
        # One row more than tokens: where padded queries read and write.
        q_TKQH = jnp.pad(q_TNH.reshape(T, N // Q, Q, H), ((0, 1), (0, 0), (0, 0), (0, 0)))
        out_TKQH = jnp.zeros_like(q_TKQH)
        pools = cache.k[layer], cache.v[layer]
        for tiles, count, C, n in ((plan.decodes, plan.counts[0], 1, _DECODES), (plan.chunks, plan.counts[1], CHUNK, _CHUNKS)):
            if tiles.shape[1]:
                out_TKQH = _attend_tiles(q_TKQH, out_TKQH, *pools, plan.page_table, tiles, count, C, n, scale, window)
        return out_TKQH[:T].reshape(T, N, H), cache

    return attend


@partial(jax.jit, static_argnames=("C", "n", "scale", "window"))  # traced and lowered once, not once a layer
def _attend_tiles(
    q_TKQH: Array,
    out_TKQH: Array,
    k_pool: Array,
    v_pool: Array,
    page_table: Array,
    tiles: Array,
    count: Array,
    C: int,
    n: int,
    scale: float,
    window: int,
) -> Array:
    """Softmax attention of the first `count` tiles, `n` at a time, key block by key block with a running maximum and sum
    (Dao et al. 2022, arXiv:2205.14135, §3.1). Trip counts are traced: the cost follows the real lengths, the shapes do not."""
    T, K, Q, H = q_TKQH.shape
    B = k_pool.shape[2]
    n, keys = min(n, tiles.shape[1]), max(_KEYS, B)

    def group(g: Array, out_TKQH: Array) -> Array:
        seq, first, tokens, position = lax.dynamic_slice(tiles, (0, g * n), (4, n))
        query = jnp.arange(C, dtype=jnp.int32)
        real = query < tokens[:, None]
        rows = jnp.where(real, first[:, None] + query, T - 1)
        query_position = jnp.where(real, position[:, None] + query, -1)
        q = q_TKQH[rows].transpose(2, 0, 1, 3, 4).reshape(K * n, C * Q, H)
        start = jnp.maximum(position - window + 1, 0) // keys if window else jnp.zeros_like(position)
        stop = position + tokens
        blocks = jnp.max(jnp.where(tokens > 0, -(-stop // keys) - start, 0))
        table = page_table[seq]

        def block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            m, total, acc = carry
            key_position = (start + j)[:, None] * keys + jnp.arange(keys, dtype=jnp.int32)
            column = (start + j)[:, None] * (keys // B) + jnp.arange(keys // B, dtype=jnp.int32)
            pages = jnp.take_along_axis(table, column, axis=1, mode="fill", fill_value=0)
            k, v = (gather(pool, pages).reshape(K * n, keys, H) for pool in (k_pool, v_pool))
            visible = key_position[:, None] <= query_position[..., None]
            if window:
                visible &= key_position[:, None] > query_position[..., None] - window
            s = scores(q, k).reshape(K, n, C, Q, keys) * scale
            s = jnp.where(visible[None, :, :, None], s, MASKED).reshape(K * n, C * Q, keys)
            m_new = jnp.maximum(m, s.max(axis=-1, keepdims=True))
            p = jnp.exp(s - m_new)
            shrink = jnp.exp(m - m_new)
            written = (key_position < stop[:, None]).reshape(1, n, keys, 1)
            v = jnp.where(written, v.reshape(K, n, keys, H), 0).reshape(K * n, keys, H)
            acc = acc * shrink + weighted(p.astype(v.dtype), v)
            return m_new, total * shrink + p.sum(axis=-1, keepdims=True), acc

        start_at = jnp.full((K * n, C * Q, 1), MASKED), jnp.zeros((K * n, C * Q, 1)), jnp.zeros((K * n, C * Q, H))
        _, total, acc = lax.fori_loop(0, blocks, block, start_at)
        result = (acc / jnp.where(total > 0, total, 1)).astype(q_TKQH.dtype)
        return out_TKQH.at[rows].set(result.reshape(K, n, C, Q, H).transpose(1, 2, 0, 3, 4))

    return lax.fori_loop(0, (count + n - 1) // n, group, out_TKQH)


def dense_attention(config: ModelConfig) -> Attend:
    """Causal attention of one sequence over itself, without pages: for training, gradients, vmap and tests."""

    def attend(q_TNH: Array, k_TKH: Array, v_TKH: Array, layer: int, cache: Any) -> tuple[Array, Any]:
        T, N, H = q_TNH.shape
        q_KTQH = q_TNH.reshape(T, -1, config.queries_per_kv, H).transpose(1, 0, 2, 3)
        position = jnp.arange(T)
        visible = position[:, None] >= position
        if window := config.layer_window[layer]:
            visible &= position[:, None] - position < window
        s = scores(q_KTQH.reshape(q_KTQH.shape[0], -1, H), k_TKH.swapaxes(0, 1)).reshape(*q_KTQH.shape[:3], T)
        p = jax.nn.softmax(jnp.where(visible[:, None], s * config.attention_scale, MASKED), axis=-1).astype(v_TKH.dtype)
        out = weighted(p.reshape(p.shape[0], -1, T), v_TKH.swapaxes(0, 1)).reshape(q_KTQH.shape)
        return out.transpose(1, 0, 2, 3).reshape(T, N, H).astype(q_TNH.dtype), cache

    return attend


def scores(q: Array, k: Array) -> Array:
    """q kᵀ in float32: [b, i, H], [b, j, H] -> [b, i, j]"""
    return _batch_matmul(q, k, 2)


def weighted(p: Array, v: Array) -> Array:
    """p v in float32: [b, i, j], [b, j, H] -> [b, i, H]"""
    return _batch_matmul(p, v, 1)


def _batch_matmul(a: Array, b: Array, axis: int) -> Array:
    highest = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((2,), (axis,)), ((0,), (0,))), preferred_element_type=jnp.float32, precision=highest)
