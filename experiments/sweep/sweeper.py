"""Expand the options of a sweep (`-m`) to its jobs, and report every error in them before the first job starts."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from common.config import expect
from common.errors import TandemError
from common.process.exits import FAILURE
from common.weights import zoo
from common.weights.checkpoint import Checkpoint, open_checkpoint
from experiments.correctness.config import correctness_config
from experiments.engines.compose import engine_specs
from experiments.engines.spec import engine_spec
from experiments.load.workload import WorkloadConfig, draw
from experiments.measure.session import expect_fits, measure_config
from experiments.options import resolved
from experiments.runs.conditions import parse_conditions
from experiments.runs.sweep_jobs import task_config
from experiments.sweep.board import told_apart
from experiments.sweep.table import finish


class CheckedSweeper(Sweeper):
    """`hydra/sweeper=checked`. It works with every launcher, and ends the process with exit code 1 if a job failed."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context = hydra_context
        self._config = config
        plugins = Plugins.instance()
        self._launcher = plugins.instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        """Check all jobs, run them, and make the table and the report of them. Raises what is wrong with the first that is."""
        expect_folder_name(self._config.sweep)
        parser = OverridesParser.create(config_loader=self._context.config_loader)
        jobs = combinations(parser.parse_overrides(arguments))
        checkpoints: dict[str, Checkpoint] = {}
        for overrides, name in zip(jobs, told_apart(jobs), strict=True):
            config = self._context.config_loader.load_sweep_config(self._config, overrides)
            try:
                check(task_config(config), checkpoints)
            except TandemError as error:
                raise type(error)(f"{error} (Of the job {name}. No job was run.)") from None
        returns = self._launcher.launch(jobs, initial_job_idx=0)
        if not finish(Path(self._config.hydra.sweep.dir)):
            sys.exit(FAILURE)
        return returns


def expect_folder_name(name: Any) -> None:
    """Raises `ConfigError` for a `sweep` that is no name of a folder in runs/sweeps."""
    expect(
        isinstance(name, (str, int)) and re.fullmatch(r"\w[\w.+=@, -]{0,99}", str(name)) is not None,
        "sweep must be the name of a folder, made in runs/sweeps: at most 100 letters, digits and ._+=@, -, and first a "
        f"letter or digit; got {name!r}. To put sweeps elsewhere, set runs=FOLDER.",
    )


def combinations(overrides: Sequence[Override]) -> list[list[str]]:
    """Every combination of values, the last option's changing fastest. Raises `ConfigError` for an interval."""
    choices: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if override.is_sweep_override():
            expect(
                override.is_discrete_sweep(),
                f"A sweep needs values to choose from, as in {key}=1,2,4; got {override.input_line}.",
            )
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            choices[key] = [override.input_line or ""]
    return [list(job) for job in product(*choices.values())]


def check(config: DictConfig, checkpoints: dict[str, Checkpoint]) -> None:
    """Raises a `TandemError` for a configuration whose run would be refused, as far as that can be told without loading an
    engine. Checkpoints that are opened, which reads no weights, are added to `checkpoints` by name."""
    specs = engine_specs(config) if "engines" in config else [engine_spec(config.engine)]
    parse_conditions(resolved(config)["fail_if"])
    if "correctness" in config:
        correctness_config(config)
    name = str(resolved(config.model)["name"])
    if name not in checkpoints:
        checkpoints[name] = open_checkpoint(zoo.resolve(name))
    if measure_config(config).kernel_passes == 0:
        # Lengths do not depend on the vocabulary.
        workload = draw(WorkloadConfig.of(resolved(config.workload)), config.seed, checkpoints[name].config.vocab_size)
        for spec in specs:
            expect_fits(workload, spec, checkpoints[name])
