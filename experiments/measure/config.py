"""The checked group `measure`: how long and how often a run measures."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from common.config import expect, real
from experiments.metrics.statistics import Criteria
from experiments.options import check_integers

ADAPTIVE_BLOCKS = 6
"""Fewer are too few for an interval to stop by: they run as they are."""


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """How long and how often is measured."""

    blocks: int
    budget_s: float
    warmup_requests: int
    warmup_output_len: int
    limits_s: float
    max_blocks: int = 40
    precision: float = 0.04
    """Width of the interval of a ratio that is narrow enough, as a share of the ratio."""
    confidence: float = Criteria.confidence
    equivalence: float = Criteria.equivalence
    timeout_s: float = 1800.0
    """For one command to an engine: to load, or to run a window."""
    kernel_passes: int = 0
    profile: bool = False
    """Whether each engine runs one more window, uncounted, under its framework's profiler."""

    def __post_init__(self) -> None:
        check_integers("measure", self, blocks=1, max_blocks=1, warmup_requests=0, warmup_output_len=1, kernel_passes=0)
        for name, high in (("budget_s", float("inf")), ("limits_s", 60), ("precision", 10)):
            value = getattr(self, name)
            expect(
                real(value, 0, high),
                f"measure.{name} must be a number in [0, {high:g}], got {value!r}.",
            )
        expect(
            real(self.timeout_s, 0, threading.TIMEOUT_MAX) and self.timeout_s > 0,
            f"measure.timeout_s must be a number of seconds > 0, got {self.timeout_s!r}.",
        )
        expect(
            self.max_blocks >= self.blocks,
            f"measure.max_blocks={self.max_blocks} contradicts measure.blocks={self.blocks}: so many run at least. Set both.",
        )
        expect(isinstance(self.profile, bool), f"measure.profile must be true or false, got {self.profile!r}.")
        self.criteria  # noqa: B018 - checked as it is built

    @property
    def criteria(self) -> Criteria:
        return Criteria(confidence=self.confidence, equivalence=self.equivalence)

    @property
    def most_blocks(self) -> int:
        """Where the blocks end, however wide the interval."""
        return self.blocks if self.blocks < ADAPTIVE_BLOCKS else self.max_blocks
