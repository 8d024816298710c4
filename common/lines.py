"""Authenticated connections over a network between two processes of one launch.

Both know the secret of the launch. Each proves it to the other, and the secret itself is never sent:

    listener   nonce ───────────────────────────►   connector
               ◄─────────── nonce, hello, proof
               answer, proof ───────────────────►

A proof is an HMAC with the secret over the role of its sender, both nonces and the message (RFC 2104). The nonces are new for
each connection, so a recorded proof is valid for no other one. A listener authenticates each connection on a thread of its own,
with a limit on time and bytes, so a stranger that stays silent delays no other connection.

After the handshake the connection belongs to the two processes. Nothing on it is encrypted or signed, so the network must be
trusted.
"""

from __future__ import annotations

import errno
import hmac
import json
import logging
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from common.errors import shown
from common.frames import Message, NoFrame, read_frame, write_frame
from common.secret import SECRET

log = logging.getLogger(__name__)

HANDSHAKE_S = 10.0
"""For one handshake, all messages together."""
_MAX_HELLO = 1 << 16
"""Bytes of each message."""
_MAX_STRANGERS = 64
"""Connections that are being authenticated at the same time."""
_RETRY_S = 0.1
_SILENCE_S = 1
"""Between two keep-alive probes of an idle connection."""
_GONE_S = 4
"""Without an answer to the probes, after which the other machine counts as lost."""
_CLOSED = (errno.EINVAL, errno.EBADF, errno.ENOTSOCK)
"""Errors of `accept` on a listener that was closed."""


class Refused(ConnectionError):
    """The listener refused the connection and sent the reason."""


class Connection(NamedTuple):
    """A connection that a listener has authenticated. The connector waits for `answer` or `refuse`."""

    socket: socket.socket
    host: str
    """Address of the connector."""
    hello: Message
    secret: str
    nonces: tuple[str, str]
    """Of listener and connector."""

    def answer(self, message: Message) -> None:
        """Complete the handshake. Raises `OSError`."""
        send(self.socket, {"answer": message, "proof": _proof(self.secret, "listener", self.nonces, message)})

    def refuse(self, reason: str) -> None:
        """Refuse the connector and log the reason. Raises `OSError`."""
        log.error("A process at %s was refused: %s", self.host, reason)
        send(self.socket, {"refused": reason})


def connect(host: str, port: int, secret: str, hello: Message, unread_s: int = _GONE_S) -> tuple[socket.socket, Message]:
    """Connect to a listener of this launch, and return the connection and the answer to `hello`. Written bytes may wait
    `unread_s` seconds until they are read. Raises `Refused`, and `OSError` for any other failure."""
    line = socket.create_connection((host, port), HANDSHAKE_S)
    try:
        stream = _Timed(line, HANDSHAKE_S)
        nonces = str(_receive(stream).get("nonce")), secrets.token_hex(16)
        send(line, {"nonce": nonces[1], "hello": hello, "proof": _proof(secret, "connector", nonces, hello)})
        reply = _receive(stream)
        if "refused" in reply:
            raise Refused(str(reply["refused"])[:1000])
        answer = reply.get("answer")
        if not isinstance(answer, dict) or not _proves(reply, secret, "listener", nonces, answer):
            raise ConnectionError(f"the process there does not know the secret of this launch ({SECRET})")
        _keep_alive(line, unread_s)
    except BaseException:
        line.close()
        raise
    return line, answer


def serve(listener: socket.socket, secret: str, handle: Callable[[Connection], object]) -> None:
    """Authenticate connections until the listener is closed. Each has a thread, which calls `handle` with it."""
    room = threading.BoundedSemaphore(_MAX_STRANGERS)
    while True:
        room.acquire()
        try:
            line, (host, *_) = listener.accept()
        except OSError as error:
            room.release()
            if error.errno in _CLOSED:
                return
            log.warning("A connection could not be accepted: %s.", error)  # such as no free file descriptor
            time.sleep(_RETRY_S)
            continue
        threading.Thread(target=_serve, args=(line, host, secret, handle, room), daemon=True).start()


def close_listener(listener: socket.socket) -> None:
    """Close a listener and end `serve` on it. Idempotent."""
    with suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
    listener.close()


