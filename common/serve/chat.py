"""`POST /v1/chat/completions`: chats, with the chat template of the model."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from common.request import Logprobs, SamplingParams
from common.serve.encoding import JsonList, finite
from common.serve.model import Prompt, ServedModel
from common.serve.protocol import ChatRequest
from common.serve.serving import Answer, Serving, read
from common.serve.worker import Piece
from common.text.output import Delta
from common.text.reasoning import Reasoning
from common.text.tool_calls import HERMES, ToolCalls

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat(http: HttpRequest) -> Response:
    arrival, serving, body = time.perf_counter(), Serving.of(http), await read(http, ChatRequest)
    prompts = lambda: [chat_prompt(serving.model, body)]  # noqa: E731
    answer = await Answer.of(http, "chat", "chatcmpl", body, arrival, prompts, lambda _: chat_params(serving.model, body))
    choices = [Choice(answer, i, tool_calls(serving.model, body), reasoning(serving.model)) for i in range(answer.num_choices)]
    return await answer.respond(http, choices, "chat.completion", "chat.completion.chunk")


def chat_params(model: ServedModel, body: ChatRequest) -> SamplingParams:
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    params = body.params(max_tokens, (body.top_logprobs or 0) if body.logprobs else None, defaults=model.defaults)
    if body.uses_tools and model.tool_format.special in model.tokenizer.special_tokens:
        return params.clone(skip_special_tokens=False)  # else the text would lack the token that begins a call
    return params


def tool_calls(model: ServedModel, body: ChatRequest) -> ToolCalls | None:
    """Return the reader of calls for one choice, None where the request has no tools. An enforced call has one format."""
    if not body.uses_tools:
        return None
    form = model.tool_format if body.tool_choice in (None, "auto") else HERMES
    return ToolCalls(form, eager=bool(body.stream), most=1 if body.parallel_tool_calls is False else None)


def reasoning(model: ServedModel) -> Reasoning | None:
    """Return the reader of reasoning for one choice, None for a model without."""
    return None if model.reasoning is None else Reasoning.of(model.reasoning)


def chat_prompt(model: ServedModel, body: ChatRequest) -> Prompt:
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if body.uses_tools else []
    return model.chat_prompt(
        body.messages,
        tools or None,
        body.truncate_prompt_tokens,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        chat_template_kwargs=body.chat_template_kwargs,
    )


@dataclass
class Choice:
    """One choice of an answer while its tokens arrive."""

    answer: Answer
    index: int
    parser: ToolCalls | None
    thoughts: Reasoning | None
    begun: bool = False
    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: JsonList = field(default_factory=JsonList)
    """Of the whole answer. A stream keeps none."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def push(self, piece: Piece) -> list[dict[str, Any]]:
        """Return the chunks of a piece. A chunk with the role precedes the first."""
        delta = piece.delta
        self.answer.completion_tokens += len(delta.token_ids)
        finish, text, thought, calls = delta.finish_reason, delta.text, "", list[dict[str, Any]]()
        if self.thoughts is not None:
            thought, text = self.thoughts.push(text, last=finish is not None)
        if self.parser is not None:
            text, calls = self.parser.push(text, last=finish is not None)
            if finish == "stop" and self.parser.count:
                finish = "tool_calls"
        entries = [] if delta.logprobs is None else [self._entry(token, delta.logprobs) for token in delta.token_ids]
        role = [] if self.begun else [self._chunk({"role": "assistant", "content": ""}, None)]
        self.begun = True
        self.text += text
        self.reasoning += thought
        self.token_ids += delta.token_ids
        for part in calls:
            if "id" in part:
                rest = {key: value for key, value in part.items() if key != "index"}
                self.calls.append({**rest, "function": dict(part["function"])})
            else:
                self.calls[-1]["function"]["arguments"] += part["function"]["arguments"]
        if not self.answer.body.stream:
            self.answer.size += self.logprobs.add(entries)
        self.finish_reason, self.stop_reason = finish, delta.stop_reason
        message: dict[str, Any] = {"content": text} | ({"tool_calls": calls} if calls else {})
        if thought:
            message |= {"reasoning_content": thought, "reasoning": thought}  # vLLM's former and present names
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
        if self.thoughts is not None:
            message |= dict.fromkeys(("reasoning_content", "reasoning"), self.reasoning or None)
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
