"""Logits to tokens. Every token is a pure function of its logits, its request's seed and its position.

No generator has a state. So batch, order and preemption cannot change a token.

Ranks that share a vocabulary each have the logits of their own V tokens, and all choose the same token. What depends on a whole
row goes through the `group`.

Letters: R logit rows · V vocabulary · E edits · M masks · W = ceil(V / 32).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.model.partition import BLOCK
from common.request import MAX_LOGPROBS
from torchinfer.parallel import ALONE, Group


class Sampled(NamedTuple):
    tokens: Tensor
    """int64[R]"""
    finite: Tensor
    """bool[R]: whether every logit of the row is."""
    logprobs: Tensor | None
    """float32[R], of the raw logits; None, like all fields below, if not requested."""
    ranks: Tensor | None
    """int64[R]: 1 + how many logits are greater."""
    top_ids: Tensor | None
    """int64[R, MAX_LOGPROBS], falling, ties to the lower id."""
    top_logprobs: Tensor | None
    """float32[R, MAX_LOGPROBS]"""


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Return a uniform number in (0, 1) per row, from its seed int64[R, 2] and the position of the token that it chooses.

    Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", §4.2). The key is the seed,
    and the counter is (position, 0). The upper 23 bits of the first word, centered, make the number: float32 holds every value.
    """
    word = 0xFFFFFFFF  # PyTorch adds no uint32s: the same arithmetic in int64, cut to 32 bits
    key = (seeds[:, 0], seeds[:, 1], seeds[:, 0] ^ seeds[:, 1] ^ 0x1BD11BDA)
    x, y = (positions + key[0]) & word, key[1]
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = (x + y) & word
            y = (((y << turn) | (y >> (32 - turn))) & word) ^ x
        x, y = (x + key[(group + 1) % 3]) & word, (y + key[(group + 2) % 3] + group + 1) & word
    return ((x >> 9).float() + 0.5) * 2**-23


def mask(logits: Tensor, rows: Tensor, masks: Tensor, group: Group = ALONE) -> Tensor:
    """Logits float32[R, V] with -inf where one of int64[M, W] of 32 bits, each for the row of int64[M], has no bit."""
    missing = (~masks[:, :, None] >> torch.arange(32, device=masks.device)) & 1
    count = torch.zeros(logits.shape, dtype=torch.int64, device=logits.device)
    count = count.index_add(0, rows, group.columns(missing.flatten(1), logits.shape[1]))  # a row may have several masks
    return logits.masked_fill(count > 0, -torch.inf)


def edit(logits: Tensor, rows: Tensor, ids: Tensor, edits: Tensor, group: Group = ALONE) -> Tensor:
    """Logits float32[R, V], changed at int64[E] rows and ids, none twice, by float32[E, 3]: bias, repetition factor,
    penalty."""
    ids, rows, edits = group.own(logits.shape[1], ids, rows, edits)
    bias, repetition, penalty = edits.unbind(1)
    x = logits[rows, ids] + bias
    x = torch.where(x > 0, x / repetition, x * repetition) - penalty
    return logits.index_put((rows, ids), x)


def greedy(logits: Tensor, group: Group = ALONE) -> Tensor:
    """The lowest id among the highest logits: float32[R, V] -> int64[R]."""
    return group.best(logits, logits.argmax(dim=-1))


def keep(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, group: Group = ALONE) -> Tensor:
    """Scaled logits with the tokens that min_p, then top_k, then top_p drop at -inf. top_k 0 keeps all."""
    peak = group.fold(torch.amax, scaled.amax(dim=-1, keepdim=True))
    scaled = torch.where(scaled >= peak + min_p.log()[:, None], scaled, -torch.inf)
    k = torch.where(top_k > 0, top_k, group.ranks * scaled.shape[1]).float()
    scaled = _cut(scaled, lambda kept: kept.float(), k, group)
    weights = (scaled - peak).exp()
    # A row without top_p must not lose its tail to the rounding of a sum.
    mass = torch.where(top_p < 1, top_p * group.fold(torch.sum, weights.sum(dim=-1)), torch.inf)
    return _cut(scaled, lambda kept: torch.where(kept, weights, 0), mass, group)


