"""The main job: two engines or more, how fast, and whether they compute the same thing.

`python -m experiments.compare engines=[jax,torch]`. The last line of standard output is one JSON object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from common.config import expect
from experiments.cli import launch
from experiments.config import CorrectnessConfig, engine_specs, resolved, runs_folder
from experiments.correctness import Agreement, common_prefix, float64_reference, judge
from experiments.drive import Window
from experiments.isolate import IsolatedEngine
from experiments.measure import Plan, make_plan, measure, setting
from experiments.report import Narrator, print_json, print_table, print_verdict
from experiments.rundir import finished, run_directory, write_json, write_rows, write_setup
from experiments.workload import known_options

TOP_LOGPROBS = 5
"""Reported by each engine at each position, so that both choices of a divergence are among them."""


def run(config: DictConfig) -> None:
    specs = engine_specs(config)
    expect(len(specs) >= 2, "compare needs two engines or more, as in engines=[jax,torch]; for one there is experiments.bench.")
    correctness = CorrectnessConfig(**known_options(CorrectnessConfig, "correctness", resolved(config.correctness)))
    plan = make_plan(config, specs)
    labels = [spec.label for spec in specs]
    with run_directory(runs_folder(config), f"compare-{'-'.join(labels)}-{plan.workload.name}") as directory:
        write_setup(directory, config)
        with Narrator() as narrator:
            figures, windows = measure(plan, directory, narrator)
            agreements = agree(plan, correctness, directory, narrator)
        result = setting(config, plan) | {
            "run": str(finished(directory)),
            "engines": figures,
            "ratios": ratios(figures),
            "tokens_equal_share": tokens_equal_share({label: blocks[0] for label, blocks in windows.items()}),
            **verdict(agreements),
        }
        write_rows(directory, windows)
        write_json(directory / "results.json", result)
    print_table(f"{plan.model}, {config.dtype}, workload {plan.workload.name}", figures, result["ratios"])
    print_verdict(result)
    print_json(result)


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
        with IsolatedEngine(exact, directory / f"{spec.label}-float32.log") as engine:
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


def ratios(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Output throughput of each engine over that of the first."""
    base = next(iter(figures.values()))["output_throughput"]
    return {label: mine["output_throughput"] / base if base else None for label, mine in figures.items()}


def tokens_equal_share(windows: Mapping[str, Window]) -> float:
    """The share of timed output tokens before their request's first difference from the first engine; the least of all."""
    first, *others = windows.values()
    total = sum(len(row.tokens) for row in first.rows)
    equal = (sum(common_prefix(a.tokens, b.tokens) for a, b in zip(first.rows, w.rows, strict=True)) for w in others)
    return min(equal) / total if total else 1.0


def main() -> None:
    launch(run, "compare")


if __name__ == "__main__":
    main()
