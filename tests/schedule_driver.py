"""Random work for the engine over the history-hash runner, and the invariants that must hold after every step of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.batch import Batch
from common.config import Cache, EngineConfig
from common.engine import Engine
from common.errors import DrainingError, QueueFullError, RequestError
from common.request import Logprobs, Request, SamplingParams, Status, TokenEvent
from common.sampling.seeds import mix64
from common.schedule.fault_isolation import MOST_RAISED
from common.schedule.page_pool import PagePool
from common.schedule.scheduler import Scheduler
from common.schedule.sequence import Sequence
from common.step_log import shared_pages
from tests.history_runner import Expected, HistoryRunner, expected

VOCAB = 32


class Violation(AssertionError):
    """An invariant is broken, or an output is not the oracle's."""


def require(condition: object, message: str) -> None:
    """Like assert, but distinguishable from a bug of the driver."""
    if not condition:
        raise Violation(message)


def free_pages(pool: PagePool) -> list[int]:
    """The free list, front first."""
    pages, page = [], pool._after[0]
    while page:
        pages.append(page)
        page = pool._after[page]
    return pages


def check_pages(scheduler: Scheduler) -> None:
    """Every page is held as often as it is listed, or free, once; the cache and the keys agree (P1 to P5)."""
    pool = scheduler.pool
    holders = [*scheduler.running, *scheduler.leaving]
    held = Counter(page for seq in holders for page in seq.pages)
    held += Counter(page for kept in scheduler.kept.values() for page in kept.pages)
    free = free_pages(pool)
    require(
        len(free) == pool.num_free == len(set(free)),
        "the free list's length differs from its counter, or a page is twice on it",
    )
    require(0 not in free and 0 not in held, "the null page was given out or freed")
    require(len(free) + len(held) == pool.num_pages - 1, "a page is neither free nor held, or both")
    require(
        all(pool.refs[page] == count for page, count in held.items()), "a reference count differs from the number of holders"
    )
    require(not any(pool.refs[page] for page in free), "a page on the free list is referenced")
    listed = {page: digest for digest, pages in pool.cached.items() for page in pages}
    keyed = {page: key.digest for page, key in enumerate(pool.keys) if key is not None}
    require(listed == keyed, "the prefix cache lists other pages than have keys")
    if scheduler.trials.groups:
        require(set(scheduler.running) <= set(scheduler.trials.groups[-1]), "a request runs beside those on trial")
    require(scheduler.prefix_caching or not keyed, "a page is published although prefix caching is off")
    relatives = scheduler.num_forks or scheduler.prefix_caching
    require(
        relatives or max(held.values(), default=1) == 1, "pages are shared although nobody forked and prefix caching is off"
    )
    check_sharing(scheduler)


def check_sharing(scheduler: Scheduler) -> None:
    """A page in two tables stands at the same place in both, is written, and holds the same tokens of the same salt (P4)."""
    size, pool = scheduler.block_size, scheduler.pool
    contents: dict[int, tuple[int, str, tuple[int, ...]]] = {}
    for seq in scheduler.running:
        tokens = (*seq.request.prompt_token_ids, *seq.output)
        for i, page in enumerate(seq.pages):
            shared = pool.refs[page] > 1
            if (i + 1) * size > seq.landed:
                require(i >= seq.published, "a page was published before it was written")
                require(not shared, "a page is shared that one of its holders may still write")
                continue
            content = (i, seq.request.cache_salt, tokens[: (i + 1) * size])
            require(len(content[2]) == (i + 1) * size, "a page was written before the host knows its tokens")
            require(
                contents.setdefault(page, content) == content, "a page is shared by requests with another place, salt or prefix"
            )


