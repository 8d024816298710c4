"""`POST /v1/responses`: OpenAI's Responses API over the path of a chat.

Source of the objects and events: OpenAI's reference of the Responses API.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from common.serve import chat
from common.serve.encoding import encode
from common.serve.errors import ApiError, api_error
from common.serve.items import ResponsesRequest
from common.serve.serving import Answer, Serving, read

log = logging.getLogger(__name__)

router = APIRouter()


@router.post("/v1/responses")
async def responses(http: HttpRequest) -> Response:
    arrival, serving, body = time.perf_counter(), Serving.of(http), await read(http, ResponsesRequest)
    asked, model = body.chat, serving.model
    prompts = lambda: [chat.chat_prompt(model, asked)]  # noqa: E731
    answer = await Answer.of(http, "chat", "resp", asked, arrival, prompts, lambda _: chat.chat_params(model, asked))
    growing = GrowingResponse(body, answer, chat.Choice(answer, 0, chat.tool_calls(model, asked), chat.reasoning(model)))
    return await answer.send(http, growing.whole, growing.events)


ItemKind = Literal["message", "reasoning", "function_call"]
PREFIXES: dict[ItemKind, str] = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
TEXTS: dict[ItemKind, str] = {
    "message": "output_text",
    "reasoning": "reasoning_text",
    "function_call": "function_call_arguments",
}
"""Kind of item → name of its text in events, and the type of its content part."""


@dataclass
class Item:
    """One output item. Its methods return events without sequence numbers."""

    kind: ItemKind
    index: int
    fields: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    status: str = "in_progress"

    def __post_init__(self) -> None:
        self.id = f"{PREFIXES[self.kind]}_{uuid.uuid4().hex}"

    def begin(self) -> list[dict[str, Any]]:
        added = {"type": "response.output_item.added", "output_index": self.index, "item": self.as_dict(with_content=False)}
        return [added] if self.kind == "function_call" else [added, self._part_event("response.content_part.added")]

    def grow(self, text: str) -> dict[str, Any]:
        self.text += text
        return self._text_event("delta", delta=text)

    def end(self, status: str) -> list[dict[str, Any]]:
        self.status = status
        done = {"type": "response.output_item.done", "output_index": self.index, "item": self.as_dict()}
        if self.kind == "function_call":
            return [self._text_event("done", arguments=self.text, name=self.fields["name"]), done]
        return [self._text_event("done", text=self.text), self._part_event("response.content_part.done"), done]

    def as_dict(self, with_content: bool = True) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self.id, "type": self.kind, "status": self.status, **self.fields}
        match self.kind:
            case "function_call":
                return item | {"arguments": self.text}
            case "reasoning":
                item |= {"summary": []}
            case "message":
                item |= {"role": "assistant"}
        return item | {"content": [self._part()] if with_content else []}

    def _part(self) -> dict[str, Any]:
        part = {"type": TEXTS[self.kind], "text": self.text}
        return part | ({"annotations": [], "logprobs": []} if self.kind == "message" else {})

    def _part_event(self, kind: str) -> dict[str, Any]:
        return {"type": kind, "item_id": self.id, "output_index": self.index, "content_index": 0, "part": self._part()}

    def _text_event(self, what: str, **fields: Any) -> dict[str, Any]:
        event = {"type": f"response.{TEXTS[self.kind]}.{what}", "item_id": self.id, "output_index": self.index, **fields}
        if self.kind != "function_call":
            event["content_index"] = 0
        return event | ({"logprobs": []} if self.kind == "message" else {})


@dataclass
class Output:
    """The output items of a response. At most the last item grows."""

    items: list[Item] = field(default_factory=list)

    def push(self, delta: dict[str, Any]) -> list[dict[str, Any]]:
        """Add the delta of a chat chunk and return its events: reasoning, then text, then parts of calls."""
        events = self._add("reasoning", delta.get("reasoning") or "") + self._add("message", delta.get("content") or "")
        for part in delta.get("tool_calls", ()):
            function = part["function"]
            if "id" in part:
                events += self._begin("function_call", {"call_id": part["id"], "name": function["name"]})
            if function["arguments"]:
                events.append(self.items[-1].grow(function["arguments"]))
        return events

    def end(self, status: str) -> list[dict[str, Any]]:
        """End the last item with this status. An output without items gets an empty message."""
        events = [] if self.items else self._begin("message")
        return events + self.items[-1].end(status)

    def _add(self, kind: ItemKind, text: str) -> list[dict[str, Any]]:
        if self.items and self.items[-1].kind == kind:
            return [self.items[-1].grow(text)] if text else []
        if self.items:
            text = text.lstrip()  # space between two items belongs to neither
        return [*self._begin(kind), self.items[-1].grow(text)] if text else []

    def _begin(self, kind: ItemKind, fields: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        ended = self.items[-1].end("completed") if self.items else []
        self.items.append(Item(kind, len(self.items), fields or {}))
        return ended + self.items[-1].begin()


def response_event(event: Mapping[str, Any], number: int) -> bytes:
    """Return a server-sent event of a stream; `number` counts the events of the stream."""
    return b"event: " + event["type"].encode() + b"\ndata: " + encode({**event, "sequence_number": number}) + b"\n\n"


def failed_response(response: Mapping[str, Any], error: ApiError) -> dict[str, Any]:
    """Return the event that ends the stream of a response with an error."""
    code = "server_error" if error.status >= 500 else "invalid_prompt"
    reason = {"code": code, "message": error.body["error"]["message"]}
    return {"type": "response.failed", "response": {**response, "status": "failed", "error": reason}}


@dataclass
class GrowingResponse:
    """A response as it grows."""

    body: ResponsesRequest
    answer: Answer
    choice: chat.Choice
    output: Output = field(default_factory=Output)
    reasoning_tokens: int = 0
    """Tokens of the steps that added to the reasoning."""

    async def whole(self) -> dict[str, Any]:
        """Return the response at its end."""
        async for _ in self._changes():
            pass
        return self._as_dict(self._status)

    async def events(self) -> AsyncIterator[bytes]:
        """Yield server-sent events, those of one step together. A failure is a `response.failed`."""
        number = 0

        def numbered(*events: dict[str, Any]) -> bytes:
            nonlocal number
            data = b""
            for each in events:
                data += response_event(each, number)
                number += 1
            return data

        started = self._as_dict("in_progress")
        yield numbered(*({"type": f"response.{what}", "response": started} for what in ("created", "in_progress")))
        try:
            async for events in self._changes():
                yield numbered(*events)
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("Request %s failed.", self.answer.id)
            yield numbered(failed_response(self._as_dict("failed"), api_error(error)))
            return
        yield numbered({"type": f"response.{self._status}", "response": self._as_dict(self._status)})

    async def _changes(self) -> AsyncIterator[list[dict[str, Any]]]:
        async for pieces in self.answer.pieces():
            events: list[dict[str, Any]] = []
            for piece in pieces:
                for chunk in self.choice.push(piece):
                    events += self.output.push(chunk["delta"])
                    if chunk["delta"].get("reasoning"):
                        self.reasoning_tokens += len(piece.delta.token_ids)
            yield events
        yield self.output.end(self._status)

    @property
    def _status(self) -> str:
        return "incomplete" if self.choice.finish_reason == "length" else "completed"

    def _as_dict(self, status: str) -> dict[str, Any]:
        body, answer, params = self.body, self.answer, self.answer.params
        return {
            "id": answer.id,
            "object": "response",
            **body.echo,
            "created_at": answer.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "max_output_tokens": body.max_output_tokens,
            "model": answer.serving.model.names[0],
            "output": [item.as_dict() for item in self.output.items],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "tool_choice": body.tool_choice or "auto",
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.answer.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }
