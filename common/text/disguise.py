"""Text of special tokens in the strings of a request, replaced before a template sees it and put back afterwards.

Only the template may make special tokens. A string of a request that spells one must stay plain text.
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Any

from common.errors import RequestError
from common.text.json_cost import MAX_UNITS
from common.text.tokenizer import Tokenizer

NONCE_DIGITS = 24
INDEX_DIGITS = 8
MAX_CHARACTERS = 1 << 22
"""Of all strings of one conversation."""
VALUE = 10
"""Units of work of a key or a value."""
PART = 64
"""Units of each part of a string that is searched for special tokens."""


class SpecialText:
    """Finds the text of special tokens. Immutable."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._sorted = sorted(tokenizer.special_tokens)
        self._first = frozenset(token[0] for token in self._sorted if token)
        self._candidate = re.compile(f"[{''.join(map(re.escape, self._first))}]" if self._first else "(?!)")
        self._longest = max(map(len, self._sorted), default=0)

    def parts(self, text: str) -> Iterator[tuple[str, bool]]:
        """Cut `text` into special tokens (True) and the text between them (False)."""
        end = 0
        for start, stop in self._tokenizer.find_special(text):
            yield text[end:start], False
            yield text[start:stop], True
            end = stop
        yield text[end:], False

    def cut(self, text: str) -> list[tuple[str, bool]]:
        """Return `parts`, where the beginning of a special token at the end of `text` counts as special. Return no part if
        `text` has no character that begins a special token.

        A template may join two strings, and together they must not spell a special token either."""
        if not self._candidate.search(text):  # nearly all strings
            return []
        *before, (last, _) = self.parts(text)
        begin = self._begun(last)
        return [*before, (last[:begin], False), *([(last[begin:], True)] if begin < len(last) else [])]

    def _begun(self, text: str) -> int:
        """Return the index from which `text` is the beginning of a special token, or the length of `text`."""
        for i in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[i] in self._first:
                at = bisect_left(self._sorted, text[i:])
                if at < len(self._sorted) and self._sorted[at].startswith(text[i:]):
                    return i
        return len(text)


class Disguise:
    """The replacements of one request. The names are random digits, which the filters of templates do not change."""

    def __init__(self, special: SpecialText) -> None:
        self._special = special
        self._nonce = f"{secrets.randbelow(10**NONCE_DIGITS):0{NONCE_DIGITS}}"
        self._pattern = re.compile(f"{self._nonce}([0-9]{{{INDEX_DIGITS}}})")
        self._names: dict[str, str] = {}
        self._units = self._characters = 0

    def __bool__(self) -> bool:
        """Whether anything was replaced."""
        return bool(self._names)

    def hide(self, value: Any) -> Any:
        """Return a copy of nested mappings and lists without text of special tokens, in keys as well as in values.

        Raises `RequestError` for strings that are not Unicode, and for values that are too large or take too much work. Raises
        `RecursionError` for values that are nested too deeply."""
        if isinstance(value, str):
            return self._hidden(value)
        if isinstance(value, Mapping):
            self._work(2 * VALUE * len(value))
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            self._work(VALUE * len(value))
            return [self.hide(item) for item in value]
        return value

    def _hidden(self, text: str) -> str:
        self._characters += len(text)
        if self._characters > MAX_CHARACTERS:
            message = f"Messages, tools and chat_template_kwargs may have {MAX_CHARACTERS} characters. Shorten them."
            raise RequestError(message, "messages")
        cut = self._special.cut(text)
        self._work(PART * len(cut))
        return text if len(cut) <= 1 else "".join(self._name(part) if special else part for part, special in cut)

    def show(self, text: str) -> str:
        """Put the replaced text back."""
        if not self._names:
            return text
        parts = list(self._names)
        return self._pattern.sub(lambda match: parts[int(match[1])] if int(match[1]) < len(parts) else match[0], text)

    def _work(self, units: int) -> None:
        self._units += units
        if self._units > MAX_UNITS:
            raise RequestError(
                f"Messages, tools and chat_template_kwargs may take {MAX_UNITS} units of work: {VALUE} for each key and value, "
                f"and {PART} for each part of a string that may spell a special token. Shorten them.",
                "messages",
            )

    def _name(self, part: str) -> str:
        return self._names.setdefault(part, f"{self._nonce}{len(self._names):0{INDEX_DIGITS}}")
