"""Each native CPU kernel alone, against its own limit and against what the framework makes of the same piece of the model.

`python -m experiments.bench engine=torch measure=kernels`. An operator of a layer is timed over all layers in turn, so that
one layer's weights do not stay in a cache; a pass runs every operator once, and the median of the passes counts; results.json
has their quartiles too. Limits are counted as in `experiments.roofline`: layers and head are a step there. The framework's
version is the step of `kernels=framework`, in pieces, padded as it pads. It writes keys and values in attend, the native
kernels do in project: layers, which is all three, compares alike with alike.

A run that is cut short keeps what each shape took, by operator in seconds (quartile, median, quartile): lines of JSON in the
engine's log.

A time includes the call out of Python, microseconds each, on JAX tens of them for each pass over the layers: the least that an
operator can show. A fraction above 1 means that its data came from a cache, as that of a tiny model does, or that the machine
was slower while its limits were measured: such a run is called contaminated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig
from rich.markup import escape
from rich.table import Table

from common.config import ITEMSIZES, Dtype, ModelConfig, expect
from common.engine import record_step
from common.errors import BackendError
from common.request import SamplingParams
from common.schedule.batch import Batch
from common.schedule.rows import Rows
from common.weights import zoo
from common.weights.checkpoint import expected_shapes, open_checkpoint
from experiments.config import EngineSpec, MeasureConfig, resolved, runs_folder
from experiments.console import Narrator, number, print_doubts, wide_console
from experiments.isolate import IsolatedEngine
from experiments.job import job_directory
from experiments.measure import machine_limits
from experiments.metrics import BUSY
from experiments.roofline import Limits, Work, better, limit_seconds, limits_said, seen
from experiments.rundir import finished, run_directory, write_json, write_setup


class Shape(NamedTuple):
    """A step of `seqs` sequences, `past` tokens long each before it and `new` tokens longer behind it."""

    name: str
    seqs: int
    past: int
    new: int

    def pages(self, page_size: int) -> int:
        """Pages of each sequence."""
        return -(-(self.past + self.new) // page_size)


SHAPES = (
    Shape("decode 1 at 128", 1, 127, 1),
    Shape("decode 8 at 128", 8, 127, 1),
    Shape("decode 32 at 128", 32, 127, 1),
    Shape("decode 8 at 4096", 8, 4095, 1),
    Shape("prefill 512", 1, 0, 512),
)
PROJECT = ("input_layernorm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm")
"""A layer's tensors that project reads; combine reads the others."""
FIGURES = {
    "ms": "ms",
    "mib": "MiB",
    "gflop": "GFLOP",
    "gb_per_s": "GB/s",
    "gflop_per_s": "GFLOP/s",
    "limit_ms": "limit, ms",
    "fraction": "of limit",
    "framework_ms": "framework, ms",
    "ratio": "× framework",
}
"""Of an operator at a shape, each with its name; `fraction` is limit_ms / ms, and `ratio` is framework_ms / ms."""
Figures = Mapping[str, Any]
"""`FIGURES`, and `quartiles_ms` and `framework_quartiles_ms`: the lower and the upper quartile of the passes."""


def make_batch(shape: Shape, vocab_size: int, page_size: int) -> Batch:
    """The step, of random tokens, on pages in order; the last token of each sequence asks for the next, greedily."""
    length, pages = shape.past + shape.new, shape.pages(page_size)
    table, rng = Rows(shape.seqs, length, page_size), np.random.default_rng(0)
    tokens, greedy = rng.integers(0, vocab_size, (shape.seqs, length), np.int32), SamplingParams(temperature=0.0)
    rows = [table.take(mine, range(1 + seq * pages, 1 + (seq + 1) * pages), greedy, 0) for seq, mine in enumerate(tokens)]
    return table.build(rows, [shape.past] * shape.seqs, [shape.new] * shape.seqs, list(range(shape.seqs)), [])


def needs(model: ModelConfig, dtype: Dtype, batch: Batch, page_size: int) -> dict[str, Work]:
    """What each operator needs at least, over all layers. For sample that is to read the logits."""
    layers = [(name.split(".")[-2], size) for name, size in expected_shapes(model).items() if ".layers." in name]
    mine, others = ([size for name, size in layers if (name in PROJECT) == side] for side in (True, False))
    elements = lambda sizes: sum(map(math.prod, sizes))  # noqa: E731
    matrices = lambda sizes: elements(size for size in sizes if len(size) == 2)  # noqa: E731
    keys, context = (float(x[0]) for x in seen([record_step(batch, page_size, 0.0, 0.0)], model))
    tokens, rows, head = batch.num_tokens, len(batch.logit_rows), model.vocab_size * model.hidden_size
    kv = 2 * model.num_kv_heads * model.head_dim
    counted = {
        "embed": (min(tokens, model.vocab_size) * model.hidden_size, 0),
        "project": (elements(mine) + kv * model.num_layers * tokens, 2 * matrices(mine) * tokens),
        "attend": (kv * keys, 4 * model.num_heads * model.head_dim * context),
        "combine": (elements(others), 2 * matrices(others) * tokens),
        "head": (head + model.hidden_size, 2 * head * rows),
    }
    work = {name: Work(np.array(size * ITEMSIZES[dtype]), np.array(flops)) for name, (size, flops) in counted.items()}
    parts = [work[name] for name in ("project", "attend", "combine")]
    work["layers"] = Work(np.sum([part.bytes for part in parts]), np.sum([part.flops for part in parts]))
    work["sample"] = Work(np.array(4 * model.vocab_size * rows), np.array(0))  # float32
    return work


