"""What a request changes in its logits beyond temperature and filters: sparse edits, updated token by token, and allowed ids.

An edit changes the logit x of one token in three operations. It adds a bias, applies the repetition factor, and subtracts the
penalty. The factor divides a positive logit and multiplies any other. A masked token has a bias of -inf, which no other change
lifts.

A `Plan` holds the edits before the first output token. It is immutable, and all choices of a prompt share it.
`LogitsProcessor` adds the changes that the output of one choice causes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from common.request import Request, SamplingParams, expect

NEUTRAL = np.array([0.0, 1.0, 0.0], np.float32)
"""Bias, repetition factor and penalty that change nothing."""

Words = Mapping[int, Mapping[int, Mapping[tuple[int, ...], list[int]]]]
"""Bad words of several tokens: last token but one → length of the beginning → the beginning (all tokens but the last) → slots
of the last tokens. One lookup per length finds all words that the output has begun."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The edits of a request before its first output token. Arrays are read-only."""

    params: SamplingParams
    slots: Mapping[int, int]
    """Token → row of `ids` and `values`."""
    ids: np.ndarray
    """int32[n]"""
    values: np.ndarray
    """float32[n, 3]: bias, repetition factor and penalty. Rows may be neutral."""
    used: np.ndarray
    """bool[n]: the rows that are not neutral."""
    early: Sequence[int]
    """Slots that are masked until `min_tokens` tokens are out."""
    words: Words
    allowed: np.ndarray | None
    """uint32[ceil(V / 32)], or None where every id is allowed."""

    @classmethod
    def of(cls, request: Request, stops: Iterable[int], vocab_size: int) -> Self | None:
        """The edits that do not depend on the prompt; None for a request that changes no logit. `stops`: the ids that end it.
        Raises `RequestError` if no id is left."""
        params = request.params
        if not (penalises(params) or params.min_tokens or params.logit_bias or params.allowed_token_ids or request.bad_words):
            return None
        early = tuple(stops) if params.min_tokens else ()
        never = [word[0] for word in request.bad_words if len(word) == 1]
        longer = [word for word in request.bad_words if len(word) > 1]
        bias = dict(params.logit_bias or ())
        slots = _slots((*bias, *early, *never, *(word[-1] for word in longer)))
        values = np.tile(NEUTRAL, (len(slots), 1))
        values[[slots[token] for token in bias], 0] = list(bias.values())
        values[[slots[token] for token in never], 0] = -np.inf
        words: dict[int, dict[int, dict[tuple[int, ...], list[int]]]] = {}
        for word in longer:
            begun = words.setdefault(word[-2], {}).setdefault(len(word) - 1, {})
            begun.setdefault(word[:-1], []).append(slots[word[-1]])
        if params.allowed_token_ids is not None:
            expect(
                bool(set(params.allowed_token_ids) - {*never, *early}),
                f"Request {request.request_id!r}: bad_words and min_tokens mask all of allowed_token_ids.",
                "allowed_token_ids",
            )
        return cls(
            params=params,
            slots=slots,
            ids=_frozen(np.fromiter(slots, np.int32, len(slots))),
            values=_frozen(values),
            used=_frozen((values != NEUTRAL).any(axis=1)),
            early=[slots[token] for token in early],
            words=words,
            allowed=None if params.allowed_token_ids is None else _frozen(bitmask(params.allowed_token_ids, vocab_size)),
        )

    def with_prompt(self, prompt: Sequence[int]) -> Self:
        """With the repetition penalty of the tokens of a prompt."""
        slots = _slots((*self.slots, *prompt))
        values = np.concatenate([self.values, np.tile(NEUTRAL, (len(slots) - len(self.slots), 1))])
        values[[slots[token] for token in dict.fromkeys(prompt)], 1] = self.params.repetition_penalty
        return replace(
            self,
            slots=slots,
            ids=_frozen(np.fromiter(slots, np.int32, len(slots))),
            values=_frozen(values),
            used=_frozen((values != NEUTRAL).any(axis=1)),
        )


class LogitsProcessor:
    """The edits of one live request. `append` every token of its output."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._ids, self._values, self._used = plan.ids, plan.values, plan.used  # copied before the first change
        self._more: dict[int, int] = {}
        """Slots of output tokens that the plan has none for."""
        self._counts: dict[int, int] = {}

    @property
    def allowed(self) -> np.ndarray | None:
        """uint32[ceil(V / 32)], or None where every id is allowed."""
        return self._plan.allowed

    @property
    def follow(self) -> bool:
        """Whether they depend on the output, so that all of it must be known before the next token is sampled."""
        return penalises(self._plan.params) or bool(self._plan.words)

    def append(self, token: int) -> None:
        """One more token of output."""
        params = self._plan.params
        if not penalises(params):
            return
        slot = self._slot(token)
        if slot < 0:
            slot = self._more[token] = len(self._plan.slots) + len(self._more)
        if slot >= len(self._ids) or not self._counts:
            more = max(64, slot)
            self._ids = np.concatenate([self._ids, np.zeros(more, np.int32)])
            self._values = np.concatenate([self._values, np.tile(NEUTRAL, (more, 1))])
            self._used = np.concatenate([self._used, np.zeros(more, bool)])
        count = self._counts[slot] = self._counts.get(slot, 0) + 1
        self._ids[slot] = token
        self._values[slot, 1:] = params.repetition_penalty, params.frequency_penalty * count + params.presence_penalty
        self._used[slot] = (self._values[slot] != NEUTRAL).any()

    def at(self, output: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the edits for the token behind `length` of output: int32[n] and float32[n, 3].

        The three columns are bias, repetition factor and penalty. `output` holds the known tokens of the output: all of them if
        the edits `follow`.
        """
        values, used = self._values, self._used
        if masked := self._masked(output, length):
            values, used = values.copy(), used.copy()
            values[masked, 0], used[masked] = -np.inf, True
        return self._ids[used], values[used]

    def forbids(self, token: int, output: Sequence[int]) -> bool:
        """Whether `token` is masked behind `output`, all of it. If it is chosen all the same, no other was left."""
        if self.allowed is not None and not int(self.allowed[token // 32]) >> token % 32 & 1:
            return True
        slot = self._slot(token)
        return slot >= 0 and (self._values[slot, 0] == -np.inf or slot in self._masked(output, len(output)))

    def _slot(self, token: int) -> int:
        """-1 for a token that has none."""
        slot = self._plan.slots.get(token)
        return self._more.get(token, -1) if slot is None else slot

    def _masked(self, output: Sequence[int], length: int) -> list[int]:
        """The slots of what only the output so far masks."""
        masked = list(self._plan.early) if length < self._plan.params.min_tokens else []
        for count, begun in (self._plan.words.get(output[-1], {}) if output else {}).items():
            masked += begun.get(tuple(output[-count:]), ())
        return masked


def penalises(params: SamplingParams) -> bool:
    """Whether the output changes the logits of its tokens."""
    return (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) != (0, 0, 1)


def _slots(tokens: Iterable[int]) -> dict[int, int]:
    return {token: slot for slot, token in enumerate(dict.fromkeys(tokens))}


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def bitmask(token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """Return uint32[ceil(V / 32)]: bit v % 32 of word v // 32 states whether token v is among `token_ids`."""
    allowed = np.zeros(-(-vocab_size // 32) * 32, bool)
    allowed[list(token_ids)] = True
    return np.packbits(allowed, bitorder="little").view("<u4")
