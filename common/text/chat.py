"""Conversations to prompts, by the template that came with the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

from common.errors import CheckpointError, RequestError, nearest_hint, quoted
from common.request import expect
from common.text.disguise import Disguise, SpecialText
from common.text.renderer import Renderer
from common.text.tokenizer import Tokenizer

MAX_TEMPLATE = 1 << 18
"""Characters of a template."""
MAX_MESSAGES = 1 << 24
"""Characters of a conversation, as JSON."""
ROLES = ("system", "developer", "user", "assistant", "tool")

Message = Mapping[str, Any]
"""`role` and `content`, as chat APIs name them, and what else the template understands (`tool_calls`, `name`, …)."""


class ChatTemplate:
    """The chat template of one tokenizer. Renders in a worker process, started when first needed; `close` ends it."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        """`template` replaces the tokenizer's own. Raises `RequestError` if there is neither."""
        template = template or tokenizer.chat_template
        if template is None:
            raise RequestError("This model has no chat template: it continues text. Use generate(), or give a template.")
        if len(template) > MAX_TEMPLATE:
            raise CheckpointError(f"The chat template has {len(template)} characters; at most {MAX_TEMPLATE} are accepted.")
        self._tokenizer, self._template = tokenizer, template
        self._special = SpecialText(tokenizer)
        self._renderer = Renderer()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the conversation as text, special tokens spelt out.

        Raises `RequestError` for messages that are malformed or that the template refuses, and for a template that takes too
        much CPU time or memory. Raises `CheckpointError` for a template that is not valid Jinja, and `UnavailableError` if the
        machine is too busy to render it.
        """
        disguise = Disguise(self._special)
        return disguise.show(self._rendered(disguise, messages, tools, add_generation_prompt))

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> tuple[str, list[int]]:
        """Return the text of `render` and its token ids. Only the template makes special tokens: the text of one in a message
        or a tool, in a key or a value, stays plain text."""
        disguise = Disguise(self._special)
        text = self._rendered(disguise, messages, tools, add_generation_prompt)
        if not disguise:
            return text, self._tokenizer.encode(text, add_special_tokens=False)
        token_ids: list[int] = []
        for part, special in self._special.parts(text):
            if special:
                token_ids.append(self._tokenizer.special_tokens[part])
            else:
                token_ids += self._tokenizer.encode(disguise.show(part), add_special_tokens=False, parse_special=False)
        return disguise.show(text), token_ids

    def _rendered(
        self,
        disguise: Disguise,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
    ) -> str:
        """Return the conversation as text, with the special tokens of messages and tools disguised."""
        try:
            _check(messages)
            given = {"messages": [_normalized(i, message) for i, message in enumerate(messages)], "tools": tools}
            variables = {
                **disguise.hide(given),
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **self._special_tokens(),
            }
            line = json.dumps({"template": self._template, "variables": variables})
        except RecursionError:
            raise RequestError("Messages and tools are nested too deeply.", "messages") from None
        except (TypeError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            told = f"Messages and tools must be made of strings, numbers, lists and mappings: {error}."
            raise RequestError(told, "messages") from error
        told = f"A conversation may take {MAX_MESSAGES} characters as JSON, got {len(line)}."
        expect(len(line) <= MAX_MESSAGES, told, "messages")
        answer = self._renderer.ask(line)
        reason = disguise.show(answer.get("error", ""))
        match answer.get("kind"):
            case None:
                return answer["text"]
            case "syntax":
                raise CheckpointError(f"The chat template is not valid Jinja, {reason}.")
            case "refused":
                raise RequestError(f"The chat template refuses this conversation: {reason}", "messages")
            case _:
                raise RequestError(f"The chat template fails on this conversation: {reason}", "messages")

    def _special_tokens(self) -> dict[str, str | None]:
        special = {"bos_token": self._tokenizer.bos_token_id, "eos_token": next(iter(self._tokenizer.eos_token_ids), None)}
        special["pad_token"] = self._tokenizer.pad_token_id
        return {name: self._tokenizer.id_to_token(i) for name, i in special.items() if i is not None}

    def close(self) -> None:
        """End the worker. Idempotent; another `render` starts a new one."""
        self._renderer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check(messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError(f"messages must be a list with at least one message, got {quoted(messages)}.", "messages")
    for i, message in enumerate(messages):
        if (fault := _fault(message)) is not None:
            raise RequestError(f"messages[{i}] {fault}", "messages")


def _fault(message: Any) -> str | None:
    """Return the reason why this is not a message, or None if it is one."""
    if not isinstance(message, Mapping):
        return f"must be an object with role and content, got {quoted(message)}."
    if "role" not in message:
        return f"has no role; expected one of {', '.join(ROLES)}."
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        return f"has the role {quoted(role)}.{nearest_hint(str(role), ROLES)} Known: {', '.join(ROLES)}."
    if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
        return f"needs a content that is a string (or a list of parts), got {quoted(content)}."
    return None


def _normalized(i: int, message: Message) -> Message:
    """Return a message as templates expect it: the arguments of its tool calls are objects.

    Chat APIs send arguments as JSON text, and templates apply `tojson` to them. As in vLLM, the text must be JSON, no text
    means no arguments, and an empty list of calls is left out."""
    calls = message.get("tool_calls")
    if message["role"] != "assistant" or not isinstance(calls, list | tuple):
        return message
    if not calls:
        return {key: value for key, value in message.items() if key != "tool_calls"}
    return {**message, "tool_calls": [_parsed(i, k, call) for k, call in enumerate(calls)]}


def _parsed(i: int, k: int, call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            told = f"messages[{i}].tool_calls[{k}].function.arguments must be JSON, got {quoted(arguments)} ({error})."
            raise RequestError(told, "messages") from None
    return {**call, "function": {**function, "arguments": arguments}}
