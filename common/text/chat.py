"""Conversations to prompts, by the template that came with the model."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from common.errors import CheckpointError, RequestError, json_reason, listed, nearest_hint, quoted
from common.request import expect
from common.text.disguise import Disguise, SpecialText
from common.text.json_cost import expect_parsable
from common.text.renderer import Renderer
from common.text.tokenizer import Tokenizer

MAX_TEMPLATE = 1 << 18
"""Characters of a template."""
ROLES = ("system", "developer", "user", "assistant", "tool")

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of the same field of a message, in the order of precedence."""
PROTECTED = (
    "messages", "tools", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token", "pad_token",
    "chat_template", "conversation", "tokenize", "raise_exception", "strftime_now", "range", "dict", "lipsum", "cycler",
    "joiner", "namespace",
)  # fmt: skip
"""Names of variables and functions of a template that `chat_template_kwargs` must not replace."""

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
        continue_final_message: bool | str = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the conversation as text, special tokens spelt out.

        Arguments mean what they mean to transformers' `apply_chat_template`. `add_generation_prompt` appends the beginning of
        an answer. `continue_final_message` leaves the last message open, so that the model continues it; a string names the
        field to continue, by default `content`. `chat_template_kwargs` are variables for the template, which must not replace
        its own (`PROTECTED`).

        Raises `RequestError` for arguments that are malformed, too large (`common.text.disguise`) or refused by the template.
        Raises it too for a template that takes too much CPU time or memory. Raises `CheckpointError` for a template that is not
        valid Jinja, and `UnavailableError` if the machine is too busy to render it.
        """
        disguise = Disguise(self._special)
        given = _Given(messages, tools, add_generation_prompt, continue_final_message, chat_template_kwargs)
        return disguise.show(self._rendered(disguise, given))

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        check: Callable[[str], object] | None = None,
    ) -> tuple[str, list[int]]:
        """Return the text of `render` and its token ids. Only the template makes special tokens: the text of one in an
        argument, in a key or a value, stays plain text. `check` is called with the text before it is cut into tokens."""
        disguise = Disguise(self._special)
        given = _Given(messages, tools, add_generation_prompt, continue_final_message, chat_template_kwargs)
        text = self._rendered(disguise, given)
        shown = disguise.show(text)
        if check is not None:
            check(shown)
        if not disguise:
            return text, self._tokenizer.encode(text, add_special_tokens=False)
        token_ids: list[int] = []
        for part, special in self._special.parts(text):
            if special:
                token_ids.append(self._tokenizer.special_tokens[part])
            else:
                token_ids += self._tokenizer.encode(disguise.show(part), add_special_tokens=False, parse_special=False)
        return shown, token_ids

    def _rendered(self, disguise: Disguise, given: _Given) -> str:
        """Return the conversation as text, with the special tokens of all arguments disguised."""
        try:
            _check(given)
            expect_parsable(_arguments(given.messages), "The JSON text of arguments in messages", "messages")
            hidden = disguise.hide(
                {
                    "documents": None,
                    **(given.chat_template_kwargs or {}),
                    "messages": [_normalized(message) for message in given.messages],
                    "tools": given.tools,
                }
            )
            last = None
            if given.continue_final_message:
                last = _Last.of(hidden["messages"][-1], given.continue_final_message, self._template)
                hidden["messages"][-1] = last.message
            variables = {**hidden, "add_generation_prompt": given.add_generation_prompt, **self._special_tokens()}
            line = json.dumps({"template": self._template, "variables": variables})
        except RecursionError:
            raise RequestError("Messages and tools are nested too deeply.", "messages") from None
        except (TypeError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            message = f"Messages and tools must be JSON: {json_reason(error)}."
            raise RequestError(message, "messages") from error
        text = self._answer(disguise, line)
        return text if last is None else last.cut(text)

    def _answer(self, disguise: Disguise, line: str) -> str:
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


@dataclass(frozen=True)
class _Given:
    """The arguments of `ChatTemplate.render`."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None
    add_generation_prompt: bool
    continue_final_message: bool | str
    chat_template_kwargs: Mapping[str, Any] | None


