"""An engine whose prompts are computed by some processes and gone on with by others: two sets of replicas, which together are
one `ServingEngine`.

A request goes to the one set for its first token, and its pages stay there; then to the other, which fetches them
(`common.kv_transfer.connection`) and goes on behind that token. What does not come is computed there: a prompt's pages are
worth its time, never its tokens. Where the first set cannot take a request, or no replica of it is left, the other computes
all of it.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np

from common.config import EngineConfig
from common.errors import TandemError
from common.interface import Caps, Progress, ReplicaState, ServingEngine
from common.replicas.data_parallel import PATIENCE_S, Replicas
from common.replicas.stats import totals
from common.request import ENGINE_GONE, Request, Status, TokenEvent
from common.sampling.seeds import mix64
from common.schedule.admission import expect_new, expect_room
from common.system.hardware import cores
from common.weights.checkpoint import Checkpoint

log = logging.getLogger(__name__)


class Disaggregated(ServingEngine):
    """`config.prefill_parallel_size` engines of `config.prefill_backend` before `config.data_parallel_size` of `backend`. They
    share the compute threads; what else `config` says is of each, but for `max_waiting`, which is of all."""

    def __init__(self, backend: str, checkpoint: Checkpoint, config: EngineConfig, progress: Progress | None = None) -> None:
        """Start them and wait until all serve. Raises what made one of them fail."""
        before, behind, secret = config.prefill_parallel_size, config.data_parallel_size, secrets.token_hex(32)
        threads = max(1, (config.threads or cores()) // (before + behind))
        each = replace(config, prefill_parallel_size=0, prefill_backend=None, max_waiting=None)
        self._config = config
        self._wakeup = threading.Event()
        self._live: dict[str, Request] = {}
        """As they were asked for."""
        self._first: set[str] = set()
        """Those whose first token is to come yet, and who then go on elsewhere."""
        self._events: list[TokenEvent] = []
        self._draining = False
        self._num_requests = self._prompt_tokens = 0

        def start(backend: str, size: int) -> Replicas:
            part = replace(each, data_parallel_size=size, threads=size * threads)
            return Replicas(backend, checkpoint, part, progress, secret, self._wakeup.set)

        self._prefill = start(config.prefill_backend or backend, before)
        try:
            self._decode = start(backend, behind)
        except BaseException:
            self._prefill.close()
            raise

    @property
    def caps(self) -> Caps:
        prefill, decode = self._prefill.caps, self._decode.caps
        return replace(decode, max_model_len=min(prefill.max_model_len, decode.max_model_len))

    # ── requests come and go ────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, request: Request) -> None:
        self._share_log()  # now, for it runs at once
        most, cap = self._decode.check(request), len(request.output_token_ids) + 1
        parent = None if request.parent is None or self._config.cache == "dense" else self._live.get(request.parent)
        expect_new(request, self._live.get(request.request_id), parent)
        waiting = self._prefill.num_waiting + self._decode.num_waiting
        free = min(self._prefill.num_free_rows, self._decode.num_free_rows - self._prefill.num_running)
        forks = request.parent in self._live
        expect_room(request, waiting, max(free, 0), self._config.max_waiting, draining=self._draining, forks=forks)
        if request.own_seed is None:
            request = replace(request, seed=mix64(self._config.seed, self._num_requests))
        whole = most == cap
        try:
            self._prefill.add(request if whole else replace(request, max_tokens=cap, keep_pages=True))
        except TandemError as error:
            log.warning("Request %s is computed by the replicas that decode: %s", request.request_id, error)
            self._decode.add(request)
        else:
            if not whole:
                self._first.add(request.request_id)
        self._live[request.request_id] = request
        self._num_requests += 1
        self._prompt_tokens += len(request.prompt_token_ids)

    def abort(self, request_id: str) -> bool:
        return self._end(request_id, lambda part: part.abort(request_id))

    def finish(self, request_id: str, stop_reason: str) -> bool:
        return self._end(request_id, lambda part: part.finish(request_id, stop_reason))

    def _end(self, request_id: str, end: Callable[[Replicas], bool]) -> bool:
        """End it where it is; and that is its end."""
        self._events += self._hear()  # it may be on its way from one to the other
        self._first.discard(request_id)
        ended = end(self._decode if self._decode.has(request_id) else self._prefill)
        self._events += self._hear()  # before another of its name comes
        return ended

    def drain(self) -> None:
        self._draining = True

    @property
    def has_work(self) -> bool:
        return bool(self._events) or self._prefill.has_work or self._decode.has_work

    def step(self, timeout: float | None = None) -> list[TokenEvent]:
        """What the replicas have brought. Where that is nothing yet, waits for `timeout`, or a moment."""
        self._share_log()
        self._events += self._hear()
        if not self._events and self.has_work:
            self._wakeup.wait(PATIENCE_S if timeout is None else timeout)
            self._wakeup.clear()
            self._events += self._hear()
        events, self._events = self._events, []
        return events

    def _share_log(self) -> None:
        self._prefill.step_log = self._decode.step_log = self.step_log

    def _hear(self) -> list[TokenEvent]:
        told = [event for first in self._prefill.step(0) for event in self._pass_on(first)]
        told += self._decode.step(0)
        for event in told:
            if event.finish:
                del self._live[event.request_id]
        return told

    def _pass_on(self, event: TokenEvent) -> list[TokenEvent]:
        """Return the events of the caller for one of the replicas that compute prompts. The other replicas take the request if
        it goes on, or if no replica that computes prompts is left. An error there ends this request only."""
        request = self._live[event.request_id]
        first = event.request_id in self._first
        self._first.discard(event.request_id)
        if first and event.finish is Status.FINISHED_LENGTH and event.token_id is not None:
            told, output = [replace(event, finish=None)], (*request.output_token_ids, event.token_id)
        elif event.error is not None and event.error.startswith(ENGINE_GONE):
            told, output = [], request.output_token_ids
        else:
            return [event]
        try:
            self._decode.add(replace(request, output_token_ids=output), self._prefill.offers.pop(request.request_id, None))
        except TandemError as error:
            name, now = request.request_id, perf_counter()
            told.append(TokenEvent(name, None, now, finish=Status.FINISHED_ERROR, error=str(error)))
        return told

    # ── beside the requests ─────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def replicas(self) -> tuple[ReplicaState, ...]:
        """Those that compute prompts first."""
        parts = {"prefill": self._prefill.replicas, "decode": self._decode.replicas}
        return tuple(state._replace(role=role) for role, states in parts.items() for state in states)

    def stats(self) -> dict[str, Any]:
        """As `Replicas.stats`, of all. Of the requests that were passed on, `prompts_handed_over` are those whose pages came,
        and `prompts_recomputed` those whose prompt was computed again."""
        parts = self._prefill.stats(), self._decode.stats()
        told = [each for part in parts for each in part.pop("replicas")]
        usage = totals(told).get("kv_cache_usage", 0.0)  # a mean over all of them alike
        return totals(parts) | {
            "prompt_tokens": self._prompt_tokens,
            "prompts_handed_over": parts[1].get("num_taken_over", 0),
            "prompts_recomputed": parts[1].get("num_computed_anew", 0),
            "kv_cache_usage": usage,
            "replicas": [{**each, "role": state.role} for each, state in zip(told, self.replicas, strict=True)],
        }

    def hidden_states(self, prompts: Sequence[Sequence[int]]) -> Future[list[np.ndarray]]:
        return self._decode.hidden_states(prompts)

    def reset_prefix_cache(self) -> bool:
        return not self.has_work and self._prefill.reset_prefix_cache() and self._decode.reset_prefix_cache()

    def close(self) -> None:
        self._prefill.close()
        self._decode.close()
