"""How keys and values get from the engine that has computed them to the one that goes on with them: who says what, and what
holds when something goes wrong. Pure bookkeeping: messages in, messages out; sockets, pages and clocks are the caller's.

    sender                                receiver
    holds the pages: Offer ─────────────► goes with the request, whichever way that takes
                           ◄─────── Hold  as long as there is no room for them
                           ◄───── Accept
    reads them:      Pages ─────────────► into memory of its own, in any order
                      Done ─────────────► all are there, and each as it was sent: only now they are used
                           ◄──────── Ack
    gives them back

Whoever gives up says `Abort` at once; whoever hears nothing for a lease gives up. The sender holds its pages until `Ack`,
`Abort`, or the end of the lease, so that nobody writes to a page that is still to be read. The receiver has no page before all
is proven: what comes late, twice, damaged or in part finds none, and the request is computed anew, which gives the same tokens.

Where both can write to the receiver's memory, the sender puts keys and values there itself, and `Pages` says no more than that
it has. Such memory has one transfer in it until that is done, for nobody knows when a sender that was given up stops writing.

A transfer goes by a tag, whose generation no other offer ever has: a message of an earlier one finds nobody. All messages are
signed with the secret of a launch, and bytes are named by their checksum in a message.
"""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from common.batch import KV
from common.errors import TandemError, shown
from common.kernels.cpu.carry import sum_of
from common.kv_transfer.layout import Layout
from common.process.frames import Frame, Message

log = logging.getLogger(__name__)

VERSION = 3
LEASE_S = 5.0
CHUNK_BYTES = 8 << 20
"""Of keys and values in one message, unless one token has more."""
SHARED_BYTES = 128 << 20
"""Of pages that one message says are in the receiver's memory as they lie: with nothing in between they come at once. Each
message wakes three threads in two processes, and has the receiver check while the sender copies on, for which two cores are too
few: both do it by two threads."""
MAX_BYTES = 4 << 30
"""Of keys and values in one transfer."""
MAX_TEXT = 1024


class TransferError(TandemError, ValueError):
    """A message, or an offer, that is refused. Nothing of it was used."""


class Tag(NamedTuple):
    """Which transfer."""

    name: str
    """Of the request whose pages they are, in the engine that holds them."""
    generation: int


@dataclass(frozen=True)
class Offer:
    """The first `tokens` tokens of a request have been computed, and are held for a lease."""

    tag: Tag
    tokens: int
    layouts: tuple[str, ...]
    """`Layout.fingerprint` of each form in which they are to be had."""


@dataclass(frozen=True)
class Hold:
    """They will be asked for, but not now."""

    tag: Tag


@dataclass(frozen=True)
class Accept:
    """Send them, in this form."""

    tag: Tag
    layout: str


@dataclass(frozen=True)
class Pages:
    """The tokens from `first` on, `count` of them."""

    tag: Tag
    first: int
    count: int
    checksum: int
    data: Sequence[bytes | memoryview]
    """As `Layout.pack` gives them; none where they are in the receiver's memory."""


@dataclass(frozen=True)
class Done:
    """That was all."""

    tag: Tag
    digest: str
    """Of all checksums, in the order of tokens."""


@dataclass(frozen=True)
class Ack:
    """All is there."""

    tag: Tag


@dataclass(frozen=True)
class Abort:
    """The transfer is over."""

    tag: Tag
    reason: str


TransferMessage = Hold | Accept | Pages | Done | Ack | Abort
_FIELDS: dict[type[TransferMessage], tuple[type, ...]] = {
    Hold: (),
    Accept: (str,),
    Pages: (int, int, int),
    Done: (str,),
    Ack: (),
    Abort: (str,),
}
"""What follows the tag, but for bytes."""
_KINDS = {kind.__name__: kind for kind in _FIELDS}


def seal(said: TransferMessage, secret: bytes) -> tuple[Message, Sequence[bytes | memoryview]]:
    """A message and its bytes as a frame has them, signed."""
    data = said.data if isinstance(said, Pages) else ()
    values = [getattr(said, name) for name in said.__dataclass_fields__ if name not in ("tag", "data")]
    body = [VERSION, type(said).__name__, *said.tag, *values]
    return {"transfer": body, "signature": _sign(body, secret)}, data


def unseal(frame: Frame, secret: bytes) -> TransferMessage:
    """The inverse of `seal`. Raises `TransferError` for what was not sealed with this secret, by this version."""
    body, signature = frame.message.get("transfer"), frame.message.get("signature")
    if not isinstance(body, list) or not isinstance(signature, str):
        raise TransferError(f"Expected a message about a transfer, got {shown(frame.message)}.")
    if not hmac.compare_digest(signature.encode(errors="replace"), _sign(body, secret).encode()):
        raise TransferError("Got a message that is not signed with the secret of this launch.")
    version, kind, name, generation, *values = [*body, None, None, None, None][: max(len(body), 4)]
    if version != VERSION:
        raise TransferError(f"Expected version {VERSION} of the protocol, got {shown(version)}.")
    if (
        not isinstance(kind, str)
        or kind not in _KINDS
        or not _are([name, generation, *values], (str, int, *_FIELDS[_KINDS[kind]]))
    ):
        raise TransferError(f"Got a message that the protocol does not have: {shown(body)}.")
    said = _KINDS[kind]
    return said(Tag(name, generation), *values, *([[frame.data]] if said is Pages else []))


