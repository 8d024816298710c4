"""Compare the tokens of every timed block with the first engine's, and judge the first difference of each request.

Blocks have fresh prompts, so an engine's blocks have no equal tokens to compare with each other. The first engine computes the
same prompts in the same block: it is the reference for each block. A float64 pass decides which of the two engines is wrong.
A difference is suspicious where both engines run the same native kernels, because these give equal bits. All differences of an
engine together are suspicious if its tokens are farther behind the likeliest than rounding takes them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from common.config import Dtype
from experiments.correctness.config import CorrectnessConfig
from experiments.correctness.judge import Reference, common_prefix, float64_reference
from experiments.correctness.noise import OPERATIONS, bits_of
from experiments.correctness.reference import NumpyModel
from experiments.correctness.rounding import CHANCE, chance, margin_error
from experiments.engines.http_stream import UNNAMED
from experiments.engines.spec import EngineSpec
from experiments.load.driver import Row, Window
from experiments.load.workload import Workload
from experiments.measure.session import Plan
from experiments.roofline.work import weights_bytes

HALF_BEHIND = 2.0
"""Nats that a token in bfloat16 or float16 may be behind the likeliest one at most.

A logit of 20 has a spacing of 0.125 in bfloat16. Rounding in the layers adds errors of the same size, so that two tokens part
at margins of a few tenths of a nat. The limit is several times that. Most wrong tokens exceed it: a random token of a trained
model is about 10 nats behind, and one of a model with random weights about 3.
"""
MOST_JUDGED = 16
"""Differences in bfloat16 or float16 that are judged of one engine at most: rounding may cause one in each request."""


@dataclass(frozen=True, kw_only=True)
class Parted:
    """The first difference of one request in one timed block."""

    engine: str
    block: int
    request: int
    position: int
    """Of the output token, from 0."""
    tokens: tuple[int | None, int | None]
    """Of the first engine and of this one; None where an engine returned fewer tokens."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A difference with the float64 distances of its two tokens from the likeliest token, in nats."""

    parted: Parted
    behind: tuple[float, float]
    limit: float
    """In float32 twice the tolerance, because two errors within the tolerance add up to that; else `HALF_BEHIND`."""

    @property
    def wrong(self) -> tuple[bool, bool]:
        """Whether the first engine's token, and this engine's, is farther behind than the limit. NaN is."""
        return not self.behind[0] <= self.limit, not self.behind[1] <= self.limit

    @property
    def justified(self) -> bool:
        return not any(self.wrong)


def reporting(windows: Mapping[str, Sequence[Window]], engines: Sequence[EngineSpec]) -> dict[str, Sequence[Window]]:
    """Return the windows of the engines whose tokens can be compared: all but those of servers that name none of them.

    Any other engine reports its tokens, so a number that is no token is a defect of that engine.
    """
    servers = {spec.label for spec in engines if spec.is_server}
    return {label: blocks for label, blocks in windows.items() if blocks and not (label in servers and unnamed(blocks))}


def unnamed(windows: Sequence[Window]) -> bool:
    """Return whether none of the tokens has a name."""
    return all(token == UNNAMED for window in windows for row in window.rows for token in row.tokens)


def differences(windows: Mapping[str, Sequence[Window]], vocab_size: int = sys.maxsize) -> list[Parted]:
    """Return the first difference of each request of each block from the first engine, by engine, block and request.

    A number that is no token counts as a difference, even if both engines report it. Requests that failed in either engine are
    left out: the figure `failed` counts them.
    """
    first = next(iter(windows), None)
    return [
        found
        for label, blocks in windows.items()
        if first is not None and label != first
        for block, (mine, other) in enumerate(zip(windows[first], blocks, strict=False))
        for request, (a, b) in enumerate(zip(mine.rows, other.rows, strict=True))
        if a.error is None and b.error is None and (found := difference(a, b, label, block, request, vocab_size))
    ]


def difference(a: Row, b: Row, engine: str, block: int, request: int, vocab_size: int) -> Parted | None:
    """Return where `b` first differs from `a`, or either has a number that is no token; None if their tokens are equal."""
    ends = [num_valid(row.tokens, vocab_size) for row in (a, b)]
    if a.tokens == b.tokens and ends[0] == len(a.tokens):
        return None
    at = min(common_prefix(a.tokens, b.tokens), *ends)
    mine, other = (row.tokens[at] if at < len(row.tokens) else None for row in (a, b))
    return Parted(engine=engine, block=block, request=request, position=at, tokens=(mine, other))


