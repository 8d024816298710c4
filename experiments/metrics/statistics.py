"""Compute the ratio of paired blocks with an interval, and a verdict. Pure functions; the randomness is seeded.

The unit of replication is the block, in which each engine runs once. Its requests and tokens are not independent samples. The
logarithm of the ratio is taken within a block, so the result does not depend on the order of the two names.

The blocks are independent because their orders are (`experiments.measure.blocks.block_order`). A disturbance of the machine
that does not depend on the engine enters the logarithm of a block's ratio with a random sign. The logarithms are then
symmetric around the true one and uncorrelated, whether the disturbance is a drift, a rhythm or a burst (Fisher 1935).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import scipy  # whose parts are imported as they are used: a run of one engine uses none

from common.config import expect, real

LEAST_BLOCKS = 3
"""Fewer give no interval."""
EXACT_BLOCKS = 12
"""Up to so many the permutation test goes through all signs."""
RESAMPLES = 9999
"""Random signs of the permutation test above `EXACT_BLOCKS`."""

Verdict = Literal["faster", "slower", "equivalent", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Criteria:
    """What a verdict demands. Also `measure.confidence` and `measure.equivalence`."""

    confidence: float = 0.95
    equivalence: float = 0.05

    def __post_init__(self) -> None:
        for name, high in (("confidence", 1), ("equivalence", 10)):
            value = getattr(self, name)
            expect(
                real(value, 0, high) and 0 < value < high,
                f"measure.{name} must be a number in (0, {high}), got {value!r}.",
            )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A geometric mean over blocks, with its interval."""

    value: float | None
    """None without a block."""
    low: float | None
    high: float | None
    """The interval; None below `LEAST_BLOCKS`."""
    confidence: float
    """Of the interval."""
    blocks: int
    why: str
    """Why there is no interval; empty where there is one."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One engine against another."""

    against: str
    ratio: float | None
    """Geometric mean over blocks of the engine's output throughput over the other's; None if no block has both."""
    low: float | None
    high: float | None
    """The interval of the ratio; None below `LEAST_BLOCKS`."""
    confidence: float
    """Of the interval. Above the one asked for where several engines are compared."""
    p_value: float | None
    """Of the sign-flip permutation test that the ratio is 1."""
    p_adjusted: float | None
    """The same, after Benjamini and Hochberg over all comparisons of the run."""
    verdict: Verdict
    unproven: bool
    """Whether the interval shows a difference that the sign-flip test does not bear out."""
    blocks: int
    interval: Literal["t"] | None
    block_ratios: tuple[float, ...]
    said: str
    """All this in a sentence."""
    latencies: Mapping[str, Estimate] = field(default_factory=dict)
    """The ratio of each headlined latency to that of the other engine, below 1 if faster (`experiments.metrics.latency`)."""

    @property
    def width(self) -> float:
        """Of the interval, as a share of the ratio: the logarithm of the factor between its ends, which is the same whichever
        engine stands first. Infinite without one."""
        return math.inf if not self.low or self.high is None else math.log(self.high / self.low)


def compare_all(
    throughputs: Mapping[str, Sequence[float | None]],
    criteria: Criteria,
    seed: int,
    level: float | None = None,
    tail: float = 1.0,
) -> dict[str, Comparison]:
    """Each engine but the first against the first. `throughputs` by label and block; a block in which either has none is left
    out. With several comparisons the intervals are widened by `shared_confidence`.

    `level` is the greatest p value of a difference on which not all blocks agree, 1 - confidence unless given: a run that ends
    when it likes has less to spend on it (`experiments.measure.blocks.level`). `tail` is the share of 1 - confidence that the
    intervals leave out (`experiments.measure.blocks.tail`).
    """
    first, *others = throughputs
    logs = {label: log_ratios(throughputs[label], throughputs[first]) for label in others}
    usable = [label for label in others if len(logs[label]) >= LEAST_BLOCKS]
    miss = tail * (1 - criteria.confidence)
    inner = shared_confidence([logs[label] for label in usable], 1 - miss)
    count = max(1, len(others))
    fewest, few = fewest_blocks(count, criteria.confidence), too_few(count, criteria.confidence)
    p_values = {label: sign_flip_p(logs[label], seed) for label in usable}
    adjusted = dict(zip(usable, benjamini_hochberg(list(p_values.values())), strict=True))
    answer = {}
    for label in others:
        mine = logs[label]
        ratio = float(np.exp(mine.mean())) if len(mine) else None
        low, high = interval(mine, inner) if label in usable else (None, None)
        called = verdict(ratio, low, high, adjusted.get(label), criteria, None if unanimous(mine) else level)
        answer[label] = Comparison(
            against=first,
            ratio=ratio,
            low=low,
            high=high,
            confidence=1 - (1 - inner) / tail,
            p_value=p_values.get(label),
            p_adjusted=adjusted.get(label),
            verdict=called,
            unproven=called == "undecided" and difference(ratio, low, high, criteria.equivalence) is not None,
            blocks=len(mine),
            interval="t" if label in usable else None,
            block_ratios=tuple(np.exp(mine).tolist()),
            said=sentence(
                label, first, called, ratio, low, high, len(mine), criteria.equivalence, "" if len(mine) >= fewest else few
            ),
        )
    return answer


