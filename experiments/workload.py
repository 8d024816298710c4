"""Workloads: what is asked of an engine, and when. Drawn from a seed, told apart by a hash, framework-free.

Every workload is one description, `WorkloadConfig`, of which `configs/workload/` holds the named ones.
Engines are handed token ids, so that no tokenizer stands between two of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Self

import numpy as np
import xxhash

from common.config import expect
from common.errors import nearest_hint


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """A lognormal distribution of lengths, rounded down and clipped to [low, high] tokens."""

    mu: float
    """Mean of the logarithm: the median length is exp(mu)."""
    sigma: float
    low: int
    high: int

    def __post_init__(self) -> None:
        real = lambda x: isinstance(x, (int, float)) and math.isfinite(x)  # noqa: E731
        expect(real(self.mu), f"mu must be a finite number, got {self.mu!r}.")
        expect(real(self.sigma) and self.sigma >= 0, f"sigma must be a finite number ≥ 0, got {self.sigma!r}.")
        expect(
            isinstance(self.low, int) and isinstance(self.high, int) and 1 <= self.low <= self.high,
            f"A range of lengths needs integers 1 ≤ low ≤ high, got low={self.low!r} and high={self.high!r}.",
        )

    def draw(self, rng: np.random.Generator) -> int:
        return int(np.clip(rng.lognormal(self.mu, self.sigma), self.low, self.high))


@dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """How to draw a workload. A length is a number of tokens, or a distribution of such numbers."""

    name: str
    num_requests: int
    prompt_len: int | Lengths
    """Tokens of each prompt beyond its shared prefix."""
    output_len: int | Lengths
    """Tokens each request generates; EOS does not end it."""
    prefix_len: int = 0
    """Tokens at the start of each prompt that all requests of its group share."""
    prefix_groups: int = 1
    """Requests go to the groups in turn."""
    request_rate: float | None = None
    """Requests a second, arriving as a Poisson process; None lets all arrive at once."""

    def __post_init__(self) -> None:
        expect(
            isinstance(self.name, str) and re.fullmatch(r"[\w.-]+", self.name) is not None,
            f"workload.name must be letters, digits, '.', '_' and '-', got {self.name!r}.",
        )
        for name, low in (("num_requests", 1), ("prefix_len", 0), ("prefix_groups", 1)):
            value = getattr(self, name)
            expect(
                isinstance(value, int) and not isinstance(value, bool) and value >= low,
                f"workload.{name} must be an integer ≥ {low}, got {value!r}.",
            )
        for name in ("prompt_len", "output_len"):
            value = getattr(self, name)
            expect(
                isinstance(value, Lengths) or (isinstance(value, int) and not isinstance(value, bool) and value >= 1),
                f"workload.{name} must be an integer ≥ 1 or a distribution (mu, sigma, low, high), got {value!r}.",
            )
        rate = self.request_rate
        expect(
            rate is None or (isinstance(rate, (int, float)) and not isinstance(rate, bool) and 0 < rate < float("inf")),
            f"workload.request_rate must be a finite number > 0, or null, got {rate!r}.",
        )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Build from loose options, with lengths as integers or mappings; an unknown name is refused."""
        return cls(**{key: _lengths(key, value) for key, value in known_options(cls, "workload", options).items()})


def _lengths(key: str, value: Any) -> Any:
    if key not in ("prompt_len", "output_len") or not isinstance(value, Mapping):
        return value
    return Lengths(**known_options(Lengths, f"workload.{key}", value))


def known_options(cls: type, where: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` for the dataclass `cls`. Raises `ConfigError` for one that it does not know, or needs and does not get."""
    names = [field.name for field in fields(cls)]
    for name in options:
        expect(name in names, f"Unknown option {where}.{name}.{nearest_hint(str(name), names)} Known: {', '.join(names)}.")
    needed = [field.name for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING]
    missing = [name for name in needed if name not in options]
    expect(not missing, f"{where} lacks {', '.join(missing)}.")
    return dict(options)


@dataclass(frozen=True)
class Item:
    """One request of a workload."""

    arrival: float
    """Seconds after the start at which it is sent."""
    prompt: tuple[int, ...]
    """Token ids."""
    output_len: int


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival."""

    name: str
    items: tuple[Item, ...]

    @property
    def digest(self) -> str:
        """128-bit hash of every arrival, token id and length: equal digests are equal workloads."""
        state = xxhash.xxh3_128()
        for item in self.items:
            state.update(np.array([item.arrival], "<f8").tobytes())
            state.update(np.array([len(item.prompt), item.output_len, *item.prompt], "<i8").tobytes())
        return state.hexdigest()

    @property
    def longest(self) -> int:
        """Prompt and output tokens of the longest request."""
        return max(len(item.prompt) + item.output_len for item in self.items)

    def share(self, num_requests: int, output_len: int) -> Workload:
        """The first requests, cut to `output_len` tokens each and arriving at once."""
        items = [replace(item, arrival=0.0, output_len=min(item.output_len, output_len)) for item in self.items]
        return replace(self, items=tuple(items[:num_requests]))


def draw(config: WorkloadConfig, seed: int, vocab_size: int, special_ids: Collection[int] = ()) -> Workload:
    """Draw a workload whose prompts are uniform over the vocabulary without `special_ids`.

    Each request has a stream of its own, so fewer requests are the first ones of more requests.
    """
    expect(isinstance(seed, int) and 0 <= seed < 2**64, f"seed must be an integer in [0, 2**64), got {seed!r}.")
    ordinary = np.setdiff1d(np.arange(vocab_size), np.fromiter(special_ids, np.int64, len(special_ids)))
    expect(len(ordinary) > 0, f"A vocabulary of {vocab_size} tokens without its {len(special_ids)} special ones is empty.")

    def ids(rng: np.random.Generator, count: int) -> tuple[int, ...]:
        return tuple(rng.choice(ordinary, count).tolist())

    prefixes = [ids(np.random.default_rng([seed, 0, group]), config.prefix_len) for group in range(config.prefix_groups)]
    items, arrival = [], 0.0
    for number in range(config.num_requests):
        rng = np.random.default_rng([seed, 1, number])
        prompt_len, output_len = (
            length.draw(rng) if isinstance(length, Lengths) else length for length in (config.prompt_len, config.output_len)
        )
        prompt = prefixes[number % config.prefix_groups] + ids(rng, prompt_len)
        if config.request_rate is not None:
            arrival += float(rng.exponential(1 / config.request_rate))
        items.append(Item(arrival, prompt, output_len))
    return Workload(config.name, tuple(items))
