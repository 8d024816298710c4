"""From a parsed request to its answer: the part that completions, chat and responses share."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import Request as HttpRequest
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from common.errors import RequestError
from common.request import CANNOT_GO_ON, ENGINE_GONE, Request, SamplingParams, Status
from common.schedule.prepare import prepare
from common.serve.cost import expect_affordable
from common.serve.encoding import encode, event
from common.serve.errors import ApiError, api_error, engine_gone
from common.serve.metrics import Metrics
from common.serve.model import Prompt, ServedModel
from common.serve.protocol import B, Sampled, parse
from common.serve.spans import REQUESTED, Spans, named
from common.serve.worker import Call, Piece, Worker
from common.text.output import Delta, OutputText

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_BODY = 1 << 24
"""Bytes of a request."""
BODY_PATIENCE_S = 60.0
MAX_ANSWER = 1 << 27
"""Bytes of the log-probabilities in an answer that is not a stream."""
DONE = b"data: [DONE]\n\n"
"""The end of a stream."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Everything that a route needs."""

    model: ServedModel
    worker: Worker
    metrics: Metrics
    stall_s: float = 30.0
    """Timeout of a step, after which `/health` reports a failure."""
    log_prompts: bool = False
    spans: Spans | None = None

    @classmethod
    def of(cls, http: HttpRequest) -> Serving:
        serving: Serving = http.app.state.serving
        return serving


async def read(http: HttpRequest, kind: type[B]) -> B:
    """Return the body of a request, parsed on a thread, after its checks."""
    body = await asyncio.to_thread(parse, kind, await read_bytes(http))
    Serving.of(http).model.check_name(body.model)
    body.check()
    return body


