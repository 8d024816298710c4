"""Sampling on both backends against the NumPy judge, and against statistics."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

from common.batch import Batch
from common.kernels.cpu.step import pack_changes, pack_step
from common.request import MAX_LOGPROBS, Request, SamplingParams
from common.sampling.logits_processor import LogitsProcessor
from common.schedule.prepare import prepare
from common.system.hardware import cxx_compiler
from tests.backends import call, device, part
from tests.numpy_sampler import Filters, adjusted, choices, probabilities, threefry, uniform

NATIVE = pytest.param("native", marks=pytest.mark.skipif(cxx_compiler() is None, reason="there is no C++ compiler"))

SLACK = 1e-5
"""Relative error of the engines' float32 sums over V <= 1000 weights: (128 + V / 128) * 2**-24 = 8e-6, and exp's own 1e-6."""

MIXTURES = (
    Filters(),
    Filters(temperature=0.7),
    Filters(temperature=1.5, min_p=0.1),
    Filters(top_k=8),
    Filters(top_k=16),
    Filters(top_p=0.5),
    Filters(top_p=0.7),
    Filters(top_p=0.99),
    Filters(top_k=8, top_p=0.9),
    Filters(top_k=4, top_p=0.5),
    Filters(temperature=0.8, top_k=20, top_p=0.95, min_p=0.02),
)


def numbers(filters: list[Filters]) -> tuple[np.ndarray, ...]:
    """temperature, top_k, top_p, min_p as a step carries them."""
    kinds = (("temperature", np.float32), ("top_k", np.int32), ("top_p", np.float32), ("min_p", np.float32))
    return tuple(np.array([getattr(f, name) for f in filters], kind) for name, kind in kinds)


def uniforms(backend: str, seeds: Any, positions: Any) -> np.ndarray:
    return call(backend, part(backend, "sampling").uniform, np.array(seeds, np.uint32), np.array(positions, np.int32))


def sample(backend: str, logits: np.ndarray, filters: list[Filters], u: np.ndarray) -> np.ndarray:
    """Tokens of rows, with the filters' path taken as the runner takes it: if any row filters."""
    filtered = any((f.top_k, f.top_p, f.min_p) != (0, 1.0, 0.0) for f in filters)
    run = lambda *arrays: part(backend, "sampling").sample(*arrays, filtered)  # noqa: E731
    return call(backend, run, logits.astype(np.float32), *numbers(filters), u.astype(np.float32))


def kept(backend: str, logits: np.ndarray, filters: list[Filters]) -> np.ndarray:
    """Which tokens the filters keep: bool[R, V]."""
    _, top_k, top_p, min_p = numbers(filters)
    out = call(backend, part(backend, "sampling").keep, logits.astype(np.float32), top_k, top_p, min_p)
    assert not np.isnan(out).any()
    return np.isfinite(out)


# ── the uniform ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("key", "counter", "answer"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_the_judge_gives_the_known_answers(key: tuple[int, int], counter: tuple[int, int], answer: tuple[int, int]) -> None:
    assert threefry(key, counter) == answer


