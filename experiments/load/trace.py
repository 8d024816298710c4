"""Read requests from a file: one JSON object a line, with arrival time, prompt and number of output tokens.

`{"arrival": 0.25, "prompt_len": 128, "output_len": 64}`, or `prompt_token_ids` in place of `prompt_len`: seconds after the
start, token ids, numbers of tokens. Empty lines are skipped. The order of the lines does not matter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import expect, real, whole
from common.errors import ConfigError, nearest_hint, shown

KEYS = ("arrival", "prompt_token_ids", "prompt_len", "output_len")
EXAMPLE = '{"arrival": 0.25, "prompt_len": 128, "output_len": 64}'
LONGEST_S = 7 * 24 * 3600.0
"""No arrival lies further from the start: what does is a date."""
MOST_TOKENS = 1 << 24
"""No request has more: what does would take all memory before it is refused."""
MOST_PROMPT_TOKENS = 1 << 26
"""Of all prompts together: as Python holds them, 2.7 GB."""


@dataclass(frozen=True)
class Entry:
    """One line of a trace."""

    arrival: float
    prompt: tuple[int, ...]
    """Token ids; empty where the trace gives only their number."""
    prompt_len: int
    output_len: int


def read_trace(path: Path, vocab_size: int, limit: int | None = None) -> list[Entry]:
    """The entries of a trace in order of arrival, the first `limit` of them where one is given.

    Raises `ConfigError` for a file that cannot be read, and for the first line that is no entry, by its number.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The trace {path} cannot be read: {error}. Set workload.trace to a file with one JSON object a line."
        ) from error
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                entries.append(parse_entry(line, vocab_size))
            except ConfigError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from error
    expect(bool(entries), f"The trace {path} holds no request; give it a line such as {EXAMPLE}.")
    expect(
        limit is None or limit <= len(entries),
        f"workload.num_requests={limit}, but the trace {path} holds {len(entries)}; lower it, or set it to null for all.",
    )
    kept = sorted(entries, key=lambda entry: entry.arrival)[:limit]
    total = sum(entry.prompt_len for entry in kept)
    expect(
        total <= MOST_PROMPT_TOKENS,
        f"The prompts of the trace {path} have {total} tokens in all, at most {MOST_PROMPT_TOKENS} are allowed; set a lower "
        "workload.num_requests.",
    )
    return kept


def parse_entry(line: str, vocab_size: int) -> Entry:
    """One line. Raises `ConfigError` which says what was expected and what came."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"expected a JSON object such as {EXAMPLE}, got {shown(line)} ({error}).") from error
    expect(isinstance(record, dict), f"expected a JSON object such as {EXAMPLE}, got {shown(line)}.")
    unknown = [key for key in record if key not in KEYS]
    if unknown:
        raise ConfigError(f"unknown key {shown(unknown[0])}.{nearest_hint(unknown[0], KEYS)} Known: {', '.join(KEYS)}.")
    arrival = value_of(record, "arrival")
    expect(
        whole(arrival) or real(arrival),
        f"arrival must be a number of seconds, got {shown(arrival)}.",
    )
    expect(
        0 <= arrival <= LONGEST_S,
        f"arrival must be seconds after the start, in [0, {LONGEST_S:.0f}], got {shown(arrival)}; subtract the first date.",
    )
    output_len = count_of(record, "output_len")
    if "prompt_token_ids" not in record:
        return Entry(float(arrival), (), count_of(record, "prompt_len", " (or prompt_token_ids)"), output_len)
    ids = record["prompt_token_ids"]
    expect(isinstance(ids, list) and bool(ids), f"prompt_token_ids must be a list of one id or more, got {shown(ids)}.")
    bad = next((i for i, token in enumerate(ids) if not whole(token, 0, vocab_size - 1)), None)
    expect(bad is None, f"prompt_token_ids[{bad}] must be an integer in [0, {vocab_size}), got {shown(ids[bad or 0])}.")
    told = record.get("prompt_len", len(ids))
    expect(
        told == len(ids), f"prompt_len is {shown(told)}, but there are {len(ids)} prompt_token_ids; leave out one of the two."
    )
    return Entry(float(arrival), tuple(ids), len(ids), output_len)


def value_of(record: Mapping[str, Any], key: str, instead: str = "") -> Any:
    if key not in record:
        raise ConfigError(f"{key}{instead} is missing. A line is such as {EXAMPLE}.")
    return record[key]


def count_of(record: Mapping[str, Any], key: str, instead: str = "") -> int:
    """The number of tokens under `key`; `instead` says what a line may have in its place."""
    value = value_of(record, key, instead)
    expect(whole(value, 1), f"{key} must be an integer ≥ 1, got {shown(value)}.")
    expect(value <= MOST_TOKENS, f"{key} must be at most {MOST_TOKENS}, got {shown(value)}.")
    return int(value)
