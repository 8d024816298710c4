"""Show two sources side by side."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass
from html import escape
from typing import Any


@dataclass(frozen=True)
class Beside:
    """Two sources next to each other; lines that both have are dimmed."""

    left: tuple[str, ...]
    right: tuple[str, ...]

    def pairs(self) -> list[tuple[str, str, bool]]:
        """Lines opposite each other, and whether they are the same."""
        out: list[tuple[str, str, bool]] = []
        for kind, a, b, c, d in difflib.SequenceMatcher(None, self.left, self.right, autojunk=False).get_opcodes():
            left, right = self.left[a:b], self.right[c:d]
            height = max(len(left), len(right))
            both = zip((*left, *[""] * (height - len(left))), (*right, *[""] * (height - len(right))), strict=True)
            out += [(x, y, kind == "equal") for x, y in both]
        return out

    def _repr_html_(self) -> str:
        pre = "margin:0;background:none;white-space:pre-wrap;font-family:monospace"
        cell = f'<td style="text-align:left;padding:0 6px"><pre style="{pre}">{{}}</pre></td>'
        rows = "".join(
            f"<tr{' style=opacity:.5' if same else ''}>{cell.format(escape(x))}{cell.format(escape(y))}</tr>"
            for x, y, same in self.pairs()
        )
        return f'<table style="table-layout:fixed;width:100%;font-size:85%">{rows}</table>'

    def __repr__(self) -> str:
        width = max(map(len, self.left), default=0)
        return "\n".join(f"{x:<{width}} {' ' if same else '|'} {y}".rstrip() for x, y, same in self.pairs())


def beside(left: Any, right: Any) -> Beside:
    """The sources of two functions, classes or modules next to each other."""
    return Beside(*(tuple(inspect.getsource(thing).rstrip().splitlines()) for thing in (left, right)))
