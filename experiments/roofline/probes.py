"""Read memory and multiply matrices in every available way, and time each at its best.

`python -m experiments.roofline.probes` is a process of its own that imports both frameworks. It prints one line of JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from common.config import ITEMSIZES, Dtype
from common.errors import BackendError
from common.kernels.cpu.build import build
from common.kernels.cpu.pack import aligned
from common.system.hardware import cores, memory_available
from common.weights.parameters import NUMPY_DTYPES
from experiments.roofline.limits import DTYPES, READ, SECONDS, Limits

CACHES = 8
"""The buffer is this many times the last-level cache, so that next to nothing of it is found there the next time."""
LEAST_BUFFER = 1 << 28
SIZES = (1024, 2048)
"""Rows and columns of the square matrices that are multiplied: large enough to be bound by arithmetic alone."""
PATIENCE_S = 1.0
"""An implementation that would take longer for the largest product is not tried on it: it is far from the best."""


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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.roofline.probes", description="Measure this machine's limits in this process."
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long to repeat each way (%(default)s)")
    print(json.dumps(asdict(find_limits(parser.parse_args().seconds))))


if __name__ == "__main__":
    main()
