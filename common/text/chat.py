"""Conversations to prompts, by the template that came with the model."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from common.errors import BackendError, CheckpointError, RequestError, nearest_hint
from common.request import expect
from common.text.tokenizer import Tokenizer

MAX_SECONDS = 1.0
"""For one conversation; an honest template needs a thousandth of it."""
MAX_START_SECONDS = 60.0
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
        self._worker: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The conversation as text, special tokens spelt out.

        Raises `RequestError` for messages that are malformed or that the template refuses, and for a template that takes more
        than a second or its share of memory; `CheckpointError` for one that is not valid Jinja; `BackendError` if the worker
        does not start.
        """
        _check(messages)
        special = {"bos_token": self._tokenizer.bos_token_id, "eos_token": next(iter(self._tokenizer.eos_token_ids), None)}
        special["pad_token"] = self._tokenizer.pad_token_id
        variables = {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **{name: self._tokenizer.id_to_token(i) for name, i in special.items() if i is not None},
        }
        try:
            line = json.dumps({"template": self._template, "variables": variables})
        except (TypeError, ValueError, RecursionError) as error:
            told = f"Messages and tools must be made of strings, numbers, lists and mappings: {error}."
            raise RequestError(told, "messages") from error
        told = f"A conversation may take {MAX_MESSAGES} characters as JSON, got {len(line)}."
        expect(len(line) <= MAX_MESSAGES, told, "messages")
        answer = self._ask(line)
        match answer.get("kind"):
            case None:
                return answer["text"]
            case "syntax":
                raise CheckpointError(f"The chat template is not valid Jinja, {answer['error']}.")
            case "refused":
                raise RequestError(f"The chat template refuses this conversation: {answer['error']}", "messages")
            case _:
                raise RequestError(f"The chat template fails on this conversation: {answer['error']}", "messages")

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> tuple[str, list[int]]:
        """`render` and its token ids. Only the template makes special tokens: one that a message spells stays plain text."""
        # Names for special tokens in messages, unguessable and made of letters, so that no filter of a template changes them.
        nonce = "".join(chr(ord("a") + byte % 16) for byte in secrets.token_bytes(16))
        names: dict[str, str] = {}

        def disguise(value: Any) -> Any:
            if isinstance(value, str):
                return "".join(
                    names.setdefault(part, f"{nonce}{'x' * len(names)}z") if special else part
                    for part, special in self._parts(value)
                )
            if isinstance(value, Mapping):
                return {key: disguise(item) for key, item in value.items()}
            return [disguise(item) for item in value] if isinstance(value, list | tuple) else value

        def reveal(text: str) -> str:
            for token, name in names.items():
                text = text.replace(name, token)
            return text

        try:
            plain_messages, plain_tools = disguise(messages), disguise(tools)
        except RecursionError:
            raise RequestError("Messages and tools are nested too deeply.", "messages") from None
        text = self.render(plain_messages, tools=plain_tools, add_generation_prompt=add_generation_prompt)
        if not names:
            return text, self._tokenizer.encode(text, add_special_tokens=False)
        token_ids: list[int] = []
        for part, special in self._parts(text):
            if special:
                token_ids.append(self._tokenizer.special_tokens[part])
            else:
                token_ids += self._tokenizer.encode(reveal(part), add_special_tokens=False, parse_special=False)
        return reveal(text), token_ids

    def _parts(self, text: str) -> Iterator[tuple[str, bool]]:
        """`text` cut into special tokens (True) and what lies between (False)."""
        end = 0
        for start, stop in self._tokenizer.find_special(text):
            yield text[end:start], False
            yield text[start:stop], True
            end = stop
        yield text[end:], False

    def _ask(self, line: str) -> dict[str, str]:
        with self._lock:
            try:
                if self._worker is None or self._worker.poll() is not None:
                    self._start()
                assert self._worker is not None
                answer = _exchange(self._worker, line + "\n", MAX_SECONDS)
                if not answer:
                    told = f"The chat template was stopped: it took more than {MAX_SECONDS:g} s, or too much memory."
                    raise RequestError(told, "messages")
                return json.loads(answer)
            except BaseException:  # Ctrl-C above all: whoever asks next would read the answer that is still to come
                self._stop()
                raise

    def _start(self) -> None:
        self._stop()
        program = Path(__file__).with_name("render.py")
        # -P: the worker's own folder holds no modules for it.
        self._worker = subprocess.Popen(
            [sys.executable, "-P", str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        if not _exchange(self._worker, "", MAX_START_SECONDS):
            raise BackendError(f"The process that renders chat templates does not start ({sys.executable} {program}).")

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    def close(self) -> None:
        """End the worker. Idempotent; another `render` starts a new one."""
        with self._lock:
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _exchange(worker: subprocess.Popen[str], line: str, seconds: float) -> str:
    """Write `line`, read one line; empty if the worker ended or was ended because it took longer."""
    assert worker.stdin is not None and worker.stdout is not None
    timer = threading.Timer(seconds, worker.kill)
    timer.start()
    try:
        worker.stdin.write(line)
        worker.stdin.flush()
        return worker.stdout.readline()
    except BrokenPipeError:
        return ""
    finally:
        timer.cancel()


def _check(messages: Any) -> None:
    must = partial(expect, param="messages")
    must(
        isinstance(messages, Sequence) and not isinstance(messages, str | bytes) and len(messages) > 0,
        f"messages must be a list with at least one message, got {messages!r:.80}.",
    )
    for i, message in enumerate(messages):
        must(isinstance(message, Mapping), f"messages[{i}] must be a mapping with role and content, got {message!r:.80}.")
        role, content = message.get("role"), message.get("content")
        must("role" in message, f"messages[{i}] has no role; expected one of {', '.join(ROLES)}.")
        must(role in ROLES, f"messages[{i}] has the role {role!r}.{nearest_hint(str(role), ROLES)} Known: {', '.join(ROLES)}.")
        must(
            isinstance(content, str | list) or (content is None and bool(message.get("tool_calls"))),
            f"messages[{i}] needs a content that is a string (or a list of parts), got {content!r:.80}.",
        )
