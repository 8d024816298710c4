"""`POST /v1/completions`: text or token ids, continued."""

from __future__ import annotations

import codecs
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from common.request import Logprobs
from common.serve.model import ServedModel
from common.serve.protocol import CompletionRequest
from common.serve.serving import Answer, Serving, finite, read
from common.serve.worker import Piece
from common.text.detokenizer import IncrementalDetokenizer
from common.text.output import Delta

router = APIRouter()
KIND = "text_completion"


@router.post("/v1/completions")
async def completions(http: HttpRequest) -> Response:
    arrival, serving, body = time.perf_counter(), Serving.of(http), await read(http, CompletionRequest)
    most = 1 if body.prompt_only else 16 if body.max_tokens is None else body.max_tokens
    scored = body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs
    params = lambda: body.params(most, body.logprobs, scored, serving.model.defaults)  # noqa: E731
    prompts = lambda: serving.model.prompts(body.prompt, body.add_special_tokens, body.truncate_prompt_tokens)  # noqa: E731
    answer = await Answer.of(http, "text_completion", "cmpl", body, arrival, params, prompts)
    choices = [Choice(answer, i) for i in range(answer.num_choices)]
    return await answer.respond(http, choices, KIND, KIND)


@dataclass
class Choice:
    """One continuation as it grows."""

    answer: Answer
    index: int
    logprobs: LogprobList | None = None
    prompt_logprobs: Sequence[Logprobs | None] | None = None
    begun: bool = False
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        body = self._body
        if body.logprobs is not None:
            prompt = self.answer.prompt_of(self.index)
            before = () if body.echo and prompt.text is None else prompt.token_ids
            model, skips = self.answer.serving.model, self.answer.params.skip_special_tokens
            self.logprobs = LogprobList(model, bool(body.return_tokens_as_token_ids), skips, before)

    @property
    def _body(self) -> CompletionRequest:
        assert isinstance(self.answer.body, CompletionRequest)
        return self.answer.body

    def push(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks that a token or an end makes."""
        delta = piece.delta
        if self._body.prompt_only:
            delta = Delta("", (), finish=delta.finish)
        self.answer.completion_tokens += len(delta.token_ids)
        begin = [] if self.begun else self._begin(piece.delta.prompt_logprobs)
        self.begun = True
        shown = None
        if self.logprobs is not None:
            shown = self.logprobs.push(delta.token_ids, [delta.logprobs] * len(delta.token_ids))
        return [*begin, self._chunk(delta.text, list(delta.token_ids), shown, delta.finish_reason, delta.stop_reason)]

    def _begin(self, scored: Sequence[Logprobs | None] | None) -> list[dict[str, Any]]:
        """With `echo`, a chunk for the prompt."""
        self.prompt_logprobs = scored
        if not self._body.echo:
            return []
        model, prompt = self.answer.serving.model, self.answer.prompt_of(self.index)
        skips = self.answer.params.skip_special_tokens
        text = model.tokenizer.decode(prompt.token_ids, skips) if prompt.text is None else prompt.text
        shown = None
        if self.logprobs is not None:
            scored = scored or [None] * len(prompt.token_ids)
            if prompt.text is None:
                shown = self.logprobs.push(prompt.token_ids, scored)
            else:
                starts = model.tokenizer.starts(text, self._body.add_special_tokens)
                shown = self.logprobs.push_text(text, prompt.token_ids, starts, scored)
        return [self._chunk(text, [], shown, None, None)]

    def _chunk(self, text: str, token_ids: list[int], logprobs: Any, finish: str | None, stop: Any) -> dict[str, Any]:
        self.text += text
        self.token_ids += token_ids
        self.finish_reason, self.stop_reason = finish, stop
        return self.as_dict(text, token_ids, logprobs)

    def as_dict(self, text: str, token_ids: Sequence[int], logprobs: Any) -> dict[str, Any]:
        choice = {
            "index": self.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = token_ids
        return choice

    def whole(self) -> dict[str, Any]:
        choice = self.as_dict(self.text, self.token_ids, self.logprobs.whole() if self.logprobs else None)
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = list(self.answer.prompt_of(self.index).token_ids)
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs()
        return choice

    def _prompt_logprobs(self) -> list[dict[str, Any] | None]:
        """As vLLM gives them: for each token of the prompt, itself and the likeliest by id; None for the first."""
        model, prompt = self.answer.serving.model, self.answer.prompt_of(self.index)
        entry = lambda token, p, rank: {"logprob": finite(p), "rank": rank, "decoded_token": model.token_text(token)}  # noqa: E731
        entries: list[dict[str, Any] | None] = []
        for token, scored in zip(prompt.token_ids, self.prompt_logprobs or (), strict=False):
            if scored is None:
                entries.append(None)
                continue
            top = enumerate(zip(scored.top_ids, scored.top_logprobs, strict=True), 1)
            likeliest = {str(other): entry(other, p, rank) for rank, (other, p) in top}
            entries.append({str(token): entry(token, scored.logprob, scored.rank)} | likeliest)
        return entries


class LogprobList:
    """OpenAI's older form: four lists side by side."""

    def __init__(
        self, model: ServedModel, as_ids: bool, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()
    ) -> None:
        """`prompt_ids`: what comes before, and is not pushed, or as a text."""
        self._model, self._as_ids, self._skip_special = model, as_ids, skip_special_tokens
        self._text = IncrementalDetokenizer(model.tokenizer, prompt_ids, skip_special_tokens)
        self._offset = 0
        self._lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def push(self, token_ids: Sequence[int], scored: Sequence[Logprobs | None]) -> dict[str, list[Any]]:
        """The entries of these tokens; None scores the first of a prompt."""
        return self._add(token_ids, scored, [self._place(token) for token in token_ids])

    def push_text(
        self, text: str, token_ids: Sequence[int], starts: Sequence[int], scored: Sequence[Logprobs | None]
    ) -> dict[str, list[Any]]:
        """Likewise of a text that shows as it came, whatever its tokens would become, and where in it they begin."""
        self._offset += len(text)
        return self._add(token_ids, scored, starts)

    def _add(self, token_ids: Sequence[int], scored: Sequence[Logprobs | None], starts: Sequence[int]) -> dict[str, list[Any]]:
        fresh: dict[str, list[Any]] = {name: [] for name in self._lists}
        for token, logprobs, start in zip(token_ids, scored, starts, strict=True):
            fresh["tokens"].append(self._name(token))
            fresh["token_logprobs"].append(None if logprobs is None else finite(logprobs.logprob))
            fresh["top_logprobs"].append(None if logprobs is None else self._top(token, logprobs))
            fresh["text_offset"].append(start)
        for name, values in fresh.items():
            self._lists[name] += values
        return fresh

    def _place(self, token: int) -> int:
        """Where the character begins to which the token's first byte belongs. Bytes before it that became none, which come out
        with it as U+FFFD, are not its own."""
        begin, text = self._offset, self._text.push(token)
        self._offset += len(text)
        raw = self._model.tokenizer.token_bytes(token, self._skip_special)
        if not raw or 0x80 <= raw[0] < 0xC0:  # goes on with a character
            return begin
        own = codecs.getincrementaldecoder("utf-8")(errors="replace").decode(raw)
        return max(self._offset - len(own), begin)

    def whole(self) -> dict[str, list[Any]]:
        return self._lists

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._as_ids else self._model.token_text(token)

    def _top(self, token: int, logprobs: Logprobs) -> dict[str, float]:
        """The likeliest by name, and the token itself; where two are spelt alike, the likelier."""
        top = {self._name(token): finite(logprobs.logprob)}
        for other, logprob in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True):
            name = self._name(other)
            top[name] = max(finite(logprob), top.get(name, -9999.0))
        return top