def check_sequences(scheduler: Scheduler) -> None:
    """Progress, tables and rows of every request (P6, P14)."""
    size, rows = scheduler.block_size, scheduler.rows
    for seq in scheduler.running:
        total, count = seq.known + seq.pending, len(seq.pages)
        require(seq.status is Status.RUNNING and seq.computed < total, "a running request has nothing left to compute")
        most = len(seq.request.prompt_token_ids) + seq.max_tokens - 1 if scheduler.dense else total
        require((count - 1) * size < most and seq.computed <= count * size, "a request has too many or too few pages")
        require(not scheduler.dense or count * size >= most, "a request of a dense cache lacks pages that it may need")
        require(seq.known == len(seq.request.prompt_token_ids) + len(seq.output), "the count of known tokens is wrong")
        require(rows.pages[seq.row, :count].tolist() == seq.pages, "the page table differs from the pages held")
        require(not rows.pages[seq.row, count:].any(), "a page table is not padded with the null page")
        require(len(seq.output) + seq.pending <= seq.max_tokens, "a step was scheduled past a request's cap")
        require(seq.output[-1:] in ([], [int(rows.tokens[seq.row, seq.known - 1])]), "the last token is not in the table")
    taken = [seq.row for seq in (*scheduler.running, *scheduler.leaving)]
    require(sorted([*taken, *rows.free]) == list(range(len(rows.tokens))), "a row is used twice, or lost")
    for queue in (scheduler.running, scheduler.waiting):
        require(queue == sorted(queue, key=urgency), "a queue is not in the order of urgency")
    queued = [*scheduler.running, *scheduler.waiting]
    require(len(queued) == len(set(queued)), "a request is twice in the queues")
    require(set(scheduler.live.values()) == set(queued), "a live request is in no queue, or a dead one in some")
    require(all(seq.status is not Status.RUNNING for seq in scheduler.waiting), "a running request waits")


def urgency(seq: Sequence) -> tuple[int, int]:
    """The lesser runs first and is preempted last."""
    return seq.request.priority, seq.number


def awaits_parent(seq: Sequence) -> bool:
    """Whether a request may be passed over in the next step, for the parent that it starts from has not written the prompt."""
    parent = seq.parent
    if parent is None or parent.status.finished:
        return False
    if parent.status is Status.RUNNING:
        return parent.landed < len(seq.request.prompt_token_ids)
    return urgency(parent) < urgency(seq)  # a preempted one may run again before it in the same step


def plain(logprobs: Logprobs | None) -> tuple[float, int, list[int]] | None:
    """To be compared."""
    return None if logprobs is None else (logprobs.logprob, logprobs.rank, list(logprobs.top_ids))


def is_late(request: Request, now: float) -> bool:
    return request.deadline is not None and request.deadline <= now


@dataclass
class Order:
    """Who ran and who waited before a step; `check` holds what the step did against it."""

    scheduler: Scheduler

    def __post_init__(self) -> None:
        self.running, self.waiting = list(self.scheduler.running), list(self.scheduler.waiting)
        self.ready = [seq for seq in self.waiting if not seq.in_flight and not awaits_parent(seq)]
        self.admissions = {seq: seq.admissions for seq in self.waiting}
        self.parents = {seq: (seq.parent, seq.parent.admissions) for seq in self.ready if seq.parent}

    def parent_began_again(self, seq: Sequence) -> bool:
        """Return whether the step sent the parent of a request back and admitted it anew, so that its prompt is not written."""
        parent, admissions = self.parents.get(seq, (None, 0))
        return parent is not None and parent.admissions > admissions

    def check(self) -> None:
        joined = [urgency(seq) for seq in self.waiting if seq.admissions > self.admissions[seq]]
        static = self.scheduler.static
        passed = [
            urgency(seq)
            for seq in self.ready
            if seq.admissions == self.admissions[seq]
            and not seq.status.finished
            and not self.parent_began_again(seq)
            and (not static or seq in self.scheduler.batch)
            and (not self.scheduler.trials.groups or seq in self.scheduler.trials.groups[-1])
        ]
        require(not joined or not passed or max(joined) < min(passed), "a request was admitted before a more urgent one")
        gone = [urgency(seq) for seq in self.running if seq.status is Status.PREEMPTED]
        kept = [urgency(seq) for seq in self.running if seq.status is Status.RUNNING]
        require(not gone or not kept or max(kept) < min(gone), "a request gave way to a less urgent one")


def check_whole(scheduler: Scheduler, batches: Iterable[Batch]) -> None:
    """Without chunked prefill every sequence of a step comes to its end in it, but for those that are longer than any step, or
    scored."""
    running = {seq.row: seq for seq in (*scheduler.running, *scheduler.leaving)}
    may = {row for row, seq in running.items() if seq.known > scheduler.budget or seq.scores is not None}
    for batch in batches:
        inside = set(batch.rows.tolist()) - set(batch.rows[batch.logit_owner].tolist())
        require(inside & {*running} <= may, "a prompt was computed in parts")  # who has no row: the step raised


