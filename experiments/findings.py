"""What a run found, in sentences: how fast, whether the same, what failed, and what spoils the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.console import number
from experiments.page import Notice, Tone, Verdict
from experiments.results import RunFiles

TONES: Mapping[str, Tone] = {"faster": "good", "slower": "warn", "equivalent": "calm", "undecided": "calm"}
LOG_LINES = 30


def speed(results: Mapping[str, Any], engines: Mapping[str, Mapping[str, Any]]) -> Iterator[Verdict]:
    """One finding for each engine after the first; of a run of one, what it reached."""
    comparisons = results.get("comparisons") or {}
    if len(engines) == 1:
        (mine,) = engines.values()
        if mine.get("output_throughput") is not None:
            ttft, tpot = (number(mine.get(f"median_{name}_ms")) for name in ("ttft", "tpot"))
            said = f"Median time to first token {ttft} ms, per output token after it {tpot} ms."
            yield Verdict("calm", number(mine["output_throughput"]), "output tokens/s", said)
        if mine.get("roofline") is not None:
            said = "The least time in which this machine could have done the same steps, over the time they took."
            yield Verdict("calm", f"{mine['roofline']:.0%}", "of the roofline", said)
    for label in list(engines)[1:]:
        found = comparisons.get(label) or {}
        ratio = found.get("ratio") or (results.get("ratios") or {}).get(label)
        word = str(found.get("verdict") or f"against {next(iter(engines))}")
        said = found.get("said") or f"{label} gave {number(ratio)} times the output throughput of {next(iter(engines))}."
        yield Verdict(TONES.get(word, "calm"), f"{ratio:.2f}×" if ratio else "–", f"{label} {word}", str(said))


def correctness(results: Mapping[str, Any]) -> Iterator[Verdict]:
    """Whether the engines compute the same thing, as far as a comparison looked."""
    if "unjustified_divergences" not in results:
        return
    wrong = results["unjustified_divergences"]
    if wrong is None:
        yield Verdict("calm", "–", "outputs not checked", "The pass in float32 was left out (correctness.num_requests=0).")
        return
    worst = results.get("max_abs_logprob_diff")
    said = f"In float32 {number(results.get('compared_tokens'))} tokens are alike"
    said += (
        "."
        if worst is None
        else f", log-probabilities within {worst:.1e}."
        if worst
        else ", log-probabilities to the last bit."
    )
    if found := results.get("first_divergence"):
        said += (
            f" First difference: {found.get('engine')}, request {found.get('request')}, output token {found.get('position')}, "
            f"margin {number(found.get('margin'))}, error {number(found.get('error'))}."
        )
    if results.get("tokens_equal"):
        yield Verdict("good", "Same", "every token", said)
    elif wrong == 0:
        yield Verdict("good", "Same", "up to ties that rounding decides", said)
    else:
        yield Verdict("bad", str(wrong), "divergences that rounding does not explain", said)


def notices(run: RunFiles) -> Iterator[Notice]:
    """Failures with the end of their logs, then what contaminated the rest."""
    for label, failure in (run.results.get("failures") or {}).items():
        name, message = str(failure.get("log") or f"{label}.log"), str(failure.get("message") or "")
        yield Notice("bad", f"{label} failed: {failure.get('kind') or 'error'}", message, log_end(run.directory, name))
    for label, mine in run.engines.items():
        for reason in mine.get("contaminated") or ():
            yield Notice("warn", f"{label} is contaminated", f"{reason}.")


def log_end(directory: Path, log: str) -> str:
    """The last lines of a log of the run: `log` names a file of its directory, or is the text itself."""
    name = Path(log.rpartition("\n")[2]).name
    file = directory / name
    text = text_of(file) if name and "\n" not in log and file.is_file() else "" if log.endswith(".log") else log
    return "\n".join(text.splitlines()[-LOG_LINES:])


def text_of(file: Path) -> str:
    return file.read_text(errors="replace") if file.is_file() else ""
