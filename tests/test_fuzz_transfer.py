"""Prompts computed by one engine and gone on with by another, over a channel that does its worst: 10,000 steps here, more in
`make fuzz`; and deliberate defects of the transfer, each of which this must catch."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import common.engine as engine_module
import common.kv_transfer.protocol as transfer_module
from common.batch import KV
from common.kv_transfer.layout import PageCopier
from common.kv_transfer.protocol import Abort, Done, Pages, Receiver, Sender, TransferMessage
from common.schedule.page_pool import PageError
from common.schedule.scheduler import Scheduler
from tests import test_mutants
from tests.schedule_driver import Violation
from tests.test_mutants import Patch, Ran
from tests.transfer_driver import Episode

TICKS = 100
"""Of random work in an episode; what is left over is then run to its end."""
MUTANTS: dict[str, Any] = {}


def mutant(define: Any) -> Any:
    MUTANTS[define.__name__] = define
    return define


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time is the driver's: nothing is waited for. And what goes wrong on purpose is nobody's news."""
    monkeypatch.setattr(engine_module, "_PATIENCE_S", 0.0)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def run_episodes(seeds: Iterable[int]) -> Counter[str]:
    """Run one episode a seed; returns totals. A violation names the seed, so `Episode(seed).run(TICKS)` repeats it."""
    totals: Counter[str] = Counter()
    for seed in seeds:
        episode = Episode(seed)
        try:
            episode.run(TICKS)
        except Exception as error:
            raise AssertionError(f"Episode({seed}) after {episode.counts['steps']} steps: {error}") from error
        totals += episode.counts
        totals["tokens received"] += episode.decode.engine.stats()["external_prefix_cache_hits"]
        totals["steps that raised"] += len(episode.faults)
    return totals


def test_whatever_befalls_a_transfer_costs_no_page_and_no_token() -> None:
    totals = run_episodes(range(32))
    assert totals["steps"] > 10_000
    # The work was worth judging: everything that can happen did.
    often = {"judged": 500, "received": 200, "tokens received": 1500, "not received": 100, "aborted": 80}
    often |= dict.fromkeys(("dropped", "forged", "repeated", "delayed", "stale", "refused"), 50)
    often |= dict.fromkeys(("truncated", "corrupted"), 20)  # bytes that travel
    often |= dict.fromkeys(("prefills killed", "decodes killed", "offer lost", "offer of another model"), 8)
    often |= {"steps that raised": 50, "of another generation": 8, "no room yet": 10, "as they lie": 40}
    often |= {"corrupted in memory": 8}
    for what, least in often.items():
        assert totals[what] > least, (what, totals)


@pytest.mark.fuzz
def test_a_hundred_thousand_steps_of_transfers() -> None:
    assert run_episodes(range(10_000, 10_320))["steps"] > 100_000


# ── defects ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@mutant
def a_checksum_says_nothing(patch: Patch, ran: Ran) -> None:
    def checksum(sums: Sequence[int]) -> int:
        ran.append(1)
        return 0

    patch.setattr(transfer_module, "checksum", checksum)


@mutant
def what_has_come_is_used_although_a_part_is_missing(patch: Patch, ran: Ran) -> None:
    original = Receiver.hear

    def hear(self: Receiver, said: TransferMessage) -> list[TransferMessage]:
        answers = original(self, said)
        if isinstance(said, Done) and said.tag == self._tag and not self.over and self._pages:
            self.kv = self._kv
            ran.append(1)
        return answers

    patch.setattr(Receiver, "hear", hear)


@mutant
def an_earlier_generation_is_heard_and_what_was_sent_not_compared_with_what_came(patch: Patch, ran: Ran) -> None:
    original = Receiver.hear

    def hear(self: Receiver, said: TransferMessage) -> list[TransferMessage]:
        ran.extend([1] if said.tag != self._tag else [])
        object.__setattr__(said, "tag", self._tag)
        return original(self, said)

    patch.setattr(Receiver, "hear", hear)
    patch.setattr(transfer_module, "digest_of", lambda checksums: "")


