"""The model that is served: its names, its text and its limits. Every call here may take time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import RequestError, quoted
from common.request import expect, expect_context
from common.schedule.admission import check_tokens
from common.schedule.embeddings import Pooler
from common.serve.errors import ApiError
from common.serve.protocol import several
from common.text.chat import ChatTemplate
from common.text.grammar import Grammars
from common.text.reasoning import ReasoningParser
from common.text.tokenizer import Tokenizer
from common.text.tool_calls import ToolFormat, format_of_template
from common.text.tool_prompt import with_tools
from common.weights.checkpoint import Checkpoint

NORMALIZED = 4
"""Factor by which normalization (NFC) may shorten a text."""
MAX_TEXT = 1 << 20
"""Bytes of a text that may be longer than the context, because its tokens are counted or truncated. Python's lock is held while
the list of the tokens is made."""


class Prompt(NamedTuple):
    """A prompt."""

    text: str | None
    """None if the request has token ids, or if the text was truncated."""
    token_ids: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """Calls that take time proportional to their input belong on a thread that is not the event loop's."""

    names: tuple[str, ...]
    """Answers have the first."""
    root: Path
    tokenizer: Tokenizer
    template: ChatTemplate | None
    grammars: Grammars
    pooler: Pooler
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    vocab_size: int
    longest_token: int
    """Bytes."""
    defaults: Mapping[str, Any]
    """Sampling parameters of requests that give none."""
    tool_format: ToolFormat
    """How the model writes calls of tools."""
    reasoning: ReasoningParser | None
    """The format of the model's reasoning; None: all text is the answer."""

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        max_model_len: int,
        *,
        defaults: Mapping[str, Any] | None = None,
        tool_format: ToolFormat | None = None,
        reasoning: ReasoningParser | None = None,
    ) -> ServedModel:
        """Return the model under these names. Without a `tool_format` the chat template decides."""
        eos = tokenizer.all_eos(checkpoint.config.eos_token_ids)
        return cls(
            names=tuple(names),
            root=checkpoint.path,
            tokenizer=tokenizer,
            template=ChatTemplate(tokenizer) if tokenizer.chat_template else None,
            grammars=Grammars(tokenizer, eos, checkpoint.config.vocab_size),
            pooler=Pooler.of(checkpoint),
            eos_token_ids=eos,
            max_model_len=max_model_len,
            vocab_size=checkpoint.config.vocab_size,
            defaults=defaults or {},
            tool_format=tool_format or format_of_template(tokenizer.chat_template),
            reasoning=reasoning,
            longest_token=max(len(tokenizer.token_bytes(i, False)) for i in range(tokenizer.vocab_size)),
        )

    def close(self) -> None:
        self.grammars.close()
        if self.template is not None:
            self.template.close()

    def check_name(self, name: str | None) -> None:
        """Raise `ApiError` for another name. None selects the model."""
        if name is not None and name not in self.names:
            raise ApiError(404, f"The model {quoted(name)} does not exist; served here: {', '.join(self.names)}.", "model")

    def prompts(
        self, prompt: Any, add_special_tokens: bool = True, truncate: int | None = None, name: str = "prompt", room: int = 1
    ) -> list[Prompt]:
        """`prompt` as OpenAI's completions take it: a text, token ids, or a list of one of these. `truncate` keeps so many
        tokens at the end; -1 as many as leave `room` for output tokens. `name` is how messages call it."""
        if isinstance(prompt, str):
            given: list[Any] = [prompt]
        else:
            expect(isinstance(prompt, list) and len(prompt) > 0, f"{name} must be a text, token ids, or a list of these.", name)
            given = prompt if several(prompt) else [prompt]
        return [self.prompt(each, add_special_tokens, truncate, name, room) for each in given]

    def prompt(
        self, prompt: Any, add_special_tokens: bool = True, truncate: int | None = None, name: str = "prompt", room: int = 1
    ) -> Prompt:
        text, token_ids, most = None, prompt, self.max_model_len - room
        if isinstance(prompt, str):
            text, token_ids = prompt, self.encode(prompt, add_special_tokens, checked=truncate is None, name=name)
        expect(isinstance(token_ids, list), f"{name} must be a text or a list of token ids, got {quoted(prompt)}.", name)
        kept = len(token_ids) if truncate is None else most if truncate == -1 else truncate
        if kept < len(token_ids):
            text, token_ids = None, token_ids[-kept:]
        expect(len(token_ids) > 0, f"{name} must hold at least one token, got none.", name)
        self._expect_fits(len(token_ids) <= most, f"{name} holds {len(token_ids)} tokens; shorten it to at most {most}.", name)
        if text is None:  # by now they are few
            check_tokens(name, token_ids, self.vocab_size, name)
        return Prompt(text, token_ids)

    def _expect_fits(self, fits: bool, told: str, name: str) -> None:
        """Raise `ContextLengthError` with the words that clients look for."""
        expect_context(fits, f"This model's maximum context length is {self.max_model_len} tokens. But {told}", name)

    def expect_size(self, text: str, checked: bool, name: str) -> None:
        """Refuse a text that cannot fit the context if `checked`, else one above `MAX_TEXT`, before it is cut into tokens."""
        size, most = len(text.encode(errors="replace")), self.max_model_len * self.longest_token * NORMALIZED
        found = f"The text of {name} has {size} bytes"
        if checked:
            self._expect_fits(size <= most, f"{found}, more than can fit; shorten it.", name)
        most = max(most, MAX_TEXT)
        expect(size <= most, f"{found}; a text that is truncated or counted may have at most {most}. Shorten it.", name)

    def encode(self, text: str, add_special_tokens: bool = True, *, checked: bool = True, name: str = "prompt") -> list[int]:
        """`checked`: as for `expect_size`."""
        self.expect_size(text, checked, name)
        return self.tokenizer.encode(text, add_special_tokens)

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        truncate: int | None = None,
        **options: Any,
    ) -> Prompt:
        """Return the prompt of a conversation. `options` are those of `ChatTemplate.encode`."""
        prompt = self.render(messages, tools, checked=truncate is None, **options)
        return self.prompt(prompt.token_ids, truncate=truncate, name="messages")._replace(text=prompt.text)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        checked: bool = True,
        **options: Any,
    ) -> Prompt:
        """Apply the chat template. `checked`: as for `expect_size`, which is called with the content and with the result."""
        if self.template is None:
            message = "This model has no chat template: it continues text. Use the completions endpoint."
            raise RequestError(message, "messages")
        plain = [message_of(i, message) for i, message in enumerate(messages)]
        if "tools" not in (self.tokenizer.chat_template or ""):
            plain, tools = with_tools(plain, tools), None
        check = partial(self.expect_size, checked=checked, name="messages")
        check("".join(str(message["content"]) for message in plain))
        return Prompt(*self.template.encode(plain, tools=tools, check=check, **options))

    def token_text(self, token_id: int) -> str:
        """One token by itself, special ones too. A piece of a character shows its bytes, so that no two tokens look alike."""
        raw = self.tokenizer.token_bytes(token_id, skip_special_tokens=False)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def message_of(i: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its parts of text joined to one: what templates of text models are written for."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
        expect(
            all(isinstance(part, str) for part in parts),
            f'messages[{i}].content must be a text, or parts {{"type": "text", "text": …}}: this model reads text only.',
            "messages",
        )
        content = "\n".join(map(str, parts))
    elif content is None:
        content = "" if message.get("tool_calls") else None
    return {**message, "content": content}