def undecided(label: str, found: Comparison, why: str) -> Comparison:
    """Return the comparison of the engine `label` without a verdict, for the reason `why`. Its figures remain."""
    said = "no block has a throughput of both" if found.ratio is None else f"{why} (ratio {found.ratio:.3f})"
    return replace(found, verdict="undecided", unproven=False, said=f"{label} against {found.against}: undecided, {said}")


def log_ratios(mine: Sequence[float | None], others: Sequence[float | None]) -> np.ndarray:
    """float64[blocks that have both]: the logarithm of each block's ratio."""
    pairs = [(a, b) for a, b in zip(mine, others, strict=True) if a and b]
    return np.array([math.log(a / b) for a, b in pairs])


def interval(logs: np.ndarray, confidence: float) -> tuple[float, float]:
    """Compute Student's interval of the geometric mean ratio.

    The logarithms are symmetric around the true one, so the interval needs no correction for skewness. Heavy tails, as of
    bursts, make it wider rather than too narrow (Efron 1969, Student's t-test under symmetry conditions).
    """
    size, mean = len(logs), float(logs.mean())
    reach = float(scipy.stats.t.ppf((1 + confidence) / 2, size - 1)) * float(logs.std(ddof=1)) / math.sqrt(size)
    return math.exp(mean - reach), math.exp(mean + reach)


def estimate(logs: np.ndarray, inner: float, confidence: float, why: str) -> Estimate:
    """Compute the geometric mean of the blocks' values, given by their logarithms, and its interval.

    The interval is computed with the confidence `inner` and reported with `confidence`, which a run that stops early leaves of
    it (`experiments.measure.blocks.tail`). It is left out where there is a reason `why`.
    """
    low, high = (None, None) if why else interval(logs, inner)
    value = float(np.exp(logs.mean())) if len(logs) else None
    return Estimate(value=value, low=low, high=high, confidence=confidence, blocks=len(logs), why=why)


def shared_confidence(samples: Sequence[np.ndarray], confidence: float) -> float:
    """The confidence that each of several intervals needs, so that of those which exclude 1 at most 1 - `confidence` do so
    wrongly, on average: 1 - R (1 - confidence) / m, where Benjamini and Hochberg's procedure selects R ≥ 1 of m (Benjamini and
    Yekutieli 2005). One comparison keeps its own."""
    if not samples:
        return confidence
    selected = sum(p <= 1 - confidence for p in benjamini_hochberg([student_p(logs) for logs in samples]))
    return 1 - (1 - confidence) * max(selected, 1) / len(samples)


def student_p(logs: np.ndarray) -> float:
    """Two-sided, that the mean is 0."""
    error = float(logs.std(ddof=1)) / math.sqrt(len(logs))
    if error <= 1e-12:
        return 0.0 if abs(logs.mean()) > 1e-12 else 1.0
    return float(2 * scipy.stats.t.sf(abs(logs.mean()) / error, len(logs) - 1))


