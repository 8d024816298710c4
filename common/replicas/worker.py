"""The process of a replica: an engine, what it is told between two steps, and what it says after each."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import IO, Any, NoReturn

import numpy as np

from common.batch import KV
from common.config import EngineConfig
from common.engine import Engine, build_engine
from common.errors import TandemError, name_of
from common.kv_transfer.connection import SECRET, TransferRequest, TransferServer, fetch
from common.kv_transfer.layout import layouts_of, model_fingerprint
from common.kv_transfer.protocol import Sender
from common.kv_transfer.shared_memory import SegmentPool
from common.process import child
from common.process.frames import Frame, Message, write_frame
from common.replicas.messages import pack_event, pack_offer, unpack_offer, unpack_request
from common.replicas.supervisor import BEAT_S
from common.request import Status, StructuredOutputsParams, TokenEvent
from common.text.grammar import Grammar, Grammars
from common.text.tokenizer import open_tokenizer
from common.weights.checkpoint import Checkpoint, open_checkpoint

MAX_FETCHES = 32
"""At once, those that wait for room included; others wait, and are computed if that takes long."""
MAX_WAITING_BYTES = 1 << 30
"""Of keys and values that have come, or are about to, and are in no page yet. What does not fit stays where it is, and an
engine whose pages are held computes fewer prompts at once."""
EXPIRE_S = 0.25
"""Between two looks at what is held in vain, where nothing else is to be done."""


def main(backend: str, path: str, options: dict[str, Any]) -> None:
    """Serve until our input ends."""
    secret = os.environ.pop(SECRET, "").encode()
    answers, told = child.listen()
    child.die_with_parent()
    voice = OutputChannel(answers)
    try:
        checkpoint = open_checkpoint(path)
        engine = build_engine(backend, checkpoint, EngineConfig(**options), voice.progress)
    except Exception as error:
        if not isinstance(error, TandemError):
            traceback.print_exc()
        voice.say({"failed_to_start": failure(error)})
        sys.exit(1)
    caps, limits = asdict(engine.caps), asdict(engine.scheduler.limits)
    handover = Handover(engine, checkpoint, secret, told.put) if secret else None
    voice.say({"ready": {"caps": caps, "limits": limits, "stats": engine.stats()}})
    Replica(engine, checkpoint, voice, handover).run(told)


class OutputChannel:
    """Where a replica speaks, as two threads do: while it computes, it gives signs of life."""

    def __init__(self, answers: IO[bytes]) -> None:
        self._answers, self._lock = answers, threading.Lock()
        self.busy_since: float | None = None
        """When the unit of work in progress began, be it a step or an order; None while the engine's thread waits."""
        threading.Thread(target=self._beat, daemon=True).start()

    def say(self, message: Message, data: Sequence[memoryview] = ()) -> None:
        with self._lock:
            write_frame(self._answers, message, data)

    def progress(self, done: int, total: int, what: str) -> None:
        self.say({"progress": [done, total, what]})

    def _beat(self) -> None:
        while True:
            since = self.busy_since
            self.say({"beat": 0.0 if since is None else time.perf_counter() - since})
            time.sleep(BEAT_S)


class Handover:
    """The pages that an engine holds for others, and those that it gets. All but `heard` is of the engine's thread."""

    def __init__(
        self, engine: Engine, checkpoint: Checkpoint, secret: bytes, heard: Callable[[TransferRequest], object]
    ) -> None:
        self._engine, self._secret = engine, secret
        self._layouts = layouts_of(engine.runner, engine.config.block_size, model_fingerprint(checkpoint))
        # Later than any of a process that was here before: so are its generations.
        self._sender = Sender(self._layouts, engine.read_kept, engine.drop_kept, generation=time.time_ns())
        self._door = TransferServer(secret, heard)
        self._fetching, self._room = ThreadPoolExecutor(MAX_FETCHES, "fetch"), SegmentPool(MAX_WAITING_BYTES)

    def offers(self) -> list[list[Any]]:
        """Of pages that have come to be held since the last call, as `fetch` takes them."""
        kept, names = self._engine.scheduler.kept, self._sender.names
        new = [self._sender.offer(name, kept[name].tokens, time.monotonic()) for name in kept if name not in names]
        return [pack_offer(self._door.address, offer) for offer in new]

    def hear(self, heard: TransferRequest) -> None:
        for answer in self._sender.hear(heard.said, time.monotonic(), heard.memory):
            heard.answer(answer)  # which goes out while we read on
        heard.answer(None)

    def expire(self) -> float | None:
        """Give back what was held in vain; in how many seconds to come again, if it is needed."""
        self._sender.expire(time.monotonic())  # who has accepted hears of it as the connection ends
        return EXPIRE_S if self._sender.names else None

    def fetch(self, offer: Sequence[Any]) -> Future[KV]:
        """What was offered elsewhere."""
        kv: Future[KV] = Future()
        self._fetching.submit(fetch, *unpack_offer(offer), self._layouts, self._secret, self._room, kv)
        return kv


