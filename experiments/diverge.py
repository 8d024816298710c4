"""Why do two engines differ? Their first step, request, position, layer and tensor that part, and which of the two is wrong.

`python -m experiments.diverge RUN`, where RUN is the directory of a comparison. The first engine runs a share of the run's
requests and its steps are recorded; both repeat them, on the first one's tokens, and whole rows of logits are compared. The
first step whose logits are farther apart than rounding explains is repeated with the outputs of its layers, and compared with
float64. A choice that differs where nothing exceeds the tolerance is a tie if the float64 margin is below twice the measured
error. Of ties the first is named, without a layer, since the sum of the rounding errors of all layers caused it. Both engines
use the pages and budgets of the first one. Unless at a terminal, the last line of the output is one JSON object. It is kept in
RUN as `diverge-1.json`, the next as `diverge-2.json`, and named in RUN's report.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from common.config import Dtype, expect, whole
from common.errors import ConfigError
from experiments.cli.launch import is_value, launch, torn
from experiments.correctness.agreement import SHAPE, record, small
from experiments.correctness.bisect_step import LOGITS, LOOKS, Search, Trace
from experiments.correctness.bisect_tensor import FLOOR, Finding
from experiments.correctness.coverage import sample
from experiments.correctness.observe import Compared
from experiments.correctness.reference import NumpyModel
from experiments.display.formatting import number, plural, share_alike
from experiments.display.progress import ProgressReporter
from experiments.engines.compose import engine_specs
from experiments.engines.process import IsolatedEngine
from experiments.engines.spec import EngineSpec
from experiments.load.workload import Workload
from experiments.measure.session import KERNELS, Plan, make_plan
from experiments.options import resolved
from experiments.report.console import print_result, wide_console
from experiments.report.figures_table import kernels_of
from experiments.report.findings import findings_of
from experiments.runs.directory import write_json
from experiments.runs.results import expect_figures, is_sweep, read_config, read_json
from experiments.runs.sweep_jobs import JOBS, is_whole
from experiments.sweep.launcher import quoted

SHOWN = 5
"""Differing choices that are printed."""


def run(config: DictConfig) -> None:
    expect(not OmegaConf.is_missing(config, "run"), f"Give a run directory: python -m experiments.diverge {newest_run()}")
    directory = Path(str(config.run))
    recorded, specs = recorded_run(directory, config)
    plan = make_plan(recorded, specs)
    asked = share_of(recorded, config)
    dtype: Dtype = config.dtype
    expect(isinstance(config.inside, bool), f"inside must be true or false, got {config.inside!r}.")
    expect(dtype in LOGITS, f"dtype must be float32 or bfloat16, got {dtype!r}.")
    advice = windows_of(recorded, directory, dtype)
    with ProgressReporter() as narrator, TemporaryDirectory(prefix="diverge-", dir=directory) as scratch:
        result = search(plan, specs, asked, dtype, config.inside, directory, Path(scratch), narrator)
    result |= {"said": sentence(result), "advice": advice}
    file = keep(result, directory)
    print_finding(result, file.name)
    if (directory / "report.html").exists():
        from experiments.report.writer import make_report  # imports matplotlib, which takes long

        make_report(directory)
    print_result(result, file)


def keep(result: Mapping[str, Any], directory: Path) -> Path:
    """Write the result as the next `diverge-N.json`, whole at once. Two processes never take the same N."""
    with TemporaryDirectory(prefix="diverge-", dir=directory) as scratch:
        whole_file = Path(scratch) / "result.json"
        write_json(whole_file, result)
        while True:
            file = directory / f"diverge-{1 + max(findings_of(directory), default=0)}.json"
            try:
                file.hardlink_to(whole_file)
            except FileExistsError:  # another process has taken this number since
                continue
            return file


def newest_run() -> str:
    """The latest comparison in `runs`, or how one is called."""
    found = [run for run in Path("runs").glob("*-compare-*") if is_whole(run)]
    return shlex.quote(str(max(found))) if found else "runs/…-compare-…"


def recorded_run(directory: Path, config: DictConfig) -> tuple[DictConfig, list[EngineSpec]]:
    """The configuration of a run, and the two engines that are wanted. Raises `ConfigError` for a folder that is no run."""
    if is_sweep(directory):
        jobs = [path for path in sorted((directory / JOBS).iterdir()) if is_whole(path)]
        which = f"such as {shlex.quote(str(jobs[0]))}" if jobs else "but none has ended yet"
        raise ConfigError(f"{directory} is a sweep; give the directory of one of its jobs, {which}.")
    recorded = read_config(directory)
    of_bench = "engines" not in recorded
    wanted = resolved(config)["engines"]
    expect(not of_bench or wanted is not None, f"{directory} is a run of one engine; name two, as in engines=[jax,torch].")
    expect(
        wanted is None or (isinstance(wanted, list) and len(wanted) == 2),
        f"engines must name two engines, as in engines=[jax,torch], got {wanted!r}.",
    )
    OmegaConf.set_struct(recorded, False)
    recorded.peers = recorded.get("peers") or []
    known = {} if of_bench else {spec.label: spec for spec in engine_specs(recorded)}
    if wanted is None:
        expect(len(known) >= 2, f"{directory} has {len(known)} engine; name two, as in engines=[jax,torch].")
        return recorded, list(known.values())[:2]
    if all(isinstance(label, str) and label in known for label in wanted) and wanted[0] != wanted[1]:
        return recorded, [known[label] for label in wanted]
    recorded.engines, recorded.peers = wanted, []
    return recorded, engine_specs(recorded)


def windows_of(recorded: DictConfig, directory: Path, dtype: Dtype) -> str:
    """A sentence where the run's timed outputs part in another dtype than is looked at here; else none."""
    results = read_json(directory, "results.json") if is_whole(directory) else {"engines": {}}
    expect_figures(directory, results)
    share = results.get("tokens_equal_share")
    if share is None or share >= 1 or recorded.dtype == dtype:
        return ""
    alike = f"where {share_alike(share)} of tokens come before their request's first difference"
    return f"The run's windows were {recorded.dtype}, {alike}; to look there, add dtype={recorded.dtype}."