def _sign(body: list[Any], secret: bytes) -> str:
    return blake2b(json.dumps(body).encode(), key=secret, digest_size=16).hexdigest()


def _are(values: list[Any], types: tuple[type, ...]) -> bool:
    fits = [type(value) is kind for value, kind in zip(values, types, strict=False)]
    texts = [value for value in values if isinstance(value, str)]
    return len(values) == len(types) and all(fits) and all(len(text) <= MAX_TEXT for text in texts)


def checksum(sums: Sequence[int]) -> int:
    """Of pieces that have these, in their order, as `Layout.sums` gives them: so that whoever copies a piece can sum it."""
    return sum_of(np.array(sums, np.uint64).data)


def digest_of(checksums: Sequence[int]) -> str:
    return blake2b(b"".join(value.to_bytes(8, "little") for value in checksums), digest_size=16).hexdigest()


@dataclass(eq=False)
class _Held:
    """An offer that stands."""

    offer: Offer
    until: float
    """On the caller's clock."""
    accepted: bool = False


class Sender:
    """All that one engine holds for others, who may have it in any of `layouts`. `read(name, start, kv)` has `kv` hold the
    tokens from `start` on of a request and returns its `Layout.sums`, or raises `LookupError` if the pages are gone;
    `free(name)` gives them back. `generation` is to be greater than any that another sender of this launch has come to."""

    def __init__(
        self,
        layouts: Sequence[Layout],
        read: Callable[[str, int, KV], Sequence[int]],
        free: Callable[[str], object],
        generation: int,
        lease_s: float = LEASE_S,
        chunk_bytes: int = CHUNK_BYTES,
        shared_bytes: int = SHARED_BYTES,
    ) -> None:
        self._layouts = {layout.fingerprint: layout for layout in layouts}
        self._read, self._free, self._generation, self._lease_s = read, free, generation, lease_s
        self._chunk_bytes, self._shared_bytes = chunk_bytes, shared_bytes
        self._held: dict[str, _Held] = {}

    @property
    def names(self) -> list[str]:
        """The requests whose pages are held."""
        return list(self._held)

    def offer(self, name: str, tokens: int, now: float) -> Offer:
        """Hold the first `tokens` tokens of a request for whoever accepts."""
        self._generation += 1
        offer = Offer(Tag(name, self._generation), tokens, tuple(self._layouts))
        self._held[name] = _Held(offer, now + self._lease_s)
        return offer

    def hear(self, said: TransferMessage, now: float, memory: np.ndarray | None = None) -> Iterable[TransferMessage]:
        """What is to be answered, as it is to be sent: pages are read meanwhile. `memory`: that of the receiver, uint8, where
        it came with what was said."""
        held = self._held.get(said.tag.name)
        if held is None or held.offer.tag != said.tag:
            over = isinstance(said, (Ack, Abort))
            return [] if over else [Abort(said.tag, "no pages are held for it (any more)")]
        match said:
            case Hold():
                held.until = now + self._lease_s
            case Accept(tag, layout) if layout not in self._layouts:
                self._end(tag.name, "the receiver has another model or layout")
                return [Abort(tag, "this is another model or layout")]
            case Accept(tag, layout) if memory is not None and len(memory) < self._layouts[layout].num_bytes(held.offer.tokens):
                self._end(tag.name, "the receiver's memory is too small")
                return [Abort(tag, "the memory is too small")]
            case Accept(_, layout):
                return [] if held.accepted else self._all_of(held, self._layouts[layout], memory, now)
            case Ack(tag):
                self._end(tag.name)
            case Abort(tag, reason):
                self._end(tag.name, reason)
            case _:
                self._end(said.tag.name, "the receiver said what only a sender says")
                return [Abort(said.tag, "a sender is told nothing of this kind")]
        return []

    def _all_of(self, held: _Held, layout: Layout, memory: np.ndarray | None, now: float) -> Iterator[TransferMessage]:
        tag, tokens = held.offer.tag, held.offer.tokens
        held.accepted, held.until = True, now + self._lease_s
        straight = memory is not None and layout.page is not None
        chunk, checksums = layout.tokens_in(self._shared_bytes if straight else self._chunk_bytes), list[int]()
        there = None if memory is None else layout.view(memory, tokens)
        for first in range(0, tokens, chunk):
            count = min(chunk, tokens - first)
            place = (
                there.slice(first, first + count) if there else layout.view(np.empty(layout.num_bytes(count), np.uint8), count)
            )
            try:
                checksums.append(checksum(self._read(tag.name, first, place)))
            except LookupError as lost:
                self._end(tag.name, str(lost))
                yield Abort(tag, "the pages have been lost")
                return
            yield Pages(tag, first, count, checksums[-1], () if there else layout.pack(place))
        yield Done(tag, digest_of(checksums))

    def expire(self, now: float) -> None:
        """Give back what was held for a lease in vain. Who has accepted it hears nothing more, and gives up too."""
        for held in [held for held in self._held.values() if held.until <= now]:
            self._end(held.offer.tag.name, "the lease is over")

    def _end(self, name: str, trouble: str = "") -> None:
        if trouble:
            log.warning("Pages of request %s are not handed over: %s.", name, trouble)
        del self._held[name]
        self._free(name)