def num_valid(tokens: Sequence[int], vocab_size: int) -> int:
    """Return how many of `tokens` come before the first number that is no token."""
    if not tokens or (min(tokens) >= 0 and max(tokens) < vocab_size):
        return len(tokens)
    return next(place for place, token in enumerate(tokens) if not 0 <= token < vocab_size)


def judge_timed(
    found: Sequence[Parted],
    windows: Mapping[str, Sequence[Window]],
    workload: Workload,
    seed: int,
    reference: Reference,
    limit: float,
) -> list[Judged]:
    """Judge the differences, each engine and block only up to its first unjustified one, which bounds the work.

    An output that ended early is unjustified without a float64 pass: all timed requests ignore the end token.
    """
    judged: list[Judged] = []
    wrong: set[tuple[str, int]] = set()
    first = next(iter(windows), "")
    for each in found:
        if (each.engine, each.block) in wrong:
            continue
        mine, other = each.tokens
        behind = (float("inf") if missing(mine) else 0.0, float("inf") if missing(other) else 0.0)
        if not (missing(mine) or missing(other)):
            exact = reference(history_of(each, windows[first], workload, seed))
            behind = (behind_likeliest(exact, mine), behind_likeliest(exact, other))
        judged.append(Judged(parted=each, behind=behind, limit=limit))
        if not judged[-1].justified:
            wrong.add((each.engine, each.block))
    return judged


def history_of(parted: Parted, windows: Sequence[Window], workload: Workload, seed: int) -> list[int]:
    """Return the tokens before a difference: the prompt, and the output of the first engine, which has these `windows`."""
    prompt = workload.fresh(parted.block, seed).items[parted.request].prompt
    return [*prompt, *windows[parted.block].rows[parted.request].tokens[: parted.position]]


def missing(token: int | None) -> bool:
    """Return whether an engine returned no token at a position, or a number that no vocabulary has."""
    return token is None or token < 0


def behind_likeliest(exact: np.ndarray, token: int | None) -> float:
    """Return the distance of a token from the likeliest one in nats; infinite for a number beyond the vocabulary."""
    if token is None or not 0 <= token < len(exact):
        return float("inf")
    return float(exact.max() - exact[token])