def inverse_cdf(scaled: Tensor, u: Tensor, group: Group = ALONE) -> Tensor:
    """The token at which the cumulative softmax of float32[R, V], in id order, first exceeds u in (0, 1): int64[R]."""
    R, V = scaled.shape
    weights = (scaled - group.fold(torch.amax, scaled.amax(dim=-1, keepdim=True))).exp()
    blocks = F.pad(weights, (0, -V % BLOCK)).unflatten(1, (-1, BLOCK))
    upto = group.join(blocks.sum(dim=-1)).cumsum(dim=-1)
    target = u * upto[:, -1]
    which = (upto <= target[:, None]).sum(dim=-1).clamp(max=upto.shape[1] - 1)
    row = torch.arange(R, device=scaled.device)
    before = torch.where(which > 0, upto[row, which - 1], 0)
    block = group.look_up(lambda which: blocks[row, which], which, blocks.shape[1])
    inside = block.cumsum(dim=-1)
    offset = (inside <= (target - before)[:, None]).sum(dim=-1)
    # Rounding may carry the target past the block's end: then its last token of any weight is meant.
    last = BLOCK - 1 - (block.flip(-1) > 0).to(torch.uint8).argmax(dim=-1)
    return which * BLOCK + torch.minimum(offset, last)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    u: Tensor,
    filtered: bool,
    group: Group = ALONE,
) -> Tensor:
    """Return tokens int64[R]: greedy at temperature 0, else by inverse CDF after the filters.

    `filtered` states whether any row has a filter. Without one the filters cost nothing.
    """
    hot = temperature > 0
    scaled = logits / torch.where(hot, temperature, 1)[:, None]
    scaled = keep(scaled, top_k, top_p, min_p, group) if filtered else scaled
    return torch.where(hot, inverse_cdf(scaled, u, group), greedy(logits, group))


def logprobs_of(logits: Tensor, tokens: Tensor, group: Group = ALONE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logprob and rank of each row's token, and its MAX_LOGPROBS likeliest tokens with theirs."""
    R, V = logits.shape
    norm = group.fold(torch.logsumexp, logits.logsumexp(dim=-1))
    row = torch.arange(R, device=logits.device)
    chosen = group.look_up(lambda tokens: logits[row, tokens], tokens, V)
    ranks = 1 + group.fold(torch.sum, (logits > chosen[:, None]).sum(dim=-1))
    k = min(MAX_LOGPROBS, V)
    top, ids = logits.topk(k, dim=-1)
    least = top[:, -1:]
    if ((logits >= least).sum(dim=-1) > k).any():
        # topk takes any of the logits that tie for the last place: take those of the lowest ids.
        by_rank = torch.where(logits == least, -torch.arange(V, device=logits.device), -V)
        ids = torch.where(logits > least, 1, by_rank).topk(k, dim=-1).indices
        top = logits.gather(1, ids)
    # It also leaves ties in any order: put equal logits in the order of their ids.
    by_id = ids.argsort(dim=-1)
    order = by_id.gather(1, top.gather(1, by_id).argsort(dim=-1, descending=True, stable=True))
    top, ids = group.highest(top.gather(1, order), ids.gather(1, order), V)
    return chosen - norm, ranks, ids, top - norm[:, None]


def _cut(x: Tensor, mass: Callable[[Tensor], Tensor], target: Tensor, group: Group) -> Tensor:
    """x with everything below the highest threshold t at -inf for which the mass of {x >= t} reaches the target.

    The threshold is found bit by bit in the order of floats as integers: no vocabulary is sorted, and ties stay together.
    """
    signed = torch.where(x == 0, 0, x).view(torch.int32)  # zeros of both signs tie too
    order = torch.where(signed < 0, signed ^ 0x7FFFFFFF, signed)  # as signed integers: rising with x
    threshold = torch.full_like(order[:, 0], -(2**31))
    for bit in range(31, -1, -1):
        # The sign bit is cleared, not set, to go up from the least int32.
        trial = threshold + (1 << bit) if bit < 31 else torch.zeros_like(threshold)
        enough = group.fold(torch.sum, mass(order >= trial[:, None]).sum(dim=-1)) >= target
        threshold = torch.where(enough, trial, threshold)
    return torch.where(order >= threshold[:, None], x, -torch.inf)
