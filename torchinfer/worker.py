"""Run one rank of an engine in a process beside the first process.

`common.process.workers` starts it by name. The first process sends every call that it makes. This process makes the same calls
in the same order, each on its part of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from common.batch import Batch
from common.config import EngineConfig
from common.kernels.cpu.sums import SharedFile
from common.process.workers import follow
from common.weights.checkpoint import open_checkpoint
from torchinfer.parallel import Endpoints, NetworkEndpoint, RankInfo, Ranks
from torchinfer.runner import ModelRunner


def main(config: dict[str, Any], place: Sequence[Any]) -> None:
    """Run one process until its input ends. `config`: the fields of `EngineConfig`; `place`: the stage, the rank, and the
    fields of `RankInfo`."""
    stage, rank, *info = place
    engine_config = EngineConfig(**config)
    group = Ranks(stage, rank, engine_config, RankInfo(*info))
    calls = _calls(ModelRunner(engine_config, group), group)
    follow(calls, failed=group._line.fail)


def _calls(runner: ModelRunner, group: Ranks) -> dict[str, Callable[..., object]]:
    """Return the calls that a rank makes, by name."""

    def join(ways: Sequence[Any]) -> None:
        *places, network, store = ways
        place, before, behind = (way and SharedFile(*way) for way in places)
        group._join(Endpoints(place, before, behind, network and NetworkEndpoint(*network), store))

    def submit(data: bytes) -> None:
        runner.submit(Batch.from_bytes(data))
        runner._catch_up()

    def read_pages(pages_of: int, pages: Sequence[int]) -> None:
        runner.read_pages(pages_of, pages)  # the first rank gathers the parts

    def write_pages(pages_of: int, pages: Sequence[int], dtype: str, shape: Sequence[int], data: bytes = b"") -> None:
        k, v = np.frombuffer(data, dtype).reshape(2, *shape)
        runner.write_pages(pages_of, pages, {"k": k, "v": v})

    return {
        "load": lambda path: runner.load(open_checkpoint(path)),
        "open_door": lambda host: group._line.open_door(host),
        "join": join,
        "part": group._part,
        "allocate": runner.allocate,
        "warmup": runner.warmup,
        "submit": submit,
        "read_pages": read_pages,
        "write_pages": write_pages,
    }
