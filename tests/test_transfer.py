"""What two engines say of pages that one hands to the other, and what the scheduler of each makes of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from common.batch import KV
from common.config import EngineConfig
from common.engine import Engine
from common.errors import RequestError
from common.kv_transfer.layout import TOKENS, Layout, PageCopier, Part, layouts_of, model_fingerprint
from common.kv_transfer.protocol import (
    VERSION,
    Abort,
    Accept,
    Ack,
    Done,
    Hold,
    Offer,
    Pages,
    Receiver,
    Sender,
    Tag,
    TransferError,
    TransferMessage,
    checksum,
    common_layout,
    digest_of,
    seal,
    unseal,
)
from common.process.frames import Frame
from common.request import Request, SamplingParams, Status, TokenEvent
from common.schedule.scheduler import Scheduler
from tests.backends import checkpoint
from tests.history_runner import HistoryRunner, expected
from tests.schedule_driver import check_pages

VOCAB, SECRET = 32, b"secret"
PARTS = Part("k", np.dtype(np.float32), (2,), (1, 3)), Part("v", np.dtype(np.int64), (2,), (1, 1))
LAYOUT = Layout(model="m", form=TOKENS, page=None, groups=(PARTS,))
AS_IT_LIES = replace(LAYOUT, form="in pages", page=2)
LEASE_S = 5.0


# ── the layout ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def some_kv(tokens: int, layout: Layout = LAYOUT, seed: int = 0) -> KV:
    rng = np.random.default_rng(seed)
    draw = lambda part: rng.integers(0, 100, part.shape(layout.count(tokens))).astype(part.dtype)  # noqa: E731
    return KV(tokens, tuple({part.name: draw(part) for part in parts} for parts in layout.groups), layout.page)


def join(pieces: Sequence[KV]) -> KV:
    """Those of tokens that follow one another."""
    axis = int(pieces[0].page is None)
    groups = [
        {name: np.concatenate([piece.groups[g][name] for piece in pieces], axis) for name in group}
        for g, group in enumerate(pieces[0].groups)
    ]
    return KV(sum(piece.tokens for piece in pieces), tuple(groups), pieces[0].page)


def same(one: KV, other: KV) -> bool:
    pairs = zip(one.groups, other.groups, strict=True)
    return one.tokens == other.tokens and all(np.array_equal(a[name], b[name]) for a, b in pairs for name in a)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)])
@pytest.mark.parametrize("tokens", [1, 7])
def test_bytes_of_keys_and_values_are_the_same_keys_and_values(dtype: np.dtype, tokens: int) -> None:
    parts = Part("k", dtype, (3,), (2, 4)), Part("v", dtype, (3,), (2, 4))
    layout = replace(LAYOUT, groups=(parts, parts[:1]))
    kv = some_kv(tokens, layout)
    data = b"".join(layout.pack(kv))
    assert len(data) == layout.num_bytes(tokens) == tokens * 9 * 8 * dtype.itemsize
    assert same(layout.view(np.frombuffer(data, np.uint8), tokens), kv)
    assert same(join([kv.slice(a, b) for a, b in pairwise({0, 1, tokens // 2, tokens})]), kv)


@pytest.mark.parametrize("layout", [LAYOUT, AS_IT_LIES], ids=lambda layout: layout.form)
def test_a_checksum_sees_bytes_and_whole_pieces_that_have_changed_places(layout: Layout) -> None:
    kv = some_kv(6, layout)
    right = checksum(layout.sums(kv))
    assert right == checksum(layout.sums(layout.view(np.frombuffer(b"".join(layout.pack(kv)), np.uint8), 6)))
    for change in (lambda x: x[::-1], lambda x: x[:, ::-1], lambda x: x[..., ::-1]):
        groups = ({"k": change(kv.groups[0]["k"]), "v": kv.groups[0]["v"]},)
        assert checksum(layout.sums(kv._replace(groups=groups))) != right


@pytest.mark.parametrize(
    "other",
    [
        replace(LAYOUT, model="n"),
        replace(LAYOUT, form="in pages"),
        replace(LAYOUT, page=2),
        replace(LAYOUT, groups=LAYOUT.groups * 2),
        replace(LAYOUT, groups=(LAYOUT.groups[0][:1],)),
        *(
            replace(LAYOUT, groups=((LAYOUT.groups[0][0]._replace(**change), LAYOUT.groups[0][1]),))
            for change in ({"dtype": np.dtype(np.int32)}, {"outer": (3,)}, {"inner": (2, 3)}, {"inner": (1, 4)}, {"name": "q"})
        ),
    ],
)
def test_layouts_that_differ_in_anything_have_other_fingerprints(other: Layout) -> None:
    assert other.fingerprint != LAYOUT.fingerprint == replace(LAYOUT).fingerprint


def test_weights_and_configurations_are_told_apart() -> None:
    names = ("tiny-llama", "tiny-qwen3", "tiny-gemma3")
    prints = [model_fingerprint(checkpoint(name)) for name in names]
    assert len(set(prints)) == 3 and prints[0] == model_fingerprint(checkpoint("tiny-llama"))
    llama = checkpoint("tiny-llama")
    last = llama.names()[-1]
    stored = llama[last].raw().copy()
    stored.reshape(-1)[-1] += 1
    altered = replace(llama, entries={**llama.entries, last: replace(llama[last], stored=stored)})
    assert model_fingerprint(altered) != prints[0]


def empty(layout: Layout, tokens: int) -> KV:
    return layout.view(np.zeros(layout.num_bytes(tokens), np.uint8), tokens)


def kv_of(runner: HistoryRunner, layout: Layout, pages: list[int], size: int, start: int, stop: int) -> KV:
    kv = empty(layout, stop - start)
    carrier = PageCopier(runner, size)
    assert carrier.read(pages, start, kv) == layout.sums(kv)
    return kv


def write(runner: HistoryRunner, size: int, pages: list[int], kv: KV) -> None:
    carrier = PageCopier(runner, size)
    carrier.write(pages, kv)


@pytest.mark.parametrize(("giving", "taking"), [(1, 8), (8, 1), (4, 4), (2, 8), (8, 4)])
def test_tokens_move_between_pages_of_any_two_sizes(giving: int, taking: int) -> None:
    source, target = (HistoryRunner(num_pages=64 // size, block_size=size, groups=2) for size in (giving, taking))
    source.chain[:], source.at[:] = np.arange(64), np.arange(64) + 100
    *_, layout = layouts_of(source, giving, "m")
    assert layout.fingerprint == layouts_of(target, taking, "m")[-1].fingerprint
    pages = [*range(1, 64 // giving)][::-1][: -(-11 // giving)]
    kv = kv_of(source, layout, pages, giving, 0, 11)
    assert same(kv, join([kv_of(source, layout, pages, giving, a, b) for a, b in ((0, 3), (3, 4), (4, 11))]))
    there = [*range(2, 2 + -(-11 // taking))]
    write(target, taking, there, kv)
    assert same(kv_of(target, layout, there, taking, 0, 11), kv)
    untouched = [page for page in range(64 // taking) if page not in there]
    assert (target.read_pages(0, untouched)["v"] == -1).all()


@pytest.mark.parametrize("size", [1, 2, 8])
def test_pages_move_as_they_lie_between_runners_that_keep_them_alike(size: int) -> None:
    source, target = (HistoryRunner(num_pages=64 // size, block_size=size, groups=2) for _ in range(2))
    source.chain[:], source.at[:] = np.arange(64), np.arange(64) + 100
    layout, tokens = layouts_of(source, size, "m")
    assert layout.fingerprint == layouts_of(target, size, "m")[0].fingerprint
    assert layouts_of(source, 2 * size, "m")[0].fingerprint != layout.fingerprint
    pages = [*range(1, 64 // size)][::-1][: -(-11 // size)]
    kv = kv_of(source, layout, pages, size, 0, 11)
    assert same(kv, join([kv_of(source, layout, pages, size, a, b) for a, b in ((0, 8), (8, 11))]))
    there = [*range(2, 2 + len(pages))]
    write(target, size, there[8 // size :], kv.slice(8, 11))
    write(target, size, there, kv.slice(0, 8))
    assert same(kv_of(target, tokens, there, size, 0, 11), kv_of(source, tokens, pages, size, 0, 11))
    untouched = [page for page in range(64 // size) if page not in there]
    assert (target.read_pages(0, untouched)["v"] == -1).all()


# ── what is said ─────────────────────────────────────────────────────────────────────────────────────────────────────────

TAG = Tag("r", 7)


def pages_of(kv: KV, first: int, stop: int, tag: Tag = TAG) -> Pages:
    some = kv.slice(first, stop)
    return Pages(tag, first, stop - first, checksum(LAYOUT.sums(some)), [bytes(part) for part in LAYOUT.pack(some)])


EVERYTHING: list[TransferMessage] = [
    Hold(TAG),
    Accept(TAG, LAYOUT.fingerprint),
    pages_of(some_kv(4), 1, 3),
    Done(TAG, "ff"),
    Ack(TAG),
    Abort(TAG, "why"),
]


def frame_of(said: TransferMessage) -> Frame:
    message, data = seal(said, SECRET)
    return Frame(json.loads(json.dumps(message)), b"".join(data))


@pytest.mark.parametrize("said", EVERYTHING, ids=lambda said: type(said).__name__)
def test_a_message_survives_the_trip(said: TransferMessage) -> None:
    got = unseal(frame_of(said), SECRET)
    if isinstance(said, Pages):
        said = replace(said, data=[b"".join(said.data)])
    assert got == said


@pytest.mark.parametrize("said", EVERYTHING, ids=lambda said: type(said).__name__)
def test_a_message_in_which_anything_was_changed_is_refused(said: TransferMessage) -> None:
    frame = frame_of(said)
    body = frame.message["transfer"]
    for i, value in enumerate(body):
        changed = [*body[:i], value + 1 if isinstance(value, int) else value + "x", *body[i + 1 :]]
        with pytest.raises(TransferError, match="not signed with the secret"):
            unseal(frame._replace(message=frame.message | {"transfer": changed}), SECRET)
    with pytest.raises(TransferError, match="not signed with the secret"):
        unseal(frame, b"another launch's")
    with pytest.raises(TransferError, match="not signed with the secret"):
        unseal(frame._replace(message=frame.message | {"signature": "\ud800"}), SECRET)


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"transfer": "x", "signature": "y"},
        {"transfer": [1], "signature": 3},
        {"transfer": {}, "signature": ""},
        {"beat": 1},
    ],
)
def test_what_is_no_message_about_a_transfer_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(TransferError, match="Expected a message about a transfer"):
        unseal(Frame(message, b""), SECRET)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ([], "version"),
        ([VERSION + 1, "Ack", "r", 7], "Expected version 3"),
        ([VERSION], "does not have"),
        ([VERSION, "Sender", "r", 7], "does not have"),
        ([VERSION, ["Ack"], "r", 7], "does not have"),
        ([VERSION, "Ack", "r"], "does not have"),
        ([VERSION, "Ack", "r", 7, 8], "does not have"),
        ([VERSION, "Ack", 7, "r"], "does not have"),
        ([VERSION, "Ack", "r", True], "does not have"),
        ([VERSION, "Pages", "r", 7, 0, 1], "does not have"),
        ([VERSION, "Pages", "r", 7, 0, 1.0, 2], "does not have"),
        ([VERSION, "Abort", "r", 7, "x" * 5000], "does not have"),
    ],
)
def test_what_the_protocol_does_not_have_is_refused_even_if_it_is_signed(
    body: list[Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.kv_transfer.protocol._sign", lambda body, secret: "signed")
    with pytest.raises(TransferError, match=told):
        unseal(Frame({"transfer": body, "signature": "signed"}, b""), SECRET)


# ── the sender ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Memory:
    """Pages of requests, as a sender sees them."""

    def __init__(self, tokens: int = 5) -> None:
        self.kv, self.freed, self.lost = some_kv(tokens), list[str](), False

    def read(self, name: str, start: int, kv: KV) -> list[int]:
        if self.lost:
            raise LookupError("they are gone")
        kv.fill(self.kv.slice(start, start + kv.tokens))
        return LAYOUT.sums(kv)

    def sender(self, chunk: int = 2) -> Sender:
        """That says so many tokens at once."""
        size = LAYOUT.num_bytes(chunk)
        at_once = {"chunk_bytes": size, "shared_bytes": size}
        return Sender([AS_IT_LIES, LAYOUT], self.read, self.freed.append, generation=6, lease_s=LEASE_S, **at_once)


def test_pages_go_out_in_parts_and_are_held_until_they_have_come() -> None:
    memory = Memory()
    sender = memory.sender()
    offer = sender.offer("r", 5, now=0.0)
    assert offer == Offer(TAG, 5, (AS_IT_LIES.fingerprint, LAYOUT.fingerprint))
    *pages, done = sender.hear(Accept(TAG, LAYOUT.fingerprint), now=1.0)
    assert [(each.first, each.count) for each in pages if isinstance(each, Pages)] == [(0, 2), (2, 2), (4, 1)]
    assert isinstance(done, Done) and memory.freed == [] and sender.names == ["r"]
    assert sender.hear(Accept(TAG, LAYOUT.fingerprint), now=1.0) == []  # it came twice
    assert sender.hear(Ack(TAG), now=2.0) == [] and memory.freed == ["r"] and sender.names == []
    assert sender.hear(Ack(TAG), now=2.0) == sender.hear(Abort(TAG, ""), now=2.0) == [] and memory.freed == ["r"]


def test_a_part_has_one_token_where_not_even_one_fits() -> None:
    memory = Memory(3)
    sender = memory.sender(chunk=0)
    sender.offer("r", 3, now=0.0)
    assert len([*sender.hear(Accept(TAG, LAYOUT.fingerprint), now=0.0)]) == 3 + 1


def test_what_nobody_takes_is_given_back_when_the_lease_is_over() -> None:
    memory = Memory()
    sender = memory.sender()
    sender.offer("r", 5, now=0.0)
    sender.offer("s", 5, now=1.0)
    sender.expire(LEASE_S - 0.1)
    assert memory.freed == []
    sender.expire(LEASE_S)
    assert memory.freed == ["r"]
    assert [*sender.hear(Accept(Tag("s", 8), LAYOUT.fingerprint), now=LEASE_S)]  # which renews the lease
    sender.expire(2 * LEASE_S - 0.1)
    assert memory.freed == ["r"]
    sender.expire(2 * LEASE_S)
    assert memory.freed == ["r", "s"]


def test_who_has_no_room_yet_has_pages_held_for_another_lease() -> None:
    memory = Memory()
    sender = memory.sender()
    sender.offer("r", 5, now=0.0)
    assert sender.hear(Hold(TAG), now=4.0) == sender.hear(Hold(TAG), now=8.0) == []
    sender.expire(8.0 + LEASE_S - 0.1)
    assert sender.names == ["r"]
    sender.expire(8.0 + LEASE_S)
    assert memory.freed == ["r"]


def test_pages_go_into_the_memory_of_who_receives_them_and_no_further() -> None:
    memory, size = Memory(), LAYOUT.num_bytes(5)
    sender, there = memory.sender(), np.full(size + 8, 0xAB, np.uint8)
    offer = sender.offer("r", 5, now=0.0)
    receiver = Receiver(offer, LAYOUT, there[:size])
    *pages, done = sender.hear(receiver.accept, now=0.0, memory=there)
    assert [each.data for each in pages if isinstance(each, Pages)] == [()] * 3 and (there[size:] == 0xAB).all()
    for each in pages:
        assert receiver.hear(each) == []
    assert receiver.hear(done) == [Ack(TAG)] and receiver.kv is not None and same(receiver.kv, memory.kv)
    assert all(np.shares_memory(x, there) for x in receiver.kv.groups[0].values())


@pytest.mark.parametrize(
    ("layout", "shares", "counts"),
    [
        (AS_IT_LIES, True, [8, 3]),
        (AS_IT_LIES, False, [2, 2, 2, 2, 2, 1]),
        (LAYOUT, True, [2, 2, 2, 2, 2, 1]),
        (LAYOUT, False, [2, 2, 2, 2, 2, 1]),
    ],
)
def test_only_pages_that_go_straight_to_where_they_are_wanted_go_many_at_once(
    layout: Layout, shares: bool, counts: list[int]
) -> None:
    """What is put together in between takes memory."""
    at_once = {"chunk_bytes": layout.num_bytes(2), "shared_bytes": layout.num_bytes(8)}
    sender = Sender([layout], lambda name, start, kv: layout.sums(kv), lambda name: None, generation=6, **at_once)
    sender.offer("r", 11, now=0.0)
    memory = np.zeros(layout.num_bytes(11), np.uint8) if shares else None
    *pages, _ = sender.hear(Accept(TAG, layout.fingerprint), now=0.0, memory=memory)
    assert [each.count for each in pages if isinstance(each, Pages)] == counts


def test_memory_that_is_too_small_is_not_written_to() -> None:
    memory, there = Memory(), np.zeros(LAYOUT.num_bytes(5) - 1, np.uint8)
    sender = memory.sender()
    sender.offer("r", 5, now=0.0)
    answers = [*sender.hear(Accept(TAG, LAYOUT.fingerprint), now=0.0, memory=there)]
    assert answers == [Abort(TAG, "the memory is too small")] and memory.freed == ["r"] and not there.any()


@pytest.mark.parametrize(
    ("said", "told", "freed"),
    [
        (Hold(Tag("r", 6)), "no pages are held", False),
        (Accept(Tag("r", 6), LAYOUT.fingerprint), "no pages are held", False),  # of an earlier generation
        (Accept(Tag("r", 8), LAYOUT.fingerprint), "no pages are held", False),
        (Accept(Tag("q", 7), LAYOUT.fingerprint), "no pages are held", False),
        (Ack(Tag("r", 6)), None, False),
        (Abort(Tag("r", 6), "late"), None, False),
        (Accept(TAG, "another"), "another model or layout", True),
        (Abort(TAG, "its client has left"), None, True),
        (Done(TAG, ""), "told nothing of this kind", True),
    ],
)
def test_a_sender_heeds_those_alone_whom_its_offer_was_for(said: TransferMessage, told: str | None, freed: bool) -> None:
    memory = Memory()
    sender = memory.sender()
    sender.offer("r", 5, now=0.0)
    answers = [*sender.hear(said, now=0.0)]
    assert [answer.reason for answer in answers if isinstance(answer, Abort) and told and told in answer.reason] == [
        answer.reason for answer in answers if isinstance(answer, Abort)
    ]
    assert len(answers) == (told is not None) and (memory.freed == ["r"]) == freed == (sender.names == [])


def test_pages_that_were_lost_are_not_sent() -> None:
    memory = Memory()
    sender = memory.sender()
    sender.offer("r", 5, now=0.0)
    memory.lost = True
    assert [*sender.hear(Accept(TAG, LAYOUT.fingerprint), now=0.0)] == [Abort(TAG, "the pages have been lost")]
    assert sender.names == []


# ── the receiver ─────────────────────────────────────────────────────────────────────────────────────────────────────────

OFFER = Offer(TAG, 5, (LAYOUT.fingerprint,))


def receiver_of(offer: Offer = OFFER) -> Receiver:
    return Receiver(offer, LAYOUT, np.zeros(LAYOUT.num_bytes(offer.tokens), np.uint8))


def conversation() -> tuple[KV, list[TransferMessage]]:
    """What is right, and what a sender says."""
    kv = some_kv(5)
    pages = [pages_of(kv, a, b) for a, b in ((0, 2), (2, 4), (4, 5))]
    return kv, [*pages, Done(TAG, digest_of([each.checksum for each in pages]))]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 0, 1, 2), (0, 0, 1, 2, 3)])
def test_pages_come_in_any_order_and_twice(order: tuple[int, ...]) -> None:
    kv, said = conversation()
    receiver = receiver_of()
    *first, last = [receiver.hear(said[i]) for i in order]
    assert first == [[]] * len(first) and last == [Ack(TAG)] and receiver.kv is not None and same(receiver.kv, kv)
    got = receiver.kv
    for late in (*said, Abort(TAG, "late")):
        assert receiver.hear(late) == [] and receiver.kv is got and receiver.error is None
    assert receiver.give_up("late") == [] and receiver.error is None


def damaged(pages: Pages, **changes: Any) -> Pages:
    return replace(pages, **changes)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda p: damaged(p, data=[b"".join(p.data)[:-1]]), "damaged"),
        (lambda p: damaged(p, data=[b"".join(p.data) + b"x"]), "damaged"),
        (lambda p: damaged(p, data=[b"\xff" + b"".join(p.data)[1:]]), "damaged"),
        (lambda p: damaged(p, count=1), "damaged"),
        (lambda p: damaged(p, first=-1), "from -1 on"),
        (lambda p: damaged(p, first=4), "from 4 on"),
        (lambda p: damaged(p, count=0, data=[], checksum=checksum([])), "Got 0 tokens"),
        (lambda p: damaged(p, count=1 << 70), "Got"),
        (lambda p: damaged(p, first=0), "differ about token 0"),
        (lambda p: damaged(p, first=1), "not those that were sent"),
        (lambda p: pages_of(some_kv(5, seed=1), 2, 4), "not those that were sent"),
        (lambda p: Done(TAG, "another"), "differ about the end"),
        (lambda p: Ack(TAG), "only a receiver says"),
        (lambda p: Abort(TAG, "the lease is over"), "has given up: the lease is over"),
    ],
)
def test_pages_that_are_not_what_was_sent_are_not_used_and_the_sender_is_told_at_once(spoil: Any, told: str) -> None:
    _, said = conversation()
    assert isinstance(said[1], Pages)
    receiver = receiver_of()
    answers = [answer for each in (said[0], spoil(said[1]), said[2], said[3], said[1]) for answer in receiver.hear(each)]
    assert receiver.kv is None and receiver.error is not None and told in receiver.error
    assert answers == ([] if "given up" in told else [Abort(TAG, receiver.error)])


def test_a_stale_generation_is_told_to_stop_and_changes_nothing() -> None:
    kv, said = conversation()
    receiver, before = receiver_of(), Tag("r", 6)
    stale = pages_of(some_kv(5, seed=2), 2, 4, before)
    for each in (said[0], said[2], said[3]):
        receiver.hear(each)
    assert receiver.hear(stale) == [Abort(before, "nobody waits for it (any more)")]
    assert receiver.hear(Done(before, "")) == [Abort(before, "nobody waits for it (any more)")]
    assert receiver.hear(Abort(before, "")) == [] and not receiver.over
    assert receiver.hear(said[1]) == [Ack(TAG)] and receiver.kv is not None and same(receiver.kv, kv)


@pytest.mark.parametrize(
    ("offer", "told"),
    [
        (replace(OFFER, layouts=("another", "and another")), "another model or layout"),
        (replace(OFFER, tokens=0), "expected 1 to"),
        (replace(OFFER, tokens=-3), "expected 1 to"),
        (replace(OFFER, tokens=100), r"4000 bytes; expected 1 to 400"),
    ],
)
def test_an_offer_of_another_model_or_of_too_much_is_not_accepted(offer: Offer, told: str) -> None:
    with pytest.raises(TransferError, match=told):
        common_layout(offer, [AS_IT_LIES, LAYOUT], max_bytes=400)


@pytest.mark.parametrize(("offered", "chosen"), [((0, 1), 0), ((1, 0), 0), ((1,), 1)])
def test_pages_come_in_the_fastest_form_that_both_have(offered: tuple[int, ...], chosen: int) -> None:
    mine = [AS_IT_LIES, LAYOUT]
    offer = replace(OFFER, layouts=("another", *(mine[i].fingerprint for i in offered)))
    assert common_layout(offer, mine) is mine[chosen]


def test_what_lies_in_memory_and_is_not_what_was_sent_is_not_used() -> None:
    _, said = conversation()
    receiver = receiver_of()
    assert isinstance(said[0], Pages)
    told = receiver.hear(replace(said[0], data=()))  # nobody has put it there
    assert told == [Abort(TAG, "The tokens from 0 on are damaged.")] and receiver.kv is None


# ── the scheduler of who receives ────────────────────────────────────────────────────────────────────────────────────────


def engine_of(size: int, pages: int = 20, **options: Any) -> tuple[Engine, HistoryRunner]:
    runner = HistoryRunner(num_pages=pages, block_size=size, vocab_size=VOCAB, max_seqs=4)
    runner.batches = []
    config = EngineConfig(block_size=size, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, **options)
    return Engine(runner, config, num_pages=pages), runner


def asked(tokens: int, name: str = "r", output: int = 4, first: int = 1) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=tuple((first + i) % VOCAB for i in range(tokens)),
        params=SamplingParams(max_tokens=output, temperature=0.0),
    )


def right(request: Request) -> list[int]:
    return expected(request, vocab_size=VOCAB, max_tokens=64).tokens


def kept_by(engine: Engine, name: str, tokens: int) -> KV:
    """What an engine keeps, in the form that everyone understands."""
    kv = empty(layouts_of(engine.runner, engine.config.block_size, "m")[-1], tokens)
    engine.read_kept(name, 0, kv)
    return kv


def prefilled(request: Request, size: int = 4) -> tuple[KV, int]:
    """The keys and values of its prompt, as another engine computes them, and its first token."""
    engine, _ = engine_of(size)
    first = replace(request, keep_pages=True, params=replace(request.params, max_tokens=1))
    ((event,),) = engine.run([first]).values()
    kv = kept_by(engine, request.request_id, len(request.prompt_token_ids))
    assert event.token_id is not None
    return kv, event.token_id


def received(request: Request, size: int = 4) -> tuple[Request, KV]:
    """The request as it goes on elsewhere, what it waits for not there yet."""
    kv, token = prefilled(request, size)
    return replace(request, output_token_ids=(token,), kv=Future()), kv


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


def finish(engine: Engine) -> list[TokenEvent]:
    events = []
    while engine.has_work:
        events += engine.step()
    return events


def test_a_request_whose_pages_are_on_their_way_is_not_run_and_holds_up_nobody() -> None:
    engine, runner = engine_of(4)
    request, kv = received(asked(10))
    engine.add(request)
    assert request.kv is not None
    for _ in range(2):
        assert engine.step() == [] and runner.batches == []
    other = asked(3, "other")
    engine.add(other)
    events = []
    while "other" in engine.scheduler.live:
        events += engine.step()
    assert tokens_of(events) == right(other)
    assert [seq.status for seq in engine.scheduler.waiting] == [Status.WAITING]
    assert engine.scheduler.pool.num_free == 19  # it has no page yet
    request.kv.set_result(kv)
    assert [*request.output_token_ids, *tokens_of(finish(engine))] == right(asked(10))
    engine.close()


@pytest.mark.parametrize(("tokens", "giving", "taking"), [(10, 4, 4), (8, 4, 4), (10, 2, 8), (9, 8, 1), (16, 16, 4)])
def test_one_token_is_computed_where_the_whole_prompt_has_come(tokens: int, giving: int, taking: int) -> None:
    engine, runner = engine_of(taking, pages=64)
    request, kv = received(asked(tokens), giving)
    assert request.kv is not None
    request.kv.set_result(kv)
    engine.add(request)
    engine.step()
    assert runner.batches is not None
    batch = runner.batches[0]
    assert batch.num_tokens == 1 and batch.positions.tolist() == [tokens] and batch.kv_lengths.tolist() == [tokens + 1]
    (seq,) = engine.scheduler.running
    assert len(seq.pages) == -(-(tokens + 1) // taking)
    keyed = [engine.scheduler.pool.keys[page] is not None for page in seq.pages]
    full = (tokens + 1) // taking
    assert keyed == [True] * full + [False] * (len(seq.pages) - full)  # offered to others, now that a step has used them
    assert engine.stats()["external_prefix_cache_hits"] == tokens
    assert [*request.output_token_ids, *seq.output[1:], *tokens_of(finish(engine))] == right(asked(tokens))
    assert runner.violations == []
    engine.close()


def test_the_last_token_of_a_prompt_is_computed_again_where_nothing_has_been_sampled() -> None:
    engine, runner = engine_of(4)
    request, kv = received(asked(8))
    assert request.kv is not None
    request.kv.set_result(kv)
    engine.add(replace(request, output_token_ids=()))
    events = engine.step()
    assert runner.batches is not None
    assert runner.batches[0].positions.tolist() == [7] and runner.batches[0].page_table.shape[-1] == 2
    assert tokens_of(events + finish(engine)) == right(asked(8))
    engine.close()


def test_nothing_is_offered_to_others_before_a_step_has_used_it() -> None:
    engine, _ = engine_of(4)
    request, kv = received(asked(8))
    assert request.kv is not None
    engine.add(request)
    engine.step()
    assert not engine.scheduler.pool.cached
    request.kv.set_result(kv)
    engine.scheduler.schedule()
    assert not engine.scheduler.pool.cached
    engine.close()


def test_what_the_cache_has_is_shared_and_the_rest_comes() -> None:
    engine, runner = engine_of(4)
    engine.run([asked(9, "before")])
    request, kv = received(asked(14))
    assert request.kv is not None
    request.kv.set_result(kv)
    engine.add(request)
    events = engine.step()
    assert engine.stats()["external_prefix_cache_hits"] == 14 - 8
    assert (engine.stats()["num_taken_over"], engine.stats()["num_computed_anew"]) == (1, 0)
    assert [*request.output_token_ids, *tokens_of(events + finish(engine))] == right(asked(14))
    assert runner.violations == []
    engine.close()


@pytest.mark.parametrize("how", ["fails", "is cancelled", "is of fewer tokens"])
def test_what_has_not_come_is_computed(how: str) -> None:
    engine, runner = engine_of(4)
    request, kv = received(asked(10))
    future = request.kv
    assert future is not None
    engine.add(request)
    engine.step()
    if how == "fails":
        future.set_exception(TransferError("lost"))
    elif how == "is cancelled":
        future.cancel()
    else:
        future.set_result(kv.slice(0, 7))
    events = engine.step()
    assert runner.batches is not None
    assert runner.batches[0].num_tokens == (4 if "fewer" in how else 11)
    assert (engine.stats()["num_taken_over"], engine.stats()["num_computed_anew"]) == (0, 1)
    assert [*request.output_token_ids, *tokens_of(events + finish(engine))] == right(asked(10))
    engine.close()


def test_a_prompt_that_is_to_be_scored_is_computed() -> None:
    engine, _ = engine_of(4)
    request, kv = received(asked(10))
    assert request.kv is not None
    request.kv.set_result(kv)
    scored = replace(request, output_token_ids=(), params=replace(request.params, prompt_logprobs=0))
    first, *_ = engine.run([scored])["r"]
    assert first.prompt_logprobs is not None and len(first.prompt_logprobs) == 10
    assert engine.stats()["external_prefix_cache_hits"] == 0
    engine.close()


def test_who_ends_before_the_pages_have_come_lets_it_be_known() -> None:
    engine, _ = engine_of(4)
    request, _kv = received(asked(10))
    assert request.kv is not None
    engine.add(request)
    engine.step()
    engine.abort("r")
    assert request.kv.cancelled() and [event.finish for event in finish(engine)] == [Status.FINISHED_ABORT]
    assert engine.reset_prefix_cache()
    engine.close()


def test_a_step_that_raises_costs_what_came_and_no_token() -> None:
    engine, runner = engine_of(4)
    request, kv = received(asked(10))
    assert request.kv is not None
    request.kv.set_result(kv)
    engine.add(request)
    runner.fail_submit = RuntimeError("injected")
    engine.step()
    assert [*request.output_token_ids, *tokens_of(finish(engine))] == right(asked(10))
    engine.close()


def test_a_request_holds_on_to_nothing_that_came_once_it_is_in_pages() -> None:
    engine, _ = engine_of(4)
    request, kv = received(asked(10))
    assert request.kv is not None
    request.kv.set_result(kv)
    engine.add(request)
    engine.step()
    (seq,) = engine.scheduler.running
    assert seq.kv is None and seq.request.kv is None
    engine.close()


# ── the scheduler of who sends ───────────────────────────────────────────────────────────────────────────────────────────


def keeping(name: str = "r", tokens: int = 10) -> Request:
    return replace(asked(tokens, name, output=1), keep_pages=True)


def held(scheduler: Scheduler) -> int:
    return scheduler.pool.num_pages - 1 - scheduler.pool.num_free


def test_pages_stay_held_when_their_request_has_ended_until_they_are_given_back() -> None:
    engine, runner = engine_of(4)
    (event,) = engine.run([keeping()])["r"]
    assert event.finish is Status.FINISHED_LENGTH and not engine.has_work
    assert held(engine.scheduler) == 3 and not engine.reset_prefix_cache()
    check_pages(engine.scheduler)
    kept = engine.scheduler.kept["r"].pages
    engine.run([asked(40, "other", first=7)])
    runner.poison([page for page in range(20) if page not in kept])
    kv = kept_by(engine, "r", 10)
    assert kv.groups[0]["v"].ravel().tolist() == list(range(10))
    engine.drop_kept("r")
    engine.drop_kept("r")
    assert held(engine.scheduler) == 0
    with pytest.raises(LookupError, match="no pages of 10 tokens of request r"):
        kept_by(engine, "r", 10)
    engine.close()


@pytest.mark.parametrize("how", ["stop", "abort"])
def test_who_ends_otherwise_keeps_nothing(how: str) -> None:
    engine, _ = engine_of(4)
    stops = tuple(range(VOCAB)) if how == "stop" else ()
    request = keeping()
    engine.add(replace(request, params=replace(request.params, stop_token_ids=stops)))
    if how == "abort":
        engine.abort("r")
    (event,) = finish(engine)
    assert event.finish is (Status.FINISHED_STOP if stops else Status.FINISHED_ABORT)
    assert engine.scheduler.kept == {} and engine.reset_prefix_cache()
    engine.close()


def test_pages_are_lost_when_the_engine_starts_over() -> None:
    engine, runner = engine_of(4)
    engine.run([keeping()])
    runner.fail_submit = RuntimeError("injected")
    engine.run([asked(3, "other")])
    with pytest.raises(LookupError):
        kept_by(engine, "r", 10)
    assert engine.reset_prefix_cache()
    engine.close()


def test_who_needs_pages_that_are_kept_waits_for_them() -> None:
    engine, _ = engine_of(4, pages=5)
    engine.run([keeping()])
    request = asked(12, "other", first=7)
    engine.add(request)
    for _ in range(3):
        assert engine.step() == [] and engine.has_work
    engine.drop_kept("r")
    assert tokens_of(finish(engine)) == right(request)
    engine.close()


def test_a_name_is_not_used_again_while_its_pages_are_kept() -> None:
    engine, _ = engine_of(4)
    engine.run([keeping()])
    with pytest.raises(RequestError, match="kept still"):
        engine.add(keeping())
    engine.drop_kept("r")
    engine.add(keeping())
    engine.close()


def test_embeddings_have_pages_before_those_that_are_kept() -> None:
    engine, _ = engine_of(4, pages=5)
    engine.run([keeping()])
    pages = engine.scheduler.lend(3)
    assert len(pages) == 3 and engine.scheduler.kept == {}
    engine.close()
