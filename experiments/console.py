"""What people read: progress on standard error, tables on standard output; and what programs read there, a line of JSON."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from common.interface import Progress as Callback
from experiments.metrics import LIMITED, too_short

LINE_PERIOD_S = 10.0
COLOURS = {"faster": "bold cyan", "slower": "bold magenta", "equivalent": "bold green", "undecided": "bold yellow"}
GROUPS = (
    (
        ("output_throughput", "output tokens/s"),
        ("total_token_throughput", "total tokens/s"),
        ("request_throughput", "requests/s"),
        ("steady_output_throughput", "output tokens/s, steady"),
        ("decode_throughput", "output tokens/s, decode steps"),
        ("goodput", "goodput: requests/s within limits"),
        ("duration", "timed, s"),
        ("total_output_tokens", "output tokens"),
        ("num_steps", "steps"),
    ),
    (
        ("mean_queue_ms", "sent late mean, ms"),
        ("mean_admission_ms", "admission mean, ms"),
        ("mean_ttft_ms", "TTFT mean, ms"),
        ("median_ttft_ms", "TTFT median, ms"),
        ("p99_ttft_ms", "TTFT p99, ms"),
        ("mean_tpot_ms", "TPOT mean, ms"),
        ("median_tpot_ms", "TPOT median, ms"),
        ("p99_itl_ms", "ITL p99, ms"),
        ("mean_e2el_ms", "end to end mean, ms"),
    ),
    (
        ("roofline", "roofline: least time / time"),
        ("mbu", "memory bandwidth used (MBU)"),
        ("mfu", "matmul peak used (MFU)"),
        ("decode_roofline", "roofline, decode steps"),
        ("decode_mbu", "MBU, decode steps"),
        ("prefill_mfu", "MFU, steps with prompts"),
        ("host_ms_per_step", "host work a step, ms"),
        ("communication_ms_per_step", "between ranks a step, ms"),
        ("communication_mib_per_step", "between ranks a step, MiB"),
        ("padded_tokens_share", "padding share"),
        ("joules", "energy, J"),
        ("joules_per_token", "energy an output token, J"),
    ),
    (
        ("mean_running", "requests running, mean"),
        ("mean_pages_used_share", "KV pages in use, mean"),
        ("mean_pages_empty_share", "KV pages reserved but empty, mean"),
        ("prefix_cache_hit_rate", "prefix cache hit rate"),
        ("num_preemptions", "preemptions"),
        ("prompts_handed_over", "prompts handed over"),
        ("prompts_recomputed", "prompts computed again"),
    ),
    (
        ("shared_out", "parallel"),
        ("kernels_used", "kernels"),
        ("kernel_arithmetic", "native kernels multiply by"),
        ("weights_mib", "weights in this dtype, MiB"),
        ("kv_pool_mib", "KV pages, MiB"),
        ("rank_mib", "weights and pages of a rank, MiB"),
        ("rss_mib", "memory after warm-up, MiB"),
        ("peak_load_mib", "peak memory until then, MiB"),
        ("peak_rss_mib", "peak memory, MiB"),
        ("load_s", "load, s"),
        ("warmup_s", "warm-up, s"),
    ),
    (
        ("completed", "completed"),
        ("failed", "failed"),
        ("compilations_in_window", "compilations in window"),
        ("foreign_cpu_share", "other programs' CPU share"),
        ("harness_overhead_share", "harness's share of timed"),
    ),
)
"""Speed, latency, efficiency, the batch and its pages, memory and start, guards: each figure with its name."""
FIGURES = tuple(figure for group in GROUPS for figure in group)
WHERE = {"communication_ms_per_step": "communication_mib_per_step"}
"""A figure that there is, though nobody may tell it, where that other is told."""
BRACKETS = "in brackets: percentiles of too few samples"
SPOILT = "a contaminated engine's ratio is not to be quoted: what disturbs a run seldom slows two engines down alike"


class Narrator:
    """Says on standard error what is going on: bars on a terminal, a line now and then elsewhere.

    It draws only when told something, so that it takes nothing from an engine that is being timed.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            auto_refresh=False,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_line = 0.0

    def __enter__(self) -> Narrator:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        self._console.print(text, style="dim", highlight=False, markup=False)

    def alarm(self, text: str) -> None:
        self._console.print(text, style="bold red", highlight=False, markup=False)

    def block(self, done: int, planned: int, label: str, left_s: float) -> None:
        """Say which window comes next. `left_s` is how long the blocks that are planned still take, 0 or less if not known."""
        left = f", about {left_s:.0f} s left" if left_s > 0 else ""
        text = f"block {done + 1}{f' of {planned}' if done < planned else ''}: {label}{left}"
        if self._console.is_terminal:
            self._draw("blocks", done, max(planned, done + 1), text)
        else:
            self.say(text)

    def end_blocks(self, reason: str) -> None:
        if "blocks" in self._tasks:
            self._bars.remove_task(self._tasks.pop("blocks"))
            self._bars.refresh()
        self.say(f"stopped: {reason}")

    def progress(self, label: str) -> Callback:
        """A callback for an engine's long work; where there is no total, there are but words."""

        def report(done: int, total: int, what: str) -> None:
            if not total:
                self.say(f"{label}: {what}")
            elif self._console.is_terminal:
                self._draw(label, done, total, f"{label}: {what}")
            elif done == total or time.monotonic() - self._last_line > LINE_PERIOD_S:
                self._last_line = time.monotonic()
                self.say(f"{label}: {what} ({done}/{total})")

        return report

    def _draw(self, label: str, done: int, total: int, what: str) -> None:
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total)
        self._bars.update(self._tasks[label], description=what, completed=done, total=total)
        if done == total:
            self._bars.remove_task(self._tasks.pop(label))
        self._bars.refresh()


