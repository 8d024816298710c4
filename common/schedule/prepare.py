"""The form of a request that the scheduler works with. It is immutable, and the choices of one prompt share it.

To check and convert the fields of a request takes time in proportion to their length. A server does that once per HTTP request
and on the thread of that request, so that `Engine.add` takes a short and bounded time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from common.request import Request, expect
from common.sampling.logits_processor import Plan
from common.schedule.admission import check_sampling, check_tokens


@dataclass(frozen=True, eq=False)
class Prepared:
    """The checked fields of a request, for a model of `vocab_size` tokens."""

    vocab_size: int
    stops: Mapping[int, int | None]
    """As `Request.stops`."""
    sampling: Plan | None
    """The edits of the logits that do not depend on the prompt; None if there are none."""
    plan: Plan | None
    """All edits of the logits before the first output token; None if there are none."""


def prepare(request: Request, vocab_size: int, like: Prepared | None = None) -> Prepared:
    """Check and convert the fields of a request. Raises `RequestError` for an id that is no token of the model.

    `like` is the preparation of a request with the same params, bad words and EOS: only the prompt is prepared then.
    """
    name = f"Request {request.request_id!r}"
    check_tokens(f"{name}: prompt_token_ids", request.prompt_token_ids, vocab_size, "prompt_token_ids")
    if like is None or like.vocab_size != vocab_size:
        check_sampling(request, vocab_size)
        stops = request.stops
        like = Prepared(vocab_size, stops, Plan.of(request, stops, vocab_size), None)
    plan = like.sampling
    if plan is not None and request.params.repetition_penalty != 1:
        plan = plan.with_prompt(request.prompt_token_ids)
    return replace(like, plan=plan)


def prepared(request: Request, vocab_size: int) -> Prepared:
    """The preparation that a request brings if it is for this vocabulary, else a new one. Raises `RequestError`."""
    n, name = request.params.n, request.request_id
    expect(
        n == 1 or request.choice is not None,
        f"Request {name!r}: an engine continues a prompt once, got n={n}; add what fan_out makes of the request.",
    )
    check_tokens(f"Request {name!r}: output_token_ids", request.output_token_ids, vocab_size, "output_token_ids")
    ready: Prepared | None = request.prepared
    return prepare(request, vocab_size) if ready is None or ready.vocab_size != vocab_size else ready
