"""Outputs of prompts, with the names that vLLM uses, and how they are put together from the deltas of a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.request import Logprobs, Request
from common.text.output import Delta
from common.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Logprob:
    """The log-probability of one token at one position, from the raw logits."""

    logprob: float
    rank: int
    """1 is the likeliest."""
    decoded_token: str


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    """For each token: itself and the likeliest others, by id; None unless asked for."""
    finish_reason: str | None
    """`stop`, `length`, `abort`, `timeout` or `error`."""
    stop_reason: int | str | None
    """The stop id or stop string that ended it; None for EOS."""
    error: str | None = None
    """The reason, where finish_reason is `error`."""


@dataclass(frozen=True)
class RequestOutput:
    """One prompt and its continuations."""

    request_id: str
    prompt: str | None
    """None where the prompt came as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    """`SamplingParams.n` of them, by index."""
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """For each token of the prompt: itself and the likeliest others, by id; None for the first, and unless asked for."""


@dataclass(frozen=True)
class EmbeddingOutput:
    """An embedding, of length 1."""

    embedding: list[float]
    """D numbers."""


@dataclass(frozen=True)
class EmbeddingRequestOutput:
    """One prompt and its embedding."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool = True


def request_output(
    tokenizer: Tokenizer,
    text: str | None,
    request: Request,
    choices: Sequence[Sequence[Delta]],
    finished: bool = True,
) -> RequestOutput:
    """Return the output of a request from the deltas of each of its choices. `text` is the prompt, None for token ids."""
    outputs = [completion_output(tokenizer, i, request, deltas) for i, deltas in enumerate(choices)]
    scored = prompt_logprobs(tokenizer, request, choices[0])
    return RequestOutput(request.request_id, text, list(request.prompt_token_ids), outputs, finished, scored)


def completion_output(tokenizer: Tokenizer, index: int, request: Request, deltas: Sequence[Delta]) -> CompletionOutput:
    """Return choice `index` of a request from its deltas."""
    token_ids = [token for delta in deltas for token in delta.token_ids]
    asked = request.params.logprobs is not None
    scored = [(token, delta.logprobs) for delta in deltas for token in delta.token_ids if delta.logprobs is not None]
    return CompletionOutput(
        index=index,
        text="".join(delta.text for delta in deltas),
        token_ids=token_ids,
        cumulative_logprob=sum(found.logprob for _, found in scored) if asked else None,
        logprobs=[token_logprobs(tokenizer, token, found) for token, found in scored] if asked else None,
        finish_reason=deltas[-1].finish_reason if deltas else None,
        stop_reason=deltas[-1].stop_reason if deltas else None,
        error=deltas[-1].error if deltas else None,
    )


def prompt_logprobs(tokenizer: Tokenizer, request: Request, deltas: Sequence[Delta]) -> list[dict[int, Logprob] | None] | None:
    """Return the log-probabilities of the prompt's tokens, which come with the first delta, or None if not requested."""
    scored = deltas[0].prompt_logprobs if deltas else None
    if scored is None:
        return None
    pairs = zip(request.prompt_token_ids, scored, strict=True)
    return [None if found is None else token_logprobs(tokenizer, token, found) for token, found in pairs]


def token_logprobs(tokenizer: Tokenizer, token: int, found: Logprobs) -> dict[int, Logprob]:
    """Return the log-probabilities at one position, by token id."""
    ranked = [(token, found.logprob, found.rank)]
    ranked += [(i, p, rank) for rank, (i, p) in enumerate(zip(found.top_ids, found.top_logprobs, strict=True), 1) if i != token]
    return {i: Logprob(p, rank, tokenizer.decode([i], skip_special_tokens=False)) for i, p, rank in ranked}
