"""Pages over a connection: what comes is what was held, and who should not have them, or has none, is told nothing and is
logged."""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest

from common.batch import KV
from common.kv_transfer import connection, shared_memory
from common.kv_transfer.connection import HOST, TransferRequest, TransferServer, fetch
from common.kv_transfer.protocol import Abort, Accept, Hold, Offer, Pages, Sender, Tag, TransferError, TransferMessage, seal
from common.kv_transfer.shared_memory import SHARES, SegmentPool
from common.process.frames import MAGIC, read_frame, write_frame
from tests.test_transfer import LAYOUT, Memory, same, some_kv

SECRET = b"of this launch"
PATIENCE_S = 60.0


class Holder:
    """A process that holds pages, as a thread of this one."""

    def __init__(self, tokens: int = 50, shares: bool = SHARES) -> None:
        self.memory = Memory(tokens)
        self.sender: Sender = self.memory.sender(chunk=7)
        self.told: queue.SimpleQueue[TransferRequest | None] = queue.SimpleQueue()
        self.heard: list[TransferMessage] = []
        self.memories: list[bool] = []
        """Whether memory came with each."""
        self.before: Callable[[TransferMessage], None] = lambda said: None
        self.door = TransferServer(SECRET, self.told.put, shares)
        self.offer = self.sender.offer("r", tokens, time.monotonic())
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        while (heard := self.told.get()) is not None:
            self.before(heard.said)
            self.heard.append(heard.said)
            self.memories.append(heard.memory is not None)
            for answer in self.sender.hear(heard.said, time.monotonic(), heard.memory):
                heard.answer(answer)
            heard.answer(None)

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, "it does not come"
            time.sleep(0.005)


@contextmanager
def holding(tokens: int = 50, shares: bool = SHARES) -> Iterator[Holder]:
    holder = Holder(tokens, shares)
    try:
        yield holder
    finally:
        holder.door.close()
        holder.told.put(None)
        holder.thread.join()


def fetched(holder: Holder, offer: Offer | None = None, secret: bytes = SECRET) -> KV:
    kv: Future[KV] = Future()
    fetch(holder.door.address, offer or holder.offer, [LAYOUT], secret, SegmentPool(1 << 30), kv)
    return kv.result(0)


def connected(holder: Holder) -> socket.socket:
    """A stranger."""
    return connection._connect(holder.door.address)


@pytest.fixture(params=[True, False] if SHARES else [False], ids=lambda shares: "memory" if shares else "tcp")
def shares(request: pytest.FixtureRequest) -> bool:
    """Whether pages go through memory that both have, or over TCP."""
    return bool(request.param)


def test_what_comes_is_what_was_held_and_then_it_is_given_back(shares: bool) -> None:
    with holding(shares=shares) as holder:
        assert same(fetched(holder), holder.memory.kv)
        holder.until(lambda: holder.memory.freed == ["r"])
        assert isinstance(holder.heard[0], Accept) and holder.memories == [shares, *[False] * (len(holder.memories) - 1)]
        with pytest.raises(TransferError, match="no pages are held for it"):
            fetched(holder)


@pytest.mark.parametrize(
    ("offer", "told"),
    [
        (lambda offer: replace(offer, tag=Tag("r", offer.tag.generation - 1)), "no pages are held"),
        (lambda offer: replace(offer, tag=Tag("q", offer.tag.generation)), "no pages are held"),
        (lambda offer: replace(offer, layouts=("another",)), "another model or layout"),
        (lambda offer: replace(offer, tokens=20), "Got 7 tokens from 14 on, of 20|damaged"),
    ],
)
def test_what_was_not_offered_does_not_come(offer: Callable[[Offer], Offer], told: str) -> None:
    with holding() as holder, pytest.raises(TransferError, match=told):
        fetched(holder, offer(holder.offer))


def test_who_has_another_secret_gets_nothing_and_the_pages_are_there_for_who_has_it(
    shares: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with holding(shares=shares) as holder:
        with pytest.raises(TransferError, match="hung up"):
            fetched(holder, secret=b"of another launch")
        holder.until(lambda: "not signed with the secret" in caplog.text)
        assert holder.heard == []
        assert same(fetched(holder), holder.memory.kv)


def test_pages_of_who_has_another_secret_are_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    """Another process may have come to listen where the one that held the pages did."""
    with holding() as holder:
        holder.door._secret = b"of another launch"
        holder.door._heard = lambda heard: heard.answer([Abort(heard.said.tag, "no")])
        with pytest.raises(TransferError):
            fetched(holder)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "expected a frame"),
        (b"\xff" * 100, "expected a frame"),
        (MAGIC + b"\xff" * 12, "at most 65536 and 0 are expected"),
        (MAGIC + (2).to_bytes(4, "little") + (1).to_bytes(8, "little") + b"{}x", "at most 65536 and 0 are expected"),
        (MAGIC + (2).to_bytes(4, "little") + bytes(8) + b"{}", "Expected a message about a transfer"),
        (MAGIC + (9).to_bytes(4, "little") + bytes(8) + b"[[[[[[[[[", "no JSON"),
    ],
)
def test_garbage_is_refused_and_logged(data: bytes, told: str, shares: bool, caplog: pytest.LogCaptureFixture) -> None:
    with holding(shares=shares) as holder:
        with connected(holder) as stranger:
            stranger.sendall(data)
            stranger.settimeout(PATIENCE_S)
            with suppress(ConnectionError):
                assert stranger.recv(1) == b""
        holder.until(lambda: told in caplog.text)
        assert holder.heard == [] and same(fetched(holder), holder.memory.kv)