def sign_flip_p(logs: np.ndarray, seed: int) -> float:
    """Two-sided permutation test that the logarithms lie evenly around 0: the share of ways to choose their signs which bring
    the mean at least so far from 0. Exact up to `EXACT_BLOCKS`, else by random signs. The least p of n blocks is 2^(1 - n)."""
    size = len(logs)
    if size <= EXACT_BLOCKS:
        signs = 1 - 2 * (np.arange(1 << size)[:, None] >> np.arange(size) & 1)
    else:
        drawn = np.random.default_rng(seed).choice((-1, 1), (RESAMPLES, size))
        signs = np.vstack([np.ones((1, size), np.int64), drawn])  # as it came is one of the ways
    sums = np.abs(signs @ logs)
    return float(np.mean(sums >= sums[0] - 1e-9 * np.abs(logs).sum()))


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Adjusted p: to call all below q keeps the false among the calls at q, on average (Benjamini and Hochberg 1995)."""
    return scipy.stats.false_discovery_control(p_values).tolist() if p_values else []


def fewest_blocks(comparisons: int, confidence: float) -> int:
    """Return the fewest blocks n that can show a difference in one of m comparisons: if all agree, p is m · 2^(1 - n)."""
    return math.ceil(1 + math.log2(comparisons / (1 - confidence)) - 1e-9)


def too_few(comparisons: int, confidence: float) -> str:
    """Return why fewer than `fewest_blocks` cannot show a difference."""
    fewest, runs = fewest_blocks(comparisons, confidence), 1 / (1 - confidence)
    among = f" in one of {comparisons} comparisons" * (comparisons > 1)
    return (
        f"{fewest} blocks are the fewest that can tell a difference{among}, since fewer agree by chance more than once in "
        f"{runs:.3g} runs"
    )


def unanimous(logs: np.ndarray) -> bool:
    """Whether in every block the same engine was the faster one."""
    return bool(np.all(logs > 0) or np.all(logs < 0))


def verdict(
    ratio: float | None,
    low: float | None,
    high: float | None,
    p_adjusted: float | None,
    criteria: Criteria,
    level: float | None = None,
) -> Verdict:
    """`equivalent` where the whole interval lies in the band [1 / (1 + equivalence), 1 + equivalence]. `faster` and `slower`
    need three keys: the interval excludes 1, the ratio is outside the band, and the sign-flip test agrees at `level`, which
    is 1 - confidence unless given. That is, a difference is sure, matters, and does not hang on how the blocks are
    distributed."""
    if ratio is None or low is None or high is None or p_adjusted is None:
        return "undecided"
    least, most = band(criteria.equivalence)
    if least <= low and high <= most:
        return "equivalent"
    agrees = p_adjusted <= (1 - criteria.confidence if level is None else level) + 1e-9
    return (agrees and difference(ratio, low, high, criteria.equivalence)) or "undecided"


def band(equivalence: float) -> tuple[float, float]:
    """Ratios that are as good as 1: whichever of two engines is the first, the same ones."""
    return 1 / (1 + equivalence), 1 + equivalence


def difference(
    ratio: float | None, low: float | None, high: float | None, equivalence: float
) -> Literal["faster", "slower"] | None:
    """What the first two keys open."""
    if ratio is None or low is None or high is None:
        return None
    least, most = band(equivalence)
    if low > 1 and ratio > most:
        return "faster"
    return "slower" if high < 1 and ratio < least else None


def sentence(
    label: str,
    first: str,
    called: Verdict,
    ratio: float | None,
    low: float | None,
    high: float | None,
    blocks: int,
    equivalence: float,
    few: str = "",
) -> str:
    """`torch is 5.8 % slower than jax (ratio 0.942, 0.917–0.967, 6 blocks)`. `few`: what is wrong with so few blocks."""
    if ratio is None:
        return f"{label} against {first}: undecided, no block has a throughput of both"
    bounds = f", {low:.3f}–{high:.3f}" if low is not None and high is not None else ", no interval"
    evidence = f"(ratio {ratio:.3f}{bounds}, {blocks} block{'s' * (blocks != 1)})"
    if called in ("faster", "slower"):
        return f"{label} is {abs(ratio - 1):.1%} {called} than {first} {evidence}".replace("%", " %", 1)
    if called == "equivalent":
        return f"{label} is as fast as {first}, within {100 * equivalence:g} % {evidence}"
    reason = ""
    if few:
        reason = f": {few}"
    elif difference(ratio, low, high, equivalence):
        reason = ": the sign-flip test does not bear the interval out"
    return f"{label} against {first}: undecided {evidence}{reason}"
