"""How close to this machine's limits did a run come? The limits are measured, the work is counted, and both are joined.

`python -m experiments.roofline` prints this machine's limits: a table, which of its rows count, and one line of JSON.

The roofline (Williams, Waterman & Patterson 2009, doi:10.1145/1498765.1498785): a step that must move `bytes` and compute
`flops` takes at least max(bytes / bandwidth, flops / peak) seconds. A step of T tokens, with R rows of logits, must at least

- read each weight once: all blocks; the embedding rows of its tokens, T·D at most; with R > 0 the last norm and the LM head, of
  which the embedding rows are a part where the two are tied;
- read K and V of every key of earlier steps that one of its tokens sees, once where sequences share its page, and write T new;
- multiply and add, 2 FLOP each: every matrix of the blocks for T tokens, the LM head for R rows, and q·k and p·v for every key
  that a query sees: 2·weights·T + 2·V·D·R + 4·N·H·Σ causal context, the last for each layer
  (the forward pass of Chowdhery et al. 2022, arXiv:2204.02311, appendix B; memory as in Pope et al. 2022, arXiv:2211.05102).

Over `time` seconds: mbu = bytes / (time · bandwidth), mfu = flops / (time · peak), roofline = Σ limits of the steps / time.
Activations, padding, sampling and whatever the host does are no needed work: they are what makes a figure less than 1. Above 1
the speed, the count or a limit is wrong. (Weights and KV that fit the last-level cache are not bound by memory: for a model so
small the limit does not hold.)
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from common.config import ITEMSIZES, Dtype, ModelConfig
from common.errors import BackendError, TandemError
from common.exits import FAILURE, fail
from common.kernels.cpu.build import build
from common.kernels.cpu.pack import aligned
from common.platform import cores, memory_available, thread_settings
from common.schedule.steplog import StepRecord
from common.weights.checkpoint import expected_shapes
from common.weights.parameters import NUMPY_DTYPES
from experiments.console import number, print_json, wide_console
from experiments.drive import Window
from experiments.machine import Watch
from experiments.metrics import BUSY, INTENSITIES, LIMITED
from experiments.phases import rate, step_seconds

READ = "read"
DTYPES = tuple(ITEMSIZES)
SAID = (
    (f"{READ}_bytes_per_s", "memory read", "GB/s"),
    *((f"{dtype}_flops_per_s", f"matmul {dtype}", "GFLOP/s") for dtype in DTYPES),
)
"""Of `Limits.summary`: key, name, unit in billions."""
CACHES = 8
"""The buffer is this many times the last-level cache, so that next to nothing of it is found there the next time."""
LEAST_BUFFER = 1 << 28
SIZES = (1024, 2048)
"""Rows and columns of the square matrices that are multiplied: large enough to be bound by arithmetic alone."""
SECONDS = 0.15
"""How long each way is repeated where nothing else is asked."""
PATIENCE_S = 1.0
"""An implementation that would take longer for the largest product is not tried on it: it is far from the best."""


# What the machine can do.


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What this machine's processors can do at most: for each limit the ways that were tried, each at its best."""

    ways: Mapping[str, Mapping[str, float]]
    """`read` → way → bytes/s; `float32` and `bfloat16` → way → FLOP/s of a matrix product in that dtype."""
    threads: int
    cache_bytes: int
    """Last-level cache; 0 where the system does not tell."""
    buffer_bytes: int
    """What was read."""
    notes: tuple[str, ...] = ()
    """What could not be tried, and why."""

    def best(self, limit: str) -> tuple[str, float]:
        """The way that came furthest, and how far. bfloat16 may be widened without loss, so float32 counts for it too."""
        ways = dict(self.ways[limit])
        if limit == "bfloat16":
            ways |= {f"{way}, float32": value for way, value in self.ways["float32"].items()}
        return max(ways.items(), key=lambda item: item[1])

    @property
    def bandwidth(self) -> float:
        """Bytes of memory that can be read in a second."""
        return self.best(READ)[1]

    def peak(self, dtype: Dtype) -> float:
        """FLOP/s of a matrix product."""
        return self.best(dtype)[1]

    def summary(self) -> dict[str, Any]:
        """The best of each, for a result."""
        best = {limit: self.best(limit) for limit in (READ, *DTYPES)}
        figures = {f"{limit}_{'bytes' if limit == READ else 'flops'}_per_s": value for limit, (_, value) in best.items()}
        return figures | {"by": {limit: way for limit, (way, _) in best.items()}, "notes": list(self.notes)}


