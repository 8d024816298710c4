"""The correctness half of a comparison: a pass in float32 over a share of the requests, and what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments.config import CorrectnessConfig
from experiments.console import Narrator
from experiments.correctness import Agreement, common_prefix, float64_reference, judge
from experiments.drive import Window
from experiments.isolate import IsolatedEngine
from experiments.measure import Plan

TOP_LOGPROBS = 5
"""Reported by each engine at each position, so that both choices of a divergence are among them."""


def agree(plan: Plan, config: CorrectnessConfig, directory: Path, narrator: Narrator) -> dict[str, list[Agreement]]:
    """Run a share of the requests in float32 on each engine and judge all against the first: label → one for each request."""
    if config.num_requests == 0:
        return {}
    share = plan.workload.share(config.num_requests, config.output_len)
    outputs: dict[str, Window] = {}
    for spec in plan.engines:
        narrator.say(f"float32 pass: {spec.label}")
        # Sized for the share: an engine that compiles a program for each size of step need not compile them all.
        seqs = min(spec.config.max_num_seqs, config.num_requests)
        tokens = max(seqs, min(spec.config.max_num_batched_tokens, 256))
        small = replace(spec.config, dtype="float32", max_num_seqs=seqs, max_num_batched_tokens=tokens)
        exact = replace(spec, config=small)
        with IsolatedEngine(exact, directory / f"{spec.label}-float32.log", plan.measure.timeout_s) as engine:
            engine.load(plan.checkpoint.path, narrator.progress(spec.label))
            outputs[spec.label] = engine.run(share, logprobs=TOP_LOGPROBS)
    reference = float64_reference(plan.checkpoint)
    first, *others = outputs
    return {
        label: [
            judge(item.prompt, a.tokens, b.tokens, a.logprobs, b.logprobs, reference, config.tolerance)
            for item, a, b in zip(share.items, outputs[first].rows, outputs[label].rows, strict=True)
        ]
        for label in others
    }


def verdict(agreements: Mapping[str, Sequence[Agreement]]) -> dict[str, Any]:
    """The whole float32 pass in a few figures; None where it was left out."""
    if not agreements:
        return dict.fromkeys(("unjustified_divergences", "tokens_equal", "max_abs_logprob_diff", "first_divergence"))
    divergences = [
        {"engine": label, "request": number} | asdict(agreement.divergence)
        for label, results in agreements.items()
        for number, agreement in enumerate(results)
        if agreement.divergence
    ]
    every = [agreement for results in agreements.values() for agreement in results]
    return {
        "unjustified_divergences": sum(not divergence["justified"] for divergence in divergences),
        "tokens_equal": not divergences,
        "max_abs_logprob_diff": max(agreement.max_abs_logprob_diff for agreement in every),
        "first_divergence": min(divergences, key=lambda d: (d["justified"], d["request"], d["position"]), default=None),
        "compared_tokens": sum(agreement.num_equal for agreement in every),
    }


def tokens_equal_share(windows: Mapping[str, Window]) -> float:
    """The share of timed output tokens before their request's first difference from the first engine; the least of all."""
    first, *others = windows.values()
    total = sum(len(row.tokens) for row in first.rows)
    equal = (sum(common_prefix(a.tokens, b.tokens) for a, b in zip(first.rows, w.rows, strict=True)) for w in others)
    return min(equal) / total if total else 1.0
