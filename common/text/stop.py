"""Stop strings in a stream of text: found wherever its pieces break, and nothing is held back that could not belong to one."""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Searches a stream for several strings at once. Linear in the text for each stop string (Knuth, Morris & Pratt 1977).

    The string that is complete first wins; of several that end at the same character, the first in the list.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._borders = [_borders(stop) for stop in self._stops]
        self._include = include
        self._matched = [0] * len(self._stops)  # the longest prefix of each stop string that the text so far ends in
        self._held = ""

    def push(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """(text that is safe to show, the stop string that is now complete).

        With `may_stop` false, strings that become complete pass as ordinary text. A match ends the text before the string,
        or behind it with `include`.
        """
        text = self._held + text
        for i in range(len(self._held), len(text)):
            for k, stop in enumerate(self._stops):
                n = _advance(stop, self._borders[k], self._matched[k], text[i])
                if n == len(stop):
                    if may_stop:
                        self._held = ""
                        return text[: i + 1 if self._include else i + 1 - n], stop
                    n = self._borders[k][n]
                self._matched[k] = n
        safe = len(text) - max(self._matched, default=0)
        self._held = text[safe:]
        return text[:safe], None

    def flush(self) -> str:
        """What was held back: the text ended, so it is no stop string."""
        held, self._held = self._held, ""
        return held


def _advance(stop: str, borders: list[int], n: int, char: str) -> int:
    """The longest prefix of `stop` that a text ends in which ended in n characters of it before `char`."""
    while n and stop[n] != char:
        n = borders[n]
    return n + (stop[n] == char)


def _borders(stop: str) -> list[int]:
    """At n: the length of the longest proper prefix of stop[:n] that is also its suffix; where to go on after a mismatch."""
    borders = [0, 0]
    for char in stop[1:]:
        borders.append(_advance(stop, borders, borders[-1], char))
    return borders
