"""Compute when each request is due: at its arrival time, after the turn before it, or when a closed-loop user is free."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

from experiments.load.workload import Item


class Agenda:
    """The requests of a workload that are still to be sent, by their numbers. Knows no clock: it is told the time.

    In an open loop each conversation begins at its arrival. In a closed loop the first `concurrency` of them begin at once, and
    one more whenever one has ended. Within a conversation a turn follows the end of the one before it.
    """

    def __init__(self, items: Sequence[Item], concurrency: int | None = None) -> None:
        self._next = {item.after: (number, item.think) for number, item in enumerate(items) if item.after is not None}
        begins = [(item.arrival, number) for number, item in enumerate(items) if item.after is None]
        users = len(begins) if concurrency is None else concurrency
        self._due = begins[:users]
        heapq.heapify(self._due)
        self._queue = deque(number for _, number in begins[users:])
        self.left = len(items)
        """Requests that were not handed out yet."""
        self.listens = bool(self._next or self._queue)
        """Whether anything depends on when a request ends: if not, `ended` need not be called."""

    @property
    def next_due(self) -> float | None:
        """When the next request is due; None while that hangs on the end of another, or none is left."""
        return self._due[0][0] if self._due else None

    def take(self, now: float) -> tuple[int, float] | None:
        """The number of the request that has been due longest at `now`, and since when; None if none is due."""
        if not self._due or self._due[0][0] > now:
            return None
        due, number = heapq.heappop(self._due)
        self.left -= 1
        return number, due

    def ended(self, number: int, now: float) -> None:
        """A request has ended, well or not."""
        if (turn := self._next.get(number)) is not None:
            following, think = turn
            heapq.heappush(self._due, (now + think, following))
        elif self._queue:
            heapq.heappush(self._due, (now, self._queue.popleft()))
