"""Which of several engines gets a request. Bookkeeping only: an engine is a number here, and its load is told.

`prefix` sends a request to the engine with the least work: the tokens that are left of its requests (`remaining_tokens`), and
the tokens of the new request that it has not cached. So a conversation returns to the engine that has its history, unless that
engine has so much more work than another that computing the history anew takes less time. `round_robin` ignores both. It is the
baseline of `prefix`.

What is cached where, nobody tells the router: it remembers the keys of the pages that it has sent to each engine, as many as
that has pages, and forgets those first that were not asked for longest, of one request its tail first, as the engine's pool
does (`common.schedule.page_pool`). It may be wrong, and then a request is computed where it need not have been.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from common.config import Routing
from common.schedule.page_pool import PageKey, next_key

_SECRET = b"router"
"""Keys of pages are compared within this process alone."""

DECODE_TOKENS = 64
"""Output tokens that a request is assumed to compute from now on, if `max_tokens` allows as many. Most requests end early."""


def remaining_tokens(prefill: int, output: int, most: int) -> int:
    """Estimate the tokens that an engine has still to compute for a request: its load. `prefill`: tokens of the prompt that are
    not computed. `output`: output tokens so far. `most`: output tokens at most."""
    return prefill + min(most - output, DECODE_TOKENS)


class Choice(NamedTuple):
    engine: int
    cached: int
    """Tokens at the start of the request that it has in its pages, as far as is known."""


class Router:
    """Remembers what `count` engines have in pages of `block_size` tokens."""

    def __init__(self, routing: Routing, count: int, block_size: int) -> None:
        self._routing, self._count, self._block_size = routing, count, block_size
        self._last = -1
        self._sent: list[OrderedDict[PageKey, None]] = [OrderedDict() for _ in range(count)]
        """By engine: the keys of its pages, the one that goes first at the front."""

    def keys(self, tokens: Sequence[int], salt: str, before: Sequence[PageKey] = ()) -> list[PageKey]:
        """Of all full pages of a request but one that ends with its last token, which is computed in any case. `before`: what
        this gave when the request had fewer tokens."""
        size, keys = self._block_size, list(before)
        begin, end = len(keys) * size, (len(tokens) - 1) // size * size
        ids = np.array(tokens[begin:end], np.int32)
        for start in range(0, len(ids), size):
            keys.append(next_key(_SECRET, keys[-1] if keys else None, ids[start : start + size].tobytes(), salt))
        return keys

    def choose(self, keys: Sequence[PageKey], loads: Mapping[int, int]) -> Choice:
        """For a request whose pages have these keys: one of the engines in `loads`, which says how many tokens each has
        still to compute for its requests."""
        cached = {engine: self._cached(engine, keys) for engine in loads}
        turns = {engine: (engine - self._last - 1) % self._count for engine in loads}
        weights = {engine: loads[engine] - cached[engine] if self._routing == "prefix" else 0 for engine in loads}
        self._last = min(loads, key=lambda engine: (weights[engine], turns[engine]))
        return Choice(self._last, cached[self._last])

    def sent(self, engine: int, keys: Sequence[PageKey], pages: int) -> None:
        """An engine of so many pages has computed those with these keys, or is about to."""
        held = self._sent[engine]
        for key in reversed(keys):
            held[key] = None
            held.move_to_end(key)
        while len(held) > pages:
            held.popitem(last=False)

    def forget(self, engine: int) -> None:
        """It has nothing in its pages any more."""
        self._sent[engine].clear()

    def _cached(self, engine: int, keys: Sequence[PageKey]) -> int:
        """Tokens at the start of those with these keys that the engine has, as far as is known."""
        return self._block_size * sum(1 for _ in takewhile(self._sent[engine].__contains__, keys))
