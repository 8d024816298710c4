"""Measure the limits of this machine, and merge two measurements.

A process of its own measures them, by every way that `experiments.roofline.probes` knows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.config import Dtype
from common.errors import BackendError
from common.system.hardware import cores, thread_settings

READ = "read"
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
"""Dtypes whose matrix product is timed. float16 is judged by them too: see `Limits.best`."""
SAID = (
    (f"{READ}_bytes_per_s", "memory read", "GB/s"),
    *((f"{dtype}_flops_per_s", f"matmul {dtype}", "GFLOP/s") for dtype in DTYPES),
)
"""Of `Limits.summary`: key, name, unit in billions."""
SECONDS = 0.15
"""How long each way is repeated where nothing else is asked."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What this machine's processors can do at most: for each limit the ways that were tried, each at its best."""

    ways: Mapping[str, Mapping[str, float]]
    """`read` → way → bytes/s; `float32` and `bfloat16` → way → FLOP/s of a matrix product in that dtype."""
    threads: int
    cache_bytes: int
    """Last-level cache; 0 if the system does not report it."""
    buffer_bytes: int
    """What was read."""
    notes: tuple[str, ...] = ()
    """What could not be tried, and why."""

    def best(self, limit: str) -> tuple[str, float]:
        """Return the fastest way and its rate.

        Numbers of 16 bits may be widened without loss, so float32 counts for them too.
        """
        ways = dict(self.ways.get(limit, {}))
        if limit in ("bfloat16", "float16"):
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


def better(one: Limits, other: Limits) -> Limits:
    """The better of two measurements for each way: whatever slowed one of them down was no limit."""
    ways = {
        limit: {way: max(mine.get(way, 0.0), other.ways[limit].get(way, 0.0)) for way in (*mine, *other.ways[limit])}
        for limit, mine in one.ways.items()
    }
    return Limits(**{**vars(one), "ways": ways, "notes": tuple(dict.fromkeys(one.notes + other.notes))})


def measure_limits(seconds: float = SECONDS) -> Limits:
    """This machine's limits, found in a process of its own, which imports the frameworks. Raises `BackendError` if it fails."""
    command = [sys.executable, "-m", "experiments.roofline.probes", "--seconds", str(seconds)]
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
