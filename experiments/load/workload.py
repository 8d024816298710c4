"""Draw a workload, the requests and their arrival times, from a seed. A hash identifies it. No framework is imported.

`WorkloadConfig` describes every workload. `configs/workload/` holds the named ones. Engines receive token ids, so that no
tokenizer affects a comparison.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash

from common.config import expect, real, whole
from common.errors import shown
from experiments.load.trace import LONGEST_S, MOST_PROMPT_TOKENS, MOST_TOKENS, read_trace
from experiments.options import known_options

SHARED = 8
"""Tokens: two prompts of a vocabulary that begin with so many in common have a prefix in common, and not by chance."""
MOST_REQUESTS = 1_000_000
"""No workload has more: what does would be drawn for minutes, and in silence."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """A lognormal distribution of lengths, rounded down and clipped to [low, high] tokens."""

    mu: float
    """Mean of the logarithm: the median length is exp(mu)."""
    sigma: float
    low: int
    high: int

    def __post_init__(self) -> None:
        expect(real(self.mu), f"mu must be a finite number, got {self.mu!r}.")
        expect(real(self.sigma, 0), f"sigma must be a finite number ≥ 0, got {self.sigma!r}.")
        expect(
            whole(self.low, 1) and whole(self.high, self.low),
            f"A range of lengths needs integers 1 ≤ low ≤ high, got low={self.low!r} and high={self.high!r}.",
        )

    def draw(self, rng: np.random.Generator) -> int:
        return int(np.clip(rng.lognormal(self.mu, self.sigma), self.low, self.high))


@dataclass(frozen=True, kw_only=True)
class Slo:
    """What a user calls good enough: the most milliseconds, from the moment a request was due; None asks nothing."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    """A request of one token has none, and meets it."""
    e2el_ms: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            expect(
                value is None or (real(value) and value > 0),
                f"workload.slo.{field.name} must be a number of milliseconds > 0, or null, got {value!r}.",
            )


NO_SLO = Slo()


@dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """How to draw a workload, or which file holds it. A length is a number of tokens, or a distribution of such numbers.

    Requests are sent when they arrive: all at once, or at `request_rate`. With `concurrency` none arrives by itself: so many
    users send one whenever their last has ended. The turns of a conversation follow each other in either case.
    """

    name: str
    num_requests: int | None
    """Null takes all of a trace."""
    prompt_len: int | Lengths | None
    """Tokens of each prompt beyond its shared prefix and, in a conversation, beyond its history."""
    output_len: int | Lengths | None
    """Tokens each request generates; EOS does not end it."""
    prefix_len: int = 0
    """Tokens at the start of each prompt that all requests of its group share."""
    prefix_groups: int = 1
    """Conversations go to the groups in turn; a request without turns is a conversation of one."""
    turns: int = 1
    """Requests of a conversation. Each prompt is the whole history: prompts and answers so far, then what is new. The answers
    are drawn from the seed and not the engine's own, so that every engine is asked the same."""
    think_s: float = 0.0
    """Mean seconds between an answer and the next turn, exponentially distributed."""
    request_rate: float | None = None
    """Conversations that begin in a second; None lets all begin at once."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of gaps between arrivals: 1 is a Poisson process, less comes in bursts, more evenly."""
    concurrency: int | None = None
    """Users of a closed loop, each with one conversation at a time."""
    trace: str | None = None
    """A file of requests (see `experiments.load.trace`), which says when each arrives."""
    slo: Slo = NO_SLO

    def __post_init__(self) -> None:
        expect(
            isinstance(self.name, str) and re.fullmatch(r"[\w.-]+", self.name) is not None,
            f"workload.name must be letters, digits, '.', '_' and '-', got {self.name!r}.",
        )
        traced = self.trace is not None
        expect(
            not traced or bool(self.trace and isinstance(self.trace, str)),
            f"workload.trace must be a path, got {self.trace!r}.",
        )
        for name, low in (("num_requests", 1), ("prefix_len", 0), ("prefix_groups", 1), ("turns", 1), ("concurrency", 1)):
            value, optional = getattr(self, name), name == "concurrency" or (name == "num_requests" and traced)
            expect(
                (optional and value is None) or whole(value, low),
                f"workload.{name} must be an integer ≥ {low}{' or null' if optional else ''}, got {value!r}.",
            )
        for name in ("num_requests", "prefix_groups"):
            value = getattr(self, name)
            expect((value or 0) <= MOST_REQUESTS, f"workload.{name} must be at most {MOST_REQUESTS}, got {shown(value)}.")
        for name in () if traced else ("prompt_len", "output_len"):
            value = getattr(self, name)
            expect(
                isinstance(value, Lengths) or whole(value, 1),
                f"workload.{name} must be an integer ≥ 1 or a distribution (mu, sigma, low, high), got {value!r}.",
            )
        for name in ("prefix_len", "prompt_len", "output_len"):
            value = getattr(self, name)
            most = value.high if isinstance(value, Lengths) else value or 0
            expect(most <= MOST_TOKENS, f"workload.{name} must be at most {MOST_TOKENS} tokens, got {most}.")
        total = self._prompt_tokens()
        expect(
            total <= MOST_PROMPT_TOKENS,
            f"The prompts of workload.num_requests={self.num_requests} may have {total} tokens in all, at most "
            f"{MOST_PROMPT_TOKENS} are allowed; lower workload.num_requests, the lengths, or workload.turns.",
        )
        rate = self.request_rate
        expect(
            rate is None or (real(rate) and rate > 0),
            f"workload.request_rate must be a finite number > 0, or null, got {rate!r}.",
        )
        expect(
            real(self.burstiness) and self.burstiness > 0,
            f"workload.burstiness must be a finite number > 0, got {self.burstiness!r}.",
        )
        expect(real(self.think_s, 0), f"workload.think_s must be a finite number ≥ 0, got {self.think_s!r}.")
        expect(
            isinstance(self.slo, Slo),
            f"workload.slo must be limits such as {{ttft_ms: 500}}, each of which may be null, got {self.slo!r}.",
        )
        self._refuse_contradictions()

    def _prompt_tokens(self) -> int:
        """What is drawn for all prompts, with prefixes and histories, if every length is its greatest. A trace says itself."""
        if self.trace is not None:
            return 0
        requests, new, answer = (
            value.high if isinstance(value, Lengths) else value or 0
            for value in (self.num_requests, self.prompt_len, self.output_len)
        )
        turns = min(self.turns, requests)
        prompts = requests * (self.prefix_len + (new * (turns + 1) + answer * (turns - 1)) // 2)
        return self.prefix_groups * self.prefix_len + prompts

    def _refuse_contradictions(self) -> None:
        expect(
            self.request_rate is None or self.concurrency is None,
            f"workload.request_rate={self.request_rate} sends requests when they arrive, and "
            f"workload.concurrency={self.concurrency} when an earlier one has ended; set one of them to null.",
        )
        expect(
            self.burstiness == 1.0 or self.request_rate is not None,
            f"workload.burstiness={self.burstiness} shapes arrivals, and there is no workload.request_rate; set one.",
        )
        expect(
            self.think_s == 0.0 or self.turns > 1,
            f"workload.think_s={self.think_s} is the pause before the next turn, and workload.turns is 1; raise that.",
        )
        if self.trace is not None:
            drawn = {
                field.name: field.default
                for field in fields(self)
                if field.name not in ("name", "num_requests", "trace", "slo")
            }
            drawn |= {"prompt_len": None, "output_len": None}
            for name, neutral in drawn.items():
                value = getattr(self, name)
                expect(
                    value == neutral,
                    f"workload.trace={self.trace} says itself what is sent and when, so workload.{name}={value!r} contradicts "
                    f"it; leave that at {'null' if neutral is None else neutral}.",
                )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Build from loose options, with lengths as integers or mappings; an unknown name is refused."""
        values = known_options(cls, "workload", options)
        for name, kind in (("prompt_len", Lengths), ("output_len", Lengths), ("slo", Slo)):
            if isinstance(value := values.get(name), Mapping):
                values[name] = kind(**known_options(kind, f"workload.{name}", value))
        return cls(**values)


@dataclass(frozen=True)
class Item:
    """One request of a workload."""

    arrival: float
    """Seconds after the start at which it is due, where neither a predecessor nor a closed loop decides that."""
    prompt: tuple[int, ...]
    """Token ids."""
    output_len: int
    after: int | None = None
    """The number of the request that must have ended before: the turn before this one."""
    think: float = 0.0
    """Seconds between that end and this request."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of `vars` and a trip through JSON."""
        return cls(**dict(record) | {"prompt": tuple(record["prompt"])})


@dataclass(frozen=True)
class Workload:
    """Requests, conversation by conversation, and the conversations in order of arrival."""

    name: str
    items: tuple[Item, ...]
    concurrency: int | None = None
    """Users of a closed loop; None of an open one."""
    slo: Slo = NO_SLO

    @property
    def digest(self) -> str:
        """128-bit hash of every arrival, token id and length, of what follows what, and of the loop: equal digests are equal
        loads. What counts as good enough is no part of it."""
        state = xxhash.xxh3_128()
        for item in self.items:
            state.update(np.array([item.arrival], "<f8").tobytes())
            state.update(np.array([len(item.prompt), item.output_len, *item.prompt], "<i8").tobytes())
        if any(item.after is not None for item in self.items):
            state.update(b"turns")
            state.update(np.array([-1 if item.after is None else item.after for item in self.items], "<i8").tobytes())
            state.update(np.array([item.think for item in self.items], "<f8").tobytes())
        if self.concurrency is not None:
            state.update(b"users" + np.array([self.concurrency], "<i8").tobytes())
        return state.hexdigest()

    @property
    def longest(self) -> int:
        """Prompt and output tokens of the longest request."""
        return max(len(item.prompt) + item.output_len for item in self.items)

    @property
    def shares_prefixes(self) -> bool:
        """Whether a prefix cache has something to find: two prompts with the same first tokens."""
        heads = [item.prompt[:SHARED] for item in self.items if len(item.prompt) >= SHARED]
        return len(set(heads)) < len(heads)

    def fresh(self, block: int, seed: int) -> Workload:
        """The same workload with other prompts for each block but the first: a permutation of the token ids that occur in it.

        Lengths and shared prefixes stay as they are. An engine that keeps the outputs of a block gains nothing from them.
        """
        if block == 0:
            return self
        ids = np.unique(np.concatenate([np.array(item.prompt, np.int64) for item in self.items]))
        drawn = np.random.default_rng([seed, 3, block]).permutation(ids)
        items = (
            replace(item, prompt=tuple(drawn[np.searchsorted(ids, np.array(item.prompt, np.int64))].tolist()))
            for item in self.items
        )
        return replace(self, items=tuple(items))

    def share(self, num_requests: int, output_len: int) -> Workload:
        """The first requests, cut to `output_len` tokens each, none waiting for another and all arriving at once."""
        items = [Item(0.0, item.prompt, min(item.output_len, output_len)) for item in self.items[:num_requests]]
        return Workload(self.name, tuple(items))


class Vocabulary:
    """Token ids to draw prompts from: all below `size` that are not special, each as likely."""

    def __init__(self, size: int, special_ids: Collection[int]) -> None:
        self._ordinary = np.setdiff1d(np.arange(size), np.fromiter(special_ids, np.int64, len(special_ids)))
        expect(len(self._ordinary) > 0, f"A vocabulary of {size} tokens without its {len(special_ids)} special ones is empty.")

    def draw(self, rng: np.random.Generator, count: int) -> tuple[int, ...]:
        return tuple(rng.choice(self._ordinary, count).tolist())


def draw(config: WorkloadConfig, seed: int, vocab_size: int, special_ids: Collection[int] = ()) -> Workload:
    """Draw a workload, or read it, with prompts uniform over the vocabulary without `special_ids`.

    Each request has a stream of its own, so fewer requests are the first ones of more requests. Arrivals and pauses are rounded
    to microseconds: the last digits of a logarithm differ between machines, and the hash may not.
    """
    expect(whole(seed, 0, 2**64 - 1), f"seed must be an integer in [0, 2**64), got {seed!r}.")
    vocabulary = Vocabulary(vocab_size, special_ids)
    if config.trace is not None:
        entries = read_trace(Path(config.trace).expanduser(), vocab_size, config.num_requests)
        prompts = (
            entry.prompt or vocabulary.draw(np.random.default_rng([seed, 1, number]), entry.prompt_len)
            for number, entry in enumerate(entries)
        )
        items = [Item(entry.arrival, prompt, entry.output_len) for entry, prompt in zip(entries, prompts, strict=True)]
    else:
        items = _draw_items(config, seed, vocabulary)
        latest, pause = max(item.arrival for item in items), max(item.think for item in items)
        expect(
            latest <= LONGEST_S,
            f"The last of {len(items)} requests would arrive after {latest:g} s, at most {LONGEST_S:.0f} are allowed; raise "
            "workload.request_rate.",
        )
        expect(pause <= LONGEST_S, f"A pause of {pause:g} s is longer than {LONGEST_S:.0f} s; lower workload.think_s.")
    return Workload(config.name, tuple(items), config.concurrency, config.slo)


def _draw_items(config: WorkloadConfig, seed: int, vocabulary: Vocabulary) -> list[Item]:
    assert config.num_requests and config.prompt_len and config.output_len, "checked by WorkloadConfig"
    prefixes = [
        vocabulary.draw(np.random.default_rng([seed, 0, group]), config.prefix_len) for group in range(config.prefix_groups)
    ]
    items: list[Item] = []
    arrival = 0.0
    history: tuple[int, ...] = ()
    for number in range(config.num_requests):
        rng = np.random.default_rng([seed, 1, number])
        conversation, turn = divmod(number, config.turns)
        prompt_len, output_len = (
            length.draw(rng) if isinstance(length, Lengths) else length for length in (config.prompt_len, config.output_len)
        )
        new = vocabulary.draw(rng, prompt_len)
        if turn == 0:
            history = prefixes[conversation % config.prefix_groups]
            arrival += _gap(config, rng)
            items.append(Item(round(arrival, 6), history + new, output_len))
        else:
            think = round(float(rng.exponential(config.think_s)), 6) if config.think_s else 0.0
            items.append(Item(items[-1].arrival, history + new, output_len, number - 1, think))
        history = items[-1].prompt
        if config.turns > 1:
            history += vocabulary.draw(np.random.default_rng([seed, 2, number]), output_len)
    return items


def _gap(config: WorkloadConfig, rng: np.random.Generator) -> float:
    """Seconds between an arrival and the one before."""
    if config.request_rate is None:
        return 0.0
    if config.burstiness == 1.0:
        return float(rng.exponential(1 / config.request_rate))
    return float(rng.gamma(config.burstiness, 1 / (config.request_rate * config.burstiness)))