class Replica:
    """One engine under orders."""

    def __init__(self, engine: Engine, checkpoint: Checkpoint, voice: OutputChannel, handover: Handover | None) -> None:
        self._engine, self._checkpoint, self._voice, self._handover = engine, checkpoint, voice, handover
        self._grammars: Grammars | None = None
        self._taken = 0
        self._refused: list[TokenEvent] = []
        self._states: dict[int, Future[list[np.ndarray]]] = {}

    def run(self, told: queue.SimpleQueue[Frame | TransferRequest]) -> NoReturn:
        """An engine that cannot go on raises."""
        while True:
            while not (self._engine.has_work and told.empty()):
                self._listen(told)
            self._step()

    def _listen(self, told: queue.SimpleQueue[Frame | TransferRequest]) -> None:
        """Do what is said next; nothing, from time to time, while pages are held. What that changes is told."""
        self._voice.busy_since = time.perf_counter()
        free = self._engine.scheduler.pool.num_free
        patience = self._handover.expire() if self._handover else None
        if self._engine.scheduler.pool.num_free == free:
            self._voice.busy_since = None
            with contextlib.suppress(queue.Empty):
                said = told.get(timeout=patience)
                self._voice.busy_since = time.perf_counter()
                self._handle_command(said)
        if self._refused or self._engine.scheduler.pool.num_free != free:
            self._tell([])

    def _step(self) -> None:
        self._voice.busy_since = time.perf_counter()
        events = self._engine.step()
        if self._handover:
            self._handover.expire()
        self._tell(events)

    def _tell(self, events: list[TokenEvent]) -> None:
        records, refused, self._refused = self._engine.step_log or [], self._refused, []
        if records:
            self._engine.step_log = []
        told = [pack_event(event) for event in (*refused, *events)]
        offers = self._handover.offers() if self._handover else []
        stats = self._engine.stats()
        self._voice.say({"events": told, "records": records, "stats": stats, "taken": self._taken, "offers": offers})

    def _handle_command(self, said: Frame | TransferRequest) -> None:
        if isinstance(said, TransferRequest):
            assert self._handover
            self._handover.hear(said)
            return
        message, data = said
        match message:
            case {"order": "add"}:
                self._add(message, data)
            case {"order": "abort", "number": number}:
                self._engine.abort(str(number))
            case {"order": "log", "on": on}:
                self._engine.step_log = [] if on else None
            case {"order": "forget", "ask": ask}:
                while self._engine.has_work:  # of requests that were aborted; nobody waits for the others
                    self._step()
                self._voice.say({"answer": ask, "done": self._engine.reset_prefix_cache()})
            case {"order": "end"}:
                self._engine.close()
                os._exit(0)  # no thread is waited for
            case {"order": "states", "ask": ask, "lengths": lengths}:
                self._compute_states(ask, np.split(np.frombuffer(data, np.int32), np.cumsum(lengths)[:-1]))
            case {"order": "cancel states", "ask": ask}:
                if ask in self._states:
                    self._states.pop(ask).cancel()

    def _add(self, message: Message, data: bytes) -> None:
        self._taken += 1
        self._voice.say({"known": self._taken})  # first: if we end of it, it is known of what
        try:
            offer = message.get("offer")
            kv = self._handover.fetch(offer) if self._handover and offer else None
            self._engine.add(unpack_request(message, data, self._compile, kv))
        except Exception as error:
            name, now = str(message["number"]), time.perf_counter()
            self._refused.append(TokenEvent(name, None, now, finish=Status.FINISHED_ERROR, error=str(error)))

    def _compile(self, wanted: StructuredOutputsParams | None) -> Future[Grammar] | None:
        if wanted is None:
            return None
        if self._grammars is None:
            tokenizer, config = open_tokenizer(self._checkpoint.path), self._checkpoint.config
            self._grammars = Grammars(tokenizer, tokenizer.all_eos(config.eos_token_ids), config.vocab_size)
        return self._grammars.compile(wanted)

    def _compute_states(self, ask: int, prompts: list[np.ndarray]) -> None:
        try:
            states = self._engine.hidden_states([prompt.tolist() for prompt in prompts])
        except Exception as error:
            self._voice.say({"answer": ask, "failed": failure(error)})
        else:
            self._states[ask] = states
            states.add_done_callback(partial(self._send_states, ask))

    def _send_states(self, ask: int, states: Future[list[np.ndarray]]) -> None:
        """Send the result of a future that has resolved, within a step."""
        if self._states.pop(ask, None) is None:
            return  # it was cancelled
        if error := states.exception():
            self._voice.say({"answer": ask, "failed": failure(error)})
            return
        parts = [np.ascontiguousarray(x_TD, np.float32) for x_TD in states.result()]
        self._voice.say({"answer": ask, "shapes": [x_TD.shape for x_TD in parts]}, [x_TD.data.cast("B") for x_TD in parts])


def failure(error: BaseException) -> dict[str, str]:
    """What was raised, for the other end to raise it there."""
    return {"kind": name_of(error), "message": str(error)}
