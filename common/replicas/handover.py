"""Pages on their way from one process to another: what `common.schedule.transfer` says, over TCP on this machine, a connection
for each transfer.

Who holds pages listens (`Door`), and who goes on with them fetches them (`fetch`), so that either hears at once, as the
connection ends, that the other is gone. Frames that are none, too large, or not signed with the secret of this launch close the
connection, and the log tells.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from time import monotonic
from typing import NamedTuple

from common.frames import Frame, NoFrame, read_frame, write_frame
from common.schedule.kv import KV, Layout
from common.schedule.transfer import LEASE_S, Abort, Offer, Receiver, Said, TransferError, seal, unseal

log = logging.getLogger(__name__)

SECRET = "TANDEM_SECRET"
"""The environment variable in which a process finds the secret of this launch. Arguments anyone could see."""
HOST = "127.0.0.1"
HELLO_S = 2.0
"""In which whoever connects must have said what for."""
MAX_CONNECTIONS = 64
MAX_MESSAGE = 1 << 16
"""Bytes of a message, apart from keys and values."""
_Answers = Callable[[list[Said]], object]


class Heard(NamedTuple):
    """What was said to who holds pages, and the way to answer, which must be gone once."""

    said: Said
    answer: _Answers


class Door:
    """Where this process listens, at `port`. What is said goes to `heard`, on a thread."""

    def __init__(self, secret: bytes, heard: Callable[[Heard], object]) -> None:
        self._secret, self._heard = secret, heard
        self._listener = socket.create_server((HOST, 0), backlog=MAX_CONNECTIONS)
        self.port: int = self._listener.getsockname()[1]
        self._room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        threading.Thread(target=self._accept, name="door", daemon=True).start()

    def close(self) -> None:
        """Nobody else comes in."""
        with suppress(OSError):  # which wakes the thread that waits
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # it was closed
            while True:
                connection, _ = self._listener.accept()
                if self._room.acquire(blocking=False):
                    threading.Thread(target=self._serve, args=[connection], daemon=True).start()
                else:
                    log.warning("A connection for pages was refused: there are %d.", MAX_CONNECTIONS)
                    connection.close()

    def _serve(self, connection: socket.socket) -> None:
        """One transfer, to its end."""
        tag = None
        try:
            with _Line(connection, self._secret, most=0) as line:
                line.patience_s = HELLO_S
                while (said := line.hear()) is not None:
                    tag, line.patience_s = said.tag, LEASE_S
                    answers: queue.SimpleQueue[list[Said]] = queue.SimpleQueue()
                    self._heard(Heard(said, answers.put))
                    for answer in answers.get():
                        line.say(answer)
        except (OSError, NoFrame, TransferError) as trouble:
            log.warning("A connection for pages was closed: %s", trouble)
        finally:
            self._room.release()
            if tag is not None:  # in vain where all has gone well
                self._heard(Heard(Abort(tag, "the connection has ended"), lambda answers: None))


def fetch(port: int, offer: Offer, layout: Layout, secret: bytes, kv: Future[KV]) -> None:
    """Have `kv` come, or fail. Where it is cancelled, the connection ends, and so who holds the pages knows."""
    try:
        got = _fetch(port, offer, layout, secret, kv)
    except (OSError, NoFrame, TransferError) as trouble:
        if not kv.cancelled():
            log.warning("The pages of a request have not come, and are computed: %s", trouble)
        with suppress(InvalidStateError):  # cancelled
            kv.set_exception(trouble)
    else:
        with suppress(InvalidStateError):
            kv.set_result(got)


def _fetch(port: int, offer: Offer, layout: Layout, secret: bytes, kv: Future[KV]) -> KV:
    receiver = Receiver(offer, layout, monotonic())
    with _Line(socket.create_connection((HOST, port), HELLO_S), secret, most=layout.num_bytes(offer.tokens)) as line:
        line.say(Abort(offer.tag, "the request has ended") if kv.cancelled() else receiver.accept)
        kv.add_done_callback(lambda kv: line.hang_up() if kv.cancelled() else None)
        while not receiver.over:
            said = line.hear()
            if said is None:
                raise TransferError("The sender has hung up.")
            for answer in receiver.hear(said, monotonic()):
                line.say(answer)
    if receiver.kv is None:
        raise TransferError(receiver.error or "")
    return receiver.kv


class _Line:
    """A connection on which two who know the secret speak. `most`: bytes of keys and values in a message."""

    def __init__(self, connection: socket.socket, secret: bytes, most: int) -> None:
        self._connection, self._secret, self._most = connection, secret, most
        self._sink = connection.makefile("wb")
        self.patience_s = LEASE_S

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._sink.close()
        self._connection.close()

    def say(self, said: Said) -> None:
        self._connection.settimeout(LEASE_S)
        write_frame(self._sink, *seal(said, self._secret))

    def hear(self) -> Said | None:
        """None at the end."""
        frame = read_frame(self, MAX_MESSAGE, self._most)
        return None if frame is None else unseal(Frame(*frame), self._secret)

    def hang_up(self) -> None:
        """Any thread may do it."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def read(self, size: int, /) -> bytes:
        """For frames: whoever takes longer than the patience over a part of one has said nothing."""
        data, at, end = bytearray(size), 0, monotonic() + self.patience_s
        view = memoryview(data)
        while at < size:
            left = end - monotonic()
            if left <= 0:
                raise TimeoutError("it takes too long")
            self._connection.settimeout(left)
            count = self._connection.recv_into(view[at:])
            if not count:
                break
            at += count
        return bytes(view[:at])
