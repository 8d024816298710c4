"""Is the gap between the choices of two engines as small as rounding makes it?

Two sound engines part where the margin between the likeliest tokens is within their rounding error. The gap of a choice is its
distance behind the likeliest token in float64. Rounding gives gaps no larger than the absolute value of a normal error, so the
sum of squares of n gaps, over the variance of that error, is at most chi-squared with n degrees of freedom. An engine that
chooses a slightly less likely token on purpose has gaps of the size of the margins, which is several times as large.

The error is measured by a control: NumPy in float32 with the weights and the result of each operation rounded to the dtype,
against float64, at positions of the same outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
from scipy.stats import chi2

from common.config import Dtype
from experiments.correctness.judge import log_softmax
from experiments.correctness.noise import ALONE, POSITIONS
from experiments.correctness.reference import NumpyModel

HALVES: Mapping[Dtype, type] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
ALLOWED: Mapping[Dtype, float] = {"float32": ALONE, "bfloat16": 3.0, "float16": 3.0}
"""How many times the control's error an engine's may be. Engines round to 16 bits at nearly the same places, but in float32 the
order of summation decides."""
CHANCE = 1e-4
"""Probability of a false alarm, at most: gaps that rounding makes so rarely are suspicious."""
TO_DEVIATION = 1.4826
"""The standard deviation of a normal error over the median of its absolute value."""


class RoundedModel(NumpyModel):
    """The model in float32, with weights and the result of each operation rounded to 16 bits."""

    def __init__(self, model: NumpyModel, half: type) -> None:
        super().__init__(model.checkpoint, model.config, np.float32)
        self.weights, self._half = model.weights, half

    def embed(self, token_ids: Sequence[int]) -> np.ndarray:
        return self._rounded(super().embed(token_ids))

    def project(self, layer: int, n_TD: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        q_TNH, k_TKH, v_TKH = super().project(layer, n_TD, positions)
        return self._rounded(q_TNH), self._rounded(k_TKH), self._rounded(v_TKH)

    def attend(self, layer: int, q_TNH: np.ndarray, k_CKH: np.ndarray, v_CKH: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self._rounded(super().attend(layer, q_TNH, k_CKH, v_CKH, positions))

    def mlp(self, layer: int, x_TD: np.ndarray) -> np.ndarray:
        return self._rounded(super().mlp(layer, x_TD))

    def head(self, x_RD: np.ndarray) -> np.ndarray:
        return self._rounded(super().head(x_RD))

    def _add_attention(self, layer: int, x_TD: np.ndarray, a_TD: np.ndarray) -> np.ndarray:
        return self._rounded(super()._add_attention(layer, x_TD, a_TD))

    def _linear(self, name: str, x: np.ndarray, bias: bool) -> np.ndarray:
        return self._rounded(super()._linear(name, x, bias))

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return self._rounded(super()._norm(name, x))

    def _stored(self, name: str) -> np.ndarray:
        return self._rounded(super()._stored(name))

    def _rounded(self, x: np.ndarray) -> np.ndarray:
        return x.astype(self._half).astype(np.float32)


def margin_error(model: NumpyModel, histories: Sequence[Sequence[int]], dtype: Dtype) -> float:
    """Return the standard deviation in nats of the control's error in the margin of the two likeliest tokens.

    It is that of `POSITIONS` positions, the last ones of each history in turn, from the median: a few have far larger errors.
    """
    control = RoundedModel(model, HALVES[dtype]) if dtype in HALVES else model.with_dtype(np.float32)
    errors: list[float] = []
    for history in histories:
        rows = np.arange(max(0, len(history) - POSITIONS + len(errors)), len(history))
        if not len(rows):
            break
        exact, own = (log_softmax(each.logits(history, rows=rows)) for each in (model, control))
        top = np.argsort(-exact, axis=-1)[:, :2]
        apart = np.take_along_axis(own, top, -1) - np.take_along_axis(exact, top, -1)
        errors += np.abs(apart[:, 0] - apart[:, 1]).tolist()
    return max(TO_DEVIATION * float(np.median(errors)), float(np.finfo(np.float32).eps))


def chance(gaps: Sequence[float], error: float, dtype: Dtype) -> float:
    """Return the greatest probability with which rounding makes gaps as large as these, in nats; 1 without gaps."""
    if not gaps:
        return 1.0
    return float(chi2.sf(np.sum(np.square(gaps)) / (ALLOWED[dtype] * error) ** 2, len(gaps)))
