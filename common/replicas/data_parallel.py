"""An engine that is several: replicas in processes of their own behind a router, which together are one `ServingEngine`.

A request is sent to one replica and goes by a number there, a new one each time it is sent, so that what a replica says of a
request that is no longer its own finds nobody. When a replica ends, its requests go on elsewhere behind the tokens that they
have, as after a preemption; since a token depends on its request, its seed and its place alone, they are those that it would
have had. Seeds are drawn here, so that they are those of one engine.

One of the requests may be why the replica ended. Those with which two replicas have ended are suspects, tried one by one: each
has a replica to itself. A suspect that comes past the place where it stood is cleared. If the replica ends, the suspect is
tried once more, behind the other suspects, and ends if that replica ends too. So no request ends because of another one, and
three accidents in a row end none.

All of this is on the caller's thread; what threads there are only read and write pipes (`common.replicas.supervisor`).
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from time import perf_counter
from typing import Any

import numpy as np

from common.config import EngineConfig
from common.config import expect as expect_config
from common.errors import BackendError, EngineGoneError, by_name
from common.interface import Caps, Progress, ReplicaState, ServingEngine
from common.kv_transfer.connection import SECRET
from common.process.agents import agents
from common.process.frames import Frame, Message
from common.replicas.messages import pack_request, unpack_caps, unpack_event
from common.replicas.router import Router, remaining_tokens
from common.replicas.stats import GAUGES, totals
from common.replicas.supervisor import Exited, Link, Ready, Reported, Supervisor, SupervisorEvent
from common.request import ENGINE_GONE, Request, Status, TokenEvent
from common.sampling.seeds import mix64
from common.schedule.admission import Limits, expect_new, expect_room
from common.schedule.embeddings import fail, take_prompts
from common.schedule.page_pool import PageKey
from common.schedule.prepare import prepared
from common.step_log import StepRecord
from common.system.hardware import cores, family_memory, thread_settings
from common.weights.checkpoint import Checkpoint

log = logging.getLogger(__name__)

SUSPECT_DEATHS = 2
"""Replicas that end while they have a request, until it gets a replica to itself."""
MOST_DEATHS = 4
"""Replicas that end while they have a request, until it ends too."""
PATIENCE_S = 0.005
"""How long a step waits for news where the caller does not say: others of its thread may want something meanwhile."""


@dataclass(eq=False)
class _Live:
    """A request that has not ended."""

    request: Request
    output: list[int]
    deaths: int = 0
    place: int = 0
    """Output tokens that it had when the last of those replicas ended."""
    keys: list[PageKey] = field(default_factory=list)
    """As the router has them, of the tokens that it had when they were last asked for."""
    most: int = 0
    """Output tokens that it can come to have."""
    prefill: int = 0
    """Tokens of its context that its replica has still to compute, as far as known: 0 once a new token has come."""
    number: int = -1
    """By which the replica knows it."""
    place_there: int = 0
    """Its place among all that were sent to that process, from 1."""
    replica: _Replica | None = None
    """None while it waits for one to serve."""
    offer: Sequence[Any] | None = None
    """Where pages of its prompt are held, or were, as `Replicas.offers` has it."""

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.request.prompt_token_ids, *self.output)

    @property
    def load(self) -> int:
        """Tokens that its replica has still to compute for it."""
        return remaining_tokens(self.prefill, len(self.output), self.most)

    @property
    def suspect(self) -> bool:
        """Whether it may run alone only."""
        return self.deaths >= SUSPECT_DEATHS


@dataclass(eq=False)
class _Ask:
    """Prompts whose hidden states a replica computes."""

    prompts: Sequence[Sequence[int]]
    states: Future[list[np.ndarray]] = field(default_factory=Future)
    deaths: int = 0

    @property
    def load(self) -> int:
        return sum(map(len, self.prompts))


@dataclass(eq=False)
class _Replica:
    """What is known of one."""

    keeper: Supervisor
    link: Link | None = None
    """None while it does not serve."""
    num_pages: int = 0
    live: dict[int, _Live] = field(default_factory=dict)
    asks: dict[int, _Ask] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    """As it last told them."""
    sent: int = 0
    taken: int = 0
    """Requests that were sent to this process, and of which it knew when it told its `stats`."""
    known: int = 0
    """Of which it has begun to take notice."""
    logs: bool = False
    given_up: bool = False

    @property
    def load(self) -> int:
        """Tokens that it has still to compute."""
        return sum(live.load for live in self.live.values()) + sum(ask.load for ask in self.asks.values())


class Replicas(ServingEngine):
    """`config.data_parallel_size` engines of `backend`. They share the compute threads; what else `config` says is of each, but
    for `max_waiting`, which is of all."""

    def __init__(
        self,
        backend: str,
        checkpoint: Checkpoint,
        config: EngineConfig,
        progress: Progress | None = None,
        secret: str = "",
        ring: Callable[[], object] = lambda: None,
    ) -> None:
        """Start them and wait until all serve. Raises what made one of them fail. With a `secret` they hand over pages to all
        that have the same. `ring` is called, on a thread, when there is something to hear."""
        size = config.data_parallel_size
        threads = max(1, (config.threads or cores()) // size)
        options = asdict(replace(config, threads=threads, max_waiting=None))
        self._backend, self._config = backend, config
        self._news: queue.SimpleQueue[SupervisorEvent] = queue.SimpleQueue()
        self.offers: dict[str, Sequence[Any]] = {}
        """By the id of a request that has ended and keeps its pages: where they are to be had, for `add`."""
        main, arguments = "common.replicas.worker:main", (backend, str(checkpoint.path), options)
        environment = thread_settings(threads) | ({SECRET: secret} if secret else {})

        def post(news: SupervisorEvent) -> None:
            self._news.put(news)
            ring()

        def again(told: Message) -> Sequence[Any]:
            """A replica that is started again has as many pages as before, whatever memory is free then."""
            return backend, str(checkpoint.path), options | {"num_blocks": told["limits"]["num_pages"] + 1}

        self._replicas = [_Replica(Supervisor(i, main, arguments, environment, post, again)) for i in range(size)]
        self._router = Router(config.routing, size, config.block_size)
        self._live: dict[str, _Live] = {}
        self._quarantined: _Live | None = None
        """The one suspect that a replica has, and nobody beside it."""
        self._numbers = count()
        self._num_requests = 0
        self._draining = False
        self._events: list[TokenEvent] = []
        self._unsent: list[_Ask] = []
        self._answers: dict[int, Frame] = {}
        self._lost: dict[str, float] = {}  # what replicas that have ended had counted
        self._counters = dict.fromkeys(("prompt_tokens", "generation_tokens", "num_replicas_lost", "num_recomputed"), 0)
        self._caps: Caps | None = None
        self._limits: Limits | None = None
        try:
            while not all(replica.link for replica in self._replicas):
                self._await_start(self._news.get(), progress)
        except BaseException:
            self.close()
            raise

    def _await_start(self, news: SupervisorEvent, progress: Progress | None) -> None:
        match news:
            case Exited(_, how, error, _):
                raise (error and by_name(**error)) or EngineGoneError(
                    f"A replica of this engine {how} before it served; its log says more."
                )
            case Reported(index, Frame({"progress": (done, total, what)})):
                if progress and index == 0:  # all load the same
                    progress(done, total, what)
            case _:
                self._take(news)

    # ── requests come and go ────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def caps(self) -> Caps:
        assert self._caps
        return self._caps

    def add(self, request: Request, offer: Sequence[Any] | None = None) -> None:
        """`offer`: where pages of its prompt are to be had."""
        most = self.check(request)
        if request.own_seed is None:
            request = replace(request, seed=mix64(self._config.seed, self._num_requests))
        self._num_requests += 1
        self._counters["prompt_tokens"] += len(request.prompt_token_ids)
        self._live[request.request_id] = live = _Live(request, list(request.output_token_ids), most=most, offer=offer)
        self._send(live)

    def has(self, request_id: str) -> bool:
        """Whether it is live."""
        return request_id in self._live

    def check(self, request: Request) -> int:
        """How many output tokens a request can come to have. Raises what `add` would."""
        assert self._limits
        self._hear(0)
        self._expect_able()
        prepared(request, self.caps.vocab_size)  # refuses ids that are no tokens, and masks that leave none
        twin, parent = self._live.get(request.request_id), self._parent(request)
        expect_new(request, twin.request if twin else None, parent.request if parent else None)
        most = self._limits.max_tokens(request)
        room = self.num_waiting, self.num_free_rows, self._config.max_waiting
        expect_room(request, *room, draining=self._draining, forks=request.parent in self._live)
        return most

    def _parent(self, request: Request) -> _Live | None:
        if request.parent is None or self._config.cache == "dense":
            return None
        return self._live.get(request.parent)

    def _send(self, live: _Live) -> None:
        """To the replica of its parent, whose pages it starts from, or to the one that the router chooses; if there is none for
        it, it waits. One that is suspect waits until no other is tried, and then has a replica to itself."""
        self._tell_whether_to_log()
        quarantine = self._quarantined.replica if self._quarantined else None
        loads = {i: replica.load for i, replica in enumerate(self._replicas) if replica.link and replica is not quarantine}
        if not loads or (live.suspect and self._quarantined):
            return
        request, tokens = live.request, live.tokens
        live.keys = self._router.keys(tokens, request.cache_salt, live.keys)
        parent = None if live.output or live.suspect else self._parent(request)
        beside = parent.replica if parent is not None and parent.replica is not quarantine else None
        if beside is None:
            index, cached = self._router.choose(live.keys, loads)
        else:
            index, cached = self._replicas.index(beside), len(tokens) - 1
        others = []
        if live.suspect:
            self._quarantined, others = live, [self._recall(other) for other in list(self._replicas[index].live.values())]
            self._recall_asks(self._replicas[index])
        live.prefill = 1 if live.offer else len(tokens) - cached
        replica = live.replica = self._replicas[index]
        assert replica.link
        live.number = next(self._numbers)
        replica.live[live.number] = live
        replica.sent += 1
        live.place_there = replica.sent
        self._router.sent(index, live.keys, replica.num_pages)
        number = parent.number if parent is not None and beside is not None else None
        message, data = pack_request(live.number, number, replace(request, output_token_ids=tuple(live.output)))
        replica.link.send({"order": "add", "offer": live.offer} | message, data)
        for other in others:
            self._send(other)
        self._send_asks()

    def _recall(self, live: _Live) -> _Live:
        """Take it from the replica that has it, to be sent anew."""
        replica = live.replica
        assert replica and replica.link
        replica.link.send({"order": "abort", "number": live.number})
        del replica.live[live.number]
        live.replica = None
        self._counters["num_recomputed"] += 1
        return live

    def _send_waiting(self) -> None:
        """Send the requests that wait for a replica, suspects first, and of those the ones with the fewest deaths."""
        waiting = [live for live in self._live.values() if live.replica is None]
        for live in sorted(waiting, key=lambda live: (not live.suspect, live.deaths if live.suspect else 0)):
            self._send(live)
        self._send_asks()

    def _acquit(self, live: _Live) -> None:
        """It is on trial, and has come past the place where it stood when replicas ended. If another is to be tried, it goes
        elsewhere, for that one is to be alone."""
        live.deaths, self._quarantined = 0, None
        if any(other.suspect for other in self._live.values()):
            self._recall(live)
        self._send_waiting()

    def abort(self, request_id: str) -> bool:
        return self._end(request_id, Status.FINISHED_ABORT, None)

    def finish(self, request_id: str, stop_reason: str) -> bool:
        return self._end(request_id, Status.FINISHED_STOP, stop_reason)

    def _end(self, request_id: str, status: Status, stop_reason: str | None) -> bool:
        live = self._live.get(request_id)
        if live is None:
            return False
        if live.replica is not None and live.replica.link:
            live.replica.link.send({"order": "abort", "number": live.number})
        self._leave(live, TokenEvent(request_id, None, perf_counter(), finish=status, stop_reason=stop_reason))
        return True

    def _leave(self, live: _Live, event: TokenEvent) -> None:
        """It ends with this event."""
        del self._live[live.request.request_id]
        if live.replica is not None:
            del live.replica.live[live.number]
            keys = self._router.keys(live.tokens, live.request.cache_salt, live.keys)
            self._router.sent(self._replicas.index(live.replica), keys, live.replica.num_pages)
        self._events.append(event)
        if self._quarantined is live:
            self._quarantined = None
            self._send_waiting()

    def drain(self) -> None:
        self._draining = True

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._events or self._has_asks)

    def step(self, timeout: float | None = None) -> list[TokenEvent]:
        """What the replicas have brought. Where that is nothing yet, waits for `timeout`, or a moment."""
        self._tell_whether_to_log()
        self._hear(0)
        self._expire(perf_counter())
        if self._has_asks:
            self._drop_cancelled()
        if not self._events and (self._live or self._has_asks):
            self._hear(PATIENCE_S if timeout is None else timeout)
        events, self._events = self._events, []
        return events

    def _expire(self, now: float) -> None:
        """End those whose deadline comes while no replica has them; each replica ends its own."""
        held = [live.request for live in self._live.values() if live.replica is None]
        for request in held:
            if request.deadline is not None and request.deadline <= now:
                self._end(request.request_id, Status.FINISHED_TIMEOUT, None)

    # ── what the replicas say ───────────────────────────────────────────────────────────────────────────────────────────

    def _hear(self, timeout: float) -> None:
        """Take in all that has come, and wait for something if nothing has."""
        try:
            self._take(self._news.get(timeout=timeout) if timeout > 0 else self._news.get_nowait())
            while True:
                self._take(self._news.get_nowait())
        except queue.Empty:
            pass

    def _take(self, news: SupervisorEvent) -> None:
        replica = self._replicas[news.replica]
        match news:
            case Ready(index, told, link):
                self._admit(index, replica, told, link)
                if self._counters["num_replicas_lost"]:
                    log.info("Replica %d serves again.", index)
            case Reported(_, Frame({"answer": int(ask)}) as frame) if ask in replica.asks:
                self._resolve(replica.asks.pop(ask), frame)
            case Reported(_, Frame({"answer": int(ask)}) as frame):
                self._answers[ask] = frame
            case Reported(_, Frame({"known": int(known)})):
                replica.known = known
            case Reported(_, Frame({"events": events, "records": records, "stats": stats, "taken": taken, "offers": offers})):
                replica.stats, replica.taken = stats, taken
                for offer in offers:
                    if live := replica.live.get(int(offer[1])):
                        self.offers[live.request.request_id] = offer
                if self.step_log is not None:
                    self.step_log += [self._named(replica, StepRecord.of(values)) for values in records]
                for values in events:
                    self._pass_on(replica, *unpack_event(values))
            case Exited():
                self._on_exit(news, replica)

    def _admit(self, index: int, replica: _Replica, told: Message, link: Link) -> None:
        """A replica serves."""
        caps, limits = unpack_caps(told["caps"]), Limits(**told["limits"])
        expect_config(
            caps.device == "cpu" or len(self._replicas) == 1,
            f"data_parallel_size={len(self._replicas)} has replicas that compute on cpu, not {caps.device}.",
        )
        replica.link, replica.stats, replica.num_pages = link, told["stats"], limits.num_pages
        replica.sent = replica.taken = replica.known = 0
        replica.logs = False
        # What only an engine in this process has, its runner, nobody sees here.
        self._caps = replace(caps, max_seqs=caps.max_seqs * len(self._replicas), observes=False)
        if self._limits is None or limits.num_pages < self._limits.num_pages:
            self._limits = limits  # a request may come to any of them
        self._send_waiting()

    def _pass_on(self, replica: _Replica, number: int, event: TokenEvent) -> None:
        live = replica.live.get(number)
        if live is None:
            return  # aborted meanwhile
        event = replace(event, request_id=live.request.request_id)
        if event.token_id is not None:
            live.output.append(event.token_id)
            live.prefill = 0
            self._counters["generation_tokens"] += 1
        if event.finish is not None:
            self._leave(live, event)
            return
        self._events.append(event)
        if self._quarantined is live and len(live.output) > live.place + self.caps.depth:  # so many it may have had untold
            self._acquit(live)

    def _named(self, replica: _Replica, record: StepRecord) -> StepRecord:
        """A step with its requests by the names that they have here."""
        started = [replica.live[int(number)] for number in record.started if int(number) in replica.live]
        return record._replace(started=tuple(live.request.request_id for live in started))

    def _on_exit(self, news: Exited, replica: _Replica) -> None:
        """A replica has ended: its requests go on elsewhere."""
        left, replica.live, replica.link, replica.given_up = list(replica.live.values()), {}, None, news.given_up
        self._router.forget(news.replica)
        for name, value in replica.stats.items():
            if name not in GAUGES:
                self._lost[name] = self._lost.get(name, 0) + value
        replica.stats = {}
        self._counters["num_replicas_lost"] += 1
        log.warning(
            "Replica %d %s%s; its %d requests go on elsewhere.",
            news.replica, news.how, " once more, and is given up" if news.given_up else "", len(left),
        )  # fmt: skip
        asks, replica.asks = list(replica.asks.values()), {}
        for ask in asks:
            ask.deaths += 1
        self._unsent += asks
        for live in left:
            live.deaths += live.place_there <= replica.known  # of what it never heard of it has not died
            live.place, live.replica = len(live.output), None
        self._quarantined = None if self._quarantined in left else self._quarantined
        for live in left:
            if live.deaths >= MOST_DEATHS:
                self._fail(live, f"{live.deaths} replicas have ended while they had this request; the last {news.how}.")
            else:
                self._counters["num_recomputed"] += 1
        self._send_waiting()
        if self._all_failed:
            for live in list(self._live.values()):
                self._fail(live, f"{ENGINE_GONE}; the last {news.how}.")
            while self._unsent:
                fail(self._unsent.pop().states, EngineGoneError(f"{ENGINE_GONE}; the last {news.how}."))

    def _fail(self, live: _Live, error: str) -> None:
        name, now = live.request.request_id, perf_counter()
        self._leave(live, TokenEvent(name, None, now, finish=Status.FINISHED_ERROR, error=error))

    @property
    def _all_failed(self) -> bool:
        return all(replica.given_up for replica in self._replicas)

    def _expect_able(self) -> None:
        if self._all_failed:
            raise EngineGoneError(f"{ENGINE_GONE}; its log says more. Make a new engine.")

    # ── beside the requests ─────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def replicas(self) -> tuple[ReplicaState, ...]:
        return tuple(replica.keeper.state._replace(backend=self._backend) for replica in self._replicas)

    def stats(self) -> dict[str, Any]:
        """`totals` of what `Engine.stats` tells over the replicas, those that have ended included.
        `prompt_tokens` and `generation_tokens` are counted here, so that what is computed anew counts once. `replicas` has what
        each tells, and `others_rss_bytes` and `others_peak_rss_bytes` say what their processes hold and have held."""
        self._hear(0)
        told = [replica.stats for replica in self._replicas if replica.link]
        held, most = family_memory([state.pid for state in self.replicas if state.pid])
        if agents():  # whose ranks are theirs, and no replica's
            held += sum(stats.get("others_rss_bytes", 0) for stats in told)
            most += sum(stats.get("others_peak_rss_bytes", 0) for stats in told)
        nobody = {"num_running": 0, "kv_cache_usage": 0.0, "kv_pool_bytes": 0}  # where none serves
        return (nobody | totals([self._lost, *told])) | {
            **self._counters,
            "num_waiting": self.num_waiting,
            "others_rss_bytes": held,
            "others_peak_rss_bytes": most,
            "replicas": [{"serves": replica.link is not None, **replica.stats} for replica in self._replicas],
        }

    @property
    def num_waiting(self) -> int:
        """Requests that wait: for a replica, or in one that has said so or does not know of them yet."""
        sent = sum(replica.stats["num_waiting"] + replica.sent - replica.taken for replica in self._replicas if replica.link)
        return int(sent) + sum(live.replica is None for live in self._live.values())

    @property
    def num_free_rows(self) -> int:
        """As `Scheduler.num_free_rows`, of the replicas that serve, as far as they have told."""
        told = [replica.stats for replica in self._replicas if replica.link]
        if any(live.replica is None for live in self._live.values()) or any(stats["num_waiting"] for stats in told):
            return 0
        return self.caps.max_seqs // len(self._replicas) * len(told) - self.num_running

    @property
    def num_running(self) -> int:
        """Requests that hold a row, as far as the replicas have told."""
        return sum(int(replica.stats["num_running"]) for replica in self._replicas if replica.link)

    def _tell_whether_to_log(self) -> None:
        on = self.step_log is not None
        for replica in self._replicas:
            if replica.link and replica.logs != on:
                replica.logs = on
                replica.link.send({"order": "log", "on": on})

    def hidden_states(self, prompts: Sequence[Sequence[int]]) -> Future[list[np.ndarray]]:
        """Have the replica with the least to do compute them."""
        assert self._limits
        self._hear(0)
        self._expect_able()
        some = take_prompts(prompts, self._limits, self.caps.max_seqs // len(self._replicas), self.caps.vocab_size)
        ask = _Ask(some)
        self._unsent.append(ask)
        self._send_asks()
        return ask.states

    @property
    def _has_asks(self) -> bool:
        return bool(self._unsent) or any(replica.asks for replica in self._replicas)

    def _send_asks(self) -> None:
        """Send those that wait for a replica, if one serves that is not on trial."""
        quarantine = self._quarantined.replica if self._quarantined else None
        serving = [replica for replica in self._replicas if replica.link and replica is not quarantine]
        unsent, self._unsent = (self._unsent, []) if serving else ([], self._unsent)
        for ask in unsent:
            if ask.deaths >= MOST_DEATHS:
                why = f"{ask.deaths} replicas have ended while they computed these states; their log says more."
                fail(ask.states, BackendError(why))
                continue
            replica, number = min(serving, key=lambda replica: replica.load), next(self._numbers)
            assert replica.link
            replica.asks[number] = ask
            data = np.concatenate([np.array(prompt, np.int32) for prompt in ask.prompts]).tobytes()
            replica.link.send({"order": "states", "ask": number, "lengths": list(map(len, ask.prompts))}, data)

    def _recall_asks(self, replica: _Replica) -> None:
        """Take from a replica the states that it computes, to be sent anew."""
        assert replica.link
        for number in replica.asks:
            replica.link.send({"order": "cancel states", "ask": number})
        self._unsent += replica.asks.values()
        replica.asks.clear()

    def _drop_cancelled(self) -> None:
        """Forget the states whose futures were cancelled."""
        self._unsent = [ask for ask in self._unsent if not ask.states.cancelled()]
        for replica in self._replicas:
            for number in [number for number, ask in replica.asks.items() if ask.states.cancelled()]:
                del replica.asks[number]
                if replica.link:
                    replica.link.send({"order": "cancel states", "ask": number})

    def _resolve(self, ask: _Ask, frame: Frame) -> None:
        """Give its future what a replica has answered."""
        if error := frame.message.get("failed"):
            fail(ask.states, by_name(**error) or BackendError(error["message"]))
            return
        shapes = frame.message["shapes"]
        ends = np.cumsum([rows * columns for rows, columns in shapes])[:-1]
        parts = np.split(np.frombuffer(frame.data, np.float32), ends)
        self._counters["prompt_tokens"] += ask.load
        if ask.states.set_running_or_notify_cancel():
            ask.states.set_result([part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])

    def _ask(self, replica: _Replica, message: Message) -> Frame | None:
        """Its answer, while events are kept for the next step; None if it ends before."""
        link, ask = replica.link, next(self._numbers)
        assert link
        link.send(message | {"ask": ask})
        while ask not in self._answers and replica.link is link:
            self._hear(PATIENCE_S)
        return self._answers.pop(ask, None)

    def reset_prefix_cache(self) -> bool:
        self._hear(0)
        if self._live or self._has_asks:
            return False
        for index, replica in enumerate(self._replicas):
            frame = self._ask(replica, {"order": "forget"}) if replica.link else None
            if frame is not None and not frame.message["done"]:
                return False
            self._router.forget(index)
        return True

    def close(self) -> None:
        for ask in [*self._unsent, *(ask for replica in self._replicas for ask in replica.asks.values())]:
            if not ask.states.done():
                fail(ask.states, EngineGoneError("This engine was closed before these states were computed."))
        for end in (Supervisor.close, Supervisor.join):
            for replica in self._replicas:
                end(replica.keeper)
