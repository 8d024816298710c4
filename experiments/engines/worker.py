"""Hold one engine and answer commands on it: `python -m experiments.engines.worker`, the child of `IsolatedEngine`.

A peer's environment has only the packages that this module and the peer need. A command that needs more imports it by itself.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import import_module, util
from typing import IO, Any

from common.config import EngineConfig
from common.errors import BackendError
from common.interface import InferenceEngine, Progress
from common.process.child import listen
from common.process.frames import Message, write_frame
from common.system.hardware import peak_rss, rss
from common.weights.checkpoint import open_checkpoint
from experiments.engines.environments import PEERS
from experiments.load.driver import drive
from experiments.load.profiler import profiled, time_collectives
from experiments.load.workload import Item

PROGRESS_PERIOD_S = 0.1


def build(
    name: str, model: str, config: EngineConfig, progress: Progress, options: Mapping[str, Any] | None = None
) -> InferenceEngine:
    """The engine `name`: another people's from `experiments.baselines`, with `options` of its own if it has any, else ours over
    the backend of that name."""
    checkpoint = open_checkpoint(model)
    if name.isidentifier() and util.find_spec(f"experiments.baselines.{name}"):
        try:
            module = import_module(f"experiments.baselines.{name}")
            own = {"options": module.Options(**options)} if options else {}
            engine: InferenceEngine = module.build_engine(checkpoint, config, progress, **own)
        except ModuleNotFoundError as error:
            remedy = "make peers" if name in PEERS else "pip install -e '.[baselines]'"
            raise BackendError(
                f"engine={name} needs the package {error.name!r}, which is not installed. Run: {remedy}"
            ) from error
        return engine
    from common.replicas.factory import open_engine

    return open_engine(name, checkpoint, config, progress)


class Worker:
    """The child's end: one engine and the commands on it."""

    def __init__(self, output: IO[bytes]) -> None:
        self._output = output
        self._engine: InferenceEngine | None = None
        self._last_progress = 0.0
        self._stage_ended: float | None = None
        """When the first stage of `build` was done: weights come first, then warm-up."""
        self._timed: Iterator[Message] = iter(())
        """What kernels take, shape by shape."""

    def answer(self, message: Message) -> Message:
        command = getattr(self, f"on_{message.pop('command')}")
        return command(**message)

    def on_load(self, name: str, model: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> Message:
        start = time.perf_counter()
        self._engine = build(name, model, EngineConfig(**config), self.progress, options)
        end = time.perf_counter()
        loaded = self._stage_ended or end
        stats = self._engine.stats()
        pool, rank = stats.get("kv_pool_bytes"), stats.get("rank_bytes")
        return {
            "load_s": loaded - start,
            "warmup_s": end - loaded,
            "rss_mib": (rss() + stats.get("others_rss_bytes", 0)) / 2**20,
            "peak_load_mib": (peak_rss() + stats.get("others_peak_rss_bytes", 0)) / 2**20,
            "kv_pool_mib": None if pool is None else pool / 2**20,
            "rank_mib": None if rank is None else rank / 2**20,
            "caps": asdict(self._engine.caps),
        }

    def on_run(self, items: list[Message], logprobs: int | None, concurrency: int | None) -> Message:
        assert self._engine, "run before load"
        self._engine.reset_prefix_cache()
        return drive(self._engine, [*map(Item.of, items)], logprobs, concurrency, self.mark).record()

    def on_profile(self, name: str, items: list[Message]) -> Message:
        assert self._engine, "profile before load"
        self._engine.reset_prefix_cache()
        profile = profiled(name, self._engine, [*map(Item.of, items)])
        return profile.record() if profile else {}

    def on_time_collectives(self, name: str, items: list[Message]) -> Message:
        assert self._engine, "time_collectives before load"
        self._engine.reset_prefix_cache()
        told = time_collectives(name, self._engine, [*map(Item.of, items)])
        return told._asdict() if told else {}

    def on_time_kernels(
        self, name: str, model: str, config: Mapping[str, Any], shapes: list[list[Any]], passes: int
    ) -> Message:
        operators = import_module("experiments.kernels.operators")  # not in a peer's environment
        self._timed = operators.time_kernels(name, open_checkpoint(model), EngineConfig(**config), shapes, passes)
        return {}

    def on_time_next_shape(self) -> Message:
        return next(self._timed)

    def on_observe(self, what: str, **arguments: Any) -> Message:
        observe = import_module("experiments.correctness.observe")  # not in a peer's environment
        assert self._engine, "observe before load"
        answer: Message = getattr(observe, f"on_{what}")(self._engine, self.progress, **arguments)
        return answer

    def on_peak_rss_mib(self) -> Message:
        others = self._engine.stats().get("others_peak_rss_bytes", 0) if self._engine else 0
        return {"value": (peak_rss() + others) / 2**20}

    def mark(self) -> None:
        """Send a mark at once. The parent measures the time between two marks by its own clock."""
        write_frame(self._output, {"mark": True})

    def progress(self, done: int, total: int, what: str) -> None:
        now = time.perf_counter()
        if done == total:
            self._stage_ended = self._stage_ended or now
        if done == total or now - self._last_progress >= PROGRESS_PERIOD_S:
            self._last_progress = now
            write_frame(self._output, {"progress": [done, total, what]})


class ProgressLogHandler(logging.Handler):
    """Tells the parent what is logged, as progress without a count: this process's own words go to a file."""

    def __init__(self, output: IO[bytes]) -> None:
        super().__init__()
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        write_frame(self._output, {"progress": [0, 0, record.getMessage()]})


def serve() -> None:
    """Answer commands until the parent is gone, even in the middle of one."""
    output, commands = listen()
    logging.getLogger("common.kernels.cpu.build").addHandler(ProgressLogHandler(output))  # compiling takes long
    worker = Worker(output)
    while True:
        message = commands.get().message
        try:
            answer = worker.answer(message)
        except (Exception, SystemExit) as error:
            answer = {"error": {"kind": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}}
        write_frame(output, answer)


if __name__ == "__main__":
    serve()
