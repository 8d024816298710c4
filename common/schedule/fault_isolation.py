"""Find the request that makes steps raise.

The requests of a step that raised are suspects. The scheduler tries them in halves, each half by itself. A suspect is cleared
once a step has landed that computes past the place where the request stood. A suspect that raised alone is tried again behind
all others, so that their steps land in between: a fault of the machine that lasts a while rarely meets the same request each
time. A request that has raised alone in `MOST_RAISED` trials ends. So each culprit costs about log2 of a step's requests in
further steps that raise, and the others their time.

Where many steps raise and none lands between them, the requests are hardly the cause, and all suspects end. So a lost device
does not cost a step for each request. Eight culprits side by side stay below that number of steps.
"""

from __future__ import annotations

from common.schedule.sequence import Sequence

MOST_RAISED = 3
"""Trials of a request alone, all of which raise, until it ends."""
CULPRITS = 8
"""Culprits side by side that end alone, without the other suspects."""


class Trials:
    """Groups of suspects, of steps of at most `max_num_seqs`. While there are any, only the last is run."""

    def __init__(self, max_num_seqs: int) -> None:
        self.groups: list[list[Sequence]] = []
        self._faults_in_a_row = 0
        # Among few requests no step lands before the whole search has raised: 2 * CULPRITS - 1 groups, then the trials alone.
        # Among many, the groups of the other requests land in between.
        whole_search = CULPRITS * (1 + MOST_RAISED) - 1
        self._most_faults = whole_search if max_num_seqs < 2 * CULPRITS else 4 * max(7, max_num_seqs.bit_length())

    def admit(self, seq: Sequence) -> bool:
        """Whether it may run now."""
        return not self.groups or seq in self.groups[-1]

    @property
    def over(self) -> bool:
        """Whether there is a trial, and nobody in it is under suspicion any more."""
        return bool(self.groups) and not any(seq.suspect for seq in self.groups[-1])

    def go_on(self) -> None:
        """To the next trial, if there is one; or else with everybody."""
        self.groups.pop()

    def landed(self) -> None:
        """A step has, without raising."""
        self._faults_in_a_row = 0

    def arraign(self, suspects: list[Sequence], alone: bool) -> list[Sequence]:
        """Return the requests to end, after a step with `suspects` raised: one that was on trial and `alone`, without others
        that have ended since, for the last time. Otherwise queue their trials."""
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
