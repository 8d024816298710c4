"""Do two engines compute the same thing? Judged by margin, where their tokens first differ.

Two engines that round differently will now and then choose differently between two tokens that are almost equally likely. Such
a divergence is justified if the float64 margin between the choices is below twice the error measured at that position, and if
that error is no larger than rounding explains: a defect widens both. After it the two runs have different histories and are not
compared. Where a log-probability is NaN or infinite nothing agrees, and two engines that both fall short of the tokens that
were asked for do not agree by that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.request import Logprobs

if TYPE_CHECKING:
    from experiments.correctness.reference import NumpyModel

Reference = Callable[[Sequence[int]], np.ndarray]
"""From a history of token ids to the float64 log-probabilities of the next token, [V]."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Where two engines first chose differently."""

    position: int
    """Of the output token, from 0."""
    tokens: tuple[int | None, int | None]
    """The two choices; None for an engine that had ended."""
    margin: float | None
    """Float64 distance of their log-probabilities; None where an engine had ended, or was not finite."""
    error: float | None
    """The largest error of the two engines' log-probabilities of the two choices; None where neither reported any."""
    justified: bool


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two engines agree on one request."""

    num_equal: int
    """Output tokens before the first divergence."""
    max_abs_logprob_diff: float
    """Over the tokens reported by both, up to and at the first divergence: until there they read the same history."""
    divergence: Divergence | None
    num_above: int = 0
    """Positions at which such a difference exceeds the tolerance. NaN exceeds it."""


def judge(
    prompt: Sequence[int],
    tokens_a: Sequence[int],
    tokens_b: Sequence[int],
    logprobs_a: Sequence[Logprobs],
    logprobs_b: Sequence[Logprobs],
    reference: Reference,
    tolerance: float,
    num_asked: int = 0,
) -> Agreement:
    """Compare two greedy outputs of one prompt. `reference` is asked only where they differ.

    `tolerance` is the largest error of a log-probability that rounding explains; `num_asked` tokens were asked of each.
    """
    num_equal = common_prefix(tokens_a, tokens_b)
    tables = [(table(a), table(b)) for a, b in zip(logprobs_a, logprobs_b, strict=False)][: num_equal + 1]
    diffs = [max_diff(a, b) for a, b in tables]
    divergence = None
    if (broken := next((i for i, pair in enumerate(tables) if not finite(pair)), None)) is not None:
        divergence = unjust(broken, tokens_a, tokens_b)
    elif num_equal < min(len(tokens_a), len(tokens_b)):
        exact = reference([*prompt, *tokens_a[:num_equal]])
        choices = (tokens_a[num_equal], tokens_b[num_equal])
        divergence = weigh(num_equal, choices, (table(logprobs_a[num_equal]), table(logprobs_b[num_equal])), exact, tolerance)
    elif num_equal < max(len(tokens_a), len(tokens_b), num_asked):
        divergence = unjust(num_equal, tokens_a, tokens_b)  # ended early: no rounding does that
    return Agreement(
        num_equal=num_equal,
        max_abs_logprob_diff=float(np.max(diffs)) if diffs else 0.0,
        divergence=divergence,
        num_above=sum(not diff <= tolerance for diff in diffs),
    )


def weigh(
    position: int, tokens: tuple[int, int], reported: Sequence[dict[int, float]], exact: np.ndarray, tolerance: float
) -> Divergence:
    """Is the distance of two choices within the error that was measured? NaN anywhere justifies nothing."""
    margin = float(abs(exact[tokens[0]] - exact[tokens[1]]))
    errors = [abs(logprobs[token] - exact[token]) for logprobs in reported for token in tokens if token in logprobs]
    if not errors:  # neither engine holds its own choice for likely: there is nothing to measure an error by
        return Divergence(position=position, tokens=tokens, margin=margin, error=None, justified=False)
    error = float(np.max(errors))
    return Divergence(
        position=position,
        tokens=tokens,
        margin=margin,
        error=error,
        justified=bool(margin < 2 * error and error <= tolerance),
    )


def max_diff(a: Mapping[int, float], b: Mapping[int, float]) -> float:
    """Return the largest difference of two log-probabilities of one token: 0 without common tokens, NaN if not finite."""
    return float(np.max([abs(a[token] - b[token]) for token in a.keys() & b.keys()], initial=0.0))


def finite(tables: Sequence[Mapping[int, float]]) -> bool:
    return all(math.isfinite(logprob) for logprobs in tables for logprob in logprobs.values())


def unjust(position: int, tokens_a: Sequence[int], tokens_b: Sequence[int]) -> Divergence:
    """A divergence that needs no float64 to be judged."""
    a, b = (tokens[position] if position < len(tokens) else None for tokens in (tokens_a, tokens_b))
    return Divergence(position=position, tokens=(a, b), margin=None, error=None, justified=False)


def table(logprobs: Logprobs) -> dict[int, float]:
    """Token id → log-probability, as an engine reported it for one position."""
    return dict(zip(logprobs.top_ids, logprobs.top_logprobs, strict=True))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two outputs share before they first differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def float64_reference(model: NumpyModel) -> Reference:
    """Return the dense forward pass of a model as a reference for `judge`."""
    return lambda token_ids: log_softmax(model.logits(token_ids, rows=np.array([len(token_ids) - 1]))[0])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64[..., V]. NaN stays NaN."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
