"""Choose the requests of the next step, their numbers of tokens and their pages, and apply the results of steps.

The method is continuous batching (Yu et al. 2022, Orca) over paged KV (Kwon et al. 2023, arXiv:2309.06180), with chunked
prefill and preemption by recompute. There is no prefill or decode phase: `computed` of each request catches up with its tokens.
A step takes running requests first, those of one token before chunks, then waiting ones. Both go from the most urgent to the
least. The most urgent request has the lowest `Request.priority` and, among equals, arrived first.

Progress never stops. `add` refuses a request that the pool cannot hold alone. A request is admitted only with pages for all its
tokens, so a chunk never waits. The scheduler preempts the least urgent running request. So the most urgent one is never
preempted, ends, and gives its pages to the next. A less urgent request never overtakes a waiting one. So the most urgent
waiting request is admitted at the latest when the running ones have ended. Only a stream of more urgent requests can delay it.

A request with a `parent` forks. It shares the pages that its parent has filled with their prompt. The engine copies the last
page, because the fork writes the rest of it. The fork computes only the prompt's last token. Until the parent's prompt is
written the scheduler skips the fork. That delays no request, because the parent runs or stands before the fork in the queue.

Where steps are computed in stages (`Caps.pipelined`), the steps in flight are of different requests. The scheduler skips a
request that awaits a token, and no step takes more than its share of the decoding requests. So these form as many groups as
there are stages, and the groups take turns. The chunks of one prompt may follow each other at once.

Three of these ideas can be left out to measure the effect of each. No output depends on them. The mildest replacement takes the
place of the idea, so that the measurement does not overstate it.

- `static`: waiting requests form a batch, and no request joins before all of the batch have ended (`_form_batch`). The place of
  an ended request stays idle. It is not computed, and its pages are free; a padded batch, as in `engine=hf`, pays for both.
- `dense`: an admitted request takes all pages that it can ever need (`_pages_to_start`), as a contiguous cache must. The
  scheduler takes its `max_tokens` as known. A server that cannot know them reserves the whole context (Kwon et al., section
  6.1).
- without `chunked_prefill` a prompt is computed in one step, or waits for one with room for all of it (`_may_split`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from functools import partial
from heapq import heapify, heappop, heappush
from operator import attrgetter
from time import sleep
from typing import Any, NamedTuple

import numpy as np

from common.batch import KV, Want
from common.config import Cache, Schedule
from common.errors import RequestError
from common.interface import Caps, Result
from common.request import STUCK, Logprobs, Request, Status, TokenEvent, expect
from common.sampling.logits_processor import LogitsProcessor
from common.sampling.seeds import mix64
from common.schedule.admission import Limits, expect_new, expect_room
from common.schedule.fault_isolation import FaultBisector
from common.schedule.page_pool import PagePool, next_key
from common.schedule.prepare import prepared
from common.schedule.request_table import LogitsUpdate, Rows, Score, masks_of
from common.schedule.sequence import Sequence
from common.schedule.step import KVLoad, Step, change_of, logprobs_of, scores_of, take_scores
from common.text.grammar import Grammar, Matcher

_urgency = attrgetter("urgency")


class RetainedPages(NamedTuple):
    """Pages of a request that has ended, and how many tokens are written in them."""

    pages: list[int]
    tokens: int


class Scheduler:
    """Requests in, steps out, results in, events out. Holds every request from `add` to its end. Knows no backend.

    `schedule`, `cache`, `chunked_prefill` and `max_waiting` are those of `EngineConfig`. While `draining` is set, no request is
    taken, and the others go on.
    """

    def __init__(
        self,
        caps: Caps,
        *,
        num_pages: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        groups: int = 1,
        schedule: Schedule = "continuous",
        cache: Cache = "paged",
        prefix_caching: bool = True,
        chunked_prefill: bool = True,
        max_waiting: int | None = None,
        seed: int = 0,
    ) -> None:
        self.caps = caps
        self.block_size, self.prefix_caching, self.seed = block_size, prefix_caching, seed
        self.budget = min(max_num_batched_tokens, caps.max_tokens)
        self.max_num_seqs = min(max_num_seqs, caps.max_seqs, self.budget)
        self.max_logits = max(caps.max_logits, caps.max_seqs)
        self.static, self.dense, self.chunked_prefill = schedule == "static", cache == "dense", chunked_prefill
        self.batch: set[Sequence] = set()
        """The static batch that runs, or is about to."""
        self.copies: list[tuple[int, int]] = []
        """Pages (from, to) to copy at the beginning of the step that is being scheduled."""
        self.arrivals: list[KVLoad] = []
        """Likewise pages to write, before they are copied."""
        self.kept: dict[str, RetainedPages] = {}
        """By the id of the request."""
        self.trials = FaultBisector(self.max_num_seqs)
        self.max_waiting, self.draining = max_waiting, False
        self.pool = PagePool(num_pages)
        self.limits = Limits(
            max_model_len=max_model_len,
            num_pages=num_pages - 1,
            block_size=block_size,
            budget=self.budget,
            chunked_prefill=chunked_prefill,
        )
        self.rows = Rows(self.max_num_seqs, max_model_len, block_size, groups)
        self.live: dict[str, Sequence] = {}
        self.waiting: list[Sequence] = []  # the most urgent first, the preempted among them
        self.running: list[Sequence] = []  # the most urgent first
        self.leaving: list[Sequence] = []  # no longer running, but a step in flight still names their pages and row
        self.compiling: list[tuple[Sequence, Future[Grammar]]] = []  # ended requests stay until the next check
        self.deadlines: list[tuple[float, int, Sequence]] = []  # a heap; ended requests stay until their deadline
        self.num_requests = 0
        self.num_considered = 0
        """Of these, the ones that came before the last step was scheduled."""
        self.num_preemptions = 0
        self.num_forks = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self.external_prefix_cache_hits = 0
        self.num_taken_over = 0
        """Requests that came with output and of which nothing was computed anew: pages that came, or the cache's, had it."""
        self.num_computed_anew = 0
        """The others that came with output."""

    # ── requests come and go ────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, request: Request) -> None:
        """Queue a request. Raises `RequestError`, and changes nothing, if it can never be served; `QueueFullError` or
        `DrainingError` if it could be, but not here and now."""
        name, params, output = request.request_id, request.params, list(request.output_token_ids)
        ready = prepared(request, self.caps.vocab_size)
        expect(
            not (request.keep_pages and name in self.kept),
            f"Request {name!r}: pages of a request of this id are kept still; give it another.",
        )
        twin, parent = self.live.get(name), None if request.parent is None or self.dense else self.live.get(request.parent)
        expect_new(request, twin.request if twin else None, parent.request if parent else None)
        max_tokens = self.limits.max_tokens(request)
        room = len(self.waiting), self.num_free_rows, self.max_waiting
        expect_room(request, *room, draining=self.draining, forks=request.parent in self.live)
        edits = None if ready.plan is None else LogitsProcessor(ready.plan)
        if edits is not None:
            for token in output:
                edits.append(token)
        seq = Sequence(
            request=request if request.kv is None else replace(request, kv=None),  # it goes as soon as pages have it
            number=self.num_requests,
            max_tokens=max_tokens,
            seed=mix64(self.seed, self.num_requests) if (seed := request.own_seed) is None else seed,
            known=len(request.prompt_token_ids) + len(output),
            stops=ready.stops,
            edits=edits,
            scores=None if params.prompt_logprobs is None or output else [None],
            parent=None if params.prompt_logprobs is not None or output else parent,  # which computes the prompt
            kv=request.kv,
            output=output,
            admissions=int(bool(output)),
        )
        self.num_requests += 1
        self.live[name] = seq
        insort(self.waiting, seq, key=_urgency)
        if request.grammar is not None:
            self.compiling.append((seq, request.grammar))
        if request.deadline is not None:
            if len(self.deadlines) > 2 * len(self.live):  # mostly of requests that have ended
                self.deadlines = [item for item in self.deadlines if not item[-1].status.finished]
                heapify(self.deadlines)
            heappush(self.deadlines, (request.deadline, seq.number, seq))

    @property
    def num_free_rows(self) -> int:
        """Return the number of rows that are free for requests that arrive before the next step.

        It is 0 while a request waits that the last step skipped, because that request waits for more than a row.
        """
        if (self.static and any(not seq.status.finished for seq in self.batch)) or any(
            seq.number < self.num_considered for seq in self.waiting
        ):
            return 0
        return self.max_num_seqs - len(self.running) - len(self.leaving)

    def end(self, request_id: str, status: Status) -> bool:
        """End a request in whatever state it is, by its exact id; False if it is not live. The caller reports it."""
        seq = self.live.get(request_id)
        if seq is not None:
            self._finish(seq, status)
        return seq is not None

    def expire(self, now: float) -> list[str]:
        """End every request whose deadline has come, in whatever state it is; returns their ids for the caller to report."""
        expired = []
        while self.deadlines and (self.deadlines[0][0] <= now or self.deadlines[0][-1].status.finished):
            _, _, seq = heappop(self.deadlines)
            if not seq.status.finished:
                self._finish(seq, Status.FINISHED_TIMEOUT)
                expired.append(seq.request.request_id)
        return expired

    def take_grammars(self) -> list[tuple[str, str]]:
        """Let requests start whose grammars have been compiled since the last call. Ends those whose have failed; returns the
        ids of these and what went wrong."""
        failed = []
        compiling, self.compiling = self.compiling, []
        for seq, grammar in compiling:
            if seq.status.finished:
                continue
            if not grammar.done():
                self.compiling.append((seq, grammar))
                continue
            try:
                seq.matcher = grammar.result().start(self.caps.vocab_size)
                if error := _refused(seq.matcher, seq.output):
                    raise RequestError(error)
            except Exception as error:
                self._finish(seq, Status.FINISHED_ERROR)
                why = "" if isinstance(error, RequestError) else "The grammar of this request cannot be used: "
                failed.append((seq.request.request_id, f"{why}{error}"))
        return failed

    def await_others(self, seconds: float) -> bool:
        """Wait for what may let the next request start: a grammar, keys and values, or pages that are kept; at most so long.
        False if there is nothing to wait for."""
        coming: list[Future[Any]] = [grammar for _, grammar in self.compiling]
        coming += [seq.kv for seq in self.waiting if seq.kv is not None]  # or has come since a moment ago
        if coming:
            wait(coming, seconds, FIRST_COMPLETED)
        elif self.kept:
            sleep(seconds)
        return bool(coming or self.kept)

    def requeue_all(self, suspects: list[Sequence]) -> list[str]:
        """Requeue all running requests after a step raised; return the ids of the requests that end as culprits.

        The runner has lost its pages and rows. Each request keeps its emitted tokens. `suspects` are the requests of the
        steps in flight, one of which raised.
        """
        for seq in suspects:
            seq.suspect = 0 if seq.status.finished else seq.computed
        for seq in self.running:
            seq.become(Status.PREEMPTED)
            insort(self.waiting, seq, key=_urgency)
        for seq in (*self.running, *self.leaving):
            self._give_back(seq)
            seq.in_flight = 0
        self.running, self.leaving, self.copies, self.arrivals, self.kept = [], [], [], [], {}
        self.pool = PagePool(self.pool.num_pages, self.pool.secret)
        culprits = self.trials.record_failure([seq for seq in suspects if seq.suspect], alone=len(suspects) == 1)
        for seq in culprits:
            self._finish(seq, Status.FINISHED_ERROR)
        return [seq.request.request_id for seq in culprits]

    # ── one step: schedule ──────────────────────────────────────────────────────────────────────────────────────────────

    def schedule(self) -> Step | None:
        """Return the next step, or None if no request can run before a step in flight has landed."""
        self.num_considered = self.num_requests
        if not self._try_next():
            return None
        preemptions = self.num_preemptions
        decodes, chunks = self._continue()
        admitted: list[tuple[Sequence, int]] = []
        if self.num_preemptions == preemptions:
            logit_rows = self.max_logits - len(self.running) - sum(count - 1 for seq, count in chunks if seq.scoring)
            admitted = self._admit(self.budget - len(decodes) - sum(count for _, count in chunks), logit_rows)
        started = tuple(seq.request.request_id for seq, _ in admitted if seq.admissions == 1)
        chunks += admitted
        self._fit_bucket(len(decodes), chunks)
        plan = [(seq, 1) for seq in decodes]
        plan += [item for item in chunks if item[1] == 1]
        plan += [item for item in chunks if item[1] > 1]
        return self._commit(plan, started) if plan else None

    def _try_next(self) -> bool:
        """Start the next trial if this one is over and the device is idle. Return False while steps are in flight."""
        while self.trials.over:
            if any(seq.in_flight for seq in (*self.running, *self.leaving)):
                return False
            self.trials.go_on()
            for seq in list(self.running) if self.trials.groups else ():
                self._send_back(seq)
        return True

    def _continue(self) -> tuple[list[Sequence], list[tuple[Sequence, int]]]:
        """Running requests: those that need one token, then the next chunk of those that need more, both in their order."""
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        share = -(-len(self.running) // (self.caps.depth + 1)) if self.caps.pipelined else len(self.running)
        for seq in list(self.running):
            if seq.status is not Status.RUNNING:
                break  # preempted just now, and so are all less urgent requests
            if seq.left > 1:
                prefills.append(seq)
            elif seq.pending and (seq.follows or self.caps.pipelined):
                continue  # one of them is in flight
            elif len(decodes) == share:
                continue  # a turn of the pipeline later
            elif len(seq.output) + seq.pending < seq.max_tokens and self._has_page(seq):
                decodes.append(seq)
        budget, chunks = self.budget - len(decodes), []
        logit_rows = self.max_logits - len(self.running)  # beside one for each
        for seq in prefills:
            count = self._chunk_of(seq, budget, 1 + logit_rows)
            if count:
                chunks.append((seq, count))
                budget -= count
                logit_rows -= count - 1 if seq.scoring else 0
        return decodes, chunks

    def _chunk_of(self, seq: Sequence, budget: int, logit_rows: int) -> int:
        """How many tokens of a sequence to run: where its prompt is scored, every token takes a logit row."""
        count = min(seq.left, budget)
        return min(count, logit_rows) if seq.scoring else count

    def _has_page(self, seq: Sequence) -> bool:
        """Make sure of a page for the next token, preempting the least urgent as long as it takes; False if it must wait."""
        if seq.computed < len(seq.pages) * self.block_size:
            return True
        while (page := self.pool.allocate(1)) is None:
            if any(self.pool.refs[page] == 1 for other in self.leaving for page in other.pages):
                return False  # one is on its way back
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        self.rows.pages[seq.row, len(seq.pages)] = page[0]
        seq.pages += page
        return True

    def _admit(self, budget: int, logit_rows: int) -> list[tuple[Sequence, int]]:
        """Waiting requests, the most urgent first, each with pages for all its tokens, until one does not fit."""
        if self.static and not self._form_batch():
            return []
        chunks: list[tuple[Sequence, int]] = []
        at = 0
        while budget and logit_rows and self.rows.free and at < len(self.waiting):
            seq = self.waiting[at]
            if not self._is_ready(seq):
                at += 1
                continue
            parent = seq.parent if seq.parent and seq.parent.status is Status.RUNNING else None
            hits = parent.pages[: (seq.known - 1) // self.block_size] if parent else self._lookup(seq)
            found = len(hits) * self.block_size
            kv = None if parent else self._external_kv(seq, found)
            computed = seq.known - 1 if parent else found if kv is None else found + kv.tokens
            if seq.known - computed > budget and not self._may_split(seq):
                break
            pages = self.pool.allocate(self._pages_to_start(seq) - len(hits), hits)
            if pages is None:
                self._close_batch()
                break
            seq.pages, seq.published, seq.computed, seq.landed = pages, len(hits), computed, computed
            seq.row = self.rows.take(seq.tokens(), pages, seq.request.params, seq.seed)
            seq.parent = seq.kv = None
            if kv is not None:
                self.arrivals.append(KVLoad(pages[len(hits) :], kv))
                self.external_prefix_cache_hits += kv.tokens
            if seq.request.output_token_ids and seq.admissions == 1:  # with the one that it had elsewhere
                whole = computed == seq.known - 1
                self.num_taken_over += whole
                self.num_computed_anew += not whole
            if parent:
                self.num_forks += 1
                seq.keys = parent.keys[: len(hits)]
                if computed % self.block_size:
                    self.copies.append((parent.pages[len(hits)], pages[len(hits)]))
            elif not seq.admissions:  # what a preempted request finds again is no merit of the cache
                self.prefix_cache_queries += seq.known
                self.prefix_cache_hits += seq.computed
                seq.cached = seq.computed
            seq.admissions += 1
            del self.waiting[at]
            seq.become(Status.RUNNING)
            insort(self.running, seq, key=_urgency)
            count = self._chunk_of(seq, budget, logit_rows)
            chunks.append((seq, count))
            budget -= count
            logit_rows -= count if seq.scoring else 1
        return chunks

    def _is_ready(self, seq: Sequence) -> bool:
        """Whether one that waits may be admitted now. If not, it is passed over and keeps its place."""
        if seq.in_flight:  # its next tokens depend on the result
            return False
        if not self.trials.admit(seq):
            return False
        if seq.matcher is None and seq.request.grammar is not None:  # it is being compiled
            return False
        if seq.kv is not None and not seq.kv.done():
            return False
        return (not self.static or seq in self.batch) and not self._awaits_parent(seq)

    def _awaits_parent(self, seq: Sequence) -> bool:
        """Whether the parent is still to write the prompt, or to be admitted first as the more urgent."""
        parent = seq.parent
        if parent is None:
            return False
        if parent.status is Status.RUNNING:
            return parent.landed < len(seq.request.prompt_token_ids)
        return parent.status is Status.WAITING and parent.urgency < seq.urgency

    def _form_batch(self) -> bool:
        """Once all of a static batch have ended, the next is the first `max_num_seqs` of those that wait by then. Its members
        enter in as many steps as their prompts take; returns whether any still wait."""
        if not self.leaving and all(seq.status.finished for seq in self.batch):
            self.batch = set(self.waiting[: self.max_num_seqs])
        return any(seq.status in (Status.WAITING, Status.PREEMPTED) for seq in self.batch)

    def _close_batch(self) -> None:
        """Pages have run out: members of a static batch that have not entered yet are left to the next."""
        self.batch = {seq for seq in self.batch if seq.admissions}

    def _pages_to_start(self, seq: Sequence) -> int:
        """Pages without which a request is not admitted: for the tokens it has, or, if dense, for all it may come to have."""
        tokens = len(seq.request.prompt_token_ids) + seq.max_tokens - 1 if self.dense else seq.known
        return -(-tokens // self.block_size)

    def _may_split(self, seq: Sequence) -> bool:
        """Return whether a step may compute a part of its prompt.

        Without chunked prefill it may only where no step could hold all of the prompt. That happens when a request was
        preempted after its output had grown, or when its prompt is scored.
        """
        return self.chunked_prefill or seq.known > self.budget or seq.scoring

    def _lookup(self, seq: Sequence) -> list[int]:
        """Cached pages of its prefix, looked up anew at every attempt. The last token is always left to compute."""
        if not self.prefix_caching or seq.scoring:
            return []
        full, size = (seq.known - 1) // self.block_size, self.block_size
        if len(seq.keys) < full:
            tokens = seq.tokens()
            for i in range(len(seq.keys), full):
                self._extend_keys(seq, tokens[i * size : (i + 1) * size])
        return self.pool.match(seq.keys[:full])

    def _external_kv(self, seq: Sequence, found: int) -> KV | None:
        """What came from elsewhere of its tokens behind the first `found`, which the cache has. The last token is always left
        to compute."""
        if seq.kv is None or seq.scoring or seq.kv.cancelled() or seq.kv.exception() is not None:
            return None
        kv = seq.kv.result()
        stop = min(kv.tokens, seq.known - 1)
        return kv.slice(found, stop) if found < stop else None

    def _fit_bucket(self, num_decodes: int, chunks: list[tuple[Sequence, int]]) -> None:
        """Shorten the last chunk to end the step on a bucket, where running its rest in the next step pads less in sum."""
        total = num_decodes + sum(count for _, count in chunks)
        lower = max((size for size in self.caps.token_buckets if size <= total), default=total)
        rest = total - lower
        if not chunks or not rest or chunks[-1][1] <= rest or not self._may_split(chunks[-1][0]):
            return
        beside = num_decodes + len(chunks) - 1  # about as many run one token each in the next step anyway
        extra = self.caps.bucket(beside + rest, rest > 1) - (self.caps.bucket(beside, False) if beside else 0)
        if lower + extra < self.caps.bucket(total, True):
            chunks[-1] = (chunks[-1][0], chunks[-1][1] - rest)

    def _commit(self, plan: list[tuple[Sequence, int]], started: tuple[str, ...]) -> Step:
        """Advance every sequence of the plan, as of now, and pack the step."""
        rows, starts, counts, samples, fills = [], [], [], [], []
        scores: list[Score] = []
        changes: dict[int, LogitsUpdate] = {}
        for i, (seq, count) in enumerate(plan):
            end = seq.computed + count
            rows.append(seq.row)
            starts.append(seq.computed)
            counts.append(count)
            if end > seq.known:
                fills.append(i)
            if seq.scoring:
                scores += scores_of(i, seq, end)
            if end == seq.known + seq.pending:
                samples.append(i)
                if seq.edits is not None or seq.matcher is not None:
                    changes[i] = change_of(seq)
                seq.pending += 1
            seq.computed = end
            seq.in_flight += 1
        copies, self.copies = self.copies, []
        arrivals, self.arrivals = self.arrivals, []
        batch = self.rows.build(rows, starts, counts, samples, fills, scores, changes, copies)
        lacks_masks = batch.mask_rows is not None and batch.masks is None
        masks = partial(masks_of, [*changes.values()]) if lacks_masks else None
        return Step([seq for seq, _ in plan], batch, started, masks, arrivals)

    # ── one step: its result ────────────────────────────────────────────────────────────────────────────────────────────

    def update(self, step: Step, result: Result, time: float) -> list[TokenEvent]:
        """Take in the result of the oldest step in flight, seen at `time`: new tokens, ends, pages to offer to others."""
        batch, events = step.batch, []
        self.trials.landed()
        tokens, starts, ends = result.tokens.tolist(), result.token_starts.tolist(), batch.kv_lengths.tolist()
        bad = set() if result.finite.all() else set(batch.logit_owner[~result.finite].tolist())
        places = np.flatnonzero(batch.want & Want.SAMPLE).tolist()  # of the tokens among the logit rows
        if batch.score_ids is not None:
            take_scores(step, result, bad)
        for i, seq in enumerate(step.seqs):
            seq.in_flight -= 1
            seq.landed = ends[i]
            if seq.suspect and ends[i] >= seq.suspect:
                seq.suspect = seq.raised = 0
            if i in bad and not seq.status.finished:
                events.append(self._fail_nonfinite(seq, time))
            elif seq.status is Status.RUNNING and self.prefix_caching:
                self._publish(seq, ends[i])
            for j in range(starts[i], starts[i + 1]):
                if seq.status.finished:
                    break  # just now, or while this step was in flight
                if error := _refusal(seq, tokens[j]):
                    events.append(self._fail(seq, error, time))
                    break
                k = seq.request.params.logprobs
                logprobs = None if k is None else logprobs_of(result, places[j], k)
                events.append(self._append(seq, tokens[j], logprobs, time))
            if not seq.in_flight and seq.row >= 0 and seq.status is not Status.RUNNING:
                self.leaving.remove(seq)
                self._give_back(seq)
        return events

    def _publish(self, seq: Sequence, landed: int) -> None:
        """Publish the pages that are full now that KV of its first `landed` tokens is written.

        The scheduler publishes when the step that wrote a page has landed with finite logits, and not at `schedule`. So no page
        is shared that an exception or a NaN would revoke. The price: twins admitted to one step both compute their prefix.
        """
        size = self.block_size
        while (seq.published + 1) * size <= landed:
            i = seq.published
            if i == len(seq.keys):
                self._extend_keys(seq, self.rows.tokens[seq.row, i * size : (i + 1) * size])
            self.pool.publish(seq.pages[i], seq.keys[i])
            seq.published += 1

    def _extend_keys(self, seq: Sequence, tokens: np.ndarray) -> None:
        parent = seq.keys[-1] if seq.keys else None
        seq.keys.append(next_key(self.pool.secret, parent, tokens.tobytes(), seq.request.cache_salt))

    def _append(self, seq: Sequence, token: int, logprobs: Logprobs | None, time: float) -> TokenEvent:
        """Give a sequence its next token, and end it if that was its last."""
        seq.output.append(token)
        self.rows.tokens[seq.row, seq.known] = token
        seq.known += 1
        seq.pending -= 1
        if seq.edits is not None:
            seq.edits.append(token)
        finish, stop_reason = None, None
        if token in seq.stops:  # which min_tokens masks as long as it must
            finish, stop_reason = Status.FINISHED_STOP, seq.stops[token]
        elif seq.matcher is not None and seq.matcher.done:
            finish = Status.FINISHED_STOP
        elif len(seq.output) >= seq.max_tokens:
            finish = Status.FINISHED_LENGTH
        if finish:
            self._finish(seq, finish)
        scores, cached = (seq.scores, seq.cached) if len(seq.output) == 1 else (None, None)
        return TokenEvent(seq.request.request_id, token, time, logprobs, finish, stop_reason, None, scores, cached)

    def _fail_nonfinite(self, seq: Sequence, time: float) -> TokenEvent:
        """End a sequence whose logits are not finite, and withdraw its pages: whatever is wrong may be in any of them."""
        for page in seq.pages:
            self.pool.unpublish(page)
        return self._fail(seq, "The model's logits were not finite (NaN or infinite) for this request.", time)

    def _fail(self, seq: Sequence, error: str, time: float) -> TokenEvent:
        self._finish(seq, Status.FINISHED_ERROR)
        return TokenEvent(seq.request.request_id, None, time, finish=Status.FINISHED_ERROR, error=error)

    # ── beside the steps ────────────────────────────────────────────────────────────────────────────────────────────────

    def lend(self, count: int) -> list[int]:
        """Return pages for a caller that frees them (`pool.release`) before the next step, while none is in flight.

        If too few are free, the scheduler preempts the least urgent running requests, and then drops kept pages.
        """
        while (pages := self.pool.allocate(count)) is None:
            if self.running:
                self._preempt(self.running[-1])
            else:
                self.drop(next(iter(self.kept)))
        return pages

    def drop(self, request_id: str) -> None:
        """Give back what is kept of a request, if anything is."""
        kept = self.kept.pop(request_id, None)
        if kept is not None:
            self.pool.release(kept.pages)

    # ── leaving ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _preempt(self, seq: Sequence) -> None:
        """Make room for others by sending a running sequence back to waiting."""
        self.num_preemptions += 1
        self._close_batch()
        self._send_back(seq)

    def _send_back(self, seq: Sequence) -> None:
        """A running sequence waits again. Its pages go, its tokens stay: they will be computed anew as a prompt."""
        self.running.remove(seq)
        seq.become(Status.PREEMPTED)
        insort(self.waiting, seq, key=_urgency)
        self._release_when_idle(seq)

    def _finish(self, seq: Sequence, status: Status) -> None:
        before = seq.status
        seq.become(status)
        seq.suspect, seq.parent = 0, None
        del self.live[seq.request.request_id]
        if seq.kv is not None:
            seq.kv.cancel()
            seq.kv = None
        if seq.request.keep_pages and status is Status.FINISHED_LENGTH:  # so that no step in flight names it
            self.kept[seq.request.request_id] = RetainedPages(seq.pages, seq.landed)
            seq.pages = []
        if before is Status.RUNNING:
            self.running.remove(seq)
            self._release_when_idle(seq)
        else:
            del self.waiting[bisect_left(self.waiting, seq.urgency, key=_urgency)]

    def _release_when_idle(self, seq: Sequence) -> None:
        """Give back the pages and the row of a sequence that stops running: now, or once no step in flight names them."""
        if seq.in_flight:
            self.leaving.append(seq)
        else:
            self._give_back(seq)

    def _give_back(self, seq: Sequence) -> None:
        self.pool.release(seq.pages)
        self.rows.give_back(seq.row)
        seq.row, seq.pages, seq.computed, seq.landed, seq.published, seq.pending = -1, [], 0, 0, 0, 0


def _refusal(seq: Sequence, token: int) -> str | None:
    """Why it cannot go on by a token that was sampled, if it cannot; else its grammar has gone on."""
    if seq.edits is not None and seq.edits.forbids(token, seq.output):
        return STUCK
    return None if seq.matcher is None else seq.matcher.accept(token)


def _refused(matcher: Matcher, tokens: list[int]) -> str | None:
    """Why a grammar cannot go on by these, if it cannot; else it has."""
    return next((error for token in tokens if (error := matcher.accept(token))), None)
