"""Find the request that makes steps raise.

The requests of a step that raised are suspects. The scheduler tries them in halves, each half by itself. The scheduler clears
a suspect once a step lands that computes past the position at which the request stood. The scheduler retries a suspect that
raised alone behind all others, so that their steps land in between. A transient fault of the machine then rarely meets the
same request twice. A request ends after `MOST_RAISED` trials alone that raise. So each culprit costs about log2 of a step's
requests in further steps that raise, and the other requests their time.

Where many steps raise and none lands between them, the requests are hardly the cause, and all suspects end. So a lost device
does not cost a step for each request. Eight culprits side by side stay below that number of steps.
"""

from __future__ import annotations

from common.schedule.sequence import Sequence

MOST_RAISED = 3
"""Trials of a request alone, all of which raise, before the request ends."""
CULPRITS = 8
"""Culprits side by side that end alone, without the other suspects."""


class FaultBisector:
    """Hold the groups of suspects that wait for a trial. While there are any, only the last group runs."""

    def __init__(self, max_num_seqs: int) -> None:
        self.groups: list[list[Sequence]] = []
        self._faults_in_a_row = 0
        # Among few requests no step lands before the whole search has raised: 2 * CULPRITS - 1 groups, then the trials alone.
        # Among many, the groups of the other requests land in between.
        whole_search = CULPRITS * (1 + MOST_RAISED) - 1
        self._most_faults = whole_search if max_num_seqs < 2 * CULPRITS else 4 * max(7, max_num_seqs.bit_length())

    def admit(self, seq: Sequence) -> bool:
        """Return whether `seq` may run now."""
        return not self.groups or seq in self.groups[-1]

    @property
    def over(self) -> bool:
        """Whether a trial runs in which no suspect is left."""
        return bool(self.groups) and not any(seq.suspect for seq in self.groups[-1])

    def go_on(self) -> None:
        """End the current trial. The next group runs, or all requests if no group is left."""
        self.groups.pop()

    def landed(self) -> None:
        """Record a step that did not raise."""
        self._faults_in_a_row = 0

    def record_failure(self, suspects: list[Sequence], alone: bool) -> list[Sequence]:
        """Record that a step with `suspects` raised; return the requests that end as culprits, and queue trials of the others.

        `alone` states that the step held one request, finished ones included.
        """
        if not suspects:
            return []
        self._faults_in_a_row += 1
        tried = self.groups.pop() if self.groups else []
        if self._faults_in_a_row > self._most_faults:
            everyone = dict.fromkeys([*suspects, *tried, *(seq for group in self.groups for seq in group)])
            self.groups = []
            return [seq for seq in everyone if seq.suspect]
        untried = [seq for seq in tried if seq.suspect and seq not in suspects]
        if tried and alone:
            suspects[0].raised += 1
            if suspects[0].raised == MOST_RAISED:
                self.groups += [untried] if untried else []
                return suspects
            self.groups.insert(0, suspects)  # steps of the others land first
            suspects = []
        half = len(suspects) // 2
        self.groups += [group for group in (untried, suspects[half:], suspects[:half]) if group]
        return []
