"""The engine loop: schedule, submit, take the result, update. `ServingEngine`, implemented once over any `ModelRunner`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Listed
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np

from common.batch import KV
from common.config import EngineConfig
from common.config import expect as expect_config
from common.errors import EngineGoneError
from common.interface import Caps, ModelRunner, Progress, ReplicaState, ServingEngine, StepHandle, load_backend
from common.kv_transfer.layout import PageCopier
from common.model.partition import expect_shareable
from common.request import Request, Status, TokenEvent, expect
from common.schedule.embeddings import StatesJob, fail, take_prompts
from common.schedule.scheduler import Scheduler
from common.schedule.sequence import Sequence
from common.schedule.step import Step
from common.step_log import StepRecord, record_step
from common.system.hardware import memory_available
from common.weights.checkpoint import Checkpoint

log = logging.getLogger(__name__)

MAX_POOL_BYTES = 2 << 30
"""Of KV pages, unless `num_blocks` asks for more."""
_PATIENCE_S = 0.01
"""How long a step waits for what must come before a request can run, where there is nothing else to do."""


class Engine(ServingEngine):
    """Continuous batching over one runner that is loaded, allocated and warmed up. `num_pages` counts the null page; it may be
    less than the runner has. The engine owns the runner: `close` closes it. Deadlines are held against `clock`.
    """

    def __init__(
        self, runner: ModelRunner, config: EngineConfig, *, num_pages: int, clock: Callable[[], float] = perf_counter
    ) -> None:
        limit = min(config.max_model_len or runner.caps.max_model_len, runner.caps.max_model_len)
        self.runner, self.config, self._clock = runner, config, clock
        self.scheduler = Scheduler(
            runner.caps,
            num_pages=num_pages,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=limit,
            groups=len(runner.kv_groups()),
            schedule=config.schedule,
            cache=config.cache,
            prefix_caching=config.enable_prefix_caching,
            chunked_prefill=config.enable_chunked_prefill,
            max_waiting=config.max_waiting,
            seed=config.seed,
        )
        self._caps = replace(runner.caps, max_model_len=limit, max_seqs=self.scheduler.max_num_seqs)
        self._masking = ThreadPoolExecutor(1, "masks")  # whose thread starts with the first mask
        self._carrier = PageCopier(runner, config.block_size)
        self._in_flight: deque[tuple[Step, StepHandle, StepRecord | None]] = deque()
        self._jobs: deque[StatesJob] = deque()  # only the first has pages
        self._events: list[TokenEvent] = []  # ends that no step brought: they go out with the next one
        self._counters = dict.fromkeys(
            ("steps", "num_resets", "prompt_tokens", "generation_tokens", "scheduled_tokens", "padded_tokens"), 0
        )
        self._host_seconds = self._device_seconds = self._log_seconds = 0.0

    @property
    def caps(self) -> Caps:
        return self._caps

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self._counters["prompt_tokens"] += len(request.prompt_token_ids)

    def step(self, timeout: float | None = None) -> list[TokenEvent]:
        """One step: up to `caps.depth` others stay in flight. `timeout` is for engines that wait; this one computes."""
        begin, before = perf_counter(), self._device_seconds + self._log_seconds
        if self._jobs:
            self._run_job()  # first, so that no token waits for it
        for name in self.scheduler.expire(self._clock()):
            self._events.append(TokenEvent(name, None, begin, finish=Status.FINISHED_TIMEOUT))
        for name, error in self.scheduler.take_grammars():
            self._events.append(TokenEvent(name, None, begin, finish=Status.FINISHED_ERROR, error=error))
        try:
            step = self.scheduler.schedule()
        except BaseException:  # Ctrl-C above all: requests may have been moved on for a step that will never land
            self._start_over([])
            raise
        if step is not None:
            self.submit(step)
        elif self._jobs:
            pass  # their pages may be those that requests wait for
        elif self.scheduler.live and not self._in_flight and not self.scheduler.await_others(_PATIENCE_S):
            raise RuntimeError("The scheduler has requests, but neither runs nor awaits any; this is a bug.")
        if step is None or len(self._in_flight) > self.caps.depth:
            self._events += self.land()
        events, self._events = self._events, []
        self._host_seconds += perf_counter() - begin - (self._device_seconds + self._log_seconds - before)
        return events

    def submit(self, step: Step) -> None:
        """Start a step of the scheduler. `step` calls this and `land`; a caller that observes the state calls them itself."""
        begin = perf_counter()
        # On a thread of their own, for where the runner dispatches it may as well compute.
        masks = None if step.masks is None else self._masking.submit(step.masks)
        try:
            for pages, kv in step.arrivals:
                self._carrier.write(pages, kv)
            pending = self.runner.submit(step.batch, None if masks is None else masks.result)
            returned = perf_counter()
            record = None if self.step_log is None else self._record(step, begin)
        except BaseException as error:
            self._device_seconds += perf_counter() - begin
            if masks is not None:
                wait([masks])  # no other thread may use the matchers before
            self._recover(step, error)
        else:
            self._device_seconds += returned - begin
            self._log_seconds += 0.0 if record is None else perf_counter() - returned
            self._in_flight.append((step, pending, record))
        self._counters["steps"] += 1
        self._counters["scheduled_tokens"] += step.batch.num_tokens
        chunked = step.batch.num_tokens > int(step.batch.num_decodes[0])
        self._counters["padded_tokens"] += self.caps.bucket(step.batch.num_tokens, chunked) - step.batch.num_tokens

    def land(self) -> list[TokenEvent]:
        """Wait for the oldest step in flight, if any is, and return what became visible. A step that raises is dealt with, here
        as in `submit`."""
        if not self._in_flight:
            return []
        step, pending, record = self._in_flight.popleft()
        begin = perf_counter()
        try:
            result = pending.result()
        except BaseException as error:
            self._recover(step, error)
            return []
        now = perf_counter()
        self._device_seconds += now - begin
        if self.step_log is not None and record is not None:
            self.step_log.append(record._replace(landed=now))
        events = self.scheduler.update(step, result, now)
        self._counters["generation_tokens"] += sum(event.token_id is not None for event in events)
        return events

    def _record(self, step: Step, submitted: float) -> StepRecord:
        """What is to be logged of a step that was just submitted."""
        scheduler, size = self.scheduler, self.config.block_size
        total = scheduler.pool.num_pages - 1
        used = total - scheduler.pool.num_free
        held = empty = 0
        for seq in scheduler.running:
            held += len(seq.pages)
            empty += len(seq.pages) - -(-seq.computed // size)
        held += sum(len(seq.pages) for seq in scheduler.leaving) + sum(len(kept.pages) for kept in scheduler.kept.values())
        record = record_step(step.batch, size, submitted, submitted, sharing=held > used)
        counted = zip(step.seqs, record.counts.tolist(), record.kv_lengths.tolist(), strict=True)
        return record._replace(
            prompt_tokens=sum(n for seq, n, end in counted if n > 1 or end - n < len(seq.request.prompt_token_ids)),
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_used=used,
            pages_total=total,
            pages_empty=empty,
            started=step.started,
        )

    def _start_over(self, suspects: list[Sequence]) -> list[str]:
        """Requeue all requests with their emitted tokens; return the ids of the suspects that end as culprits instead."""
        self._in_flight.clear()
        for job in self._jobs:
            job.start_over()
        self._counters["num_resets"] += 1
        failed = self.scheduler.requeue_all(suspects)
        self.runner.reset()
        return failed

    def _recover(self, step: Step, error: BaseException) -> None:
        """Requeue all requests after `step` raised, as the runner's pages and rows are undefined. All tokens are kept."""
        steps = [step, *(step for step, _, _ in self._in_flight)] if isinstance(error, Exception) else []
        failed = self._start_over(list(dict.fromkeys(seq for step in steps for seq in step.seqs)))
        now = perf_counter()
        message = f"The steps with this request keep raising: {type(error).__name__}: {error}"
        self._events += [TokenEvent(name, None, now, finish=Status.FINISHED_ERROR, error=message) for name in failed]
        if not isinstance(error, Exception):
            raise error
        log.warning("A step of %d requests raised; starting over with all of them.", len(step.seqs), exc_info=error)

    def hidden_states(self, prompts: Listed[Listed[int]]) -> Future[list[np.ndarray]]:
        expect(self.caps.observes, f"The {self.caps.backend} engine does not show its states, so it has no embeddings.")
        some = take_prompts(prompts, self.scheduler.limits, self.scheduler.max_num_seqs, self.caps.vocab_size)
        self._jobs.append(StatesJob(some, self.config.block_size))
        return self._jobs[-1].states

    def _run_job(self) -> None:
        """Run one piece of the first job, on pages that are given back at its end."""
        while self._jobs and self._jobs[0].states.cancelled():
            self.scheduler.pool.release(self._jobs.popleft().pages)
        if not self._jobs:
            return
        job = self._jobs[0]
        while self._in_flight:
            self._events += self.land()
        begin = perf_counter()
        try:
            if not job.pages:
                job.begin(self.runner, self.scheduler.lend(job.num_pages))
            states = job.run_piece(self.runner, self.scheduler.budget)
        except BaseException as error:
            self._jobs.popleft()
            self._start_over([])
            fail(job.states, error)
            if not isinstance(error, Exception):
                raise
            log.warning("The hidden states of %d prompts raised.", len(job.prompts), exc_info=error)
        else:
            if states is not None:
                self._jobs.popleft()
                self.scheduler.pool.release(job.pages)
                self._counters["prompt_tokens"] += job.num_tokens
                if job.states.set_running_or_notify_cancel():
                    job.states.set_result(states)
        self._device_seconds += perf_counter() - begin

    def read_kept(self, request_id: str, start: int, kv: KV) -> list[int]:
        """As `PageCopier.read`, of a request that keeps its pages. Raises `LookupError` if they are gone."""
        kept, stop = self.scheduler.kept.get(request_id), start + kv.tokens
        if kept is None or kept.tokens < stop:
            raise LookupError(f"the engine has no pages of {stop} tokens of request {request_id} (any more)")
        return self._carrier.read(kept.pages, start, kv)

    def drop_kept(self, request_id: str) -> None:
        """Give back what is kept of a request, if anything is."""
        self.scheduler.drop(request_id)

    def drain(self) -> None:
        self.scheduler.draining = True

    def abort(self, request_id: str) -> bool:
        return self._end(request_id, Status.FINISHED_ABORT, None)

    def finish(self, request_id: str, stop_reason: str) -> bool:
        return self._end(request_id, Status.FINISHED_STOP, stop_reason)

    def _end(self, request_id: str, status: Status, stop_reason: str | None) -> bool:
        live = self.scheduler.end(request_id, status)
        if live:
            self._events.append(TokenEvent(request_id, None, perf_counter(), finish=status, stop_reason=stop_reason))
        return live

    @property
    def replicas(self) -> tuple[ReplicaState, ...]:
        return ()

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.live or self._in_flight or self._events or self._jobs)

    def stats(self) -> dict[str, Any]:
        """Return counters since the start.

        `scheduled_tokens` went through the model, and `padded_tokens` were added to fill buckets. `device_seconds` were spent
        in the runner, `log_seconds` on the step log, and `host_seconds` in the rest of `step`. Prefix cache counts are in
        tokens; the external ones count tokens that another engine computed. Of the requests that arrived with output,
        `num_taken_over` found all their KV, and `num_computed_anew` did not. `kv_pool_bytes` is the size of all pages, free
        ones included. `ModelRunner.stats` has the communication of ranks.
        """
        scheduler, pool = self.scheduler, self.scheduler.pool
        return {
            **self._counters,
            "num_preemptions": scheduler.num_preemptions,
            "prefix_cache_queries": scheduler.prefix_cache_queries,
            "prefix_cache_hits": scheduler.prefix_cache_hits,
            "external_prefix_cache_hits": scheduler.external_prefix_cache_hits,
            "num_taken_over": scheduler.num_taken_over,
            "num_computed_anew": scheduler.num_computed_anew,
            "host_seconds": self._host_seconds,
            "device_seconds": self._device_seconds,
            "log_seconds": self._log_seconds,
            "num_running": len(scheduler.running),
            "num_waiting": len(scheduler.waiting),
            "kv_cache_usage": 1 - pool.num_free / max(pool.num_pages - 1, 1),
            "kv_pool_bytes": pool.num_pages * sum(group.page_bytes for group in self.runner.kv_groups()),
            "compilations": self.runner.compilations,
            **self.runner.stats(),
        }

    def reset_prefix_cache(self) -> bool:
        return self.scheduler.pool.forget()

    def close(self) -> None:
        while self._jobs:
            fail(self._jobs.popleft().states, EngineGoneError("This engine was closed before these states were computed."))
        self._masking.shutdown()
        self.runner.close()