def accept_one(listener: socket.socket, secret: str) -> socket.socket:
    """Return the first authenticated connection and close the listener. Raises `OSError` if none comes in time."""
    arrivals: queue.SimpleQueue[Connection] = queue.SimpleQueue()
    threading.Thread(target=serve, args=(listener, secret, arrivals.put), daemon=True).start()
    try:
        connection = arrivals.get(timeout=HANDSHAKE_S)
    except queue.Empty:
        raise TimeoutError(f"no process of this launch connected within {HANDSHAKE_S:g} s") from None
    finally:
        close_listener(listener)
    connection.answer({})
    return connection.socket


def send(line: socket.socket, message: Message) -> None:
    """Send a message. Raises `OSError`."""
    with line.makefile("wb") as stream:
        write_frame(stream, message)


def receive(line: socket.socket, timeout: float = HANDSHAKE_S) -> Message:
    """Return the next message, of bounded size. Raises `OSError` if none comes in time."""
    message = _receive(_Timed(line, timeout))
    line.settimeout(None)
    return message


def raw(line: socket.socket) -> socket.SocketIO:
    """Return the connection as a file without a buffer. To close the file closes the connection."""
    with line:
        return line.makefile("rwb", buffering=0)


def own_address(host: str) -> str:
    """Return the address by which `host` reaches this machine. Raises `OSError`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((host, 9))  # sends nothing
        address: str = way.getsockname()[0]
        return address


class _Timed:
    """The bytes of a connection. All reads together must end within `seconds`."""

    def __init__(self, line: socket.socket, seconds: float) -> None:
        self._line, self._deadline = line, time.monotonic() + seconds

    def read(self, size: int, /) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("the handshake took too long")
            self._line.settimeout(left)
            part = self._line.recv(size - len(parts))
            if not part:
                break
            parts += part
        return bytes(parts)


def _serve(
    line: socket.socket,
    host: str,
    secret: str,
    handle: Callable[[Connection], object],
    room: threading.Semaphore,
) -> None:
    try:
        connection = _authenticate(line, host, secret)
    except OSError as error:
        log.warning("A connection from %s was closed: %s.", host, error)
        line.close()
        return
    finally:
        room.release()
    handle(connection)


def _authenticate(line: socket.socket, host: str, secret: str) -> Connection:
    """Run the handshake of a listener up to the answer. Raises `OSError`."""
    stream, nonce = _Timed(line, HANDSHAKE_S), secrets.token_hex(16)
    line.settimeout(HANDSHAKE_S)
    send(line, {"nonce": nonce})
    said = _receive(stream)
    hello, nonces = said.get("hello"), (nonce, str(said.get("nonce")))
    if not isinstance(hello, dict) or not _proves(said, secret, "connector", nonces, hello):
        with suppress(OSError):
            send(line, {"refused": f"The secrets differ. Set {SECRET} to the same text for all processes of this launch."})
        raise ConnectionError(f"it did not prove that it knows the secret of this launch ({SECRET})")
    _keep_alive(line)
    return Connection(line, host, hello, secret, nonces)


def _proof(secret: str, role: str, nonces: tuple[str, str], message: Message) -> str:
    text = json.dumps([role, *nonces, message], sort_keys=True)
    return hmac.new(secret.encode(errors="surrogatepass"), text.encode(), "sha256").hexdigest()


def _proves(said: Message, secret: str, role: str, nonces: tuple[str, str], message: Message) -> bool:
    given = str(said.get("proof")).encode(errors="replace")
    return hmac.compare_digest(given, _proof(secret, role, nonces, message).encode())


def _receive(stream: _Timed) -> Message:
    """Return the next message. Raises `OSError`."""
    try:
        frame = read_frame(stream, _MAX_HELLO, 0)
    except NoFrame as error:
        raise ConnectionError(f"it sent no valid message ({shown(str(error), 200)})") from error
    if frame is None:
        raise ConnectionError("it closed the connection")
    return frame.message


def _keep_alive(line: socket.socket, unread_s: int = _GONE_S) -> None:
    """Wait for reads without a limit, detect a lost machine by probes, and send small messages at once."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    patience = (("TCP_KEEPIDLE", _SILENCE_S), ("TCP_KEEPINTVL", _SILENCE_S), ("TCP_USER_TIMEOUT", unread_s * 1000))
    for name, value in (("TCP_NODELAY", 1), *patience):
        if hasattr(socket, name):  # not on every system under these names
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
