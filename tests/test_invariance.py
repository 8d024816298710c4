"""What a request gets does not depend on how it was scheduled: alone or beside others, in chunks, from cached pages, preempted.

Per backend and in float32. The yardstick is one schedule, every request alone, and that one is held against the float64 judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations, product
from typing import Any, NamedTuple

import numpy as np
import pytest

from common.engine import Engine
from common.request import Request, SamplingParams, TokenEvent
from experiments.correctness.judge import float64_reference, judge
from experiments.correctness.reference import NumpyModel
from tests.backends import checkpoint, engine_config, make_engine
from tests.events import tokens
from tests.numpy_sampler import Filters, choices, uniform

TOLERANCE = 2e-4
"""How far apart two schedules' logprobs may be."""
SLACK = 1e-5
"""How far a uniform may be from a boundary of the float64 distribution where two schedules draw different tokens."""
MODEL = "tiny-gemma3"  # sliding windows, two kinds of rotary positions, one KV head
PAGES = 160
FEW = {8: 20, 16: 11}
"""Pages, the null page included, with which eight requests cannot all run; each alone can."""
WHOLE = 128


class Schedule(NamedTuple):
    company: str
    chunk: int
    cache: str
    pages: str
    page_size: int


AXES: tuple[tuple[Any, ...], ...] = (
    ("alone", "batched", "reordered"),
    (16, 48, WHOLE),
    ("off", "cold", "warm"),
    ("plenty", "few"),
    (8, 16),
)
BASELINE = Schedule("alone", WHOLE, "off", "plenty", 16)


def possible(schedule: Schedule) -> bool:
    """A request that is alone is never preempted."""
    return not (schedule.company == "alone" and schedule.pages == "few")


ALL = [schedule for schedule in map(Schedule._make, product(*AXES)) if possible(schedule)]


def pairs(schedule: Schedule) -> set[tuple[Any, ...]]:
    """Every choice of two axes' values that it covers."""
    return set(combinations(enumerate(schedule), 2))


