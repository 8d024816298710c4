"""The tables of a run's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from common.interface import KernelEvent
from experiments.display.formatting import number
from experiments.kernels.benchmark import FIGURES as TIMED
from experiments.load.profiler import own_seconds
from experiments.metrics.latency import HEADLINED
from experiments.report.figures_table import figure, latency_times, tells
from experiments.report.kernel_tables import cell as kernel_cell
from experiments.report.notes import contaminated, spoilt_cells
from experiments.report.page import Table, known

LONGEST, NAME_LENGTH = 10, 80
"""Of kernels in the report, and of a name there."""
LIMITS = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "e2el_ms": "end to end"}
AGREEMENT = (
    ("num_positions", "positions compared"),
    ("mean_kld", "KL mean, nats"),
    ("p99_kld", "KL p99"),
    ("max_kld", "KL most"),
    ("top1_agreement", "top-1 agreement"),
    ("mean_abs_logprob_diff", "log-probability difference, mean"),
    ("max_abs_logprob_diff", "log-probability difference, most"),
    ("over_rounding", "log-probability difference over rounding, median"),
)


def figures_table(
    engines: Mapping[str, Mapping[str, Any]],
    figures: Sequence[tuple[str, str]],
    comparisons: Mapping[str, Mapping[str, Any]] | None = None,
) -> Table:
    """One column for each engine, one row for each figure that any of them reports; the ratios below, if given.

    A percentile of fewer samples than it needs is put in brackets."""
    rows = [
        (
            goodput(engines) or name if key == "goodput" else name,
            *(figure(key, mine) for mine in engines.values()),
        )
        for key, name in figures
        if tells(key, engines.values())
    ]
    if comparisons:
        found = [comparisons.get(label) or {} for label in engines]
        rows.append(("× the first", *(f"{number(f.get('ratio'))}{interval(f)}" if f else "1" for f in found)))
        rows.append(("verdict", *(str(f.get("verdict") or "–") for f in found)))
    if contaminated(engines, engines):
        rows.append(("contaminated", *spoilt_cells(engines)))
    return Table(("", *engines), rows)


def latency_table(comparisons: Mapping[str, Mapping[str, Any]], engines: Sequence[str]) -> Table:
    """Return the ratios of the headlined latencies to those of the first engine, with their intervals."""
    return Table(("× the first", *engines), latency_times(HEADLINED, comparisons, engines))


def goodput(engines: Mapping[str, Mapping[str, Any]]) -> str:
    """Its name with the limits that were stated; empty without."""
    slo: Mapping[str, float] = next((mine["slo"] for mine in engines.values() if mine.get("slo")), {})
    limits = [f"{LIMITS.get(name, name)} ≤ {limit:g} ms" for name, limit in slo.items() if limit is not None]
    return f"goodput: requests/s with {', '.join(limits)}" if limits else ""


def interval(found: Mapping[str, Any]) -> str:
    if found.get("ratio") is None:
        return ""
    return " [no interval]" if found.get("low") is None else f" [{number(found['low'])}, {number(found.get('high'))}]"


def kernels_tables(shapes: Mapping[str, Any]) -> list[Table]:
    """Of `measure=kernels`: each operator by shape of step."""
    return [
        Table(
            (shape, *TIMED.values()),
            [(operator, *(kernel_cell(key, mine) for key in TIMED)) for operator, mine in operators.items()],
        )
        for shape, operators in shapes.items()
        if operators
    ]


def kernels_summary(shapes: Mapping[str, Any]) -> Table:
    """All of them in one: how close to its limit each operator is at each shape, and how much faster than the framework's."""
    operators = dict.fromkeys(operator for rows in shapes.values() for operator in rows)
    two = lambda value, digits: number(value) if value is None else f"{value:.{digits}f}"  # noqa: E731
    cell = lambda mine: f"{two(mine.get('fraction'), 2)} ({two(mine.get('ratio'), 1)}×)"  # noqa: E731
    rows = [(operator, *(cell(mine.get(operator) or {}) for mine in shapes.values())) for operator in operators]
    return Table(("share of the limit (framework's time / native)", *shapes), rows)


def profile_tables(kernels: pd.DataFrame, engines: Sequence[str]) -> list[Table]:
    """Of `measure.profile=true`: the kernels that took most."""
    tables = []
    for label, mine in kernels.groupby("engine"):
        events = (KernelEvent(*values) for values in mine[list(KernelEvent._fields)].itertuples(index=False))
        spent = own_seconds(events)
        whole = sum(seconds for _, seconds in spent.values()) or 1.0
        top = list(spent.items())[:LONGEST]
        rows = [(name[:NAME_LENGTH], str(count), small(1e3 * s), f"{s / whole:.1%}") for name, (count, s) in top]
        if label in engines:
            tables.append(Table((str(label), "times", "ms", "share"), rows))
    return tables


def agreement_tables(agreement: Mapping[str, Any], perplexity: Mapping[str, Any], engines: Sequence[str]) -> list[Table]:
    """How far each engine is from the first, over all positions, and its perplexity."""
    columns = [label for label in engines if label in agreement]
    rows = [
        (name, *(small(agreement[label].get(key)) for label in columns))
        for key, name in AGREEMENT
        if any(agreement[label].get(key) is not None for label in columns)
    ]
    if values := {label: value for label, value in perplexity.items() if value is not None}:
        columns = [*columns, *(label for label in values if label not in columns)]
        rows = [(*row, *["–"] * (len(columns) + 1 - len(row))) for row in rows]
        rows.append(("perplexity", *(number(values.get(label)) for label in columns)))
    return [Table(("", *columns), rows)] if rows else []


def environment_table(environment: Mapping[str, Any]) -> Table:
    rows = []
    for key, value in known(environment).items():
        if isinstance(value, Mapping):
            rows += [(f"{key}: {name}", str(inner)) for name, inner in value.items()]
        elif key not in ("argv", "command", "overrides"):
            rows.append((key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return Table(("", ""), rows)


def small(value: float | int | None) -> str:
    """A number that may be very small."""
    return number(value) if value is None or isinstance(value, int) or value == 0 or abs(value) >= 1e-2 else f"{value:.2e}"
