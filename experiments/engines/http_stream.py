"""Send `POST /v1/completions` with token ids to an OpenAI-compatible server, and read its server-sent events.

A chunk of the answer brings no token, one, or several. The count comes from the first of these that the server reports:
1. `token_ids` of the choice, which vLLM and SGLang return for `return_token_ids`;
2. entries of `logprobs`: vLLM names tokens `token_id:7` for `return_tokens_as_token_ids`, llama.cpp returns an `id`;
3. `usage.completion_tokens`, the count so far, in each chunk or in the last;
4. otherwise a chunk with text counts as one token, and a chunk without text as none.
Tokens that only 3 reports are added at that chunk. A token without an id is `UNNAMED`.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult

from common.request import Logprobs, Request, Status

UNNAMED = -1
DONE = "[DONE]"
PREFIX = "token_id:"
FINISH = {"length": Status.FINISHED_LENGTH, "stop": Status.FINISHED_STOP}
EXCERPT = 300
MAX_PENDING = 1 << 26
"""Bytes of an answer without the end of an event."""


class WireError(Exception):
    """An answer that is not one: an HTTP error, an error in the stream, or bytes that make no sense. Ends its request only."""


def http_request(url: SplitResult, request: Request, model: str, extra: Mapping[str, Any]) -> bytes:
    """Head and body. `extra` has more keys of the body; None takes one out that the server does not bear."""
    params = request.params
    body = {
        "model": model,
        "prompt": list(request.prompt_token_ids),
        "max_tokens": params.max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "logprobs": params.logprobs,
        **extra,
    }
    data = json.dumps({key: value for key, value in body.items() if value is not None}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
        f"Accept: text/event-stream\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + data


class EventStream:
    """An HTTP/1.1 response as its bytes come: the data of its server-sent events."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.ended = False
        """Whether the response is complete."""
        self._bytes = bytearray()
        """As they came, from where they are not understood yet."""
        self._body = bytearray()
        """Without the framing, from the first event that is not complete."""
        self._left: int | None = None
        """Bytes of the body to come; None where they come in chunks, or until the connection closes."""
        self._chunked = False

    def feed(self, data: bytes) -> list[str]:
        """The data of the events that are complete now. Raises `WireError`."""
        self._bytes += data
        if len(self._bytes) + len(self._body) > MAX_PENDING:
            raise WireError(f"an event of more than {MAX_PENDING} bytes")
        if self.status is None and not self._head():
            return []
        if self._chunked:
            self._unchunk()
        else:
            self._take(len(self._bytes) if self._left is None else min(self._left, len(self._bytes)))
        if self.status == 200:
            return self._events()
        if self.ended:
            raise self.refusal()
        return []

    def close(self) -> list[str]:
        """The connection has ended: no more events. Raises `WireError` if the response cannot be complete."""
        if self.status not in (None, 200):
            raise self.refusal()
        if (self.status is None or self._chunked or self._left) and not self.ended:
            raise WireError("it closed the connection before the answer was complete")
        self.ended = True
        return []

    def refusal(self) -> WireError:
        """What an answer other than 200 says."""
        text = self._body.decode(errors="replace")
        with contextlib.suppress(ValueError):
            text = error_message(json.loads(text)) or text
        return WireError(f"HTTP {self.status}: {text[:EXCERPT]}")

    def _head(self) -> bool:
        """Read status and headers once they are there."""
        end = self._bytes.find(b"\r\n\r\n")
        if end < 0:
            return False
        line, _, rest = bytes(self._bytes[: end + 4]).partition(b"\r\n")
        del self._bytes[: end + 4]
        version, _, status = line.partition(b" ")
        if not version.startswith(b"HTTP/1.") or not status[:3].isdigit():
            raise WireError(f"no HTTP: {line[:EXCERPT]!r}")
        try:
            headers = http.client.parse_headers(io.BytesIO(rest))
            self._chunked = "chunked" in (headers.get("Transfer-Encoding") or "").lower()
            length = headers.get("Content-Length")
            self._left = natural(length) if length is not None and not self._chunked else None
        except (http.client.HTTPException, ValueError) as error:
            raise WireError(f"bad HTTP headers: {error}") from error
        self.status = int(status[:3])
        self.ended = self._left == 0
        return True

    def _unchunk(self) -> None:
        while not self.ended:
            end = self._bytes.find(b"\r\n")
            if end < 0:
                return
            try:
                size = natural(bytes(self._bytes[:end]).partition(b";")[0].decode(), 16)
            except ValueError:
                raise WireError(f"bad chunk size {bytes(self._bytes[:end])[:EXCERPT]!r}") from None
            if size == 0:
                self.ended = True
            elif len(self._bytes) < end + 2 + size + 2:
                return
            self._body += self._bytes[end + 2 : end + 2 + size]
            del self._bytes[: end + 2 + size + 2]

    def _take(self, count: int) -> None:
        self._body += self._bytes[:count]
        del self._bytes[:count]
        if self._left is not None:
            self._left -= count
            self.ended = self._left == 0

    def _events(self) -> list[str]:
        """Data of complete events: `data:` lines up to an empty one. Comments and other fields mean nothing here."""
        events, data = [], []
        done = at = 0
        while (end := self._body.find(b"\n", at)) >= 0:
            line, at = bytes(self._body[at:end]).rstrip(b"\r"), end + 1
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line:
                done = at
                if data:
                    events.append(b"\n".join(data).decode(errors="replace"))
                data = []
        del self._body[:done]
        return events