def covering() -> list[Schedule]:
    """Few schedules in which every possible pair of values occurs: greedily, the one with most new pairs next."""
    missing, chosen = set().union(*map(pairs, ALL)), []
    while missing:
        chosen.append(max(ALL, key=lambda schedule: len(pairs(schedule) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def requests() -> list[Request]:
    """Eight prompts beside the boundaries of pages and chunks, two with a common beginning, greedy and sampled in turn."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, 256, n).tolist()  # noqa: E731
    shared = draw(40)
    prompts = [draw(1), draw(15), draw(16), draw(33), shared + draw(9), shared + draw(20), draw(48), draw(95)]
    kinds: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 11},
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 2**40 + 3},
    )
    return [
        Request(
            request_id=f"r{i}",
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=24, logprobs=20, **kinds[i % 4]),
        )
        for i, prompt in enumerate(prompts)
    ]


Outputs = dict[str, list[TokenEvent]]


def run(backend: str, schedule: Schedule, asked: Sequence[Request]) -> Outputs:
    """The requests' events under a schedule, which is seen to have happened."""
    config = engine_config(max_num_batched_tokens=WHOLE, max_model_len=128, block_size=schedule.page_size)
    few = FEW[schedule.page_size] if schedule.pages == "few" else 0
    caching = schedule.cache != "off"

    def engine() -> Engine:
        options = {"max_num_batched_tokens": schedule.chunk, "enable_prefix_caching": caching}
        return make_engine(backend, MODEL, config, pages=PAGES, few=few, **options)

    order = list(asked)
    if schedule.company == "reordered":
        order = [order[i] for i in np.random.default_rng(1).permutation(len(order))]
    batches = [[request] for request in order] if schedule.company == "alone" else [order]
    events: Outputs = {}
    one = engine()
    for batch in batches:
        if schedule.cache == "cold":
            one.reset_prefix_cache()
        if schedule.cache == "warm":
            one.run(batch)
        hits, preemptions = one.stats()["prefix_cache_hits"], one.stats()["num_preemptions"]
        events |= one.run(batch)
        cached = one.stats()["prefix_cache_hits"] - hits
        # Warm pages are found again by every prompt of more than a page, unless so few are there that they were evicted.
        sure = schedule.cache == "warm" and schedule.pages == "plenty"
        long = any(len(request.prompt_token_ids) > schedule.page_size for request in batch)
        assert cached > 0 if sure and long else caching or cached == 0
        assert (one.stats()["num_preemptions"] > preemptions) == (schedule.pages == "few")
    assert one.stats()["num_resets"] == 0
    return events


@cache
def yardstick(backend: str) -> Outputs:
    return run(backend, BASELINE, requests())


def check(request: Request, one: Sequence[TokenEvent], other: Sequence[TokenEvent]) -> None:
    """Two schedules of one request: logprobs agree, and a divergence is no larger than rounding explains."""
    tokens_a, tokens_b = tokens(one), tokens(other)
    logprobs_a, logprobs_b = ([event.logprobs for event in events if event.logprobs] for events in (one, other))
    reference = float64_reference(NumpyModel(checkpoint(MODEL)))
    agreement = judge(request.prompt_token_ids, tokens_a, tokens_b, logprobs_a, logprobs_b, reference, TOLERANCE)
    assert agreement.max_abs_logprob_diff < TOLERANCE
    assert len(tokens_a) == len(tokens_b) and one[-1].finish == other[-1].finish
    if agreement.divergence is None or (request.params.greedy and agreement.divergence.justified):
        return
    assert not request.params.greedy, agreement
    at = agreement.num_equal
    assert {tokens_a[at], tokens_b[at]} <= drawn(request, tokens_a[:at])


def drawn(request: Request, output: Sequence[int]) -> set[int]:
    """What the judges of model and sampling allow a request to choose next."""
    params, history = request.params, [*request.prompt_token_ids, *output]
    filters = Filters(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p)
    seed = params.seed or 0
    u = uniform((seed & 0xFFFF_FFFF, seed >> 32), len(history))
    return choices(float64_reference(NumpyModel(checkpoint(MODEL)))(history), filters, u, SLACK)


def test_the_yardstick_is_right(backend: str) -> None:
    reference = float64_reference(NumpyModel(checkpoint(MODEL)))
    for request in requests():
        output = tokens(yardstick(backend)[request.request_id])
        assert len(output) == 24
        for at in range(0, 24, 4):
            event = yardstick(backend)[request.request_id][at]
            exact = reference([*request.prompt_token_ids, *output[:at]])
            assert event.logprobs is not None
            assert np.abs(exact[list(event.logprobs.top_ids)] - event.logprobs.top_logprobs).max() < TOLERANCE
            assert output[at] in drawn(request, output[:at])


def schedules() -> list[Any]:
    few = covering()
    named = lambda schedule, *marks: pytest.param(schedule, id="-".join(map(str, schedule)), marks=marks)  # noqa: E731
    return [*map(named, few), *(named(schedule, pytest.mark.accept) for schedule in ALL if schedule not in few)]


@pytest.mark.parametrize("schedule", schedules())
def test_a_schedule_changes_nothing(backend: str, schedule: Schedule) -> None:
    events = run(backend, schedule, requests())
    for request in requests():
        check(request, yardstick(backend)[request.request_id], events[request.request_id])


@pytest.mark.parametrize(
    "policy",
    [
        {"schedule": "static"},
        {"cache": "dense", "enable_prefix_caching": False},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 100},
    ],
    ids=lambda policy: next(iter(policy)),
)
def test_an_idea_left_out_changes_nothing(backend: str, policy: dict[str, Any]) -> None:
    config = engine_config(max_num_batched_tokens=WHOLE, max_model_len=128, block_size=16)
    one = make_engine(backend, MODEL, config, pages=PAGES, few=FEW[16], **policy)
    events = one.run(requests())
    assert one.stats()["num_resets"] == 0
    for request in requests():
        check(request, yardstick(backend)[request.request_id], events[request.request_id])


def test_every_possible_pair_of_conditions_is_covered() -> None:
    chosen = covering()
    assert len(ALL) == 3 * 3 * 3 * 2 * 2 - 3 * 3 * 2 and len(chosen) < 14
    wanted = {
        ((i, a), (j, b)) for i, j in combinations(range(5), 2) for a in AXES[i] for b in AXES[j] if (a, b) != ("alone", "few")
    }
    assert set().union(*map(pairs, chosen)) == wanted


def test_another_seed_gives_other_tokens_and_the_same_seed_the_same(backend: str) -> None:
    def one(**params: Any) -> list[int]:
        config = engine_config(max_num_batched_tokens=WHOLE, max_model_len=128)
        request = Request(request_id="x", prompt_token_ids=range(9), params=SamplingParams(max_tokens=24, **params))
        return tokens(make_engine(backend, MODEL, config, pages=PAGES).run([request])["x"])

    kinds: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2}, {"seed": 1 + 2**32}, {"seed": 1, "top_k": 3}, {"temperature": 0.0}]
    outputs = [one(**kind) for kind in kinds]
    assert len(set(map(tuple, outputs))) == len(kinds)
    assert outputs == [one(**kind) for kind in kinds]


def test_a_sampled_token_depends_on_its_position(backend: str) -> None:
    # The same logits again and again, as far as 40 equal tokens can: only the position tells the draws apart.
    config = engine_config(max_num_batched_tokens=WHOLE, max_model_len=128)
    params = SamplingParams(max_tokens=24, temperature=3.0, seed=5)
    events = make_engine(backend, MODEL, config, pages=PAGES).run(
        [Request(request_id="x", prompt_token_ids=[7] * 40, params=params)]
    )
    assert len(set(tokens(events["x"]))) > 10
