"""What an engine and its replicas say to each other, as messages in JSON and back. Tokens of prompts travel as bytes.

On the way a request goes by a number, a new one each time it is sent, so that an answer to what is over finds nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import numpy as np

from common.batch import KV
from common.interface import Caps
from common.kv_transfer.connection import Address
from common.kv_transfer.protocol import Offer, Tag
from common.process.frames import Message
from common.request import Logprobs, Request, SamplingParams, Status, StructuredOutputsParams, TokenEvent
from common.text.grammar import Grammar

Compile = Callable[[StructuredOutputsParams | None], Future[Grammar] | None]


def pack_request(number: int, parent: int | None, request: Request) -> tuple[Message, bytes]:
    """A request, but for its compiled grammar, which is compiled anew where it runs."""
    params = {name: value for name, value in vars(request.params).items() if name != "structured_outputs"}
    wanted = request.params.structured_outputs
    message = {
        "number": number,
        "parent": parent,
        "params": params,
        "choice": request.choice,
        "seed": request.seed,
        "max_tokens": request.max_tokens,
        "structured_outputs": None if wanted is None else asdict(wanted),
        "eos_token_ids": [int(token) for token in request.eos_token_ids],
        "bad_words": [[int(token) for token in word] for word in request.bad_words],
        "cache_salt": request.cache_salt,
        "priority": int(request.priority),
        "deadline": None if request.deadline is None else float(request.deadline),
        "num_output": len(request.output_token_ids),
        "keep_pages": request.keep_pages,
    }
    return message, np.array((*request.prompt_token_ids, *request.output_token_ids), np.int32).tobytes()


def unpack_request(message: Mapping[str, Any], data: bytes, compile: Compile, kv: Future[KV] | None = None) -> Request:
    """The request, which goes by its number, its grammar compiled by `compile`, its keys and values to come as `kv`."""
    tokens = np.frombuffer(data, np.int32).tolist()
    end = len(tokens) - message["num_output"]
    params = dict(message["params"])
    params["logit_bias"] = params["logit_bias"] and tuple(map(tuple, params["logit_bias"]))
    wanted = message["structured_outputs"]
    params["structured_outputs"] = wanted and StructuredOutputsParams(**wanted)
    return Request(
        request_id=str(message["number"]),
        prompt_token_ids=tuple(tokens[:end]),
        params=SamplingParams(**params),
        choice=message["choice"],
        seed=message["seed"],
        max_tokens=message["max_tokens"],
        eos_token_ids=tuple(message["eos_token_ids"]),
        bad_words=tuple(map(tuple, message["bad_words"])),
        cache_salt=message["cache_salt"],
        priority=message["priority"],
        deadline=message["deadline"],
        parent=None if message["parent"] is None else str(message["parent"]),
        output_token_ids=tuple(tokens[end:]),
        grammar=compile(params["structured_outputs"]),
        kv=kv,
        keep_pages=message["keep_pages"],
    )


def pack_event(event: TokenEvent) -> list[Any]:
    scores = event.prompt_logprobs
    return [
        int(event.request_id),
        event.token_id,
        event.time,
        _pack_logprobs(event.logprobs),
        None if event.finish is None else event.finish.value,
        event.stop_reason,
        event.error,
        None if scores is None else [_pack_logprobs(entry) for entry in scores],
        event.num_cached_tokens,
    ]


def unpack_event(values: Sequence[Any]) -> tuple[int, TokenEvent]:
    """The number of a request, and the event, which does not name it yet."""
    number, token, time, logprobs, finish, stop_reason, error, scores, cached = values
    status = None if finish is None else Status(finish)
    listed = None if scores is None else [_unpack_logprobs(entry) for entry in scores]
    return number, TokenEvent("", token, time, _unpack_logprobs(logprobs), status, stop_reason, error, listed, cached)


def pack_offer(address: Address, offer: Offer) -> list[Any]:
    """An offer, and where it stands."""
    return [address, *offer.tag, offer.tokens, offer.layouts]


def unpack_offer(values: Sequence[Any]) -> tuple[Address, Offer]:
    address, name, generation, tokens, layouts = values
    return address, Offer(Tag(name, generation), tokens, tuple(layouts))


def unpack_caps(values: Mapping[str, Any]) -> Caps:
    """The inverse of `dataclasses.asdict` and a trip through JSON."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Caps(**fields)


def _pack_logprobs(found: Logprobs | None) -> list[Any] | None:
    return None if found is None else [found.logprob, found.rank, list(found.top_ids), list(found.top_logprobs)]


def _unpack_logprobs(values: Sequence[Any] | None) -> Logprobs | None:
    if values is None:
        return None
    logprob, rank, ids, logprobs = values
    return Logprobs(logprob, rank, ids or (), logprobs or ())
