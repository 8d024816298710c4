"""Deliberate defects in pages, scheduler and rows: the fuzz must catch each, or its silence about the real code means nothing.

Each mutant replaces one method by a version that errs in one point, and notes in `ran` that it did err. A mutant that never
ran proves nothing and fails its test.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import common.schedule.scheduler as scheduler_module
from common.batch import Batch
from common.request import Status
from common.sampling.logits_processor import LogitsProcessor
from common.schedule import page_pool
from common.schedule.admission import Limits
from common.schedule.fault_isolation import FaultBisector
from common.schedule.page_pool import PageError, PageKey, PagePool
from common.schedule.request_table import Rows, Score
from common.schedule.scheduler import Scheduler
from common.schedule.sequence import Sequence
from common.schedule.step import Step, scores_of
from tests.schedule_driver import Episode, Violation

Patch = pytest.MonkeyPatch
Ran = list[int]
MUTANTS: dict[str, Callable[[Patch, Ran], None]] = {}


def mutant(define: Callable[[Patch, Ran], None]) -> Callable[[Patch, Ran], None]:
    MUTANTS[define.__name__] = define
    return define


# ── pages ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@mutant
def a_hit_is_not_counted(patch: Patch, ran: Ran) -> None:
    original = PagePool.allocate

    def allocate(self: PagePool, count: int, hits: list[int] = []) -> list[int] | None:  # noqa: B006
        pages = original(self, count, hits)
        for page in hits if pages else []:
            if self.refs[page] > 1:
                self.refs[page] -= 1
                ran.append(page)
        return pages

    patch.setattr(PagePool, "allocate", allocate)


@mutant
def a_failed_allocation_keeps_its_hold_on_the_hits(patch: Patch, ran: Ran) -> None:
    original = PagePool.allocate

    def allocate(self: PagePool, count: int, hits: list[int] = []) -> list[int] | None:  # noqa: B006
        pages = original(self, count, hits)
        for page in hits if pages is None else []:
            if self.refs[page]:
                self.refs[page] += 1
                ran.append(page)
        return pages

    patch.setattr(PagePool, "allocate", allocate)


@mutant
def fresh_pages_are_popped_before_the_hits_are_held(patch: Patch, ran: Ran) -> None:
    original = PagePool.allocate

    def allocate(self: PagePool, count: int, hits: list[int] = []) -> list[int] | None:  # noqa: B006
        fresh = original(self, count)
        if fresh is None or set(fresh) & set(hits):
            ran.append(1)
            return fresh and [*hits, *fresh]
        return [*(original(self, 0, hits) or []), *fresh]

    patch.setattr(PagePool, "allocate", allocate)


@mutant
def a_page_given_out_anew_keeps_its_key(patch: Patch, ran: Ran) -> None:
    original = PagePool.unpublish

    def unpublish(self: PagePool, page: int) -> None:
        if self.refs[page]:
            original(self, page)
        elif self.keys[page] is not None:
            ran.append(page)

    patch.setattr(PagePool, "unpublish", unpublish)


@mutant
def evicting_one_copy_of_a_page_drops_the_other(patch: Patch, ran: Ran) -> None:
    original = PagePool.unpublish

    def unpublish(self: PagePool, page: int) -> None:
        key = self.keys[page]
        if key is not None and len(self.cached[key.digest]) > 1:
            self.cached[key.digest] = {page: None}
            ran.append(page)
        original(self, page)

    patch.setattr(PagePool, "unpublish", unpublish)


@mutant
def the_null_page_is_given_out(patch: Patch, ran: Ran) -> None:
    original = Scheduler._has_page

    def has_page(self: Scheduler, seq: Sequence) -> bool:
        before = len(seq.pages)
        has = original(self, seq)
        if len(seq.pages) > before and self.pool.num_free == 0:
            self.pool.release([seq.pages.pop()])
            seq.pages.append(0)
            self.rows.pages[seq.row, before] = 0
            ran.append(1)
        return has

    patch.setattr(Scheduler, "_has_page", has_page)


@mutant
def the_null_page_is_forgotten_at_the_door(patch: Patch, ran: Ran) -> None:
    original = Limits.max_tokens

    def max_tokens(self: Limits, request: Any) -> int:
        ran.append(1)
        return original(replace(self, num_pages=self.num_pages + 1), request)

    patch.setattr(Limits, "max_tokens", max_tokens)


@mutant
def the_salt_is_ignored(patch: Patch, ran: Ran) -> None:
    original = page_pool.next_key

    def next_key(secret: bytes, parent: PageKey | None, tokens: bytes, salt: str) -> PageKey:
        ran.extend([1] if salt else [])
        return original(secret, parent, tokens, "")

    patch.setattr(scheduler_module, "next_key", next_key)


@mutant
def the_parent_is_ignored(patch: Patch, ran: Ran) -> None:
    original = page_pool.next_key

    def next_key(secret: bytes, parent: PageKey | None, tokens: bytes, salt: str) -> PageKey:
        ran.extend([1] if parent else [])
        return original(secret, None, tokens, salt)

    patch.setattr(scheduler_module, "next_key", next_key)


# ── publishing and looking up ────────────────────────────────────────────────────────────────────────────────────────────


@mutant
def pages_are_published_as_they_are_scheduled(patch: Patch, ran: Ran) -> None:
    original = Scheduler._commit

    def commit(self: Scheduler, plan: list[tuple[Sequence, int]], started: tuple[str, ...]) -> Step:
        step = original(self, plan, started)
        for seq, _ in plan if self.prefix_caching else []:
            before = seq.published
            self._publish(seq, min(seq.computed, seq.known))
            ran.extend([1] * (seq.published - before))
        return step

    patch.setattr(Scheduler, "_commit", commit)


@mutant
def a_page_is_published_one_token_before_it_is_full(patch: Patch, ran: Ran) -> None:
    original = Scheduler._publish

    def publish(self: Scheduler, seq: Sequence, landed: int) -> None:
        ran.extend([1] if (landed + 1) % self.block_size == 0 else [])
        original(self, seq, landed + 1)

    patch.setattr(Scheduler, "_publish", publish)


@mutant
def a_full_hit_leaves_nothing_to_compute(patch: Patch, ran: Ran) -> None:
    original = Scheduler._lookup

    def lookup(self: Scheduler, seq: Sequence) -> list[int]:
        seq.known += 1
        hits = original(self, seq)
        seq.known -= 1
        ran.extend([1] if len(hits) * self.block_size == seq.known else [])
        return hits

    patch.setattr(Scheduler, "_lookup", lookup)


@mutant
def the_cache_outlives_a_reset_of_the_runner(patch: Patch, ran: Ran) -> None:
    original = Scheduler.requeue_all

    def requeue_all(self: Scheduler, suspects: list[Sequence]) -> list[str]:
        pool = self.pool
        failed = original(self, suspects)
        self.pool = pool
        ran.extend([1] if pool.cached else [])
        return failed

    patch.setattr(Scheduler, "requeue_all", requeue_all)


# ── growing and leaving ──────────────────────────────────────────────────────────────────────────────────────────────────


@mutant
def a_page_is_taken_one_token_late(patch: Patch, ran: Ran) -> None:
    original = Scheduler._has_page

    def has_page(self: Scheduler, seq: Sequence) -> bool:
        if seq.computed == len(seq.pages) * self.block_size:
            ran.append(1)
            return True
        return original(self, seq)

    patch.setattr(Scheduler, "_has_page", has_page)


@mutant
def pages_are_freed_twice(patch: Patch, ran: Ran) -> None:
    original = Scheduler._give_back

    def give_back(self: Scheduler, seq: Sequence) -> None:
        shared = [page for page in seq.pages if self.pool.refs[page] > 1]
        self.pool.release(shared)
        ran.extend(shared)
        original(self, seq)

    patch.setattr(Scheduler, "_give_back", give_back)


@mutant
def pages_of_a_preempted_request_are_leaked(patch: Patch, ran: Ran) -> None:
    original = Scheduler._preempt

    def preempt(self: Scheduler, seq: Sequence) -> None:
        seq.pages = seq.pages[:-1]
        ran.append(1)
        original(self, seq)

    patch.setattr(Scheduler, "_preempt", preempt)


@mutant
def the_fence_is_ignored(patch: Patch, ran: Ran) -> None:
    def vacate(self: Scheduler, seq: Sequence) -> None:
        ran.extend([1] if seq.in_flight else [])
        self._give_back(seq)

    patch.setattr(Scheduler, "_release_when_idle", vacate)


@mutant
def a_row_is_reused_while_a_step_in_flight_names_it(patch: Patch, ran: Ran) -> None:
    original, give_back = Scheduler._release_when_idle, Rows.give_back

    def vacate(self: Scheduler, seq: Sequence) -> None:
        if seq.in_flight:
            give_back(self.rows, seq.row)
            ran.append(1)
        original(self, seq)

    def once(self: Rows, row: int) -> None:
        if row not in self.free:
            give_back(self, row)

    patch.setattr(Scheduler, "_release_when_idle", vacate)
    patch.setattr(Rows, "give_back", once)


@mutant
def a_preempted_request_resumes_before_its_step_has_landed(patch: Patch, ran: Ran) -> None:
    original = Scheduler._preempt

    def preempt(self: Scheduler, seq: Sequence) -> None:
        flying, seq.in_flight = seq.in_flight, 0
        original(self, seq)
        ran.extend([1] if flying else [])

    patch.setattr(Scheduler, "_preempt", preempt)


@mutant
def resuming_emits_the_last_token_again(patch: Patch, ran: Ran) -> None:
    original = Scheduler._preempt

    def preempt(self: Scheduler, seq: Sequence) -> None:
        original(self, seq)
        if seq.output:
            seq.output.pop()
            seq.known -= 1
            ran.append(1)

    patch.setattr(Scheduler, "_preempt", preempt)


@mutant
def an_abort_ends_every_request_whose_id_starts_alike(patch: Patch, ran: Ran) -> None:
    original = Scheduler.end

    def end(self: Scheduler, request_id: str, status: Status) -> bool:
        alike = [name for name in self.live if name.startswith(request_id)]
        ran.extend([1] if set(alike) - {request_id} else [])
        for name in alike:
            original(self, name, status)
        return bool(alike)

    patch.setattr(Scheduler, "end", end)


# ── who runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@mutant
def the_budget_is_one_token_too_large(patch: Patch, ran: Ran) -> None:
    original = Scheduler._admit

    def admit(self: Scheduler, budget: int, logit_rows: int) -> list[tuple[Sequence, int]]:
        chunks = original(self, budget + 1, logit_rows)
        ran.extend([1] if sum(count for _, count in chunks) > budget else [])
        return chunks

    patch.setattr(Scheduler, "_admit", admit)


@mutant
def the_first_in_line_is_passed_over(patch: Patch, ran: Ran) -> None:
    original = Scheduler._is_ready

    def is_ready(self: Scheduler, seq: Sequence) -> bool:
        ready = original(self, seq)
        if ready and len(self.waiting) > 1 and seq is self.waiting[0]:
            ran.append(1)
            return False
        return ready

    patch.setattr(Scheduler, "_is_ready", is_ready)


@mutant
def an_urgent_request_queues_behind_those_that_came_before(patch: Patch, ran: Ran) -> None:
    original = Sequence.__post_init__

    def init(self: Sequence) -> None:
        original(self)
        ran.extend([1] if self.request.priority else [])
        self.urgency = 0, self.number

    patch.setattr(Sequence, "__post_init__", init)


@mutant
def the_youngest_gives_way_whatever_its_priority(patch: Patch, ran: Ran) -> None:
    original = Scheduler._preempt

    def preempt(self: Scheduler, seq: Sequence) -> None:
        youngest = max(self.running, key=lambda s: s.number)
        ran.extend([1] if youngest is not seq else [])
        original(self, youngest)

    patch.setattr(Scheduler, "_preempt", preempt)


@mutant
def a_step_in_flight_may_pass_the_cap(patch: Patch, ran: Ran) -> None:
    original = Scheduler._continue

    def more(self: Scheduler) -> Any:
        for seq in self.running:
            seq.max_tokens += 1
        decodes, chunks = original(self)
        for seq in self.running:
            seq.max_tokens -= 1
        ran.extend(1 for seq in decodes if len(seq.output) + seq.pending >= seq.max_tokens)
        return decodes, chunks

    patch.setattr(Scheduler, "_continue", more)


@mutant
def a_token_that_the_host_does_not_know_is_not_filled(patch: Patch, ran: Ran) -> None:
    original = Rows.build

    def build(self: Rows, rows: Any, starts: Any, counts: Any, samples: Any, fills: list[int], *more: Any) -> Batch:
        ran.extend(fills)
        return original(self, rows, starts, counts, samples, [], *more)

    patch.setattr(Rows, "build", build)


@mutant
def a_row_keeps_the_page_table_of_the_request_before(patch: Patch, ran: Ran) -> None:
    original = Rows.take

    def take(self: Rows, tokens: Any, pages: Any, params: Any, seed: int) -> int:
        row = self.free[-1]
        before = self.pages[row].copy()
        original(self, tokens, pages, params, seed)
        self.pages[row, len(pages) :] = before[len(pages) :]
        ran.extend([1] if before[len(pages) :].any() else [])
        return row

    patch.setattr(Rows, "take", take)


@mutant
def a_resumed_request_samples_with_another_seed(patch: Patch, ran: Ran) -> None:
    original = Scheduler._preempt

    def preempt(self: Scheduler, seq: Sequence) -> None:
        original(self, seq)
        seq.seed ^= 1
        ran.append(1)

    patch.setattr(Scheduler, "_preempt", preempt)


# ── deadlines, the queue, trials ─────────────────────────────────────────────────────────────────────────────────────────


@mutant
def a_deadline_is_noticed_late(patch: Patch, ran: Ran) -> None:
    original = Scheduler.expire

    def expire(self: Scheduler, now: float) -> list[str]:
        ran.extend([1] if self.deadlines and now - 0.5 < self.deadlines[0][0] <= now else [])
        return original(self, now - 0.5)

    patch.setattr(Scheduler, "expire", expire)


@mutant
def an_end_is_reported_twice(patch: Patch, ran: Ran) -> None:
    original = Scheduler.expire

    def expire(self: Scheduler, now: float) -> list[str]:
        expired = original(self, now)
        ran.extend(1 for _ in expired)
        return expired * 2

    patch.setattr(Scheduler, "expire", expire)


@mutant
def a_full_queue_takes_one_more(patch: Patch, ran: Ran) -> None:
    original = Scheduler.add

    def add(self: Scheduler, request: Any) -> None:
        limit = self.max_waiting
        ran.extend([1] if limit and len(self.waiting) - self.num_free_rows == limit and request.parent not in self.live else [])
        self.max_waiting = limit and limit + 1
        try:
            original(self, request)
        finally:
            self.max_waiting = limit

    patch.setattr(Scheduler, "add", add)


@mutant
def an_engine_that_drains_takes_requests(patch: Patch, ran: Ran) -> None:
    original = Scheduler.add

    def add(self: Scheduler, request: Any) -> None:
        draining, self.draining = self.draining, False
        ran.extend([1] if draining else [])
        try:
            original(self, request)
        finally:
            self.draining = draining

    patch.setattr(Scheduler, "add", add)


@mutant
def those_on_trial_run_beside_others(patch: Patch, ran: Ran) -> None:
    original = FaultBisector.admit

    def admit(self: FaultBisector, seq: Sequence) -> bool:
        ran.extend([] if original(self, seq) else [1])
        return True

    patch.setattr(FaultBisector, "admit", admit)


@mutant
def the_culprit_is_tried_for_ever(patch: Patch, ran: Ran) -> None:
    original = FaultBisector.record_failure

    def record_failure(self: FaultBisector, suspects: list[Sequence], alone: bool) -> list[Sequence]:
        culprits = original(self, suspects, alone)
        self.groups += [[seq] for seq in culprits]
        ran.extend([1] if culprits else [])
        return []

    patch.setattr(FaultBisector, "record_failure", record_failure)


@mutant
def a_suspect_is_ended_without_a_trial(patch: Patch, ran: Ran) -> None:
    original = FaultBisector.record_failure

    def record_failure(self: FaultBisector, suspects: list[Sequence], alone: bool) -> list[Sequence]:
        first = not self.groups
        culprits = original(self, suspects, alone)
        ran.extend([1] if first and suspects else [])
        return suspects[:1] if first else culprits

    patch.setattr(FaultBisector, "record_failure", record_failure)


# ── forks ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@mutant
def a_fork_does_without_the_copy_of_the_last_page(patch: Patch, ran: Ran) -> None:
    original: Any = Rows.build

    def build(self: Rows, *rest: Any) -> Any:
        ran.extend(1 for _ in rest[-1])
        return original(self, *rest[:-1], [])

    patch.setattr(Rows, "build", build)


@mutant
def pages_are_copied_the_wrong_way_round(patch: Patch, ran: Ran) -> None:
    original: Any = Rows.build

    def build(self: Rows, *rest: Any) -> Any:
        ran.extend(1 for _ in rest[-1])
        return original(self, *rest[:-1], [pair[::-1] for pair in rest[-1]])

    patch.setattr(Rows, "build", build)


@mutant
def a_fork_starts_before_the_prompt_is_written(patch: Patch, ran: Ran) -> None:
    def awaits_parent(self: Scheduler, seq: Sequence) -> bool:
        parent = seq.parent
        if parent is not None and parent.status is Status.RUNNING and parent.landed < len(seq.request.prompt_token_ids):
            ran.append(1)
        return False

    patch.setattr(Scheduler, "_awaits_parent", awaits_parent)


@mutant
def the_child_of_a_parent_that_has_ended_waits_on(patch: Patch, ran: Ran) -> None:
    original = Scheduler._awaits_parent

    def awaits_parent(self: Scheduler, seq: Sequence) -> bool:
        orphan = seq.parent is not None and seq.parent.status.finished
        ran.extend([1] if orphan else [])
        return orphan or original(self, seq)

    patch.setattr(Scheduler, "_awaits_parent", awaits_parent)


@mutant
def a_fork_shares_a_page_that_both_will_write(patch: Patch, ran: Ran) -> None:
    original = Scheduler._commit

    def commit(self: Scheduler, plan: list[tuple[Sequence, int]], started: tuple[str, ...]) -> Step:
        for source, target in self.copies:
            (child,) = (seq for seq in self.running if target in seq.pages)
            self.pool.release([target])
            self.pool.refs[source] += 1
            child.pages[child.pages.index(target)] = source
            self.rows.pages[child.row, : len(child.pages)] = child.pages
            ran.append(1)
        self.copies = []
        return original(self, plan, started)

    patch.setattr(Scheduler, "_commit", commit)


# ── logits ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@mutant
def the_output_is_not_counted(patch: Patch, ran: Ran) -> None:
    patch.setattr(LogitsProcessor, "append", lambda self, token: ran.append(token))


@mutant
def a_penalty_does_not_wait_for_the_token_in_flight(patch: Patch, ran: Ran) -> None:
    def follow(self: LogitsProcessor) -> bool:
        ran.append(1)
        return False

    patch.setattr(LogitsProcessor, "follow", property(follow))


@mutant
def min_tokens_count_only_what_has_landed(patch: Patch, ran: Ran) -> None:
    original = LogitsProcessor.at

    def at(self: LogitsProcessor, output: list[int], length: int) -> Any:
        ran.extend([1] if length > len(output) else [])
        return original(self, output, len(output))

    patch.setattr(LogitsProcessor, "at", at)


@mutant
def a_change_goes_to_the_row_beside(patch: Patch, ran: Ran) -> None:
    original = Rows.build

    def build(self: Rows, rows: list[int], starts: list[int], counts: list[int], samples: list[int], *rest: Any) -> Batch:
        fills, scores, changes, *more = rest
        if len(samples) > 1 and changes and set(changes) < set(samples):
            beside = dict(zip(samples, [*samples[1:], samples[0]], strict=True))
            changes = {beside[i]: change for i, change in changes.items()}
            ran.append(1)
        return original(self, rows, starts, counts, samples, fills, scores, changes, *more)

    patch.setattr(Rows, "build", build)


@mutant
def a_scored_prompt_is_looked_up(patch: Patch, ran: Ran) -> None:
    original = Scheduler._lookup

    def lookup(self: Scheduler, seq: Sequence) -> list[int]:
        scores, seq.scores = seq.scores, None
        pages = original(self, seq)
        ran.extend([1] if pages and scores is not None else [])
        seq.scores = scores
        return pages

    patch.setattr(Scheduler, "_lookup", lookup)


@mutant
def a_prompt_is_scored_anew_after_a_preemption(patch: Patch, ran: Ran) -> None:
    original = scores_of

    def scores(i: int, seq: Sequence, end: int) -> Any:
        stop = min(end, len(seq.request.prompt_token_ids) - 1)
        if seq.computed >= stop:
            return []
        if seq.computed < len(seq.scores or ()) - 1:
            ran.append(1)
            return [Score(i, seq.computed, stop, seq.request.params.prompt_logprobs or 0)]
        return original(i, seq, end)

    patch.setattr(scheduler_module, "scores_of", scores)


# ── ideas left out ───────────────────────────────────────────────────────────────────────────────────────────────────────


@mutant
def a_static_batch_takes_in_who_comes_later(patch: Patch, ran: Ran) -> None:
    original = Scheduler._form_batch

    def form(self: Scheduler) -> bool:
        late = set(self.waiting) - self.batch
        if late and not all(seq.status.finished and not seq.in_flight for seq in self.batch):
            self.batch |= late
            ran.append(1)
        return original(self)

    patch.setattr(Scheduler, "_form_batch", form)


@mutant
def a_static_batch_stays_open_when_pages_have_run_out(patch: Patch, ran: Ran) -> None:
    def close(self: Scheduler) -> None:
        ran.extend([1] if self.static and not all(seq.admissions for seq in self.batch) else [])

    patch.setattr(Scheduler, "_close_batch", close)


@mutant
def a_dense_cache_takes_pages_for_the_prompt_only(patch: Patch, ran: Ran) -> None:
    original = Scheduler._pages_to_start

    def pages(self: Scheduler, seq: Sequence) -> int:
        fewer = -(-seq.known // self.block_size)
        ran.extend([1] if fewer < original(self, seq) else [])
        return fewer

    patch.setattr(Scheduler, "_pages_to_start", pages)


@mutant
def a_prompt_is_split_although_it_must_not_be(patch: Patch, ran: Ran) -> None:
    original = Scheduler._may_split

    def may_split(self: Scheduler, seq: Sequence) -> bool:
        ran.extend([] if original(self, seq) else [1])
        return True

    patch.setattr(Scheduler, "_may_split", may_split)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_fuzz_catches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logging.disable(logging.CRITICAL)
    ran: Ran = []
    MUTANTS[name](monkeypatch, ran)
    try:
        for seed in range(150):
            episode = Episode(seed, depth=seed % 3)
            episode.run(60)
    except (Violation, PageError, IndexError, RuntimeError) as error:
        assert ran, f"the mutant was blamed for {error!r}, but never erred"
    else:
        pytest.fail(f"the mutant erred {len(ran)} times and was not caught")
    finally:
        logging.disable(logging.NOTSET)