def check_in_flight(engine: Engine) -> None:
    """What a step in flight writes is nobody else's, and is not offered to anybody (P5, P7, P16)."""
    scheduler, pool = engine.scheduler, engine.scheduler.pool
    for step, _, record in engine._in_flight:
        batch = step.batch
        shared = shared_pages(batch.page_table[0]) * scheduler.block_size
        require(
            record is not None and record.shared.tolist() == shared.tolist(), "the log of a step counts shared pages wrongly"
        )
        slots = batch.slots[0].tolist()
        require(len(set(slots)) == len(slots), "two tokens of a step have one slot")
        require(batch.num_tokens <= scheduler.budget, "a step exceeds the token budget")
        require(batch.num_seqs <= scheduler.max_num_seqs, "a step exceeds the number of sequences")
        require(sorted(set(batch.rows.tolist())) == sorted(batch.rows.tolist()), "a row is twice in a step")
        for page in {slot // scheduler.block_size for slot in slots}:
            require(page and pool.refs[page] == 1, "a step in flight writes a page that is free or shared")
            require(pool.keys[page] is None, "a step in flight writes a page that is published")
        for seq, row in zip(step.seqs, batch.rows.tolist(), strict=True):
            require(seq.row == row and row not in scheduler.rows.free, "a row was given back while a step in flight names it")


@dataclass
class Episode:
    """One engine in a random configuration under random work. Deterministic in `seed`, `depth` and `pipelined`."""

    seed: int
    depth: int
    pipelined: bool = False
    finished: Counter = field(default_factory=Counter)
    steps: int = 0
    batches: list[Batch] = field(default_factory=list)
    """Every step that was submitted."""
    errors: list[str] = field(default_factory=list)
    """What requests ended with, of those that ended with one."""
    refused: Counter = field(default_factory=Counter)
    """Requests that could have been served, but not then, by the type of the error."""

    def __post_init__(self) -> None:
        rng = self.rng = random.Random(self.seed)
        self.block_size = rng.choice((1, 2, 4, 4, 8))
        max_seqs = rng.choice((1, 2, 3, 4, 6, 8))
        budget = max_seqs + rng.choice((0, 1, 3, 8, 24))
        buckets = tuple(sorted({budget, *rng.sample(range(1, budget + 1), min(2, budget))})) if rng.random() < 0.3 else ()
        self.max_model_len = rng.randrange(6, 48)
        longest = -(-self.max_model_len // self.block_size)
        num_pages = 2 + int(longest * rng.choice((0.4, 1, 1, 1.3, 3))) + rng.randrange(3)
        self.runner = HistoryRunner(
            num_pages=num_pages,
            block_size=self.block_size,
            vocab_size=VOCAB,
            max_seqs=max_seqs,
            max_logits=budget if budget % 2 else 0,
            depth=self.depth,
            pipelined=self.pipelined,
            buckets=buckets,
            groups=rng.choice((1, 1, 2)),
            nan_token=rng.choice((None, None, 7)),
        )
        cache: Cache = rng.choice(("paged", "paged", "paged", "paged", "dense"))
        self.chunked = rng.random() < 0.8
        config = EngineConfig(
            block_size=self.block_size,
            max_num_seqs=max_seqs,
            max_num_batched_tokens=budget,
            max_model_len=self.max_model_len,
            schedule=rng.choice(("continuous", "continuous", "continuous", "static")),
            cache=cache,
            enable_prefix_caching=cache == "paged" and rng.random() < 0.9,
            enable_chunked_prefill=self.chunked,
            max_waiting=rng.choice((None, None, None, 1, 4)),
            seed=self.seed,
        )
        self.now = 0.0
        self.engine = Engine(self.runner, config, num_pages=num_pages, clock=lambda: self.now)
        self.engine.step_log = []
        self.passed_over: set[str] = set()
        """Requests that waited when the last step was over."""
        self.evictions = 0
        self.priorities = rng.choice(((0,), (0, 0, 0, 1, -(2**63)), range(8)))
        self.stems = [[rng.randrange(VOCAB) for _ in range(self.max_model_len)] for _ in range(3)]
        self.requests: dict[str, tuple[Request, int]] = {}  # live ones, with their arrival numbers
        self.tokens: dict[str, list[TokenEvent]] = {}
        self.ended: dict[str, Status] = {}  # by this driver, terminal event to come
        self.forking = rng.choice((0.0, 0.3, 0.9))
        self.bad: dict[str, int] = {}
        """Requests of which every step raises that computes a token behind so many."""
        self.wicked = rng.choice((0.0, 0.0, 0.0, 0.0, 0.05, 0.3))
        self.runner.poison_of, self.runner.fails_late = self.poison_of, rng.random() < 0.5
        self.changing = rng.choice((0.0, 0.0, 0.1, 0.5))
        self.added = self.injected = 0
        self.deep = self.on_trial = 0
        """Steps behind which as many were in flight as may be, and behind which suspects were still to be tried."""

    def run(self, steps: int) -> None:
        """Random work for so many steps, then none until all is done; every page must be free in the end."""
        for _ in range(steps):
            self.act()
            self.step()
        self.engine.drain()
        self.add()
        for _ in range(100 * (1 + len(self.requests)) * self.max_model_len):
            if not self.engine.has_work:
                break
            self.step()
        require(not self.engine.has_work and not self.requests, "waiting work made no progress")
        started = [name for record in self.engine.step_log or () for name in record.started]
        require(len(started) == len(set(started)), "a request started twice")
        require(self.engine.reset_prefix_cache(), "a page is held although nothing is live")
        pool = self.engine.scheduler.pool
        require(sorted(free_pages(pool)) == list(range(1, pool.num_pages)), "a page is not free in the end")
        require(not pool.cached and not any(pool.keys), "a page is still cached after a reset of the prefix cache")

    def poison_of(self, batch: Batch) -> BaseException | None:
        lengths = dict(zip(batch.rows.tolist(), batch.kv_lengths.tolist(), strict=True))
        for seq in self.engine.scheduler.running:
            at = self.bad.get(seq.request.request_id)
            if at is not None and lengths.get(seq.row, 0) > at:
                return RuntimeError(f"{seq.request.request_id} is poison")
        return None

    def act(self) -> None:
        """Some of what may happen between two steps."""
        rng, draw = self.rng, self.rng.random
        while draw() < 0.3 and len(self.requests) < 12:
            self.add()
        if draw() < 0.04 and self.requests:
            self.end(rng.choice(list(self.requests)))
        if draw() < 0.02:
            held = self.engine.scheduler.pool.num_free < self.engine.scheduler.pool.num_pages - 1
            require(
                self.engine.reset_prefix_cache() != held, "the prefix cache was reset under held pages, or not when it could be"
            )
        if draw() < 0.02 and not self.engine.scheduler.trials.groups:  # on trial it would end a request that is innocent
            where = rng.choice(("fail_submit", "fail_result"))
            setattr(self.runner, where, RuntimeError("injected"))
            self.injected += 1

    def add(self) -> None:
        rng, name = self.rng, f"r{self.added}"
        stem = rng.choice(self.stems)[: rng.randrange(self.max_model_len)]
        prompt = stem + [rng.randrange(VOCAB) for _ in range(rng.choice((0, 1, 1, 2, 5)))]
        parent, salt = None, rng.choice(("", "", "a", "b"))
        if self.requests and rng.random() < self.forking:
            parent = rng.choice(list(self.requests))
            prompt, salt = list(self.requests[parent][0].prompt_token_ids), self.requests[parent][0].cache_salt
        cap = rng.choice((None, 1, 2, 5, 12, 30))
        params = SamplingParams(
            max_tokens=cap,
            min_tokens=rng.randrange((cap or 40) + 1) if rng.random() < 0.3 else 0,
            temperature=rng.choice((0.0, 0.0, 0.5, 1.0)),
            top_k=rng.choice((0, 0, 5)),
            top_p=rng.choice((1.0, 0.5)),
            min_p=rng.choice((0.0, 0.25)),
            seed=rng.choice((None, 0, 2**64 - 1)),
            logprobs=rng.choice((None, None, 0, 3)),
            stop_token_ids=(rng.randrange(VOCAB),) * (rng.random() < 0.3),
            ignore_eos=rng.random() < 0.3,
            **self.changes(),
        )
        eos = (rng.randrange(VOCAB),) * (rng.random() < 0.5)
        words = self.bad_words()
        try:
            request = Request(
                request_id=name,
                prompt_token_ids=prompt,
                params=params,
                eos_token_ids=eos,
                bad_words=words,
                cache_salt=salt,
                parent=parent,
                priority=rng.choice(self.priorities),
                deadline=self.now + rng.choice((-1, 0, 0.5, 3, 10, 50)) if rng.random() < 0.3 else None,
            )
            number, full = self.engine.scheduler.num_requests, self.is_full(parent)
            self.engine.add(request)
        except (QueueFullError, DrainingError) as error:
            scheduler = self.engine.scheduler
            full = full and not scheduler.draining
            require(isinstance(error, QueueFullError) == full, "a request was refused although there was room in the queue")
            require(number == scheduler.num_requests and name not in scheduler.live, "a request that was refused left a trace")
            self.refused[type(error)] += 1
            return
        except RequestError:
            prompt_len, cap = len(prompt), cap or 1
            limit = min(self.max_model_len, (self.runner.num_pages - 1) * self.block_size + 1)
            whole = self.chunked or prompt_len <= self.engine.scheduler.budget
            misfit = not prompt or prompt_len + cap > limit or not whole
            require(misfit or self.masks_all(params, eos, words), "a request was refused that fits")
            return
        require(not self.engine.scheduler.draining, "an engine that drains took a request")
        require(not full, "more wait than may")
        if rng.random() < self.wicked:
            self.bad[name] = rng.randrange(len(prompt) + 5)
        self.requests[name], self.tokens[name] = (request, number), []
        self.added += 1

    def is_full(self, parent: str | None) -> bool:
        """Whether as many wait as may, of a request's choices the first: all of them if one has seen a step go without it, else
        those that find no row."""
        scheduler, limit = self.engine.scheduler, self.engine.config.max_waiting
        if limit is None or parent in scheduler.live:
            return False
        waiting = {seq.request.request_id for seq in scheduler.waiting}
        batch_runs = scheduler.static and any(seq.request.request_id in scheduler.live for seq in scheduler.batch)
        rows = 0 if waiting & self.passed_over or batch_runs else len(scheduler.rows.free)
        return len(waiting) >= limit + rows

    def changes(self) -> dict[str, Any]:
        """What a request may ask of its logits, and of its prompt's: mostly nothing."""
        rng = self.rng
        if rng.random() >= self.changing:
            return {}
        ids = lambda most: tuple(rng.sample(range(VOCAB), rng.randrange(1, most)))  # noqa: E731
        return {
            "presence_penalty": rng.choice((0.0, 0.0, 1.5)),
            "frequency_penalty": rng.choice((0.0, 0.0, -0.25)),
            "repetition_penalty": rng.choice((1.0, 1.0, 1.25)),
            "logit_bias": rng.choice((None, {token: rng.choice((-100.0, 3.0)) for token in ids(4)})),
            "allowed_token_ids": rng.choice((None, None, ids(VOCAB))),
            "prompt_logprobs": rng.choice((None, 0, 3)),
        }

    def bad_words(self) -> list[tuple[int, ...]]:
        rng = self.rng
        some = rng.randrange(1, 9) if rng.random() < self.changing / 2 else 0
        return [tuple(rng.randrange(VOCAB) for _ in range(rng.choice((1, 2, 2, 3)))) for _ in range(some)]

    def masks_all(self, params: SamplingParams, eos: Iterable[int], words: Iterable[tuple[int, ...]]) -> bool:
        """Whether a request may be refused because it leaves no token to choose."""
        never = {word[0] for word in words if len(word) == 1}
        early = {*params.stop_token_ids, *(() if params.ignore_eos else eos)} if params.min_tokens else set()
        return params.allowed_token_ids is not None and {*params.allowed_token_ids} <= never | early

    def end(self, name: str) -> None:
        if self.rng.random() < 0.3:
            require(self.engine.finish(name, "stop"), "a live request could not be finished")
            self.ended[name] = Status.FINISHED_STOP
        else:
            require(self.engine.abort(name), "a live request could not be aborted")
            self.ended[name] = Status.FINISHED_ABORT
        require(not self.engine.abort(name), "a request was aborted twice")
        for other in (name[:-1], name + "0"):
            require(other in self.requests or not self.engine.abort(other), "a request was aborted by an id like its own")

    def step(self) -> None:
        pool, cached = self.engine.scheduler.pool, [key is not None for key in self.engine.scheduler.pool.keys]
        scheduler, preemptions = self.engine.scheduler, self.engine.scheduler.num_preemptions
        order, faults = Order(scheduler), self.runner.faults
        self.now += self.rng.choice((0.0, 0.1, 1.0))
        new = [seq for seq in scheduler.waiting if seq.status is Status.WAITING and not is_late(seq.request, self.now)]
        batch = set(scheduler.batch)
        self.runner.batches = []
        events = self.engine.step()
        self.passed_over = {seq.request.request_id for seq in scheduler.waiting}
        self.batches += self.runner.batches
        if scheduler.static:
            require({seq for seq in new if seq.admissions} <= scheduler.batch, "a request runs outside of the batch")
            if not scheduler.batch <= batch:
                over = all(seq.status.finished and not seq.in_flight for seq in batch)
                require(
                    over and scheduler.batch <= set(new[: scheduler.max_num_seqs]), "a request joined a batch that had begun"
                )
            ran_out = scheduler.num_preemptions > preemptions
            require(not ran_out or all(seq.admissions for seq in scheduler.batch), "a batch stays open without pages for it")
        if not scheduler.chunked_prefill:
            check_whole(scheduler, self.runner.batches)
        self.evictions += sum(before and pool.keys[page] is None for page, before in enumerate(cached))
        self.steps += 1
        self.deep += len(self.engine._in_flight) == self.depth
        self.on_trial += bool(scheduler.trials.groups)
        require(self.engine.stats()["num_resets"] == self.runner.faults, "the runner raised of itself")
        tries = 1 + (scheduler.max_num_seqs - 1).bit_length() + MOST_RAISED  # all, halves, alone
        require(self.runner.faults <= self.injected + tries * len(self.bad), "a culprit was not found by halving")
        if scheduler.trials.groups:
            self.runner.fail_submit = self.runner.fail_result = None
        require(not self.runner.violations, f"the runner saw {self.runner.violations[:1]}")
        check_pages(scheduler)
        check_sequences(scheduler)
        check_in_flight(self.engine)
        if self.runner.faults == faults:
            order.check()
        self.runner.poison([page for page in free_pages(scheduler.pool) if scheduler.pool.keys[page] is None])
        finished = [event.request_id for event in events if event.finish]
        require(all(name in finished for name in self.ended), "an aborted request did not end with the next step")
        late = [name for name, (request, _) in self.requests.items() if is_late(request, self.now)]
        require(all(name in finished for name in late), "a request outlived its deadline")
        for event in events:
            require(event.request_id in self.requests, "an event of a request that is over, or never was")
            if event.token_id is not None:
                self.tokens[event.request_id].append(event)
            if event.finish:
                self.judge(event)

    def judge(self, event: TokenEvent) -> None:
        """Hold a request that has ended against the oracle."""
        name = event.request_id
        request, number = self.requests.pop(name)
        events = self.tokens.pop(name)
        room = min(self.max_model_len, (self.runner.num_pages - 1) * self.block_size + 1) - len(request.prompt_token_ids)
        right = expected(
            request,
            vocab_size=VOCAB,
            max_tokens=room,
            seed=mix64(self.seed, number),
            nan_token=self.runner.nan_token,
        )
        got = [e.token_id for e in events]
        ended = self.ended.pop(name, None)
        cut = ended or (Status.FINISHED_TIMEOUT if is_late(request, self.now) else None)
        if event.error and "raising" in event.error:
            require(name in self.bad, "an innocent request was ended for a step that raised")
            cut = Status.FINISHED_ERROR
        require(event.finish is (cut or right.finish), f"{name} ended with {event.finish}, not {cut or right.finish}")
        require(got == (right.tokens[: len(got)] if cut else right.tokens), f"{name} gave {got}, not {right.tokens}")
        self.judge_details(request, events, right)
        self.finished[event.finish] += 1
        self.errors += [event.error] if event.error else []

    def judge_details(self, request: Request, events: list[TokenEvent], right: Expected) -> None:
        k = request.params.logprobs
        for i, event in enumerate(events):
            scores, scored = (right.prompt_logprobs if i == 0 else None), event.prompt_logprobs
            same = (scored is None) == (scores is None) and [*map(plain, scored or ())] == [*map(plain, scores or ())]
            require(same, f"{request.request_id} token {i} has the prompt scores {scored}, not {scores}")
            got, want = plain(event.logprobs), plain(None if k is None else right.logprobs(i, k, VOCAB))
            require(got == want, f"{request.request_id} token {i} has logprobs {got}, not {want}")
            if event.finish is Status.FINISHED_STOP and event.token_id is not None:
                by_eos = event.token_id in request.eos_token_ids and not request.params.ignore_eos
                require(event.stop_reason == (None if by_eos else event.token_id), "the stop reason is wrong")
        require(all(np.diff([e.time for e in events]) >= 0), "time stamps run backwards")
