"""`POST /v1/completions`: text or token ids, continued."""

from __future__ import annotations

import codecs
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from common.request import Logprobs, SamplingParams
from common.serve.encoding import JsonList, finite
from common.serve.model import Prompt, ServedModel
from common.serve.protocol import CompletionRequest
from common.serve.serving import Answer, Serving, read
from common.serve.worker import Piece
from common.text.detokenizer import IncrementalDetokenizer
from common.text.output import Delta

router = APIRouter()
KIND = "text_completion"
DEFAULT_TOKENS = 16
"""Output tokens of a request that gives no `max_tokens`, as far as the context has room."""


@router.post("/v1/completions")
async def completions(http: HttpRequest) -> Response:
    arrival, serving, body = time.perf_counter(), Serving.of(http), await read(http, CompletionRequest)
    model = serving.model

    def params(given: Sequence[Prompt]) -> SamplingParams:
        room = max(1, model.max_model_len - max(len(prompt.token_ids) for prompt in given))
        most = 1 if body.prompt_only else min(DEFAULT_TOKENS, room) if body.max_tokens is None else body.max_tokens
        scored = body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs
        return body.params(most, body.logprobs, scored, model.defaults)

    prompts = lambda: model.prompts(body.prompt, body.add_special_tokens, body.truncate_prompt_tokens)  # noqa: E731
    answer = await Answer.of(http, "text_completion", "cmpl", body, arrival, prompts, params)
    prompts_shown = [ShownPrompt(answer, body, prompt) for prompt in answer.prompts]
    choices = [Choice(answer, body, i, prompts_shown[i // answer.params.n]) for i in range(answer.num_choices)]
    return await answer.respond(http, choices, KIND, KIND)


@dataclass
class ShownPrompt:
    """A prompt as its answer shows it. The choices that continue it share it: its log-probabilities are encoded once."""

    answer: Answer
    body: CompletionRequest
    prompt: Prompt
    text: str = ""
    logprobs: dict[str, JsonList] | None = None
    """With `echo` and `logprobs`."""
    prompt_logprobs: JsonList | None = None
    """With `prompt_logprobs`."""
    begun: bool = False

    def begin(self, scored: Sequence[Logprobs | None] | None) -> None:
        """Make the parts at the first piece of the first choice."""
        if self.begun:
            return
        self.begun = True
        if self.body.prompt_logprobs is not None:
            self.prompt_logprobs = JsonList.of(self._entries(scored or ()))
        if not self.body.echo:
            return
        model, text, ids = self.answer.serving.model, self.prompt.text, self.prompt.token_ids
        self.text = model.tokenizer.decode(ids, self.answer.params.skip_special_tokens) if text is None else text
        if self.body.logprobs is not None:
            lists, scored = LogprobLists.of(self.answer, self.body), scored or [None] * len(ids)
            starts = None if text is None else model.tokenizer.starts(text, self.body.add_special_tokens)
            self.logprobs = {name: JsonList.of(values) for name, values in lists.push(ids, scored, starts).items()}

    def _entries(self, scored: Sequence[Logprobs | None]) -> list[dict[str, Any] | None]:
        """As vLLM gives them: for each token of the prompt, itself and the likeliest by id; None for the first."""
        spell = self.answer.serving.model.token_text
        entry = lambda token, p, rank: {"logprob": finite(p), "rank": rank, "decoded_token": spell(token)}  # noqa: E731
        entries: list[dict[str, Any] | None] = []
        for token, each in zip(self.prompt.token_ids, scored, strict=False):
            if each is None:
                entries.append(None)
                continue
            top = enumerate(zip(each.top_ids, each.top_logprobs, strict=True), 1)
            likeliest = {str(other): entry(other, p, rank) for rank, (other, p) in top}
            entries.append({str(token): entry(token, each.logprob, each.rank)} | likeliest)
        return entries


@dataclass
class Choice:
    """One continuation as it grows."""

    answer: Answer
    body: CompletionRequest
    index: int
    prompt: ShownPrompt
    lists: LogprobLists | None = None
    logprobs: dict[str, JsonList] | None = None
    """Of the whole answer. A stream keeps none."""
    begun: bool = False
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        if self.body.logprobs is not None:
            self.lists = LogprobLists.of(self.answer, self.body)
            self.lists.skip(self.prompt.prompt, bool(self.body.echo))
            if not self.body.stream:
                self.logprobs = {name: JsonList() for name in LISTS}

    def push(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks that a token or an end makes. With `echo` a chunk of the prompt precedes the first."""
        delta = piece.delta
        if self.body.prompt_only:
            delta = Delta("", (), finish=delta.finish)
        self.answer.completion_tokens += len(delta.token_ids)
        chunks = []
        if not self.begun:
            self.begun = True
            self.prompt.begin(piece.delta.prompt_logprobs)
            if self.body.echo:
                chunks.append(self._chunk(self.prompt.text, [], self.prompt.logprobs, None, None))
        shown = None if self.lists is None else self.lists.push(delta.token_ids, [delta.logprobs] * len(delta.token_ids))
        return [*chunks, self._chunk(delta.text, list(delta.token_ids), shown, delta.finish_reason, delta.stop_reason)]

    def _chunk(
        self, text: str, token_ids: list[int], logprobs: Mapping[str, Any] | None, finish: str | None, stop: Any
    ) -> dict[str, Any]:
        self.text += text
        self.token_ids += token_ids
        self.finish_reason, self.stop_reason = finish, stop
        if self.logprobs is not None and logprobs is not None:
            self.answer.size += sum(self.logprobs[name].add(values) for name, values in logprobs.items())
        return self.as_dict(text, token_ids, logprobs)

    def as_dict(self, text: str, token_ids: Sequence[int], logprobs: Any) -> dict[str, Any]:
        choice = {
            "index": self.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = token_ids
        return choice

    def whole(self) -> dict[str, Any]:
        choice = self.as_dict(self.text, self.token_ids, self.logprobs)
        if self.body.return_token_ids:
            choice["prompt_token_ids"] = list(self.prompt.prompt.token_ids)
        if self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self.prompt.prompt_logprobs
        return choice


LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
"""Fields of `logprobs` in an answer, a list each."""


class LogprobLists:
    """OpenAI's older form: four lists side by side."""

    def __init__(self, model: ServedModel, as_ids: bool, skip_special_tokens: bool) -> None:
        self._model, self._as_ids, self._skip_special = model, as_ids, skip_special_tokens
        self._text = IncrementalDetokenizer(model.tokenizer, (), skip_special_tokens)
        self._offset = 0

    @classmethod
    def of(cls, answer: Answer, body: CompletionRequest) -> Self:
        return cls(answer.serving.model, bool(body.return_tokens_as_token_ids), answer.params.skip_special_tokens)

    def skip(self, prompt: Prompt, shown: bool) -> None:
        """Go past a prompt. If it is `shown`, offsets count from its beginning."""
        if shown and prompt.text is None:
            for token in prompt.token_ids:
                self._place(token)
        else:
            self._text = IncrementalDetokenizer(self._model.tokenizer, prompt.token_ids, self._skip_special)
            self._offset = len(prompt.text or "") if shown else 0

    def push(
        self, token_ids: Sequence[int], scored: Sequence[Logprobs | None], starts: Sequence[int] | None = None
    ) -> dict[str, list[Any]]:
        """Return the entries of these tokens. None scores the first of a prompt. `starts` are the offsets of tokens of a text
        that the answer repeats as it came."""
        scores = [None if each is None else finite(each.logprob) for each in scored]
        top = [None if each is None else self._top(token, each) for token, each in zip(token_ids, scored, strict=True)]
        places = [self._place(token) for token in token_ids] if starts is None else list(starts)
        return dict(zip(LISTS, ([self._name(token) for token in token_ids], scores, top, places), strict=True))

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

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._as_ids else self._model.token_text(token)

    def _top(self, token: int, logprobs: Logprobs) -> dict[str, float]:
        """The likeliest by name, and the token itself; where two are spelt alike, the likelier."""
        top = {self._name(token): finite(logprobs.logprob)}
        for other, logprob in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True):
            name = self._name(other)
            top[name] = max(finite(logprob), top.get(name, -9999.0))
        return top
