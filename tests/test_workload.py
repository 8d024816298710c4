"""Workloads: the same from the same seed, shaped as described, told apart by their hash."""

from dataclasses import replace

import numpy as np
import pytest
from hydra import compose, initialize_config_module

from common.errors import ConfigError
from experiments.load.workload import Item, Lengths, Slo, Workload, WorkloadConfig, draw
from experiments.options import resolved

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


@pytest.mark.parametrize("burstiness", [0.25, 4.0])
def test_bursty_arrivals_keep_the_rate_and_their_gaps_spread_as_the_gamma_does(burstiness: float) -> None:
    wanted = replace(FIXED, num_requests=4000, request_rate=5.0, burstiness=burstiness)
    gaps = np.diff([0.0, *(item.arrival for item in draw(wanted, 0, 100).items)])
    spread = burstiness**-0.5  # standard deviation by mean
    assert gaps.min() >= 0 and gaps.mean() == pytest.approx(1 / 5.0, rel=4 * spread / 4000**0.5)
    assert gaps.std() / gaps.mean() == pytest.approx(spread, rel=0.1)


def test_arrivals_are_whole_microseconds() -> None:
    """The last digits of a logarithm differ between machines; the hash may not."""
    for burstiness in (1.0, 0.5):
        items = draw(replace(FIXED, num_requests=50, request_rate=3.0, burstiness=burstiness), 0, 100).items
        assert all(item.arrival == round(item.arrival, 6) for item in items)


TALK = replace(FIXED, name="talk", num_requests=7, prompt_len=5, output_len=3, prefix_len=4, prefix_groups=2, turns=3)


def test_a_turn_asks_with_the_whole_history_and_waits_for_the_turn_before() -> None:
    items = draw(TALK, 0, 1000).items
    assert [item.after for item in items] == [None, 0, 1, None, 3, 4, None]
    assert [len(item.prompt) for item in items] == [9, 17, 25, 9, 17, 25, 9]  # 3 tokens of an answer and 5 new ones each
    for item in items:
        if item.after is not None:
            before = items[item.after].prompt
            assert item.prompt[: len(before)] == before
    assert items[0].prompt[:4] == items[6].prompt[:4] != items[3].prompt[:4]  # conversations go to the groups in turn


def test_fewer_turns_are_the_first_of_more() -> None:
    long = draw(replace(TALK, think_s=1.0, request_rate=2.0), 0, 1000).items
    assert draw(replace(TALK, think_s=1.0, request_rate=2.0, num_requests=5), 0, 1000).items == long[:5]


def test_pauses_are_exponential_and_conversations_begin_at_the_rate() -> None:
    items = draw(replace(TALK, num_requests=6000, think_s=2.0, request_rate=4.0), 0, 50).items
    pauses = np.array([item.think for item in items if item.after is not None])
    assert len(pauses) == 4000 and pauses.mean() == pytest.approx(2.0, rel=4 / 4000**0.5)
    assert all(item.think == 0.0 for item in items if item.after is None)
    begins = [item.arrival for item in items if item.after is None]
    assert begins == sorted(begins) and 2000 / begins[-1] == pytest.approx(4.0, rel=4 / 2000**0.5)


def test_whether_prompts_share_prefixes_is_seen_in_them() -> None:
    for config, shares in ((FIXED, False), (TALK, True), (RAGGED, False)):
        assert draw(config, 0, 1000).shares_prefixes is shares
    groups = replace(FIXED, prefix_len=16, prefix_groups=2)
    assert draw(groups, 0, 1000).shares_prefixes and not draw(replace(groups, num_requests=2), 0, 1000).shares_prefixes


def test_a_workload_carries_its_users_and_what_is_good_enough() -> None:
    workload = draw(replace(FIXED, concurrency=3, slo=Slo(ttft_ms=100.0)), 0, 1000)
    assert (workload.concurrency, workload.slo) == (3, Slo(ttft_ms=100.0))


