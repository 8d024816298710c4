"""Write the findings of a run as sentences: speed, equality of outputs, failures and contaminations."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import expect
from experiments.display.formatting import number, plural, share_alike
from experiments.report.notes import SPOILT, between_ranks, contaminated, fallback, left_out
from experiments.report.page import Notice, Tone, Verdict
from experiments.report.verdict import (
    covered,
    defects,
    located,
    not_judged,
    suspicions,
    timed_defects,
    timed_suspicions,
    timed_uncompared,
    uncompared,
)
from experiments.runs.results import RunFiles, read_json

TONES: Mapping[str, Tone] = {"faster": "good", "slower": "warn", "equivalent": "calm", "undecided": "calm"}
LOG_LINES = 30


def speed(run: RunFiles, paced: bool) -> Iterator[Verdict]:
    """One finding for each engine after the first; of a run of one, what it reached. Where arrivals set the pace, the latencies
    come before them."""
    results, engines = run.results, run.engines
    if paced and engines:
        yield latency(engines)
    if len(engines) == 1:
        (mine,) = engines.values()
        if mine.get("output_throughput") is not None:
            ttft, tpot = (number(mine.get(f"median_{name}_ms")) for name in ("ttft", "tpot"))
            said = f"Median time to first token {ttft} ms, per output token after it {tpot} ms."
            yield doubted(mine, Verdict("calm", number(mine["output_throughput"]), "output tokens/s", said))
        if mine.get("roofline") is not None:
            said = "The least time in which this machine could have done the same steps, over the time they took."
            yield doubted(mine, Verdict("calm", f"{mine['roofline']:.0%}", "of the roofline", said))
    for label in list(engines)[1:]:
        yield throughput(label, results, engines, paced)


def doubted(mine: Mapping[str, Any], verdict: Verdict) -> Verdict:
    """The finding, which says so if what it rests on is contaminated."""
    return replace(verdict, tone="warn", word=f"{verdict.word}: contaminated") if mine.get("contaminated") else verdict


def kernels_alone(run: RunFiles) -> Iterator[Verdict]:
    """Of `measure=kernels`: how close the layers come to the limit, at the worst shape and at the best."""
    shares = {
        shape: operators["layers"]["fraction"]
        for shape, operators in (run.results.get("shapes") or {}).items()
        if operators.get("layers", {}).get("fraction") is not None
    }
    if shares:
        said = "Of the time that all layers take, what they need at least: "
        said += ", ".join(f"{shape} {share:.0%}" for shape, share in shares.items()) + "."
        value = " to ".join(dict.fromkeys(f"{share:.0%}" for share in (min(shares.values()), max(shares.values()))))
        yield doubted(run.results, Verdict("calm", value, "of the limit, all layers", said))


def latency(engines: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """Return the finding of an open loop: the latencies, since all engines that keep up have one throughput."""
    shown = (
        ("Time to first token, median", "median_ttft_ms"),
        ("Time per output token, median", "median_tpot_ms"),
        ("End to end, mean", "mean_e2el_ms"),
    )
    lines = [
        f"{name}: " + ", ".join(f"{label} {number(mine.get(key))} ms" for label, mine in engines.items())
        for name, key in shown
        if any(mine.get(key) is not None for mine in engines.values())
    ]
    said = "Requests come when the workload says, so tokens/s is what was asked for as long as an engine keeps up. "
    said += "".join(f"{line}. " for line in lines)
    return Verdict("calm", "Arrivals set the pace", "so look at latency, not at throughput", said.rstrip())


def throughput(label: str, results: Mapping[str, Any], engines: Mapping[str, Mapping[str, Any]], paced: bool) -> Verdict:
    """The verdict in a word, below it the ratio that it rests on, and what would make more of it."""
    first = next(iter(engines))
    found = (results.get("comparisons") or {}).get(label) or {}
    ratio = found.get("ratio") or (results.get("ratios") or {}).get(label)
    word, blocks = found.get("verdict"), found.get("blocks") or 0
    value = f"{label} is {word}" if word in ("faster", "slower") else str(word or "no verdict").capitalize()
    if word == "slower":
        value = f"{first} is faster"
    evidence = [f"{label} against {first}", "no interval"]  # a ratio that may be chance is no headline: a sentence has it
    if ratio and found.get("low") is not None and found.get("high") is not None:
        evidence = [f"{label} gives {ratio:.3f}× the output tokens/s of {first}", f"{found['low']:.3f}–{found['high']:.3f}"]
    if blocks:
        evidence.append(plural(blocks, "block"))
    sentences = [str(found.get("said") or f"{label} gave {number(ratio)} times the output throughput of {first}").rstrip(".")]
    if word == "undecided" and ratio:
        stopped = str(results.get("stopped") or "")
        sentences += filter(None, [stopped[:1].upper() + stopped[1:], str(results.get("advice") or "")])
    if paced:
        sentences.append("The arrivals set this ratio as long as both engines keep up")
    if spoilt := contaminated(engines, (first, label)):
        value = f"Contaminated: {value if word in ('faster', 'slower') else value.lower()}"
        sentences.append(f"Contaminated: {' and '.join(spoilt)}, see below; {SPOILT}")
    tone = "warn" if spoilt else "calm" if paced else TONES.get(str(word), "calm")
    return Verdict(tone, value, ", ".join(evidence), ". ".join(sentences) + ".")


def open_loop(workload: Mapping[str, Any], scheduled: Collection[float]) -> bool:
    """Whether requests come at times of their own: at a rate, or spread by a trace."""
    return workload.get("request_rate") is not None or (workload.get("trace") is not None and len(set(scheduled)) > 1)


def correctness(run: RunFiles) -> Iterator[Verdict]:
    """Whether the engines compute the same thing: in float32, as far as a comparison looked, and in the dtype timed."""
    results = run.results
    if "unjustified_divergences" not in results:
        return
    for found in timed_defects(results):
        yield Verdict("bad", "Defect in a timed block", "tokens", f"{found}.")
    for found in uncompared(results):
        yield Verdict("calm", "Not compared", "other weights", f"{found}.")
    for found in timed_uncompared(results):
        yield Verdict("warn", "Timed outputs not judged", "tokens", f"{found[0].upper()}{found[1:]}.")
    for found in timed_suspicions(results):
        yield Verdict("warn", "Suspicious in a timed block", "tokens", f"{found}.")
    if said := not_judged(results):
        tone: Tone = "calm" if results["timed_judged"] else "warn"
        yield Verdict(
            tone, "Timed differences not judged", "tokens", f"{said[0].upper()}{said[1:]}. First: {located(results)}."
        )
    share, dtype = results.get("tokens_equal_share"), results.get("dtype")
    if run.partial:
        yield Verdict("calm", "Not checked in float32", "outputs", "The run ended before the pass in float32 did.")
    elif share is None:
        yield in_float32(run)
    elif share >= 1:
        yield in_float32(run, f" In {dtype}, the dtype timed, every token is the same too.")
    else:
        yield in_float32(run)
        part = share_alike(share)
        said = f"In {dtype}, the dtype timed, {part} of tokens come before their request's first difference."
        value, word = f"{part} alike in {dtype}", "up to the first difference of each request"
        if answer := where_and_why(run):
            yield Verdict(tone_of(answer), value, word, f"{said} {answer['said']} ({answer['file']})")
        else:
            line = shlex.join(["python", "-m", "experiments.diverge", str(run.directory), f"dtype={dtype}"])
            yield Verdict("warn", value, word, f"{said} Where and why:", line)


def in_float32(run: RunFiles, more: str = "") -> Verdict:
    results = run.results
    wrong = results["unjustified_divergences"]
    if wrong is None:
        same = len(run.engines) - len(uncompared(results))
        why = "correctness.num_requests=0" if same >= 2 else "fewer than two engines compute on the same weights"
        said = f"The pass in float32 was left out ({why})."
        return Verdict("calm", "Not checked in float32", "outputs", said + more)
    worst = results.get("max_abs_logprob_diff")
    said = f"In float32 {number(results.get('compared_tokens'))} tokens are alike"
    said += (
        "."
        if worst is None
        else f", log-probabilities within {worst:.1e}."
        if worst
        else ", log-probabilities to the last bit."
    )
    if share := covered(results):
        said += f" {share}."
    if found := results.get("first_divergence"):
        said += (
            f" First difference: {found.get('engine')}, request {number(found.get('request'))}, "
            f"output token {number(found.get('position'))}, "
            f"margin {number(found.get('margin'))}, error {number(found.get('error'))}."
        )
    if found := defects(results):
        return Verdict("bad", "Defect in float32", "; ".join(found), said + more)
    if found := suspicions(results):
        line = shlex.join(["python", "-m", "experiments.diverge", str(run.directory), "inside=true"])
        sentence, word = f"{'. '.join(found)}. {said}{more} Where and why:", "below the tolerance, above rounding"
        return Verdict("warn", "Suspicious in float32", word, sentence, line)
    if results.get("tokens_equal"):
        return Verdict("good", "Same in float32", "every token", said + more)
    return Verdict("good", "Same in float32", "up to ties that rounding decides", said + more)


def findings_of(directory: Path) -> dict[int, Path]:
    """What `experiments.diverge` has left in a run, by number."""
    found = ((re.fullmatch(r"diverge-(\d+)\.json", file.name), file) for file in directory.glob("diverge-*"))
    return dict(sorted((int(match[1]), file) for match, file in found if match))


def answers(run: RunFiles) -> list[dict[str, Any]]:
    """What `experiments.diverge` found, each time it was asked, with the `file` that it is from."""
    found = []
    for file in findings_of(run.directory).values():
        answer = read_json(run.directory, file.name)
        complete = answer.keys() >= {"dtype", "engines", "verdict", "said"}
        expect(complete, f"{file} is no answer of experiments.diverge; remove it, and ask again.")
        found.append(answer | {"file": file.name})
    return found


def where_and_why(run: RunFiles) -> dict[str, Any] | None:
    """The last answer that is of the run's own engines in the dtype that was timed, if its tokens differ there."""
    share, dtype = run.results.get("tokens_equal_share"), run.results.get("dtype")
    if run.partial or share is None or share >= 1:
        return None
    mine = [found for found in answers(run) if found["dtype"] == dtype and run.engines.keys() >= set(found["engines"])]
    return mine[-1] if mine else None


