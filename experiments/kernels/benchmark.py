"""Each native CPU kernel alone, against its own limit and against what the framework makes of the same piece of the model.

`python -m experiments.bench engine=torch measure=kernels`. An operator of a layer is timed over all layers in turn, so that
one layer's weights do not stay in a cache; a pass runs every operator once, and the median of the passes counts; results.json
has their quartiles too. Passes of the native kernels and of the framework take turns, so that both meet the same machine.
Limits are counted as in `experiments.roofline.work`: layers and head are a step there. The framework's version is the step of
`kernels=framework`, in pieces, padded as it pads. It writes keys and values in attend, the native kernels do in project:
layers, which is all three, compares alike with alike.

A run that is cut short keeps results and a report of the shapes that were whole, with the limits that were measured before.

A time includes the call out of Python, microseconds each, on JAX tens of them for each pass over the layers: the least that an
operator can show. A fraction above 1 means that its data came from a cache, as that of a tiny model does, or that the machine
was slower while its limits were measured: such a run is called contaminated. One whose limits moved between its start and its
end is in doubt.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import reduce
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.batch import Batch
from common.config import ITEMSIZES, Dtype, ModelConfig, expect
from common.errors import BackendError
from common.request import SamplingParams
from common.schedule.request_table import Rows
from common.step_log import record_step
from common.weights.checkpoint import expected_shapes
from experiments.display.formatting import number
from experiments.engines.spec import EngineSpec
from experiments.measure.session import KERNELS
from experiments.metrics.metrics import BUSY
from experiments.roofline.limits import SAID, Limits, better
from experiments.roofline.work import Work, limit_seconds, seen


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
    "quartiles_ms": "quartiles",
    "mib": "MiB",
    "gflop": "GFLOP",
    "gb_per_s": "GB/s",
    "gflop_per_s": "GFLOP/s",
    "limit_ms": "limit, ms",
    "fraction": "of limit",
    "framework_ms": "framework, ms",
    "ratio": "framework / native",
}
"""Of an operator at a shape, each with its name: medians of the passes, and the native ones' lower and upper quartile;
`fraction` is limit_ms / ms, and `ratio` is framework_ms / ms."""
Figures = Mapping[str, Any]
"""`FIGURES`, and `framework_quartiles_ms`."""
MOVED = 0.1
"""Of a limit: what it may differ by before and after the run."""


def make_batch(shape: Shape, vocab_size: int, page_size: int) -> Batch:
    """The step, of random tokens, on pages in order; the last token of each sequence asks for the next, greedily."""
    length, pages = shape.past + shape.new, shape.pages(page_size)
    table, rng = Rows(shape.seqs, length, page_size), np.random.default_rng(0)
    tokens, greedy = rng.integers(0, vocab_size, (shape.seqs, length), np.int32), SamplingParams(temperature=0.0)
    rows = [table.take(mine, range(1 + seq * pages, 1 + (seq + 1) * pages), greedy, 0) for seq, mine in enumerate(tokens)]
    return table.build(rows, [shape.past] * shape.seqs, [shape.new] * shape.seqs, list(range(shape.seqs)), [])


def needs(model: ModelConfig, dtype: Dtype, batch: Batch, page_size: int) -> dict[str, Work]:
    """What each operator needs at least, over all layers. For sample that is to read the logits. Attend alone reads the
    keys and values of the step's own tokens too, which in the layers as a whole are still in a cache."""
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
        "attend": (kv * (keys + model.num_layers * tokens), 4 * model.num_heads * model.head_dim * context),
        "combine": (elements(others), 2 * matrices(others) * tokens),
        "head": (head + model.hidden_size, 2 * head * rows),
    }
    work = {name: Work(np.array(size * ITEMSIZES[dtype]), np.array(flops)) for name, (size, flops) in counted.items()}
    parts = [work[name] for name in ("project", "attend", "combine")]
    own = np.array(kv * model.num_layers * tokens * ITEMSIZES[dtype])
    work["layers"] = Work(np.sum([part.bytes for part in parts]) - own, np.sum([part.flops for part in parts]))
    work["sample"] = Work(np.array(4 * model.vocab_size * rows), np.array(0))  # float32
    return work


