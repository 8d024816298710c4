"""Transfer KV pages between processes of one machine by `common.kv_transfer.protocol`, one connection for each transfer.

Who holds pages listens (`TransferServer`), and who goes on with them fetches them (`fetch`), so that either hears at once, as
the connection ends, that the other is gone. Who fetches brings the memory in which they are to lie, as a descriptor that
travels with its `Accept` and so is that of nothing else; where the system has none of that kind, they come over the
connection. Frames that are none, too large, or not signed with the secret of this launch close the connection, and the log
tells.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import socket
import threading
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from io import BytesIO
from time import monotonic
from typing import NamedTuple

import numpy as np

from common.batch import KV
from common.kv_transfer.layout import Layout
from common.kv_transfer.protocol import (
    LEASE_S,
    MAX_BYTES,
    Abort,
    Hold,
    Offer,
    Receiver,
    TransferError,
    TransferMessage,
    common_layout,
    seal,
    unseal,
)
from common.kv_transfer.shared_memory import SHARES, MappingCache, Segment, SegmentPool
from common.process.frames import Frame, NoFrame, read_frame, write_frame

log = logging.getLogger(__name__)

SECRET = "TANDEM_SECRET"
"""The environment variable in which a process finds the secret of this launch. Arguments anyone could see."""
HOST = "127.0.0.1"
COMPLAINT_S = 1.0
"""Between two lines in the log about who has connected: anybody on this machine can, as often as they like."""
HELLO_S = 2.0
"""In which whoever connects must have said what for."""
MAX_CONNECTIONS = 64
MAX_MESSAGE = 1 << 16
"""Bytes of a message, apart from keys and values."""
_BESIDE, _CLOSES = socket.CMSG_SPACE(4), getattr(socket, "MSG_CMSG_CLOEXEC", 0)
"""A descriptor may come beside what is read, or as many as there is room for, which no process that is started has."""
Address = str | int
"""Where a process listens: a name of no file, which goes with the process, or a port of `HOST`."""


class TransferRequest(NamedTuple):
    """What was said to who holds pages, and the way to answer, which must be gone to its end."""

    said: TransferMessage
    memory: np.ndarray | None
    """That came with it."""
    answer: Callable[[TransferMessage | None], object]
    """None is the end of the answers."""


class TransferServer:
    """Where this process listens, at `address`. What is said goes to `heard`, on a thread. `shares`: whether memory may come
    with it."""

    def __init__(self, secret: bytes, heard: Callable[[TransferRequest], object], shares: bool = SHARES) -> None:
        self._secret, self._heard = secret, heard
        self._complained = -COMPLAINT_S
        self.address: Address
        if shares:
            self.address = f"tandem-{os.getpid()}-{secrets.token_hex(8)}"
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(f"\0{self.address}")
            self._listener.listen(MAX_CONNECTIONS)
        else:
            self._listener = socket.create_server((HOST, 0), backlog=MAX_CONNECTIONS)
            self.address = self._listener.getsockname()[1]
        self._room, self._others = threading.BoundedSemaphore(MAX_CONNECTIONS), MappingCache()
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
                    self._complain(f"refused: there are {MAX_CONNECTIONS}")
                    connection.close()

    def _serve(self, connection: socket.socket) -> None:
        """One transfer, to its end."""
        tag = None
        try:
            with _Line(connection, self._secret, most=0) as line:
                line.patience_s = HELLO_S
                while (said := line.hear()) is not None:
                    tag, line.patience_s = said.tag, LEASE_S
                    answers: queue.SimpleQueue[TransferMessage | None] = queue.SimpleQueue()
                    self._heard(TransferRequest(said, line.memory(self._others), answers.put))
                    while (answer := answers.get()) is not None:
                        line.say(answer)
        except (OSError, NoFrame, TransferError) as trouble:
            self._complain(f"closed: {trouble}")
        finally:
            self._room.release()
            if tag is not None:  # in vain where all has gone well
                self._heard(TransferRequest(Abort(tag, "the connection has ended"), None, lambda answer: None))

    def _complain(self, what: str) -> None:
        now = monotonic()
        if now - self._complained >= COMPLAINT_S:
            self._complained = now
            log.warning("A connection for pages was %s", what)


def fetch(address: Address, offer: Offer, layouts: Sequence[Layout], secret: bytes, room: SegmentPool, kv: Future[KV]) -> None:
    """Have `kv` come, in the first of `layouts` in which it can, or fail; it lies in the `room`, for which it waits. Where it
    is cancelled, the connection ends, and so who holds the pages knows."""
    try:
        got = _fetch(address, offer, layouts, secret, room, kv)
    except (OSError, NoFrame, TransferError) as trouble:
        if not kv.cancelled():
            log.warning("The pages of a request have not come, and are computed: %s", trouble)
        with suppress(InvalidStateError):  # cancelled
            kv.set_exception(trouble.with_traceback(None))  # in whose frames the memory is
    else:
        with suppress(InvalidStateError):
            kv.set_result(got)


def _fetch(address: Address, offer: Offer, layouts: Sequence[Layout], secret: bytes, room: SegmentPool, kv: Future[KV]) -> KV:
    layout = common_layout(offer, layouts)
    size = layout.num_bytes(offer.tokens)
    with _Line(_connect(address), secret, most=size) as line:
        if kv.cancelled():
            line.say(Abort(offer.tag, "the request has ended"))
            raise TransferError("The request has ended.")
        kv.add_done_callback(lambda kv: line.hang_up() if kv.cancelled() else None)
        segment, memory = room.take(size, lambda: line.say(Hold(offer.tag)))
        receiver = Receiver(offer, layout, memory)
        line.say(receiver.accept, segment)
        while not receiver.over:
            said = line.hear()
            if said is None:
                raise TransferError("The sender has hung up.")
            for answer in receiver.hear(said):
                line.say(answer)
    if receiver.kv is None:
        raise TransferError(receiver.error or "")
    segment.settled = True
    return receiver.kv


def _connect(address: Address) -> socket.socket:
    if isinstance(address, int):
        return socket.create_connection((HOST, address), HELLO_S)
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(HELLO_S)
        connection.connect(f"\0{address}")
    except BaseException:
        connection.close()
        raise
    return connection


class _Line:
    """A connection on which two who know the secret speak. `most`: bytes of keys and values in a message."""

    def __init__(self, connection: socket.socket, secret: bytes, most: int) -> None:
        self._connection, self._secret, self._most = connection, secret, most
        self._sink = connection.makefile("wb")
        self._descriptor: int | None = None
        self.patience_s = LEASE_S

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._sink.close()
        self._connection.close()
        self._keep(None)

    def say(self, said: TransferMessage, segment: Segment | None = None) -> None:
        """With memory, where both can have it. Raises `TransferError` if nobody is there any more."""
        self._connection.settimeout(LEASE_S)
        try:
            if segment is None or segment.descriptor is None or self._connection.family != socket.AF_UNIX:
                write_frame(self._sink, *seal(said, self._secret))
                return
            frame = BytesIO()
            write_frame(frame, *seal(said, self._secret))
            sent = socket.send_fds(self._connection, [frame.getvalue()], [segment.descriptor])
            self._connection.sendall(frame.getvalue()[sent:])
        except (BrokenPipeError, ConnectionResetError) as gone:
            raise TransferError("The other end has hung up.") from gone

    def hear(self) -> TransferMessage | None:
        """None at the end, be it a rude one."""
        try:
            frame = read_frame(self, MAX_MESSAGE, self._most)
        except ConnectionResetError:
            return None
        return None if frame is None else unseal(Frame(*frame), self._secret)

    def memory(self, others: MappingCache) -> np.ndarray | None:
        """That came with what was heard last."""
        if self._descriptor is None:
            return None
        try:
            return others.open(self._descriptor, MAX_BYTES)
        except (OSError, ValueError) as wrong:
            raise TransferError(f"Memory came that cannot be used: {wrong}.") from wrong
        finally:
            self._keep(None)

    def _keep(self, descriptor: int | None) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = descriptor

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
            count, beside, _, _ = self._connection.recvmsg_into([view[at:]], _BESIDE, _CLOSES)
            for _, kind, content in beside:
                for descriptor in array("i", content) if kind == socket.SCM_RIGHTS else ():
                    self._keep(descriptor)
            if not count:
                break
            at += count
        return bytes(view[:at])
