"""What happens to every HTTP request before and after its route: an id, the key, the last word on errors, one line of log."""

from __future__ import annotations

import hmac
import json
import logging
import re
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import TandemError
from common.serve.errors import ApiError, api_error
from common.serve.serving import error_response

log = logging.getLogger(__name__)

OPEN = ("/", "/health")
"""Paths that need no key: a page for people, and a probe. What the page asks for needs it."""
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
        status = 0

        async def labelled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            await self.app(scope, receive, labelled)
        except Exception as error:
            if not isinstance(error, ApiError | TandemError):
                log.exception("Request %s failed.", name)
            if status:
                raise
            await error_response(api_error(error))(scope, receive, labelled)
        finally:
            seconds = time.perf_counter() - began
            facts = {"request_id": name, "method": scope["method"], "path": scope["path"][:200], "status": status}
            log.info("Answered.", extra={"facts": facts | {"seconds": round(seconds, 6)}})

    def _check_key(self, path: str, headers: Headers) -> None:
        if self.api_key is None or path in OPEN:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.encode(), self.api_key.encode()):
            raise ApiError(401, "A key is needed: send Authorization: Bearer KEY.", headers={"WWW-Authenticate": "Bearer"})


class TextLines(logging.Formatter):
    """A line for people, with its facts behind it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        facts = getattr(record, "facts", {})
        return " ".join([super().formatMessage(record), *(f"{name}={value!r}" for name, value in facts.items())])


class JsonLines(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
