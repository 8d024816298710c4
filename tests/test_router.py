"""Which engine gets a request: the one with least to compute, and what is cached counts."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest

from common.config import Routing
from common.replicas.router import DECODE_TOKENS, Choice, Router, remaining_tokens
from common.schedule.page_pool import PagePool, next_key

B = 4
LONG = list(range(100, 141))
"""Ten full pages, and one token."""


def router(count: int = 2, routing: Routing = "prefix") -> Router:
    return Router(routing, count, B)


def choose(one: Router, tokens: Sequence[int], salt: str, loads: Mapping[int, int]) -> Choice:
    return one.choose(one.keys(tokens, salt), loads)


def sent(one: Router, engine: int, tokens: Sequence[int], salt: str, pages: int) -> None:
    one.sent(engine, one.keys(tokens, salt), pages)


def test_without_anything_cached_the_least_loaded_is_chosen() -> None:
    assert choose(router(3), LONG, "", {0: 9, 1: 4, 2: 7}) == (1, 0)


def test_engines_that_are_alike_take_turns() -> None:
    one = router(3)
    assert [choose(one, [i], "", {0: 0, 1: 0, 2: 0}).engine for i in range(6)] == [0, 1, 2, 0, 1, 2]


def test_a_prefix_draws_a_request_until_its_engine_has_so_much_more_to_do() -> None:
    one = router()
    sent(one, 1, LONG, "", pages=100)
    assert choose(one, LONG, "", {0: 0, 1: 39}) == (1, 40)
    assert choose(one, LONG, "", {0: 0, 1: 41}).engine == 0
    assert choose(one, [*LONG[:20], *range(20)], "", {0: 0, 1: 19}).engine == 1
    assert choose(one, [*LONG[:20], *range(20)], "", {0: 0, 1: 21}).engine == 0


def test_the_load_of_a_request_is_the_work_that_is_left() -> None:
    assert remaining_tokens(5000, 0, 16) == 5016
    assert remaining_tokens(0, 1, 16) == 15  # its prompt is computed
    assert remaining_tokens(0, 1, 4000) == DECODE_TOKENS  # most outputs end before max_tokens
    assert [remaining_tokens(0, output, 16) for output in (14, 15, 16)] == [2, 1, 0]


def test_short_requests_are_spread_while_a_long_prompt_decodes_and_a_common_prefix_does_not_hold_them_together() -> None:
    for common in (0, 20):  # tokens
        one, work, count = router(), {0: remaining_tokens(0, 1, 1000), 1: 0}, {0: 0, 1: 0}
        sent(one, 0, range(5000), "", pages=10_000)
        for i in range(40):
            tokens = [*range(common), *range(6000 + 10 * i, 6010 + 10 * i)]
            engine, cached = choose(one, tokens, "", work)
            sent(one, engine, tokens, "", pages=10_000)
            work[engine] += remaining_tokens(len(tokens) - cached, 0, 16)
            count[engine] += 1
        assert min(count.values()) >= 15, (common, count)


def test_a_prefix_is_one_of_whole_pages_from_the_start_and_of_one_salt() -> None:
    one = router()
    sent(one, 1, LONG, "a", pages=100)
    for tokens, salt in ((LONG, "b"), ([0, *LONG], "a"), (LONG[4:], "a"), (LONG[:4], "a"), ([*LONG[:3], 0, *LONG[4:]], "a")):
        assert choose(one, tokens, salt, {0: 0, 1: 1}).engine == 0, (tokens, salt)
    assert choose(one, LONG[:5], "a", {0: 0, 1: 1}).engine == 1


def test_no_more_is_remembered_than_an_engine_has_pages_and_the_start_of_a_prompt_longest() -> None:
    one = router()
    sent(one, 1, LONG, "", pages=3)
    assert choose(one, LONG, "", {0: 0, 1: 3 * B - 1}).engine == 1
    assert choose(one, LONG, "", {0: 0, 1: 3 * B + 1}).engine == 0
    sent(one, 1, range(13), "", pages=3)  # takes the place of it all
    assert choose(one, LONG, "", {0: 0, 1: 1}).engine == 0


def test_an_engine_that_has_lost_its_pages_draws_nobody() -> None:
    one = router()
    sent(one, 1, LONG, "", pages=100)
    one.forget(1)
    assert choose(one, LONG, "", {0: 0, 1: 1}).engine == 0


def test_only_engines_that_serve_are_chosen() -> None:
    for routing in ("prefix", "round_robin"):
        one = router(3, routing)
        sent(one, 0, LONG, "", pages=100)
        assert {choose(one, LONG, "", {1: 50, 2: 50}).engine for _ in range(8)} == {1, 2}


def test_round_robin_heeds_nothing_but_turns() -> None:
    one = router(3, "round_robin")
    sent(one, 1, LONG, "", pages=100)
    assert [choose(one, LONG, "", {0: 9, 1: 0, 2: 5}).engine for _ in range(5)] == [0, 1, 2, 0, 1]
    assert [choose(one, LONG, "", {0: 0, 2: 0}).engine for _ in range(3)] == [2, 0, 2]


@pytest.mark.parametrize("seed", range(20))
def test_what_it_believes_cached_is_what_a_pool_of_as_many_pages_has(seed: int) -> None:
    """Requests one after the other on one engine, whose pool is asked what it really has of each."""
    rng = random.Random(seed)
    pages, one = rng.randrange(8, 30), router()
    pool = PagePool(pages + 1)
    stems = [[rng.randrange(9) for _ in range(28)] for _ in range(4)]
    for _ in range(60):
        tokens = [*rng.choice(stems)[: rng.randrange(1, 28)], *(rng.randrange(9) for _ in range(rng.randrange(1, 5)))]
        full, keys = (len(tokens) - 1) // B, []
        for i in range(full):
            content = bytes(tokens[i * B : (i + 1) * B])
            keys.append(next_key(pool.secret, keys[-1] if keys else None, content, ""))
        hits = pool.match(keys)
        assert choose(one, tokens, "", {0: 0, 1: B * len(hits) - 1}).engine == 1 or not hits
        assert choose(one, tokens, "", {0: 0, 1: B * len(hits) + 1}).engine == 0
        held = pool.allocate(full - len(hits), hits)
        assert held is not None
        for page, key in zip(held, keys, strict=True):
            pool.publish(page, key)
        pool.release(held)
        sent(one, 1, tokens, "", pages)


@pytest.mark.parametrize("seed", range(5))
def test_keys_of_a_request_that_has_grown_are_those_of_all_its_tokens(seed: int) -> None:
    rng, one = random.Random(seed), router()
    tokens = [rng.randrange(9) for _ in range(60)]
    keys = one.keys(tokens[:1], "salt")
    for end in sorted(rng.sample(range(2, 61), 9)):
        keys = one.keys(tokens[:end], "salt", keys)
        assert keys == one.keys(tokens[:end], "salt") and len(keys) == (end - 1) // B
