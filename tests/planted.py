"""Engines with a defect planted in them, for tests of what finds defects: subclasses of a real runner, told by name what to do.

Steps are counted from the last reset, so that a recording and each repetition of it meet the defect at the same place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from common.batch import VIEWS, Batch, Mask
from common.config import EngineConfig, ModelConfig
from common.engine import Engine
from common.interface import ModelRunner, Progress, Result, StepHandle
from common.weights.checkpoint import Checkpoint, open_checkpoint
from common.weights.tiny import RECIPES, _write
from experiments.correctness import observe
from experiments.engines.spec import EngineSpec
from experiments.load.driver import Window, drive
from experiments.load.workload import Workload

LAYER = 7
"""Where defects of one layer are."""
STEP = 5
"""When defects of one step happen: all requests of the tests decode then."""
CACHED = 20
"""The position of the key that `cached` changes long after it was written."""
PAGES = 24
"""Of an engine in this process, the null page included."""


def deep_model(directory: Path) -> Path:
    """A seeded checkpoint of nine layers, three of them without a window: 0-based layers 2, 5 and 8."""
    directory.mkdir()
    _write(RECIPES["tiny-gemma3"] | {"num_hidden_layers": 9}, directory)
    return directory


class Altered:
    """A checkpoint with one float32 tensor changed by a function."""

    def __init__(self, checkpoint: Checkpoint, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        self._checkpoint, self._name, self._change = checkpoint, name, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def __getitem__(self, name: str) -> Any:
        entry = self._checkpoint[name]
        if name != self._name:
            return entry
        changed = self._change(entry.dense()).astype(np.float32)
        return replace(entry, encoding="F32", stored=changed, row_order=None, addend=0.0)


class Reconfigured:
    """A checkpoint whose configuration says something else."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self._checkpoint, self.config = checkpoint, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def __getitem__(self, name: str) -> Any:
        return self._checkpoint[name]


def rope(config: ModelConfig) -> ModelConfig:
    """A wrong base in one layer."""
    return turned(config, 1.5)


def window(config: ModelConfig) -> ModelConfig:
    """A sliding window that is one key too narrow in one layer."""
    windows = list(config.layer_window)
    assert windows[LAYER] > 1
    windows[LAYER] -= 1
    return replace(config, layer_window=tuple(windows))


def scale(config: ModelConfig) -> ModelConfig:
    """Attention scores that are a ten-thousandth too large."""
    return replace(config, attention_scale=config.attention_scale * 1.0001)


def turn(config: ModelConfig) -> ModelConfig:
    """A slightly wrong base of the rotary embedding in one layer."""
    return turned(config, 1.002)


def turned(config: ModelConfig, times: float) -> ModelConfig:
    kinds = list(config.layer_rope)
    wrong = replace(config.ropes[kinds[LAYER]], base=config.ropes[kinds[LAYER]].base * times)
    kinds[LAYER] = len(config.ropes)
    return replace(config, ropes=(*config.ropes, wrong), layer_rope=tuple(kinds))


def half(weight: np.ndarray) -> np.ndarray:
    """A norm that weighs half of its channels too much."""
    return weight + np.where(np.arange(len(weight)) < len(weight) // 2, np.float32(0.001), np.float32(0))


def first_row(weight: np.ndarray, times: float = 1.002) -> np.ndarray:
    """One output of a projection that is too large."""
    changed = weight.copy()
    changed[0] *= times
    return changed


WEIGHTS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "norm": (f"model.layers.{LAYER}.input_layernorm.weight", half),
    "output": (f"model.layers.{LAYER}.self_attn.o_proj.weight", first_row),
    "activation": (f"model.layers.{LAYER}.mlp.gate_proj.weight", lambda weight: weight * 1.0001),
    "larger output": (f"model.layers.{LAYER}.self_attn.o_proj.weight", lambda weight: first_row(weight, 1.05)),
    "larger activation": (f"model.layers.{LAYER}.mlp.gate_proj.weight", lambda weight: weight * 1.001),
    "final": ("model.norm.weight", half),
}
CONFIGS: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "rope": rope,
    "window": window,
    "scale": scale,
    "turn": turn,
    "larger turn": lambda config: turned(config, 1.02),
}


def other(batch: Batch, **views: Any) -> Batch:
    return Batch.pack(**({name: getattr(batch, name) for name in VIEWS} | views))


def slot(batch: Batch) -> Batch:
    """The second sequence's newest key and value go one place too far, or back at the end of a page."""
    slots = batch.slots.copy()
    at = batch.query_starts[2] - 1
    slots[0, at] += 1 if slots[0, at] % 16 < 15 else -1
    return other(batch, slots=slots)


def token(batch: Batch) -> Batch:
    """The second sequence reads another token than it was given."""
    ids = batch.token_ids.copy()
    ids[batch.query_starts[2] - 1] ^= 1
    return other(batch, token_ids=ids)