def limits_said(limits: Mapping[str, Mapping[str, Any]]) -> str:
    """Of a result's `limits`, the `summary` before and after: `Limits before and after: memory read 33.1 and 32.8 GB/s, …`.
    Of a run that was interrupted, those before."""
    known = [when for when in ("before", "after") if limits[when]]
    both = lambda key: " and ".join(number(limits[when][key] and limits[when][key] / 1e9) for when in known)  # noqa: E731
    return f"Limits {' and '.join(known)}: {', '.join(f'{name} {both(key)} {unit}' for key, name, unit in SAID)}."


def told_limits(engines: Mapping[str, Mapping[str, Any]]) -> str:
    """The same of a run with these figures, and which of them its shares are of; empty where nobody measured."""
    said = next((limits_said(figures["limits"]) for figures in engines.values() if figures.get("limits")), "")
    beside = [value for mine in engines.values() for value in mine.get("block_read_bytes_per_s") or () if value]
    if not said or not beside:
        return said
    span = " to ".join(dict.fromkeys(number(value / 1e9) for value in (min(beside), max(beside))))
    return f"{said} Shares are of the best matmul, and of the memory read beside each window: {span} GB/s."


def say_limits(engines: Mapping[str, Mapping[str, Any]]) -> None:
    """What the machine could do, below the table of a run."""
    if said := told_limits(engines):
        wide_console().print(said, style="dim", highlight=False, markup=False)


def better(one: Limits, other: Limits) -> Limits:
    """The better of two measurements for each way: whatever slowed one of them down was no limit."""
    ways = {
        limit: {way: max(mine.get(way, 0.0), other.ways[limit].get(way, 0.0)) for way in (*mine, *other.ways[limit])}
        for limit, mine in one.ways.items()
    }
    return Limits(**{**vars(one), "ways": ways, "notes": tuple(dict.fromkeys(one.notes + other.notes))})


def measure_limits(seconds: float = SECONDS) -> Limits:
    """This machine's limits, found in a process of its own, which imports the frameworks. Raises `BackendError` if it fails."""
    command = [sys.executable, "-m", "experiments.roofline", "--limits", "--seconds", str(seconds)]
    environment = os.environ | thread_settings(cores())
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment)
    if done.returncode:
        raise BackendError(
            f"The machine's limits could not be measured (exit code {done.returncode}); measure.limits_s=0 leaves them out.\n"
            + done.stderr[-2000:]
        )
    return limits_of(json.loads(done.stdout.rstrip("\n").rpartition("\n")[2]))


def limits_of(record: Mapping[str, Any]) -> Limits:
    """The inverse of `dataclasses.asdict` and a trip through JSON."""
    return Limits(**{**record, "notes": tuple(record["notes"])})