DIGESTS = {
    "fixed": "415447620c812eb2c07ace7d92d727a1",
    "single": "fe998d0b5df1ca7be1b1f7847ec7bb44",
    "prefill": "ff7691a1bccfe1a938e0399b4528cd20",
    "ragged": "7a42f771e0877ebf5a5451e3cf4d45d5",
    "shared_prefix": "f8fe45bf1e330ae7b97a4efe3ec6bfe6",
    "chat": "b0b48331152a22aa934920292c40e69c",
    "multi_turn": "0410bf78b0b910d2de33ea0e5c28244d",
    "long_context": "6d20a822f814b93555276b6e9b21bba8",
    "poisson": "682c1646cd686e19d1cef8fbce6f7c2e",
    "bursty": "c68728e2f55f18e6ba9cddbd124ac36e",
    "closed_loop": "f66b7c404f92bcf1f7a3c22c6b013061",
}
"""With seed 0 and a vocabulary of 1000 without 0 and 1. Results of other days and machines are told apart by them: if one
changes, results from before are of another load and their names should be too."""


@pytest.mark.parametrize("name", DIGESTS)
def test_a_named_workload_is_the_same_on_every_machine(name: str) -> None:
    with initialize_config_module("configs", version_base="1.3"):
        config = WorkloadConfig.of(resolved(compose("bench", [f"workload={name}"]).workload))
    assert draw(config, 0, 1000, {0, 1}).digest == DIGESTS[name]


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
        digest(Item(0.0, (1, 2), 3), Item(0.0, (4,), 5, after=0)),
        digest(Item(0.0, (1, 2), 3), Item(0.0, (4,), 5, after=0, think=1.0)),
        Workload("w", (Item(0.0, (1, 2), 3), Item(0.0, (4,), 5)), concurrency=1).digest,
        Workload("w", (Item(0.0, (1, 2), 3), Item(0.0, (4,), 5)), concurrency=2).digest,
    ]
    assert len({base, *others}) == 10
    same = Workload("other", (Item(0.0, (1, 2), 3), Item(0.0, (4,), 5)), slo=Slo(ttft_ms=1.0))
    assert same.digest == base  # neither its name nor what is good enough changes what is sent