def figures(work: Work, native_s: float, framework_s: float, limits: Limits | None, dtype: Dtype) -> dict[str, float | None]:
    """`FIGURES` of one operator; those of the limit are None if it was not measured."""
    limit = None if limits is None else float(limit_seconds(work, limits.bandwidth, limits.peak(dtype)))
    values = (
        native_s * 1e3,
        float(work.bytes) / 2**20,
        float(work.flops) / 1e9,
        float(work.bytes) / native_s / 1e9,
        float(work.flops) / native_s / 1e9,
        None if limit is None else limit * 1e3,
        None if limit is None else limit / native_s,
        framework_s * 1e3,
        framework_s / native_s,
    )
    return dict(zip(FIGURES, values, strict=True))


def run(config: DictConfig, spec: EngineSpec, measure: MeasureConfig) -> dict[str, Any]:
    """Time the kernels of one engine, in a process of its own; a run directory and tables. Returns what results.json has."""
    expect_native(spec)
    name = str(resolved(config.model)["name"])
    checkpoint = open_checkpoint(zoo.resolve(name))
    with (
        run_directory(runs_folder(config), f"kernels-{spec.label}", job_directory(config)) as directory,
        Narrator() as narrator,
    ):
        write_setup(directory, config)
        before = machine_limits(measure, narrator)
        with IsolatedEngine(spec, directory / f"{spec.label}.log") as engine:
            answer = engine.time_kernels(checkpoint.path, SHAPES, measure.kernel_passes, narrator.progress(spec.label))
        after = machine_limits(measure, narrator)
        limits = better(before, after) if before and after else None
        dtype, page_size, times = spec.config.dtype, spec.config.block_size, answer["times"]
        shapes: dict[str, dict[str, Figures]] = {}
        for shape in SHAPES:
            work = needs(checkpoint.config, dtype, make_batch(shape, checkpoint.config.vocab_size, page_size), page_size)
            native, framework = (times[kind][shape.name] for kind in ("native", "framework"))
            shapes[shape.name] = {
                operator: figures(work[operator], seconds[1], framework[operator][1], limits, dtype)
                | {"quartiles_ms": spread_ms(seconds), "framework_quartiles_ms": spread_ms(framework[operator])}
                for operator, seconds in native.items()
            }
        share = answer["foreign_cpu_share"]
        result = {
            "engine": spec.label,
            "model": name,
            "dtype": dtype,
            "passes": measure.kernel_passes,
            "run": str(finished(directory)),
            "failures": {},
            "kernel_library": answer["kernel_library"],
            "limits": before and after and {"before": before.summary(), "after": after.summary()},
            "foreign_cpu_share": share,
            "contaminated": contaminations(shapes, share),
            "shapes": shapes,
        }
        write_json(directory / "results.json", result)
    print_tables(result)
    return result


def spread_ms(quartiles: Sequence[float]) -> list[float]:
    """The outer two of three quartiles in seconds."""
    return [1e3 * quartiles[0], 1e3 * quartiles[2]]


def contaminations(shapes: Mapping[str, Mapping[str, Figures]], foreign_share: float) -> list[str]:
    """What makes figures of shape → operator worth nothing."""
    reasons = [f"other programs used {foreign_share:.0%} of the processors"] if foreign_share > BUSY else []
    invalid = [
        f"{operator} in {shape} ({values['fraction']:.2f})"
        for shape, rows in shapes.items()
        for operator, values in rows.items()
        if (values["fraction"] or 0.0) > 1
    ]
    if invalid:
        why = "data came from a cache, or the machine was slower while its limits were measured"
        reasons.append(f"invalid: above the limit are {', '.join(invalid)}; {why}")
    return reasons


def expect_native(spec: EngineSpec) -> None:
    """Raises `BackendError` for an engine that has no native kernels, `ConfigError` if they are turned off. A capability is a
    file, which is looked for without importing a framework."""
    package = util.find_spec(f"{spec.name}infer") if spec.name.isidentifier() else None
    folders = (package and package.submodule_search_locations) or ()
    if not any((Path(folder) / "kernels.py").exists() for folder in folders):
        raise BackendError(f"engine={spec.name} has no native kernels to time. Use engine=jax or engine=torch.")
    expect(spec.config.kernels != "framework", "measure=kernels times native kernels, got kernels=framework; use kernels=auto.")


def print_tables(result: Mapping[str, Any]) -> None:
    """What spoils them, the tables, and the limits that they rest on."""
    console = wide_console()
    print_doubts(console, result["engine"], result["contaminated"], ())
    spoilt = bool(result["contaminated"])
    for shape, operators in result["shapes"].items():
        title = ", ".join([*(result[key] for key in ("engine", "model", "dtype")), shape, *["contaminated"] * spoilt])
        table = Table(title=escape(title), title_justify="left")
        table.add_column("all layers")
        for heading in FIGURES.values():
            table.add_column(heading, justify="right")
        for operator, values in operators.items():
            table.add_row(operator, *(number(values[name]) for name in FIGURES))
        console.print(table)
    if result["limits"]:
        console.print(limits_said(result["limits"]), style="dim", highlight=False, markup=False)
