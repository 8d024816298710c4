"""`experiments.statistics`: known values, and how often intervals and verdicts are right in simulated runs of fixed seeds."""

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy import stats

from common.errors import ConfigError
from experiments import statistics
from experiments.blocks import level, reason_to_stop
from experiments.config import MeasureConfig
from experiments.statistics import (
    Comparison,
    Criteria,
    compare_all,
    fewest_blocks,
    interval,
    log_ratios,
    sentence,
    shared_confidence,
    sign_flip_p,
    student_p,
    verdict,
)

CRITERIA = Criteria()


def runs(effect: float, blocks: int, sims: int, noise: float = 0.02, seed: int = 1) -> list[dict[str, list[float]]]:
    """Throughputs of two engines whose true ratio is `effect`; both share what a block does to the machine."""
    rng = np.random.default_rng([seed, blocks])
    drift = 100 * np.exp(rng.normal(0, 0.1, (sims, blocks)))
    first, second = drift * np.exp(rng.normal(0, noise, (2, sims, blocks)))
    return [{"a": a.tolist(), "b": (effect * b).tolist()} for a, b in zip(first, second, strict=True)]


def judged(throughputs: dict[str, list[float]], **criteria: float) -> Comparison:
    return compare_all(throughputs, Criteria(**criteria), seed=3)["b"]


def test_the_ratio_is_the_geometric_mean_over_blocks() -> None:
    outcome = judged({"a": [10, 20, 40], "b": [20, 20, 20]})
    assert outcome.ratio == pytest.approx(1.0) and outcome.block_ratios == pytest.approx((2, 1, 0.5))
    assert (outcome.against, outcome.blocks, outcome.interval) == ("a", 3, "t")


def test_naming_the_engines_the_other_way_round_turns_the_verdict_round() -> None:
    for throughputs in runs(0.9, 6, 20):
        here = judged(throughputs)
        there = compare_all({"b": throughputs["b"], "a": throughputs["a"]}, CRITERIA, seed=3)["a"]
        assert here.ratio and here.low and there.ratio and there.high
        assert here.ratio * there.ratio == pytest.approx(1) and here.low * there.high == pytest.approx(1)
        assert {here.verdict, there.verdict} in ({"slower", "faster"}, {"undecided"})


def test_an_interval_is_as_wide_whichever_engine_stands_first_and_however_far_they_are_apart() -> None:
    noise = np.exp(np.random.default_rng(1).normal(0, 0.02, (2, 6)))
    near, far = ({"a": list(100 * noise[0]), "b": list(times * 100 * noise[1])} for times in (1.0, 11.0))
    width = judged(near).width
    assert width > 0 and judged(far).width == pytest.approx(width)
    assert compare_all({"b": far["b"], "a": far["a"]}, CRITERIA, seed=3)["a"].width == pytest.approx(width)


def test_a_block_without_a_throughput_of_both_is_left_out() -> None:
    assert log_ratios([1.0, None, 0.0, 4.0], [1.0, 1.0, 1.0, 2.0]).tolist() == [0.0, math.log(2)]
    nothing = judged({"a": [None, None], "b": [1, 2]})
    assert (nothing.ratio, nothing.verdict, nothing.blocks) == (None, "undecided", 0)
    assert "no block" in nothing.said


def test_fewer_than_three_blocks_give_a_ratio_and_nothing_else() -> None:
    outcome = judged({"a": [100, 100], "b": [50, 50]})
    assert outcome.ratio == pytest.approx(0.5)
    assert (outcome.low, outcome.high, outcome.p_value, outcome.interval) == (None, None, None, None)
    assert outcome.verdict == "undecided" and outcome.width == math.inf and "fewest" in outcome.said
    assert "(ratio 0.500, no interval, 2 blocks)" in outcome.said


def test_below_eight_blocks_the_interval_is_students() -> None:
    logs = np.log([0.93, 0.95, 0.94, 0.96, 0.92, 0.94])
    low, high, kind = interval(logs, 0.95, seed=0)
    known = stats.t.interval(0.95, 5, logs.mean(), stats.sem(logs))
    assert kind == "t" and (low, high) == pytest.approx(tuple(np.exp(known)))


def test_from_eight_blocks_it_is_bootstrapped_from_the_seed_and_no_narrower_than_a_plain_bootstrap() -> None:
    logs = np.random.default_rng(5).normal(-0.05, 0.02, 8)
    low, high, kind = interval(logs, 0.95, seed=7)
    assert kind == "bca" and interval(logs, 0.95, seed=7) == (low, high, kind) != interval(logs, 0.95, seed=8)
    plain = stats.bootstrap((logs,), np.mean, method="BCa", random_state=np.random.default_rng(7)).confidence_interval
    assert low < math.exp(plain.low) and math.exp(plain.high) < high


