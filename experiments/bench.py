"""One engine, one workload: `python -m experiments.bench engine=jax workload=single`.
With `measure=kernels` no workload: its native kernels, one by one (`experiments.kernels`).

The last line of standard output is one JSON object; its keys are those of `vllm bench serve` and a few more.
"""

from __future__ import annotations

from omegaconf import DictConfig

from experiments import kernels
from experiments.cli import launch
from experiments.config import engine_spec, runs_folder
from experiments.console import Narrator, print_json, print_table
from experiments.job import job_directory
from experiments.measure import make_plan, measure, measure_config, setting
from experiments.records import write_rows
from experiments.rundir import finished, run_directory, write_json, write_setup


def run(config: DictConfig) -> None:
    spec, how = engine_spec(config.engine), measure_config(config)
    if how.kernel_passes:
        kernels.run(config, spec, how)
        return
    plan = make_plan(config, [spec])
    what = f"bench-{spec.label}-{plan.workload.name}"
    with run_directory(runs_folder(config), what, job_directory(config)) as directory, Narrator() as narrator:
        write_setup(directory, config)
        figures, windows = measure(plan, directory, narrator)
        result = {"engine": spec.label} | setting(config, plan) | {"run": str(finished(directory))} | figures[spec.label]
        write_rows(directory, windows)
        write_json(directory / "results.json", result)
    print_table(f"{plan.model}, {config.dtype}, workload {plan.workload.name}", figures)
    print_json(result)


def main() -> None:
    launch(run, "bench")


if __name__ == "__main__":
    main()
