"""Build the report of one run: the verdict first, then the evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from experiments.display.formatting import plural
from experiments.report.figures_table import FIGURES, kernels_of
from experiments.report.findings import correctness, divergences, kernels_alone, notices, open_loop, speed
from experiments.report.glossary import GLOSSARY
from experiments.report.page import Page, Table, known
from experiments.report.rows import rows_of, steps_of
from experiments.report.scaling import curves, points_of, scaling_table
from experiments.report.sections import sections
from experiments.report.tables import figures_table, kernels_summary
from experiments.runs.results import RunFiles

SUMMARY = (
    "output_throughput",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "p99_itl_ms",
    "mean_e2el_ms",
    "roofline",
    "mbu",
    "shared_out",
    "prompts_handed_over",
    "prompts_recomputed",
    "peak_rss_mib",
)
"""Of `cells.FIGURES`: what a pull request has room for."""


def run_page(run: RunFiles) -> tuple[Page, pd.DataFrame, pd.DataFrame]:
    """The page, and the rows and steps that it was made from."""
    rows, steps = rows_of(run), steps_of(run)
    engines = list(run.engines)
    paced = open_loop(run.config.get("workload") or {}, rows["scheduled"])
    page = Page(
        kind="comparison" if len(engines) > 1 else "kernels" if run.kind == "kernels" else "run",
        title=f"Partial, of {whole_parts(run)}: " * run.partial + title(run.results, engines),
        facts=facts(run),
        verdicts=[*speed(run, paced), *kernels_alone(run), *correctness(run), *divergences(run)],
        notices=list(notices(run)),
        summary=[summary(run), *map(scaling_table, curves(points_of(run.results, run.engines)))],
        sections=sections(run, rows, steps, paced),
        glossary=GLOSSARY,
        command=str(run.environment.get("command") or ""),
        engines=engines,
        traced=len(rows) > 0,
    )
    return page, rows, steps


def summary(run: RunFiles) -> Table:
    if run.kind == "kernels":
        return kernels_summary(run.results["shapes"])
    return figures_table(run.engines, [row for row in FIGURES if row[0] in SUMMARY], run.results.get("comparisons"))


def title(results: Mapping[str, Any], engines: Sequence[str]) -> str:
    return " against ".join(engines) if len(engines) > 1 else str(next(iter(engines), results.get("engine", "A run")))


def whole_parts(run: RunFiles) -> str:
    return plural(len(run.results["shapes"]), "shape") if run.kind == "kernels" else plural(run.blocks, "block")


def facts(run: RunFiles) -> list[str]:
    results = run.results
    blocks = plural(run.counted, "block") + f" and {len(run.dropped)} dropped" * bool(run.dropped)
    values = {
        "{}": results.get("model"),
        "from {}": results.get("checkpoint"),
        "{} ": results.get("dtype"),
        "{} kernels": kernels(run),
        "kernels by engine: {}": kernels_by_engine(run),
        "workload {}": results.get("workload"),
        "{} requests": results.get("num_prompts"),
        "{}   ": blocks if run.counted else None,
        "median of {} passes": results.get("passes"),
        "seed {}": results.get("seed"),
        "{}  ": run.environment.get("date"),
        "on {}": run.environment.get("cpu"),
    }
    return [form.format(value).strip() for form, value in known(values).items()]


def kernels(run: RunFiles) -> str | None:
    """Return the kernels that ran, if the same in all engines that report them; the option, if no engine does."""
    if run.kind == "kernels":
        return kernels_of(run.results | {"kernels_used": "native"})
    ran = [kernels_of(mine) for mine in with_kernels(run).values()]
    if not ran:
        return run.results.get("kernels")
    return ran[0] if len(set(ran)) == 1 else None


def kernels_by_engine(run: RunFiles) -> str:
    """Return the kernels of each engine, if they differ."""
    ran = {label: kernels_of(mine) for label, mine in with_kernels(run).items()}
    return ", ".join(f"{label} {kind}" for label, kind in ran.items()) if len(set(ran.values())) > 1 else ""


def with_kernels(run: RunFiles) -> dict[str, dict[str, Any]]:
    """Return the engines that report their kernels."""
    return {label: mine for label, mine in run.engines.items() if mine.get("kernels_used")}
