"""The correctness half of a comparison: a pass in float32 over the timed schedule, and its findings.

Four rungs: the same tokens; tokens that part only at ties (`experiments.correctness.judge`); log-probabilities and KL
divergence at each position; perplexity on a text. Tokens and reported log-probabilities are those of the timed schedule with
shorter outputs (`experiments.correctness.coverage`); their differences are judged by the rounding measured in the same run
(`experiments.correctness.noise`). For whole rows of logits, every other engine that shows its steps repeats the first engine's
steps on a sample. For an engine that does not, the likeliest tokens it reports and the rest as one are compared, up to the
first divergence: a lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from common.config import Dtype
from common.errors import CheckpointError, TandemError
from common.step_log import StepRecord
from experiments.correctness.config import CorrectnessConfig
from experiments.correctness.coverage import Part, cover, coverage, sample
from experiments.correctness.judge import Agreement, common_prefix, float64_reference, judge, table
from experiments.correctness.noise import Scale, bits_of, distances, measure_noise, over_rounding, suspicion, suspicion_alone
from experiments.correctness.observe import Compared
from experiments.correctness.perplexity import CONTEXT, perplexity, read_text, tokenize
from experiments.correctness.reference import NumpyModel
from experiments.display.progress import ProgressReporter
from experiments.engines.process import EngineFailure, IsolatedEngine
from experiments.engines.spec import EngineSpec
from experiments.load.driver import Row, Window
from experiments.load.workload import Item, Workload
from experiments.measure.session import Plan

TOP_LOGPROBS = 5
"""Reported by each engine at each position, so that both choices of a divergence are among them."""
STEP = 64
"""Sizes of steps are rounded up to a multiple of this."""
SHAPE = ("block_size", "num_blocks", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
"""What two engines must have alike for one to repeat the other's steps."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Two engines at one output position of one request, on the same history."""

    position: int
    """Of the output token, from 0."""
    kld: float
    """Nats; inf where logits are not finite."""
    logprob_diff: float
    """Absolute, of the token that the first engine chose."""
    same: bool
    """Whether both hold the same token for the likeliest."""


@dataclass(frozen=True, kw_only=True)
class Passed:
    """The results of one engine in the pass."""

    spec: EngineSpec
    rows: tuple[Row, ...]
    caps: Mapping[str, Any]
    steps: tuple[StepRecord, ...] | None = None
    """Of the pass over the timed schedule; None of an engine that does not log its steps."""
    positions: list[Position] | None = None
    """Against the first engine, from whole rows of logits; None where that was not possible."""
    perplexity: float | None = None


def small(spec: EngineSpec, requests: int, dtype: Dtype, most: int = 256) -> EngineSpec:
    """Size an engine for a few requests and steps of `most` tokens, so that it need not compile a program for every size."""
    seqs = min(spec.config.max_num_seqs, requests)
    tokens = spec.config.max_num_batched_tokens
    if spec.config.enable_chunked_prefill:  # else a prompt has to fit a step
        tokens = max(seqs, min(tokens, most))
    return replace(spec, config=replace(spec.config, dtype=dtype, max_num_seqs=seqs, max_num_batched_tokens=tokens))