def share_of(recorded: DictConfig, config: DictConfig) -> tuple[int, int]:
    """How many requests of the run's workload, and how many tokens of each."""
    passed = recorded.get("correctness") or {}
    asked = []
    for name, default in (("num_requests", 8), ("output_len", 64)):
        value = config[name] if config[name] is not None else passed.get(name) or default
        expect(
            whole(value, 1),
            f"{name} must be an integer ≥ 1, got {value!r}.",
        )
        asked.append(value)
    return asked[0], asked[1]


def search(
    plan: Plan,
    specs: Sequence[EngineSpec],
    asked: tuple[int, int],
    dtype: Dtype,
    inside: bool,
    directory: Path,
    scratch: Path,
    narrator: ProgressReporter,
) -> dict[str, Any]:
    """The whole of it: both engines in processes of their own; what is written, but for the sentence."""
    part = sample(plan.workload, *asked)
    share = part.workload
    first, second = (small(spec, len(share.items), dtype) for spec in specs)
    second = replace(second, config=replace(second.config, **{name: getattr(first.config, name) for name in SHAPE}))
    with ExitStack() as stack:
        pair, computed = [], {}
        for spec in (first, second):
            log = directory / f"diverge-{spec.label}.log"
            engine = stack.enter_context(IsolatedEngine(spec, log, plan.measure.timeout_s))
            caps = engine.load(plan.checkpoint.path, narrator.progress(spec.label))["caps"]
            shows = caps.get("observes", False)
            expect(shows, f"Engine {spec.label} does not show its steps; name two that do, as in engines=[jax,torch].")
            pair.append(engine)
            computed[spec.label] = {"kernels_used": ", ".join(caps["kernels"]), **{name: caps[name] for name in KERNELS}}
        result = examine(pair, share, plan, dtype, scratch, narrator, inside)
    for found in filter(None, [result["finding"], *result["choices"]]):
        found["request"] = part.numbers[found["request"]]
    return result | {"computed_by": computed}