BATCHES: dict[str, Callable[[Batch], Batch]] = {"slot": slot, "token": token}


def planted(base: type[ModelRunner], defect: str) -> type[ModelRunner]:
    """A class of runners like `base` but for one defect."""

    class Planted(base):  # type: ignore[valid-type]
        _steps = 0

        def load(self, checkpoint: Checkpoint, progress: Progress | None = None) -> None:
            if defect in CONFIGS:
                checkpoint = Reconfigured(checkpoint, CONFIGS[defect](checkpoint.config))  # type: ignore[assignment]
            if defect in WEIGHTS:
                checkpoint = Altered(checkpoint, *WEIGHTS[defect])  # type: ignore[assignment]
            super().load(checkpoint, progress)

        def reset(self) -> None:
            super().reset()
            self._steps = 0

        def submit(self, batch: Batch, mask: Mask = None) -> StepHandle:
            with self._defect(batch) as batch:
                pending = super().submit(batch, mask)
                return Sampled(pending) if defect == "sampler" else pending

        def observe(self, batch: Batch, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
            with self._defect(batch) as batch:
                taps = super().observe(batch, names)
            if defect == "sampler" and "tokens" in taps:
                taps["tokens"] = taps["tokens"] ^ 1
            if defect == "nan" and self._steps == STEP + 1 and "logits" in taps:
                taps["logits"][1] = np.nan
            return taps

        @contextmanager
        def _defect(self, batch: Batch) -> Iterator[Batch]:
            now, self._steps = self._steps == STEP, self._steps + 1
            if defect == "page" and now:  # a copy of the third sequence's first page lands on the second's, in one layer
                source, target = int(batch.page_table[0, 2, 0]), int(batch.page_table[0, 1, 0])
                held, wrong = self.read_pages(0, [target]), self.read_pages(0, [source])
                for name in held:
                    held[name] = held[name].copy()
                    held[name][LAYER] = wrong[name][LAYER]
                self.write_pages(0, [target], held)
            if defect == "cached" and now:  # one older key of the second sequence grows, in one layer
                page, place = int(batch.page_table[0, 1, CACHED // 16]), CACHED % 16
                held = {name: x.copy() for name, x in self.read_pages(0, [page]).items()}
                held["k"][LAYER, 0, place] = held["k"][LAYER, 0, place] * 1.001
                self.write_pages(0, [page], held)
            if defect == "mask":
                with shifted_mask(import_module(base.__module__.partition(".")[0] + ".attention")):
                    yield batch
            elif defect == "head":
                with scaled_head(import_module(base.__module__.partition(".")[0] + ".step")):
                    yield batch
            else:
                yield BATCHES[defect](batch) if now and defect in BATCHES else batch

    return Planted


@contextmanager
def shifted_mask(attention: Any) -> Iterator[None]:
    """Attention whose queries stand one position too early: none sees itself."""
    right = attention.query_tiles

    def wrong(batch: Batch, chunk: int) -> tuple[Any, Any]:
        return tuple(replace(tiles, position=tiles.position - 1) for tiles in right(batch, chunk))

    attention.query_tiles = wrong
    try:
        yield
    finally:
        attention.query_tiles = right


@contextmanager
def scaled_head(step: Any) -> Iterator[None]:
    """Logits that are a ten-thousandth too large."""
    right = step.logits
    step.logits = lambda model, x: right(model, x) * 1.0001
    try:
        yield
    finally:
        step.logits = right


class Sampled(StepHandle):
    """A step whose tokens are not the likeliest."""

    def __init__(self, pending: StepHandle) -> None:
        self._pending = pending

    def result(self) -> Result:
        result = self._pending.result()
        return replace(result, tokens=result.tokens ^ 1)


class Local:
    """An engine in this process, with the commands of one in its own."""

    def __init__(self, label: str, runner: ModelRunner, config: EngineConfig, path: Path) -> None:
        runner.load(open_checkpoint(path))
        runner.allocate([PAGES])
        self.spec = EngineSpec(label=label, name=label, config=config)
        self._engine = Engine(runner, config, num_pages=PAGES)

    def observe(self, what: str, progress: Any = None, **arguments: Any) -> Any:
        answer = getattr(observe, f"on_{what}")(self._engine, progress or (lambda *_: None), **arguments)
        return json.loads(json.dumps(answer, default=lambda array: array.tolist()))

    def run(self, workload: Workload, logprobs: int | None = None) -> Window:
        return drive(self._engine, workload.items, logprobs)


def make_local(label: str, backend: str, kernels: str, path: Path, defect: str = "", dtype: str = "float32") -> Local:
    config = EngineConfig(
        dtype=dtype,
        kernels=kernels,
        device="cpu",
        threads=1,
        max_num_seqs=4,
        max_num_batched_tokens=96,
        max_model_len=64,
    )
    kind: Any = import_module(f"{backend}infer").ModelRunner
    if defect:
        kind = planted(kind, defect)
    return Local(label, kind(config), config, path)
