"""What an engine can serve at all: held against a request at the door, by the engine or by a router before several of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from common.errors import DrainingError, QueueFullError, RequestError, quoted
from common.request import Request, expect, expect_context


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one engine, as its settings, its runner and its pool make them."""

    max_model_len: int
    num_pages: int
    """Those that requests can have: without the null page."""
    block_size: int
    budget: int
    """Tokens of a step at most."""
    chunked_prefill: bool

    def max_tokens(self, request: Request) -> int:
        """Output tokens that it can come to have. Raises `RequestError` if it can never be served."""
        name, params, prompt_len = request.request_id, request.params, len(request.prompt_token_ids)
        expect_context(
            prompt_len < self.max_model_len,
            f"Request {name!r}: a prompt of {prompt_len} tokens leaves no room for output. This model's maximum context length "
            f"is {self.max_model_len} tokens (max_model_len); shorten the prompt to at most {self.max_model_len - 1}.",
            "prompt_token_ids",
        )
        expect(
            self.chunked_prefill or prompt_len <= self.budget,
            f"Request {name!r}: a prompt of {prompt_len} tokens does not fit a step of {self.budget} (max_num_batched_tokens), "
            "and enable_chunked_prefill=false computes it in one; shorten it, raise max_num_batched_tokens, or allow chunks.",
            "prompt_token_ids",
        )
        room = self.num_pages * self.block_size  # the last output token needs no KV: nothing follows it
        expect_context(
            prompt_len <= room,
            f"Request {name!r}: a prompt of {prompt_len} tokens needs {-(-prompt_len // self.block_size)} pages, but the pool "
            f"has {self.num_pages} of {self.block_size} tokens; shorten it or raise num_blocks.",
            "prompt_token_ids",
        )
        limit = min(self.max_model_len, room + 1) - prompt_len
        asked = params.max_tokens if request.max_tokens is None else request.max_tokens
        max_tokens = limit if asked is None else asked
        expect_context(
            prompt_len + max_tokens <= self.max_model_len,
            f"Request {name!r}: {prompt_len} prompt tokens and max_tokens={max_tokens} are too many. This model's maximum "
            f"context length is {self.max_model_len} tokens (max_model_len); ask for at most {limit}.",
            "max_tokens",
        )
        expect_context(
            max_tokens <= limit,
            f"Request {name!r}: {prompt_len} prompt tokens and max_tokens={max_tokens} need "
            f"{-(-(prompt_len + max_tokens - 1) // self.block_size)} pages, but the pool has {self.num_pages} of "
            f"{self.block_size} tokens; ask for at most {limit} or raise num_blocks.",
            "max_tokens",
        )
        given = len(request.output_token_ids)
        expect(
            given < max_tokens,
            f"Request {name!r}: it has {given} of {max_tokens} output tokens already (output_token_ids), so that none is left.",
        )
        return max_tokens


def expect_new(request: Request, twin: Request | None, parent: Request | None) -> None:
    """Raise `RequestError` if there is a live request of its id, the `twin`, or if its `parent` is none for it."""
    name = request.request_id
    expect(twin is None, f"Request {name!r} is live already; give every live request an id of its own.")
    expect(
        parent is None or (parent.prompt_token_ids, parent.cache_salt) == (request.prompt_token_ids, request.cache_salt),
        f"Request {name!r}: parent {request.parent!r} has another prompt or cache_salt; name one with the same, or none.",
    )


def expect_room(
    request: Request, waiting: int, free: int, max_waiting: int | None, *, draining: bool, forks: bool = False
) -> None:
    """Raise `DrainingError` or `QueueFullError` if an engine takes none now, for which so many requests wait, `free` of which
    its next step can begin. A request that `forks` from a live one is a further choice of it, and came in with it."""
    name = request.request_id
    if draining:
        raise DrainingError(f"Request {name!r}: this engine only finishes what it has; send the request to another.")
    if max_waiting is not None and waiting - free >= max_waiting and not forks:
        raise QueueFullError(
            f"Request {name!r}: {waiting - free} requests wait already, and max_waiting={max_waiting}; try again later, or "
            "raise max_waiting."
        )


def check_sampling(request: Request, vocab_size: int) -> None:
    """Raise `RequestError` if a field that choices share holds an id that is no token of the model."""
    name = request.request_id
    listed: list[tuple[str, Any]] = [
        ("stop_token_ids", request.params.stop_token_ids),
        ("eos_token_ids", request.eos_token_ids),
        ("allowed_token_ids", request.params.allowed_token_ids or ()),
        *(("bad_words", word) for word in request.bad_words),
    ]
    for what, ids in listed:
        check_tokens(f"Request {name!r}: {what}", ids, vocab_size, what)
    beyond = [token for token, _ in request.params.logit_bias or () if token >= vocab_size]  # type: ignore[misc]
    told = f"Request {name!r}: logit_bias must map token ids in [0, {vocab_size}) to numbers, got the ids {quoted(beyond)}."
    expect(not beyond, told, "logit_bias")


def check_tokens(what: str, ids: Sequence[Any], vocab_size: int, param: str | None = None) -> None:
    """Raise `RequestError` for the first of `ids` that is no token id: an integer in [0, vocab_size), which True and 1.0 are
    not."""
    if len(ids) == 0 or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size):
        return  # the fast path: no Python code per token
    for i, token in enumerate(ids):
        if not (isinstance(token, (int, Integral)) and not isinstance(token, bool) and 0 <= int(token) < vocab_size):
            raise RequestError(f"{what}[{i}] must be an integer in [0, {vocab_size}), got {quoted(token)}.", param)
