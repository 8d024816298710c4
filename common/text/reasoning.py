"""The reasoning in the output of a model, apart from its answer: `<think>…</think>`, as DeepSeek R1 and Qwen 3 write it."""

from __future__ import annotations

from typing import Literal

ReasoningParser = Literal["deepseek_r1", "qwen3"]
BEGIN, END = "<think>", "</think>"


class Reasoning:
    """Follows the text of one output. `opened`: the output begins inside the reasoning, as the template leaves it."""

    def __init__(self, opened: bool) -> None:
        self._inside, self._started = opened, False
        self._held = ""

    @classmethod
    def of(cls, parser: ReasoningParser) -> Reasoning:
        """Return the reader of a format. DeepSeek R1's output begins inside the reasoning, with or without the tag."""
        return cls(opened=parser == "deepseek_r1")

    def push(self, text: str, last: bool = False) -> tuple[str, str]:
        """Return the reasoning and the answer that `text` adds; `last` for the end of the output."""
        text, self._held = self._held + text, ""
        reasoning = answer = ""
        if not self._started:  # only spaces so far
            start = text.lstrip()
            if start.startswith(BEGIN):
                self._inside, text = True, start[len(BEGIN) :]
            elif BEGIN.startswith(start) and not last:
                self._held = text
                return "", ""
            self._started = True
        if self._inside:
            reasoning, ended, rest = text.partition(END)
            if not ended:
                keep = 0 if last else _overlap(text)
                self._held = text[len(text) - keep :]
                return text[: len(text) - keep], ""
            self._inside, text = False, rest
        answer = text
        return reasoning, answer


def _overlap(text: str) -> int:
    """Return how many characters at the end of `text` may begin the closing tag."""
    return next(n for n in range(min(len(END) - 1, len(text)), -1, -1) if n == 0 or text.endswith(END[:n]))