@pytest.mark.parametrize("blocks", [3, 8])
def test_blocks_all_alike_have_an_interval_without_width(blocks: int) -> None:
    outcome = judged({"a": [100.0] * blocks, "b": [90.0] * blocks})
    assert (outcome.low, outcome.high) == pytest.approx((0.9, 0.9))
    assert outcome.verdict == ("slower" if blocks == 8 else "undecided")
    assert judged({"a": [100.0] * blocks, "b": [100.0] * blocks}).verdict == "equivalent"


def test_the_permutation_test_counts_all_signs() -> None:
    logs = np.random.default_rng(2).normal(0.01, 0.02, 7)
    ways = [abs(np.dot(signs, logs)) for signs in product((-1, 1), repeat=7)]
    assert sign_flip_p(logs, 0) == np.mean(np.array(ways) >= abs(logs.sum()) - 1e-12)
    assert sign_flip_p(np.full(6, 0.1), 0) == 2 / 64  # the least that six blocks can give
    assert sign_flip_p(np.zeros(6), 0) == 1.0


def test_with_many_blocks_random_signs_come_near_the_exact_p(monkeypatch: pytest.MonkeyPatch) -> None:
    logs = np.random.default_rng(4).normal(0.012, 0.02, 12)
    exact = sign_flip_p(logs, 0)
    monkeypatch.setattr(statistics, "EXACT_BLOCKS", 11)
    assert sign_flip_p(logs, 0) == pytest.approx(exact, abs=0.01) and sign_flip_p(logs, 0) == sign_flip_p(logs, 0)
    assert sign_flip_p(np.full(20, 0.1), 0) > 0  # never 0: the signs as they came are counted


@pytest.mark.parametrize(
    ("ratio", "low", "high", "said"),
    [
        (1.0, 0.97, 1.03, "equivalent"),
        (1.02, 1.01, 1.03, "equivalent"),  # sure, but too small to matter
        (0.9, 0.88, 0.92, "slower"),
        (1.1, 1.02, 1.19, "faster"),
        (0.9, 0.80, 1.01, "undecided"),  # large, but not sure
        (0.96, 0.93, 0.99, "undecided"),  # sure, but maybe within the band
        (1.0, 0.90, 1.10, "undecided"),
        (1.06, 1.051, 1.07, "faster"),
        (None, None, None, "undecided"),
        (0.5, None, None, "undecided"),
    ],
)
def test_a_verdict_needs_a_difference_that_is_sure_and_one_that_matters(
    ratio: float | None, low: float | None, high: float | None, said: str
) -> None:
    assert verdict(ratio, low, high, 0.05, CRITERIA) == said


@pytest.mark.parametrize(("p_adjusted", "said"), [(0.051, "undecided"), (0.05, "slower"), (None, "undecided")])
def test_a_difference_needs_the_sign_flip_test_too_and_equivalence_does_not(p_adjusted: float | None, said: str) -> None:
    assert verdict(0.9, 0.88, 0.92, p_adjusted, CRITERIA) == said
    assert verdict(0.9, 0.88, 0.92, p_adjusted, replace(CRITERIA, confidence=0.99)) == "undecided"
    assert p_adjusted is None or verdict(0.98, 0.97, 0.99, p_adjusted, CRITERIA) == "equivalent"


@pytest.mark.parametrize(("blocks", "said"), [(5, "undecided"), (6, "slower")])
def test_fewer_than_six_blocks_tell_no_difference_and_say_so(blocks: int, said: str) -> None:
    outcome = judged({"a": [100.0] * blocks, "b": [50.0, 51, 52, 53, 54, 55][:blocks]})
    assert outcome.high and outcome.high < 0.6 and outcome.verdict == said
    told = outcome.said.rpartition(": ")[2]
    assert told.startswith("6 blocks are the fewest that can tell a difference, since fewer agree by chance") == (blocks < 6)
    assert told.endswith("more than once in 20 runs") == (blocks < 6)


def test_of_three_engines_seven_blocks_are_the_fewest_and_that_is_said() -> None:
    found = compare_all(
        {"a": [100.0] * 6, "b": [50.0, 51, 52, 53, 54, 55], "c": [100.0, 90, 105, 95, 110, 99]}, CRITERIA, seed=0
    )
    for label in ("b", "c"):
        assert "7 blocks are the fewest that can tell a difference in one of 2 comparisons" in found[label].said


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("engines", [2, 3, 4, 6])
def test_the_fewest_blocks_that_tell_a_difference_tell_one_among_several(engines: int, confidence: float) -> None:
    blocks = fewest_blocks(engines - 1, confidence)
    alike = {f"{i}": [100.0, 101] * blocks for i in range(engines - 1)}
    for number, said in ((blocks - 1, "undecided"), (blocks, "slower")):
        one = {label: values[:number] for label, values in (alike | {"slow": [70.0, 69] * blocks}).items()}
        assert compare_all(one, Criteria(confidence=confidence), seed=0)["slow"].verdict == said


