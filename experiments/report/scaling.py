"""Compute how an engine's throughput grows with its ranks: the same work (strong scaling), or as much for each (weak scaling).

On a CPU the ranks share the threads of an engine, so more ranks are not more processors. There efficiency is by thread, and on
devices by rank. Replicas, which share the requests, count as ranks here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.display.formatting import number
from experiments.report.figures_table import figure
from experiments.report.notes import SPOILT, spoilt_cells
from experiments.report.page import Table

NAMES = 3
"""Columns of a table, the first, that tell its rows apart."""
LAST_RATIO = "efficiency"
"""The last of the columns that a table is for: those behind it only explain them."""
STRONG, WEAK = "strong", "weak"
LARGER = (
    "with as many requests for each rank (weak scaling) batches grow with the ranks, and a larger batch gives more tokens/s by "
    "itself: efficiency may pass 100 %"
)


@dataclass(frozen=True)
class Curve:
    """Results of one engine that differ in their ranks, the fewest first: each with the figures of an engine, its label as
    `engine`, and of its workload `num_prompts`."""

    kind: str
    """`STRONG` or `WEAK`."""
    shared_by: str
    """What its ranks share out: `tensor` for the model, `data` for the requests, …"""
    points: Sequence[Mapping[str, Any]]
    setting: str = ""
    """The options of a sweep that tell it from another curve of the same engine, sharing and requests."""

    @property
    def engine(self) -> str:
        return str(self.points[0]["engine"])

    @property
    def requests(self) -> float:
        """Of each point all (strong), or for each of its ranks (weak)."""
        first = self.points[0]
        return float(first["num_prompts"] / (first["ranks"] if self.kind == WEAK else 1))

    @property
    def title(self) -> str:
        requests = f"{self.requests:g} request{'s' * (self.requests != 1)}"
        what = {STRONG: f"the same {requests}", WEAK: f"{requests} for each rank"}[self.kind]
        setting = f", {self.setting}" if self.setting else ""
        return f"{self.engine}, {self.shared_by} parallel{setting}: {what} ({self.kind} scaling)"

    def speed_up(self, point: Mapping[str, Any]) -> float:
        """Throughput over that of the first."""
        return float(point["output_throughput"] / self.points[0]["output_throughput"])

    def ideal(self, point: Mapping[str, Any]) -> float:
        """`speed_up` in proportion to what there is to compute with."""
        return resources(point) / resources(self.points[0])


def resource(point: Mapping[str, Any]) -> str:
    """What there is to compute with."""
    return "threads" if point.get("device") == "cpu" else "devices"


def resources(point: Mapping[str, Any]) -> float:
    """How many of them."""
    return float(point["compute_threads" if resource(point) == "threads" else "ranks"])


def curves(results: Iterable[Mapping[str, Any]], swept: Sequence[str] = ()) -> list[Curve]:
    """Every curve of at least two numbers of ranks among results as `Curve` has them, which also tell `model`, `dtype`, `seed`,
    `workload`, `workload_hash` and, by name, the options of a sweep, of which `swept` are those that its jobs do not share."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for mine in results:
        if mine.get("output_throughput") and isinstance(mine.get("scales_as"), str):
            alike = tuple(mine.get(name) for name in ("scales_as", "model", "dtype", "seed", "workload"))
            each = (mine["num_prompts"] / mine["ranks"], *(mine.get(name) for name in swept if shapes_requests(name)))
            for key in ((STRONG, mine.get("workload_hash")), (WEAK, *each)):
                found.setdefault((*key, *alike), []).append(mine)
    drawn = [
        Curve(kind, by, sorted((point for point in points if point["shared_by"] in ("", by)), key=place))
        for (kind, *_), points in found.items()
        for by in dict.fromkeys(point["shared_by"] for point in points if point["shared_by"])
    ]
    drawn = [curve for curve in drawn if len({point["ranks"] for point in curve.points}) > 1]
    return told_apart(sorted(drawn, key=lambda curve: (STRONG, WEAK).index(curve.kind)), swept)


def shapes_requests(option: str) -> bool:
    """Whether an option of a sweep makes other requests, not more of them."""
    return option.startswith("workload.") and option != "workload.num_requests"


def told_apart(drawn: Sequence[Curve], swept: Sequence[str]) -> list[Curve]:
    """The curves, those that would have the same title with the options that they differ by."""
    alike: dict[str, list[Curve]] = {}
    for curve in drawn:
        alike.setdefault(curve.title, []).append(curve)
    return [replace(curve, setting=setting(curve, alike[curve.title], swept)) for curve in drawn]


def setting(curve: Curve, twins: Sequence[Curve], swept: Sequence[str]) -> str:
    """The options that all points of a curve share, and not all its twins with them."""
    told = []
    for name in swept:
        mine = {point.get(name) for point in curve.points}
        if len(mine) == 1 and any(point.get(name) not in mine for twin in twins for point in twin.points):
            told.append(f"{name.rpartition('.')[2]}={written(*mine)}")
    return ", ".join(told)


def written(value: Any) -> str:
    """An option's value as an override has it; a table makes whole numbers floats where some rows have none."""
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def points_of(results: Mapping[str, Any], engines: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of one run, as `curves` has them."""
    return [{**results, **mine, "engine": label} for label, mine in engines.items()]


def place(point: Mapping[str, Any]) -> tuple[int, int]:
    return point["ranks"], point["compute_threads"]


def remarks(drawn: Iterable[Curve]) -> list[str]:
    """What must be said beside curves, in words."""
    drawn = list(drawn)
    spoilt = any(point.get("contaminated") for curve in drawn for point in curve.points)
    return [SPOILT] * spoilt + [LARGER] * any(curve.kind == WEAK for curve in drawn)


def scaling_table(curve: Curve) -> Table:
    """A row for each point; of the columns those that tell something of any."""
    points = curve.points
    whole = lambda name: [str(int(point[name])) for point in points]  # noqa: E731
    columns = {
        "engine": [str(point["engine"]) for point in points],
        "ranks": whole("ranks"),
        "threads": whole("compute_threads"),
    }
    if any(point.get("contaminated") for point in points):  # before the ratios: no terminal has room for these without it
        columns["contaminated"] = spoilt_cells({str(i): point for i, point in enumerate(points)})
    columns |= {
        "output tokens/s": [number(point["output_throughput"]) for point in points],
        "× the first": [number(curve.speed_up(point)) for point in points],
        LAST_RATIO: [f"{curve.speed_up(point) / curve.ideal(point):.0%}" for point in points],
        "requests": whole("num_prompts"),
        "between ranks a step, ms": [figure("communication_ms_per_step", point) for point in points],
        "of the time": [share_of_time(point) for point in points],
        "MiB a step": [number(point.get("communication_mib_per_step")) for point in points],
        "a rank's weights and pages, MiB": [number(point.get("rank_mib")) for point in points],
    }
    columns = {name: cells for name, cells in columns.items() if set(cells) != {number(None)}}
    return Table(tuple(columns), list(zip(*columns.values(), strict=True)), curve.title)


def share_of_time(point: Mapping[str, Any]) -> str:
    """Of a step's, what ranks tell each other in: where that comes of another window, of the steps there."""
    told, share = point.get("communication_ms_per_step"), point.get("communication_share")
    if share is None and told is not None and point.get("num_steps") and point.get("duration"):
        share = told * point["num_steps"] / (1e3 * point["duration"])
    return "–" if share is None else f"{share:.0%}"
