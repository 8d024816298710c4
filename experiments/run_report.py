"""The report of one run: verdict first, then what it rests on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.interface import KernelEvent
from experiments import figures as draw
from experiments import timeline
from experiments.console import FIGURES, number
from experiments.findings import correctness, notices, open_loop, plural, speed, text_of
from experiments.glossary import GLOSSARY
from experiments.page import Drawing, Page, Section, Table, known
from experiments.profiled import own_seconds
from experiments.records import read_kernels, read_rows, read_steps
from experiments.results import RunFiles

SUMMARY = (
    "output_throughput",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "p99_itl_ms",
    "mean_e2el_ms",
    "roofline",
    "mbu",
    "peak_rss_mb",
)
"""Of `console.FIGURES`: what a pull request has room for."""
GIVEN = ("tokens", "output_len", "times")
NEEDED = ("engine", "block", "request_id", "prompt_len", "scheduled", "sent", "finish", "error", *GIVEN)
"""Columns of the rows."""
LONGEST, NAME_LENGTH = 10, 80
"""Of kernels in the report, and of a name there."""
LIMITS = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "e2el_ms": "end to end"}
LATENCIES = (
    ("ttft", "Time to first token"),
    ("tpot", "Time per output token"),
    ("itl", "Inter-token latency"),
    ("e2el", "End to end"),
)

POSITIONS = (
    ("mean_abs_logprob_diff", "Log-probability difference", "mean |Δ log p|", 0.0, "the log-probabilities are equal"),
    ("kld", "KL divergence", "nats", 0.0, "the distributions are equal"),
    ("same_share", "Same token", "share of requests", 1.0, "the tokens are the same"),
)
"""Of the agreement by position: figure, title, unit, its value where engines are equal, and what to say then."""


def run_page(run: RunFiles) -> tuple[Page, pd.DataFrame, pd.DataFrame]:
    """The page, and the rows and steps that it was made from."""
    rows, steps = rows_of(run.directory), steps_of(run.directory)
    engines = list(run.engines)
    until = max((times[-1] for times in window_of(rows, None)["times"] if len(times)), default=1.0)
    few = any(mine.get("unsupported") for mine in run.engines.values())
    brackets = "In brackets: a percentile of fewer samples than it needs." if few else ""
    compared = [
        Section(
            "Ratio",
            "Engines take turns on the same requests; each block gives one ratio, and the interval is of the blocks.",
            some(draw.ratio(run.results.get("comparisons") or {}, engines)),
        ),
        Section(
            "Latency",
            "Of requests that went well, over all blocks.",
            some(*(draw.distribution(name, title, draw.samples_ms(rows, engines, name)) for name, title in LATENCIES)),
        ),
    ]
    paced = open_loop(run.config.get("workload") or {}, rows["scheduled"])
    sections = [
        Section("Figures", brackets, tables=[figures_table(run.engines, FIGURES)]),
        kernels_section(run),
        *(compared[::-1] if paced else compared),
        Section(
            "Throughput against latency",
            "Up and to the left is worse: the same work, later.",
            some(
                draw.scatter(
                    "throughput-latency",
                    "Throughput and latency of each block",
                    block_points(rows, engines),
                    x="output tokens/s",
                    y="median end to end, ms",
                    each="block",
                )
            ),
        ),
        Section(
            "Roofline",
            "How far each engine is from what this machine was measured to be capable of.",
            some(draw.roofline(run.engines, str(run.results.get("dtype")))),
        ),
        Section(
            "Continuous batch",
            "One window of each engine, on one scale of time: when each request was sent, got its first token, and ended.",
            some(
                *(
                    drawing
                    for i, label in enumerate(engines)
                    for drawing in (
                        timeline.timeline(window_of(rows, label), i, label, until),
                        timeline.batch(window_of(steps, label), window_of(rows, label), i, label, until),
                    )
                )
            ),
        ),
        Section(
            "Pages",
            "The KV cache in the same window.",
            some(
                *(
                    timeline.occupancy(window_of(steps, label), window_of(rows, label), i, label, until)
                    for i, label in enumerate(engines)
                )
            ),
        ),
        profile_section(read_kernels(run.directory), engines),
        agreement_section(run.results, engines),
        Section(
            "Environment",
            "What the numbers depend on, as far as the machine told.",
            tables=[environment_table(run.environment)],
            texts=known({"config.yaml": text_of(run.directory / "config.yaml")}),
        ),
    ]
    page = Page(
        kind="comparison" if len(engines) > 1 else "run",
        title=title(run.results, engines),
        facts=facts(run),
        verdicts=[*speed(run, paced), *correctness(run)],
        notices=list(notices(run)),
        summary=figures_table(run.engines, [row for row in FIGURES if row[0] in SUMMARY], run.results.get("comparisons")),
        sections=[section for section in sections if section.drawings or any(table.rows for table in section.tables)],
        glossary=GLOSSARY,
        command=command(run.environment),
        engines=engines,
        traced=True,
    )
    return page, rows, steps


def rows_of(directory: Path) -> pd.DataFrame:
    """The requests, with `ok` beside them; no rows where the run wrote none."""
    rows = read_rows(directory) if has(directory / "requests.jsonl") else pd.DataFrame(columns=NEEDED)
    whole = [
        len(tokens) == wanted and len(times) > 0 for tokens, wanted, times in zip(*(rows[name] for name in GIVEN), strict=True)
    ]
    return rows.assign(ok=rows["error"].isna().to_numpy(bool) & np.array(whole, bool))


def steps_of(directory: Path) -> pd.DataFrame:
    return read_steps(directory) if has(directory / "steps.jsonl") else pd.DataFrame(columns=["engine", "block"])


def has(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def window_of(frame: pd.DataFrame, label: str | None) -> pd.DataFrame:
    """The first window of an engine, or of each."""
    frame = frame if label is None else frame[frame["engine"] == label]
    return frame[frame["block"] == 0]


def some(*drawings: Drawing | None) -> list[Drawing]:
    return [drawing for drawing in drawings if drawing is not None]


def block_points(rows: pd.DataFrame, engines: Sequence[str]) -> dict[str, tuple[list[float], list[float]]]:
    """Engine → output throughput and median end-to-end latency of each block."""
    points: dict[str, tuple[list[float], list[float]]] = {label: ([], []) for label in engines}
    for (label, _), block in rows[rows["ok"].astype(bool)].groupby(["engine", "block"], sort=True):
        ends = np.array([times[-1] for times in block["times"]])
        if label in points and ends.max() > 0:
            points[label][0].append(sum(map(len, block["tokens"])) / ends.max())
            points[label][1].append(float(np.median(ends - block["sent"].to_numpy(float))) * 1e3)
    return points


def figures_table(
    engines: Mapping[str, Mapping[str, Any]],
    figures: Sequence[tuple[str, str]],
    comparisons: Mapping[str, Mapping[str, Any]] | None = None,
) -> Table:
    """One column for each engine, one row for each figure that any of them told; below them the ratios, if given.

    A percentile of fewer samples than it needs is put in brackets."""
    rows = [
        (
            goodput(engines) or name if key == "goodput" else name,
            *(told(mine, key) for mine in engines.values()),
        )
        for key, name in figures
        if any(mine.get(key) is not None for mine in engines.values())
    ]
    if comparisons:
        found = [comparisons.get(label) or {} for label in engines]
        rows.append(("× the first", *(f"{number(f.get('ratio'))}{interval(f)}" if f else "1" for f in found)))
        rows.append(("verdict", *(str(f.get("verdict") or "–") for f in found)))
    return Table(("", *engines), rows)


def goodput(engines: Mapping[str, Mapping[str, Any]]) -> str:
    """Its name with the limits that were stated; empty without."""
    slo: Mapping[str, float] = next((mine["slo"] for mine in engines.values() if mine.get("slo")), {})
    limits = [f"{LIMITS.get(name, name)} ≤ {limit:g} ms" for name, limit in slo.items()]
    return f"goodput: requests/s with {', '.join(limits)}" if limits else ""


def told(mine: Mapping[str, Any], key: str) -> str:
    figure = mine.get(key)
    if not isinstance(figure, (int, float)):
        return "–"
    return f"({number(figure)})" if key in (mine.get("unsupported") or ()) else number(figure)


def kernels_section(run: RunFiles) -> Section:
    """Of `measure=kernels`: each operator by shape of step."""
    tables = [
        Table(
            (shape, *(name.replace("_", " ") for name in next(iter(operators.values())))),
            [(operator, *(small(figure) for figure in figures.values())) for operator, figures in operators.items()],
        )
        for shape, operators in (run.results.get("shapes") or {}).items()
        if operators
    ]
    return Section("Kernels", "Each native kernel alone, by the shape of the step.", tables=tables)


def profile_section(kernels: pd.DataFrame, engines: Sequence[str]) -> Section:
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
    about = "The kernels that took most, each without those within it, in one more window that is counted nowhere else."
    return Section("Where the time goes", about, tables=tables)


def interval(found: Mapping[str, Any]) -> str:
    return "" if found.get("low") is None else f" [{number(found['low'])}, {number(found.get('high'))}]"


def title(results: Mapping[str, Any], engines: Sequence[str]) -> str:
    return " against ".join(engines) if len(engines) > 1 else str(next(iter(engines), results.get("engine", "A run")))


def facts(run: RunFiles) -> list[str]:
    results = run.results
    blocks = max((len(mine.get("block_output_throughput") or ()) for mine in run.engines.values()), default=0)
    told = {
        "{}": results.get("model"),
        "{} ": results.get("dtype"),
        "{} kernels": results.get("kernels"),
        "workload {}": results.get("workload"),
        "{} requests": results.get("num_prompts"),
        "{}   ": plural(blocks, "block") if blocks else None,
        "seed {}": results.get("seed"),
        "{}  ": run.environment.get("date"),
        "on {}": run.environment.get("cpu"),
    }
    return [form.format(value).strip() for form, value in known(told).items()]


def agreement_section(results: Mapping[str, Any], engines: Sequence[str]) -> Section:
    agreement = results.get("agreement") or {}
    names = (
        ("num_positions", "positions compared"),
        ("mean_kld", "KL mean, nats"),
        ("p99_kld", "KL p99"),
        ("max_kld", "KL most"),
        ("top1_agreement", "top-1 agreement"),
        ("mean_abs_logprob_diff", "log-probability difference, mean"),
        ("max_abs_logprob_diff", "log-probability difference, most"),
    )
    columns = [label for label in engines if label in agreement]
    rows = [
        (name, *(small(agreement[label].get(key)) for label in columns))
        for key, name in names
        if any(agreement[label].get(key) is not None for label in columns)
    ]
    if perplexity := {label: value for label, value in (results.get("perplexity") or {}).items() if value is not None}:
        columns = [*columns, *(label for label in perplexity if label not in columns)]
        rows = [(*row, *["–"] * (len(columns) + 1 - len(row))) for row in rows]
        rows.append(("perplexity", *(number(perplexity.get(label)) for label in columns)))
    flat = [said for key, *_, same, said in POSITIONS if draw.constant(agreement, key) == same]
    drawings = some(
        *(
            draw.by_position(agreement, engines, key, name, unit)
            for key, name, unit, same, _ in POSITIONS
            if draw.constant(agreement, key) != same
        )
    )
    tables = [Table(("", *columns), rows)] if rows else []
    intro = f"How far each engine is from {engines[0]} at each position of the output." if engines else ""
    if flat:
        intro += f" At every position {', '.join(flat)}."
    return Section("Agreement", intro, drawings, tables)


def small(value: float | int | None) -> str:
    """A number that may be very small."""
    return number(value) if value is None or isinstance(value, int) or value == 0 or abs(value) >= 1e-2 else f"{value:.2e}"


def environment_table(environment: Mapping[str, Any]) -> Table:
    rows = []
    for key, value in known(environment).items():
        if isinstance(value, Mapping):
            rows += [(f"{key}: {name}", str(inner)) for name, inner in value.items()]
        elif key not in ("argv", "command", "overrides"):
            rows.append((key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return Table(("", ""), rows)


def command(environment: Mapping[str, Any]) -> str:
    """What was typed, with `python` for the path of the interpreter."""
    if environment.get("command"):
        return str(environment["command"])
    argv = [str(piece) for piece in environment.get("argv") or ()]
    if len(argv) > 1 and not argv[1].startswith("-"):
        return shlex.join([Path(argv[1]).name, *argv[2:]])
    return shlex.join(["python", *argv[1:]]) if argv else ""
