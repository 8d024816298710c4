"""The verdict on two outputs: equal, apart by rounding, or apart by a defect."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from common.request import Logprobs
from experiments.correctness.judge import Agreement, judge

EXACT = np.array([-1.0, -1.0001, -3.0, -9.0])
"""Float64 log-probabilities of the next token: 0 and 1 are a near tie."""
TOLERANCE = 1e-3


def row(logprobs: dict[int, float]) -> Logprobs:
    ids = sorted(logprobs, key=lambda token: -logprobs[token])
    return Logprobs(logprobs[ids[0]], 1, ids, [logprobs[i] for i in ids])


def near(error: float) -> Logprobs:
    """What an engine reports whose log-probability of token 1 is too high by `error`."""
    return row({0: -1.0, 1: -1.0001 + error, 2: -3.0})


def verdict(a: Sequence[int], b: Sequence[int], rows_a: Sequence[Logprobs], rows_b: Sequence[Logprobs]) -> Agreement:
    return judge([5, 6], a, b, rows_a, rows_b, lambda ids: EXACT, TOLERANCE)


def test_equal_outputs_have_no_divergence_and_never_ask_the_reference() -> None:
    def reference(ids: Sequence[int]) -> np.ndarray:
        raise AssertionError("asked")

    agreement = judge([5], [0, 1], [0, 1], [near(0), near(0)], [near(0), near(3e-6)], reference, TOLERANCE)
    assert agreement.divergence is None and agreement.num_equal == 2
    assert agreement.max_abs_logprob_diff == pytest.approx(3e-6, rel=1e-6)


def test_the_reference_is_asked_for_the_common_history() -> None:
    asked: list[list[int]] = []

    def reference(ids: Sequence[int]) -> np.ndarray:
        asked.append(list(ids))
        return EXACT

    judge([5, 6], [3, 0, 2], [3, 1, 0], [near(0)] * 3, [near(1e-4)] * 3, reference, TOLERANCE)
    assert asked == [[5, 6, 3]]


def test_a_tie_that_the_measured_error_explains_is_justified() -> None:
    agreement = verdict([0], [1], [near(0)], [near(1.5e-4)])  # margin 1e-4 < 2 · 1.5e-4
    assert agreement.divergence is not None and agreement.divergence.justified
    assert agreement.divergence.margin == pytest.approx(1e-4)
    assert agreement.divergence.error == pytest.approx(1.5e-4)


def test_a_choice_against_the_engines_own_figures_is_not_justified() -> None:
    agreement = verdict([0], [2], [near(0)], [near(1e-6)])  # a broken sampler: margin 2, error 1e-6
    assert agreement.divergence is not None and not agreement.divergence.justified
    assert agreement.divergence.margin == pytest.approx(2.0)


def test_an_error_beyond_rounding_justifies_nothing() -> None:
    wrong = row({2: -0.5, 0: -1.0, 1: -1.5})  # a broken forward pass, true to itself: margin 2 < 2 · 2.5
    agreement = verdict([0], [2], [near(0)], [wrong])
    assert agreement.divergence is not None and not agreement.divergence.justified
    assert agreement.divergence.error == pytest.approx(2.5)


def test_the_error_of_either_engine_counts() -> None:
    assert verdict([0], [1], [near(1e-4)], [near(0)]).divergence == verdict([0], [1], [near(0)], [near(1e-4)]).divergence


def test_a_choice_that_the_other_did_not_report_is_judged_by_what_is_known() -> None:
    agreement = verdict([0], [3], [row({0: -1.0, 1: -1.0001})], [row({3: -0.9, 0: -1.0})])
    assert agreement.divergence is not None and not agreement.divergence.justified


def test_a_choice_that_neither_reported_is_not_justified() -> None:
    agreement = verdict([0], [1], [row({2: -3.0})], [row({3: -9.0})])
    assert agreement.divergence is not None and not agreement.divergence.justified and agreement.divergence.error is None


def test_nan_is_never_justified_and_shows_in_the_difference() -> None:
    agreement = verdict([0], [1], [near(0)], [near(math.nan)])
    assert agreement.divergence is not None and not agreement.divergence.justified
    assert math.isnan(agreement.max_abs_logprob_diff)


def test_after_the_first_divergence_nothing_is_compared() -> None:
    agreement = verdict([3, 0, 2], [3, 1, 9], [near(0)] * 3, [near(2e-6), near(1.5e-4), near(5.0)])
    assert agreement.num_equal == 1
    assert agreement.divergence is not None and agreement.divergence.position == 1
    assert agreement.max_abs_logprob_diff == pytest.approx(1.5e-4)  # the histories still agree at the divergence itself


@pytest.mark.parametrize(("a", "b"), [([0, 1], [0]), ([0], [0, 1])])
def test_an_output_that_ends_early_is_not_justified(a: list[int], b: list[int]) -> None:
    divergence = verdict(a, b, [near(0)] * len(a), [near(0)] * len(b)).divergence
    assert divergence is not None and not divergence.justified
    assert divergence.position == 1 and None in divergence.tokens


def test_two_engines_that_both_fall_short_do_not_agree_by_that() -> None:
    agreement = judge([5], [0], [0], [near(0)], [near(0)], lambda ids: EXACT, TOLERANCE, 3)
    assert agreement.divergence is not None and not agreement.divergence.justified
    assert (agreement.divergence.position, agreement.divergence.tokens) == (1, (None, None))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_equal_tokens_from_logits_that_are_not_finite_do_not_agree(value: float) -> None:
    agreement = verdict([0, 0], [0, 0], [near(0), near(value)], [near(0), near(value)])
    assert agreement.divergence is not None and not agreement.divergence.justified
    assert agreement.divergence.position == 1


def test_an_error_above_the_tolerance_counts_where_every_token_agrees() -> None:
    rows = [near(0), near(5e-4), near(0.029), near(math.nan)]
    agreement = verdict([0] * 4, [0] * 4, [near(0)] * 4, rows)
    assert agreement.num_equal == 4 and agreement.num_above == 2
    assert verdict([0, 0], [0, 0], [near(0)] * 2, rows[:2]).num_above == 0
