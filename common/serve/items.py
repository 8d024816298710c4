"""The body of `POST /v1/responses`, converted to a chat request.

Source: OpenAI's reference of the Responses API. The server stores nothing, so fields that refer to stored state are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PrivateAttr, ValidationError, WithJsonSchema

from common.serve.errors import ApiError
from common.serve.protocol import WHOLE, Body, ChatRequest, Function, Refused, Whole, refusal, reworded

RENAMED = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text"}
"""Field of a chat request → field of this API."""
SHARED = (
    "model", "stream", "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos", "parallel_tool_calls", "cache_salt",
    "priority", "deadline", "user", "chat_template_kwargs",
)  # fmt: skip
"""Fields with the same name and meaning in a chat request."""
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "previous_response_id": ((None,), "This server stores no responses: send the earlier items in input."),
    "conversation": ((None,), "This server stores no conversations: send the earlier items in input."),
    "prompt": ((None,), "This server stores no prompts: send the text in input or instructions."),
    "background": ((None, False), "background must be false: this server stores no responses."),
    "truncation": ((None, "disabled"), "truncation must be disabled: shorten input instead."),
    "include": ((None, []), "include must be empty: /v1/chat/completions returns log-probabilities."),
    "top_logprobs": ((None, 0), "top_logprobs must be 0: /v1/chat/completions returns log-probabilities."),
    "max_tokens": ((None,), "This API names it max_output_tokens."),
    "max_completion_tokens": ((None,), "This API names it max_output_tokens."),
    "messages": ((None,), "This API names it input."),
    "response_format": ((None,), 'This API names it text, as in {"format": …}.'),
    "max_tool_calls": ((None,), "max_tool_calls must be left out: this server runs no tools."),
}
"""Field → the values that change nothing, and the message for another value."""
TEXT_PARTS = ("input_text", "output_text", "text")
ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
"""Role of this API → role in the chat template."""


MAX_ECHO = 1 << 20
"""Characters, as JSON, of the fields that a response repeats, except `instructions`, which the context bounds. A stream repeats
them three times, on the event loop."""


class FunctionTool(Function):
    type: Literal["function"]
    strict: bool | None = None


MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class TextOptions(Body):
    format: TextFormat | None = None


class ConvertedChat(ChatRequest):
    """A chat request that names fields as the Responses API does."""

    @property
    def names(self) -> Mapping[str, str]:
        return {"prompt_token_ids": "input", **RENAMED}

    @property
    def format(self) -> str | None:
        return renamed(super().format)


class ResponsesRequest(Body):
    model_config = ConfigDict(json_schema_extra={"required": ["input"]})

    input: Annotated[
        Any,
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"type": "object"}}]}),
    ] = None
    instructions: str | None = None
    stream: bool | None = False
    max_output_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    seed: Whole | None = None
    ignore_eos: bool | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=1024)] | None = None
    tool_choice: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}]})] = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    store: bool | None = None
    """Accepted with either value. The server never stores a response."""
    previous_response_id: Refused = None
    conversation: Refused = None
    prompt: Refused = None
    background: Annotated[Any, WithJsonSchema({"type": ["boolean", "null"], "enum": [False, None]})] = None
    truncation: Annotated[Any, WithJsonSchema({"type": ["string", "null"], "enum": ["disabled", None]})] = None
    include: Annotated[Any, WithJsonSchema({"type": ["array", "null"], "maxItems": 0})] = None
    top_logprobs: Annotated[Any, WithJsonSchema({"type": ["integer", "null"], "enum": [0, None]})] = None
    max_tool_calls: Refused = None
    max_tokens: Refused = None
    max_completion_tokens: Refused = None
    messages: Refused = None
    response_format: Refused = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    priority: Whole | None = None
    deadline: float | None = None
    """Seconds from the arrival of the HTTP request."""
    user: Annotated[str, Field(max_length=512)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    _chat: ConvertedChat | None = PrivateAttr(None)
    _echo: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    def settle(self) -> None:
        """Convert the body to a chat request. Raises `ApiError` that names a field of this API."""
        super().settle()
        for name, (neutral, message) in REFUSED.items():
            value = getattr(self, name)
            if not any(type(value) is type(each) and value == each for each in neutral):  # False equals 0
                raise ApiError(400, message, name)
        self._echo = self._repeated()
        asked = {name: getattr(self, name) for name in SHARED}
        asked |= {"max_tokens": self.max_output_tokens, "messages": messages_of(self.input, self.instructions)}
        asked |= {"tools": chat_tools(self.tools), "tool_choice": chat_tool_choice(self.tool_choice)}
        asked |= {"response_format": self.chat_format()}
        try:
            self._chat = ConvertedChat.model_validate(asked)
            self._chat.settle()
        except ValidationError as error:
            raise in_names_of_responses(refusal(error.errors(include_url=False, include_input=False)[0])) from None
        except ApiError as error:
            raise in_names_of_responses(error) from None

    def check(self) -> None:
        self.chat.check()

    @property
    def echo(self) -> Mapping[str, Any]:
        """The fields that the response repeats; only after `settle`."""
        return self._echo

    def _repeated(self) -> Mapping[str, Any]:
        form = self.text.format if self.text else None
        fields = {
            "instructions": self.instructions,
            "metadata": self.metadata or {},
            "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
            "tools": [tool.model_dump(include=set(FunctionTool.model_fields) - {"model"}) for tool in self.tools or ()],
            "user": self.user,
        }
        lengths = {name: len(json.dumps(fields[name])) for name in ("metadata", "text", "tools", "user")}
        if sum(lengths.values()) > MAX_ECHO:
            message = f"{', '.join(lengths)} may have {MAX_ECHO} characters in all as JSON, got {sum(lengths.values())}."
            raise ApiError(400, message, max(lengths, key=lengths.__getitem__))
        return fields

    @property
    def chat(self) -> ConvertedChat:
        """The chat request with the same meaning; only after `settle`."""
        assert self._chat is not None
        return self._chat

    def chat_format(self) -> dict[str, Any] | None:
        """Return `text.format` in the form of a chat request."""
        form = self.text.format if self.text else None
        if form is None:
            return None
        if form.type != "json_schema":
            return {"type": form.type}
        if form.json_schema is None:
            raise ApiError(400, "text.format.schema is missing: a JSON Schema.", "text")
        return {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.json_schema}}


def in_names_of_responses(error: ApiError) -> ApiError:
    return ApiError(error.status, reworded(str(error), RENAMED), renamed(error.param))


def renamed(param: str | None) -> str | None:
    return None if param is None else RENAMED.get(param, param)


def chat_tools(tools: Sequence[FunctionTool] | None) -> list[dict[str, Any]] | None:
    """Return function tools in the form of a chat request."""
    if tools is None:
        return None
    fields = {"name", "description", "parameters"}
    return [{"type": "function", "function": tool.model_dump(include=fields, exclude_none=True)} for tool in tools]


def chat_tool_choice(choice: Any) -> Any:
    """Return a choice in the form of a chat request, which refuses all other values."""
    match choice:
        case {"type": "function", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
        case dict():
            raise ApiError(400, 'tool_choice must be auto, none, required, or {"type": "function", "name": …}.', "tool_choice")
    return choice


def messages_of(given: Any, instructions: str | None) -> list[dict[str, Any]]:
    """Return the messages of a chat. Calls of one turn join the assistant message before them.

    Raises `ApiError` for an item of another kind. Reasoning items are left out, as chat templates leave out old reasoning.
    """
    messages: list[dict[str, Any]] = [] if instructions is None else [{"role": "system", "content": instructions}]
    match given:
        case str():
            return [*messages, {"role": "user", "content": given}]
        case [*items] if items:
            pass
        case _:
            raise ApiError(400, "input must be a text or a list of items.", "input")
    for i, item in enumerate(items):
        match item:
            case {"type": "reasoning"}:
                continue
            case {"type": "function_call", "call_id": str(call), "name": str(name), "arguments": str(arguments)}:
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                made = {"id": call, "type": "function", "function": {"name": name, "arguments": arguments}}
                messages[-1].setdefault("tool_calls", []).append(made)
            case {"type": "function_call_output", "call_id": str(call), "output": output}:
                messages.append({"role": "tool", "tool_call_id": call, "content": text_of(f"input[{i}].output", output)})
            case {"type": "item_reference"}:
                raise ApiError(400, f"input[{i}] refers to a stored item, and this server stores none: send the item.", "input")
            case {"role": str(role), "content": content} if role in ROLES and item.get("type", "message") == "message":
                messages.append({"role": ROLES[role], "content": text_of(f"input[{i}].content", content)})
            case _:
                expected = "a message with role and content, a function_call, a function_call_output or a reasoning item"
                raise ApiError(400, f"input[{i}] must be {expected}.", "input")
    if not messages:
        raise ApiError(400, "input must hold a message.", "input")
    return messages


def text_of(where: str, content: Any) -> str:
    """Return a text, or its parts joined to one. Raises `ApiError` for parts that are no text."""
    if isinstance(content, str):
        return content
    texts = [part_text(part) for part in content] if isinstance(content, list) else [None]
    if None in texts:
        expected = 'a text, or parts {"type": "input_text", "text": …}: this model reads text only'
        raise ApiError(400, f"{where} must be {expected}.", "input")
    return "\n".join(text for text in texts if text is not None)


def part_text(part: Any) -> str | None:
    match part:
        case {"type": str(kind), "text": str(text)} if kind in TEXT_PARTS:
            return text
        case {"type": "refusal", "refusal": str(text)}:
            return text
    return None
