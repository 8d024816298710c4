"""A live request, and how far it has come."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from common.batch import KV
from common.request import Logprobs, Request, Status
from common.sampling.logits_processor import LogitsProcessor
from common.schedule.page_pool import PageKey
from common.text.grammar import Matcher


class LifecycleError(RuntimeError):
    """A request was sent from one state to another that does not follow it: a bug of the scheduler, never of a user."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A live request and how far it has come. Tokens = prompt + output; KV of the first `computed` of them is scheduled."""

    request: Request
    number: int
    """Arrival order."""
    max_tokens: int
    """Output tokens at most, the context and the pool considered."""
    seed: int
    known: int
    """Tokens the host knows."""
    stops: Mapping[int, int | None]
    """Tokens that end it -> the reason to report: None for EOS."""
    edits: LogitsProcessor | None = None
    """What it asks of its logits; None if nothing."""
    scores: list[Logprobs | None] | None = None
    """Log-probabilities of its prompt's tokens, as far as they are known; None if not requested."""
    matcher: Matcher | None = None
    """How far its output has come in its grammar; None without one, and until that is compiled."""
    kv: Future[KV] | None = None
    """Of its first tokens, from elsewhere; None without, and once it has started."""
    parent: Sequence | None = None
    """From whose pages it starts; None once it has started."""
    status: Status = Status.WAITING
    output: list[int] = field(default_factory=list)
    row: int = -1
    pages: list[int] = field(default_factory=list)
    keys: list[PageKey] = field(default_factory=list)
    """Of its full pages, as far as they were needed yet."""
    computed: int = 0
    landed: int = 0
    """Tokens at its start whose KV is written: those of steps that have landed, and hits."""
    cached: int = 0
    """Tokens of its prompt that the prefix cache had."""
    published: int = 0
    """Of `pages`, how many were hits or are offered to others."""
    pending: int = 0
    """Tokens sampled by steps in flight."""
    in_flight: int = 0
    """Steps in flight that name it; only when there are none are its pages and row free for others."""
    suspect: int = 0
    """Nonzero if a step with this request raised: the number of tokens that a landed step must compute to clear it."""
    raised: int = 0
    """Consecutive trials in which the request ran alone and the step raised."""
    admissions: int = 0
    """Elsewhere too, where it has output from there."""
    urgency: tuple[int, int] = field(init=False)
    """Priority, then arrival; the lesser is more urgent, and no two are alike."""

    def __post_init__(self) -> None:
        self.urgency = self.request.priority, self.number

    def become(self, status: Status) -> None:
        """Change the state. Raises `LifecycleError` if it does not lead there."""
        if not self.status.leads_to(status):
            raise LifecycleError(
                f"Request {self.request.request_id!r} cannot go from {self.status} to {status}; this is a bug."
            )
        self.status = status

    @property
    def left(self) -> int:
        """Tokens to compute before the next can be sampled."""
        return self.known + self.pending - self.computed

    @property
    def scoring(self) -> bool:
        """Whether tokens of its prompt are still to be scored."""
        return self.scores is not None and len(self.scores) < len(self.request.prompt_token_ids)

    @property
    def follows(self) -> bool:
        """Whether what its next logits become depends on all tokens before."""
        return self.matcher is not None or (self.edits is not None and self.edits.follow)

    def tokens(self) -> np.ndarray:
        """All that the host knows: prompt and output, int32[known]."""
        return np.array((*self.request.prompt_token_ids, *self.output), np.int32)