@dataclass(frozen=True)
class Chunk:
    """What one event brings."""

    tokens: tuple[int, ...] = ()
    """New ones, `UNNAMED` where the server does not say which."""
    logprobs: tuple[Logprobs, ...] | None = None
    """Of each, where asked for and told."""
    finish: Status | None = None


def read_chunk(data: str, seen: int, wanted: int | None, most: int = sys.maxsize) -> Chunk:
    """Read an event before which `seen` tokens had come, of a request for `most` tokens and `wanted` log-probabilities (None:
    none).

    Raises `WireError` for an error, for what is no completion, and for more tokens than were asked for.
    """
    try:
        message = json.loads(data)
        if message.get("error"):
            raise WireError(f"it reports: {(error_message(message) or data)[:EXCERPT]}")
        choice = message["choices"][0] if message.get("choices") else {}
        entries = read_logprobs(choice.get("logprobs"))
        if (ids := choice.get("token_ids")) is not None:
            tokens = [int(token) for token in ids]
        elif entries:
            tokens = [token for token, _, _ in entries]
        else:
            tokens = [UNNAMED] * bool(choice.get("text"))
        told = (message.get("usage") or {}).get("completion_tokens") or 0
        if seen + len(tokens) > most or int(told) > most:
            raise WireError(f"it gives more than the {most} tokens that were asked for")
        tokens += [UNNAMED] * (int(told) - seen - len(tokens))
        reason = choice.get("finish_reason")
        finish = FINISH.get(reason, Status.FINISHED_ERROR) if reason is not None else None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise WireError(f"an event that is no completion ({error!r}): {data[:EXCERPT]}") from error
    logprobs = None
    if wanted is not None and len(entries) == len(tokens):
        logprobs = tuple(rank(token, own, top, wanted) for token, (_, own, top) in zip(tokens, entries, strict=True))
    return Chunk(tuple(tokens), logprobs, finish)


Entry = tuple[int, float, dict[int, float]]
"""A token, its log-probability, and those of the likeliest by id."""


def read_logprobs(logprobs: Any) -> list[Entry]:
    """Of each token of a chunk, in the form of OpenAI's completions or in that of its chat."""
    if not logprobs:
        return []
    if "content" in logprobs:
        entries = logprobs["content"] or []
        tops = [{int(top.get("id", UNNAMED)): float(top["logprob"]) for top in e.get("top_logprobs") or []} for e in entries]
        return [(int(e.get("id", UNNAMED)), float(e["logprob"]), top) for e, top in zip(entries, tops, strict=True)]
    tokens, values = logprobs.get("tokens") or [], logprobs.get("token_logprobs") or []
    likeliest: Sequence[Any] = logprobs.get("top_logprobs") or [None] * len(tokens)
    return [
        (named(token), float(value), {named(other): float(its) for other, its in (top or {}).items()})
        for token, value, top in zip(tokens, values, likeliest, strict=True)
    ]


def named(token: str) -> int:
    """The id in `token_id:7`."""
    return int(token.removeprefix(PREFIX)) if token.startswith(PREFIX) else UNNAMED


def rank(token: int, own: float, top: Mapping[int, float], wanted: int) -> Logprobs:
    """In our form: the `wanted` likeliest, falling; the rank is seen among those that were told."""
    known = {token: own} | {other: value for other, value in top.items() if other != UNNAMED}
    order = sorted(known, key=lambda other: (-known[other], other))[:wanted]
    return Logprobs(own, 1 + sum(value > own for value in known.values()), order, [known[other] for other in order])


def natural(text: str, base: int = 10) -> int:
    """The number that `text` is. Raises `ValueError` for a negative one too: a stream that went back would never end."""
    value = int(text, base)
    if value < 0:
        raise ValueError(f"{text} is negative")
    return value


def error_message(message: Any) -> str | None:
    """The text in `{"error": {"message": …}}`, or in `{"error": …}`."""
    error = message.get("error") if isinstance(message, dict) else None
    text = error.get("message") if isinstance(error, dict) else error
    return str(text) if text else None
