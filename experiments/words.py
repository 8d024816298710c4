"""Numbers as people read them."""

from __future__ import annotations

import math


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
