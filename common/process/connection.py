"""Authenticated connections over a network between two processes of one launch.

Both know the secret of the launch. Each proves it to the other, and the secret itself is never sent:

    listener   nonce ───────────────────────────►   connector
               ◄─────────── nonce, hello, proof
               answer, proof ───────────────────►

A proof is an HMAC with the secret over the role of its sender, both nonces and the message (RFC 2104). The nonces are new for
each connection, so a recorded proof is valid for no other one. A listener reads all connections that have not proved the secret
on one thread, without waiting, with a limit on their number, time and bytes. If there are too many, it closes the oldest. A
flood of silent connections closes its own this way, and a process of the launch, which answers at once, gets through.

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
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from io import BytesIO
from typing import NamedTuple

from common.errors import shown
from common.process.frames import Message, NoFrame, Source, read_frame, write_frame
from common.process.secret import SECRET

log = logging.getLogger(__name__)

HANDSHAKE_S = 10.0
"""For one handshake, all messages together."""
_MAX_HELLO = 1 << 16
"""Bytes of each message."""
_MAX_STRANGERS = 256
"""Connections that are being authenticated at the same time."""
_LOGGED_PER_S = 10
"""Log messages about closed connections."""
_CHECK_S = 0.5
"""Interval of the checks for late connections and for a closed listener."""
_RETRY_S = 0.1
_SILENCE_S = 1
"""Between two keep-alive probes of an idle connection."""
_GONE_S = 4
"""Without an answer to the probes, after which the other machine counts as lost."""
_CLOSED = (errno.EINVAL, errno.EBADF, errno.ENOTSOCK)
"""Errors of `accept` on a listener that was closed."""


class Refused(ConnectionError):
    """The listener refused the connection and sent the reason."""


class _Busy(ConnectionError):
    """The listener closed the connection to make room for another one."""


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
    `unread_s` seconds until they are read. If the listener is busy, connect again for `HANDSHAKE_S` seconds.

    Raises `Refused`, and `OSError` for any other failure."""
    deadline = time.monotonic() + HANDSHAKE_S
    while True:
        line = socket.create_connection((host, port), HANDSHAKE_S)
        try:
            answer = _introduce(line, secret, hello)
            _keep_alive(line, unread_s)
            return line, answer
        except BaseException as error:
            line.close()
            if not isinstance(error, (_Busy, ConnectionResetError, BrokenPipeError)) or time.monotonic() > deadline:
                raise
        time.sleep(_RETRY_S)


def serve(listener: socket.socket, secret: str, handle: Callable[[Connection], object]) -> None:
    """Authenticate connections until the listener is closed. Each of these has a thread, which calls `handle` with it."""
    listener.setblocking(False)
    with closing(_Strangers(listener, secret)) as strangers:
        while listener.fileno() >= 0:  # else closed so soon after its shutdown that `wait` did not return it
            for line in strangers.wait():
                if line is not listener:
                    if connection := strangers.read(line):
                        threading.Thread(target=handle, args=(connection,), daemon=True).start()
                    continue
                try:
                    new, (host, *_) = listener.accept()
                except (BlockingIOError, ConnectionAbortedError):  # the connector has gone
                    continue
                except OSError as error:
                    if error.errno in _CLOSED:
                        return
                    strangers.make_room(f"A connection could not be accepted: {error}")  # such as no free file descriptor
                else:
                    strangers.add(new, host)


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


@dataclass
class _Stranger:
    """A connection that has not proved the secret."""

    host: str
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    received: bytearray = field(default_factory=bytearray)
    deadline: float = field(default_factory=lambda: time.monotonic() + HANDSHAKE_S)