def test_an_interval_that_the_sign_flip_test_does_not_bear_out_is_told_so() -> None:
    outcome = judged({"a": [100.0] * 6, "b": [90.0, 86, 88, 84, 85, 101]})
    assert outcome.high and outcome.high < 1 and outcome.p_adjusted == 4 / 64
    assert outcome.verdict == "undecided" and outcome.said.endswith("the sign-flip test does not bear the interval out")


def test_the_band_is_the_users() -> None:
    throughputs = {"a": [100.0, 101, 99, 100, 100, 101], "b": [98.0, 99, 97, 98, 98, 98]}
    assert judged(throughputs).verdict == "equivalent"
    assert judged(throughputs, equivalence=0.01).verdict == "slower"


@pytest.mark.parametrize("wrong", [{"confidence": 1.0}, {"confidence": 0}, {"equivalence": -0.1}, {"equivalence": "5 %"}])
def test_criteria_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"measure.{next(iter(wrong))}"):
        Criteria(**wrong)


def test_the_sentence_says_it_in_words() -> None:
    assert sentence("torch", "jax", "slower", 0.942, 0.917, 0.967, 6, 0.05) == (
        "torch is 5.8 % slower than jax (ratio 0.942, 0.917–0.967, 6 blocks)"
    )
    assert (
        sentence("t", "j", "faster", 1.062, 1.03, 1.1, 1, 0.05)
        == "t is 6.2 % faster than j (ratio 1.062, 1.030–1.100, 1 block)"
    )
    assert "as fast as j, within 2.5 %" in sentence("t", "j", "equivalent", 1.0, 0.99, 1.01, 6, 0.025)


def test_several_engines_widen_each_others_intervals_unless_all_differ() -> None:
    null = np.array([[0.01, -0.01, 0.02, -0.02, 0.01, -0.01]] * 3)
    real = null - 0.3
    assert shared_confidence([null[0]], 0.95) == shared_confidence([], 0.95) == 0.95
    assert shared_confidence(list(null), 0.95) == pytest.approx(1 - 0.05 / 3)
    assert shared_confidence([real[0], null[1], null[2]], 0.95) == pytest.approx(1 - 0.05 / 3)
    assert shared_confidence([real[0], real[1], null[2]], 0.95) == pytest.approx(1 - 0.1 / 3)
    assert shared_confidence(list(real), 0.95) == pytest.approx(0.95)


def test_an_interval_excludes_one_exactly_where_benjamini_and_hochberg_select() -> None:
    rng = np.random.default_rng(9)
    for _ in range(50):
        samples = list(rng.normal(rng.choice([0, 0.02, 0.05], (4, 1)), 0.02, (4, 6)))
        selected = [p <= 0.05 for p in statistics.benjamini_hochberg([student_p(logs) for logs in samples])]
        confidence = shared_confidence(samples, 0.95)
        bounds = [interval(logs, confidence, 0) for logs in samples]
        excluded = [low > 1 or high < 1 for low, high, _ in bounds]
        assert excluded == selected


def test_one_slow_engine_of_three_is_called_and_p_values_are_adjusted() -> None:
    rng = np.random.default_rng(3)
    engines = {name: (speed * np.exp(rng.normal(0, 0.005, 7))).tolist() for name, speed in (("a", 100), ("b", 70), ("c", 100))}
    outcome = compare_all(engines, CRITERIA, seed=0)
    assert (outcome["b"].verdict, outcome["c"].verdict) == ("slower", "equivalent")
    assert outcome["b"].p_value == 2 / 128 and outcome["b"].p_adjusted == 4 / 128
    assert outcome["b"].confidence == outcome["c"].confidence == pytest.approx(0.975)


# How often it is right. The seeds are fixed: the counts below do not change from run to run.


@pytest.mark.parametrize("blocks", [3, 6, 8, 16])
def test_intervals_hold_the_truth_as_often_as_they_say(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1999)
    outcomes = [judged(run) for run in runs(0.9, blocks, 300)]
    held = np.mean([outcome.low <= 0.9 <= outcome.high for outcome in outcomes if outcome.low and outcome.high])
    assert 0.92 <= held <= 0.985


@pytest.mark.parametrize("blocks", [6, 8, 14])
@pytest.mark.parametrize("noise", [0.005, 0.02])
def test_engines_that_do_not_differ_are_never_called_faster_or_slower(
    blocks: int, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1999)
    verdicts = [judged(run).verdict for run in runs(1.0, blocks, 200, noise)]
    assert set(verdicts) <= {"equivalent", "undecided"}
    assert noise > 0.01 or verdicts.count("equivalent") >= 198


