"""Build the sections of the report of a run. A section without data has no content and is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from experiments.display.formatting import shortened
from experiments.metrics.statistics import Criteria
from experiments.report import kernel_tables, timeline
from experiments.report.charts.agreement import by_position, constant
from experiments.report.charts.latency import distribution, samples_ms
from experiments.report.charts.ratio import ratio
from experiments.report.charts.roofline import roofline
from experiments.report.charts.scaling import scaling
from experiments.report.charts.scatter import scatter
from experiments.report.figures_table import FIGURES
from experiments.report.findings import text_of
from experiments.report.limits import limits_said, told_limits
from experiments.report.notes import interval_notes
from experiments.report.page import Drawing, Section, known
from experiments.report.rows import block_points, window_of
from experiments.report.scaling import STRONG, WEAK, Curve, curves, points_of, remarks, scaling_table
from experiments.report.tables import (
    agreement_tables,
    environment_table,
    figures_table,
    kernels_tables,
    latency_table,
    profile_tables,
)
from experiments.runs.records import read_kernels
from experiments.runs.results import RunFiles

LATENCIES = (
    ("ttft", "Time to first token"),
    ("tpot", "Time per output token"),
    ("itl", "Inter-token latency"),
    ("e2el", "End to end"),
)
ROOFLINE = (
    "How far each engine is from what this machine was measured to be capable of. The roof is drawn at the most that was found "
    "in the run. An engine's roofline, the same here as in the other tables, is no distance to that roof: it holds each step "
    "against the memory read that was measured beside its window."
)
POSITIONS = (
    ("mean_abs_logprob_diff", "Log-probability difference", "mean |Δ log p|", 0.0, "the log-probabilities are equal"),
    ("kld", "KL divergence", "nats", 0.0, "the distributions are equal"),
    ("same_share", "Same token", "share of requests", 1.0, "the tokens are the same"),
)
"""Of the agreement by position: figure, title, unit, its value where engines are equal, and the text for that case."""


def sections(run: RunFiles, rows: pd.DataFrame, steps: pd.DataFrame, paced: bool) -> list[Section]:
    """All that have content, in their order. Where arrivals set the pace, latency comes before the ratio."""
    engines = list(run.engines)
    compared = [ratio_section(run, engines), latency_section(run, rows, engines)]
    every = [
        figures_section(run),
        kernels_section(run),
        *(compared[::-1] if paced else compared),
        blocks_section(rows, engines),
        Section(
            "Roofline",
            f"{ROOFLINE} {told_limits(run.engines)}".rstrip(),
            some(roofline(run.engines, str(run.results.get("dtype")))),
        ),
        scaling_section(curves(points_of(run.results, run.engines))),
        *window_sections(rows, steps, engines),
        Section(
            "Where the time goes",
            "The kernels that took most, each without those within it, in one more window that is counted nowhere else.",
            tables=profile_tables(read_kernels(run.directory), engines),
        ),
        agreement_section(run.results, engines),
        Section(
            "Environment",
            "What the numbers depend on, as far as the machine reports it.",
            tables=[environment_table(run.environment | {"kernel library": libraries(run)})],
            texts=known({"config.yaml": text_of(run.directory / "config.yaml")}),
        ),
    ]
    return [section for section in every if section.drawings or any(table.rows for table in section.tables)]


def figures_section(run: RunFiles) -> Section:
    few = any(mine.get("unsupported") for mine in run.engines.values())
    brackets = "In brackets: a percentile of fewer samples than it needs." if few else ""
    return Section("Figures", brackets, tables=[figures_table(run.engines, FIGURES)])


def kernels_section(run: RunFiles) -> Section:
    limits = run.results.get("limits") if run.kind == "kernels" else None
    intro = f"Each native kernel alone, by the shape of the step. {kernel_tables.NOTE}"
    tables = kernels_tables(run.results.get("shapes") or {})
    return Section("Kernels", f"{intro} {limits_said(limits)}" if limits else intro, tables=tables)


def ratio_section(run: RunFiles, engines: Sequence[str]) -> Section:
    equivalence = (run.config.get("measure") or {}).get("equivalence") or Criteria.equivalence
    return Section(
        "Ratio",
        "Engines take turns on the same requests; each block gives one ratio, and the interval is of the blocks.",
        some(ratio(run.results.get("comparisons") or {}, engines, equivalence)),
    )


def latency_section(run: RunFiles, rows: pd.DataFrame, engines: Sequence[str]) -> Section:
    samples = samples_ms(rows, engines)
    drawings = some(*(distribution(name, title, samples[name]) for name, title in LATENCIES))
    notes = "".join(f" {note[0].upper()}{note[1:]}." for note in interval_notes(run.engines))
    intro = f"Of requests that went well, over all blocks.{notes}"
    return Section("Latency", intro, drawings, [latency_table(run.results.get("comparisons") or {}, engines)])


def scaling_section(drawn: Sequence[Curve]) -> Section:
    intro = (
        "Engines that differ in their ranks alone, over the one with the fewest. Efficiency is by thread on a CPU, where ranks "
        "share out an engine's threads. What ranks say to each other a step waits for: nothing is computed meanwhile."
    )
    return Section(
        "Scaling",
        " ".join([intro, *(f"{said[0].upper()}{said[1:]}." for said in remarks(drawn))]),
        some(*(scaling(drawn, kind) for kind in (STRONG, WEAK))),
        [scaling_table(curve) for curve in drawn],
    )


def blocks_section(rows: pd.DataFrame, engines: Sequence[str]) -> Section:
    drawing = scatter(
        "throughput-latency",
        "Throughput and latency of each block",
        block_points(rows, engines),
        x="output tokens/s",
        y="median end to end, ms",
        each="block",
    )
    return Section("Throughput against latency", "Up and to the left is worse: the same work, later.", some(drawing))


def window_sections(rows: pd.DataFrame, steps: pd.DataFrame, engines: Sequence[str]) -> list[Section]:
    """The first window of each engine: its batch, then its pages."""
    until = max((times[-1] for times in window_of(rows, None)["times"] if len(times)), default=1.0)
    named = list(zip(engines, shortened(engines), strict=True))
    windows = [(i, name, window_of(rows, label), window_of(steps, label)) for i, (label, name) in enumerate(named)]
    batches: list[Drawing | None] = []
    for i, name, mine, its in windows:
        batches += [timeline.timeline(mine, i, name, until), timeline.batch(its, mine, i, name, until)]
    return [
        Section(
            "Continuous batch",
            "One window of each engine, on one scale of time: when each request was sent, got its first token, and ended.",
            some(*batches),
        ),
        Section(
            "Pages",
            "The KV cache in the same window.",
            some(*(timeline.occupancy(its, mine, i, name, until) for i, name, mine, its in windows)),
        ),
    ]


def agreement_section(results: Mapping[str, Any], engines: Sequence[str]) -> Section:
    agreement = results.get("agreement") or {}
    flat = [said for key, *_, same, said in POSITIONS if constant(agreement, key) == same]
    drawings = some(
        *(
            by_position(agreement, engines, key, name, unit)
            for key, name, unit, same, _ in POSITIONS
            if constant(agreement, key) != same
        )
    )
    intro = f"How far each engine is from {engines[0]} at each position of the output." if engines else ""
    if flat:
        intro += f" At every position {', '.join(flat)}."
    return Section("Agreement", intro, drawings, agreement_tables(agreement, results.get("perplexity") or {}, engines))


def libraries(run: RunFiles) -> dict[str, str]:
    """The native kernels that each engine loaded, by label."""
    return {label: mine["kernel_library"] for label, mine in run.engines.items() if mine.get("kernel_library")}


def some(*drawings: Drawing | None) -> list[Drawing]:
    return [drawing for drawing in drawings if drawing is not None]