def find_limits(seconds: float) -> Limits:
    """What `measure_limits` does, in this process: try every way, for `seconds` each."""
    threads, cache = cores(), last_level_cache()
    wanted = max(CACHES * cache, LEAST_BUFFER)
    size = min(wanted, memory_available() // 2) // 4096 * 4096
    notes = [f"only {size} of {wanted} bytes were read, for want of memory"] if size < wanted else []
    reads, reasons = read_ways(size, threads)
    ways = {READ: {name: size / shortest(run, seconds) for name, run in reads.items()}}
    del reads  # and with them the buffer
    for dtype in DTYPES:
        ways[dtype] = {}
        for name, make in MATMULS.items():
            try:
                for n in SIZES:
                    multiply = make(dtype, n)
                    if multiply is None:
                        break
                    ways[dtype][f"{name} {n}"] = speed = 2 * n**3 / shortest(timed(multiply), seconds)
                    if 2 * max(SIZES) ** 3 / speed > PATIENCE_S:
                        break
            except (ImportError, AttributeError, RuntimeError) as error:  # not installed, or not able to on this machine
                reasons.append(f"{name}: {error}")
    notes += dict.fromkeys(reasons)
    return Limits(ways=ways, threads=threads, cache_bytes=cache, buffer_bytes=size, notes=tuple(notes))


def bandwidth_probe(seconds: float) -> Callable[[], float]:
    """Measures the read bandwidth alone, in bytes/s, in this process and `seconds` for each way: short enough to be repeated
    beside every window. On a shared machine it halves and doubles within minutes."""
    size = min(max(CACHES * last_level_cache(), LEAST_BUFFER), memory_available() // 2) // 4096 * 4096
    ways, _ = read_ways(size, cores())
    return lambda: size / min(shortest(run, seconds) for run in ways.values())


def shortest(run: Callable[[], float], seconds: float) -> float:
    """The shortest of at least two runs that together take `seconds`; a run returns how long it took."""
    end = time.perf_counter() + seconds
    times = [run(), run()]
    while time.perf_counter() < end:
        times.append(run())
    return min(times)


def timed(run: Callable[[], object]) -> Callable[[], float]:
    def timed_run() -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    return timed_run


def last_level_cache(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of the last-level caches of the processors this process may use, each counted once; 0 where Linux does not tell."""
    caches: dict[str, int] = {}
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        levels = {}
        for cache in (root / f"cpu{cpu}" / "cache").glob("index*"):
            kind, level, shared, size = (
                (cache / name).read_text(encoding="utf-8").strip() for name in ("type", "level", "shared_cpu_list", "size")
            )
            if kind != "Instruction":
                levels[int(level)] = (shared, int(size[:-1]) << {"K": 10, "M": 20, "G": 30}[size[-1]])
        if levels:
            shared, bytes_ = levels[max(levels)]
            caches[shared] = bytes_
    return sum(caches.values())


# Ways to read memory: each call reads the whole buffer and returns seconds.


def read_ways(size: int, threads: int) -> tuple[dict[str, Callable[[], float]], list[str]]:
    """Name → call, over one new buffer of `size` bytes, and why there are no more: the kernels of `limits.cc`, or without a
    compiler what NumPy has."""
    buffer = np.empty(size + 64, np.uint8)
    buffer = buffer[-buffer.ctypes.data % 64 :][:size]
    try:
        library = ctypes.CDLL(str(build("limits")))
    except BackendError as error:
        buffer.view(np.uint64)[:] = np.arange(size // 8, dtype=np.uint64)
        reductions: tuple[np.ufunc, ...] = (np.maximum, np.add, np.bitwise_or)
        return {f"numpy {f.__name__}": numpy_way(f, buffer, threads) for f in reductions}, [f"memory is read by NumPy: {error}"]
    library.fill(*native_arguments(buffer, threads))
    return {name: native_way(library, name, buffer, threads) for name in NATIVE_READS}, []


NATIVE_READS = ("read_plain", "read_prefetch", "read_streams", "read_streams_prefetch")
"""Functions of `limits.cc`."""


def native_read(library: ctypes.CDLL, name: str, buffer: np.ndarray, threads: int) -> tuple[float, int]:
    """Seconds to read uint8[n], aligned to 64 and n a multiple of 512, and the sum of its 64-bit words, modulo 2**64."""
    function, total = library[name], ctypes.c_uint64()
    function.restype = ctypes.c_double
    return function(*native_arguments(buffer, threads), ctypes.byref(total)), total.value


def native_way(library: ctypes.CDLL, name: str, buffer: np.ndarray, threads: int) -> Callable[[], float]:
    return lambda: native_read(library, name, buffer, threads)[0]


def native_arguments(buffer: np.ndarray, threads: int) -> tuple[Any, ...]:
    return ctypes.c_void_p(buffer.ctypes.data), ctypes.c_size_t(len(buffer)), ctypes.c_int(threads)


def numpy_way(reduction: np.ufunc, buffer: np.ndarray, threads: int) -> Callable[[], float]:
    parts = np.array_split(buffer.view(np.uint64), threads)
    team = ThreadPoolExecutor(threads)
    return timed(lambda: list(team.map(reduction.reduce, parts)))  # NumPy lets go of the interpreter's lock


# Ways to multiply: each returns a call that computes one product of two n × n matrices, or None if it does not offer the dtype.

Matmul = Callable[[Dtype, int], Callable[[], object] | None]


def numpy_matmul(dtype: Dtype, n: int) -> Callable[[], object] | None:
    if dtype != "float32":
        return None
    a, out = np.ones((n, n), np.float32), np.empty((n, n), np.float32)
    return lambda: np.matmul(a, a, out=out)


def torch_matmul(dtype: Dtype, n: int) -> Callable[[], object] | None:
    import torch

    a, out = torch.ones(n, n, dtype=getattr(torch, dtype)), torch.empty(n, n, dtype=getattr(torch, dtype))
    return lambda: torch.mm(a, a, out=out)


def onednn_matmul(dtype: Dtype, n: int) -> Callable[[], object] | None:
    """oneDNN through PyTorch, with one matrix in the layout that oneDNN likes best."""
    import torch

    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or (dtype == "bfloat16" and not ops._is_mkldnn_bf16_supported()):
        return None
    a = torch.ones(n, n, dtype=getattr(torch, dtype))
    packed = ops._reorder_linear_weight(a, None)
    return lambda: ops._linear_pointwise(a, packed, None, "none", [], "")


def jax_matmul(dtype: Dtype, n: int) -> Callable[[], object] | None:
    import jax

    a = jax.device_put(np.ones((n, n), np.float32), jax.devices("cpu")[0]).astype(dtype)
    multiply = jax.jit(lambda x: x @ x)
    return lambda: multiply(a).block_until_ready()


def native_matmul(dtype: Dtype, n: int) -> Callable[[], object] | None:
    """The native kernels' own, over memory that lies as the engines' weights do."""
    library, threads = ctypes.CDLL(str(build("matmul"))), cores()
    a, ones, out = (part.view(NUMPY_DTYPES[dtype]).reshape(n, n) for part in aligned(3, n * n * ITEMSIZES[dtype]))
    a[...] = ones[...] = 1  # however they are packed
    return lambda: native_multiply(library, a, ones, out, threads)


def native_multiply(library: ctypes.CDLL, a: np.ndarray, weights: np.ndarray, out: np.ndarray, threads: int) -> None:
    """out[R, O] = a[R, I] W[O, I]^T by `matmul.cc`, of W its `panels`; I is a multiple of two, and all have one dtype."""
    addresses = [ctypes.c_void_p(array.ctypes.data) for array in (a, weights, out)]
    sizes = [ctypes.c_int(size) for size in (*a.shape, out.shape[1], threads)]
    library[f"tandem_multiply_{a.dtype}"](*addresses[:2], *sizes, addresses[2])


MATMULS: Mapping[str, Matmul] = {
    "numpy": numpy_matmul,
    "torch": torch_matmul,
    "onednn": onednn_matmul,
    "jax": jax_matmul,
    "native": native_matmul,
}
"""Every implementation at hand. One that does not run here is noted and left out."""


# What the steps needed.


class Work(NamedTuple):
    """Of each step: float64[n]."""

    bytes: np.ndarray
    """Moved between memory and processor."""
    flops: np.ndarray


def count(steps: Sequence[StepRecord], model: ModelConfig, dtype: Dtype) -> Work:
    """What each step needs at least, with weights and KV in `dtype`. The formulas stand at the top of this file."""
    tokens = np.array([step.counts.sum() for step in steps], np.float64)
    rows = np.array([step.logit_rows for step in steps], np.float64)
    shapes = expected_shapes(model)
    blocks = {name: shape for name, shape in shapes.items() if ".layers." in name}
    head = model.vocab_size * model.hidden_size
    embedded = np.minimum(tokens, model.vocab_size) * model.hidden_size
    weights = sum(map(math.prod, blocks.values())) + (rows > 0) * (head + model.hidden_size)
    weights = weights + np.where((rows > 0) & model.tie_embeddings, 0, embedded)

    keys, context = seen(steps, model)
    kv = 2 * model.num_kv_heads * model.head_dim * (keys + model.num_layers * tokens)

    matrices = sum(math.prod(shape) for shape in blocks.values() if len(shape) == 2)
    flops = 2 * matrices * tokens + 2 * head * rows + 4 * model.num_heads * model.head_dim * context
    return Work((weights + kv) * ITEMSIZES[dtype], flops)


def seen(steps: Sequence[StepRecord], model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Of each step, over all layers: keys of earlier steps that it reads, and pairs of a query and a key that it sees."""
    flat = lambda arrays: np.concatenate([np.empty(0), *arrays])  # noqa: E731
    seqs = [len(step.counts) for step in steps]
    per_step = lambda by_seq: np.bincount(np.arange(len(steps)).repeat(seqs), by_seq, len(steps))  # noqa: E731
    counts, ends, shared = (flat(getattr(step, name) for step in steps) for name in ("counts", "kv_lengths", "shared"))
    old = ends - counts
    keys = context = np.zeros(len(steps))
    for window, layers in Counter(model.layer_window).items():
        sees = window or 1 << 31
        first = np.maximum(old - sees + 1, 0)  # that the first of its new tokens sees
        keys = keys + layers * per_step(np.maximum(old - np.maximum(first, shared), 0))
        context = context + layers * per_step(visible(ends, sees) - visible(old, sees))
    return keys, context


def weights_bytes(model: ModelConfig, dtype: Dtype) -> int:
    """What the model's weights take in `dtype`, each held once."""
    return sum(map(math.prod, expected_shapes(model).values())) * ITEMSIZES[dtype]


def visible(queries: np.ndarray, window: int) -> np.ndarray:
    """Keys that the first `queries` tokens of a sequence see, in sum: Σ min(i, window) for i = 1 … queries."""
    inside = np.minimum(queries, window)
    return inside * (inside + 1) / 2 + (queries - inside) * window


def limit_seconds(work: Work, bandwidth: np.ndarray | float, peak: float) -> np.ndarray:
    """The least time that each step could take on this machine: float64[n]."""
    return np.maximum(work.bytes / bandwidth, work.flops / peak)


# The join.


def efficiency(windows: Iterable[Window], model: ModelConfig, dtype: Dtype, limits: Limits | None) -> dict[str, float | None]:
    """The figures `LIMITED` and `INTENSITIES` of one engine over its windows.

    `roofline`, `mbu` and `mfu` are over all time of the windows, the host's work and the wait for arrivals included. Those of
    `decode` are over the steps in which no sequence had more than one token, and the time that these had the device; those of
    `prefill` over the others and theirs. A window whose own bandwidth was measured is held against that. None where nothing is
    known: no limits were measured, the engine does not tell its steps, or there was no such step.
    """
    windows = list(windows)
    logs = [window.steps for window in windows if window.steps is not None]
    if limits is None or len(logs) < len(windows):
        return dict.fromkeys((*LIMITED, *INTENSITIES))
    steps = [step for log in logs for step in log]
    work = count(steps, model, dtype)
    beside = [limits.bandwidth if window.bandwidth is None else window.bandwidth for window in windows]
    bandwidth, peak = np.repeat(beside, [len(log) for log in logs]), limits.peak(dtype)
    least, reading = limit_seconds(work, bandwidth, peak), work.bytes / bandwidth
    busy = np.concatenate([np.empty(0), *map(step_seconds, logs)])
    decode = np.array([step.counts.max(initial=0) <= 1 for step in steps], bool)
    duration = sum(window.duration for window in windows)
    share = lambda amount, seconds: rate(float(amount), float(seconds))  # noqa: E731
    return {
        "roofline": share(least.sum(), duration),
        "mbu": share(reading.sum(), duration),
        "mfu": share(work.flops.sum(), duration * peak),
        "decode_roofline": share(least[decode].sum(), busy[decode].sum()),
        "decode_mbu": share(reading[decode].sum(), busy[decode].sum()),
        "decode_mfu": share(work.flops[decode].sum(), busy[decode].sum() * peak),
        "prefill_roofline": share(least[~decode].sum(), busy[~decode].sum()),
        "prefill_mbu": share(reading[~decode].sum(), busy[~decode].sum()),
        "prefill_mfu": share(work.flops[~decode].sum(), busy[~decode].sum() * peak),
        "intensity": share(work.flops.sum(), work.bytes.sum()),
        "decode_intensity": share(work.flops[decode].sum(), work.bytes[decode].sum()),
        "prefill_intensity": share(work.flops[~decode].sum(), work.bytes[~decode].sum()),
    }


def no_roofline(windows: Iterable[Window], limits: Limits | None, engines: int) -> str | None:
    """Why there are limits and nothing is held against them, of so many `engines` under one label; None where something is, or
    nobody wanted it."""
    if limits is None or all(window.steps is not None for window in windows):
        return None
    several = f"not measured over several engines: the steps of {engines} overlap"
    return several if engines > 1 else "not measured: it does not tell its steps"


# The command.


def print_limits(limits: Limits, foreign_share: float | None) -> None:
    """Every way, those that count as limits, and what may have kept them low: `foreign_share` of the processors' time went to
    other programs; None if the machine does not tell."""
    table = Table("limit", "way")
    table.add_column("10⁹ a second", justify="right")
    for limit, ways in limits.ways.items():
        what = "memory read, bytes" if limit == READ else f"matmul {limit}, FLOP"
        for way, value in ways.items():
            table.add_row(what, way, number(value / 1e9))
    console = wide_console()
    console.print(table)
    for limit in limits.ways:
        (way, value), name = limits.best(limit), "bandwidth" if limit == READ else f"peak of {limit}"
        told = f"{name}: {way}, {number(value / 1e9)} {'GB/s' if limit == READ else 'GFLOP/s'}"
        console.print(told, style="bold", highlight=False, markup=False)
    megabytes = f"{limits.buffer_bytes >> 20} MiB read, last-level cache {limits.cache_bytes >> 20} MiB"
    console.print(f"{limits.threads} threads; {megabytes}.", highlight=False)
    for note in limits.notes:
        console.print(note, style="dim", highlight=False)
    if foreign_share is not None and foreign_share > BUSY:
        used = f"Other programs used {foreign_share:.0%} of the processors meanwhile: the machine may do more than this."
        console.print(used, style="bold red", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="experiments.roofline", description="Measure this machine's limits.")
    parser.add_argument("--limits", action="store_true", help="measure in this process and print nothing but the line of JSON")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long to repeat each way (%(default)s)")
    options = parser.parse_args()
    if not 0 <= options.seconds <= 60:
        parser.error(f"--seconds must lie in [0, 60], got {options.seconds}.")
    if options.limits:
        print_json(asdict(find_limits(options.seconds)))
        return
    watch = Watch()
    try:
        limits, risen = measure_limits(options.seconds), watch.rise()
    except TandemError as error:
        fail(str(error), FAILURE)
    foreign = risen.get("foreign_cpu_seconds")
    share = None if foreign is None else min(1.0, foreign / (risen["watched_seconds"] * (os.cpu_count() or 1)))
    print_limits(limits, share)
    print_json(asdict(limits) | {"foreign_cpu_share": share})


if __name__ == "__main__":
    main()
