"""The judge of sampling: DESIGN §6 in NumPy and float64, row by row, with sorting where the engines search.

Threefry is from Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", §4.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.request import Request

ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
MASK = 0xFFFF_FFFF


@dataclass(frozen=True, kw_only=True)
class Filters:
    """How a row samples. Zero `top_k` and `min_p` and a `top_p` of one keep everything."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def adjusted(logits: np.ndarray, request: Request, output: Sequence[int]) -> np.ndarray:
    """The logits float64[V] that a request chooses from behind an output: masks, bias, penalties, in DESIGN's order."""
    x, params = logits.astype(np.float64), request.params
    if params.allowed_token_ids is not None:
        x[[token for token in range(len(x)) if token not in params.allowed_token_ids]] = -np.inf
    for *before, last in request.bad_words:
        if list(output[len(output) - len(before) :]) == before:
            x[last] = -np.inf
    if len(output) < params.min_tokens:
        x[[*params.stop_token_ids, *(() if params.ignore_eos else request.eos_token_ids)]] = -np.inf
    for token, bias in params.logit_bias or ():
        x[token] += bias
    for token in {*request.prompt_token_ids, *output}:
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token, count in Counter(output).items():
        x[token] -= count * params.frequency_penalty + params.presence_penalty
    return x


def scores(logits: np.ndarray, token: int, k: int) -> tuple[float, int, list[int], list[float]]:
    """Logprob and rank of a token, and the k likeliest with theirs."""
    x = logits.astype(np.float64)
    x = x - x.max()
    x -= np.log(np.exp(x).sum())
    top = np.argsort(-logits, kind="stable")[:k]
    return float(x[token]), 1 + int((logits > logits[token]).sum()), top.tolist(), x[top].tolist()


def threefry(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Threefry-2x32 with 20 rounds."""
    keys = (*key, key[0] ^ key[1] ^ 0x1BD1_1BDA)
    x, y = (counter[0] + keys[0]) & MASK, (counter[1] + keys[1]) & MASK
    for turn in range(20):
        left = ROTATIONS[turn % 8]
        x = (x + y) & MASK
        y = ((y << left | y >> 32 - left) & MASK) ^ x
        if turn % 4 == 3:
            group = turn // 4 + 1
            x, y = (x + keys[group % 3]) & MASK, (y + keys[(group + 1) % 3] + group) & MASK
    return x, y


def uniform(seed: tuple[int, int], position: int) -> float:
    """The number in (0, 1) of a request's seed and the position of the token it chooses: a multiple of 2**-24, never an end."""
    return ((threefry(seed, (position, 0))[0] >> 9) + 0.5) * 2.0**-23


def probabilities(logits: np.ndarray, filters: Filters) -> np.ndarray:
    """What a row is drawn from, float64[V]: temperature, then min_p, top_k (ties at the k-th stay), top_p (at least one)."""
    scaled = logits.astype(np.float64) / filters.temperature
    weights = np.exp(scaled - scaled.max())
    weights[weights < filters.min_p] = 0
    if 0 < filters.top_k < len(weights):
        weights[weights < np.sort(weights)[-filters.top_k]] = 0
    if filters.top_p < 1:
        falling = np.sort(weights)[::-1]
        enough = np.flatnonzero(np.cumsum(falling) >= filters.top_p * weights.sum())[0]
        weights[weights < falling[enough]] = 0
    return weights / weights.sum()


def inverse_cdf(p: np.ndarray, u: float) -> int:
    """The first token at which the cumulative probability exceeds u."""
    return int(min(np.searchsorted(np.cumsum(p), u, side="right"), np.flatnonzero(p)[-1]))


def choices(logits: np.ndarray, filters: Filters, u: float, slack: float = 0.0) -> set[int]:
    """The tokens that a row may choose if every sum is known up to a relative error of `slack`: most often one."""
    if filters.temperature == 0 or not np.isfinite(logits.max()):
        return {int(np.argmax(logits))}
    tokens = set()
    for nudge in {-slack, 0.0, slack}:
        top_p = filters.top_p if filters.top_p == 1 else filters.top_p * (1 + nudge)
        for floor in {-slack, 0.0, slack} if filters.min_p else {0.0}:
            nudged = Filters(
                temperature=filters.temperature, top_k=filters.top_k, top_p=top_p, min_p=min(filters.min_p * (1 + floor), 1.0)
            )
            p = probabilities(logits, nudged)
            tokens |= {inverse_cdf(p, u + shift) for shift in (-slack, 0.0, slack)}
    return tokens
