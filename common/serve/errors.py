"""Errors as clients get them: OpenAI's error body, without facts about this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from common.errors import (
    ContextLengthError,
    DrainingError,
    EngineGoneError,
    QueueFullError,
    RequestError,
    TandemError,
    UnavailableError,
)

NAMES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}
MAX_MESSAGE = 500
"""Characters. Messages quote the request, which may be long."""
PRIVATE = re.compile(
    r"0x[0-9a-f]{6,}|(?<![\w.:/])/(?!v1/)[\w.-]+/[\w./-]*|\bTraceback\b.*|\b[A-Za-z]:\\[\w.\\-]*", re.IGNORECASE | re.DOTALL
)
"""Addresses, absolute paths, traces. Paths of this API are none of these."""


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        code: str | None = None,
    ) -> None:
        """`code` replaces the status as the code of the body."""
        super().__init__(message)
        self.status, self.param, self.headers, self.code = status, param, dict(headers or {}), code

    @property
    def body(self) -> dict[str, Any]:
        return error_body(self.status, str(self), self.param, self.code)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = NAMES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": public(status, message), "type": kind, "param": param, "code": code or status}}


def public(status: int, message: str) -> str:
    """`message` without facts about this machine. A message about a request keeps its other words, and so its advice."""
    if status >= 500 and PRIVATE.search(message):
        return "The request failed; the server's log says why under its id (x-request-id)."
    message = PRIVATE.sub("…", message)
    message = message.encode(errors="replace").decode()  # no lone surrogates
    return message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "…"


def engine_gone() -> ApiError:
    told = "The engine has stopped, and this server ends; its log says why."
    return ApiError(503, told, headers={"Retry-After": "30"})


def api_error(error: Exception) -> ApiError:
    """Return the answer to an exception."""
    match error:
        case ApiError():
            return error
        case QueueFullError():
            return ApiError(429, str(error), headers={"Retry-After": "1"})
        case DrainingError():
            return ApiError(503, str(error), headers={"Retry-After": "30"})
        case ContextLengthError():
            code = "context_length_exceeded"  # also in the message: langchain looks there, and openai 3 shows no code
            return ApiError(400, f"{error} ({code})", error.param, code=code)
        case RequestError():
            return ApiError(400, str(error), error.param)
        case EngineGoneError():
            return engine_gone()
        case UnavailableError():
            return ApiError(503, str(error), headers={"Retry-After": "1"})
        case TandemError():
            return ApiError(500, str(error))
    return ApiError(500, "The server failed on this request; its log says why.")
