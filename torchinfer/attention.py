"""Attention over pages and without them. Softmax in float32; every masked read selects, never multiplies.

Letters: T tokens · S sequences · N query heads · K key/value heads · Q = N / K · H head dim · B page tokens ·
n tiles in flight · C query tokens of a tile · J keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.batch import Batch
from common.config import ModelConfig
from common.schedule.tiles import LengthClass, Tiles, length_classes, query_tiles
from torchinfer.cache import KVCache, gather, write
from torchinfer.model import Attend

CHUNK = 64
"""C: query tokens of a prefill tile."""
_DECODE_PAGES, _CHUNK_PAGES = 2048, 256
"""Pages gathered at once for tiles of one token, and of C tokens: their scores stay in the cache."""
MASKED = -1e30


class _Group(NamedTuple):
    """Tiles of like length, computed in one call."""

    rows: Tensor
    """int64[n * C]: the token of each query; padded queries repeat the tile's first."""
    take: Tensor | None
    """int64[m]: which of the n * C queries are real; None if all are."""
    pages: Tensor
    """int64[n, pages]"""
    bias: Tensor
    """float32[n, C, 1, J]: 0 where the key is visible, MASKED elsewhere."""
    unwritten: Tensor
    """int64[u]: which of the n * J gathered keys belong to no token yet. They are overwritten before use."""


class Plan(NamedTuple):
    """Where a step's queries and keys lie."""

    slots: Tensor
    """int64[T]"""
    groups: dict[int, list[_Group]]
    """For each window that occurs in the model."""


def make_plan(batch: Batch, config: ModelConfig, page_size: int) -> Plan:
    """The plan of a batch, of NumPy arrays: `to_device` puts it where the step runs."""
    decodes, chunks = query_tiles(batch, CHUNK)
    groups = {
        window: [
            _make_group(batch, tiles, size, part, window, page_size)
            for tiles, size, most in ((decodes, 1, _DECODE_PAGES), (chunks, CHUNK, _CHUNK_PAGES))
            for part in length_classes(tiles, page_size, window, most)
        ]
        for window in sorted(set(config.layer_window))
    }
    return Plan(batch.slots[0].astype(np.int64), groups)


def fit_plan(plan: Plan, tokens: int, seqs: int, pages: int, chunked: bool) -> Plan:
    """The plan as it is: steps of all sizes run the same operations."""
    return plan


def _make_group(batch: Batch, tiles: Tiles, C: int, part: LengthClass, window: int, page_size: int) -> _Group:
    first, count, position = (x[part.tiles, None] for x in (tiles.first, tiles.count, tiles.position))
    query = np.arange(C, dtype=np.int32)
    real = query < count
    table = batch.page_table[0][tiles.seq[part.tiles]]
    column = part.page_start[:, None] + np.arange(part.pages)
    inside = column < table.shape[1]
    page = np.where(inside, np.take_along_axis(table, np.where(inside, column, 0), axis=1), 0)
    key = part.page_start[:, None] * page_size + np.arange(part.pages * page_size, dtype=np.int32)
    query_position = (position + query)[:, :, None]
    visible = key[:, None] <= query_position
    if window:
        visible &= key[:, None] > query_position - window
    arrays = (
        (first + np.where(real, query, 0)).reshape(-1).astype(np.int64),
        None if real.all() else np.flatnonzero(real),
        page.astype(np.int64),
        np.where(visible, np.float32(0), np.float32(MASKED))[:, :, None],
        np.flatnonzero(key >= position + count),
    )
    return _Group(*arrays)  # type: ignore[arg-type]


def paged_attention(config: ModelConfig, plan: Plan) -> Attend:
    """Attention of packed tokens over their sequences' pages; writes the new keys and values first."""
    scale, Q = config.attention_scale, config.queries_per_kv

    def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layer: int, cache: KVCache) -> tuple[Tensor, KVCache]:
        cache = write(cache, layer, k_TKH, v_TKH, plan.slots)
        out_TNH = torch.empty_like(q_TNH)
        for group in plan.groups[config.layer_window[layer]]:
            rows, result = group.rows, _attend_group(q_TNH, cache.k[layer], cache.v[layer], group, Q, scale)
            if group.take is not None:
                rows, result = rows[group.take], result[group.take]
            out_TNH[rows] = result
        return out_TNH, cache

    return attend


def _attend_group(q_TNH: Tensor, k_pool: Tensor, v_pool: Tensor, group: _Group, Q: int, scale: float) -> Tensor:
    """Softmax attention of one group: [n * C, N, H]."""
    _, N, H = q_TNH.shape
    n, C, K = group.bias.shape[0], group.bias.shape[1], N // Q
    k_KnJH, v_KnJH = gather(k_pool, group.pages), gather(v_pool, group.pages)
    for x in (k_KnJH, v_KnJH):
        x.view(K, -1, H).index_fill_(1, group.unwritten, 0)
    q = q_TNH[group.rows].view(n, C, K, Q, H).permute(2, 0, 1, 3, 4).reshape(K, n, C * Q, H)
    s = scores(q, k_KnJH).view(K, n, C, Q, -1)
    p = torch.softmax(torch.add(group.bias, s, alpha=scale), dim=-1).to(q.dtype)
    out = weighted(p.view(K, n, C * Q, -1), v_KnJH).view(K, n, C, Q, H)
    return out.permute(1, 2, 0, 3, 4).reshape(n * C, N, H)


def dense_attention(config: ModelConfig) -> Attend:
    """Causal attention of one sequence over itself, without pages: for training, gradients, vmap and tests."""

    def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layer: int, cache: Any) -> tuple[Tensor, Any]:
        T, N, H = q_TNH.shape
        q_KTQH = q_TNH.view(T, -1, config.queries_per_kv, H).permute(1, 0, 2, 3)
        position = torch.arange(T, device=q_TNH.device)
        visible = position[:, None] >= position
        if window := config.layer_window[layer]:
            visible = visible & (position[:, None] - position < window)
        s = scores(q_KTQH.reshape(q_KTQH.shape[0], -1, H), k_TKH.transpose(0, 1)).view(*q_KTQH.shape[:3], T)
        p = torch.softmax(torch.where(visible[:, None], s.float() * config.attention_scale, MASKED), dim=-1).to(v_TKH.dtype)
        out = weighted(p.view(p.shape[0], -1, T), v_TKH.transpose(0, 1)).view(q_KTQH.shape)
        return out.permute(1, 0, 2, 3).reshape(T, N, H), cache

    return attend


def scores(q: Tensor, k: Tensor) -> Tensor:
    """q kᵀ: [..., i, H], [..., j, H] -> [..., i, j]"""
    return q @ k.transpose(-1, -2)


def weighted(p: Tensor, v: Tensor) -> Tensor:
    """p v: [..., i, j], [..., j, H] -> [..., i, H]"""
    return p @ v