def test_uniforms_equal_the_judges_bit_for_bit(backend: str) -> None:
    rng = np.random.default_rng(0)
    seeds = [(0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (1, 0), (0, 1), *rng.integers(0, 2**32, (500, 2)).tolist()]
    positions = [0, 2**31 - 1, 1, 1, *rng.integers(0, 2**31, 500).tolist()]
    got = uniforms(backend, seeds, positions)
    assert got.dtype == np.float32 and got[0] == ((0x6B200159 >> 9) + 0.5) * 2**-23
    assert got.tolist() == [uniform(seed, position) for seed, position in zip(seeds, positions, strict=True)]
    assert got.min() > 0 and got.max() < 1


@pytest.mark.parametrize("step", [(0, 0, 1), (1, 0, 0), (0, 1, 0)], ids=["position", "seed", "upper seed"])
def test_neighbours_are_independent(backend: str, step: tuple[int, int, int]) -> None:
    n, cells = 10_000, 10
    low, high, at = step
    base = np.arange(n) * 7
    one = uniforms(backend, np.stack((base, base // 3), 1), base % 4096)
    other = uniforms(backend, np.stack((base + low, base // 3 + high), 1), base % 4096 + at)
    grid, *_ = np.histogram2d(one, other, bins=cells, range=((0, 1), (0, 1)))
    assert stats.chisquare(grid.ravel()).pvalue > 0.001


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 1000])
def test_tokens_equal_the_judges(backend: str, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    filters = [MIXTURES[i % len(MIXTURES)] for i in range(600)]
    filters[::50] = [Filters(temperature=0.0)] * len(filters[::50])
    logits = (rng.standard_normal((600, vocab)) * rng.choice([0.3, 2, 6], (600, 1))).astype(np.float32)
    u = uniforms(backend, rng.integers(0, 2**32, (600, 2)), range(600))
    tokens = sample(backend, logits, filters, u)
    allowed = [choices(*row, slack=SLACK) for row in zip(logits, filters, u.tolist(), strict=True)]
    assert all(token in set_ for token, set_ in zip(tokens.tolist(), allowed, strict=True))
    # A row is open if a boundary lies within SLACK on either side: about 2 * SLACK * V of the rows if the weights were equal.
    undecided = sum(len(set_) > 1 for set_ in allowed)
    assert undecided <= 2 + 600 * 2 * SLACK * vocab


def test_a_row_does_not_depend_on_the_rows_beside_it(backend: str) -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((12, 300)) * 3
    u = rng.random(12)
    plain = sample(backend, logits, [Filters()] * 12, u)
    mixed = [Filters() if i % 2 else MIXTURES[i % len(MIXTURES)] for i in range(12)]
    beside = sample(backend, logits, mixed, u)
    assert beside[1::2].tolist() == plain[1::2].tolist()
    order = rng.permutation(12)
    assert sample(backend, logits[order], [mixed[i] for i in order], u[order]).tolist() == beside[order].tolist()


def test_greedy_ties_go_to_the_lowest_id(backend: str) -> None:
    logits = np.zeros((4, 300), np.float32)
    logits[1, [7, 200, 299]] = 1
    logits[2, [299]] = 1
    logits[3] = -np.inf
    logits[3, [130, 131]] = -5
    assert call(backend, part(backend, "sampling").greedy, logits).tolist() == [0, 7, 299, 130]
    assert sample(backend, logits, [Filters(temperature=0.0)] * 4, np.full(4, 0.99)).tolist() == [0, 7, 299, 130]


def test_the_ends_of_the_distribution_are_reached_and_never_passed(backend: str) -> None:
    # The least and the greatest uniform there is, tokens of no weight before, between and behind those that have some.
    ends = np.array([0.5 * 2**-23, 1 - 0.5 * 2**-23])
    for vocab in (5, 128, 129, 500, 1000):
        logits = np.full((2, vocab), -np.inf)
        logits[:, 1:-1:3] = 0.25
        tokens = sample(backend, logits, [Filters()] * 2, ends)
        assert tokens.tolist() == [1, np.flatnonzero(np.isfinite(logits[0]))[-1]]


# ── distributions ────────────────────────────────────────────────────────────────────────────────────────────────────────

DRAWS, WORDS = 10_000, 40
LOGITS = np.random.default_rng(5).standard_normal(WORDS).astype(np.float32) * 1.5
OUTPUT = (3, 3, 9, 14, 3, 27)
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.8},
    {"logit_bias": {1: 2.5, 9: -1.5, 20: 1.0, 33: -100.0}, "min_tokens": 9, "stop_token_ids": [5, 6]},
    {"allowed_token_ids": [*range(2, WORDS, 3), 3, 9], "presence_penalty": 0.9},
    {"logit_bias": {3: 2.0}, "allowed_token_ids": list(range(30)), "repetition_penalty": 0.7},
)


def asking(filters: Filters, change: dict[str, Any]) -> Request:
    """A request that samples and changes logits like that; it has some bad words too, if it changes any."""
    words = ((12,), (27, 22), (14, 3, 27, 8), (3, 28)) if change else ()
    params = SamplingParams(max_tokens=20, **asdict(filters), **change)
    return Request(request_id="r", prompt_token_ids=(2, 9, 30), params=params, bad_words=words)


def draw(backend: str, kernels: str, request: Request) -> np.ndarray:
    """Tokens of as many requests behind `OUTPUT`, that have nothing but their seeds of their own."""
    params, each, ones = request.params, np.arange(DRAWS), np.ones(DRAWS)
    views = {"token_ids": 0 * each, "positions": 12 * ones, "kv_lengths": 13 * ones, "rows": each, "num_decodes": [DRAWS]}
    views |= {"query_starts": np.arange(DRAWS + 1), "logit_rows": each, "logit_owner": each, "want": ones}
    views |= {"page_table": np.zeros((1, DRAWS, 1)), "slots": np.zeros((1, DRAWS)), "copies": np.zeros((1, 0, 2))}
    views |= {"fill_at": [], "fill_row": [], "seeds": np.stack((each, 77 * ones), 1)}
    views |= {name: getattr(params, name) * ones for name in ("temperature", "top_k", "top_p", "min_p")}
    plan = prepare(request, WORDS).plan
    if plan is not None:
        edits = LogitsProcessor(plan)
        for token in OUTPUT:
            edits.append(token)
        ids, values = edits.at(OUTPUT, len(OUTPUT))
        if len(ids):
            views |= {"edit_rows": each.repeat(len(ids)), "edit_ids": np.tile(ids, DRAWS), "edits": np.tile(values, (DRAWS, 1))}
        if edits.allowed is not None:
            views |= {"mask_rows": each, "masks": np.tile(edits.allowed, (DRAWS, 1))}
    batch = Batch.pack(**views)
    return (by_kernels if kernels == "native" else by_framework)(backend, batch, np.tile(LOGITS, (DRAWS, 1)))


def by_framework(backend: str, batch: Batch, logits: np.ndarray) -> np.ndarray:
    lib = part(backend, "sampling")
    if batch.mask_rows is not None:
        logits = call(backend, lib.mask, logits, batch.mask_rows, batch.masks)
    if batch.edit_rows is not None:
        logits = call(backend, lib.edit, logits, batch.edit_rows, batch.edit_ids, batch.edits)
    run = lambda x, seeds, positions, *filters: lib.sample(x, *filters, lib.uniform(seeds, positions), True)  # noqa: E731
    filters = (batch.temperature, batch.top_k, batch.top_p, batch.min_p)
    tokens: np.ndarray = call(backend, run, logits, batch.seeds, batch.positions + 1, *filters)
    return tokens


def by_kernels(backend: str, batch: Batch, logits: np.ndarray) -> np.ndarray:
    lib = part(backend, "kernels")
    lib.open_library()

    def run(step: Any, changes: Any, logits: Any, last: Any) -> Any:
        changed = lib.adjust(step, changes, logits) if batch.adjusts else None
        return lib.sample(part(backend, "step").State(None, last, logits), step, changed)[0]

    arrays = pack_step(batch), pack_changes(batch) if batch.adjusts else np.zeros(4, np.int32), logits
    inputs = part(backend, "arrays").to_device((*arrays, np.zeros(DRAWS, np.int32)), device(backend))
    sampled = (jax.jit(run) if backend == "jax" else run)(*inputs)
    tokens: np.ndarray = part(backend, "arrays").to_host(sampled)[:, 0]
    return tokens


def follows(tokens: np.ndarray, request: Request) -> bool:
    """Whether tokens are drawn from what the judge makes of the logits: no other comes up, and chi-square finds nothing."""
    p, params = adjusted(LOGITS, request, OUTPUT), request.params
    p = probabilities(p, Filters(**{name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}))
    counts = np.bincount(tokens, minlength=WORDS)
    common = p * DRAWS >= 5
    seen, expected = np.append(counts[common], counts[~common].sum()), np.append(p[common], p[~common].sum()) * DRAWS
    some = expected > 0
    return not counts[p == 0].any() and bool(stats.chisquare(seen[some], expected[some]).pvalue > 0.001)


@pytest.mark.parametrize("kernels", ["framework", NATIVE])
@pytest.mark.parametrize("number", range(len(MIXTURES)), ids=lambda i: str(MIXTURES[i]))
def test_ten_thousand_samples_follow_the_distribution(backend: str, kernels: str, number: int) -> None:
    for change in ({}, CHANGES[1 + number % (len(CHANGES) - 1)]):
        request = asking(MIXTURES[number], change)
        assert follows(draw(backend, kernels, request), request), change


@pytest.mark.parametrize("kernels", ["framework", NATIVE])
@pytest.mark.parametrize(
    ("filter_", "change"),
    [
        ({"temperature": 0.75}, {}),
        ({"top_k": 9}, {}),
        ({"top_p": 0.85}, {}),
        ({"min_p": 0.05}, {}),
        ({}, {"repetition_penalty": 1.0}),
        ({}, {"frequency_penalty": 0.0}),
        ({}, {"presence_penalty": 0.0}),
        ({}, {"logit_bias": {13: 0.3}}),
        ({}, {"allowed_token_ids": [token for token in range(WORDS) if token != 13]}),
    ],
    ids=lambda error: "".join(error),
)
def test_a_wrong_sampler_does_not_follow_it(
    backend: str, kernels: str, filter_: dict[str, Any], change: dict[str, Any]
) -> None:
    filters = Filters(temperature=0.7, top_k=8 if "top_k" in filter_ else 0, top_p=0.8 if "top_p" in filter_ else 1.0)
    changes = CHANGES[1] if change else {}
    right, wrong = asking(filters, changes), asking(replace(filters, **filter_), changes | change)
    assert follows(draw(backend, kernels, right), right)
    assert not follows(draw(backend, kernels, wrong), right)


# ── filters ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_filters_keep_what_the_judge_keeps(backend: str) -> None:
    rng = np.random.default_rng(11)
    filters = [MIXTURES[i % len(MIXTURES)] for i in range(330)]
    filters = [Filters(top_k=f.top_k, top_p=f.top_p, min_p=f.min_p) for f in filters]  # temperature comes before
    logits = (rng.standard_normal((330, 200)) * 2).astype(np.float32)
    got = kept(backend, logits, filters)
    right = np.stack([probabilities(*row) > 0 for row in zip(logits, filters, strict=True)])
    # No boundary of these 330 rows is as near as float32 rounds, so nothing is undecided.
    assert np.array_equal(got, right)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_masked_logits_are_never_kept_and_never_make_nan(backend: str, share: float) -> None:
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((22, 1000))
    logits[rng.random(logits.shape) < share] = -np.inf
    filters = [MIXTURES[i % len(MIXTURES)] for i in range(22)]
    tokens = sample(backend, logits, filters, rng.random(22))
    assert ((tokens >= 0) & (tokens < 1000)).all()
    if share < 1:
        keep = kept(backend, logits, filters)
        assert keep.any(axis=1).all() and not keep[np.isinf(logits)].any()
        assert all(row.sum() <= f.top_k for row, f in zip(keep, filters, strict=True) if f.top_k)
        assert np.isfinite(logits[np.arange(22), tokens]).all()


def test_top_k_keeps_ties_at_the_kth(backend: str) -> None:
    logits = np.array([[3, 2, 2, 2, 1, 0.0]])
    by_k = {k: kept(backend, logits, [Filters(top_k=k)])[0].sum() for k in (0, 1, 2, 3, 4, 5, 6, 100)}
    assert by_k == {0: 6, 1: 1, 2: 4, 3: 4, 4: 4, 5: 5, 6: 6, 100: 6}


def test_zeros_of_both_signs_tie(backend: str) -> None:
    for row in ([0.0, -0.0, -1.0], [-0.0, 0.0, -1.0]):
        logits = np.array([row])
        for filters in (Filters(top_k=1), Filters(top_k=2), Filters(top_p=0.3)):
            assert kept(backend, logits, [filters]).tolist() == [[True, True, False]]


def test_top_k_alone_is_top_k_with_a_top_p_of_one(backend: str) -> None:
    logits = np.random.default_rng(4).standard_normal((5, 3000)) * 0.1
    one = kept(backend, logits, [Filters(top_k=k) for k in (1, 10, 100, 2999, 0)])
    assert one.sum(axis=1).tolist() == [1, 10, 100, 2999, 3000]


def test_top_p_and_min_p_keep_at_least_the_likeliest(backend: str) -> None:
    logits = np.array([[0.0, 5.0, 0.0, 4.9], [1.0, 1.0, 1.0, 1.0]])
    for filters in (Filters(top_p=1e-9), Filters(min_p=1.0), Filters(top_p=1e-9, min_p=1.0, top_k=1)):
        assert kept(backend, logits, [filters] * 2).tolist() == [[False, True, False, False], [True] * 4]


def test_logits_that_are_not_numbers_give_a_token_all_the_same(backend: str) -> None:
    logits = np.random.default_rng(0).standard_normal((4, 300))
    logits[1], logits[2, 17], logits[3, 5] = np.nan, np.nan, np.inf
    u = np.full(4, 0.5)
    beside = sample(backend, logits[:1], [MIXTURES[-1]], u[:1])
    for filters in (Filters(), MIXTURES[-1], Filters(temperature=0.0)):
        tokens = sample(backend, logits, [MIXTURES[-1], *[filters] * 3], u)
        assert ((tokens >= 0) & (tokens < 300)).all() and tokens[0] == beside[0]


# ── changes ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def changes(rows: int, vocab: int) -> dict[str, np.ndarray]:
    """Random masks and edits of every kind, as a batch carries them; row 1 has two masks."""
    rng = np.random.default_rng(vocab)
    places = np.sort(rng.choice(rows * vocab, rows * vocab // 2, replace=False))
    edits = np.stack(
        (rng.choice([0, 3.5, -np.inf], len(places)), rng.choice([1, 1.3, 0.7], len(places)), rng.random(len(places))), 1
    )
    masks = rng.integers(0, 2**32, (3, -(-vocab // 32)), np.uint32)
    return {
        "mask_rows": np.array([0, 1, 1], np.int32),
        "masks": masks,
        "edit_rows": (places // vocab).astype(np.int32),
        "edit_ids": (places % vocab).astype(np.int32),
        "edits": edits.astype(np.float32),
    }


def changed(logits: np.ndarray, c: dict[str, np.ndarray]) -> np.ndarray:
    """One after the other, in float32: every engine's arithmetic."""
    x = logits.copy()
    for row, mask in zip(c["mask_rows"], c["masks"], strict=True):
        x[row, [v for v in range(x.shape[1]) if not mask[v // 32] >> np.uint32(v % 32) & np.uint32(1)]] = -np.inf
    for row, token, (bias, repetition, penalty) in zip(c["edit_rows"], c["edit_ids"], c["edits"], strict=True):
        y = x[row, token] + bias
        x[row, token] = (y / repetition if y > 0 else y * repetition) - penalty
    return x


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 200])
def test_masks_and_edits_are_exact(backend: str, vocab: int) -> None:
    logits = np.random.default_rng(0).standard_normal((4, vocab)).astype(np.float32) * 5
    c, lib = changes(4, vocab), part(backend, "sampling")
    got = call(backend, lambda x, a, b, *edits: lib.edit(lib.mask(x, a, b), *edits), logits, *c.values())
    assert np.array_equal(got, changed(logits, c))


# ── logprobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("vocab", [5, 129, 2000])
def test_logprobs_and_ranks_equal_the_judges_ties_included(backend: str, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.standard_normal((30, vocab)).astype(np.float32) * 3
    logits[10:20] = np.round(logits[10:20])  # many ties, as bfloat16 has them, and zeros of both signs
    logits[20] = 1.5
    tokens = rng.integers(0, vocab, 30).astype(np.int32)
    logprobs, ranks, top_ids, top_logprobs = call(backend, part(backend, "sampling").logprobs_of, logits, tokens)
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    chosen = logits[np.arange(30), tokens]
    k = min(MAX_LOGPROBS, vocab)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    assert ranks.tolist() == (1 + (logits > chosen[:, None]).sum(axis=1)).tolist()
    assert np.array_equal(top_ids, order)
    # |logprob| < 32 is rounded to 2**-19 = 2e-6, and so is the normaliser.
    assert np.abs(logprobs - exact[np.arange(30), tokens]).max() < 5e-6
    assert np.abs(top_logprobs - np.take_along_axis(exact, order, 1)).max() < 5e-6