class _Strangers:
    """The connections to a listener that have not proved the secret, the oldest first."""

    def __init__(self, listener: socket.socket, secret: str) -> None:
        self._secret, self._each = secret, dict[socket.socket, _Stranger]()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, listener)
        self._second, self._logged, self._unlogged = 0.0, 0, 0

    def wait(self) -> list[socket.socket]:
        """Return the sockets with something to read, the listener among them, after `_CHECK_S` at most. Close late ones."""
        for line, stranger in list(self._each.items()):
            if stranger.deadline > time.monotonic():
                break
            self._close(line, "the handshake took too long")
        return [key.data for key, _ in self._selector.select(_CHECK_S)]

    def add(self, line: socket.socket, host: str) -> None:
        """Start the handshake with a new connection."""
        if len(self._each) >= _MAX_STRANGERS:
            self.make_room(f"More than {_MAX_STRANGERS} connections have not proved that they know the secret of this launch")
        line.setblocking(False)
        stranger = self._each[line] = _Stranger(host)
        self._selector.register(line, selectors.EVENT_READ, line)
        try:
            send(line, {"nonce": stranger.nonce})
        except OSError as error:
            self._close(line, str(error))

    def make_room(self, why: str) -> None:
        """Close the oldest connection of the host that has the most. Wait a moment if there is none."""
        self._warn(f"{why}.")
        if not self._each:
            time.sleep(_RETRY_S)
            return
        ((most, _),) = Counter(stranger.host for stranger in self._each.values()).most_common(1)
        line = next(line for line, stranger in self._each.items() if stranger.host == most)
        with suppress(OSError):
            send(line, {"busy": True})
        self._forget(line)
        line.close()
        line.close()

    def read(self, line: socket.socket) -> Connection | None:
        """Read from a connection. Return it once it has proved the secret, and close it if it cannot do so any more."""
        stranger = self._each.get(line)
        if stranger is None:  # closed since `wait` returned it
            return None
        try:
            connection = _authenticate(line, stranger, self._secret)
        except BlockingIOError:
            return None
        except OSError as error:
            self._close(line, str(error))
            return None
        if connection is not None:
            self._forget(line)
        return connection

    def close(self) -> None:
        """Close all."""
        for line in list(self._each):
            self._forget(line)
            line.close()
        self._selector.close()
        self._log_rest()

    def _close(self, line: socket.socket, why: str) -> None:
        self._warn(f"A connection from {self._each[line].host} was closed: {why}.")
        self._forget(line)
        line.close()

    def _forget(self, line: socket.socket) -> None:
        del self._each[line]
        self._selector.unregister(line)

    def _warn(self, message: str) -> None:
        """Log a message, at most `_LOGGED_PER_S` a second and the number of those left out."""
        if time.monotonic() - self._second > 1:
            self._log_rest()
            self._second, self._logged = time.monotonic(), 0
        if self._logged < _LOGGED_PER_S:
            log.warning("%s", message)
            self._logged += 1
        else:
            self._unlogged += 1

    def _log_rest(self) -> None:
        if self._unlogged:
            log.warning("%d more messages about connections were left out.", self._unlogged)
        self._unlogged = 0


def _introduce(line: socket.socket, secret: str, hello: Message) -> Message:
    """Run the handshake of a connector and return the answer. Raises `OSError`."""
    stream = _Timed(line, HANDSHAKE_S)
    nonces = str(_receive(stream).get("nonce")), secrets.token_hex(16)
    send(line, {"nonce": nonces[1], "hello": hello, "proof": _proof(secret, "connector", nonces, hello)})
    reply = _receive(stream)
    if "busy" in reply:
        raise _Busy("too many connections there have not proved that they know the secret")
    if "refused" in reply:
        raise Refused(str(reply["refused"])[:1000])
    answer = reply.get("answer")
    if not isinstance(answer, dict) or not _proves(reply, secret, "listener", nonces, answer):
        raise ConnectionError(f"the process there does not know the secret of this launch ({SECRET})")
    return answer


def _authenticate(line: socket.socket, stranger: _Stranger, secret: str) -> Connection | None:
    """Run the handshake of a listener up to the answer, with the bytes that are there. Return None if more are due.

    Raises `OSError`."""
    part = line.recv(_MAX_HELLO)
    stranger.received += part
    stream = BytesIO(stranger.received)
    said = _message(stream)
    if said is None:
        if not part:
            raise ConnectionError("it closed the connection")
        return None
    if stream.read(1):
        raise ConnectionError("it sent more than one message")
    hello, nonces = said.get("hello"), (stranger.nonce, str(said.get("nonce")))
    if not isinstance(hello, dict) or not _proves(said, secret, "connector", nonces, hello):
        with suppress(OSError):
            send(line, {"refused": f"The secrets differ. Set {SECRET} to the same text for all processes of this launch."})
        raise ConnectionError(f"it did not prove that it knows the secret of this launch ({SECRET})")
    _keep_alive(line)
    return Connection(line, stranger.host, hello, secret, nonces)


def _proof(secret: str, role: str, nonces: tuple[str, str], message: Message) -> str:
    text = json.dumps([role, *nonces, message], sort_keys=True)
    return hmac.new(secret.encode(errors="surrogatepass"), text.encode(), "sha256").hexdigest()


def _proves(said: Message, secret: str, role: str, nonces: tuple[str, str], message: Message) -> bool:
    given = str(said.get("proof")).encode(errors="replace")
    try:
        return hmac.compare_digest(given, _proof(secret, role, nonces, message).encode())
    except RecursionError:  # JSON that is nested deeper than any message of a launch
        return False


def _receive(stream: _Timed) -> Message:
    """Return the next message. Raises `OSError`."""
    message = _message(stream)
    if message is None:
        raise ConnectionError("it closed the connection")
    return message


def _message(stream: Source) -> Message | None:
    """Return the next message, or None if the stream ends before its end. Raises `OSError`."""
    try:
        frame = read_frame(stream, _MAX_HELLO, 0)
    except NoFrame as error:
        raise ConnectionError(f"it sent no valid message ({shown(str(error), 200)})") from error
    return frame and frame.message


def _keep_alive(line: socket.socket, unread_s: int = _GONE_S) -> None:
    """Wait for reads without a limit, detect a lost machine by probes, and send small messages at once."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    patience = (("TCP_KEEPIDLE", _SILENCE_S), ("TCP_KEEPINTVL", _SILENCE_S), ("TCP_USER_TIMEOUT", unread_s * 1000))
    for name, value in (("TCP_NODELAY", 1), *patience):
        if hasattr(socket, name):  # not on every system under these names
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