def figures(
    work: Work, native: Sequence[float], framework: Sequence[float], limits: Limits | None, dtype: Dtype
) -> dict[str, Any]:
    """The figures of one operator from the quartiles of its passes in seconds, the median between them; those of the limit are
    None if it was not measured."""
    limit = None if limits is None else float(limit_seconds(work, limits.bandwidth, limits.peak(dtype)))
    native_s, framework_s = native[1], framework[1]
    values = (
        native_s * 1e3,
        spread_ms(native),
        float(work.bytes) / 2**20,
        float(work.flops) / 1e9,
        float(work.bytes) / native_s / 1e9,
        float(work.flops) / native_s / 1e9,
        None if limit is None else limit * 1e3,
        None if limit is None else limit / native_s,
        framework_s * 1e3,
        framework_s / native_s,
    )
    return dict(zip(FIGURES, values, strict=True)) | {"framework_quartiles_ms": spread_ms(framework)}


def results(
    spec: EngineSpec,
    model: ModelConfig,
    timed: Sequence[Mapping[str, Any]],
    limits: Mapping[str, Limits | None],
    unmeasured: str,
) -> dict[str, Any]:
    """What results.json has of the shapes that are timed, each as `experiments.kernels.operators.time_kernels` tells it.
    `limits`: what the machine could do before and after; `unmeasured`: why the latter is not known, where it should be."""
    known = [] if unmeasured else [found for found in limits.values() if found]
    best = reduce(better, known) if known else None
    told = {when: found.summary() if found else None for when, found in limits.items()} if known else None
    dtype, page_size, by_name = spec.config.dtype, spec.config.block_size, {shape.name: shape for shape in SHAPES}
    shapes: dict[str, dict[str, Figures]] = {}
    for found in timed:
        batch = make_batch(by_name[found["shape"]], model.vocab_size, page_size)
        work, times = needs(model, dtype, batch, page_size), found["times"]
        shapes[found["shape"]] = {
            operator: figures(work[operator], seconds, times["framework"][operator], best, dtype)
            for operator, seconds in times["native"].items()
        }
    foreign, watched = (sum(found[name] for found in timed) for name in ("foreign_cpu_seconds", "watched_seconds"))
    share = foreign / (watched * (os.cpu_count() or 1))
    return {
        "failures": {},
        "unmeasured": unmeasured,
        **{name: timed[0][name] for name in KERNELS},
        "limits": told,
        "foreign_cpu_share": share,
        "contaminated": contaminations(shapes, share, best.cache_bytes if best else 0),
        "unsure": moved(told) if told else [],
        "shapes": shapes,
    }


def spread_ms(quartiles: Sequence[float]) -> list[float]:
    """The outer two of three quartiles in seconds."""
    return [1e3 * quartiles[0], 1e3 * quartiles[2]]


def contaminations(shapes: Mapping[str, Mapping[str, Figures]], foreign_share: float, cache_bytes: int) -> list[str]:
    """What makes figures of shape → operator worth nothing. `cache_bytes`: of the last-level cache, 0 where nobody tells."""
    reasons = [f"other programs used {foreign_share:.0%} of the processors"] if foreign_share > BUSY else []
    above = [
        (f"{operator} in {shape} ({values['fraction']:.2f})", values["mib"] * 2**20 <= cache_bytes)
        for shape, rows in shapes.items()
        for operator, values in rows.items()
        if (values["fraction"] or 0.0) > 1
    ]
    cached = f"their data fit the last-level cache of {cache_bytes >> 20} MiB, which answers faster than memory"
    for fits, why in ((True, cached), (False, "the machine was slower while its limits were measured")):
        if invalid := [name for name, small in above if small == fits]:
            reasons.append(f"invalid: above the limit are {', '.join(invalid)}; {why}")
    return reasons


def moved(limits: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """That the machine was not the same before and after, with which limits, if it was not: a share of one is then a share of
    what the machine can do at its best. Of a run that was cut short, that nobody knows."""
    before, after = limits["before"], limits["after"]
    if before is None or after is None:
        return ["the machine's limits were measured before the run alone, which was cut short"]
    apart = [
        f"{name} {number(before[key] / 1e9)} and {number(after[key] / 1e9)} {unit}"
        for key, name, unit in SAID
        if abs(before[key] - after[key]) > MOVED * max(before[key], after[key])
    ]
    return [f"the machine's limits moved during the run ({', '.join(apart)} before and after)"] if apart else []


def expect_native(spec: EngineSpec) -> None:
    """Raises `BackendError` for an engine that has no native kernels, `ConfigError` if they are turned off. A capability is a
    file, which is looked for without importing a framework."""
    package = util.find_spec(f"{spec.name}infer")
    folders = (package and package.submodule_search_locations) or ()
    if not any((Path(folder) / "kernels.py").exists() for folder in folders):
        raise BackendError(f"engine={spec.name} has no native kernels to time. Use engine=jax or engine=torch.")
    expect(spec.config.kernels != "framework", "measure=kernels times native kernels, got kernels=framework; use kernels=auto.")