def common_layout(offer: Offer, layouts: Sequence[Layout], max_bytes: int = MAX_BYTES) -> Layout:
    """The first of one's own forms in which an offer can be had. Raises `TransferError` for one that is not to be accepted."""
    name = offer.tag.name
    layout = next((layout for layout in layouts if layout.fingerprint in offer.layouts), None)
    if layout is None:
        raise TransferError(f"The pages of request {name} are of another model or layout.")
    size = layout.num_bytes(offer.tokens)
    if not (offer.tokens > 0 and size <= max_bytes):
        raise TransferError(f"The pages of request {name} have {size} bytes; expected 1 to {max_bytes}.")
    return layout


class Receiver:
    """One transfer, in the form that `common_layout` chose, from its offer on: first say `accept`. Then exactly one of `kv`,
    which lies in `memory`, and `error` comes to be there, and nothing that is heard later changes it. How long to wait for a
    message is the caller's to know, who else gives up."""

    def __init__(self, offer: Offer, layout: Layout, memory: np.ndarray) -> None:
        """`memory`: as many bytes, uint8, as the layout has for the tokens."""
        self.accept = Accept(offer.tag, layout.fingerprint)
        self.kv: KV | None = None
        self.error: str | None = None
        self._tag, self._tokens, self._layout = offer.tag, offer.tokens, layout
        self._kv: KV | None = layout.view(memory, offer.tokens)
        self._pages: dict[int, Pages] = {}
        self._digest: str | None = None

    @property
    def over(self) -> bool:
        return self.kv is not None or self.error is not None

    def hear(self, said: TransferMessage) -> list[TransferMessage]:
        """What is to be answered."""
        if said.tag != self._tag:
            return [Abort(said.tag, "nobody waits for it (any more)")] if isinstance(said, (Pages, Done)) else []
        if self.over:
            return []
        match said:
            case Pages():
                return self._take(said)
            case Done(_, digest) if self._digest not in (None, digest):
                return self.give_up("Two messages differ about the end.")
            case Done(_, digest):
                self._digest = digest
                return self._finish()
            case Abort(_, reason):
                self.give_up(f"The sender has given up: {reason}.")
                return []
            case _:
                return self.give_up("The sender said what only a receiver says.")

    def _take(self, pages: Pages) -> list[TransferMessage]:
        before = self._pages.get(pages.first)
        if before is not None:
            same = (before.count, before.checksum) == (pages.count, pages.checksum)
            return [] if same else self.give_up(f"Two messages differ about token {pages.first}.")
        if not (0 <= pages.first < pages.first + pages.count <= self._tokens and pages.first % (self._layout.page or 1) == 0):
            return self.give_up(f"Got {pages.count} tokens from {pages.first} on, of {self._tokens}.")
        if not self._is_whole(pages):
            return self.give_up(f"The tokens from {pages.first} on are damaged.")
        self._pages[pages.first] = replace(pages, data=())
        return self._finish()

    def _is_whole(self, pages: Pages) -> bool:
        """Whether the memory has what was sent, which is put there if it is not yet."""
        assert self._kv is not None
        place = self._kv.slice(pages.first, pages.first + pages.count)
        if any(len(part) for part in pages.data):
            data = np.frombuffer(b"".join(pages.data), np.uint8)
            if len(data) != self._layout.num_bytes(pages.count):
                return False
            place.fill(self._layout.view(data, pages.count))
        return checksum(self._layout.sums(place)) == pages.checksum

    def _finish(self) -> list[TransferMessage]:
        """Once the end has been told and nothing is missing: use it, if it is what was sent."""
        pages = [self._pages[first] for first in sorted(self._pages)]
        held = sum(each.count for each in pages)
        if self._digest is None or held < self._tokens:
            return []
        whole = [each.first for each in pages] == [sum(each.count for each in pages[:i]) for i in range(len(pages))]
        if not whole or digest_of([each.checksum for each in pages]) != self._digest:
            return self.give_up("The tokens that came are not those that were sent.")
        self.kv, self._kv = self._kv, None
        self._pages.clear()
        return [Ack(self._tag)]

    def give_up(self, error: str) -> list[TransferMessage]:
        """What is to be said."""
        if self.over:
            return []
        self.error, self._kv = error, None
        self._pages.clear()
        return [Abort(self._tag, error)]
