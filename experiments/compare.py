"""Compare two or more engines: their speed, and whether they compute the same outputs.

`python -m experiments.compare engines=[jax,torch]`. If the output is no terminal, its last line
is one JSON object. At a terminal the last line names the file with the results.
The exit code is 1 if an engine or the machine failed, 2 for an error in the options, 3 if a condition of `fail_if` holds,
4 if the float32 pass found a defect: an unjustified divergence, or a log-probability off by more than `correctness.tolerance`;
also for an unjustified difference of tokens in any timed block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from common.config import expect
from experiments.cli.launch import conclude, keep_part, launch, report_on
from experiments.correctness.agreement import LEFT_OUT, NO_NOISE, agree, summarise, tokens_equal_share, verdict
from experiments.correctness.config import correctness_config
from experiments.correctness.timed import NOT_COMPARED, compare_timed, reporting
from experiments.display.formatting import plural
from experiments.display.progress import ProgressReporter
from experiments.engines.compose import engine_specs
from experiments.load.driver import Window
from experiments.measure.blocks import advice
from experiments.measure.session import Outcome, Plan, figure_names, make_plan, measure, setting
from experiments.metrics.statistics import Comparison
from experiments.options import resolved
from experiments.report.console import print_conclusion, print_dropped, print_result, print_scaling, print_table
from experiments.report.limits import say_limits
from experiments.report.scaling import curves, points_of
from experiments.runs.conditions import check_keys, parse_conditions
from experiments.runs.directory import finished, finite, run_directory, runs_folder, write_setup
from experiments.runs.records import kept_rows, write_run
from experiments.sweep.job import job_directory

RESULTS = (
    *("run", "engines", "ratios", "comparisons", "failures", "order", "stopped", "stopped_by", "advice", "unmeasured"),
    *("dropped_blocks", "no_verdict"),
)
AGREEMENT = (
    "tokens_equal_share",
    *verdict({}),
    "compared_tokens",
    "tolerance",
    *NO_NOISE,
    "agreement",
    "perplexity",
    *NOT_COMPARED,
)
NAME_LENGTH = 100
"""Of the labels in the name of a run directory."""


def run(config: DictConfig) -> None:
    specs = engine_specs(config)
    expect(len(specs) >= 2, "compare needs two engines or more, as in engines=[jax,torch]; for one there is experiments.bench.")
    correctness = correctness_config(config)
    conditions = parse_conditions(resolved(config)["fail_if"])
    plan = make_plan(config, specs)
    labels = [spec.label for spec in specs]
    named: dict[str, Collection[str]] = {
        "engines": figure_names(plan),
        "comparisons": [*(field.name for field in fields(Comparison)), "contaminated"],
        "agreement": [*summarise([]), "kld_from", "over_rounding", "suspicious"],
    }
    check_keys(conditions, [*setting(config, plan), *RESULTS, *AGREEMENT], labels, named)
    what = f"compare-{'-'.join(labels)[:NAME_LENGTH]}-{plan.workload.name}"
    with run_directory(runs_folder(config), what, job_directory(config)) as directory:
        write_setup(directory, config)
        outcome = Outcome.of(plan)
        try:
            with ProgressReporter() as narrator:
                measure(plan, outcome, directory, narrator)
                alive = tuple(spec for spec in plan.engines if spec.label in outcome.comparable)
                with kept_rows(directory, outcome.windows):
                    found, failed = agree(replace(plan, engines=alive), correctness, directory, narrator, outcome.windows)
                    sound = {spec.label: outcome.windows[spec.label] for spec in alive}
                    found = {**found, **compare_timed(plan, correctness, sound, outcome.figures)}
        except KeyboardInterrupt:
            if blocks := outcome.cut_short(plan):  # `measure` has written their rows
                part = results(config, plan, outcome, {**LEFT_OUT, **NOT_COMPARED}, directory)
                keep_part(config, directory, part, plural(blocks, "whole block"))
            raise
        outcome.failures |= failed
        result = results(config, plan, outcome, found, finished(directory))
        write_run(directory, result, outcome.windows, outcome.profiles)
    title = f"{plan.model} ({plan.checkpoint.path.name}), {config.dtype}, workload {plan.workload.name}"
    print_table(title, result["engines"], result["comparisons"], result.get("agreement"), every=config.table == "all")
    print_dropped(result["dropped_blocks"], every=config.table == "all")
    say_limits(result["engines"])
    print_scaling(curves(points_of(result, result["engines"])))
    reported = report_on(config, result)
    print_conclusion(result)
    print_result(result, f"{result['run']}/results.json")
    conclude(conditions, result, reported)


def results(config: DictConfig, plan: Plan, outcome: Outcome, found: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Return the content of results.json. `found` has the keys of the float32 pass; `directory` is the final run directory."""
    compared = {
        label: Window(tuple(row for window in windows for row in window.rows), sum(window.duration for window in windows))
        for label, windows in reporting(outcome.windows, plan.engines).items()
        if label in outcome.comparable
    }
    content: dict[str, Any] = setting(config, plan) | {
        "run": str(directory),
        "engines": outcome.figures,
        "ratios": ratios(outcome.figures, outcome.comparisons),
        "comparisons": {
            label: asdict(found)
            | {"contaminated": any(outcome.figures[each]["contaminated"] for each in (label, found.against))}
            for label, found in outcome.comparisons.items()
        },
        "failures": outcome.failures,
        "order": outcome.order,
        "stopped": outcome.stopped,
        "stopped_by": outcome.stopped_by,
        "advice": advised(plan, outcome),
        "unmeasured": outcome.unmeasured,
        "dropped_blocks": outcome.dropped(),
        "no_verdict": outcome.no_verdict,
        "tokens_equal_share": tokens_equal_share(compared),
        **found,
    }
    return finite(content)


def advised(plan: Plan, outcome: Outcome) -> str:
    """Return which option to set if a ratio is undecided; empty if none is, or if no option helps."""
    found = outcome.comparisons.values()
    if outcome.no_verdict:
        return "Run it while the machine does nothing else"
    if not any(each.verdict == "undecided" and each.ratio is not None for each in found):
        return ""
    return advice(plan.measure, outcome.stopped_by, len(outcome.order) - len(outcome.dropped_blocks), len(found))


def ratios(labels: Iterable[str], comparisons: Mapping[str, Comparison]) -> dict[str, float | None]:
    """Return the ratio of each engine by its label; 1 for the first engine."""
    return {label: comparisons[label].ratio if label in comparisons else 1.0 for label in labels}


def main() -> None:
    launch(run, "compare")


if __name__ == "__main__":
    main()
