"""Format numbers, shares and names for tables and sentences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

ROOM = 24
"""Letters of a name in a legend or a title."""


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def share_alike(share: float) -> str:
    """Per cent, never rounded up to all."""
    return f"{math.floor(1000 * share) / 10} %"


def number(value: float | int | None) -> str:
    """Four significant digits at most; an exponent only for what would be a row of zeros; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    return f"{value:.1e}" if abs(value) < 1e-4 else f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def middle_out(name: str, limit: int = ROOM) -> str:
    """Its beginning and its end, where it is longer than `limit` letters."""
    head = (limit - 1) // 2
    return name if len(name) <= limit else f"{name[:head]}…{name[head + 1 - limit :]}"


def shortened(names: Sequence[str], limit: int = ROOM) -> list[str]:
    """Different names, of which those longer than `limit` letters are cut so that they stay different: in the middle; if that
    makes two alike, without the parts that all long ones begin and end with; if that does too, with a number at the end."""
    long = [name for name in names if len(name) > limit]
    first, last = common_head(long), common_head([name[::-1] for name in long])
    ways = (
        {name: middle_out(name, limit) for name in long},
        {name: middle_out(f"…{name[first : max(first, len(name) - last)]}", limit) for name in long},
    )
    for way in ways:
        told = [way.get(name, name) for name in names]
        if len(set(told)) == len(set(names)):
            return told
    numbers = {name: f"…{number}" for number, name in enumerate(dict.fromkeys(long), 1)}
    return [name[: limit - len(numbers[name])] + numbers[name] if name in numbers else name for name in names]


def common_head(names: Sequence[str]) -> int:
    """Letters of the whole parts, between hyphens, that all of several names begin with."""
    if len(names) < 2:
        return 0
    parts = zip(*(name.split("-")[:-1] for name in names), strict=False)
    return sum(len(part) + 1 for part, *_ in itertools.takewhile(lambda parts: len(set(parts)) == 1, parts))