async def read_bytes(http: HttpRequest) -> bytes:
    """Return the body of a request. Its size is checked while it arrives."""
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "The body must be JSON: send Content-Type: application/json.")
    if "content-encoding" in http.headers:
        raise ApiError(415, "The body must not be compressed.")
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_PATIENCE_S):
            async for chunk in http.stream():
                data += chunk
                if len(data) > MAX_BODY:
                    raise ApiError(413, f"A body may have {MAX_BODY} bytes.", headers={"Connection": "close"})
    except TimeoutError:
        raise ApiError(408, "The body did not come in time.", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(499, "The client closed the connection.") from None
    return bytes(data)


class Growing(Protocol):
    """A choice of an answer as it grows."""

    def push(self, piece: Piece, /) -> list[dict[str, Any]]:
        """The chunks that a piece makes."""

    def whole(self) -> dict[str, Any]:
        """All of it, at its end."""


@dataclass(kw_only=True)
class Answer:
    """One HTTP request being answered. Choice `i` continues prompt `i // n`."""

    serving: Serving
    operation: str
    """As OpenTelemetry names it."""
    id: str
    body: Sampled
    prompts: Sequence[Prompt]
    params: SamplingParams
    call: Call
    arrival: float
    created: int = field(default_factory=lambda: int(time.time()))
    size: int = 0
    """Bytes of log-probabilities that the answer holds until its end."""
    completion_tokens: int = 0
    """Tokens in the answer so far."""
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache had, as far as known."""
    first_token: float | None = None
    """Time at which the host got the first token."""
    finish_reasons: dict[int, str] = field(default_factory=dict)
    """By choice."""

    @staticmethod
    async def of(
        http: HttpRequest,
        operation: str,
        prefix: str,
        body: Sampled,
        arrival: float,
        prompts: Callable[[], Sequence[Prompt]],
        params: Callable[[Sequence[Prompt]], SamplingParams],
    ) -> Answer:
        """The answer to a body that was read at `arrival`. `prompts` and `params` take time, and so does all that is made of
        them: a thread calls them. If the client leaves meanwhile, the result is dropped."""
        serving, name = Serving.of(http), f"{prefix}-{uuid.uuid4().hex}"

        def make() -> Answer:
            given = prompts()
            asked = params(given)
            expect_affordable(asked, [len(prompt.token_ids) for prompt in given])
            requests = requests_of(serving.model, name, body, arrival, asked, given)
            call = Call(requests, [OutputText(serving.model.tokenizer, request) for request in requests], arrival)
            return Answer(
                serving=serving, operation=operation, id=name, body=body, prompts=given, params=asked, call=call,
                arrival=arrival,
            )  # fmt: skip

        try:
            return await unless_left(http.receive, asyncio.to_thread(make))
        except RequestError as error:
            body.rename(error)
            raise

    @property
    def num_choices(self) -> int:
        return len(self.call.requests)

    def usage(self) -> dict[str, Any]:
        given = sum(len(prompt.token_ids) for prompt in self.prompts)
        return {
            "prompt_tokens": given,
            "completion_tokens": self.completion_tokens,
            "total_tokens": given + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def envelope(self, kind: str, choices: Sequence[Any], **more: Any) -> dict[str, Any]:
        """What is around choices, in an answer and in each of its chunks."""
        name = self.serving.model.names[0]
        return {"id": self.id, "object": kind, "created": self.created, "model": name, "choices": choices, **more}

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Yield the pieces of each step. Raises `ApiError` if a request fails."""
        async for pieces in self.call:
            for piece in pieces:
                self._note(piece)
                check_end(piece.delta)
            yield pieces

    def _note(self, piece: Piece) -> None:
        event, reason = piece.event, piece.delta.finish_reason
        if self.first_token is None and event.token_id is not None:
            self.first_token = event.time
        if event.num_cached_tokens is not None and piece.number % (self.body.n or 1) == 0:  # a prompt counts once
            self.cached_tokens += event.num_cached_tokens
        if reason is not None:
            self.finish_reasons[piece.number] = reason

    async def respond(self, http: HttpRequest, choices: Sequence[Growing], kind: str, chunk_kind: str) -> Response:
        """Admit the requests and answer with one object, a `kind`, or with a stream of events, each a `chunk_kind`."""
        return await self.send(http, lambda: self._full(choices, kind), lambda: self._events(self._chunks(choices, chunk_kind)))

    async def send(
        self,
        http: HttpRequest,
        whole: Callable[[], Coroutine[Any, Any, dict[str, Any]]],
        events: Callable[[], AsyncIterator[bytes]],
    ) -> Response:
        """Admit the requests and answer with the object of `whole`, or, for a stream, with `events`."""
        await unless_left(http.receive, self._check_grammar(self.call.requests[0]))
        self.serving.metrics.begin(self.call)
        try:
            await unless_left(http.receive, self.serving.worker.run(self.call))
        except BaseException as error:
            self.serving.worker.abort(self.call)
            self.serving.metrics.end(self.call)
            if isinstance(error, RequestError):
                self.body.rename(error)
            raise
        self.serving.metrics.accepted(self.call)
        leave = partial(self._leave, http)
        if self.body.stream:
            return EventStream(events(), leave)
        try:
            return json_response(await unless_left(http.receive, whole()))
        finally:
            leave()

    async def _check_grammar(self, request: Request) -> None:
        """Raise `ApiError` for a grammar that does not compile or allows no first token, before the status is sent."""
        if request.grammar is None:
            return
        try:
            grammar = await asyncio.shield(asyncio.wrap_future(request.grammar))
            await asyncio.to_thread(grammar.check_begin, request)
        except RequestError as error:
            raise ApiError(400, str(error), error.param or self.body.format) from None

    def _leave(self, http: HttpRequest) -> None:
        """Abort the requests that have not finished: the client has disconnected, or another choice failed."""
        if self.call.left:
            self.serving.worker.abort(self.call)
        if self.serving.spans is not None:
            bad = {"error", "timeout"}.intersection(self.finish_reasons.values())
            error = min(bad, default="cancelled" if self.call.left else None)
            self.serving.spans.end(facts_of(self), self.arrival, http.headers, error)
        self.serving.metrics.end(self.call, aborted=True)
        facts: dict[str, Any] = {"request_id": http.headers["x-request-id"], "id": self.id, **self.usage()}
        del facts["prompt_tokens_details"]
        facts |= {"cached_tokens": self.cached_tokens, "unfinished": self.call.left}
        if self.serving.log_prompts:
            facts["prompts"] = [prompt.token_ids if prompt.text is None else prompt.text for prompt in self.prompts]
        log.info(
            "Ended early: the client left, a choice failed, or the server ends." if self.call.left else "Ended.",
            extra={"facts": facts},
        )

    async def _full(self, choices: Sequence[Growing], kind: str) -> dict[str, Any]:
        async for _ in self._grown(choices):
            if self.size > MAX_ANSWER:
                raise ApiError(
                    400,
                    f"The log-probabilities of this answer exceed {MAX_ANSWER} bytes. Set stream to true, or ask for fewer "
                    "tokens, choices or log-probabilities.",
                    "logprobs",
                )
        return self.envelope(kind, [choice.whole() for choice in choices], usage=self.usage())

    async def _chunks(self, choices: Sequence[Growing], kind: str) -> AsyncIterator[list[dict[str, Any]]]:
        async for chunks in self._grown(choices):
            yield [self.envelope(kind, [chunk]) for chunk in chunks]

    async def _grown(self, choices: Sequence[Growing]) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield the chunks of each step. A thread makes those with the log-probabilities of a prompt, which may be many."""
        async for pieces in self.pieces():
            push = partial(pushed, choices, pieces)
            scored = any(piece.delta.prompt_logprobs is not None for piece in pieces)
            yield await asyncio.to_thread(push) if scored else push()

    async def _events(self, chunks: AsyncIterator[Sequence[dict[str, Any]]]) -> AsyncIterator[bytes]:
        """Server-sent events; those of one step in one write."""
        options = self.body.stream_options
        each = bool(options and options.continuous_usage_stats)
        try:
            async for some in chunks:
                yield b"".join(event({**chunk, "usage": self.usage()} if each else chunk) for chunk in some)
            if options and options.include_usage:
                yield event({**some[-1], "choices": [], "usage": self.usage()})
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("Request %s failed.", self.id)
            yield event(api_error(error).body)
        yield DONE


def pushed(choices: Sequence[Growing], pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    return [chunk for piece in pieces for chunk in choices[piece.number].push(piece)]


def requests_of(
    model: ServedModel, name: str, body: Sampled, arrival: float, params: SamplingParams, prompts: Sequence[Prompt]
) -> list[Request]:
    """The requests of an answer, prepared: `n` for each prompt, the first of them the parent of the others. All share their
    params, and what is made of them."""
    n, fields = params.n, body.request_fields(arrival)
    bad_words = model.tokenizer.bad_words(params.bad_words)
    grammar = model.grammars.compile(params.structured_outputs)
    requests: list[Request] = []
    for prompt in prompts:
        first = Request(
            request_id=f"{name}-{len(requests)}",
            prompt_token_ids=tuple(prompt.token_ids),
            params=params,
            choice=0,
            eos_token_ids=model.eos_token_ids,
            bad_words=bad_words,
            grammar=grammar,
            **fields,
        )
        first = replace(first, prepared=prepare(first, model.vocab_size, requests[0].prepared if requests else None))
        others = [
            replace(first, request_id=f"{name}-{len(requests) + i}", choice=i, parent=first.request_id) for i in range(1, n)
        ]
        requests += [first, *others]
    return requests


class EventStream(StreamingResponse):
    """A stream of server-sent events. `leave` is called at its end, also after an error."""

    def __init__(self, events: AsyncIterator[bytes], leave: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


async def unless_left(receive: Receive, work: Awaitable[T]) -> T:
    """Return the result of `work`. If the client closes the connection first, cancel `work` and raise `ApiError`."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "The client closed the connection.")
        return working.result()
    finally:
        leaving.cancel()
        await give_up(working)


async def left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def give_up(task: asyncio.Future[Any]) -> None:
    """Cancel a task unless it has ended, and wait until it has.

    A timer cancels the task. Timers run at a point of the loop's iteration at which a socket read of anyio (within httpx) has
    either completed or not begun. At another point the read may complete in between, which the loop logs as an error.
    """
    if not task.done():
        asyncio.get_running_loop().call_later(0.001, task.cancel)  # with 0 the loop makes no timer
        await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()  # else the loop logs it as never retrieved


def check_end(delta: Delta) -> None:
    """Raise `ApiError` if a request ended without an answer."""
    match delta.finish:
        case Status.FINISHED_ERROR if delta.error is not None and delta.error.startswith(CANNOT_GO_ON):
            raise ApiError(400, delta.error)
        case Status.FINISHED_ERROR if delta.error is not None and delta.error.startswith(ENGINE_GONE):
            raise engine_gone()
        case Status.FINISHED_ERROR:
            raise ApiError(500, delta.error or "The request failed.")
        case Status.FINISHED_TIMEOUT:
            # Without the header OpenAI's clients retry with the same deadline.
            raise ApiError(504, "The request's deadline has passed.", headers={"x-should-retry": "false"})


def json_response(message: Any, status: int = 200) -> Response:
    return Response(encode(message), status, media_type="application/json")


def error_response(error: ApiError) -> Response:
    return Response(encode(error.body), error.status, error.headers, media_type="application/json")


def facts_of(answer: Answer) -> dict[str, Any]:
    """Return the attributes of the span of a completion."""
    usage = answer.usage()
    asked = {f"gen_ai.request.{key}": getattr(answer.params, key) for key in REQUESTED}
    facts = {
        **named(answer.operation, answer.serving.model, answer.body.model),
        "gen_ai.response.id": answer.id,
        "gen_ai.request.choice.count": answer.body.n or 1,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": answer.cached_tokens,
        "gen_ai.response.finish_reasons": [reason for _, reason in sorted(answer.finish_reasons.items())],
        **{key: value for key, value in asked.items() if value is not None},
    }
    if answer.first_token is not None:
        facts["gen_ai.response.time_to_first_chunk"] = answer.first_token - answer.arrival
    return facts
