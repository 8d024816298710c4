"""Run the operators of a step one by one on a device, in the engine's process, for `experiments.kernels.benchmark`.

Both kinds of kernels are written once for both backends, which are found by name. `Glue` holds what differs between them.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from common.batch import Batch
from common.config import EngineConfig, ModelConfig, expect
from common.kernels.cpu.build import arithmetic
from common.kernels.cpu.pages import page_bytes
from common.kernels.cpu.step import pack_step
from common.system.hardware import memory_available
from common.weights.checkpoint import Checkpoint
from experiments.kernels.benchmark import Shape, make_batch
from experiments.load.machine import busy_seconds
from experiments.roofline.probes import timed

Held = dict[str, Any]
"""Arrays on the device, by name."""
KINDS = ("native", "framework")
REST_S = 0.05
"""Before each pass: threads that one kind has left watching for work would take time from the other's, and by then sleep."""
Program = Callable[..., Held]
"""An operator over all layers: takes what its parameters name, gives what it has written, which may be in place."""


def part(backend: str, module: str) -> Any:
    """`jaxinfer.<module>` or `torchinfer.<module>`."""
    return import_module(f"{backend}infer.{module}")


class Glue(NamedTuple):
    """What a backend does its own way."""

    runner: Callable[[Program, Held], Callable[[], None]]
    """A call that runs a program on what is held, puts there what it gives, and waits for it."""
    after: Callable[[Any, Any], Any]
    """(x, results): x, for an operator that must not start before these are there."""


def torch_glue() -> Glue:
    import torch

    def runner(program: Program, held: Held) -> Callable[[], None]:
        names = inspect.signature(program).parameters

        def run() -> None:
            with torch.inference_mode():
                held.update(program(**{name: held[name] for name in names}))

        return run

    return Glue(runner, lambda x, _: x)


def jax_glue() -> Glue:
    import jax

    def runner(program: Program, held: Held) -> Callable[[], None]:
        names = inspect.signature(program).parameters
        gives = jax.eval_shape(lambda read: program(**read), {name: held[name] for name in names})
        for name, shapes in gives.items():
            held.setdefault(name, jax.tree.map(lambda shape: jax.numpy.zeros(shape.shape, shape.dtype), shapes))

        # What it gives takes the memory of what was there before, as in the engine's step.
        def pure(old: Held, kept: Held) -> Held:
            return program(**{name: (old if name in old else kept)[name] for name in names})

        arguments = lambda: ({n: held[n] for n in gives}, {n: held[n] for n in names if n not in gives})  # noqa: E731
        compiled = jax.jit(pure, donate_argnums=0, keep_unused=True).lower(*arguments()).compile()

        def run() -> None:
            held.update(jax.block_until_ready(compiled(*arguments())))

        return run

    # XLA runs what does not depend on each other at the same time: here each layer waits for the one before, as in a model.
    def after(x: Any, results: Sequence[Any]) -> Any:
        return x.at[0, 0].add(sum(result[0, 0, 0] for result in results).astype(x.dtype))

    return Glue(runner, after)


GLUES: Mapping[str, Callable[[], Glue]] = {"torch": torch_glue, "jax": jax_glue}