def agree(
    plan: Plan,
    config: CorrectnessConfig,
    directory: Path,
    narrator: ProgressReporter,
    windows: Mapping[str, Sequence[Window]] = {},
) -> tuple[Mapping[str, Any], dict[str, dict[str, str]]]:
    """Run the timed schedule in float32 on each engine and compare all with the first.

    `windows` are the timed ones, by engine. Returns what `results.json` has of the pass, and the engines that failed on the
    way, without which the others are compared."""
    if config.num_requests == 0 or len(plan.engines) < 2:
        return LEFT_OUT, {}
    part, share = cover(plan.workload, config.tokens), sample(plan.workload, config.num_requests, config.output_len).workload
    size = sum(len(item.prompt) + item.output_len for item in part.workload.items)
    text = text_tokens(plan, config, narrator)
    done: dict[str, Passed] = {}
    failures: dict[str, dict[str, str]] = {}
    base: Base | None = None
    with TemporaryDirectory(prefix="float32-", dir=directory) as scratch:
        for spec in plan.engines:
            narrator.say(f"float32 pass: {spec.label}")
            log, exact = (
                directory / f"{spec.label}-float32.log",
                small(spec, len(part.workload.items), "float32", STEP * -(-size // STEP)),
            )
            try:
                with IsolatedEngine(exact, log, plan.measure.timeout_s) as engine:
                    caps = engine.load(plan.checkpoint.path, narrator.progress(spec.label))["caps"]
                    passed, own = pass_through(engine, caps, part.workload, share, text, base, Path(scratch), narrator)
                expect_answers(spec.label, passed.rows)
                done[spec.label] = passed
                base = base or own
            except (EngineFailure, TandemError) as error:
                failure = EngineFailure.of(error, spec.label)
                failures[spec.label] = failure.record()
                narrator.alarm(failure.message)
    narrator.say("float64: the rounding of this run")
    steps = {label: kept[0].steps for label, kept in windows.items() if kept and kept[0].steps}
    return compare(done, part, plan, config, steps), failures


def expect_answers(label: str, rows: Sequence[Row]) -> None:
    """Raises `EngineFailure` if every request ended in an error: then there is no output that could be right or wrong."""
    if rows and all(row.error for row in rows):
        message = f"None of the {len(rows)} requests of the float32 pass to engine {label!r} succeeded; the first error: "
        raise EngineFailure(message + str(rows[0].error), label=label)


@dataclass(frozen=True, kw_only=True)
class Base:
    """What the first engine that has come through the pass leaves for the others."""

    spec: EngineSpec
    trace: str = ""
    """The file with its steps; empty where it does not show them."""
    logits: str = ""
    """The file with what they computed."""
    requests: Sequence[Sequence[int]] = ()
    """Whose sequences each step had."""


def pass_through(
    engine: IsolatedEngine,
    caps: Mapping[str, Any],
    timed: Workload,
    share: Workload,
    text: Sequence[int],
    base: Base | None,
    scratch: Path,
    narrator: ProgressReporter,
) -> tuple[Passed, Base]:
    """Run the pass on one engine and compare it with `base`, if given. Return its results, and its own `Base`.

    Its files in `scratch` have its label, so that no other engine reads the files of one that failed."""
    progress, spec = narrator.progress(engine.spec.label), engine.spec
    own, positions, observes = Base(spec=spec), None, caps.get("observes", False)
    window = engine.run(timed, logprobs=TOP_LOGPROBS)
    if base is None and observes:
        trace, logits = (str(scratch / f"{spec.label}.{what}") for what in ("trace", "logits"))
        _, requests = record(engine, share, trace)
        engine.observe("keep_logits", progress, trace=trace, file=logits)
        own = Base(spec=spec, trace=trace, logits=logits, requests=requests)
    elif base and base.trace and observes and alike(base.spec, spec):
        answer = engine.observe("compare_logits", progress, trace=base.trace, file=base.logits)
        positions = at_positions([Compared.of(row) for row in answer["rows"]], base.requests, share)
    value = None
    if text and observes:
        context = min(CONTEXT, spec.config.max_model_len or CONTEXT)
        value = perplexity(engine.observe("perplexity", progress, tokens=text, context=context))
    return Passed(spec=spec, rows=window.rows, caps=caps, steps=window.steps, positions=positions, perplexity=value), own


def record(engine: IsolatedEngine, share: Workload, trace: str) -> tuple[tuple[Row, ...], list[list[int]]]:
    """Run the share and record its trace. Return the rows, and for each step the requests of its sequences."""
    items = [asdict(item) for item in share.items]
    answer = engine.observe("record", items=items, trace=trace, logprobs=TOP_LOGPROBS)
    return tuple(map(Row.of, answer["rows"])), answer["requests"]


def alike(first: EngineSpec, other: EngineSpec) -> bool:
    return all(getattr(first.config, name) == getattr(other.config, name) for name in SHAPE)


def text_tokens(plan: Plan, config: CorrectnessConfig, narrator: ProgressReporter) -> list[int]:
    """The text of the fourth rung; nothing where it is not wanted or cannot be."""
    if not (config.perplexity or config.perplexity_text):
        return []
    try:
        return tokenize(plan.checkpoint, read_text(config.perplexity_text))
    except CheckpointError as error:
        narrator.say(f"no perplexity: {error}")
        return []


def at_positions(rows: Sequence[Compared], requests: Sequence[Sequence[int]], share: Workload) -> list[Position]:
    """What was compared of each step, by output position."""
    return [
        Position(
            position=row.position - len(share.items[requests[row.step][row.seq]].prompt),
            kld=row.kld,
            logprob_diff=abs(row.logprobs[0][0] - row.logprobs[1][0]),
            same=row.tokens[0] == row.tokens[1] and bool(np.isfinite(row.kld)),
        )
        for row in rows
    ]


def reported(a: Row, b: Row) -> list[Position]:
    """The same from the likeliest tokens that two engines report, where both read the same history."""
    end = common_prefix(a.tokens, b.tokens) + 1
    found = []
    for position, (mine, other) in enumerate(zip(a.logprobs[:end], b.logprobs[:end], strict=False)):
        p, q = table(mine), table(other)
        if not p or not q:
            continue
        token = a.tokens[position]
        diff = abs(p[token] - q[token]) if token in p and token in q else np.nan
        same = mine.top_ids[0] == other.top_ids[0] and bool(np.isfinite([*p.values(), *q.values()]).all())
        found.append(Position(position=position, kld=coarse_kld(p, q), logprob_diff=diff, same=same))
    return found


def coarse_kld(p: Mapping[int, float], q: Mapping[int, float]) -> float:
    """The divergence of two distributions of which only some log-probabilities are known, all other tokens taken as one: never
    more than the whole divergence. inf where one is not finite."""
    both = sorted(p.keys() & q.keys())
    logs = np.array([[x[token] for token in both] for x in (p, q)]).reshape(2, -1)
    if not np.isfinite(logs).all():
        return float("inf")
    rest = np.maximum(1 - np.exp(logs).sum(axis=1, keepdims=True), 1e-12)
    known, other = np.concatenate([np.exp(logs), rest], axis=1)
    return max(0.0, float((known * np.log(known / other)).sum()))


def compare(
    done: Mapping[str, Passed],
    part: Part,
    plan: Plan,
    config: CorrectnessConfig,
    windows: Mapping[str, Sequence[StepRecord]] = {},
) -> dict[str, Any]:
    """Compare all engines with the first on every rung. `windows` has the steps of a timed window of each engine."""
    first, base = next(iter(done.items()), (None, None))
    agreements, figures, above = {}, {}, {}
    model = NumpyModel(plan.checkpoint)
    reference, items = float64_reference(model), part.workload.items
    for label, other in done.items():
        if base is None or label == first:
            continue
        agreements[label] = [
            judge(item.prompt, a.tokens, b.tokens, a.logprobs, b.logprobs, reference, config.tolerance, item.output_len)
            for item, a, b in zip(items, base.rows, other.rows, strict=True)
        ]
        positions = other.positions
        coarse = positions is None
        above[label] = sum(not position.logprob_diff <= config.tolerance for position in positions or ())
        if positions is None:
            positions = [position for a, b in zip(base.rows, other.rows, strict=True) for position in reported(a, b)]
        figures[label] = summarise(positions) | {"kld_from": f"top {TOP_LOGPROBS} and rest" if coarse else "logits"}
    values = {label: passed.perplexity for label, passed in done.items() if passed.perplexity is not None}
    found = verdict(agreements, above, part.numbers) | {
        "tolerance": config.tolerance,
        "agreement": figures,
        "perplexity": values,
    }
    if not agreements:
        return found | dict(NO_NOISE)
    passed_steps = {label: passed.steps for label, passed in done.items() if passed.steps}
    counts = {label: [agreement.num_equal for agreement in results] for label, results in agreements.items()}
    noise = judge_noise(done, model, items)
    for label, ratio in noise.pop("over_rounding").items():
        figures[label] |= {"over_rounding": ratio, "suspicious": label in noise["suspicions"]}
    return found | {"coverage": coverage(plan.workload, counts, part, passed_steps, windows)} | noise


def judge_noise(done: Mapping[str, Passed], model: NumpyModel, items: Sequence[Item]) -> dict[str, Any]:
    """Return the errors from float64 (`noise`), a sentence for each suspicious engine (`suspicions`), their number, and by
    engine the median difference over rounding (`over_rounding`)."""
    measured = measure_noise(model, items, {label: passed.rows for label, passed in done.items()})
    (first, base), *others = done.items()
    suspicions, ratios = {}, {}
    for label, passed in done.items():
        alone = suspicion_alone(label, measured) if passed.caps.get("observes") else None
        if alone:
            suspicions[label] = alone
    for label, passed in others:
        apart, equal = distances(base.rows, passed.rows), same_bits(base, passed)
        ratios[label] = over_rounding(apart, measured, (label, first))
        if equal:
            apart += [position.logprob_diff for position in passed.positions or ()]
        if sentence := suspicion(label, first, apart, measured, equal):
            suspicions[label] = sentence
    known: dict[str, Scale | None] = {"control": measured.control, **measured.engines}
    noise = {label: asdict(scale) for label, scale in known.items() if scale}
    return {"noise": noise, "suspicions": suspicions, "suspicious": len(suspicions), "over_rounding": ratios}


def same_bits(first: Passed, other: Passed) -> bool:
    """Return whether two engines run the same native kernels in one rank each, which give equal bits."""
    mine, others = (
        bits_of(passed.spec.config, passed.caps.get("kernels") or (), passed.caps.get("kernel_arithmetic"))
        for passed in (first, other)
    )
    return mine is not None and mine == others


def summarise(positions: Sequence[Position]) -> dict[str, Any]:
    """One engine against the first, over all positions and by position. Where logits are not finite nothing agrees: such
    positions are counted apart (`num_nonfinite`), and figures of size are of the others, None where there are none."""
    finite = [position for position in positions if np.isfinite(position.kld)]
    klds, diffs = ([getattr(p, name) for p in finite] for name in ("kld", "logprob_diff"))
    known = [diff for diff in diffs if np.isfinite(diff)]
    of: Callable[[Any, list[float]], float | None] = lambda figure, values: float(figure(values)) if values else None  # noqa: E731
    by_position = []
    for number in sorted({position.position for position in positions}):
        mine = [position for position in positions if position.position == number]
        sound = [position for position in mine if np.isfinite(position.kld)]
        by_position.append(
            {
                "position": number,
                "mean_abs_logprob_diff": of(np.mean, [p.logprob_diff for p in sound if np.isfinite(p.logprob_diff)]),
                "kld": of(np.mean, [p.kld for p in sound]),
                "same_share": sum(p.same for p in mine) / len(mine),
            }
        )
    return {
        "num_positions": len(positions),
        "num_nonfinite": len(positions) - len(finite),
        "mean_kld": of(np.mean, klds),
        "p99_kld": of(lambda values: np.percentile(values, 99), klds),
        "max_kld": of(np.max, klds),
        "top1_agreement": sum(p.same for p in positions) / len(positions) if positions else None,
        "mean_abs_logprob_diff": of(np.mean, known),
        "max_abs_logprob_diff": of(np.max, known),
        "by_position": by_position,
    }


NAMES = ("unjustified_divergences", "errors_above_tolerance", "tokens_equal", "max_abs_logprob_diff", "first_divergence")
"""Keys of `results.json` that are None without a pass."""


def verdict(
    agreements: Mapping[str, Sequence[Agreement]], above: Mapping[str, int] = {}, numbers: Sequence[int] = ()
) -> dict[str, Any]:
    """Summarize the float32 pass in a few figures; all are None where it was left out.

    `above` counts, by engine, the compared rows of logits with an error above the tolerance. `numbers` has the number of each
    request in the timed workload; without it, the place in the pass."""
    if not agreements:
        return dict.fromkeys(NAMES)
    divergences = [
        {"engine": label, "request": numbers[place] if numbers else place} | asdict(agreement.divergence)
        for label, results in agreements.items()
        for place, agreement in enumerate(results)
        if agreement.divergence
    ]
    every = [agreement for results in agreements.values() for agreement in results]
    worst = float(np.max([agreement.max_abs_logprob_diff for agreement in every]))
    return {
        "unjustified_divergences": sum(not divergence["justified"] for divergence in divergences),
        "errors_above_tolerance": sum(
            max(above.get(label, 0), sum(agreement.num_above for agreement in results)) for label, results in agreements.items()
        ),
        "tokens_equal": not divergences,
        "max_abs_logprob_diff": worst if np.isfinite(worst) else None,
        "first_divergence": min(divergences, key=lambda d: (d["justified"], d["request"], d["position"]), default=None),
        "compared_tokens": sum(agreement.num_equal for agreement in every),
    }


NO_NOISE: Mapping[str, Any] = {"coverage": None, "noise": {}, "suspicions": {}, "suspicious": None}
LEFT_OUT: Mapping[str, Any] = verdict({}) | {"tolerance": None, "agreement": {}, "perplexity": {}} | dict(NO_NOISE)
"""The keys of `agree` without a pass."""


def tokens_equal_share(windows: Mapping[str, Window]) -> float | None:
    """Return the share of timed output tokens before their request's first difference from the first engine.

    This is the least of all engines, or None for fewer than two. `windows` has the engines that report their tokens."""
    if len(windows) < 2:
        return None
    first, *others = windows.values()
    total = sum(len(row.tokens) for row in first.rows)
    equal = (sum(common_prefix(a.tokens, b.tokens) for a, b in zip(first.rows, w.rows, strict=True)) for w in others)
    return min(equal) / total if total else 1.0
