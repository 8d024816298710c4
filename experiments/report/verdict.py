"""Write sentences on the float32 pass of a comparison: defects, which set exit code `DEFECT`, suspicions, and coverage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.display.formatting import plural, share_alike


class Headline(NamedTuple):
    """The outcome of the float32 pass in a few words."""

    tone: str
    """`good`, `warn`, `bad`, or `calm` without a pass."""
    said: str


def defects(result: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each kind of defect that the float32 pass found."""
    said = []
    if unjustified := result.get("unjustified_divergences"):
        said.append(f"{plural(unjustified, 'divergence')} that rounding does not explain")
    if above := result.get("errors_above_tolerance"):
        worst = result.get("max_abs_logprob_diff")
        most = "a value that is not finite" if worst is None else f"{worst:.1e}"
        said.append(
            f"{plural(above, 'position')} with an error of log-probabilities above correctness.tolerance="
            f"{result.get('tolerance', 0):g}, at most {most}"
        )
    return said


def timed_defects(result: Mapping[str, Any]) -> list[str]:
    """Return a sentence on the differences of timed tokens that rounding does not explain; none where there are none."""
    wrong = result.get("timed_unjustified")
    if not wrong:
        return []
    more = f"; {plural(wrong, 'block')} with such a difference"
    return [f"{located(result)}, which rounding does not explain{more}"]


def located(result: Mapping[str, Any]) -> str:
    """Return where the first difference of timed tokens is; empty without one."""
    found = result.get("first_timed_difference")
    if not found:
        return ""
    blame = f" ({' and '.join(found['wrong'])} wrong)" if found["wrong"] else ""
    mine, other = ("no token" if token is None else f"token {token}" for token in found["tokens"])
    place = f"block {found['block']}, request {found['request']}, output token {found['position']}"
    return f"{found['engine']} differs in {place}: {other}, not {mine}{blame}"


def suspicions(result: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each engine whose errors are below the tolerance and more than rounding explains."""
    return list((result.get("suspicions") or {}).values())


def timed_suspicions(result: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each engine whose timed tokens differ although it runs the native kernels of the first engine."""
    return list((result.get("timed_suspicions") or {}).values())


def timed_uncompared(result: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each engine whose timed outputs cannot be compared."""
    return [f"timed outputs of {label} not judged: {why}" for label, why in (result.get("timed_not_compared") or {}).items()]


def not_judged(result: Mapping[str, Any]) -> str:
    """Return how many differences of timed tokens are judged and why not all; empty if all are."""
    if not (why := result.get("timed_not_judged")):
        return ""
    found, judged = plural(result["timed_differences"], "difference"), result["timed_judged"]
    return f"{judged} of {found} of timed outputs judged: {why}" if judged else f"{found} of timed outputs not judged: {why}"


def covered(result: Mapping[str, Any]) -> str:
    """Return which share of the timed work the float32 pass compared; empty without a pass."""
    found = result.get("coverage")
    if not found:
        return ""
    said = (
        f"{found['tokens']:,} of {found['timed_tokens']:,} timed tokens compared in {found['requests']} of "
        f"{found['timed_requests']} requests, histories up to {found['longest']:,} of {found['timed_longest']:,} tokens"
    )
    if found["step_sizes"] is not None:
        said += f", {found['step_sizes']} of {found['timed_step_sizes']} step sizes"
    return said


def uncompared(result: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each engine that computes on other weights, so that its outputs are not compared."""
    weights = {label: mine.get("stored_weights") for label, mine in result["engines"].items()}
    return [f"{label}: outputs not compared, other weights: {stored}" for label, stored in weights.items() if stored]


def timed_share(result: Mapping[str, Any]) -> str:
    """Return which share of the timed tokens is alike if not all are; else an empty text."""
    share = result.get("tokens_equal_share")
    if share is None or share >= 1:
        return ""
    return f"{share_alike(share)} of timed output tokens come before their request's first difference"


def headline(result: Mapping[str, Any]) -> Headline:
    """Return the most severe outcome, and the share of equal timed tokens where all are equal in float32 alone."""
    found, share = outcome(result), timed_share(result)
    contradicts = share and result.get("tokens_equal") and found.tone != "bad"
    return found._replace(said=f"{found.said}; in {result['dtype']} {share}") if contradicts else found


def outcome(result: Mapping[str, Any]) -> Headline:
    """Return the most severe outcome of the float32 pass and of the timed blocks."""
    if found := timed_defects(result):
        return Headline("bad", "defect: " + "; ".join([*defects(result), *found]))
    if found := defects(result):
        return Headline("bad", "defect: " + "; ".join(found))
    if found := [*suspicions(result), *timed_suspicions(result)]:
        return Headline("warn", "suspicious: " + "; ".join(found))
    if (left := not_judged(result)) and not result["timed_judged"]:
        return Headline("warn", left)
    left_out = timed_uncompared(result)
    if result.get("unjustified_divergences") is None:
        return Headline("warn" if left_out else "calm", "; ".join(["the pass in float32 was left out", *left_out]))
    said = "every token is the same" if result.get("tokens_equal") else "tokens differ only where rounding decides"
    return Headline("warn" if left_out else "good", "; ".join([said, *left_out]))