def test_a_tenth_slower_is_called_so() -> None:
    verdicts = [judged(run).verdict for run in runs(0.9, 6, 200, noise=0.01)]
    assert verdicts.count("slower") >= 190 and set(verdicts) <= {"slower", "undecided"}


def concluded(runs: list[dict[str, list[float]]], config: MeasureConfig) -> list[str]:
    """The verdict of each run, ended where its blocks say so."""
    return [conclude(run, config, seed) for seed, run in enumerate(runs)]


def conclude(run: dict[str, list[float]], config: MeasureConfig, seed: int) -> str:
    def so_far(ended: bool) -> Comparison:
        throughputs = {label: values[:done] for label, values in run.items()}
        return compare_all(throughputs, config.criteria, seed, level(config, 1, ended))["b"]

    def settled() -> bool:
        found = so_far(ended=False)
        return found.width <= config.precision and not found.unproven

    done = 0
    while reason_to_stop(config, done, 0.0, 0.0, 1, settled) is None:
        done += 1
    return so_far(ended=True).verdict


def with_slow_windows(runs: list[dict[str, list[float]]]) -> list[dict[str, list[float]]]:
    """One window in ten takes ten times as long."""
    rng = np.random.default_rng(8)
    return [{k: (np.array(v) * np.where(rng.random(len(v)) < 0.1, 0.1, 1)).tolist() for k, v in run.items()} for run in runs]


AS_SHIPPED = MeasureConfig(blocks=6, budget_s=1.0, warmup_requests=0, warmup_output_len=1, limits_s=0.0)


def test_with_ratios_that_vary_by_a_fifteenth_a_run_tells_alike_from_a_tenth_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 299)
    null, slower = (runs(effect, AS_SHIPPED.max_blocks, 20, noise=0.067 / math.sqrt(2)) for effect in (1.0, 0.9))
    assert concluded(null, AS_SHIPPED).count("equivalent") >= 18
    assert concluded(slower, AS_SHIPPED).count("slower") >= 18


def test_runs_that_end_when_they_like_seldom_call_a_difference_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of engines alike at most one run in 20 is called a difference, whatever the noise."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1999)
    monkeypatch.setattr(statistics, "BOOTSTRAP_BLOCKS", 100)  # the sign-flip test is what holds them back
    null = runs(1.0, AS_SHIPPED.max_blocks, 100, noise=0.025)
    for noise in (null, with_slow_windows(null)):
        verdicts = concluded(noise, AS_SHIPPED)
        assert len(verdicts) - verdicts.count("undecided") - verdicts.count("equivalent") <= len(verdicts) / 20


def test_in_the_worst_noise_too_one_run_in_twenty_at_most_is_called_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coin decides who wins a block, by three tenths: blocks that agree leave an interval no width. Nothing is drawn: runs
    are counted by how many blocks the leader wins. Those whose first six agree end there: 2 / 64 of all. Of the rest 28 of 40
    must agree, which makes 0.046 in all; without a price on looks 27 would do, and make 0.066."""
    monkeypatch.setattr(statistics, "BOOTSTRAP_BLOCKS", 100)
    blocks, look = AS_SHIPPED.max_blocks, AS_SHIPPED.blocks

    def called(wins: str) -> bool:
        run = {"a": [1.0] * blocks, "b": [1 / 0.7 if win == "+" else 0.7 for win in wins]}
        return conclude(run, AS_SHIPPED, seed=7) == "faster"

    assert called("+" * look + "-" * (blocks - look))
    chance = 2 / 2**look
    for wins in range(blocks // 2 + 1, blocks):
        agree_first = math.comb(blocks - look, wins - look) + math.comb(blocks - look, wins)
        ways = 2 * (math.comb(blocks, wins) - agree_first)
        chance += called("+-" + "+" * (wins - 1) + "-" * (blocks - wins - 1)) * ways / 2**blocks
    assert chance == pytest.approx(0.046, abs=5e-4)


def test_a_difference_that_a_block_gainsays_waits_for_the_end() -> None:
    throughputs = {"a": [100.0] * 10, "b": [93.0, 94, 92, 93, 94, 92, 93, 94, 92, 100.5]}
    early = compare_all(throughputs, CRITERIA, 0, level=0.0)["b"]
    assert early.unproven and early.verdict == "undecided" and early.said.endswith("does not bear the interval out")
    late = compare_all(throughputs, CRITERIA, 0, level=0.05 - 2 / 64)["b"]
    assert late.verdict == "slower" and not late.unproven
    agreed = {label: values[:6] for label, values in throughputs.items()}
    assert compare_all(agreed, CRITERIA, 0, level=0.0)["b"].verdict == "slower"