@mutant
def what_lies_in_memory_is_believed(patch: Patch, ran: Ran) -> None:
    original = Receiver._is_whole

    def is_whole(self: Receiver, pages: Pages) -> bool:
        whole, there = original(self, pages), not any(map(len, pages.data))
        ran.extend([1] if there and not whole else [])
        return whole or there

    patch.setattr(Receiver, "_is_whole", is_whole)
    patch.setattr(transfer_module, "digest_of", lambda checksums: "")


@mutant
def pages_are_read_although_they_are_held_no_longer(patch: Patch, ran: Ran) -> None:
    original = Scheduler.drop

    def drop(self: Scheduler, request_id: str) -> None:
        kept = self.kept.get(request_id)
        original(self, request_id)
        if kept is not None:
            self.kept[request_id] = kept._replace(pages=list(kept.pages))
            ran.append(1)

    patch.setattr(Scheduler, "drop", drop)


@mutant
def pages_that_are_kept_are_given_to_others(patch: Patch, ran: Ran) -> None:
    original = Scheduler._finish

    def finish(self: Scheduler, seq: Any, status: Any) -> None:
        original(self, seq, status)
        if seq.request.request_id in self.kept:
            self.pool.release(self.kept[seq.request.request_id].pages)
            ran.append(1)

    patch.setattr(Scheduler, "_finish", finish)


@mutant
def pages_stay_kept_when_the_runner_has_lost_them(patch: Patch, ran: Ran) -> None:
    original = Scheduler.requeue_all

    def requeue_all(self: Scheduler, suspects: Any) -> list[str]:
        kept = self.kept
        culprits = original(self, suspects)
        self.kept = kept
        ran.extend(1 for _ in kept)
        return culprits

    patch.setattr(Scheduler, "requeue_all", requeue_all)


@mutant
def a_lease_never_ends(patch: Patch, ran: Ran) -> None:
    def expire(self: Sender, now: float) -> None:
        ran.extend(1 for held in self._held.values() if held.until <= now)

    patch.setattr(Sender, "expire", expire)


@mutant
def an_abort_gives_nothing_back(patch: Patch, ran: Ran) -> None:
    original = Sender.hear

    def hear(self: Sender, said: TransferMessage, now: float, memory: np.ndarray | None = None) -> Iterable[TransferMessage]:
        if isinstance(said, Abort):
            ran.append(1)
            return []
        return original(self, said, now, memory)

    patch.setattr(Sender, "hear", hear)


@mutant
def tokens_are_read_from_the_start_of_their_page(patch: Patch, ran: Ran) -> None:
    original = PageCopier.read

    def read(self: PageCopier, pages: Sequence[int], start: int, kv: KV) -> list[int]:
        ran.extend([1] if start % self._size else [])
        return original(self, pages, start - start % self._size, kv)

    patch.setattr(PageCopier, "read", read)


@mutant
def what_the_cache_has_is_not_left_out_of_what_came(patch: Patch, ran: Ran) -> None:
    original = Scheduler._external_kv

    def brought(self: Scheduler, seq: Any, found: int) -> KV | None:
        kv = original(self, seq, found)
        if kv is None or not found:
            return kv
        ran.append(1)
        whole = original(self, seq, 0)
        assert whole is not None
        return whole.slice(0, kv.tokens)

    patch.setattr(Scheduler, "_external_kv", brought)


RARE = ("an_earlier_generation_is_heard_and_what_was_sent_not_compared_with_what_came",)
"""What takes a quarter of a minute to be caught."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.accept if name in RARE else ()) for name in MUTANTS])
def test_the_fuzz_catches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: Ran = []
    MUTANTS[name](monkeypatch, ran)
    try:
        for seed in range(400):
            Episode(seed).run(TICKS)
    except (Violation, PageError, IndexError, KeyError, RuntimeError) as error:
        assert ran, f"the mutant was blamed for {error!r}, but never erred"
    else:
        pytest.fail(f"the mutant erred {len(ran)} times and was not caught")


def test_no_defect_has_the_name_of_another() -> None:
    assert not {*MUTANTS} & {*test_mutants.MUTANTS}
