"""`experiments.measure.blocks`: which engine runs when, and when there are blocks enough."""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_module

from experiments.measure.blocks import ALLOWED, PLANNED, advice, block_order, level, reason_to_stop, repeats, tail, time_left
from experiments.measure.config import MeasureConfig
from experiments.measure.session import measure_config
from experiments.metrics.statistics import fewest_blocks


def config(blocks: int, **more: float) -> MeasureConfig:
    fixed = {"budget_s": 100.0, "warmup_requests": 0, "warmup_output_len": 1, "limits_s": 0.0}
    return MeasureConfig(**{"blocks": blocks} | fixed | more)


def count(config: MeasureConfig, block_s: float = 1.0, settled: bool = False, comparisons: int = 1) -> tuple[int, str]:
    """How many blocks of `block_s` seconds run, and why no more, where every comparison is `settled` or stays open."""
    done = 0
    while (
        reason := reason_to_stop(config, done, done * block_s, block_s if done else 0.0, comparisons, lambda: settled)
    ) is None:
        done += 1
    return done, reason.said


def option(config: MeasureConfig, *arguments: Any) -> str:
    """What ended it."""
    stop = reason_to_stop(config, *arguments, settled=lambda: True)
    assert stop
    return stop.option


def test_each_block_runs_every_engine_once_in_an_order_of_its_own() -> None:
    labels = ["a", "b", "c"]
    orders = [block_order(labels, number, seed=4) for number in range(40)]
    assert all(sorted(order) == labels for order in orders)
    assert len({tuple(order) for order in orders}) == 6  # every order comes up
    assert orders == [block_order(labels, number, seed=4) for number in range(40)]
    assert orders != [block_order(labels, number, seed=5) for number in range(40)]


def test_the_orders_of_the_first_blocks_do_not_repeat_and_no_order_tells_the_next() -> None:
    """A rhythm of 2, 3, 4, 6, 8 or 12 windows disturbs the same engine in each of six blocks only where the orders repeat."""
    assert np.mean([not repeats(each) for each in product((False, True), repeat=PLANNED)]) == ALLOWED
    leads = np.array([[block_order(["a", "b"], number, seed)[0] == "a" for number in range(12)] for seed in range(1500)])
    assert len({tuple(each) for each in leads[:, :PLANNED].tolist()}) == ALLOWED * 2**PLANNED
    assert abs(leads.mean(0) - 0.5).max() < 0.06
    later = np.corrcoef(leads[:, PLANNED - 1 :].T) - np.eye(12 - PLANNED + 1)
    assert abs(later).max() < 0.1


def test_two_engines_lead_about_equally_often_over_the_seeds() -> None:
    first = [block_order(["a", "b"], 0, seed)[0] for seed in range(200)]
    assert 70 <= first.count("a") <= 130


def test_blocks_go_on_by_pairs_until_the_interval_is_narrow_or_there_are_enough() -> None:
    assert count(config(6), settled=True) == (6, "after 6 blocks every interval of a ratio was narrower than 4 % of it")
    assert count(config(7), settled=True)[0] == 8
    assert count(config(6, max_blocks=12)) == (12, "all 12 blocks were run")
    assert count(config(6, max_blocks=9))[0] == 9
    assert count(config(30, max_blocks=30))[0] == 30


def test_without_anything_to_compare_or_with_too_few_blocks_for_it_they_are_as_many_as_asked_for() -> None:
    assert count(config(6), comparisons=0) == (6, "all 6 blocks were run")
    assert count(config(7), comparisons=0)[0] == 7
    assert count(config(1))[0] == 1 and count(config(5))[0] == 5


def test_blocks_go_on_where_fewer_could_not_tell_one_difference_among_so_many() -> None:
    assert [count(config(6), settled=True, comparisons=several)[0] for several in (1, 2, 3, 4)] == [6, 8, 8, 8]
    assert count(config(6, confidence=0.99), settled=True)[0] == 8


def test_looks_on_the_way_leave_less_to_tell_a_difference_by_at_the_end() -> None:
    assert level(config(6), 1, ended=False) == 0  # until then all blocks must agree
    assert level(config(6), 1, ended=True) == pytest.approx(0.05 - 2 / 44)
    assert level(config(6), 2, ended=True) == pytest.approx(0.05 - 2 * 2 / 176)  # two need eight blocks for a first look
    for once in (config(6, max_blocks=6), config(5), config(12, max_blocks=12)):
        assert level(once, 1, ended=True) == pytest.approx(0.05)


def test_an_interval_that_ends_a_run_after_the_first_look_leaves_out_less() -> None:
    assert tail(config(6), 1, 6, "measure.precision") == tail(config(6), 1, 12, "measure.budget_s") == 1
    assert tail(config(6), 1, 8, "measure.precision") == tail(config(6), 2, 10, "measure.precision") == 0.6
    assert tail(config(6), 2, 8, "measure.precision") == tail(config(5), 1, 5, "measure.precision") == 1


