"""Random work for two engines of which one computes prompts and the other goes on, over a channel that loses, repeats, delays,
reorders and damages what they say; and the invariants that must hold after every step of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np

from common.batch import KV
from common.config import EngineConfig
from common.engine import Engine
from common.errors import RequestError
from common.kv_transfer.layout import Layout, layouts_of
from common.kv_transfer.protocol import (
    Abort,
    Done,
    Hold,
    Offer,
    Pages,
    Receiver,
    Sender,
    Tag,
    TransferError,
    TransferMessage,
    common_layout,
    seal,
    unseal,
)
from common.process.frames import Frame
from common.request import Request, SamplingParams, Status, TokenEvent
from tests.history_runner import HistoryRunner, expected
from tests.schedule_driver import VOCAB, check_in_flight, check_pages, check_sequences, free_pages, plain, require

LEASE_S = 3.0
SECRET = b"of this launch"


@dataclass(eq=False)
class Live:
    """A request that has not ended."""

    request: Request
    events: list[TokenEvent] = field(default_factory=list)
    at: str = ""
    """By which name its engine knows it: those of prompts come again."""
    decodes: bool = False


class Side:
    """An engine, and what is checked of it."""

    def __init__(self, rng: random.Random, max_len: int, groups: int, faults: list[str]) -> None:
        size, seqs = rng.choice((1, 2, 4, 4, 8)), rng.choice((1, 2, 4, 6))
        pages = 2 + int(-(-max_len // size) * rng.choice((1, 1.5, 3)))
        self.runner = HistoryRunner(
            num_pages=pages, block_size=size, vocab_size=VOCAB, max_seqs=seqs, depth=rng.choice((0, 0, 1, 2)), groups=groups
        )
        caching = rng.random() < 0.8
        config = EngineConfig(
            block_size=size,
            max_num_seqs=seqs,
            max_num_batched_tokens=seqs + rng.choice((3, 8, 24)),
            max_model_len=max_len,
            cache="paged" if caching else rng.choice(("paged", "dense")),
            enable_prefix_caching=caching,
        )
        self.engine = Engine(self.runner, config, num_pages=pages)
        self.engine.step_log = []
        self.rng, self.faults = rng, faults

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return layouts_of(self.runner, self.runner.block_size, "the model")

    def step(self) -> list[TokenEvent]:
        if (
            self.rng.random() < 0.01 and not self.engine.scheduler.trials.groups
        ):  # on trial it would end a request that is innocent
            where = self.rng.choice(("fail_submit", "fail_result"))
            setattr(self.runner, where, RuntimeError("injected"))
            self.faults.append(where)
        events = self.engine.step()
        self.runner.fail_submit = self.runner.fail_result = None
        self.check()
        return events

    def check(self) -> None:
        scheduler = self.engine.scheduler
        require(not self.runner.violations, f"the runner saw {self.runner.violations[:1]}")
        check_pages(scheduler)
        check_sequences(scheduler)
        check_in_flight(self.engine)
        self.runner.poison([page for page in free_pages(scheduler.pool) if scheduler.pool.keys[page] is None])

    def check_empty(self) -> None:
        pool = self.engine.scheduler.pool
        require(self.engine.reset_prefix_cache(), "a page is held although nothing is live")
        require(sorted(free_pages(pool)) == list(range(1, pool.num_pages)), "a page is not free in the end")


class Episode:
    """Deterministic in `seed`. `counts` tells what happened."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.counts: Counter[str] = Counter()
        self.max_len = self.rng.randrange(8, 60)
        self.groups = self.rng.choice((1, 1, 2))
        self.noise = self.rng.choice((0.0, 0.05, 0.3))
        """How often something befalls a message, each thing by itself."""
        self.faults: list[str] = []
        self.stems = [[self.rng.randrange(VOCAB) for _ in range(self.max_len)] for _ in range(3)]
        self.generation = self.names = 0
        self.shares = self.rng.random() < 0.5
        self.memories: dict[Tag, np.ndarray] = {}
        """Of receivers, where the sender can write to it."""
        self.live: dict[str, Live] = {}
        self.by_name: dict[tuple[bool, str], Live] = {}
        """Whether it decodes, and its name there."""
        self.channel: list[tuple[float, Callable[[TransferMessage], None], Frame]] = []
        self.seen: list[tuple[Callable[[TransferMessage], None], Frame]] = []
        self.start_prefill()
        self.start_decode()

    def side(self) -> Side:
        return Side(self.rng, self.max_len, self.groups, self.faults)

    def start_prefill(self) -> None:
        self.prefill = self.side()
        engine, self.generation = self.prefill.engine, self.generation + 1000
        token_bytes = self.prefill.layouts[-1].num_bytes(1)
        chunk = self.rng.choice((1, token_bytes, 3 * token_bytes, 1 << 20))
        at_once = {"chunk_bytes": chunk, "shared_bytes": chunk}
        self.sender = Sender(
            self.prefill.layouts, engine.read_kept, engine.drop_kept, self.generation, lease_s=LEASE_S, **at_once
        )

    def start_decode(self) -> None:
        self.decode = self.side()
        self.receivers: dict[Tag, tuple[Receiver, Future[KV]]] = {}
        self.patience: dict[Tag, float] = {}
        """When a connection has been silent for too long."""

    # ── the channel ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def say(self, to: Callable[[TransferMessage], None], said: TransferMessage) -> None:
        """Put a message on its way, and have things befall it."""
        message, parts = seal(said, SECRET)
        frame = Frame(message, b"".join(parts))
        self.seen.append((to, frame))
        if self.befalls("dropped"):
            return
        if frame.data and self.befalls("truncated"):
            frame = frame._replace(data=frame.data[: self.rng.randrange(len(frame.data))])
        if frame.data and self.befalls("corrupted"):
            frame = frame._replace(data=self.spoilt(frame.data))
        if self.befalls("forged"):
            body = list(message["transfer"])
            body[self.rng.randrange(len(body))] = self.rng.choice((0, 1, "x", None, -1))
            frame = frame._replace(message=message | {"transfer": body})
        for _ in range(2 if self.befalls("repeated") else 1):
            delay = self.rng.uniform(0, 2 * LEASE_S) if self.befalls("delayed") else self.rng.choice((0, 0, 0.3))
            self.channel.append((self.now + delay, to, frame))
        if self.befalls("stale"):
            alike = [item for item in self.seen if item[1].message["transfer"][2] == said.tag.name]
            self.channel.append((self.now, *self.rng.choice(alike)))

    def befalls(self, what: str) -> bool:
        happens = self.rng.random() < self.noise / 3
        self.counts[what] += happens
        return happens

    def spoilt(self, data: bytes) -> bytes:
        at = self.rng.randrange(len(data))
        return data[:at] + bytes([data[at] ^ self.rng.randrange(1, 256)]) + data[at + 1 :]

    def deliver(self) -> None:
        due = [item for item in self.channel if item[0] <= self.now]
        self.channel = [item for item in self.channel if item[0] > self.now]
        self.rng.shuffle(due)
        for _, to, frame in due:
            try:
                said = unseal(frame, SECRET)
            except TransferError:
                self.counts["refused"] += 1
            else:
                to(said)

    def to_sender(self, said: TransferMessage) -> None:
        held = {name: self.sender._held[name].offer.tag for name in self.sender.names}
        memory = self.memories.get(said.tag)  # as that of a receiver that is gone still may be written to
        for answer in self.sender.hear(said, self.now, memory):
            if isinstance(answer, Pages) and memory is not None and self.befalls("corrupted in memory"):
                memory[self.rng.randrange(len(memory))] ^= self.rng.randrange(1, 256)
            self.say(self.to_receiver, answer)
        if isinstance(said, Abort) and held.get(said.tag.name) == said.tag:
            require(said.tag.name not in self.prefill.engine.scheduler.kept, "an abort left pages held")

    def to_receiver(self, said: TransferMessage) -> None:
        of_its_name = [tag for tag in self.receivers if tag.name == said.tag.name]
        if not of_its_name:
            if isinstance(said, (Pages, Done)):
                self.say(self.to_sender, Abort(said.tag, "nobody waits for it"))
            return
        self.counts["of another generation"] += said.tag not in of_its_name
        receiver, future = self.receivers[said.tag if said.tag in of_its_name else of_its_name[-1]]
        stood = receiver.kv, receiver.error
        if said.tag == receiver.accept.tag:
            self.patience[said.tag] = self.now + LEASE_S
        answers = receiver.hear(said)
        require(stood == (None, None) or stood == (receiver.kv, receiver.error), "a transfer that was over went on")
        self.settle(answers, receiver, future)

    def settle(self, answers: list[TransferMessage], receiver: Receiver, future: Future[KV]) -> None:
        for answer in answers:
            self.say(self.to_sender, answer)
        if receiver.over:
            self.receivers.pop(receiver.accept.tag, None)
        if receiver.over and not future.done():
            self.counts["received" if receiver.kv else "not received"] += 1
            if receiver.kv is None:
                future.set_exception(TransferError(receiver.error or ""))
            else:
                future.set_result(receiver.kv)

    def expire(self) -> None:
        self.sender.expire(self.now)
        for tag, (receiver, future) in list(self.receivers.items()):
            if self.patience[tag] <= self.now:  # that of its connection
                self.settle(receiver.give_up("Nothing more came."), receiver, future)
        require(set(self.prefill.engine.scheduler.kept) <= set(self.sender.names), "pages are kept for nobody")
        require(all(held.until > self.now for held in self.sender._held.values()), "pages are kept beyond their lease")

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self, steps: int) -> None:
        """Random work for so many ticks, then none until all is done; every page must be free in the end."""
        for _ in range(steps):
            self.act()
            self.tick()
        for _ in range(200 * (1 + len(self.live)) * self.max_len):
            if not self.live:
                break
            self.tick()
        require(not self.live, "waiting work made no progress")
        while self.prefill.engine.has_work or self.decode.engine.has_work:
            self.tick()
        self.now += LEASE_S
        self.expire()
        require(not self.sender.names, "pages are kept for ever")
        for side in (self.prefill, self.decode):
            side.check_empty()

    def act(self) -> None:
        rng = self.rng
        while rng.random() < 0.3 and len(self.live) < 8:
            self.add()
        if rng.random() < 0.04 and self.live:
            self.abort(rng.choice(list(self.live)))
        if rng.random() < 0.01:
            self.kill()

    def tick(self) -> None:
        self.now += self.rng.choice((0.0, 0.05, 0.2))
        self.counts["steps"] += 2
        for side in (self.prefill, self.decode):
            for event in side.step():
                self.pass_on(side is self.decode, event)
        self.deliver()
        self.expire()

    def add(self) -> None:
        rng, name = self.rng, f"r{self.names}"
        self.names += 1
        stem = rng.choice(self.stems)[: rng.randrange(self.max_len - 1)]
        params = SamplingParams(
            max_tokens=rng.choice((None, 1, 2, 5, 20)),
            temperature=rng.choice((0.0, 0.0, 1.0)),
            seed=rng.randrange(2**64),
            logprobs=rng.choice((None, None, 2)),
            prompt_logprobs=rng.choice((None, None, None, 1)),
            frequency_penalty=rng.choice((0.0, 0.0, 0.5)),
            stop_token_ids=(rng.randrange(VOCAB),) * (rng.random() < 0.3),
        )
        request = Request(request_id=name, prompt_token_ids=[*stem, rng.randrange(VOCAB)], params=params)
        try:
            for side in (self.prefill, self.decode):
                side.engine.scheduler.limits.max_tokens(request)
        except RequestError:
            return
        self.live[name] = live = Live(request)
        self.to_prefill(live)

    def to_prefill(self, live: Live) -> None:
        self.rename(live, next(name for name in map("p{}".format, count()) if self.is_free(name)), decodes=False)
        request = replace(live.request, request_id=live.at, keep_pages=self.most(live.request) > 1)
        self.prefill.engine.add(replace(request, params=replace(request.params, max_tokens=1)))

    def to_decode(self, live: Live, future: Future[KV] | None = None) -> None:
        self.names += 1
        self.rename(live, f"d{self.names}", decodes=True)
        tokens = tuple(event.token_id for event in live.events if event.token_id is not None)
        self.decode.engine.add(replace(live.request, request_id=live.at, output_token_ids=tokens, kv=future))

    def is_free(self, name: str) -> bool:
        scheduler = self.prefill.engine.scheduler
        return name not in scheduler.live and name not in scheduler.kept and (False, name) not in self.by_name

    def rename(self, live: Live, name: str, decodes: bool) -> None:
        self.by_name.pop((live.decodes, live.at), None)
        live.at, live.decodes = name, decodes
        self.by_name[decodes, name] = live

    def most(self, request: Request) -> int:
        return self.decode.engine.scheduler.limits.max_tokens(request)

    def pass_on(self, decodes: bool, event: TokenEvent) -> None:
        live = self.by_name.get((decodes, event.request_id))
        if live is None:
            require(event.finish is Status.FINISHED_ABORT, "an event of a request that is over, or never was")
            return
        if live.decodes or event.finish is not Status.FINISHED_LENGTH or self.most(live.request) == 1:
            live.events.append(event)
            if event.finish:
                self.judge(live)
            return
        live.events.append(replace(event, finish=None))
        self.hand_over(live)

    def hand_over(self, live: Live) -> None:
        kept = self.prefill.engine.scheduler.kept.get(live.at)
        if kept is None:
            self.to_decode(live)  # a step of another request has raised since
            return
        require(kept.tokens == len(live.request.prompt_token_ids), "not the prompt is kept")
        offer = self.sender.offer(live.at, kept.tokens, self.now)
        if self.befalls("offer lost"):
            self.to_decode(live)
            return
        if self.befalls("offer of another model"):
            offer = replace(offer, layouts=("of another",))
        self.receive(live, offer)

    def receive(self, live: Live, offer: Offer) -> None:
        try:
            layout = common_layout(offer, self.decode.layouts)
        except TransferError:
            self.counts["not accepted"] += 1
            self.to_decode(live)
            return
        memory = np.zeros(layout.num_bytes(offer.tokens), np.uint8)
        receiver = Receiver(offer, layout, memory)
        if self.shares:
            self.memories[offer.tag] = memory
        self.counts["as they lie"] += layout.page is not None
        future: Future[KV] = Future()
        self.receivers[offer.tag] = receiver, future
        self.patience[offer.tag] = self.now + LEASE_S
        if self.befalls("no room yet"):
            self.say(self.to_sender, Hold(offer.tag))
        self.say(self.to_sender, receiver.accept)
        future.add_done_callback(
            lambda future: (
                self.settle(receiver.give_up("The request has ended."), receiver, future) if future.cancelled() else None
            )
        )
        self.to_decode(live, future)

    def abort(self, name: str) -> None:
        live = self.live[name]
        engine = (self.decode if live.decodes else self.prefill).engine
        require(engine.abort(live.at), "a live request could not be aborted")
        self.counts["aborted"] += 1
        self.judge(live, cut=True)

    def kill(self) -> None:
        """An engine is gone with all that it had, and another in its place."""
        if self.rng.random() < 0.5:
            self.counts["prefills killed"] += 1
            self.start_prefill()
            for live in self.live.values():
                if not live.decodes:
                    self.to_prefill(live)
        else:
            self.counts["decodes killed"] += 1
            gone = list(self.receivers.values())
            self.start_decode()
            if self.rng.random() < 0.5:  # its connections tell
                for receiver, _ in gone:
                    self.say(self.to_sender, Abort(receiver.accept.tag, "the connection is lost"))
            for live in self.live.values():
                if live.decodes:
                    self.to_decode(live)

    def judge(self, live: Live, cut: bool = False) -> None:
        """Hold a request that has ended against the oracle."""
        request = self.live.pop(live.request.request_id).request
        del self.by_name[live.decodes, live.at]
        right = expected(request, vocab_size=VOCAB, max_tokens=self.most(request))
        events = [event for event in live.events if event.token_id is not None]
        got = [event.token_id for event in events]
        wanted = right.tokens[: len(got)] if cut else right.tokens
        require(got == wanted, f"{request.request_id} gave {got}, not {wanted}")
        ends = [event.finish for event in live.events]
        finishes = [*[None] * (len(ends) - 1), None if cut else right.finish][: len(ends)]
        require(ends == finishes, f"{request.request_id} ended with {ends}, not {finishes}")
        for i, event in enumerate(events):
            scores = right.prompt_logprobs if i == 0 else None
            same = [*map(plain, event.prompt_logprobs or ())] == [*map(plain, scores or ())]
            require(same, f"{request.request_id} has other prompt scores")
            k = request.params.logprobs
            require(
                plain(event.logprobs) == plain(None if k is None else right.logprobs(i, k, VOCAB)),
                f"{request.request_id} has other logprobs",
            )
        self.counts["judged"] += not cut
