"""The main job: two engines or more, how fast, and whether they compute the same thing.

`python -m experiments.compare engines=[jax,torch]`. The last line of standard output is one JSON object.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from common.config import expect
from experiments.agreement import agree, tokens_equal_share
from experiments.cli import launch
from experiments.config import CorrectnessConfig, engine_specs, resolved, runs_folder
from experiments.console import Narrator, print_json, print_table, print_verdict
from experiments.measure import make_plan, measure, setting
from experiments.records import write_rows
from experiments.rundir import finished, run_directory, write_json, write_setup
from experiments.workload import known_options


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
            found = agree(plan, correctness, directory, narrator)
        result = setting(config, plan) | {
            "run": str(finished(directory)),
            "engines": figures,
            "ratios": ratios(figures),
            "tokens_equal_share": tokens_equal_share({label: blocks[0] for label, blocks in windows.items()}),
            **found,
        }
        write_rows(directory, windows)
        write_json(directory / "results.json", result)
    print_table(f"{plan.model}, {config.dtype}, workload {plan.workload.name}", figures, result["ratios"])
    print_verdict(result)
    print_json(result)


def ratios(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Output throughput of each engine over that of the first."""
    base = next(iter(figures.values()))["output_throughput"]
    return {label: mine["output_throughput"] / base if base else None for label, mine in figures.items()}


def main() -> None:
    launch(run, "compare")


if __name__ == "__main__":
    main()
