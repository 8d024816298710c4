"""Connections over a network between two of our processes: who connects says what for, who listens answers, and from then on
the connection is theirs.

Nothing is encrypted: the network must be one that is trusted. A secret keeps out who shares it.
"""

from __future__ import annotations

import hmac
import socket
import time

from common.frames import Message, NoFrame, read_frame, write_frame

_HELLO_S = 10.0
"""In which whoever connects must have said what for, and has been answered."""
_MAX_HELLO = 1 << 16
"""Bytes of either."""
_SILENCE_S = 1
"""After which a connection is asked whether its other end is there, and so often again."""
_GONE_S = 4
"""Without an answer, after which the machine at its other end is no more."""


def reach(host: str, port: int, hello: Message, unread_s: int = _GONE_S) -> tuple[socket.socket, Message]:
    """Connect to who listens there, and hear what is answered to `hello`. What is written may wait for `unread_s` to be read.
    Raises `OSError`."""
    line = socket.create_connection((host, port), _HELLO_S)
    try:
        say(line, hello)
        answer = _hear(line)
        _keep_alive(line, unread_s)
    except BaseException:
        line.close()
        raise
    return line, answer


def heed(line: socket.socket, secret: str | None = None) -> Message:
    """What somebody who has connected says first; of who does not know the `secret`, nothing. Raises `OSError`."""
    line.settimeout(_HELLO_S)
    hello = _hear(line)
    told = str(hello.get("secret")).encode(errors="replace")
    if secret is not None and not hmac.compare_digest(told, secret.encode()):
        raise ConnectionError("the secret of this launch was not said")
    _keep_alive(line)
    return hello


def say(line: socket.socket, message: Message) -> None:
    """Raises `OSError`."""
    with line.makefile("wb") as stream:
        write_frame(stream, message)


def let_in(door: socket.socket, secret: str) -> socket.socket:
    """The first to come who knows the `secret`. Raises `OSError` if nobody does in time."""
    begin = time.monotonic()
    while True:
        door.settimeout(max(1e-3, begin + _HELLO_S - time.monotonic()))
        line, _ = door.accept()
        try:
            heed(line, secret)
            say(line, {})
            return line
        except OSError:
            line.close()


def raw(line: socket.socket) -> socket.SocketIO:
    """As a file without a buffer, with which it is closed."""
    with line:
        return line.makefile("rwb", buffering=0)


def own_address(host: str) -> str:
    """That by which who is there reaches this machine. Raises `OSError`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((host, 9))  # which sends nothing
        address: str = way.getsockname()[0]
        return address


def _hear(line: socket.socket) -> Message:
    """What its other end says. Raises `OSError`."""
    try:
        with line.makefile("rb") as stream:
            frame = read_frame(stream, _MAX_HELLO, 0)
    except NoFrame as error:
        raise ConnectionError(str(error)) from error
    if frame is None:
        raise ConnectionError("nothing was said")
    return frame.message


def _keep_alive(line: socket.socket, unread_s: int = _GONE_S) -> None:
    """From now on silence is no failure, but that the machine at the other end is no more is noticed; and words go at once."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    patience = (("TCP_KEEPIDLE", _SILENCE_S), ("TCP_KEEPINTVL", _SILENCE_S), ("TCP_USER_TIMEOUT", unread_s * 1000))
    for name, value in (("TCP_NODELAY", 1), *patience):
        if hasattr(socket, name):  # not everywhere under these names
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
