"""Beam search: the likeliest continuations of a prompt, one token longer in each round.

It needs from an engine only the likeliest next tokens of many sequences at once. The prefix cache holds what they share. A
round extends all beams by one token and takes the best `beam_width` continuations. Those that end are complete. The best
`beam_width` that do not end are the next beams. In the last round all of the best are complete.

That is the search of `transformers` with early_stopping="never". The length of an output excludes the prompt and includes its
EOS. vLLM's search differs. It counts the prompt as length, and completes all that end among the 2 * beam_width likeliest of
each beam.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.request import MAX_LOGPROBS, expect

Likeliest = Callable[[Sequence[tuple[int, ...]], int], Sequence[Sequence[tuple[int, float]]]]
"""Of each sequence of tokens the k likeliest next ones with their logprobs, falling."""


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How wide and how far to search. Names and defaults as in vLLM. Raises `RequestError`."""

    beam_width: int
    """Sequences that are followed, and that are returned. With the EOS tokens it may come to 20 (`MAX_LOGPROBS`)."""
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    """Only 0: nothing is sampled."""
    length_penalty: float = 1.0
    """Outputs are ranked by logprob / length ** length_penalty: above 0 it favours long ones, below 0 short ones."""

    def __post_init__(self) -> None:
        for name, high in (("beam_width", MAX_LOGPROBS), ("max_tokens", 2**31 - 1)):
            value = getattr(self, name)
            expect(type(value) is int and 1 <= value <= high, f"{name} must be an integer in [1, {high}], got {value!r}.")
        expect(isinstance(self.ignore_eos, bool), f"ignore_eos must be true or false, got {self.ignore_eos!r}.")
        expect(self.temperature == 0, f"temperature must be 0, got {self.temperature!r}: beam search samples nothing.")
        expect(
            type(self.length_penalty) in (int, float) and -10 <= self.length_penalty <= 10,
            f"length_penalty must be a number in [-10, 10], got {self.length_penalty!r}.",
        )


@dataclass(frozen=True)
class Beam:
    """A continuation."""

    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0
    """Of all its tokens together."""
    ended: bool = False
    """By an EOS token, which is its last."""

    def score(self, length_penalty: float, length: int = 0) -> float:
        """By which outputs are ranked; with a `length`, as if it were that long."""
        return self.logprob / (length or len(self.token_ids)) ** length_penalty


def beam_search(
    prompts: Sequence[tuple[int, ...]], params: BeamSearchParams, eos_token_ids: Sequence[int], likeliest: Likeliest
) -> list[list[Beam]]:
    """For every prompt up to `beam_width` continuations, best first; ties go to the earlier beam, then the likelier token."""
    width, penalty, cap = params.beam_width, params.length_penalty, params.max_tokens
    ends = set() if params.ignore_eos else set(eos_token_ids)
    k = width + len(ends)  # so many of one beam are enough, whatever the others bring
    expect(
        k <= MAX_LOGPROBS,
        f"beam_width={width} and {len(ends)} EOS tokens need the {k} likeliest tokens, and an engine reports {MAX_LOGPROBS}; "
        f"set beam_width to at most {MAX_LOGPROBS - len(ends)}, or ignore_eos.",
    )
    live = [[Beam()] for _ in prompts]
    complete: list[list[Beam]] = [[] for _ in prompts]
    for length in range(1, cap + 1):
        asked = [(i, beam) for i, beams in enumerate(live) for beam in beams]
        answers = likeliest([(*prompts[i], *beam.token_ids) for i, beam in asked], k) if asked else ()
        longer: list[list[Beam]] = [[] for _ in prompts]
        for (i, beam), answer in zip(asked, answers, strict=True):
            longer[i] += [Beam((*beam.token_ids, token), beam.logprob + logprob, token in ends) for token, logprob in answer]
        for i, found in enumerate(longer):
            found.sort(key=lambda beam: beam.logprob, reverse=True)
            complete[i] += [beam for beam in found[:width] if beam.ended or length == cap]
            complete[i] = sorted(complete[i], key=lambda beam: beam.score(penalty), reverse=True)[:width]
            live[i] = [beam for beam in found if not beam.ended][:width]
            best = max((beam.score(penalty, cap if penalty > 0 else length) for beam in live[i]), default=0.0)
            if len(complete[i]) == width and best <= complete[i][-1].score(penalty):
                live[i] = []  # no logprob rises: whatever still comes of them comes too late
    return complete
