"""Print results to standard output: tables, and one line of JSON for programs."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.display.formatting import number, plural
from experiments.metrics.latency import HEADLINED
from experiments.report.figures_table import GROUPS, figure, latency_times, tells, times
from experiments.report.notes import (
    between_ranks,
    contaminated,
    dropped,
    explanations,
    fallback,
    left_out,
    other_weights,
    spoilt_cells,
)
from experiments.report.scaling import LAST_RATIO, NAMES, Curve, remarks, scaling_table
from experiments.report.verdict import covered, located, not_judged, outcome, timed_share, uncompared

COLOURS = {"faster": "bold cyan", "slower": "bold magenta", "equivalent": "bold green", "undecided": "bold yellow"}
NARROW = 10
"""Columns of a line of a table that has several, but for longer words."""
BORDER = 3
NAME = 10
"""Least width of a column of names, in characters, where figures need the space."""


SHORT = (
    "output_throughput",
    "median_ttft_ms",
    "median_tpot_ms",
    "p99_itl_ms",
    "roofline",
    "kernels_used",
    "peak_rss_mib",
)
"""Figures of the short table. The ratio, the contamination and the agreement have rows of their own."""


def print_conclusion(result: Mapping[str, Any]) -> None:
    """Print failed engines, the end of the timed part, the verdict on the outputs and, last, the verdict on the speeds."""
    console = wide_console()
    print_failures(result["failures"])
    console.print(f"[dim]Stopped: {'. '.join(filter(None, (result['stopped'], result['advice'])))}.[/]", highlight=False)
    print_verdict(result)
    for label, comparison in result["comparisons"].items():
        doubt = "[bold red]contaminated:[/] " if contaminated(result["engines"], (comparison["against"], label)) else ""
        console.print(f"{doubt}[{COLOURS[comparison['verdict']]}]{escape(comparison['said'])}[/].", highlight=False)


def print_dropped(blocks: Sequence[Mapping[str, Any]], every: bool) -> None:
    """Print the dropped blocks with their reasons; unless `every`, only their number."""
    said = [f"{each[0].upper()}{each[1:]}." for each in dropped(blocks)]
    if said and not every:
        said = [f"{plural(len(blocks), 'block')} dropped, because of other programs (table=all gives the reasons)."]
    for each in said:
        wide_console().print(each, style="dim", highlight=False, markup=False)


def print_table(
    title: str,
    engines: Mapping[str, Mapping[str, Any]],
    comparisons: Mapping[str, Mapping[str, Any]] | None = None,
    agreement: Mapping[str, Mapping[str, Any]] | None = None,
    every: bool = True,
) -> None:
    """Print a table with a column for each engine and a row for each figure that any of them has.

    Unless `every`, the table has at most ten rows: the figures of `SHORT`, the ratio, the contamination and the agreement.
    """
    if not engines:
        return
    groups = [[row for row in group if tells(row[0], engines.values())] for group in GROUPS]
    shown = [[(key, name) for key, name in group if every or key in SHORT] for group in groups]
    table = Table()
    table.add_column("", overflow="fold")
    for label in engines:
        table.add_column(escape(label), justify="right", overflow="fold")
    for group in shown:
        table.add_section()
        for key, name in group:
            table.add_row(name, *(figure(key, figures) for figures in engines.values()))
            if key == "output_throughput" and comparisons:
                cells = [times(comparisons.get(label)) for label in engines]
                table.add_row(ratio_row(next(iter(comparisons.values()))), *cells, style="bold")
            if key == "output_throughput" and contaminated(engines, engines):
                table.add_row("contaminated: see below", *spoilt_cells(engines), style="bold red")
    if every and comparisons:
        table.add_section()
        against = next(iter(comparisons.values()))["against"]
        for name, *cells in latency_times(HEADLINED, comparisons, engines):
            table.add_row(f"{name} × {escape(against)}", *cells)
    if agreement:
        table.add_section()
        apart = ((agreement.get(label) or {}).get("max_abs_logprob_diff") for label in engines)
        table.add_row("log-probability difference, most", *("–" if worst is None else f"{worst:.1e}" for worst in apart))
    console = wide_console()
    console.print(title, style="bold", highlight=False, markup=False)
    console.print(table)
    if left := sum(map(len, groups)) - sum(map(len, shown)):
        console.print(f"{left} more rows: table=all, results.json, or the report", style="dim", highlight=False, markup=False)
    if notes := list(explanations(engines, comparisons or {})):
        console.print("; ".join(notes), style="dim", highlight=False, markup=False)
    for label, figures in engines.items():
        remarks = [
            *(figures.get("unsure") or ()),
            *other_weights(figures),
            *fallback(figures),
            *left_out(figures),
            *between_ranks(figures),
        ]
        print_doubts(console, label, figures["contaminated"], remarks)


def ratio_row(comparison: Mapping[str, Any]) -> str:
    """Return the name of the row of ratios, with the number of blocks that they rest on."""
    blocks = f" ({plural(comparison['blocks'], 'block')})" if comparison.get("blocks") else ""
    return f"× {escape(comparison['against'])}{blocks}"


def print_scaling(drawn: Sequence[Curve]) -> None:
    """Print a table for each curve, and the remarks on all curves below."""
    for table in map(scaling_table, drawn):
        print_rows(table.caption, table.columns, table.rows, NAMES, ahead=table.columns.index(LAST_RATIO) + 1 - NAMES)
    if said := remarks(drawn):
        wide_console().print("; ".join(said), style="dim", highlight=False, markup=False)


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], names: int, ahead: int = 0) -> None:
    """Print a table of text with as many columns as fit.

    The first `names` columns identify a row: they wrap and are never cut. The other columns are narrow and have headings of
    several lines. The first `ahead` of these take space from the names."""
    console, table, used, least, shown = wide_console(), Table(), 1, 1, []
    for i, (name, *cells) in enumerate(zip(columns, *rows, strict=True)):
        heading, texts = narrow(name), cells if i < names else list(map(narrow, cells))
        width = max(len(line) for text in (heading, *texts) for line in text.splitlines())
        used += width + BORDER
        least += (min(width, NAME) if i < names else width) + BORDER
        if i < names:
            table.add_column(escape(heading), overflow="fold")
        elif used <= console.width or (i < names + ahead and least <= console.width):
            table.add_column(escape(heading), justify="right", no_wrap=True)
        else:
            break
        shown.append(texts)
    for row in zip(*shown, strict=True):
        table.add_row(*map(escape, row))
    console.print(title, style="bold", highlight=False, markup=False)
    console.print(table)


def narrow(text: str) -> str:
    return textwrap.fill(text, NARROW, break_long_words=False, break_on_hyphens=False)


def print_doubts(console: Console, whose: str, reasons: Iterable[str], unsure: Iterable[str]) -> None:
    """Print the reasons for which figures are contaminated, or may be."""
    for reason in reasons:
        console.print(f"[bold red]contaminated[/] {escape(whose)}: {escape(reason)}.", highlight=False)
    for reason in unsure:
        console.print(f"{escape(whose)}: {escape(reason)}.", style="dim", highlight=False)


def print_failures(failures: Mapping[str, Mapping[str, str]]) -> None:
    """Print the engines that failed, with the reason."""
    for label, failure in failures.items():
        console = wide_console()
        console.print(f"[bold red]failed[/] {escape(label)} ({failure['kind']}): {escape(failure['message'])}", highlight=False)


def wide_console(least: int = 120) -> Console:
    """Return standard output, wide enough that a table in a log loses no columns."""
    console = Console()
    return console if console.is_terminal else Console(width=max(least, console.width))


def print_result(result: Mapping[str, Any], kept: object) -> None:
    """Print the last line: the result as JSON, or at a terminal the file `kept` that has it.

    The figures of each position are in the file alone."""
    if sys.stdout is not None and sys.stdout.isatty():
        print(f"Results: {kept}")
        return
    if result.get("agreement"):
        brief = {label: {k: v for k, v in found.items() if k != "by_position"} for label, found in result["agreement"].items()}
        result = {**result, "agreement": brief}
    print_json(result)


def print_json(result: Mapping[str, Any]) -> None:
    print(json.dumps(result, separators=(",", ":")), flush=True)


def print_verdict(result: Mapping[str, Any]) -> None:
    """Print whether the engines of a comparison compute the same outputs."""
    tone, said = outcome(result)
    colour = {"good": "green", "warn": "yellow", "bad": "red"}.get(tone)
    lines = [f"outputs: [bold {colour}]{said}[/]" if colour else f"outputs: {said}"]
    worst = result["max_abs_logprob_diff"]
    if result["unjustified_divergences"] is not None:
        apart = "not all finite" if worst is None else f"within {worst:.1e}"
        lines[0] += f"; {result['compared_tokens']} tokens alike, log-probabilities {apart}."
        if share := covered(result):
            lines.append(f"  {share}.")
    else:
        lines[0] += "."
    for label, found in (result.get("agreement") or {}).items():
        if found["mean_kld"] is not None:
            lines.append(
                f"  {label}: KL divergence {found['mean_kld']:.1e} in the mean and {found['max_kld']:.1e} at most, from "
                f"{found['kld_from']} at {found['num_positions']} positions; top-1 agreement {found['top1_agreement']:.2%}."
            )
    if perplexity := result.get("perplexity"):
        lines.append("  perplexity: " + ", ".join(f"{label} {value:.5g}" for label, value in perplexity.items()) + ".")
    if divergence := result["first_divergence"]:
        lines.append(
            "  {engine}, request {request}, output token {position}: chose {tokens[1]} for {tokens[0]}, ".format(**divergence)
            + f"margin {number(divergence['margin'])}, error {number(divergence['error'])}."
        )
    if result["tokens_equal_share"] is not None:
        lines.append(f"{result['dtype']}: {timed_share(result) or 'every timed token is the same'}.")
    lines += [f"{said}." for said in uncompared(result)]
    if place := located(result):
        lines.append(f"  {place}.")
    if unjudged := not_judged(result):
        lines.append(f"  {unjudged}.")
    wide_console().print("\n".join(lines), highlight=False)
