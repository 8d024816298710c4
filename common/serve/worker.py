"""The thread that owns the engine. It runs the steps, and executes orders between two steps.

What a step brought reaches the event loop in one call, whatever the number of its tokens. Text is made here too, so that a stop
string ends its request before the next step, as in `common.llm`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

from common.errors import QueueFullError, RequestError, TandemError
from common.interface import ReplicaState, ServingEngine
from common.request import Request, TokenEvent
from common.serve.errors import ApiError, engine_gone
from common.step_log import StepRecord
from common.text.output import Delta, OutputText

log = logging.getLogger(__name__)

T = TypeVar("T")


class Piece(NamedTuple):
    """What one token, or one end, added to one request of a call."""

    number: int
    """Which of the call's requests."""
    delta: Delta
    event: TokenEvent


@dataclass(eq=False)
class Call:
    """The requests of one HTTP request, on the event loop. Iterate over it for what becomes visible, a list a step."""

    requests: Sequence[Request]
    texts: Sequence[OutputText]
    """What follows the output of each."""
    arrival: float = field(default_factory=time.perf_counter)
    """When the HTTP request came."""
    left: int = field(init=False)
    """Requests that have not ended, as far as the reader has read."""
    aborted: bool = False
    """Whether the client has disconnected. It never becomes false again. Any thread may read it."""
    _arrived: asyncio.Queue[list[Piece] | ApiError] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.left = len(self.requests)

    def put(self, news: list[Piece] | ApiError) -> None:
        self._arrived.put_nowait(news)

    async def __aiter__(self) -> AsyncIterator[list[Piece]]:
        """Ends when every request has. Raises `ApiError` if the engine dies."""
        while self.left:
            news = await self._arrived.get()
            if isinstance(news, ApiError):
                raise news
            self.left -= sum(piece.delta.finish is not None for piece in news)
            yield news
            if not self._arrived.empty():  # `get` does not suspend then, and a backlog would block the loop until its end
                await asyncio.sleep(0)


@dataclass(eq=False)
class _Live:
    call: Call
    index: int
    text: OutputText


Order = Callable[[ServingEngine | None], None]
"""What the thread is to do between two steps; without an engine if it has ended meanwhile."""
Observer = Callable[[list[StepRecord], list[tuple[Call, list[Piece]]]], None]
"""Called on the event loop for each step: its records, and what it brought by call."""


