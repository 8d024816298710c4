"""The page pool by itself: free list, reference counts, prefix cache. Numbered checks are those of vLLM's own tests."""

from __future__ import annotations

import random

import pytest

import common.schedule.page_pool as pages_module
from common.schedule.page_pool import ROOT, PageError, PageKey, PagePool, next_key
from tests.schedule_driver import free_pages

SECRET = bytes(32)


def chain(*contents: bytes, salt: str = "", secret: bytes = SECRET) -> list[PageKey]:
    """The keys of a request whose pages hold `contents`."""
    keys: list[PageKey] = []
    for content in contents:
        keys.append(next_key(secret, keys[-1] if keys else None, content, salt))
    return keys


def hold(pool: PagePool, count: int, keys: list[PageKey] | None = None) -> list[int]:
    """Allocate `count` pages and publish the first of them under `keys`."""
    pages = pool.allocate(count)
    assert pages is not None
    for page, key in zip(pages, keys or [], strict=False):
        pool.publish(page, key)
    return pages


def test_a_new_pool_gives_out_every_page_but_the_null_page_in_order() -> None:
    pool = PagePool(5)
    assert pool.allocate(4) == [1, 2, 3, 4]
    assert pool.allocate(1) is None and pool.num_free == 0


def test_a_pool_of_the_null_page_alone_has_nothing_to_give() -> None:
    pool = PagePool(1)
    assert pool.num_free == 0 and free_pages(pool) == [] and pool.allocate(1) is None and pool.allocate(0) == []


def test_freed_pages_without_a_key_go_to_the_front_and_others_to_the_back_tail_first() -> None:
    pool = PagePool(8)
    pages = hold(pool, 4, chain(b"a", b"b", b"c"))
    pool.release(pages)
    assert free_pages(pool) == [4, 5, 6, 7, 3, 2, 1]


def test_check_5_a_page_given_out_anew_loses_its_key() -> None:
    pool, keys = PagePool(3), chain(b"a", b"b")
    pool.release(hold(pool, 2, keys))
    assert pool.match(keys) == [1, 2]
    assert pool.allocate(1) == [2]  # of one request, the tail is evicted first
    assert pool.keys[2] is None and pool.match(keys) == [1]


def test_check_6_hits_are_not_evicted_by_the_allocation_that_uses_them() -> None:
    pool, keys = PagePool(3), chain(b"a")
    wanted, other = hold(pool, 1, keys), hold(pool, 1, chain(b"z"))
    pool.release(wanted)
    pool.release(other)
    assert free_pages(pool) == [1, 2]  # the hit is the next to be evicted
    assert pool.allocate(1, pool.match(keys)) == [1, 2]
    assert pool.refs[1:] == [1, 1]


def test_check_7_a_failed_allocation_changes_nothing() -> None:
    pool, keys = PagePool(6), chain(b"a", b"b")
    hits = hold(pool, 2, keys)
    other = hold(pool, 1)
    pool.release(hits)
    before = (list(pool.refs), free_pages(pool), list(pool.keys), pool.num_free)
    assert pool.allocate(3, pool.match(keys)) is None  # two hits and three more, of four free
    assert (list(pool.refs), free_pages(pool), list(pool.keys), pool.num_free) == before
    assert pool.allocate(2, pool.match(keys)) is not None and pool.refs[other[0]] == 1


def test_check_9_the_salt_enters_the_first_key_alone_and_divides_all_that_follow() -> None:
    plain, salted = chain(b"aaaa", b"bbbb", b"cccc"), chain(b"aaaa", b"bbbb", b"cccc", salt="s")
    assert salted[0].content == b"saaaa" and salted[1].content == b"bbbb"
    pool = PagePool(8)
    hold(pool, 3, salted)
    assert len(pool.match(salted)) == 3 and pool.match(plain) == []
    assert not {key.digest for key in plain} & {key.digest for key in salted}


def test_check_10_the_cache_is_forgotten_only_when_no_page_is_held() -> None:
    pool, keys = PagePool(6), chain(b"a", b"b")
    pages = hold(pool, 3, keys)
    assert not pool.forget() and pool.match(keys) == pages[:2]
    pool.release(pages)
    assert pool.forget() and pool.match(keys) == [] and not any(pool.keys) and not pool.cached


def test_check_11_the_free_list_behaves_like_a_list_whatever_is_removed_from_where() -> None:
    rng, pool = random.Random(0), PagePool(20)
    model, held = list(range(1, 20)), []
    keys = chain(*(bytes([i]) for i in range(20)))
    for _ in range(3000):
        action = rng.random()
        if action < 0.4 and model:  # pop from the front
            assert pool.allocate(1) == [model[0]]
            held.append(model.pop(0))
        elif action < 0.6 and model:  # remove from the middle, as a hit does
            page = rng.choice(model)
            assert pool.allocate(0, [page]) == [page]
            model.remove(page)
            held.append(page)
        elif held:
            page = held.pop(rng.randrange(len(held)))
            if rng.random() < 0.5:
                pool.publish(page, keys[page])
            model.insert(0 if pool.keys[page] is None else len(model), page)
            pool.release([page])
        assert free_pages(pool) == model and pool.num_free == len(model)


def test_copies_of_one_content_are_kept_apart_and_evicting_one_leaves_the_other() -> None:
    pool, keys = PagePool(4), chain(b"a")
    first, second = hold(pool, 1, keys), hold(pool, 1, keys)
    assert pool.match(keys) == first
    pool.unpublish(first[0])
    assert pool.match(keys) == second
    pool.unpublish(second[0])
    assert pool.match(keys) == [] and not pool.cached


def test_a_match_ends_at_the_first_page_that_is_missing() -> None:
    pool, keys = PagePool(6), chain(b"a", b"b", b"c")
    pages = hold(pool, 3, keys)
    pool.unpublish(pages[1])
    assert pool.match(keys) == pages[:1]


def test_a_page_published_twice_keeps_its_first_key() -> None:
    pool, keys = PagePool(3), chain(b"a", b"b")
    page = hold(pool, 1)[0]
    pool.publish(page, keys[0])
    pool.publish(page, keys[1])
    assert pool.keys[page] == keys[0] and pool.match(keys[1:]) == []


def test_tokens_are_compared_on_a_hit_so_that_colliding_hashes_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    class OneDigest:
        def __init__(self, *args: object, **kwargs: object) -> None: ...

        def digest(self) -> bytes:
            return b"same"

    monkeypatch.setattr(pages_module, "blake2b", OneDigest)
    pool, ours, theirs = PagePool(4), chain(b"ours"), chain(b"them")
    assert ours[0].digest == theirs[0].digest
    hold(pool, 1, ours)
    assert pool.match(ours) == [1] and pool.match(theirs) == []


def test_keys_depend_on_the_process_secret_and_on_the_parent() -> None:
    assert chain(b"a")[0] != chain(b"a", secret=bytes([1]) * 32)[0]
    assert chain(b"a", b"c")[1] != chain(b"b", b"c")[1]
    assert chain(b"a")[0].parent == ROOT and chain(b"a", b"b")[1].parent == chain(b"a")[0].digest
    assert PagePool(2).secret != PagePool(2).secret


@pytest.mark.parametrize("pages", [[0], [2, 2], [3]], ids=["the null page", "one page twice", "a free page"])
def test_a_wrong_release_raises(pages: list[int]) -> None:
    pool = PagePool(4)
    assert hold(pool, 2) == [1, 2]
    with pytest.raises(PageError):
        pool.release(pages)