def examine(
    pair: Sequence[IsolatedEngine],
    share: Workload,
    plan: Plan,
    dtype: Dtype,
    scratch: Path,
    narrator: ProgressReporter,
    inside: bool = False,
) -> dict[str, Any]:
    """Record the share on the first engine, repeat it on both, and look for where they part."""
    first, second = (engine.spec for engine in pair)
    trace, logits = str(scratch / "trace"), str(scratch / "logits")
    narrator.say(f"{first.label}: {len(share.items)} requests, recorded")
    output, requests = record(pair[0], share, trace)
    with narrator.waiting(f"{first.label}: repeating steps, which the frameworks' kernels are compiled for first"):
        pair[0].observe("keep_logits", narrator.progress(first.label), trace=trace, file=logits)
    with narrator.waiting(f"{second.label}: repeating steps, which the frameworks' kernels are compiled for first"):
        answer = pair[1].observe("compare_logits", narrator.progress(second.label), trace=trace, file=logits)
    rows = [Compared.of(row) for row in answer["rows"]]
    steps = Trace(trace, requests, first.config.block_size)
    finder = Search(pair, trace, steps, NumpyModel(plan.checkpoint), dtype)
    found = finder.first(rows, scratch, narrator)
    choices = [] if found else finder.choices(rows, narrator)
    small_one = finder.inside(rows, scratch, narrator) if inside and not found else None
    labels = (first.label, second.label)
    beyond = {row.step for row in rows if not row.error <= LOGITS[dtype]}
    unjust = [choice for choice in choices if not choice.divergence.justified]
    judged = "undecided" if len(beyond) > LOOKS else "tie" if choices else "equal"
    judged = "suspicious" if small_one else judged
    return {
        "engines": list(labels),
        "model": plan.model,
        "dtype": dtype,
        "num_requests": len(share.items),
        "num_tokens": sum(len(row.tokens) for row in output),
        "num_steps": len(steps.steps),
        "num_positions": len(rows),
        "max_logit_error": plain(max((row.error for row in rows), default=0.0)),
        "max_kld": plain(max((row.kld for row in rows), default=0.0)),
        "differing_choices": sum(row.tokens[0] != row.tokens[1] for row in rows),
        "looked_into": min(len(beyond), 1 if found else LOOKS),
        "verdict": "defect" if found or unjust else judged,
        "threshold": LOGITS[dtype],
        "looked_inside": inside and not found,
        "finding": finding_of(found or small_one, labels),
        "choices": [{"step": c.step, "request": c.request} | asdict(c.divergence) for c in choices],
    }


def finding_of(found: Finding | None, labels: tuple[str, str]) -> dict[str, Any] | None:
    """What was found, in plain values; `wrong` names the engine that departs, or both."""
    if found is None:
        return None
    named = asdict(found) | {
        "difference": plain(found.difference),
        "errors": dict(zip(labels, map(plain, found.errors), strict=True)),
    }
    return named | {"wrong": [label for label, wrong in zip(labels, found.wrong, strict=True) if wrong]}


def plain(value: float) -> float | None:
    """JSON knows no infinity: None is a figure that is not finite."""
    return float(value) if np.isfinite(value) else None


def sentence(result: Mapping[str, Any]) -> str:
    """The finding in words."""
    return f"In {result['dtype']} {finding_in_words(result)}"


def finding_in_words(result: Mapping[str, Any]) -> str:
    first, second = result["engines"]
    alike = f"{result['num_positions']} rows of logits in {result['num_steps']} steps"
    if found := result["finding"]:
        layer = f"layer {found['layer']}, " if found["layer"] is not None else ""
        where = f"step {found['step']}, request {found['request']}, position {found['position']}, {layer}{found['tensor']}"
        errors = ", ".join(f"{label} {shown(error)}" for label, error in found["errors"].items())
        truth = "the float64 result of its own inputs" if found["inside"] else "float64"
        wrong = " and ".join(found["wrong"])
        begin = f"a defect in {wrong}: first seen in "
        if result["verdict"] == "suspicious":
            begin = f"a difference below the threshold: {alike}, {apart(result)}. Suspicious is {wrong}: "
        return f"{begin}{where}. Relative errors from {truth}: {errors}."
    if result["verdict"] == "defect":
        bad = next(choice for choice in result["choices"] if not choice["justified"])
        return (
            f"a defect in how a token is chosen: step {bad['step']}, request {bad['request']}, position {bad['position']}: "
            f"{first} took {bad['tokens'][0]} and {second} {bad['tokens'][1]}, margin {number(bad['margin'])}, error "
            f"{number(bad['error'])}; the logits agree."
        )
    same = apart(result)
    if result["looked_inside"] and result["max_logit_error"] != 0:
        same += (
            ", in the steps that differ most no tensor off by more than its inputs explain and no cached key or value farther "
            f"from float64 than {FLOOR[result['dtype']]:g} of its size or than rounding takes it"
        )
    if looked := result["looked_into"]:
        same += f", no tensor of the {looked} steps looked into farther from float64 than rounding takes it"
    if result["verdict"] == "undecided":
        return f"undecided: {alike}, {same}; there are more such steps than are looked into."
    if result["verdict"] == "tie":
        times, judged = result["differing_choices"], len(result["choices"])
        among = "" if times == judged else f" among the {judged} judged of {times} choices"
        which = "each time at a tie" if times == judged else f"the first {judged} of them at ties; the others were not judged"
        often, tie = plural(times, "time"), result["choices"][0]
        return (
            f"no defect{among}: {alike}, {same}. The engines chose differently {often}, {which}. The first is in "
            f"step {tie['step']}, request {tie['request']}, position {tie['position']}: {first} took {tie['tokens'][0]} and "
            f"{second} {tie['tokens'][1]}. No layer is to blame for a tie, so none is named: it is what rounding adds up to "
            "over them all."
        )
    if result["max_logit_error"] == 0:
        inside = " Equal bits leave nothing to look into." if result["looked_inside"] else ""
        return f"no difference: {alike}, {same}, every choice alike.{inside}"
    ask = "" if result["looked_inside"] else " To look into the layers, add inside=true."
    return f"no difference above the threshold: {alike}, {same}, every choice alike.{ask}"


def apart(result: Mapping[str, Any]) -> str:
    """Return how far apart the rows of logits are, and the threshold if they are below it."""
    largest, threshold = result["max_logit_error"], result["threshold"]
    if largest == 0:
        return "the same bits"
    below = f", below the threshold of {threshold:g}" if largest is not None and largest <= threshold else ""
    return f"apart by at most {shown(largest)} standard deviations of a row's logits{below}"


def shown(value: float | None) -> str:
    return "a value that is not finite" if value is None else f"{value:.1e}"


def print_finding(result: Mapping[str, Any], file: str) -> None:
    console = wide_console()
    console.print(head(result), style="dim", highlight=False, markup=False)
    colour = {"defect": "red", "undecided": "yellow", "suspicious": "yellow"}.get(result["verdict"], "green")
    console.print(f"[bold {colour}]{result['verdict']}[/]: {result['said']}", highlight=False)
    table = Table()
    if found := result["finding"]:
        headings = ("step", "request", "position", "layer", "tensor", *result["engines"], "apart")
        cells = [str(found[name]) if found[name] is not None else "–" for name in headings[:5]]
        cells += [shown(error) for error in (*found["errors"].values(), found["difference"])]
        for heading in headings:
            table.add_column(heading, justify="right")
        table.add_row(*cells)
    elif result["choices"]:
        for heading in ("step", "request", "position", *result["engines"], "margin", "error", "judged"):
            table.add_column(heading, justify="right")
        for choice in result["choices"][:SHOWN]:
            cells = [str(choice[name]) for name in ("step", "request", "position")] + [str(token) for token in choice["tokens"]]
            cells += [f"{choice[name]:.1e}" for name in ("margin", "error")]
            table.add_row(*cells, "tie" if choice["justified"] else "defect")
    if table.columns:
        console.print(table)
    if result["choices"] and not found:
        console.print("[dim]A tie: the margin is below twice the error, and the error no larger than rounding explains.[/]")
    if (judged := len(result["choices"])) > SHOWN:
        console.print(f"[dim]The first {SHOWN} of the {judged} judged; all {judged} are in {file}.[/]", highlight=False)
    if result["advice"]:
        console.print(result["advice"], highlight=False, markup=False)


def head(result: Mapping[str, Any]) -> str:
    """What was repeated, and by which kernels."""
    engines = ", ".join(f"{label} by {kernels_of(mine)} kernels" for label, mine in result["computed_by"].items())
    counts = ((result[f"num_{noun}s"], noun) for noun in ("request", "token", "step"))
    return f"{result['model']} in {result['dtype']}, {engines}: {', '.join(plural(*count) for count in counts)}."


def main() -> None:
    sys.argv[1:] = positional([labels_quoted(argument) for argument in sys.argv[1:]])
    launch(run, "diverge")


def labels_quoted(argument: str) -> str:
    """`engines=[…]` with the labels in it that hold an equals sign in quotes, as Hydra's grammar wants them."""
    if not argument.startswith("engines="):
        return argument
    return re.sub(r"(?<=[\[,])(\s*)([\w.+-]+(?:=[\w.+-]+)+)(?=\s*[,\]])", r'\1"\2"', argument)


def positional(arguments: Sequence[str]) -> list[str]:
    """A first argument that is no override and no option is the run."""
    if torn(arguments):
        return list(arguments)  # `launch` refuses them
    before = ["", *arguments]  # what follows an option is its value
    bare = lambda i, a: not a.startswith("-") and not is_value(before[i]) and ("=" not in a or Path(a).is_dir())  # noqa: E731
    place = next((i for i, argument in enumerate(arguments) if bare(i, argument)), None)
    return [f"run={quoted(argument)}" if i == place else argument for i, argument in enumerate(arguments)]


if __name__ == "__main__":
    main()