def spread(found: Sequence[Parted], most: int) -> list[Parted]:
    """Return `most` differences of each engine at most, evenly spaced over its blocks, and the outputs that ended early."""
    kept = []
    for label in dict.fromkeys(each.engine for each in found):
        mine = [each for each in found if each.engine == label]
        places = {i * len(mine) // most for i in range(most)} if len(mine) > most else range(len(mine))
        kept += [each for i, each in enumerate(mine) if i in places or any(map(missing, each.tokens))]
    return kept


def suspicions_of(found: Sequence[Parted], first: str, bits: Mapping[str, tuple[Any, ...] | None]) -> dict[str, str]:
    """Return a sentence for each engine with a difference whose bits (`bits_of`) must be those of the first engine."""
    suspicions = {}
    for label in dict.fromkeys(each.engine for each in found):
        mine = [each for each in found if each.engine == label]
        if bits[label] is not None and bits[label] == bits[first]:
            suspicions[label] = (
                f"{label} differs from {first} in {len(mine)} timed outputs, first in block {mine[0].block}, request "
                f"{mine[0].request}, output token {mine[0].position}, where the same native kernels give equal bits"
            )
    return suspicions


def gaps_of(judged: Sequence[Judged], first: str) -> dict[str, list[float]]:
    """Return by engine the distances behind the likeliest token, in nats, of the tokens that differ and are not the likeliest.

    A token of the first engine that several engines differ from counts once."""
    places: dict[str, dict[tuple[int, int, int], float]] = {}
    for each in filter(lambda each: each.justified, judged):
        parted = each.parted
        for label, behind in zip((first, parted.engine), each.behind, strict=True):
            if behind > 0:
                places.setdefault(label, {})[parted.block, parted.request, parted.position] = behind
    return {label: list(gaps.values()) for label, gaps in places.items()}


def gap_figures(
    judged: Sequence[Judged], windows: Mapping[str, Sequence[Window]], plan: Plan, model: NumpyModel, dtype: Dtype
) -> dict[str, dict[str, Any]]:
    """Return the gaps of each engine and the probability that rounding makes them as large (see
    `experiments.correctness.rounding`)."""
    first = next(iter(windows))
    gaps = gaps_of(judged, first)
    if not gaps:
        return {}
    histories = [history_of(each.parted, windows[first], plan.workload, plan.seed) for each in judged if each.justified]
    error = margin_error(model, sorted(histories, key=len, reverse=True), dtype)
    return {
        label: {"count": len(mine), "mean": float(np.mean(mine)), "rounding": error, "chance": chance(mine, error, dtype)}
        for label, mine in gaps.items()
    }


def gap_suspicions(gaps: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return a sentence for each engine with gaps larger than rounding makes them."""
    return {
        label: (
            f"{label} chose tokens {each['mean']:.2g} nats behind the likeliest, in the mean of {each['count']} judged "
            f"differences of timed outputs, where rounding has an error of {each['rounding']:.1g} nats"
        )
        for label, each in gaps.items()
        if each["chance"] < CHANCE
    }


def reason_not_judged(left: int, judges: bool) -> str:
    """Return why `left` differences are not judged; empty if there are none."""
    if not left:
        return ""
    return "a sample bounds the work" if judges else "correctness.num_requests=0"


NOT_COMPARED: Mapping[str, Any] = {
    "timed_not_compared": {},
    "timed_differences": None,
    "timed_judged": None,
    "timed_unjustified": None,
    "timed_not_judged": None,
    "timed_gaps": {},
    "timed_suspicious": None,
    "timed_suspicions": {},
    "first_timed_difference": None,
}
"""The keys of `results.json` where no two engines report their tokens."""


def compare_timed(
    plan: Plan,
    config: CorrectnessConfig,
    windows: Mapping[str, Sequence[Window]],
    figures: Mapping[str, Mapping[str, Any]] = {},
) -> dict[str, Any]:
    """Compare every timed block of the engines in `windows` and return the keys of `NOT_COMPARED`.

    Every difference is counted and located. `correctness.num_requests=0` leaves out the float64 model and with it the judgment.
    In bfloat16 and float16 rounding alone parts tokens: a sample of the differences is judged, with the wider limit
    `HALF_BEHIND`. `timed_not_judged` is the reason why differences are not judged, empty if all are. `timed_not_compared` has
    the reason for each engine whose tokens cannot be compared. `figures` has the kernels of each engine.
    """
    compared = reporting(windows, plan.engines)
    left_out = {
        label: "the server reports no token ids" for label, blocks in windows.items() if blocks and label not in compared
    }
    if len(compared) < 2:
        return {**NOT_COMPARED, "timed_not_compared": left_out}
    found, first = differences(compared, plan.checkpoint.config.vocab_size), next(iter(compared))
    configs = {spec.label: spec.config for spec in plan.engines if spec.label in compared}
    single, judges = all(each.dtype == "float32" for each in configs.values()), config.num_requests > 0
    judged, chosen = list[Judged](), list[Parted]()
    gaps: dict[str, dict[str, Any]] = {}
    if found and judges:
        weights = weights_bytes(plan.checkpoint.config, "bfloat16") // 2
        length = np.mean([compared[first][each.block].rows[each.request].prompt_len + each.position for each in found])
        affordable = int(OPERATIONS / (2 * weights * length * (len(compared) - 1)))
        chosen = found if single else spread(found, max(1, min(MOST_JUDGED, affordable)))
        limit = 2 * config.tolerance if single else HALF_BEHIND
        model = NumpyModel(plan.checkpoint)
        judged = judge_timed(chosen, compared, plan.workload, plan.seed, float64_reference(model), limit)
        dtype: Dtype = next((each.dtype for each in configs.values() if each.dtype != "float32"), "float32")
        gaps = gap_figures(judged, compared, plan, model, dtype)
    unjustified = [each for each in judged if not each.justified]
    shown = unjustified[0].parted if unjustified else found[0] if found else None
    wrong = (
        [name for name, bad in zip((first, shown.engine), unjustified[0].wrong, strict=True) if bad]
        if unjustified and shown
        else []
    )
    bits = {
        label: bits_of(each, str(mine.get("kernels_used") or "").split(", "), mine.get("kernel_arithmetic"))
        for label, each in configs.items()
        for mine in [figures.get(label, {})]
    }
    suspicions = suspicions_of(found, first, bits)
    for label, said in gap_suspicions(gaps).items():
        suspicions[label] = "; ".join(filter(None, [suspicions.get(label), said]))
    return {
        "timed_not_compared": left_out,
        "timed_differences": len(found),
        "timed_judged": len(judged) if judges else None,
        "timed_unjustified": len(unjustified) if judges else None,
        "timed_not_judged": reason_not_judged(len(found) - len(chosen), judges),
        "timed_gaps": gaps,
        "timed_suspicious": len(suspicions),
        "timed_suspicions": suspicions,
        "first_timed_difference": None if shown is None else asdict(shown) | {"wrong": wrong},
    }
