"""The text of one request: token events in, pieces of text out. The one place where tokens, stop strings and text meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.request import Logprobs, Request, Status, TokenEvent
from common.text.detokenizer import IncrementalDetokenizer
from common.text.stop import StopChecker
from common.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Delta:
    """What one event added to the output of a request. Exactly one delta of a request has a `finish`."""

    text: str
    """May be empty: a character or a possible stop string is still incomplete."""
    token_ids: tuple[int, ...]
    """One, or none for an end that brings no token."""
    logprobs: Logprobs | None = None
    finish: Status | None = None
    stop_reason: int | str | None = None
    """The stop id or stop string that ended it; None for EOS."""
    error: str | None = None
    prompt_logprobs: Sequence[Logprobs | None] | None = None
    """As `TokenEvent` brings them."""

    @property
    def finish_reason(self) -> str | None:
        """`stop`, `length`, `abort`, `timeout` or `error`; None while the request goes on."""
        return self.finish.value if self.finish else None


class OutputText:
    """Follows one request. After a delta with a `finish` it takes no more events.

    A delta may end the request although its event did not: then a stop string is complete. The caller ends the request in the
    engine, and tokens that were already on their way are dropped. The token that completes a stop string is part of the output,
    and its text only as far as the string allows. A token that ends the request by its id shows no text, unless
    `include_stop_str_in_output` asks for it. Stop strings count once `min_tokens` tokens are out.
    """

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        params = request.params
        self._params = params
        self._detokenizer = IncrementalDetokenizer(tokenizer, request.prompt_token_ids, params.skip_special_tokens)
        self._stop = StopChecker(params.stop, params.include_stop_str_in_output)
        self._ends = (*request.eos_token_ids, *params.stop_token_ids)
        self._num_tokens = 0

    def push(self, event: TokenEvent) -> Delta:
        token, finish, params = event.token_id, event.finish, self._params
        token_ids = () if token is None else (token,)
        self._num_tokens += len(token_ids)
        text, matched = "", None
        if params.detokenize:
            may_stop = self._num_tokens >= params.min_tokens
            by_id = params.structured_outputs is None or token in self._ends  # else nothing can follow it
            ended_by_id = finish is Status.FINISHED_STOP and by_id and not params.include_stop_str_in_output
            raw = "" if token is None or ended_by_id else self._detokenizer.push(token)
            if finish:
                raw += self._detokenizer.flush()
            text, matched = self._stop.push(raw, may_stop)
            if finish and matched is None:
                text += self._stop.flush()
        if matched is not None:
            return Delta(text, token_ids, event.logprobs, Status.FINISHED_STOP, matched, None, event.prompt_logprobs)
        return Delta(text, token_ids, event.logprobs, finish, event.stop_reason, event.error, event.prompt_logprobs)
