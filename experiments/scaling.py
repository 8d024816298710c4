"""How an engine's throughput follows the ranks that share out its work: the same work (strong scaling), or as much for each
rank (weak scaling).

On a CPU ranks share out the threads of an engine, so that more ranks are not more processors: efficiency is by thread there,
and by rank on devices of their own. Replicas, which share out requests, are ranks here too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common.platform import cores
from experiments.cells import figure
from experiments.config import EngineSpec
from experiments.page import Table
from experiments.words import number

SHARED_OUT = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "prefill_parallel_size",
    "prefill_backend",
    "routing",
    "threads",
)
"""Options of an engine by which its ranks may differ on one curve."""
COLUMNS = (
    "engine",
    "ranks",
    "threads",
    "requests",
    "output tokens/s",
    "× the first",
    "efficiency",
    "between ranks a step, ms",
    "of the time",
    "MiB a step",
    "a rank's weights and pages, MiB",
)


def scale(spec: EngineSpec) -> dict[str, Any]:
    """What a result has to tell of an engine, so that it finds its place on a curve."""
    config = spec.config
    rest = {name: value for name, value in asdict(config).items() if name not in SHARED_OUT} | {"options": spec.options}
    digest = hashlib.blake2b(repr(sorted(rest.items())).encode(), digest_size=4).hexdigest()
    sizes = {
        "tensor": config.tensor_parallel_size,
        "pipeline": config.pipeline_parallel_size,
        "data": config.data_parallel_size,
    }
    shared = {name: size for name, size in sizes.items() if size > 1}
    if config.prefill_parallel_size:
        shared["prefill"] = config.prefill_parallel_size
    return {
        "shared_by": " and ".join(shared),
        "shared_out": ", ".join(f"{name} {size}" for name, size in shared.items()) or None,
        "ranks": config.ranks * (config.data_parallel_size + config.prefill_parallel_size),
        "compute_threads": config.threads or cores(),
        "scales_as": f"{spec.name}-{digest}",
    }


@dataclass(frozen=True)
class Curve:
    """Results of one engine that differ in their ranks, the fewest first: each with the figures of an engine, its label as
    `engine`, and of its workload `num_prompts`."""

    kind: str
    """`strong` or `weak`."""
    shared_by: str
    """What its ranks share out: `tensor` for the model, `data` for the requests, …"""
    points: Sequence[Mapping[str, Any]]

    @property
    def name(self) -> str:
        return f"{self.points[0]['engine']}, {self.shared_by}, {self.kind}"

    @property
    def title(self) -> str:
        what = {"strong": "the same requests", "weak": "as many requests for each rank"}[self.kind]
        return f"{self.points[0]['engine']}, {self.shared_by} parallel: {what} ({self.kind} scaling)"

    def speed_up(self, point: Mapping[str, Any]) -> float:
        """Throughput over that of the first."""
        return float(point["output_throughput"] / self.points[0]["output_throughput"])

    def ideal(self, point: Mapping[str, Any]) -> float:
        """What of `speed_up` so much more to compute with would give at best."""
        return resources(point) / resources(self.points[0])


def resources(point: Mapping[str, Any]) -> float:
    """Threads on a CPU, elsewhere devices."""
    return float(point["compute_threads"] if point.get("device") == "cpu" else point["ranks"])


def curves(results: Iterable[Mapping[str, Any]]) -> list[Curve]:
    """Every curve of at least two numbers of ranks among results as `Curve` has them, which also tell `model`, `dtype`,
    `workload` and `workload_hash`."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for mine in results:
        if mine.get("output_throughput") and isinstance(mine.get("scales_as"), str):
            alike = tuple(mine.get(name) for name in ("scales_as", "model", "dtype", "workload"))
            each = mine["num_prompts"] / mine["ranks"]
            for key in (("strong", mine.get("workload_hash")), ("weak", each)):
                found.setdefault((*key, *alike), []).append(mine)
    drawn = [
        Curve(kind, by, sorted((point for point in points if point["shared_by"] in ("", by)), key=place))
        for (kind, *_), points in found.items()
        for by in dict.fromkeys(point["shared_by"] for point in points if point["shared_by"])
    ]
    return [curve for curve in drawn if len({point["ranks"] for point in curve.points}) > 1]


def points_of(results: Mapping[str, Any], engines: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of one run, as `curves` has them."""
    return [{**results, **mine, "engine": label} for label, mine in engines.items()]


def place(point: Mapping[str, Any]) -> tuple[int, int]:
    return point["ranks"], point["compute_threads"]


def scaling_tables(results: Iterable[Mapping[str, Any]]) -> list[Table]:
    """Of each curve."""
    return [scaling_table(curve) for curve in curves(results)]


def scaling_table(curve: Curve) -> Table:
    rows = []
    for point in curve.points:
        rows.append(
            (
                str(point["engine"]),
                *(str(int(point[name])) for name in ("ranks", "compute_threads", "num_prompts")),
                number(point["output_throughput"]),
                number(curve.speed_up(point)),
                f"{curve.speed_up(point) / curve.ideal(point):.0%}",
                figure("communication_ms_per_step", point),
                share_of_time(point),
                number(point.get("communication_mib_per_step")),
                number(rank_mib(point)),
            )
        )
    return Table(COLUMNS, rows, curve.title)


def share_of_time(point: Mapping[str, Any]) -> str:
    """Of a step's, what ranks tell each other in: where that comes of another window, of the steps there."""
    told, share = point.get("communication_ms_per_step"), point.get("communication_share")
    if share is None and told is not None and point.get("num_steps") and point.get("duration"):
        share = told * point["num_steps"] / (1e3 * point["duration"])
    return "–" if share is None else f"{share:.0%}"


def rank_mib(point: Mapping[str, Any]) -> float | None:
    """Weights and pages of a rank; of an engine that has but one those of the engine."""
    told, whole = point.get("rank_mib"), (point.get("weights_mib"), point.get("kv_pool_mib"))
    if told is None and point["ranks"] == 1 and None not in whole:
        return float(sum(whole))  # type: ignore[arg-type]
    return told
