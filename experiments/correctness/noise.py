"""Is a difference of log-probabilities rounding, or a defect below the tolerance? Judged by a control in the same run.

The control is the NumPy model in float32 against the same model in float64, on histories of the run: an implementation with
another order of summation. Two engines may differ by a few times its error, or that of the engine nearer to float64 if that
is larger. Native kernels give equal bits, so there any difference counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.config import EngineConfig
from experiments.correctness.judge import common_prefix, log_softmax, table
from experiments.correctness.reference import NumpyModel
from experiments.load.driver import Row
from experiments.load.workload import Item
from experiments.roofline.work import weights_bytes

TYPICAL = 5.0
"""How many times the control's median error rounding does not make the median difference of two engines."""
LARGEST = 10.0
"""How many times the control's largest error rounding does not make the largest difference."""
ALONE = 8.0
"""How many times the control's median error rounding does not make an engine's own."""
POSITIONS = 48
"""Of a request that are held against float64 at most."""
OPERATIONS = 4e11
"""Floating-point operations of the control in float64 at most, beyond its first request."""
TOP = 5


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Errors of log-probabilities: of each position the root mean square over the reported tokens."""

    median: float
    largest: float

    @classmethod
    def of(cls, errors: Sequence[float]) -> Scale | None:
        """None where no error is finite."""
        known = [error for error in errors if np.isfinite(error)]
        return cls(median=float(np.median(known)), largest=max(known)) if known else None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The errors from float64 at the positions of the control."""

    control: Scale | None
    engines: Mapping[str, Scale | None]


def measure_noise(model: NumpyModel, items: Sequence[Item], outputs: Mapping[str, Sequence[Row]]) -> Measured:
    """Hold the control and each engine against float64, on the first engine's histories of the shortest, a medium and the
    longest request, as far as `OPERATIONS` permits."""
    single = model.with_dtype(np.float32)
    first = next(iter(outputs.values()))
    errors: dict[str, list[float]] = {label: [] for label in outputs}
    control: list[float] = []
    for number in chosen(items, weights_bytes(model.config, "bfloat16") // 2):
        tokens, before = first[number].tokens, len(items[number].prompt)
        if not tokens:
            continue
        positions = np.unique(np.linspace(0, len(tokens) - 1, POSITIONS).round().astype(int))
        history, rows = [*items[number].prompt, *tokens[:-1]], before - 1 + positions
        exact = log_softmax(model.logits(history, rows=rows))
        own = log_softmax32(single.logits(history, rows=rows))
        top = np.argsort(-exact, axis=-1)[:, :TOP]
        control += root_mean_square(np.take_along_axis(own - exact, top, -1)).tolist()
        for label, outs in outputs.items():
            end = common_prefix(tokens, outs[number].tokens)
            for place, position in enumerate(positions):
                if position <= end and position < len(outs[number].logprobs):
                    reported = table(outs[number].logprobs[position])
                    apart = [logprob - exact[place, token] for token, logprob in reported.items()]
                    errors[label].append(float(root_mean_square(np.array(apart))) if apart else np.nan)
    return Measured(control=Scale.of(control), engines={label: Scale.of(own) for label, own in errors.items()})


def chosen(items: Sequence[Item], weights: int) -> list[int]:
    """The numbers of the shortest request, and of a medium one and the longest if the control may take so long."""
    ranked = sorted(range(len(items)), key=lambda i: len(items[i].prompt) + items[i].output_len)
    found: list[int] = []
    spent = 0
    for number in dict.fromkeys(ranked[rank] for rank in (0, len(ranked) // 2, -1)):
        spent += 2 * weights * (len(items[number].prompt) + items[number].output_len)
        if spent <= OPERATIONS or not found:
            found.append(number)
    return found


def log_softmax32(logits: np.ndarray) -> np.ndarray:
    """float32[..., V], computed in float32 as an engine does."""
    shifted = logits.astype(np.float32) - logits.max(axis=-1, keepdims=True).astype(np.float32)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def root_mean_square(errors: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(errors), axis=-1))


def distances(a: Sequence[Row], b: Sequence[Row]) -> list[float]:
    """How far apart the reported log-probabilities of two engines are, at each position where both read the same history."""
    found = []
    for mine, other in zip(a, b, strict=True):
        end = common_prefix(mine.tokens, other.tokens) + 1
        for p, q in zip(mine.logprobs[:end], other.logprobs[:end], strict=False):
            known, others = table(p), table(q)
            apart = [known[token] - others[token] for token in known.keys() & others.keys()]
            found.append(float(root_mean_square(np.array(apart))) if apart else np.nan)
    return found


def suspicion(label: str, against: str, apart: Sequence[float], measured: Measured, same_bits: bool) -> str | None:
    """Return why the difference of two engines is more than rounding; None if it is not.

    `same_bits`: both run the same native kernels, so that their bits must be equal.
    """
    found, differing = Scale.of(apart), sum(distance != 0 for distance in apart)
    if found is None or not differing:
        return None
    if same_bits:
        return (
            f"{label} differs from {against} at {differing} of {len(apart)} positions, by at most {found.largest:.1e}, "
            "where the same native kernels give equal bits"
        )
    floor = floor_of(measured, (label, against))
    if floor is None:
        return None
    typical, largest = found.median / floor.median, found.largest / floor.largest
    if typical <= TYPICAL and largest <= LARGEST:
        return None
    return (
        f"{label} differs from {against} by {found.median:.1e} at the median position and {found.largest:.1e} at most, "
        f"{typical:.0f} and {largest:.0f} times the rounding measured in this run{far(measured, (label, against))}"
    )


def bits_of(config: EngineConfig, kernels: Sequence[str], arithmetic: str | None) -> tuple[Any, ...] | None:
    """Return the properties that determine an engine's bits, to compare with another's; None where nothing promises equal bits.

    Native kernels in one rank promise them.
    """
    return (config.dtype, arithmetic, config.threads) if config.ranks == 1 and list(kernels) == ["native"] else None


def over_rounding(apart: Sequence[float], measured: Measured, labels: Sequence[str]) -> float | None:
    """Return the median difference of two engines over the median error that rounding explains."""
    found, floor = Scale.of(apart), floor_of(measured, labels)
    return found.median / floor.median if found and floor else None


def floor_of(measured: Measured, labels: Sequence[str]) -> Scale | None:
    """The error that rounding explains: the control's, or that of the nearer engine where it is larger."""
    if measured.control is None:
        return None
    known = [scale for label in labels if (scale := measured.engines.get(label))]
    median, largest = (min((getattr(s, name) for s in known), default=0.0) for name in ("median", "largest"))
    tiny = float(np.finfo(np.float32).eps)
    return Scale(median=max(measured.control.median, median, tiny), largest=max(measured.control.largest, largest, tiny))


def far(measured: Measured, labels: Sequence[str]) -> str:
    """The end of a sentence: how far each engine is from float64."""
    errors = [f"{label} {scale.median:.1e}" for label in labels if (scale := measured.engines.get(label))]
    return f" (from float64: {', '.join(errors)})" if errors else ""


def suspicion_alone(label: str, measured: Measured) -> str | None:
    """Return why an engine's error from float64 is more than rounding, be it that of all engines; None if it is not."""
    own, control = measured.engines.get(label), measured.control
    if own is None or control is None:
        return None
    times = own.median / max(control.median, float(np.finfo(np.float32).eps))
    if times <= ALONE:
        return None
    return (
        f"{label} is {own.median:.1e} off float64 at the median position, {times:.0f} times the rounding measured in this run"
    )
