"""Check the conditions `fail_if` on the results of a run. A command ends with exit code 3 if one holds.

`fail_if=["comparisons.torch.high < 0.95", "engines.jax.p99_itl_ms > 200"]`: a dotted key of `results.json`, a comparison, and a
number or a word.
"""

from __future__ import annotations

import math
import operator
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from common.config import expect
from common.errors import ConfigError, nearest_hint

OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
CONDITION = re.compile(r"(?P<key>[^\s<>=!]+(?:=[^\s<>=!]+)*)\s*(?P<op>[<>=!]+)\s*(?P<bound>[\w.+-]+)")
"""A key may hold single equals signs, as labels do."""
EXAMPLE = '"ratios.torch < 0.9"'
BY_LABEL = ("engines", "ratios", "comparisons", "failures", "agreement", "perplexity")
"""Parts of a result in which engines go by their labels."""
ONE_FIGURE = ("ratios", "perplexity")
"""Those that have no more than one figure of each engine."""
OF_BOTH = ("comparisons.", "ratios.")
"""Starts of keys of speeds that a comparison without a verdict leaves unknown."""
NOT_OF_THE_FIRST = ("comparisons", "agreement")
"""Those in which the first engine is what the others are compared with."""


@dataclass(frozen=True)
class Condition:
    """One of `fail_if`."""

    key: str
    op: str
    bound: float | str

    def __str__(self) -> str:
        bound = self.bound if isinstance(self.bound, str) else f"{self.bound:g}"
        return f"{self.key} {self.op} {bound}"


def how_to_write(texts: Sequence[str]) -> str:
    """Conditions as a word of the command line, in the quotes that Hydra wants within those that a shell wants."""
    quotes = [f'"{text}"' for text in texts if CONDITION.fullmatch(text)]
    return shlex.quote(f"fail_if=[{', '.join(quotes or [EXAMPLE])}]")


def expect_quotes(words: Sequence[str]) -> None:
    """Raise `ConfigError` for `fail_if=[ratios.torch < 0.9]` without quotes, also if the shell has split it at its spaces.

    The message of Hydra would be about its grammar."""
    for start, word in enumerate(words):
        if word.startswith("fail_if="):
            end = start + 1
            while end < len(words) and (words[end - 1] in OPERATORS or words[end] in OPERATORS):
                end += 1
            expect_quoted(" ".join(words[start:end]))


def expect_quoted(word: str) -> None:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException as error:
        conditions = [text.strip("[]'\" ") for text in word.partition("=")[2].split(",")]
        raise ConfigError(f"Conditions are in quotes, and with them the word: {how_to_write(conditions)}") from error


def parse_conditions(wanted: Any) -> list[Condition]:
    """The list `fail_if` of a configuration. Raises `ConfigError` for what is no condition."""
    expect(
        isinstance(wanted, list) and all(isinstance(text, str) for text in wanted),
        f"fail_if must be a list of conditions, each in quotes, got {wanted!r}. Write {how_to_write([str(wanted)])}",
    )
    return [parse(text) for text in wanted]


def parse(text: str) -> Condition:
    match = CONDITION.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"fail_if: {text!r} is no condition. Expected a key, a comparison and a bound: ratios.torch < 0.9.")
    key, op, word = match["key"], match["op"], match["bound"]
    expect(op in OPERATORS, f"fail_if: unknown comparison {op!r} in {text!r}. Known: {', '.join(OPERATORS)}.")
    try:
        bound: float | str = float(word)
    except ValueError:
        bound = word
    ordered = op not in ("==", "!=")
    expect(not (ordered and isinstance(bound, str)), f"fail_if: {op} in {text!r} needs a number, got {word!r}.")
    expect(isinstance(bound, str) or math.isfinite(bound), f"fail_if: the bound of {text!r} must be finite.")
    return Condition(key, op, bound)


def check_keys(
    conditions: Sequence[Condition], known: Collection[str], labels: Sequence[str], fields: Mapping[str, Collection[str]]
) -> None:
    """Refuse, before anything is loaded, a condition that could never hold: on a key that is not `known` at the root of the
    result, on an engine that is not among `labels`, or on a figure that is not among the `fields` of an engine."""
    for condition in conditions:
        head, _, rest = condition.key.partition(".")
        hint = nearest_hint(head, known)
        expect(head in known, f"fail_if: results have no {head!r}, as in {str(condition)!r}.{hint} Known: {', '.join(known)}.")
        if head not in BY_LABEL:
            continue
        # The longest, since one label may start another and contain dots.
        label = max((name for name in labels if f"{rest}.".startswith(f"{name}.")), key=len, default=None)
        expect(
            label is not None,
            f"fail_if: no engine of this run is named in {str(condition)!r}.{nearest_hint(rest.partition('.')[0], labels)} "
            f"Engines: {', '.join(labels)}.",
        )
        expect(
            label != labels[0] or head not in NOT_OF_THE_FIRST,
            f"fail_if: {str(condition)!r} can never hold: {label} is the first engine, with which the others are compared.",
        )
        field = rest[len(label or "") + 1 :].partition(".")[0]
        if head in ONE_FIGURE:
            expect(not field, f"fail_if: {head}.{label} is one figure and has no {field!r}, as in {str(condition)!r}.")
        if head not in fields:
            continue
        hint = nearest_hint(field, fields[head])
        expect(
            field in fields[head],
            f"fail_if: {head}.{label} has no {field!r}, as in {str(condition)!r}.{hint} Known: {', '.join(fields[head])}.",
        )


def violations(conditions: Sequence[Condition], result: Mapping[str, Any]) -> list[str]:
    """A sentence for each condition that holds of `result`, and for each on something that was not measured: what is not known
    to be good does not pass."""
    said = []
    spoilt = result.get("no_verdict")
    for condition in conditions:
        value = look_up(result, condition.key)
        if value is None or value != value:  # NaN
            said.append(f"fail_if {str(condition)!r}: {condition.key} was not measured.")
        elif isinstance(condition.bound, float) and not isinstance(value, (int, float)):
            said.append(f"fail_if {str(condition)!r}: {condition.key} is no number but {short(value)}.")
        elif OPERATORS[condition.op](comparable(value, condition.bound), condition.bound):
            said.append(f"fail_if {str(condition)!r}: {condition.key} is {short(value)}.")
        elif spoilt and condition.key.startswith(OF_BOTH) and not condition.key.endswith(".contaminated"):
            said.append(f"fail_if {str(condition)!r}: {condition.key} is contaminated: {spoilt}.")
    return said


def look_up(result: Any, key: str) -> Any:
    """What is at a dotted key; None if nothing is. Names may contain dots, and a list goes by number."""
    if isinstance(result, Mapping):
        if key in result:
            return result[key]
        found = (look_up(value, key[len(name) + 1 :]) for name, value in result.items() if key.startswith(f"{name}."))
        return next((value for value in found if value is not None), None)
    if isinstance(result, Sequence) and not isinstance(result, str):
        number, _, rest = key.partition(".")
        if number.isdecimal() and int(number) < len(result):
            return look_up(result[int(number)], rest) if rest else result[int(number)]
    return None


def comparable(value: Any, bound: float | str) -> Any:
    """Words compare with words: `true` with True."""
    if isinstance(bound, float):
        return value
    return str(value).lower() if isinstance(value, bool) else str(value)


def short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else f"{value!r:.60}"
