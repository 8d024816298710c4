"""`POST /v1/chat/completions`: a conversation, answered by the model's own chat template."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from common.request import Logprobs
from common.serve.model import Prompt, ServedModel
from common.serve.protocol import ChatRequest
from common.serve.serving import Answer, Serving, finite, read
from common.serve.tools import ToolCalls
from common.serve.worker import Piece
from common.text.output import Delta

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat(http: HttpRequest) -> Response:
    arrival, serving, body = time.perf_counter(), Serving.of(http), await read(http, ChatRequest)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    params = lambda: body.params(asked, (body.top_logprobs or 0) if body.logprobs else None)  # noqa: E731
    answer = await Answer.of(http, "chat", "chatcmpl", body, arrival, params, lambda: [chat_prompt(serving.model, body)])
    uses_tools = bool(body.tools) and body.tool_choice != "none"
    choices = [Choice(answer, i, ToolCalls() if uses_tools else None) for i in range(answer.num_choices)]
    return await answer.respond(http, choices, "chat.completion", "chat.completion.chunk")


def chat_prompt(model: ServedModel, body: ChatRequest) -> Prompt:
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if body.tool_choice != "none" else []
    return model.chat_prompt(body.messages, tools or None, body.add_generation_prompt, body.truncate_prompt_tokens)


@dataclass
class Choice:
    """One answer as it grows."""

    answer: Answer
    index: int
    parser: ToolCalls | None
    begun: bool = False
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def push(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks that a piece makes: the first comes with one that tells the role."""
        delta = piece.delta
        self.answer.completion_tokens += len(delta.token_ids)
        finish, text, calls = delta.finish_reason, delta.text, list[dict[str, Any]]()
        if self.parser is not None:
            text, calls = self.parser.push(text, last=finish is not None)
            if finish == "stop" and self.parser.count:
                finish = "tool_calls"
        entries = [] if delta.logprobs is None else [self._entry(token, delta.logprobs) for token in delta.token_ids]
        role = [] if self.begun else [self._chunk({"role": "assistant", "content": ""}, None)]
        self.begun = True
        self.text += text
        self.token_ids += delta.token_ids
        self.calls += [{key: value for key, value in call.items() if key != "index"} for call in calls]
        self.logprobs += entries
        self.finish_reason, self.stop_reason = finish, delta.stop_reason
        message = {"content": text} | ({"tool_calls": calls} if calls else {})
        return [*role, self._chunk(message, entries if self._scored else None, finish, delta)]

    @property
    def _scored(self) -> bool:
        return self.answer.params.logprobs is not None

    def _chunk(
        self, message: dict[str, Any], entries: Any, finish: str | None = None, delta: Delta | None = None
    ) -> dict[str, Any]:
        chunk = {
            "index": self.index,
            "delta": message,
            "logprobs": None if entries is None else {"content": entries},
            "finish_reason": finish,
        }
        if delta is not None:
            chunk["stop_reason"] = delta.stop_reason
            if self.answer.body.return_token_ids:
                chunk["token_ids"] = list(delta.token_ids)
        return chunk

    def _entry(self, token: int, logprobs: Logprobs) -> dict[str, Any]:
        named = lambda i, p: {"token": self._name(i), "logprob": finite(p), "bytes": self._bytes(i)}  # noqa: E731
        top = [named(i, p) for i, p in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)]
        return {**named(token, logprobs.logprob), "top_logprobs": top}

    def _name(self, token: int) -> str:
        as_ids = self.answer.body.return_tokens_as_token_ids
        return f"token_id:{token}" if as_ids else self.answer.serving.model.token_text(token)

    def _bytes(self, token: int) -> list[int]:
        return list(self.answer.serving.model.tokenizer.token_bytes(token, skip_special_tokens=False))

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text if self.text or not self.calls else None}
        if self.calls:
            message["tool_calls"] = self.calls
        choice = {
            "index": self.index,
            "message": message,
            "logprobs": {"content": self.logprobs} if self._scored else None,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }
        if self.answer.body.return_token_ids:
            choice["token_ids"] = self.token_ids
        return choice