def divergences(run: RunFiles) -> Iterator[Verdict]:
    """The answers of `experiments.diverge` but for that which `correctness` gives."""
    given = where_and_why(run)
    for found in answers(run):
        if found != given:
            against = f"{' and '.join(found['engines'])} in {found['dtype']}"
            yield Verdict(tone_of(found), found["verdict"].capitalize(), against, f"{found['said']} ({found['file']})")


def tone_of(found: Mapping[str, Any]) -> Tone:
    tones: Mapping[str, Tone] = {"defect": "bad", "undecided": "warn", "suspicious": "warn"}
    return tones.get(found["verdict"], "good")


def notices(run: RunFiles) -> Iterator[Notice]:
    """Yield the failures with the end of their logs, the dropped blocks, and the contaminations."""
    for label, failure in (run.results.get("failures") or {}).items():
        log = last_lines(str(failure.get("log") or "")) or end_of(run.directory / Path(f"{label}.log").name)
        yield Notice("bad", f"{label} failed: {failure.get('kind') or 'error'}", str(failure.get("message") or ""), log)
    for block, reason in run.dropped.items():
        yield Notice("calm", f"Block {block} is dropped", f"Its times are not counted: {reason}.")
    for label, mine in run.engines.items():
        for reason in mine.get("contaminated") or ():
            yield Notice("warn", f"{label} is contaminated", f"{reason}.")
        for reason in mine.get("unsure") or ():
            yield Notice("calm", f"{label} may be contaminated", f"{reason}.")
        for reason in fallback(mine):
            yield Notice("calm", f"{label} does not run native kernels", f"{reason}.")
        for reason in left_out(mine):
            yield Notice("calm", f"{label} has no shares of the machine's limits", f"{reason}.")
        for reason in between_ranks(mine):
            yield Notice("calm", f"{label} does not count the time between its ranks", f"{reason}.")


def end_of(log: Path) -> str:
    """The last lines of a log; empty where there is none."""
    return last_lines(text_of(log))


def last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-LOG_LINES:])


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
