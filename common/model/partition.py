"""How ranks and stages share a model. This file is arithmetic alone.

Stages share the layers. The ranks of a stage share each layer: a rank computes with some of the heads, features and tokens.

A stage's part of a model is a smaller model too. It begins with tokens or with the residual stream of the stage before it, and
ends with its own stream or with logits.

A rank's part of a model is a smaller model with the same residual stream. What its attention and its MLP add to the stream are
terms of a sum over the ranks (Shoeybi et al. 2019, arXiv:1909.08053, §3). Its tokens are its rows of embedding and LM head.

All ranks have one shape, so that one program serves them. Zeros, which add nothing, fill up what does not divide evenly. KV
heads are split with the queries that read them. If they are fewer than the ranks, several ranks have the same head and split
its queries.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from common.config import MAX_RANKS, ModelConfig, expect

BLOCK = 128
"""Tokens that samplers sum at once. No block lies on two ranks, so that its sum is the same on any number of them."""


class Span(NamedTuple):
    """What a rank has along one axis: the indices [start, stop) of the whole, then zeros up to `size`."""

    start: int
    stop: int
    size: int

    def times(self, n: int) -> Span:
        """In units of which each of these has n."""
        return Span(*(n * x for x in self))


class Share(NamedTuple):
    """What one rank has of a model."""

    queries: Span
    """Of N."""
    kv_heads: Span
    """Of K."""
    features: Span
    """Of F."""
    tokens: Span
    """Of V."""


def stage_layers(layers: int, stages: int) -> list[range]:
    """The layers of each stage in turn, as evenly as it goes: some of the first have one more."""
    least, more = divmod(layers, stages)
    ends = [least * stage + min(stage, more) for stage in range(stages + 1)]
    return [range(start, end) for start, end in pairwise(ends)]


def stage_config(config: ModelConfig, stage: int, stages: int) -> ModelConfig:
    """The model that stage `stage` of `stages` computes. Raises `ConfigError` if there are not enough layers."""
    if stages == 1:
        return config
    L = config.num_layers
    expect(
        stages <= L,
        f"pipeline_parallel_size={stages} needs a layer for each stage, and this model has {L}. Numbers that can: 1 to {L}.",
    )
    layers = stage_layers(L, stages)[stage]
    return replace(
        config,
        num_layers=len(layers),
        layer_rope=config.layer_rope[layers.start : layers.stop],
        layer_window=config.layer_window[layers.start : layers.stop],
        embeds=stage == 0,
        predicts=stage == stages - 1,
    )


def local_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """The model that each of `ranks` ranks computes. Raises `ConfigError` if they cannot share it out."""
    if ranks == 1:
        return config
    expect_divides(config, ranks)
    copies = _copies(config, ranks)
    kv_heads = -(-config.num_kv_heads * copies // ranks)
    return replace(
        config,
        num_heads=kv_heads * -(-config.queries_per_kv // copies),
        num_kv_heads=kv_heads,
        intermediate_size=config.intermediate_size // ranks,
        vocab_size=-(-config.vocab_size // (ranks * BLOCK)) * BLOCK,
        bos_token_id=None,  # token ids are the whole model's
        eos_token_ids=(),
    )


def share(config: ModelConfig, rank: int, ranks: int) -> Share:
    """What rank `rank` of `ranks` has of a model. Raises `ConfigError` if they cannot share it out."""
    local, copies, Q = local_config(config, ranks), _copies(config, ranks), config.queries_per_kv
    first, part = divmod(rank * local.num_kv_heads, copies)
    kv_heads = _span(first, local.num_kv_heads, config.num_kv_heads)
    start = kv_heads.start * Q + part * local.queries_per_kv
    return Share(
        queries=_span(start, local.num_heads, kv_heads.stop * Q),
        kv_heads=kv_heads,
        features=_span(rank * local.intermediate_size, local.intermediate_size, config.intermediate_size),
        tokens=_span(rank * local.vocab_size, local.vocab_size, config.vocab_size),
    )


def pool_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """The model as the pages of all ranks together hold it: with the KV heads that several have, and those of zeros."""
    local = local_config(config, ranks)
    return replace(config, num_heads=local.num_heads * ranks, num_kv_heads=local.num_kv_heads * ranks)


def join_heads(x: np.ndarray, config: ModelConfig, ranks: int) -> np.ndarray:
    """[..., K, H] of a model, from what all ranks have, side by side: [..., K', H]."""
    places = _places(config, ranks).tolist()
    return x[..., [places.index(head) for head in range(config.num_kv_heads)], :]


def split_heads(x: np.ndarray, config: ModelConfig, ranks: int) -> np.ndarray:
    """The inverse of `join_heads`."""
    places = _places(config, ranks)
    return np.where(places[:, None] < 0, x.dtype.type(0), x[..., places, :])


def expect_shareable(config: ModelConfig, ranks: int, stages: int) -> None:
    """Raise `ConfigError`, with the numbers that can, unless so many stages of so many ranks can share out a model."""
    stage_config(config, 0, stages)
    local_config(config, ranks)


def expect_divides(config: ModelConfig, ranks: int) -> None:
    """Raise `ConfigError`, with the numbers of ranks that can, unless `ranks` of them can share out a model."""
    F = config.intermediate_size
    able = ", ".join(str(n) for n in range(1, MAX_RANKS + 1) if F % n == 0)
    expect(
        F % ranks == 0,
        f"tensor_parallel_size={ranks} does not divide the {F} features of this model's MLP. Numbers that do: {able}.",
    )


def _places(config: ModelConfig, ranks: int) -> np.ndarray:
    """int[K']: which KV head stands at each place of all ranks' in turn, -1 for zeros."""
    spans = [share(config, rank, ranks).kv_heads for rank in range(ranks)]
    return np.array([i if i < span.stop else -1 for span in spans for i in range(span.start, span.start + span.size)])


def _copies(config: ModelConfig, ranks: int) -> int:
    """How many ranks have the same KV head."""
    return max(1, ranks // config.num_kv_heads)


def _span(start: int, size: int, end: int) -> Span:
    """`size` from `start` on, as far as there are any before `end`."""
    return Span(min(start, end), min(start + size, end), size)
