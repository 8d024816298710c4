"""Token ids to text, one at a time, never half a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from common.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of a growing list of tokens: the results of `push` and of the final `flush`, joined, equal `Tokenizer.decode`.

    Every token is a few bytes, so the cost of a token does not depend on how many came before. At most three bytes are held
    back, the beginning of one character. Bytes that cannot become a character become U+FFFD with the next byte. The prompt
    decides only whether the output begins the text, where some vocabularies drop a space.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = not any(tokenizer.token_bytes(i, skip_special_tokens) for i in prompt_ids)

    def push(self, token_id: int) -> str:
        """What the text gained that can no longer change; empty while a character is incomplete."""
        raw = self._tokenizer.token_bytes(token_id, self._skip_special)
        if self._at_start and raw:
            self._at_start = False
            raw = self._tokenizer.strip_first(raw)
        return self._utf8.decode(raw)

    def flush(self) -> str:
        """The rest: U+FFFD if the tokens ended within a character, else nothing."""
        return self._utf8.decode(b"", final=True)