def padded(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return np.pad(array, [(0, most - size) for size, most in zip(array.shape, shape, strict=True)])


def native_programs(backend: str, config: ModelConfig) -> tuple[Program, ...]:
    kernels, State = part(backend, "kernels"), part(backend, "step").State

    def embed(weights: Any, step: Any, last: Any, x: Any) -> Held:
        return {"x": kernels.embed(config, weights, step, last, len(x))}

    def project(weights: Any, step: Any, x: Any, cache: Any) -> Held:
        for layer in range(config.num_layers):
            cache, q = kernels.project(config, weights, layer, step, cache, x)
        return {"cache": cache, "q": q}

    def attend(weights: Any, step: Any, cache: Any, q: Any) -> Held:
        for layer in range(config.num_layers):
            q = kernels.attend(weights, layer, step, cache, q)
        return {"q": q}

    def combine(weights: Any, step: Any, q: Any, x: Any) -> Held:
        for layer in range(config.num_layers):
            x = kernels.combine(weights, layer, step, q, x)
        return {"x": x}

    def layers(weights: Any, step: Any, cache: Any, x: Any) -> Held:
        cache, x = kernels.layers(weights, step, cache, x)
        return {"cache": cache, "x": x}

    def head(weights: Any, step: Any, x: Any, logits: Any) -> Held:
        return {"logits": kernels.head(weights, step, x, logits)}

    def sample(step: Any, logits: Any, last: Any) -> Held:
        sampled, after = kernels.sample(State(None, last, logits), step)
        return {"last": after.last_tokens, "sampled": sampled}

    return embed, project, attend, combine, layers, head, sample


def framework_programs(backend: str, glue: Glue, config: ModelConfig, step: Any) -> tuple[Program, ...]:
    lib, attention, sampling = (part(backend, name) for name in ("model", "attention", "sampling"))

    def opened(weights: Any, positions: Any) -> tuple[Any, list[Any]]:
        model = step.model(weights)
        ropes = [rope(positions) for rope in model.ropes]
        return model, [ropes[i] for i in config.layer_rope]

    def embed(weights: Any, token_ids: Any) -> Held:
        return {"x": step.model(weights).embed_tokens(token_ids)}

    def project(weights: Any, positions: Any, x: Any) -> Held:
        model, ropes = opened(weights, positions)
        qkv = []
        for block, rope in zip(model.layers, ropes, strict=True):
            qkv.append(block.project(x, rope))
            x = glue.after(x, qkv[-1])
        return {"qkv": qkv}

    def attend(plan: Any, cache: Any, qkv: Any) -> Held:
        attend, (out, *_) = attention.paged_attention(config, plan), qkv[0]
        for i, (_, k, v) in enumerate(qkv):
            out, cache = attend(out, k, v, i, cache)
        return {"out": out, "cache": cache}

    def combine(weights: Any, x: Any, out: Any) -> Held:
        for block in step.model(weights).layers:
            x = block.combine(x, out)
        return {"x": x}

    def layers(weights: Any, positions: Any, plan: Any, cache: Any, x: Any) -> Held:
        model, ropes = opened(weights, positions)
        attend = attention.paged_attention(config, plan)
        for i, (block, rope) in enumerate(zip(model.layers, ropes, strict=True)):
            out, cache = attend(*block.project(x, rope), i, cache)
            x = block.combine(x, out)
        return {"x": x, "cache": cache}

    def head(weights: Any, logit_rows: Any, x: Any) -> Held:
        model = step.model(weights)
        return {"logits": lib.logits(model, model.norm(x)[logit_rows])}

    def sample(logits: Any) -> Held:
        return {"tokens": sampling.greedy(logits)}

    return embed, project, attend, combine, layers, head, sample


def native_inputs(config: ModelConfig, batch: Batch) -> Held:
    """A step's own arrays, in NumPy: the packed step, and residual stream and logits in their sizes."""
    return {
        "step": pack_step(batch),
        "x": np.zeros((batch.num_tokens, config.hidden_size), np.float32),
        "logits": np.zeros((len(batch.logit_rows), config.vocab_size), np.float32),
    }


def framework_inputs(backend: str, step: Any, config: ModelConfig, batch: Batch, page_size: int) -> Held:
    """Likewise for the framework's step, padded to the sizes that it compiles; integers are as wide as PyTorch indexes with."""
    sizes = sorted((*step.decode_buckets, *step.token_buckets))
    room = lambda n: next((size for size in sizes if size >= n), n)  # noqa: E731
    wide = lambda array: padded(array, (room(len(array)),)).astype(np.int64)  # noqa: E731
    attention, tokens, seqs = part(backend, "attention"), batch.num_tokens, batch.num_seqs
    plan = attention.make_plan(batch, config, page_size)
    plan = attention.fit_plan(plan, room(tokens), seqs, batch.page_table.shape[2], tokens > seqs)
    return {name: wide(getattr(batch, name)) for name in ("token_ids", "positions", "logit_rows")} | {"plan": plan}


def load(
    kind: str, backend: str, checkpoint: Checkpoint, config: EngineConfig, positions: int, pages: int
) -> tuple[Held, tuple[Program, ...], Callable[[Batch], Held]]:
    """The `native` or `framework` kernels of a backend: weights and pages, operators, and what makes their arrays of a step."""
    model, glue = checkpoint.config, GLUES[backend]()
    device = part(backend, "device").open_device(config.device, config.threads)
    step = part(backend, {"native": "kernels", "framework": "step"}[kind]).Step(config, device)
    step.load(checkpoint, positions)
    state = step.make_state(pages)
    put = lambda arrays: part(backend, "arrays").to_device(arrays, device)  # noqa: E731
    if kind == "native":
        held = {"weights": step.weights, "cache": state.cache, "last": state.last_tokens}
        return held, native_programs(backend, model), lambda batch: put(native_inputs(model, batch))
    inputs = lambda batch: put(framework_inputs(backend, step, model, batch, config.block_size))  # noqa: E731
    return {"weights": step.weights, "cache": state.cache}, framework_programs(backend, glue, model, step), inputs


def time_kernels(
    backend: str,
    checkpoint: Checkpoint,
    config: EngineConfig,
    shapes: Sequence[Sequence[Any]],
    passes: int,
) -> Iterator[dict[str, Any]]:
    """For each `shape`, by name, `times`: kind of kernels → operator → seconds, the quartiles of the passes with the median
    between them; `foreign_cpu_seconds`: what other programs computed in the `watched_seconds` that it took; `kernel_library`:
    the file of the native kernels, and `kernel_arithmetic`: what they multiply with. Raises `ConfigError` or `BackendError`
    where the native kernels do not serve this model under these settings.

    A shape has the fields of `Shape`: a process receives it as a list."""
    steps = [Shape(*shape) for shape in shapes]
    config = replace(
        config,
        kernels="native",
        max_model_len=None,
        max_num_seqs=max(shape.seqs for shape in steps),
        max_num_batched_tokens=max(shape.seqs * shape.new for shape in steps),
    )
    device = part(backend, "device").open_device(config.device, config.threads)
    part(backend, "kernels").unusable(config, checkpoint.config, device)
    pages = most_pages(steps, config.block_size)
    needed, free = len(KINDS) * pages * page_bytes(checkpoint.config, config), memory_available()
    expect(
        needed <= free,
        f"The KV pages of the longest step take {needed} bytes, native ones and the framework's, and {free} are free; take a "
        "smaller model.",
    )
    for name, times, foreign, watched in time_shapes(backend, checkpoint, config, steps, passes):
        library = part(backend, "kernels").built_library()
        built = {"kernel_library": library.name, "kernel_arithmetic": arithmetic(library, config.dtype)}
        yield {"shape": name, "times": times, "foreign_cpu_seconds": foreign, "watched_seconds": watched, **built}


def time_shapes(
    backend: str, checkpoint: Checkpoint, config: EngineConfig, shapes: Sequence[Shape], passes: int
) -> Iterator[tuple[str, dict[str, dict[str, list[float]]], float, float]]:
    """For each shape its name, kind → operator → seconds (lower quartile, median, upper quartile), and the seconds that other
    programs computed and that passed meanwhile. The kinds take turns, pass by pass, so that a machine that drifts wrongs
    neither."""
    # Longer contexts than the model has are timed too: what the positions mean does not matter.
    positions, pages = max(shape.past + shape.new for shape in shapes), most_pages(shapes, config.block_size)
    loaded = {kind: load(kind, backend, checkpoint, config, positions, pages) for kind in KINDS}
    glue, lasting = GLUES[backend](), {kind: set(held) for kind, (held, *_) in loaded.items()}
    for shape in shapes:
        batch = make_batch(shape, checkpoint.config.vocab_size, config.block_size)
        runs: dict[str, dict[str, Callable[[], None]]] = {}
        for kind, (held, programs, inputs) in loaded.items():
            held.update(inputs(batch))
            runs[kind] = {program.__name__: glue.runner(program, held) for program in programs}
            for run in runs[kind].values():
                run()  # leaves what the next one reads
        gc.collect()
        samples: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        begin, machine, own = time.perf_counter(), busy_seconds(), time.process_time()
        for _ in range(passes):
            for kind, operators in runs.items():
                time.sleep(REST_S)
                next(iter(operators.values()))()  # wakes the threads
                samples[kind].append({name: timed(run)() for name, run in operators.items()})
        foreign = max(0.0, busy_seconds() - machine - (time.process_time() - own))
        yield shape.name, {kind: quartiles(mine) for kind, mine in samples.items()}, foreign, time.perf_counter() - begin
        for kind, (held, *_) in loaded.items():
            for name in set(held) - lasting[kind]:
                del held[name]


def quartiles(samples: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Operator → lower quartile, median and upper quartile of the passes."""
    return {name: np.percentile([sample[name] for sample in samples], (25, 50, 75)).tolist() for name in samples[0]}


def most_pages(shapes: Sequence[Shape], page_size: int) -> int:
    """Pages for the longest of the steps, the null page included."""
    return 1 + max(shape.seqs * shape.pages(page_size) for shape in shapes)