def print_comparison(title: str, result: Mapping[str, Any]) -> None:
    """The verdicts, then the figures, then what went wrong."""
    console = wide_console()
    for label, comparison in result["comparisons"].items():
        doubt = "[bold red]contaminated:[/] " if contaminated(result["engines"], (comparison["against"], label)) else ""
        console.print(f"{doubt}[{COLOURS[comparison['verdict']]}]{escape(comparison['said'])}[/].", highlight=False)
    print_verdict(result)
    console.print(f"[dim]Stopped: {'. '.join(filter(None, (result['stopped'], result['advice'])))}.[/]", highlight=False)
    print_table(title, result["engines"], result["comparisons"])
    print_failures(result["failures"])


def print_table(
    title: str, engines: Mapping[str, Mapping[str, Any]], comparisons: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """One column for each engine, one row for each figure that any of them has."""
    if not engines:
        return
    table = Table()
    table.add_column("")
    for label in engines:
        table.add_column(escape(label), justify="right")
    for group in GROUPS:
        table.add_section()
        for key, name in group:
            if tells(key, engines.values()):
                table.add_row(name, *(figure(key, figures) for figures in engines.values()))
            if key == "output_throughput" and comparisons:
                against = next(iter(comparisons.values()))["against"]
                table.add_row(f"× {escape(against)}", *(times(comparisons.get(label)) for label in engines), style="bold")
            if key == "output_throughput" and contaminated(engines, engines):
                table.add_row("contaminated: see below", *spoilt_cells(engines), style="bold red")
    console = wide_console()
    console.print(title, style="bold", highlight=False, markup=False)
    console.print(table)
    if notes := list(explanations(engines, comparisons or {})):
        console.print("; ".join(notes), style="dim", highlight=False, markup=False)
    for label, figures in engines.items():
        remarks = [*(figures.get("unsure") or ()), *fallback(figures), *left_out(figures)]
        print_doubts(console, label, figures["contaminated"], remarks)


def print_rows(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table of text, the first column of which names the row."""
    table = Table()
    for i, name in enumerate(columns):
        table.add_column(escape(name), justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    console = wide_console()
    console.print(title, style="bold", highlight=False, markup=False)
    console.print(table)


def explanations(engines: Mapping[str, Mapping[str, Any]], comparisons: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What the signs in a table mean, of those that it has."""
    for comparison in list(comparisons.values())[:1]:
        bounds = f" and its {100 * comparison['confidence']:.3g} % interval" if comparison["low"] is not None else ""
        yield f"× {comparison['against']}: geometric mean of the blocks' ratios{bounds}"
        if contaminated(engines, engines):
            yield SPOILT
    few = {key for figures in engines.values() for key in figures.get("unsupported") or ()}
    if few.intersection(key for key, _ in FIGURES):
        yield BRACKETS


def spoilt_cells(engines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of each engine, whether its figures stand for what they seem to, or whether nobody can say that they do."""
    fine = ["too short to judge" if too_short(mine) else "no" for mine in engines.values()]
    return ["contaminated" if mine.get("contaminated") else said for mine, said in zip(engines.values(), fine, strict=True)]


def contaminated(engines: Mapping[str, Mapping[str, Any]], labels: Iterable[str]) -> list[str]:
    """Those of the engines whose figures do not stand for what they seem to."""
    return [label for label in labels if engines[label].get("contaminated")]


def fallback(figures: Mapping[str, Any]) -> list[str]:
    """That an engine runs other kernels than the fastest it has, where nobody asked for them, and why."""
    why = figures.get("auto_took_framework")
    return [f"kernels=auto took the framework's kernels, not the native ones: {why}"] if why else []


def left_out(figures: Mapping[str, Any]) -> list[str]:
    """That an engine has no share of the machine's limits, where these were measured, and why."""
    why = figures.get("no_roofline_because")
    return [f"roofline, MBU and MFU are {why}"] if why else []


def print_doubts(console: Console, whose: str, reasons: Iterable[str], unsure: Iterable[str]) -> None:
    """Why figures do not stand for what they seem to, and why perhaps."""
    for reason in reasons:
        console.print(f"[bold red]contaminated[/] {escape(whose)}: {escape(reason)}.", highlight=False)
    for reason in unsure:
        console.print(f"{escape(whose)}: {escape(reason)}.", style="dim", highlight=False)


def tells(key: str, engines: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any engine has a figure, or would have if it could tell."""
    return any(mine.get(key) is not None or mine.get(WHERE.get(key, key)) is not None for mine in engines)


def figure(key: str, figures: Mapping[str, Any]) -> str:
    """A figure of an engine: a word as it is, a share in per cent, a percentile of fewer samples than it needs in brackets."""
    value = figures.get(key)
    if value is None and figures.get(WHERE.get(key, key)) is not None:
        return "not told"
    if isinstance(value, str):
        return value
    if value is not None and math.isfinite(value) and (key in LIMITED or key.endswith(("_share", "_rate"))):
        text = f"{value:.1%}" if key in LIMITED else f"{value:.2%}"
    else:
        text = number(value)
    return f"({text})" if key in (figures.get("unsupported") or ()) else text


def times(comparison: Mapping[str, Any] | None) -> str:
    """The ratio of a comparison and its interval; 1 for the engine that the others are compared with."""
    if comparison is None:
        return "1"
    ratio, low, high = comparison["ratio"], comparison["low"], comparison["high"]
    if ratio is None:
        return number(ratio)
    return f"{ratio:.3f} ({'no interval' if low is None else f'{low:.3f}–{high:.3f}'})"


def print_failures(failures: Mapping[str, Mapping[str, str]]) -> None:
    """Engines that did not come through, and where to read why."""
    for label, failure in failures.items():
        console = wide_console()
        console.print(f"[bold red]failed[/] {escape(label)} ({failure['kind']}): {escape(failure['message'])}", highlight=False)


def wide_console(least: int = 120) -> Console:
    """Standard output, never so narrow that a table loses columns in a log."""
    console = Console()
    return console if console.is_terminal else Console(width=max(least, console.width))


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def number(value: float | int | None) -> str:
    """Four significant digits at most; an exponent only for what would be a row of zeros; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    return f"{value:.1e}" if abs(value) < 1e-4 else f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def print_result(result: Mapping[str, Any], kept: object) -> None:
    """The last line of standard output: for programs the result as JSON; at a terminal, where that would take screens, the file
    that it is `kept` in. What is told of every position is left to that file."""
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
    """Whether the engines of a comparison compute the same thing, in words."""
    unjustified, worst = result["unjustified_divergences"], result["max_abs_logprob_diff"]
    if unjustified is None:
        said = "pass left out."
    elif result["tokens_equal"]:
        said = "[bold green]every token is the same[/]"
    elif unjustified == 0:
        said = "[bold green]tokens differ only where rounding decides[/]"
    else:
        said = f"[bold red]{unjustified} divergences are not explained by rounding[/]"
    lines = [f"float32: {said}"]
    if unjustified is not None:
        apart = "not all finite" if worst is None else f"within {worst:.1e}"
        lines[0] += f"; {result['compared_tokens']} tokens alike, log-probabilities {apart}."
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
    if (share := result["tokens_equal_share"]) is not None:
        lines.append(f"{result['dtype']}: {share:.1%} of timed output tokens come before their request's first difference.")
    wide_console().print("\n".join(lines), highlight=False)