def test_the_option_that_ended_a_run_is_told() -> None:
    assert option(config(6), 40, 0.0, 0.0, 1) == "measure.max_blocks"
    assert option(config(6), 6, 0.0, 0.0, 0) == option(config(5), 5, 0.0, 0.0, 1) == "measure.blocks"
    assert option(config(6), 3, 99.0, 2.0, 1) == option(config(6), 8, 99.0, 2.0, 1) == "measure.budget_s"
    assert option(config(6), 8, 0.0, 0.0, 1) == "measure.precision"


@pytest.mark.parametrize(
    ("options", "stopped_by", "done", "comparisons", "advised"),
    [
        ({"blocks": 6}, "measure.budget_s", 4, 1, "Give all 6 blocks their time: raise measure.budget_s"),
        ({"blocks": 6}, "measure.budget_s", 6, 2, "Give all 7 blocks their time: raise measure.budget_s"),
        (
            {"blocks": 3},
            "measure.budget_s",
            2,
            1,
            "Give all 6 blocks their time: raise measure.budget_s, and write measure.blocks=6",
        ),
        ({"blocks": 6}, "measure.budget_s", 8, 1, "More blocks narrow the interval: raise measure.budget_s"),
        ({"blocks": 6}, "measure.max_blocks", 40, 1, "More blocks narrow the interval: raise measure.max_blocks"),
        (
            {"blocks": 6, "max_blocks": 6},
            "measure.max_blocks",
            6,
            2,
            "Write measure.max_blocks=7, with a measure.budget_s that has room for them",
        ),
        ({"blocks": 6}, "measure.precision", 8, 1, "More blocks narrow the interval: lower measure.precision"),
        ({"blocks": 5}, "measure.blocks", 5, 1, "Write measure.blocks=6, with a measure.budget_s that has room for them"),
        ({"blocks": 5, "confidence": 0.9}, "measure.blocks", 5, 1, "More blocks narrow the interval: raise measure.blocks"),
        ({"blocks": 6}, "", 3, 1, ""),
    ],
)
def test_what_is_advised_is_the_option_that_ended_the_run_and_where_it_has_to_go(
    options: dict[str, Any], stopped_by: str, done: int, comparisons: int, advised: str
) -> None:
    assert advice(config(**options), stopped_by, done, comparisons) == advised


def test_the_interval_is_asked_for_only_where_it_decides() -> None:
    asked = []

    def settled(at: int) -> bool:
        asked.append(at)
        return False

    for done in range(13):
        reason_to_stop(config(7, max_blocks=12), done, 0.0, 0.0, 1, lambda: settled(done))  # noqa: B023 - called at once
    assert asked == [8, 10]


def test_no_block_starts_that_would_end_after_the_budget_and_the_first_two_always_run() -> None:
    said = "the budget of 35 s (measure.budget_s) was used up after 3 blocks"
    assert count(config(6, budget_s=35.0), block_s=10.0) == (3, said)
    stopped = reason_to_stop(config(6, budget_s=35.0), 1, 35.0, 10.0, 1, lambda: True, disturbed=2)
    assert stopped is not None and stopped.said == said + ", 2 of them disturbed by other programs"
    assert count(config(6, budget_s=75.0), block_s=10.0)[0] == 6  # a pair more would have ended at 80
    assert count(config(6, budget_s=85.0), block_s=10.0)[0] == 8
    assert count(config(6, budget_s=0.0), block_s=10.0)[0] == 2
    assert count(config(1, budget_s=0.0), block_s=10.0)[0] == 1


def test_by_default_the_fewest_blocks_that_tell_a_difference_fit_the_budget_of_a_slow_machine() -> None:
    with initialize_config_module("configs", version_base="1.3"):
        shipped = measure_config(compose("compare"))
    assert count(shipped, block_s=60.0)[0] >= shipped.blocks == fewest_blocks(1, shipped.confidence)


def test_the_time_left_is_never_more_than_the_budget_has_but_for_the_blocks_that_always_run() -> None:
    six = config(6, budget_s=35.0)
    assert time_left(six, 0, 0.0, 0.0) <= 0  # not known before a block has run
    assert time_left(six, 1, 4.0, 4.0) == 20 and time_left(six, 5, 20.0, 4.0) == 4
    assert time_left(six, 1, 10.0, 10.0) == 25 and time_left(six, 2, 20.0, 10.0) == 15
    assert time_left(six, 1, 40.0, 40.0) == time_left(config(6, budget_s=0.0), 1, 40.0, 40.0) == 40
    assert time_left(config(6, budget_s=math.inf), 1, 10.0, 10.0) == 50
    assert time_left(six, 6, 24.0, 4.0) <= 0  # nobody knows how many more there will be
