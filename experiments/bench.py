"""Time one engine on one workload: `python -m experiments.bench engine=jax workload=single`.

With `measure=kernels` the command runs no workload. It times the native kernels one by one (`experiments.kernels.benchmark`).

If standard output is not a terminal, its last line is one JSON object with the keys of `vllm bench serve` and a few more.
The exit code is 1 if the engine or the machine failed, 2 for an error in the options, 3 if a condition of `fail_if` holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from common.config import expect
from common.weights import zoo
from common.weights.checkpoint import open_checkpoint
from experiments.cli.launch import conclude, keep_part, launch, report_on
from experiments.display.formatting import plural
from experiments.display.progress import ProgressReporter
from experiments.engines.process import EngineFailure, IsolatedEngine
from experiments.engines.spec import EngineSpec, engine_spec
from experiments.kernels import benchmark
from experiments.measure.config import MeasureConfig
from experiments.measure.session import (
    Outcome,
    figure_names,
    limits_after,
    machine_limits,
    make_plan,
    measure,
    measure_config,
    setting,
)
from experiments.options import resolved
from experiments.report.console import print_dropped, print_failures, print_result, print_table
from experiments.report.kernel_tables import print_tables
from experiments.report.limits import say_limits
from experiments.roofline.limits import Limits
from experiments.runs.conditions import Condition, check_keys, parse_conditions
from experiments.runs.directory import finished, finite, run_directory, runs_folder, write_json, write_setup
from experiments.runs.records import write_run
from experiments.sweep.job import job_directory

RESULTS = ("run", "failures", "stopped", "stopped_by", "unmeasured", "dropped_blocks")


def run(config: DictConfig) -> None:
    spec, how = engine_spec(config.engine), measure_config(config)
    conditions = parse_conditions(resolved(config)["fail_if"])
    if how.kernel_passes:
        expect(not conditions, "fail_if holds the results of a workload to a bound; measure=kernels runs none. Leave out one.")
        result = run_kernels(config, spec, how)
    else:
        result = run_workload(config, spec, conditions)
    reported = report_on(config, result)
    print_result(result, f"{result['run']}/results.json")
    conclude(conditions, result, reported)


def run_workload(config: DictConfig, spec: EngineSpec, conditions: Sequence[Condition]) -> dict[str, Any]:
    """Time a workload; a run directory and a table. Returns what results.json has."""
    plan = make_plan(config, [spec])
    check_keys(conditions, ["engine", *setting(config, plan), *RESULTS, *figure_names(plan)], [spec.label], {})
    what = f"bench-{spec.label}-{plan.workload.name}"
    with run_directory(runs_folder(config), what, job_directory(config)) as directory, ProgressReporter() as narrator:
        write_setup(directory, config)
        outcome = Outcome.of(plan)
        measure(plan, outcome, directory, narrator)
        whole = {"engine": spec.label} | setting(config, plan) | {"run": str(finished(directory))}
        whole |= {name: getattr(outcome, name) for name in RESULTS[1:-1]} | {"dropped_blocks": outcome.dropped()}
        result: dict[str, Any] = finite(whole | outcome.figures.get(spec.label, {}))
        write_run(directory, result, outcome.windows, outcome.profiles)
    title = f"{plan.model} ({plan.checkpoint.path.name}), {config.dtype}, workload {plan.workload.name}"
    print_table(title, outcome.figures, every=config.table == "all")
    print_dropped(result["dropped_blocks"], every=config.table == "all")
    say_limits(outcome.figures)
    print_failures(outcome.failures)
    return result


def run_kernels(config: DictConfig, spec: EngineSpec, how: MeasureConfig) -> dict[str, Any]:
    """Time native kernels, in a process of their own; a run directory and tables. Returns what results.json has."""
    benchmark.expect_native(spec)
    name = str(resolved(config.model)["name"])
    checkpoint = open_checkpoint(zoo.resolve(name))
    asked = {"engine": spec.label, "model": name, "dtype": spec.config.dtype, "passes": how.kernel_passes}
    timed: list[dict[str, Any]] = []
    limits: dict[str, Limits | None] = {"before": None, "after": None}
    with run_directory(runs_folder(config), f"kernels-{spec.label}", job_directory(config)) as directory:
        write_setup(directory, config)
        try:
            with ProgressReporter() as narrator:
                progress = narrator.progress(spec.label)
                limits["before"] = machine_limits(how, narrator)
                with IsolatedEngine(spec, directory / f"{spec.label}.log", how.timeout_s) as engine:
                    for found in engine.time_kernels(checkpoint.path, benchmark.SHAPES, how.kernel_passes, progress):
                        timed.append(found)
                        progress(len(timed), len(benchmark.SHAPES), f"kernels, {found['shape']}")
                limits["after"], unmeasured = limits_after(how, narrator)
        except (KeyboardInterrupt, EngineFailure) as end:
            if timed:
                part = benchmark.results(spec, checkpoint.config, timed, limits, "")
                part["failures"] = {spec.label: end.record()} if isinstance(end, EngineFailure) else {}
                keep_part(config, directory, asked | {"run": str(directory)} | part, plural(len(timed), "whole shape"))
            raise
        part = benchmark.results(spec, checkpoint.config, timed, limits, unmeasured)
        result: dict[str, Any] = finite(asked | {"run": str(finished(directory))} | part)
        write_json(directory / "results.json", result)
    print_tables(result)
    return result


def main() -> None:
    launch(run, "bench")


if __name__ == "__main__":
    main()