def test_a_share_is_the_first_requests_cut_short() -> None:
    share = draw(replace(RAGGED, request_rate=1.0), 0, 100).share(5, 10)
    assert [item.prompt for item in share.items] == [item.prompt for item in draw(RAGGED, 0, 100).items[:5]]
    assert all(item.output_len <= 10 and item.arrival == 0.0 for item in share.items)
    talk = draw(replace(TALK, concurrency=2, think_s=1.0), 0, 100).share(5, 10)
    assert talk.concurrency is None and all((item.after, item.think) == (None, 0.0) for item in talk.items)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_requests": 0}, "num_requests must be an integer ≥ 1, got 0"),
        ({"num_requests": True}, "num_requests"),
        ({"num_requests": 10**8}, "workload.num_requests must be at most 1000000, got 100000000"),
        ({"prefix_groups": 10**8}, "workload.prefix_groups must be at most 1000000"),
        ({"prompt_len": 0}, "prompt_len"),
        ({"output_len": 2.5}, "output_len"),
        ({"prompt_len": 10**12}, "workload.prompt_len must be at most 16777216 tokens"),
        ({"output_len": {"mu": 1.0, "sigma": 1.0, "low": 8, "high": 10**12}}, "workload.output_len must be at most"),
        # each bearable by itself
        ({"num_requests": 10**6, "prompt_len": 10**4}, "num_requests=1000000 may have 10000000000 tokens in all, at most"),
        ({"num_requests": 10**6, "prompt_len": {"mu": 1.0, "sigma": 1.0, "low": 1, "high": 10**4}}, "tokens in all"),
        ({"num_requests": 10**5, "turns": 10**5}, "num_requests=100000 may have 80000000000 tokens .*lower .*workload.turns"),
        ({"prefix_groups": 10**6, "prefix_len": 10**4}, "tokens in all"),
        ({"output_len": {"mu": 1.0, "sigma": 1.0, "low": 8, "high": 4}}, "low=8 and high=4"),
        ({"output_len": {"mu": 1.0, "sigma": 1.0, "low": True, "high": 4}}, "low=True and high=4"),
        ({"output_len": {"mu": float("nan"), "sigma": 1.0, "low": 1, "high": 4}}, "mu must be a finite"),
        ({"output_len": {"mu": 1.0, "sigma": 1.0, "low": 1}}, "lacks high"),
        ({"output_len": {"mu": 1.0, "sgima": 1.0}}, "Did you mean 'sigma'"),
        ({"promt_len": 3}, "Did you mean 'prompt_len'"),
        ({"prefix_len": -1}, "prefix_len"),
        ({"prefix_groups": 0}, "prefix_groups"),
        ({"request_rate": 0}, "request_rate"),
        ({"request_rate": float("inf")}, "request_rate"),
        ({"num_requests": None}, "num_requests must be an integer ≥ 1, got None"),
        ({"turns": 0}, "turns must be an integer ≥ 1"),
        ({"think_s": -1.0, "turns": 2}, "think_s must be a finite number ≥ 0"),
        ({"burstiness": 0.0, "request_rate": 1.0}, "burstiness must be a finite number > 0"),
        ({"concurrency": 0}, "concurrency must be an integer ≥ 1 or null"),
        ({"trace": ""}, "trace must be a path"),
        ({"slo": {"ttft_ms": 0}}, "slo.ttft_ms must be a number of milliseconds > 0"),
        ({"slo": None}, "workload.slo must be limits such as {ttft_ms: 500}.*got None"),
        ({"slo": [5]}, "workload.slo must be limits"),
        ({"slo": {"tttf_ms": 9}}, "Did you mean 'ttft_ms'"),
        # contradictions
        ({"request_rate": 2.0, "concurrency": 4}, "request_rate=2.0 .* workload.concurrency=4 .* set one of them to null"),
        ({"burstiness": 0.5}, "burstiness=0.5 shapes arrivals, and there is no workload.request_rate"),
        ({"think_s": 1.0}, "workload.turns is 1"),
        ({"trace": "t"}, "workload.prompt_len=8 contradicts"),
        ({"trace": "t", "prompt_len": None, "output_len": None, "request_rate": 2.0}, "workload.request_rate=2.0 contradicts"),
        ({"trace": "t", "prompt_len": None, "output_len": None, "turns": 2}, "workload.turns=2 .*leave that at 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        WorkloadConfig.of({"name": "w", "num_requests": 2, "prompt_len": 8, "output_len": 8} | options)


def test_the_bound_on_all_prompts_together_is_what_is_drawn_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"name": "w", "num_requests": 6, "prompt_len": 8, "output_len": 4, "prefix_len": 5, "turns": 3}
    drawn = 5 + sum(len(item.prompt) for item in draw(WorkloadConfig.of(options), 0, 100).items)
    monkeypatch.setattr("experiments.load.workload.MOST_PROMPT_TOKENS", drawn)
    assert WorkloadConfig.of(options)
    monkeypatch.setattr("experiments.load.workload.MOST_PROMPT_TOKENS", drawn - 1)
    with pytest.raises(ConfigError, match=f"{drawn} tokens in all, at most {drawn - 1}"):
        WorkloadConfig.of(options)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"request_rate": 1e-300}, "raise workload.request_rate"), ({"turns": 2, "think_s": 1e300}, "lower workload.think_s")],
)
def test_what_would_come_after_weeks_is_refused(options: dict[str, object], said: str) -> None:
    config = WorkloadConfig.of({"name": "w", "num_requests": 2, "prompt_len": 8, "output_len": 8} | options)
    with pytest.raises(ConfigError, match=said):
        draw(config, 0, 100)


@pytest.mark.parametrize("seed", [-1, 2**64, "0", 0.5, True])
def test_a_seed_that_is_none_is_refused(seed: object) -> None:
    with pytest.raises(ConfigError, match="seed must be an integer"):
        draw(FIXED, seed, 100)


def test_a_vocabulary_of_special_ids_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty"):
        draw(FIXED, 0, 3, special_ids={0, 1, 2})


def test_each_block_has_fresh_prompts_of_the_same_lengths_and_prefixes() -> None:
    config = WorkloadConfig(name="w", num_requests=6, prompt_len=12, output_len=4, prefix_len=16, prefix_groups=2)
    first = draw(config, 1, 500)
    assert first.fresh(0, 1) == first
    later = first.fresh(3, 1)
    assert later == first.fresh(3, 1) != first.fresh(4, 1)
    for a, b in zip(first.items, later.items, strict=True):
        assert len(a.prompt) == len(b.prompt) and a.prompt[:8] != b.prompt[:8]
        assert (a.arrival, a.output_len, a.after) == (b.arrival, b.output_len, b.after)
    heads = [[item.prompt[:16] for item in workload.items] for workload in (first, later)]
    assert all([a == heads[0][0] for a in heads[0]] == [a == row[0] for a in row] for row in heads)
