"""What a request asks of its logits beyond temperature and filters: sparse edits, kept up token by token, and allowed ids.

An edit changes the logit x of one token: x + bias, then divided by the repetition factor where positive and multiplied by it
where not, then less the penalty. A masked token has a bias of -inf, which no other change lifts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np

from common.request import Request, expect

NEUTRAL = np.array([0.0, 1.0, 0.0], np.float32)
"""Bias, repetition factor and penalty that change nothing."""


class Edits:
    """The edits of one live request. `append` every token of its output."""

    @classmethod
    def of(cls, request: Request, stops: Iterable[int], vocab_size: int) -> Self | None:
        """None for a request that changes no logit. `stops`: the ids that end it. Raises `RequestError` if no id is left."""
        p = request.params
        penalties = (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) != (0, 0, 1)
        if not (penalties or p.min_tokens or p.logit_bias or p.allowed_token_ids or request.bad_words):
            return None
        return cls(request, stops, vocab_size)

    def __init__(self, request: Request, stops: Iterable[int], vocab_size: int) -> None:
        params = self._params = request.params
        self._penalises = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) != (0, 0, 1)
        early = tuple(stops) if params.min_tokens else ()
        never = [word[0] for word in request.bad_words if len(word) == 1]
        longer = [word for word in request.bad_words if len(word) > 1]
        seen = request.prompt_token_ids if params.repetition_penalty != 1 else ()
        bias = dict(params.logit_bias or ())
        slots = self._slots = {
            token: slot for slot, token in enumerate(dict.fromkeys((*bias, *early, *never, *(w[-1] for w in longer), *seen)))
        }
        self._ids = np.fromiter(slots, np.int32, len(slots))
        self._values = np.tile(NEUTRAL, (len(slots), 1))
        self._counts: dict[int, int] = {}
        self._values[[slots[token] for token in bias], 0] = list(bias.values())
        self._values[[slots[token] for token in never], 0] = -np.inf
        self._values[[slots[token] for token in seen], 1] = params.repetition_penalty
        self._early = [slots[token] for token in early]
        self._words: dict[int, list[tuple[int, ...]]] = {}  # by their last token but one
        for word in longer:
            self._words.setdefault(word[-2], []).append(word)
        self.allowed = None if params.allowed_token_ids is None else bitmask(params.allowed_token_ids, vocab_size)
        """uint32[ceil(V / 32)], or None where every id is allowed."""
        if params.allowed_token_ids is not None:
            expect(
                bool(set(params.allowed_token_ids) - {*never, *early}),
                f"Request {request.request_id!r}: bad_words and min_tokens mask all of allowed_token_ids.",
                "allowed_token_ids",
            )

    @property
    def follow(self) -> bool:
        """Whether they depend on the output, so that all of it must be known before the next token is sampled."""
        return self._penalises or bool(self._words)

    def append(self, token: int) -> None:
        """One more token of output."""
        if not self._penalises:
            return
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            more = max(64, slot)
            self._ids = np.concatenate([self._ids, np.zeros(more, np.int32)])
            self._values = np.concatenate([self._values, np.tile(NEUTRAL, (more, 1))])
        count = self._counts[slot] = self._counts.get(slot, 0) + 1
        params = self._params
        self._ids[slot] = token
        self._values[slot, 1:] = params.repetition_penalty, params.frequency_penalty * count + params.presence_penalty

    def at(self, output: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
        """The edits int32[n] and float32[n, 3] (bias, repetition factor, penalty) for the token behind `length` of output, of
        which `output` are known: all of them if the edits `follow`."""
        ids, values = self._ids[: len(self._slots)], self._values[: len(self._slots)]
        if masked := self._masked(output, length):
            values = values.copy()
            values[masked, 0] = -np.inf
        used = (values != NEUTRAL).any(axis=1)
        return ids[used], values[used]

    def forbids(self, token: int, output: Sequence[int]) -> bool:
        """Whether `token` is masked behind `output`, all of it. If it is chosen all the same, no other was left."""
        if self.allowed is not None and not int(self.allowed[token // 32]) >> token % 32 & 1:
            return True
        slot = self._slots.get(token, -1)
        return slot >= 0 and (self._values[slot, 0] == -np.inf or slot in self._masked(output, len(output)))

    def _masked(self, output: Sequence[int], length: int) -> list[int]:
        """The slots of what only the output so far masks."""
        masked = self._early if length < self._params.min_tokens else []
        for word in self._words.get(output[-1], ()) if output else ():
            if tuple(output[1 - len(word) :]) == word[:-1]:
                masked = [*masked, self._slots[word[-1]]]
        return masked


def bitmask(token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """uint32[ceil(V / 32)]: bit v % 32 of word v // 32 says whether token v is among `token_ids`."""
    allowed = np.zeros(-(-vocab_size // 32) * 32, bool)
    allowed[list(token_ids)] = True
    return np.packbits(allowed, bitorder="little").view("<u4")
