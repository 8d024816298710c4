"""HTTP below the application: errors of the protocol get an answer, and clients have timeouts for sending and for reading."""

from __future__ import annotations

import asyncio
import re
import sys

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.serve.encoding import encode
from common.serve.errors import ApiError
from common.serve.serving import MAX_BODY

HEAD_PATIENCE_S = 30.0
"""Timeout of the head of a request, from the first byte of the connection or of its next request."""

READ_PATIENCE_S = 60.0
"""Timeout of a client that reads nothing of an answer that is ready."""

PROBE_S = 0.2
"""Interval between two probes of a client that has closed its side."""


_BYTES = re.compile(r"""bytearray\(b('.*'|".*")\)""")
"""A part of a request in a message of h11, as Python writes it."""


class Http(H11Protocol):
    """uvicorn's protocol over h11, which bounds the size of a head."""

    _giving_up: asyncio.TimerHandle | None = None
    _hanging_up: asyncio.TimerHandle | None = None
    _half_closed = False
    """Whether the client has closed its side of the connection, and its requests are being answered."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that any unread byte calls `pause_writing`
        self._expect_head(True)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if _bytes_due(self.conn) > MAX_BODY and not self.transport.is_closing():
            self._refuse(ApiError(413, f"A body may have {MAX_BODY} bytes."))
        self._expect_head(self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0]))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._expect_head(False)
        self._expect_reader(False)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection for the answer to a request that is complete. A client that has closed its side may still read
        (RFC 9112, section 9.6). Refuse a request that is incomplete."""
        cycle = self.cycle
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._refuse(ApiError(400, "The body of the request ended before its last byte."))
            return False
        waits = cycle is not None and not cycle.response_complete and not cycle.more_body
        self._half_closed = waits and self.conn.their_http_version == b"1.1"
        self._probe()
        return self._half_closed

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._half_closed and self.cycle.response_complete:  # and no other request was sent behind it
            self.transport.close()

    def _probe(self) -> None:
        """Send `100 Continue` to a client that has closed its side, until its answer begins. Clients ignore it.

        The system of a client that has closed both sides resets the connection. Then the next probe fails, and the request is
        aborted.
        """
        if not self._half_closed or self.transport.is_closing() or self.conn.our_state is not h11.SEND_RESPONSE:
            return
        self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")) or b"")
        self.loop.call_later(PROBE_S, self._probe)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reader(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._expect_reader(False)

    def _expect_reader(self, expected: bool, left: int = -1) -> None:
        """Start or stop the timeout of unread bytes. If as many bytes as before, `left`, are unread at its end, close the
        connection, which aborts the requests of the client."""
        if self._hanging_up is not None:
            self._hanging_up.cancel()
            self._hanging_up = None
        if not expected:
            return
        waiting = self.transport.get_write_buffer_size()
        if waiting == left:
            self.transport.abort()  # `close` would wait for the client to read
        else:
            self._hanging_up = self.loop.call_later(READ_PATIENCE_S, self._expect_reader, True, waiting)

    def _expect_head(self, expected: bool) -> None:
        """Start or stop the timeout of a head that has begun, or that is due on a new connection."""
        if expected and self._giving_up is None:
            late = ApiError(408, "The head of the request did not come in time.")
            self._giving_up = self.loop.call_later(HEAD_PATIENCE_S, self._refuse, late)
        elif not expected and self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None

    def send_400_response(self, msg: str) -> None:
        """Answer an error of h11, which is the current exception."""
        error = sys.exception()
        hint = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        reason = _BYTES.sub(r"\1", str(error or msg))
        self._refuse(ApiError(hint, f"The request is not valid HTTP: {reason}."))

    def _refuse(self, error: ApiError) -> None:
        """Answer, unless an answer has begun, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = encode(error.body)
            headers = {"Content-Type": "application/json", "Content-Length": f"{len(body)}", "Connection": "close"}
            events = (h11.Response(status_code=error.status, headers=list(headers.items())), h11.Data(body), h11.EndOfMessage())
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        if self.cycle is not None:
            self.cycle.disconnected = True
        self.transport.close()


def _bytes_due(connection: h11.Connection) -> int:
    """Return the bytes that are due of a body with a length, or of the chunk in progress. h11 does not offer them."""
    reader = connection._reader
    due: int = getattr(reader, "_remaining", 0) or getattr(reader, "_bytes_in_chunk", 0)
    return due
