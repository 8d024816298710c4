"""Compare the tokens of every timed block with the first engine's, and judge the first difference of each request.

Blocks have fresh prompts, so an engine's blocks have no equal tokens to compare with each other. The first engine computes the
same prompts in the same block: it is the reference for each block. A float64 pass decides which of the two engines is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from experiments.config import CorrectnessConfig
from experiments.correctness import Reference, common_prefix, float64_reference
from experiments.drive import Row, Window
from experiments.measure import Plan
from experiments.reference import NumpyModel
from experiments.workload import Workload


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
    """Twice the tolerance: two errors within the tolerance add up to that."""

    @property
    def wrong(self) -> tuple[bool, bool]:
        """Whether the first engine's token, and this engine's, is farther behind than the limit. NaN is."""
        return not self.behind[0] <= self.limit, not self.behind[1] <= self.limit

    @property
    def justified(self) -> bool:
        return not any(self.wrong)


def reports_tokens(windows: Sequence[Window]) -> bool:
    """Return whether an engine reports its tokens; a server may report -1 instead."""
    return all(token >= 0 for window in windows for row in window.rows for token in row.tokens)


def differences(windows: Mapping[str, Sequence[Window]]) -> list[Parted]:
    """Return the first difference of each request of each block from the first engine, by engine, block and request.

    Requests that failed in either engine are left out: the figure `failed` counts them.
    """
    told = {label: blocks for label, blocks in windows.items() if blocks and reports_tokens(blocks)}
    first = next(iter(told), None)
    return [
        found
        for label, blocks in told.items()
        if first is not None and label != first
        for block, (mine, other) in enumerate(zip(told[first], blocks, strict=False))
        for request, (a, b) in enumerate(zip(mine.rows, other.rows, strict=True))
        if a.error is None and b.error is None and (found := difference(a, b, label, block, request))
    ]


def difference(a: Row, b: Row, engine: str, block: int, request: int) -> Parted | None:
    """Return where `b` first differs from `a`; None if their tokens are equal."""
    if a.tokens == b.tokens:
        return None
    at = common_prefix(a.tokens, b.tokens)
    mine, other = (row.tokens[at] if at < len(row.tokens) else None for row in (a, b))
    return Parted(engine=engine, block=block, request=request, position=at, tokens=(mine, other))


def judge_timed(
    found: Sequence[Parted],
    windows: Mapping[str, Sequence[Window]],
    workload: Workload,
    seed: int,
    reference: Reference,
    tolerance: float,
) -> list[Judged]:
    """Judge the differences, each engine and block only up to its first unjustified one, which bounds the work.

    An output that ended early is unjustified without a float64 pass: all timed requests ignore the end token.
    """
    judged: list[Judged] = []
    wrong: set[tuple[str, int]] = set()
    first = next((label for label, blocks in windows.items() if blocks and reports_tokens(blocks)), "")
    for each in found:
        if (each.engine, each.block) in wrong:
            continue
        mine, other = each.tokens
        behind = (float("inf") if mine is None else 0.0, float("inf") if other is None else 0.0)
        if mine is not None and other is not None:
            prompt = workload.fresh(each.block, seed).items[each.request].prompt
            history = windows[first][each.block].rows[each.request].tokens[: each.position]
            exact = reference([*prompt, *history])
            behind = (float(exact.max() - exact[mine]), float(exact.max() - exact[other]))
        judged.append(Judged(parted=each, behind=behind, limit=2 * tolerance))
        if not judged[-1].justified:
            wrong.add((each.engine, each.block))
    return judged


NOT_COMPARED: Mapping[str, Any] = {"timed_differences": None, "timed_unjustified": None, "first_timed_difference": None}
"""The keys of `results.json` where no two engines report their tokens."""


def compare_timed(plan: Plan, config: CorrectnessConfig, windows: Mapping[str, Sequence[Window]]) -> dict[str, Any]:
    """Compare every timed block of the engines in `windows` and return the keys of `NOT_COMPARED`.

    Differences are judged where all engines are timed in float32. In bfloat16 and float16 rounding alone parts tokens, and no
    tolerance for it is measured: differences are counted and located, and `timed_unjustified` is None.
    """
    if sum(bool(blocks) and reports_tokens(blocks) for blocks in windows.values()) < 2:
        return dict(NOT_COMPARED)
    found = differences(windows)
    judges = config.num_requests > 0 and all(spec.config.dtype == "float32" for spec in plan.engines if spec.label in windows)
    judged = []
    if found and judges:
        reference = float64_reference(NumpyModel(plan.checkpoint))
        judged = judge_timed(found, windows, plan.workload, plan.seed, reference, config.tolerance)
    unjustified = [each for each in judged if not each.justified]
    shown = unjustified[0].parted if unjustified else found[0] if found else None
    first = next(label for label, blocks in windows.items() if blocks and reports_tokens(blocks))
    wrong = (
        [name for name, bad in zip((first, shown.engine), unjustified[0].wrong, strict=True) if bad]
        if unjustified and shown
        else []
    )
    return {
        "timed_differences": len(found),
        "timed_unjustified": len(unjustified) if judges else None,
        "first_timed_difference": None if shown is None else asdict(shown) | {"wrong": wrong},
    }
