"""Workloads: the same from the same seed, shaped as described, told apart by their hash."""

from dataclasses import replace

import numpy as np
import pytest

from common.errors import ConfigError
from experiments.workload import Item, Lengths, Workload, WorkloadConfig, draw

FIXED = WorkloadConfig(name="fixed", num_requests=4, prompt_len=16, output_len=8)
RAGGED = WorkloadConfig(
    name="ragged",
    num_requests=64,
    prompt_len=Lengths(mu=4.7, sigma=0.8, low=8, high=1024),
    output_len=Lengths(mu=4.5, sigma=0.7, low=8, high=512),
)


def test_a_seed_gives_one_workload_and_another_seed_another() -> None:
    assert draw(RAGGED, 3, 1000) == draw(RAGGED, 3, 1000)
    assert draw(RAGGED, 3, 1000).digest == draw(RAGGED, 3, 1000).digest
    assert draw(RAGGED, 3, 1000).digest != draw(RAGGED, 4, 1000).digest


def test_fewer_requests_are_the_first_of_more() -> None:
    assert draw(replace(RAGGED, num_requests=8), 0, 1000).items == draw(RAGGED, 0, 1000).items[:8]


def test_fixed_lengths_are_what_was_asked() -> None:
    items = draw(FIXED, 0, 1000).items
    assert {(len(item.prompt), item.output_len, item.arrival) for item in items} == {(16, 8, 0.0)}
    assert len({item.prompt for item in items}) == 4


def test_ragged_lengths_follow_the_lognormal_and_stay_inside_the_clip() -> None:
    items = draw(replace(RAGGED, num_requests=4000), 0, 50).items
    prompts, outputs = (np.array(column) for column in zip(*[(len(i.prompt), i.output_len) for i in items], strict=True))
    assert prompts.min() >= 8 and prompts.max() == 1024
    assert outputs.min() >= 8 and outputs.max() == 512
    # The median of a sample of n lognormals is off by sigma * sqrt(pi / 2n) in its logarithm, 1.6 % here: 4 of those.
    assert np.median(prompts) == pytest.approx(np.exp(4.7), rel=0.065)
    assert np.median(outputs) == pytest.approx(np.exp(4.5), rel=0.065)


def test_special_ids_never_occur_and_every_other_one_does() -> None:
    ids = {
        token for item in draw(replace(FIXED, num_requests=100), 0, 40, special_ids={0, 7, 39}).items for token in item.prompt
    }
    assert ids == set(range(40)) - {0, 7, 39}


def test_a_group_shares_its_prefix_and_nothing_else() -> None:
    items = draw(replace(FIXED, num_requests=6, prefix_len=32, prefix_groups=2), 0, 1000).items
    prefixes = [item.prompt[:32] for item in items]
    assert prefixes[0] == prefixes[2] == prefixes[4] != prefixes[1] == prefixes[3] == prefixes[5]
    assert all(len(item.prompt) == 48 for item in items)
    assert len({item.prompt[32:] for item in items}) == 6


def test_poisson_arrivals_rise_at_the_rate() -> None:
    arrivals = [item.arrival for item in draw(replace(FIXED, num_requests=2000, request_rate=5.0), 0, 100).items]
    assert arrivals == sorted(arrivals) and arrivals[0] > 0
    assert 2000 / arrivals[-1] == pytest.approx(5.0, rel=4 / 2000**0.5)


def test_the_hash_sees_every_id_length_arrival_and_the_border_between_requests() -> None:
    def digest(*items: Item) -> str:
        return Workload("w", items).digest

    base = digest(Item(0.0, (1, 2), 3), Item(0.0, (4,), 5))
    others = [
        digest(Item(0.0, (1, 9), 3), Item(0.0, (4,), 5)),
        digest(Item(0.0, (1, 2), 4), Item(0.0, (4,), 5)),
        digest(Item(0.5, (1, 2), 3), Item(0.0, (4,), 5)),
        digest(Item(0.0, (1,), 3), Item(0.0, (2, 4), 5)),
        digest(Item(0.0, (4,), 5), Item(0.0, (1, 2), 3)),
    ]
    assert len({base, *others}) == 6


def test_a_share_is_the_first_requests_cut_short() -> None:
    share = draw(replace(RAGGED, request_rate=1.0), 0, 100).share(5, 10)
    assert [item.prompt for item in share.items] == [item.prompt for item in draw(RAGGED, 0, 100).items[:5]]
    assert all(item.output_len <= 10 and item.arrival == 0.0 for item in share.items)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_requests": 0}, "num_requests must be an integer ≥ 1, got 0"),
        ({"num_requests": True}, "num_requests"),
        ({"prompt_len": 0}, "prompt_len"),
        ({"output_len": 2.5}, "output_len"),
        ({"output_len": {"mu": 1.0, "sigma": 1.0, "low": 8, "high": 4}}, "low=8 and high=4"),
        ({"output_len": {"mu": float("nan"), "sigma": 1.0, "low": 1, "high": 4}}, "mu must be a finite"),
        ({"output_len": {"mu": 1.0, "sigma": 1.0, "low": 1}}, "lacks high"),
        ({"output_len": {"mu": 1.0, "sgima": 1.0}}, "Did you mean 'sigma'"),
        ({"promt_len": 3}, "Did you mean 'prompt_len'"),
        ({"prefix_len": -1}, "prefix_len"),
        ({"prefix_groups": 0}, "prefix_groups"),
        ({"request_rate": 0}, "request_rate"),
        ({"request_rate": float("inf")}, "request_rate"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        WorkloadConfig.of({"name": "w", "num_requests": 2, "prompt_len": 8, "output_len": 8} | options)


@pytest.mark.parametrize("seed", [-1, 2**64, "0", 0.5])
def test_a_seed_that_is_none_is_refused(seed: object) -> None:
    with pytest.raises(ConfigError, match="seed must be an integer"):
        draw(FIXED, seed, 100)  # type: ignore[arg-type]


def test_a_vocabulary_of_special_ids_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty"):
        draw(FIXED, 0, 3, special_ids={0, 1, 2})
