"""A stream of server-sent events that the front passes on, and its end where the backend dies before it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

from common.serve.encoding import event
from common.serve.errors import ApiError
from common.serve.responses import failed_response, response_event
from common.serve.serving import DONE


class Passing(Protocol):
    def push(self, chunk: bytes, /) -> bytes:
        """Return the whole events that have come."""

    def end(self, error: ApiError, /) -> bytes:
        """Return the events that end the stream with an error."""


@dataclass
class Chunks:
    """A stream of completions. Only whole events pass, so that an error can follow at any time."""

    rest: bytes = b""

    def push(self, chunk: bytes) -> bytes:
        whole, end, self.rest = (self.rest + chunk).rpartition(b"\n\n")
        return whole + end

    def end(self, error: ApiError) -> bytes:
        return event(error.body) + DONE


@dataclass
class ResponseEvents(Chunks):
    """A stream of `/v1/responses`. Its end repeats the response as its first event has it."""

    first: bytes = b""
    last: bytes = b""

    def push(self, chunk: bytes) -> bytes:
        whole = super().push(chunk)
        if whole:
            self.first = self.first or whole.partition(b"\n\n")[0]
            self.last = whole.removesuffix(b"\n\n").rpartition(b"\n\n")[2]
        return whole

    def end(self, error: ApiError) -> bytes:
        if not self.first:
            return response_event({"type": "error", "code": "server_error", "message": str(error), "param": None}, 0)
        number: int = _data(self.last)["sequence_number"]
        return response_event(failed_response(_data(self.first)["response"], error), number + 1)


def _data(sent: bytes) -> Any:
    return json.loads(sent.partition(b"data: ")[2])