def pool_size(config: EngineConfig, max_model_len: int, page_bytes: int) -> int:
    """Return the number of pages to allocate, the null page included.

    It is `num_blocks` where set. Else the pool has room for `max_num_seqs` full contexts, within two limits. One is
    `MAX_POOL_BYTES`, or one full context if that is larger. The other is a quarter of the free memory, which replicas share.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    context = -(-max_model_len // config.block_size)
    share = memory_available() // (4 * config.data_parallel_size)
    affordable = min(share, max(MAX_POOL_BYTES, (1 + context) * page_bytes)) // page_bytes
    expect_config(
        affordable >= 2,
        f"One KV page of {config.block_size} tokens takes {page_bytes} bytes, and there is no memory for two; "
        "lower block_size, or set num_blocks to insist.",
    )
    return min(1 + config.max_num_seqs * context, affordable)


def served_len(config: EngineConfig, positions: int, num_pages: int) -> int:
    """Return the most tokens of prompt plus output that an engine with `num_pages` pages serves.

    An explicit `max_model_len` stays as it is: the scheduler refuses a request that the pool cannot hold. Without one the
    limit is the model's `positions`, or the tokens of the pool where these are fewer.
    """
    if config.max_model_len is not None:
        return config.max_model_len
    room = (num_pages - 1) * config.block_size
    if room < positions:
        log.warning("The model has %d positions and the KV pool holds %d tokens: max_model_len=%d.", positions, room, room)
    return min(positions, room)


def build_engine(
    backend: str,
    checkpoint: Checkpoint,
    config: EngineConfig,
    progress: Progress | None = None,
) -> Engine:
    """An engine of `backend` (`jax`, `torch`), loaded, allocated and warmed up; of several replicas, one."""
    positions = config.model_len(checkpoint.config)
    # Once here, before processes start: each would log it again.
    expect_shareable(checkpoint.config, config.tensor_parallel_size, config.pipeline_parallel_size)
    runner = load_backend(backend, config)
    try:
        runner.load(checkpoint, progress)
        groups = runner.kv_groups()
        page_bytes = sum(group.page_bytes for group in groups)
        num_pages = pool_size(config, positions, page_bytes)
        free = memory_available()
        expect_config(
            runner.caps.device != "cpu" or num_pages * page_bytes <= free,
            f"num_blocks={num_pages} pages of {page_bytes} bytes do not fit the {free} bytes of free memory; "
            f"set it to at most {free // page_bytes}.",
        )
        runner.allocate([num_pages] * len(groups))
        runner.warmup(progress)
        return Engine(runner, replace(config, max_model_len=served_len(config, positions, num_pages)), num_pages=num_pages)
    except BaseException:
        runner.close()
        raise
