"""From prompts to the requests of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np

from common.config import ModelConfig
from common.errors import RequestError, shown
from common.request import Request, SamplingParams, expect
from common.text.grammar import Grammars
from common.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or a mapping with `prompt` or `prompt_token_ids`."""


class RequestBuilder:
    """Builds the requests of one model. `close` ends the threads that compile grammars."""

    def __init__(self, model: ModelConfig, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_ids = tokenizer.all_eos(model.eos_token_ids)
        self._grammars = Grammars(tokenizer, self.eos_token_ids, model.vocab_size)
        self._numbers = count()

    def next_id(self) -> str:
        """Return a request id that was not returned before."""
        return str(next(self._numbers))

    def tokens(self, i: int, prompt: Any) -> tuple[str | None, Sequence[int]]:
        """Return the text of prompt number `i`, None where it has none, and its token ids. Raises `RequestError`."""
        match prompt:
            case str():
                return prompt, self._tokenizer.encode(prompt)
            case {"prompt_token_ids": list() | tuple() as ids} if prompt.keys() <= {"prompt_token_ids", "prompt"}:
                text = prompt.get("prompt")
                expect(
                    text is None or isinstance(text, str), f"Prompt {i}: prompt must be a string, got {shown(text)}.", "prompt"
                )
                return text, ids
            case {"prompt": str(text)} if len(prompt) == 1:
                return text, self._tokenizer.encode(text)
            case list() | tuple():
                return None, prompt
            case np.ndarray(ndim=1):
                return None, prompt.tolist()
        raise RequestError(
            f"Prompt {i} must be a string, a list of token ids, or a mapping with prompt or prompt_token_ids, "
            f"got {type(prompt).__name__} {shown(prompt)}."
        )

    def request(self, token_ids: Sequence[int], params: SamplingParams, request_id: str | None = None) -> Request:
        """Return the request for a prompt. Its grammar compiles on a thread: see `check_grammar`."""
        return Request(
            request_id=self.next_id() if request_id is None else request_id,
            prompt_token_ids=tuple(token_ids),
            params=params,
            eos_token_ids=self.eos_token_ids,
            bad_words=self._tokenizer.bad_words(params.bad_words),
            grammar=self._grammars.compile(params.structured_outputs),
        )

    def close(self) -> None:
        """End the threads. A grammar that is being compiled raises `CancelledError` in `check_grammar`."""
        self._grammars.close()


def check_grammar(request: Request) -> None:
    """Wait for the grammar of a request, if it has one. Raises `RequestError` if it cannot be compiled or cannot begin."""
    if request.grammar is not None:
        request.grammar.result().check_begin(request)


def params_of_each(
    prompts: Sequence[Any], sampling_params: SamplingParams | Sequence[SamplingParams] | None, defaults: SamplingParams
) -> list[SamplingParams]:
    """Return the sampling parameters of every prompt, from one for all, one each, or None for the `defaults`."""
    if isinstance(sampling_params, Sequence):
        each = list(sampling_params)
        expect(len(each) == len(prompts), f"Expected one sampling_params for each of {len(prompts)} prompts, got {len(each)}.")
    else:
        each = [defaults if sampling_params is None else sampling_params] * len(prompts)
    for given in each:
        expect(isinstance(given, SamplingParams), f"sampling_params must be SamplingParams, got {type(given).__name__}.")
    return each


def is_one(prompts: Any) -> bool:
    """Return whether this is one prompt rather than a list of prompts."""
    if isinstance(prompts, str | Mapping | np.ndarray):
        return True
    expect(isinstance(prompts, Sequence), f"prompts must be a prompt or a list of prompts, got {type(prompts).__name__}.")
    return len(prompts) > 0 and isinstance(prompts[0], int | np.integer)
