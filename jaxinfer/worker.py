"""Drive a share of the ranks of a launch, in a process beside the first process.

`common.process.workers` starts it by name. The first process sends every call that it makes. This process makes the same calls
in the same order. A program on a mesh runs when all processes of the mesh have started it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from common.batch import Batch
from common.config import EngineConfig
from common.process.exits import FAILURE
from common.process.workers import follow
from common.weights.checkpoint import open_checkpoint
from jaxinfer.parallel import ProcessInfo, init_distributed, shut_down_distributed
from jaxinfer.runner import ModelRunner


def main(config: dict[str, Any], place: Sequence[Any]) -> None:
    """Run one process until its input ends. `config`: the fields of `EngineConfig`; `place`: those of `ProcessInfo`."""

    def connect() -> None:
        own, _, group = init_distributed(ProcessInfo(*place), EngineConfig(**config))
        calls.update(_calls(ModelRunner(own, group)))

    calls: dict[str, Callable[..., object]] = {"connect": connect, "shut_down": shut_down_distributed}
    # The other processes would wait for this one, so it ends at the first call that fails.
    follow(calls, failed=lambda: os._exit(FAILURE))


def _calls(runner: ModelRunner) -> dict[str, Callable[..., object]]:
    """Return the calls that a connected process makes, by name."""

    def submit(data: bytes) -> None:
        runner.submit(Batch.from_bytes(data))

    def read_pages(pages_of: int, pages: Sequence[int]) -> None:
        runner.read_pages(pages_of, pages)  # the first process gathers the parts

    def write_pages(pages_of: int, pages: Sequence[int], dtype: str, shape: Sequence[int], data: bytes = b"") -> None:
        k, v = np.frombuffer(data, dtype).reshape(2, *shape)
        runner.write_pages(pages_of, pages, {"k": k, "v": v})

    return {
        "load": lambda path: runner.load(open_checkpoint(path)),
        "allocate": runner.allocate,
        "warmup": runner.warmup,
        "submit": submit,
        "read_pages": read_pages,
        "write_pages": write_pages,
    }