@dataclass(frozen=True)
class _Last:
    """The last message of a conversation, with a mark at the end of the text to continue. As in transformers, the mark ends in
    a space, which shows whether the template trims the text."""

    message: Message
    text: str
    mark: str

    @classmethod
    def of(cls, message: Message, wanted: bool | str, template: str) -> _Last:
        field = wanted if isinstance(wanted, str) else "content"
        content = message.get(field)
        must = partial(expect, param="continue_final_message")
        must(content is not None, f"continue_final_message needs a last message that has {quoted(field)}.")
        names = [name for name in REASONING if message.get(name) == content] if field in REASONING else [field]
        must(any(name in template for name in names), f"The chat template of this model does not use {quoted(field)}.")
        mark = f"{secrets.randbelow(10**24):024} "
        if isinstance(content, str):
            return cls({**message, **dict.fromkeys(names, content + mark)}, content, mark)
        parts = list(content) if isinstance(content, list) else []
        at = next((i for i in reversed(range(len(parts))) if isinstance(parts[i], dict) and "text" in parts[i]), None)
        must(at is not None and isinstance(parts[at]["text"], str), "continue_final_message needs a text in the last message.")
        assert at is not None
        text = parts[at]["text"]
        parts[at] = {**parts[at], "text": text + mark}
        return cls({**message, **dict.fromkeys(names, parts)}, text, mark)

    def cut(self, rendered: str) -> str:
        """Return the text up to the mark."""
        at = rendered.rfind(self.mark.strip())
        told = "The chat template of this model leaves out or changes the last message, which cannot be continued."
        expect(at >= 0 and self.text.strip() in rendered, told, "continue_final_message")
        return rendered[:at] if rendered.startswith(self.mark, at) else rendered[:at].rstrip()


def _check(given: _Given) -> None:
    messages, extra = given.messages, given.chat_template_kwargs
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError(f"messages must be a list with at least one message, got {quoted(messages)}.", "messages")
    for i, message in enumerate(messages):
        if (fault := _fault(message)) is not None:
            raise RequestError(f"messages[{i}] {fault}", "messages")
    if given.continue_final_message and given.add_generation_prompt:
        told = "continue_final_message needs add_generation_prompt=false: an answer is begun or continued."
        raise RequestError(told, "continue_final_message")
    if extra is None:
        return
    must = partial(expect, param="chat_template_kwargs")
    if not isinstance(extra, Mapping) or not all(isinstance(name, str) for name in extra):
        raise RequestError(f"chat_template_kwargs must map names to values, got {quoted(extra)}.", "chat_template_kwargs")
    taken = [name for name in extra if name in PROTECTED]
    must(not taken, f"chat_template_kwargs must not set {listed(taken)}.")
    documents = extra.get("documents")
    sound = documents is None or (isinstance(documents, list) and all(isinstance(each, Mapping) for each in documents))
    must(sound, "documents must be a list of mappings with a title and a text.")


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


def _normalized(message: Message) -> Message:
    """Return a message as templates expect it. The arguments of its tool calls are objects.

    Chat APIs send arguments as JSON text, and templates apply `tojson` to them. As in vLLM, the text must be JSON, no text
    means no arguments, and an empty list of calls is left out. As in transformers, fields that are null are left out, and
    reasoning has all of its names."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in REASONING if name in kept), None)
    if reasoning is not None:
        kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
    calls = kept.get("tool_calls")
    if message["role"] == "assistant" and isinstance(calls, list | tuple):
        kept["tool_calls"] = [_parsed(call) for call in calls]
        if not calls:
            del kept["tool_calls"]
    return kept


def _arguments(messages: Sequence[Message]) -> Iterator[bytes]:
    """Yield the JSON texts of tool calls."""
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list | tuple) else ():
            match call:
                case {"function": {"arguments": str(text)}}:
                    yield text.encode(errors="replace")


def _parsed(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            name = quoted(function.get("name"))
            message = (
                f"The arguments of a call of {name} in messages must be JSON, got {quoted(arguments)} ({json_reason(error)})."
            )
            raise RequestError(message, "messages") from None
    return {**call, "function": {**function, "arguments": arguments}}