class Worker:
    """One engine on a thread of its own. `start` it on the event loop that `run`, `abort` and `ask` are used on."""

    def __init__(self, make_engine: Callable[[], ServingEngine]) -> None:
        """`make_engine` runs on the thread."""
        self._make_engine = make_engine
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._live: dict[str, _Live] = {}
        self._lock = threading.Lock()
        self._dead = self._ending = False
        self._busy_since: float | None = None  # the beginning of the unit of work in progress
        self._loop: asyncio.AbstractEventLoop | None = None
        self._observe: Observer | None = None
        self._stats: tuple[float, dict[str, Any]] = (time.monotonic(), {})
        self._asking: asyncio.Task[None] | None = None
        self._ready: Future[ServingEngine] = Future()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    # ── for the others ───────────────────────────────────────────────────────────────────────────────────────────────────

    def wait_ready(self) -> ServingEngine:
        """Its `caps` may be read; all else is the thread's. Raises what making it raised."""
        return self._ready.result()

    def start(self, observe: Observer | None = None) -> None:
        """Bind the worker to the running event loop."""
        self._loop, self._observe = asyncio.get_running_loop(), observe

    @property
    def parts(self) -> list[list[ReplicaState]]:
        """Its replicas by what they compute: of each part one must serve."""
        parts: dict[str, list[ReplicaState]] = {}
        for each in self.replicas:
            parts.setdefault(each.role, []).append(each)
        return list(parts.values())

    @property
    def hopeless(self) -> bool:
        """Whether no request can be answered any more: the thread has ended, or no replica of a part will be restarted."""
        return self._dead or any(all(each.given_up for each in part) for part in self.parts)

    @property
    def stalled(self) -> float:
        """Seconds that the unit of work in progress has taken so far, be it a step or an order; 0 while the thread waits."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def replicas(self) -> tuple[ReplicaState, ...]:
        """The processes of its engine, where that has several."""
        return self.wait_ready().replicas

    async def run(self, call: Call) -> None:
        """Admit all requests or none. The caller calls `abort` if it leaves before all have ended, also before this returns."""
        await self.ask(lambda engine: self._admit(engine, call))

    def abort(self, call: Call) -> None:
        """End what is left of a call, before the next step, and in the middle of its admission."""
        call.aborted = True
        self._order(lambda engine: self._abort(engine, call))

    async def ask(self, question: Callable[[ServingEngine], T]) -> T:
        """Return the result of `question`, which is called with the engine between two steps."""
        answer: Future[T] = Future()

        def order(engine: ServingEngine | None) -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                if engine is None:
                    raise engine_gone()
                answer.set_result(question(engine))
            except Exception as error:
                answer.set_exception(error)

        if not self._order(order):
            raise engine_gone()
        return await asyncio.wrap_future(answer)

    async def stats(self, patience_s: float) -> tuple[dict[str, Any], float]:
        """Return the statistics of the engine and their age in seconds. They are the last known ones if the engine does not
        answer within `patience_s`, as in a long step."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask_stats())
        await asyncio.wait([self._asking], timeout=patience_s)
        read, stats = self._stats
        return stats, time.monotonic() - read

    async def _ask_stats(self) -> None:
        with contextlib.suppress(ApiError):  # the engine has ended
            await self.ask(self._read_stats)

    def _read_stats(self, engine: ServingEngine) -> None:
        self._stats = time.monotonic(), engine.stats()

    def profile(self, profile: Callable[[Callable[[], object]], T], stop: threading.Event) -> Future[T]:
        """What `profile` says of everything that the thread does from now on until `stop` is set between two steps."""
        found: Future[T] = Future()

        def order(engine: ServingEngine | None) -> None:
            try:
                if engine is None:
                    raise engine_gone()
                found.set_result(profile(lambda: self._work(engine, stop)))
            except Exception as error:
                log.warning("A profile failed.", exc_info=error)
                found.set_exception(error)
            finally:
                if not found.done():
                    found.set_exception(engine_gone())

        if not self._order(order):
            raise engine_gone()
        return found

    def close(self) -> None:
        """End the thread and its engine. Idempotent; waits for the step in progress."""
        self._order(None)
        self._thread.join()

    def _order(self, order: Order | None) -> bool:
        """Whether it will be obeyed."""
        with self._lock:
            if not self._dead:
                self._orders.put(order)
            return not self._dead

    # ── on the thread ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _main(self) -> None:
        try:
            engine = self._make_engine()
        except BaseException as error:
            self._dead = True
            self._ready.set_exception(error)
            return
        engine.step_log = []
        self._read_stats(engine)
        self._ready.set_result(engine)
        try:
            self._work(engine)
        except BaseException as error:
            trace = None if isinstance(error, TandemError) else error  # whose message says enough
            log.critical("The step loop has died, and every request fails from now on: %s", error, exc_info=trace)
        finally:
            self._end(engine)

    def _work(self, engine: ServingEngine, stop: threading.Event | None = None) -> None:
        """Step, and do what is ordered, until the order to end; or until `stop` is set between two steps."""
        while self._handle_command(engine) and not (stop and stop.is_set()):
            self._step(engine)

    def _handle_command(self, engine: ServingEngine) -> bool:
        """Do what was ordered, waiting for an order if there is nothing else to do; False from the order to end on."""
        wait = not engine.has_work
        while not self._ending:
            if wait:
                self._busy_since = None
            try:
                order = self._orders.get(wait)
            except queue.Empty:
                return True
            self._busy_since = time.monotonic()
            if order is None:
                self._ending = True
                break
            order(engine)
            wait = False
        return False

    def _step(self, engine: ServingEngine) -> None:
        if not engine.has_work:
            return
        self._busy_since = time.monotonic()
        events = engine.step()
        fresh: dict[Call, list[Piece]] = {}
        for event in events:
            live = self._live.get(event.request_id)
            if live is None:
                continue  # already ended by a stop string or by the client
            delta = live.text.push(event)
            if delta.finish is not None:
                del self._live[event.request_id]
                if event.finish is None:
                    engine.finish(event.request_id, str(delta.stop_reason))
            fresh.setdefault(live.call, []).append(Piece(live.index, delta, event))
        records, engine.step_log = engine.step_log or [], []
        if records or fresh:
            self._tell(partial(self._deliver, records, list(fresh.items())))

    def _admit(self, engine: ServingEngine, call: Call) -> None:
        try:
            for index, (request, text) in enumerate(zip(call.requests, call.texts, strict=True)):
                if call.aborted:
                    break  # the order to abort is the next
                engine.add(request)
                self._live[request.request_id] = _Live(call, index, text)
        except BaseException as error:
            alone = all(live.call is call for live in self._live.values())
            self._abort(engine, call)
            if isinstance(error, QueueFullError) and alone:
                told = f"{len(call.requests)} prompts and choices are more than this server takes at once, also when it is idle"
                raise RequestError(f"{told}; send them in several requests, or raise max_waiting.") from None
            raise

    def _abort(self, engine: ServingEngine | None, call: Call) -> None:
        for request in call.requests:
            live = self._live.get(request.request_id)
            if live is not None and live.call is call:
                del self._live[request.request_id]
                if engine is not None:
                    engine.abort(request.request_id)

    def _end(self, engine: ServingEngine) -> None:
        with self._lock:
            self._dead = True
        while not self._orders.empty():
            if (order := self._orders.get()) is not None:
                order(None)
        calls = {live.call for live in self._live.values()}
        self._live.clear()
        for call in calls:
            self._tell(partial(call.put, engine_gone()))
        engine.close()

    # ── on the event loop ────────────────────────────────────────────────────────────────────────────────────────────────

    def _tell(self, news: Callable[[], Any]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(news)

    def _deliver(self, records: list[StepRecord], fresh: list[tuple[Call, list[Piece]]]) -> None:
        if self._observe is not None:
            self._observe(records, fresh)
        for call, pieces in fresh:
            call.put(pieces)