@pytest.mark.parametrize("drips", [False, True])
def test_who_says_nothing_is_hung_up_on(drips: bool, shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HELLO_S", 0.3)
    with holding(shares=shares) as holder, connected(holder) as stranger:
        stranger.settimeout(0.05)
        begin, closed = time.monotonic(), False
        while not closed:
            try:
                if drips:
                    stranger.sendall(MAGIC[:1])
                closed = stranger.recv(1) == b""
            except TimeoutError:
                pass
            except ConnectionError:  # what was still on its way to who has hung up
                closed = True
            assert time.monotonic() - begin < PATIENCE_S
        assert holder.heard == []


def test_there_is_room_for_so_many_and_no_more(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 3)
    monkeypatch.setattr(connection, "COMPLAINT_S", 60.0)
    with holding() as holder:
        others = [connected(holder) for _ in range(3)]
        with pytest.raises((TransferError, ConnectionError)):
            fetched(holder)
        for _ in range(8):
            with connected(holder) as refused:
                assert refused.recv(1) == b""
        assert caplog.text.count("refused: there are 3") == 1
        for other in others:
            other.close()
        holder.until(lambda: holder.door._room._value == 3)
        assert same(fetched(holder), holder.memory.kv)


def test_who_ends_a_request_on_the_way_lets_it_be_known_at_once() -> None:
    with holding() as holder:
        kv: Future[KV] = Future()
        reached, go_on = threading.Event(), threading.Event()

        def before(said: TransferMessage) -> None:
            if isinstance(said, Accept):
                reached.set()
                go_on.wait(PATIENCE_S)

        holder.before = before
        fetching = threading.Thread(
            target=fetch, args=(holder.door.address, holder.offer, [LAYOUT], SECRET, SegmentPool(1 << 30), kv)
        )
        fetching.start()
        assert reached.wait(PATIENCE_S)
        kv.cancel()
        fetching.join(PATIENCE_S)
        go_on.set()
        holder.until(lambda: holder.memory.freed == ["r"])
        assert isinstance(holder.heard[-1], Abort)
        with pytest.raises(CancelledError):
            kv.result(0)


def test_who_has_ended_before_the_pages_were_asked_for_lets_it_be_known_too(caplog: pytest.LogCaptureFixture) -> None:
    with holding() as holder:
        kv: Future[KV] = Future()
        kv.cancel()
        fetch(holder.door.address, holder.offer, [LAYOUT], SECRET, SegmentPool(1 << 30), kv)
        holder.until(lambda: holder.memory.freed == ["r"])
        assert isinstance(holder.heard[0], Abort) and "are computed" not in caplog.text


def test_who_hangs_up_on_the_way_is_not_waited_for() -> None:
    """The one that holds pages dies in the middle of a part of them."""
    listener = socket.create_server((HOST, 0))

    def die() -> None:
        line, _ = listener.accept()
        with line, line.makefile("rwb") as stream:
            assert read_frame(stream) is not None
            data = LAYOUT.pack(some_kv(3))
            write_frame(stream, *seal(Pages(Tag("r", 7), 0, 3, 0, data), SECRET))
            line.sendall(MAGIC + bytes(3))

    dying = threading.Thread(target=die)
    dying.start()
    kv: Future[KV] = Future()
    fetch(listener.getsockname()[1], Offer(Tag("r", 7), 6, (LAYOUT.fingerprint,)), [LAYOUT], SECRET, SegmentPool(1 << 30), kv)
    assert isinstance(kv.exception(0), TransferError)
    dying.join()
    listener.close()


def test_memory_of_what_was_given_up_on_the_way_is_not_used_again() -> None:
    """Who holds pages may still write to it."""
    room = SegmentPool(1 << 30)
    for tokens, kept in ((20, False), (50, True)):  # there are 50: who expects 20 finds them damaged
        with holding() as holder:
            kv: Future[KV] = Future()
            fetch(holder.door.address, replace(holder.offer, tokens=tokens), [LAYOUT], SECRET, room, kv)
            assert (kv.exception(0) is None) == kept
            del kv
            assert bool(room._free) == kept


def test_who_is_not_there_is_not_waited_for() -> None:
    with holding() as holder:
        address = holder.door.address
    kv: Future[KV] = Future()
    fetch(address, holder.offer, [LAYOUT], SECRET, SegmentPool(1 << 30), kv)
    assert isinstance(kv.exception(0), ConnectionError)


def test_the_pages_of_many_requests_come_at_once() -> None:
    with holding(200) as holder:
        offers = [holder.sender.offer(f"r{i}", 200, time.monotonic()) for i in range(20)]
        found: list[Future[KV]] = [Future() for _ in offers]
        room = SegmentPool(1 << 30)
        threads = [
            threading.Thread(target=fetch, args=(holder.door.address, offer, [LAYOUT], SECRET, room, kv))
            for offer, kv in zip(offers, found, strict=True)
        ]
        for thread in threads:
            thread.start()
        assert all(same(kv.result(PATIENCE_S), holder.memory.kv) for kv in found)
        for thread in threads:
            thread.join()


def test_what_finds_no_room_is_held_until_there_is_and_comes_then(shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a lease: who waits says so."""
    monkeypatch.setattr(shared_memory, "PATIENCE_S", 0.05)
    with holding(200, shares=shares) as holder:
        holder.sender._lease_s = 1.0
        offers = [holder.sender.offer(f"r{i}", 200, time.monotonic()) for i in range(3)]
        room, found = SegmentPool(1), [Future[KV]() for _ in offers]
        for offer, kv in zip(offers, found, strict=True):
            threading.Thread(target=fetch, args=(holder.door.address, offer, [LAYOUT], SECRET, room, kv)).start()
            holder.until(lambda kv=kv, offer=offer: kv.done() or Hold(offer.tag) in holder.heard)
        assert [kv.done() for kv in found] == [True, False, False]
        holder.until(lambda: sum(said == Hold(offers[2].tag) for said in holder.heard) > 30)
        assert [kv.done() for kv in found] == [True, False, False]
        for i in range(3):
            assert same(found[i].result(PATIENCE_S), holder.memory.kv)
            found[i] = Future()  # it is in pages now
        holder.until(lambda: sorted(holder.memory.freed) == ["r0", "r1", "r2"])


def test_who_ends_while_it_waits_for_room_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "PATIENCE_S", 0.05)
    with holding(200) as holder:
        offers = [holder.sender.offer(f"r{i}", 200, time.monotonic()) for i in range(3)]
        room, found = SegmentPool(1), [Future[KV]() for _ in offers]
        for offer, kv in zip(offers, found, strict=True):
            threading.Thread(target=fetch, args=(holder.door.address, offer, [LAYOUT], SECRET, room, kv)).start()
            holder.until(lambda kv=kv, offer=offer: kv.done() or Hold(offer.tag) in holder.heard)
        found[1].cancel()
        holder.until(lambda: "r1" in holder.memory.freed)
        found[0] = Future()
        assert same(found[2].result(PATIENCE_S), holder.memory.kv)


def test_memory_that_its_owner_could_make_shorter_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who reads beyond the end of memory is ended by the system."""
    if not SHARES:
        pytest.skip("the system has no memory without a name")
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(1 << 20)
        unsealed, empty = os.memfd_create("unsealed"), os.memfd_create("empty", os.MFD_ALLOW_SEALING)
        pipe = os.pipe()
        os.ftruncate(unsealed, 1 << 20)
        fcntl.fcntl(empty, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        for descriptor in (file.fileno(), unsealed, empty, *pipe):
            caplog.clear()
            with holding() as holder, connected(holder) as peer:
                frame = BytesIO()
                write_frame(frame, *seal(Accept(holder.offer.tag, LAYOUT.fingerprint), SECRET))
                socket.send_fds(peer, [frame.getvalue()], [descriptor])
                peer.settimeout(PATIENCE_S)
                assert peer.recv(1) == b""
                holder.until(lambda: "Memory came that cannot be used" in caplog.text)
                assert holder.heard == [] or all(isinstance(said, Abort) for said in holder.heard)
        for descriptor in (unsealed, empty, *pipe):
            os.close(descriptor)


def test_descriptors_that_strangers_send_are_not_kept() -> None:
    if not SHARES:
        pytest.skip("the system has no memory without a name")
    reading, writing = os.pipe()
    with holding() as holder, connected(holder) as stranger:
        twins = [os.dup(writing) for _ in range(3)]
        socket.send_fds(stranger, [MAGIC[:2]], [writing, *twins])
        for descriptor in (writing, *twins):
            os.close(descriptor)
        socket.send_fds(stranger, [b"no frame"], [])
        assert os.read(reading, 1) == b""  # once nobody has the other end
        os.close(reading)
        assert same(fetched(holder), holder.memory.kv)


def test_the_log_is_quiet_where_all_goes_well(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with holding() as holder:
        fetched(holder)
        holder.until(lambda: holder.memory.freed == ["r"])
    assert caplog.text == ""
