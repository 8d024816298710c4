"""Logits to tokens. Every token is a pure function of its logits, its request's seed and its position.

No generator has a state. So batch, order and preemption cannot change a token.

Ranks that share a vocabulary each have the logits of their own V tokens, and all choose the same token. What depends on a whole
row goes through the `group`.

Letters: R logit rows · V vocabulary · E edits · M masks · W = ceil(V / 32).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from common.model.partition import BLOCK
from common.request import MAX_LOGPROBS
from jaxinfer.parallel import ALONE, Group, without_negative_zero


class Sampled(NamedTuple):
    tokens: Array
    """int32[R]"""
    finite: Array
    """bool[R]: whether every logit of the row is."""
    logprobs: Array
    """float32[R], of the raw logits."""
    ranks: Array
    """int32[R]: 1 + how many logits are greater."""
    top_ids: Array
    """int32[R, MAX_LOGPROBS], falling, ties to the lower id."""
    top_logprobs: Array
    """float32[R, MAX_LOGPROBS]"""


def uniform(seeds: Array, positions: Array) -> Array:
    """Return a uniform number in (0, 1) per row, from its seed uint32[R, 2] and the position of the token that it chooses.

    Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", §4.2). The key is the seed,
    and the counter is (position, 0). The upper 23 bits of the first word, centered, make the number: float32 holds every value.
    """
    key = (seeds[:, 0], seeds[:, 1], seeds[:, 0] ^ seeds[:, 1] ^ jnp.uint32(0x1BD11BDA))
    x, y = positions.astype(jnp.uint32) + key[0], key[1]
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = ((y << turn) | (y >> (32 - turn))) ^ x
        x, y = x + key[(group + 1) % 3], y + key[(group + 2) % 3] + jnp.uint32(group + 1)
    return ((x >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2**-23)


def mask(logits: Array, rows: Array, masks: Array, group: Group = ALONE) -> Array:
    """Logits float32[R, V] with -inf where one of uint32[M, W], each for the row of int32[M], has no bit. Rows from R on are
    left out."""
    bits = (masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    allowed = group.columns(bits.reshape(len(masks), -1), logits.shape[1]) > 0
    limits = jnp.where(allowed, jnp.inf, -jnp.inf)
    return logits.at[rows].min(limits, mode="drop")


def edit(logits: Array, rows: Array, ids: Array, edits: Array, group: Group = ALONE) -> Array:
    """Logits float32[R, V], changed at int32[E] rows and ids, none twice, by float32[E, 3]: bias, repetition factor, penalty.
    Rows from R on are left out."""
    ids, rows, edits = group.own(logits.shape[1], ids, rows, edits)
    bias, repetition, penalty = edits.T
    x = logits[rows, ids] + bias
    x = jnp.where(x > 0, x / repetition, x * repetition) - penalty
    return logits.at[rows, ids].set(x, mode="drop")


def greedy(logits: Array, group: Group = ALONE) -> Array:
    """The lowest id among the highest logits: float32[R, V] -> int32[R]."""
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    # Two plain reductions run several times faster on XLA:CPU than its argmax, which reduces pairs.
    ids = jnp.min(jnp.where(logits == logits.max(axis=-1, keepdims=True), ids, logits.shape[1] - 1), axis=-1)
    return group.best(logits, ids)


def keep(scaled: Array, top_k: Array, top_p: Array, min_p: Array, group: Group = ALONE) -> Array:
    """Scaled logits with the tokens that min_p, then top_k, then top_p drop at -inf. top_k 0 keeps all."""
    peak = group.fold(jnp.max, scaled.max(axis=-1, keepdims=True))
    scaled = jnp.where(scaled >= peak + jnp.log(min_p)[:, None], scaled, -jnp.inf)
    k = jnp.where(top_k > 0, top_k, group.ranks * scaled.shape[1]).astype(jnp.float32)
    scaled = _cut(scaled, lambda kept: kept.astype(jnp.float32), k, group)
    weights = jnp.exp(scaled - peak)
    # A row without top_p must not lose its tail to the rounding of a sum.
    mass = jnp.where(top_p < 1, top_p * group.fold(jnp.sum, weights.sum(axis=-1)), jnp.inf)
    return _cut(scaled, lambda kept: jnp.where(kept, weights, 0), mass, group)


def inverse_cdf(scaled: Array, u: Array, group: Group = ALONE) -> Array:
    """The token at which the cumulative softmax of float32[R, V], in id order, first exceeds u in (0, 1): int32[R]."""
    R, V = scaled.shape
    weights = jnp.exp(scaled - group.fold(jnp.max, scaled.max(axis=-1, keepdims=True)))
    blocks = jnp.pad(weights, ((0, 0), (0, -V % BLOCK))).reshape(R, -1, BLOCK)
    upto = jnp.cumsum(group.join(blocks.sum(axis=-1)), axis=-1)
    target = u * upto[:, -1]
    which = jnp.minimum(jnp.sum(upto <= target[:, None], axis=-1), upto.shape[1] - 1)
    row = jnp.arange(R)
    before = jnp.where(which > 0, upto[row, which - 1], 0)
    block = group.look_up(lambda which: blocks[row, which], which, blocks.shape[1])
    inside = jnp.cumsum(block, axis=-1)
    offset = jnp.sum(inside <= (target - before)[:, None], axis=-1)
    # Rounding may carry the target past the block's end: then its last token of any weight is meant.
    last = BLOCK - 1 - jnp.argmax(block[:, ::-1] > 0, axis=-1)
    return (which * BLOCK + jnp.minimum(offset, last)).astype(jnp.int32)


def sample(
    logits: Array,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    u: Array,
    filtered: Array,
    group: Group = ALONE,
) -> Array:
    """Return tokens int32[R]: greedy at temperature 0, else by inverse CDF after the filters.

    `filtered` states whether any row has a filter. Without one the filters cost nothing.
    """
    hot = temperature > 0
    scaled = logits / jnp.where(hot, temperature, 1)[:, None]
    scaled = lax.cond(filtered, lambda: keep(scaled, top_k, top_p, min_p, group), lambda: scaled)
    return jnp.where(hot, inverse_cdf(scaled, u, group), greedy(logits, group))


def logprobs_of(logits: Array, tokens: Array, group: Group = ALONE) -> tuple[Array, Array, Array, Array]:
    """Logprob and rank of each row's token, and its MAX_LOGPROBS likeliest tokens with theirs."""
    R, V = logits.shape
    norm = group.fold(jax.nn.logsumexp, jax.nn.logsumexp(logits, axis=-1))
    chosen = group.look_up(lambda tokens: logits[jnp.arange(R), tokens], tokens, V)
    ranks = 1 + group.fold(jnp.sum, jnp.sum(logits > chosen[:, None], axis=-1, dtype=jnp.int32))
    top, ids = group.highest(*lax.top_k(without_negative_zero(logits), min(MAX_LOGPROBS, V)), V)
    return chosen - norm, ranks, ids.astype(jnp.int32), top - norm[:, None]


def _cut(x: Array, mass: Callable[[Array], Array], target: Array, group: Group) -> Array:
    """x with everything below the highest threshold t at -inf for which the mass of {x >= t} reaches the target.

    The threshold is found bit by bit in the order of floats as integers: no vocabulary is sorted, and ties stay together.
    """
    signed = lax.bitcast_convert_type(without_negative_zero(x), jnp.int32)
    order = jnp.where(signed < 0, ~signed, signed ^ jnp.int32(-(2**31))).astype(jnp.uint32)

    def step(bit: Array, low: Array) -> Array:
        trial = low | (jnp.uint32(1) << (jnp.uint32(31) - bit.astype(jnp.uint32)))
        enough = group.fold(jnp.sum, mass(order >= trial[:, None]).sum(axis=-1)) >= target
        return jnp.where(enough, trial, low)

    threshold = lax.fori_loop(0, 32, step, jnp.zeros(x.shape[0], jnp.uint32))
    return jnp.where(order >= threshold[:, None], x, -jnp.inf)
