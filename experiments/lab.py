"""Use the harness in a notebook: its configuration, its engines, and its runs, which display themselves.

`run = lab.bench("engine=torch", "model=tiny-llama")`, `lab.compare("engines=[jax,torch]")`, `lab.Run.open("runs/…")`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import hydra
import pandas as pd
from hydra.errors import HydraException
from matplotlib.figure import Figure
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from common.config import expect
from common.engine import Engine, build_engine
from common.errors import ConfigError
from common.process.exits import USER_ERROR
from common.weights import zoo
from common.weights.checkpoint import Checkpoint, open_checkpoint
from experiments.cli.launch import explain, spell_out_model
from experiments.engines.process import EngineFailure
from experiments.engines.spec import engine_spec
from experiments.options import resolved
from experiments.report.figures_table import FIGURES, figure, tells
from experiments.report.notes import contaminated, dropped
from experiments.report.rows import counted_rows, counted_steps
from experiments.report.verdict import headline
from experiments.runs.results import RunFiles, open_run
from experiments.widgets import DisplayTable, plot_run

Command = Literal["bench", "compare"]
TAIL_LINES = 40


def compose(*overrides: str, command: Command = "compare") -> DictConfig:
    """The configuration that `python -m experiments.<command> <overrides>` runs with. Raises `ConfigError`, with the message of
    the command line, for an override that it would refuse to compose."""
    expect(command in ("bench", "compare"), f"command must be bench or compare, got {command!r}.")
    given = [piece for override in overrides for piece in spell_out_model(override)]
    try:
        with hydra.initialize_config_module("configs", version_base="1.3"):
            return hydra.compose(command, given)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error)) from None


def checkpoint(model: str) -> Checkpoint:
    """The model that `model=<model>` names: a name, a path or a hub id."""
    return open_checkpoint(zoo.resolve(model))


def load(*overrides: str) -> Engine:
    """The engine that `bench` would time, here in this process, with its scheduler and runner to look at. `close` it."""
    config = compose(*overrides, command="bench")
    spec = engine_spec(config.engine)
    expect(
        spec.config.data_parallel_size == 1 and spec.config.prefill_parallel_size == 0,
        "lab.load makes an engine in this process, to look into, and replicas are in others: leave parallel=dp2 or pd1 out.",
    )
    return build_engine(spec.name, checkpoint(str(resolved(config.model)["name"])), spec.config)


def bench(*overrides: str) -> Run:
    """`python -m experiments.bench <overrides>` in a process of its own, as a run. Progress is shown as it goes."""
    return Run.open(_command("bench", overrides))


def compare(*overrides: str) -> Comparison:
    """`python -m experiments.compare <overrides>` in a process of its own, as a comparison."""
    return Comparison.open(_command("compare", overrides))


def _command(command: Command, overrides: tuple[str, ...]) -> Path:
    """Run a command to its end; returns its run directory. Raises `ConfigError` for an error that the user can correct."""
    compose(*overrides, command=command)  # refuses a misspelled override before a process starts
    arguments = [sys.executable, "-m", f"experiments.{command}", *overrides]
    said: deque[str] = deque(maxlen=TAIL_LINES)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        with subprocess.Popen(arguments, stdout=output, stderr=subprocess.PIPE, encoding="utf-8", errors="replace") as process:
            assert process.stderr
            try:
                for line in filter(str.strip, process.stderr):
                    said.append(line)
                    print(line, end="", flush=True)
            except BaseException:  # Ctrl-C above all: engines end with the process, the run stays `.partial`
                process.terminate()
                raise
        output.seek(0)
        return _run_directory(process.returncode, output.read(), "".join(said))


def _run_directory(code: int, output: str, said: str) -> Path:
    """The run that a command names in the last line of its output. It may have ended with an exit code above 0: an engine among
    several failed, or a condition of `fail_if` holds; the results of the run have both."""
    _, _, last = output.rstrip("\n").rpartition("\n")
    if last.startswith("{"):
        return Path(json.loads(last)["run"])
    _, marked, message = said.rpartition("error: ")
    kind = ConfigError if code == USER_ERROR else EngineFailure
    raise kind(message.strip() if marked else f"The command ended with exit code {code}, and named no run.")


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run, read from its directory. In a notebook it shows its verdict and its figures."""

    files: RunFiles
    kinds: ClassVar[tuple[str, ...]] = ("bench", "compare")

    @classmethod
    def open(cls, directory: Path | str) -> Self:
        """The run in `directory`; one of several engines is a `Comparison`. Raises `ConfigError` where there is no such run."""
        files = open_run(Path(directory))
        expect(
            files.kind in cls.kinds,
            f"{directory} is a run of {files.kind}, not of {' or '.join(cls.kinds)}; open it with lab.Run.open.",
        )
        return (Comparison if files.kind == "compare" else cls)(files)  # type: ignore[return-value]

    @property
    def directory(self) -> Path:
        return self.files.directory

    @property
    def results(self) -> dict[str, Any]:
        """`results.json` as it is."""
        return self.files.results

    @property
    def figures(self) -> pd.DataFrame:
        """Every figure that is a number: a row each, a column for each engine, NaN where an engine does not report it."""
        numbers = {
            label: {key: float(value) for key, value in figures.items() if type(value) in (int, float)}
            for label, figures in self.files.engines.items()
        }
        return pd.DataFrame(numbers)

    @property
    def requests(self) -> pd.DataFrame:
        """A row for each request of each timed window, without the dropped blocks."""
        return counted_rows(self.files)

    @property
    def steps(self) -> pd.DataFrame:
        """A row for each step of each timed window, without the dropped blocks, of engines that log their steps."""
        return counted_steps(self.files)

    def sentences(self) -> list[str]:
        """Return the sentences that stand above the figures: failures, contaminations and dropped blocks."""
        failed = [
            f"{label} failed: {failure['kind']}: {failure['message']}"
            for label, failure in (self.results.get("failures") or {}).items()
        ]
        spoilt = [
            f"contaminated {label}: {reason}."
            for label, figures in self.files.engines.items()
            for reason in figures.get("contaminated") or ()
        ]
        doubtful = [
            f"{label} may be contaminated: {reason}."
            for label, figures in self.files.engines.items()
            for reason in figures.get("unsure") or ()
        ]
        return [*failed, *spoilt, *doubtful, *(f"{each}." for each in dropped(self.results.get("dropped_blocks") or ()))]

    def compare(self, other: Run) -> pd.DataFrame:
        """The figures of two runs of one engine each, and `ratio` = other / this. Raises `ConfigError` if the requests differ.

        Two runs are two moments of a machine, so this is no verdict: that takes `lab.compare`, where engines take turns.
        """
        mine, theirs = self.figures, other.figures
        expect(
            mine.shape[1] == theirs.shape[1] == 1,
            f"Run.compare puts two runs of one engine each side by side; these have {mine.shape[1]} and {theirs.shape[1]}.",
        )
        hashes = [run.results.get("workload_hash") for run in (self, other)]
        expect(hashes[0] == hashes[1], f"The runs had different requests (workload_hash {hashes[0]} and {hashes[1]}).")
        table = pd.concat([mine, theirs], axis=1, keys=["this", "other"])
        table.columns = ["this", "other"]
        return table.assign(ratio=table["other"] / table["this"])

    def plot(self) -> Figure:
        """Throughput by block, and the distributions of TTFT and ITL."""
        blocks = {label: figures.get("block_output_throughput") or () for label, figures in self.files.engines.items()}
        return plot_run(blocks, self.requests)

    def table(self) -> DisplayTable:
        """Title, sentences and figures, as they are shown."""
        engines, results = self.files.engines, self.results
        rows = [
            (name, *(figure(key, figures) for figures in engines.values()))
            for key, name in FIGURES
            if tells(key, engines.values())
        ]
        title = ", ".join(str(results.get(key)) for key in ("model", "dtype", "workload"))
        return DisplayTable(title=title, sentences=tuple(self.sentences()), header=("", *engines), rows=tuple(rows))

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def _repr_markdown_(self) -> str:
        return self.table()._repr_markdown_()

    def __repr__(self) -> str:
        return repr(self.table())


class Comparison(Run):
    """A finished run of several engines that took turns."""

    kinds: ClassVar[tuple[str, ...]] = ("compare",)

    @property
    def comparisons(self) -> pd.DataFrame:
        """A row for each engine but the first: ratio of throughput, interval, p-value, verdict."""
        return pd.DataFrame(self.results.get("comparisons") or {}).T

    def sentences(self) -> list[str]:
        compared = (self.results.get("comparisons") or {}).items()
        engines = self.files.engines
        verdicts = [
            f"{'contaminated: ' if contaminated(engines, (entry['against'], label)) else ''}{entry['said']}"
            for label, entry in compared
            if entry.get("said")
        ]
        return [*verdicts, *self._agreement(), *super().sentences()]

    def _agreement(self) -> list[str]:
        """Return the outcome of the comparison of outputs."""
        tone, said = headline(self.results)
        return [] if tone == "calm" else [f"outputs: {said}."]
