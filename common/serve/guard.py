"""Middleware around every HTTP request: its id, the check of the key, the handling of errors, and one line of log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import TandemError
from common.serve.encoding import event
from common.serve.errors import ApiError, api_error
from common.serve.serving import DONE, error_response

log = logging.getLogger(__name__)

OPEN = ("/", "/health", "/docs", "/openapi.json")
"""Paths that need no key: pages without data, and a probe. Requests of the pages need it."""
ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


@dataclass(frozen=True)
class Guard:
    """An ASGI middleware."""

    app: ASGIApp
    api_key: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, headers = time.perf_counter(), Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if ID.fullmatch(given) else uuid.uuid4().hex
        kept = [(key, value) for key, value in scope["headers"] if key != b"x-request-id"]
        scope = {**scope, "headers": [*kept, (b"x-request-id", name.encode())]}
        method = scope["method"]
        if method == "HEAD":  # answered as GET; the protocol below sends the head only
            scope["method"] = "GET"
        status, streams, complete, told = 0, False, False, "Answered."

        async def labelled(message: Message) -> None:
            nonlocal status, streams, complete
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                status, streams = message["status"], answer.get("content-type", "").startswith("text/event-stream")
                answer["x-request-id"] = name
            else:
                complete = not message.get("more_body", False)
            await send(message)

        try:
            check_framing(headers)
            self._check_key(scope["path"], headers)
            await self.app(scope, receive, labelled)
        except Exception as error:
            if not isinstance(error, ApiError | TandemError):
                log.exception("Request %s failed.", name)
            if status:
                raise
            await error_response(api_error(error))(scope, receive, labelled)
        except asyncio.CancelledError:  # the server cancels the request when the drain times out
            told = "Ended unfinished: it outlasted --drain-s."
            with suppress(asyncio.CancelledError):  # again, if the client reads nothing
                if not status:
                    await error_response(outlasted())(scope, receive, labelled)
                elif streams and not complete:
                    await labelled({"type": "http.response.body", "body": event(outlasted().body) + DONE})
        finally:
            seconds = time.perf_counter() - began
            facts = {"request_id": name, "method": method, "path": scope["path"][:200], "status": status}
            log.info(told, extra={"facts": facts | {"seconds": round(seconds, 6)}})

    def _check_key(self, path: str, headers: Headers) -> None:
        if self.api_key is None or path in OPEN:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise ApiError(401, "A key is needed: send Authorization: Bearer KEY.", headers={"WWW-Authenticate": "Bearer"})
        if not any(hmac.compare_digest(key.encode("latin-1"), right) for right in sent_as(self.api_key)):
            told = "The key that came is not the one that this server asks for."
            raise ApiError(401, told, headers={"WWW-Authenticate": "Bearer"})


def check_framing(headers: Headers) -> None:
    """Refuse a request whose end two servers may see at two places (RFC 9112, section 6.3)."""
    if "content-length" in headers and "transfer-encoding" in headers:
        told = "A request has a Content-Length or a Transfer-Encoding, and this one has both."
        raise ApiError(400, told, headers={"Connection": "close"})


def sent_as(key: str) -> Iterator[bytes]:
    """The bytes in a header, which are told as Latin-1: what is none of ASCII some clients send as that, others as UTF-8."""
    yield key.encode(errors="surrogateescape")
    with suppress(UnicodeEncodeError):
        yield key.encode("latin-1")


def outlasted() -> ApiError:
    told = "The server was told to end, and this request took longer than it still had (--drain-s)."
    return ApiError(503, told, headers={"Retry-After": "30"})


class TextLines(logging.Formatter):
    """A line for people, with its facts behind it. `engine`: the backend that says it, where there are several."""

    def __init__(self, engine: str | None = None) -> None:
        by = "" if engine is None else "[" + engine.replace("%", "%%") + "] "
        super().__init__(f"%(asctime)s %(levelname)s {by}%(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        facts = getattr(record, "facts", {})
        return " ".join([super().formatMessage(record), *(f"{name}={value!r}" for name, value in facts.items())])


class JsonLines(logging.Formatter):
    """One JSON object a record."""

    def __init__(self, engine: str | None = None) -> None:
        super().__init__()
        self._by = {} if engine is None else {"engine": engine}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            **self._by,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
