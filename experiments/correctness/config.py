"""The checked group `correctness`: the options of the pass in float32."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig

from common.config import expect, real
from experiments.correctness.perplexity import read_text
from experiments.options import check_integers, known_options, resolved


@dataclass(frozen=True, kw_only=True)
class CorrectnessConfig:
    """The pass in float32."""

    num_requests: int
    """Whose whole rows of logits are compared; 0 leaves the pass out."""
    output_len: int
    """Tokens of each of these at most."""
    tolerance: float
    tokens: int = 12_288
    """Prompt and output tokens of the timed schedule that the pass repeats, about."""
    perplexity: bool = False
    perplexity_text: str | None = None

    def __post_init__(self) -> None:
        check_integers("correctness", self, num_requests=0, output_len=1, tokens=1)
        expect(
            real(self.tolerance, 0, float("inf")) and self.tolerance > 0,
            f"correctness.tolerance must be a number > 0, got {self.tolerance!r}.",
        )
        expect(isinstance(self.perplexity, bool), f"correctness.perplexity must be true or false, got {self.perplexity!r}.")
        text = self.perplexity_text
        expect(
            text is None or isinstance(text, str),
            f"correctness.perplexity_text must be the path of a text, or null, got {text!r}.",
        )
        read_text(text)  # now, and not when all has been timed


def correctness_config(config: DictConfig) -> CorrectnessConfig:
    """The checked group `correctness`."""
    given = config.correctness
    expect(isinstance(given, DictConfig), f"correctness holds options such as correctness.num_requests=0, got {given!r}.")
    return CorrectnessConfig(**known_options(CorrectnessConfig, "correctness", resolved(given)))
