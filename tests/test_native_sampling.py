"""The sampler of the native kernels, which both engines share, against the NumPy judge."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.kernels.cpu.build import build
from common.request import MAX_LOGPROBS
from tests.numpy_sampler import Filters, choices, probabilities, uniform

SLACK = 5e-6
"""Relative error of its sums, in short float32 sums of 64 terms by 16 lanes and float64: 68 * 2**-24, and exp's own 2.4e-7."""

PARAMS = np.dtype(
    [
        ("seed", np.uint32, 2),
        ("position", np.int32),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int32),
        ("score", np.int32),
        ("sampled", np.bool_),
        ("filtered", np.bool_),
        ("logprobs", np.bool_),
    ],
    align=True,
)
SAMPLED = np.dtype(
    [
        ("token", np.int32),
        ("finite", np.int32),
        ("digest", np.uint32),
        ("logprob", np.float32),
        ("rank", np.int32),
        ("top_ids", np.int32, MAX_LOGPROBS),
        ("top_logprobs", np.float32, MAX_LOGPROBS),
    ]
)

GREEDY = Filters(temperature=0.0)
MIXTURES = (
    Filters(),
    Filters(temperature=0.7),
    Filters(temperature=1.5, min_p=0.1),
    Filters(top_k=1),
    Filters(top_k=8),
    Filters(top_k=150),
    Filters(top_p=0.1),
    Filters(top_p=0.7),
    Filters(top_p=0.99),
    Filters(temperature=3.0, top_p=0.999),
    Filters(top_k=40, top_p=0.9),
    Filters(top_k=4, top_p=0.5),
    Filters(temperature=0.8, top_k=20, top_p=0.95, min_p=0.02),
    Filters(min_p=0.01, top_p=0.8),
    GREEDY,
)

Sample = Callable[..., np.ndarray]


def sampler(*options: str) -> Sample:
    """`sample(logits[R, V], filters[R], ...)` -> SAMPLED[R], by a library compiled with more options."""
    library = ctypes.CDLL(str(build("sample", options=options)))

    def sample(
        logits: np.ndarray,
        filters: Sequence[Filters],
        seeds: Any = (1, 2),
        positions: Any = 0,
        *,
        logprobs: bool = False,
        threads: int = 1,
        filtered: bool | None = None,
    ) -> np.ndarray:
        logits = np.ascontiguousarray(logits, np.float32)
        rows, vocab = logits.shape
        params = np.zeros(rows, PARAMS)
        for name in ("temperature", "top_k", "top_p", "min_p"):
            params[name] = [getattr(f, name) for f in filters]
        plain = [(f.top_k, f.top_p, f.min_p) == (0, 1.0, 0.0) for f in filters]
        params["filtered"] = np.logical_not(plain) if filtered is None else filtered
        params["sampled"], params["logprobs"] = params["temperature"] > 0, logprobs
        params["seed"], params["position"], params["score"] = seeds, positions, -1
        scratch = np.full(threads * vocab + 64, 7e7, np.float32)  # what an earlier call left, and a fence
        out = np.zeros(rows, SAMPLED)
        out.view(np.uint8)[:] = 0xA5
        pointer = lambda array: ctypes.c_void_p(array.ctypes.data)  # noqa: E731
        library.tandem_sample_rows(pointer(logits), rows, vocab, pointer(params), threads, pointer(scratch), pointer(out))
        assert (scratch[threads * vocab :] == np.float32(7e7)).all()
        assert ((out["token"] >= 0) & (out["token"] < vocab)).all()
        return out

    return sample


@pytest.fixture(scope="session", params=[(), ("-DTANDEM_PORTABLE",)], ids=["this processor", "any processor"])
def sample(request: pytest.FixtureRequest) -> Sample:
    return sampler(*request.param)


def allowed(logits: np.ndarray, filters: Filters, u: float) -> set[int]:
    """The tokens that a row may have. It divides by the temperature in float32, and so must the judge to see the same ties."""
    if filters.temperature:
        logits, filters = logits / np.float32(filters.temperature), replace(filters, temperature=1.0)
    return choices(logits, filters, u, slack=SLACK)


def wrong(got: np.ndarray, logits: np.ndarray, filters: Sequence[Filters], seeds: np.ndarray, positions: np.ndarray) -> int:
    """How many rows have a token that the judge would not choose. Most rows must allow only one."""
    sets = [
        allowed(row, f, uniform((int(seed[0]), int(seed[1])), int(position)))
        for row, f, seed, position in zip(logits, filters, seeds, positions, strict=True)
    ]
    assert sum(len(tokens) > 1 for tokens in sets) <= 1 + len(sets) // 10
    return sum(token not in tokens for token, tokens in zip(got["token"].tolist(), sets, strict=True))


def case(vocab: int, rows: int) -> tuple[np.ndarray, list[Filters], np.ndarray, np.ndarray]:
    """Random rows from flat to peaked, with every mixture: logits, filters, seeds, positions."""
    rng = np.random.default_rng(vocab)
    logits = (rng.standard_normal((rows, vocab)) * rng.choice([0.003, 0.3, 2, 6], (rows, 1))).astype(np.float32)
    logits[::7] += rng.choice([-50, 50])
    return logits, [MIXTURES[i % len(MIXTURES)] for i in range(rows)], rng.integers(0, 2**32, (rows, 2)), np.arange(rows)


def support(sample: Sample, row: np.ndarray | Sequence[Any], filters: Filters, draws: int = 1000) -> list[int]:
    """The tokens that come up in many draws from one row."""
    out = sample(np.tile(np.asarray(row, np.float32), (draws, 1)), [filters] * draws, positions=np.arange(draws))
    return np.unique(out["token"]).tolist()


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("vocab", [1, 2, 7, 16, 20, 127, 128, 129, 1000, 5003])
def test_tokens_equal_the_judges(sample: Sample, vocab: int) -> None:
    logits, filters, seeds, positions = case(vocab, 150)
    assert wrong(sample(logits, filters, seeds, positions), logits, filters, seeds, positions) == 0


def test_tokens_of_a_real_vocabulary_equal_the_judges(sample: Sample) -> None:
    logits, filters, seeds, positions = case(49_152, len(MIXTURES))
    assert wrong(sample(logits, filters, seeds, positions, threads=2), logits, filters, seeds, positions) == 0


@pytest.mark.parametrize(
    ("error", "seen_by"),
    [
        ({"temperature": 1.1}, Filters()),
        ({"top_k": 7}, Filters(top_k=8)),
        ({"top_p": 0.6}, Filters(top_p=0.7)),
        ({"min_p": 0.2}, Filters(min_p=0.1)),
        ({"top_k": 0}, Filters(top_k=8, top_p=0.9)),
        ({"temperature": 0.0}, Filters()),
    ],
    ids=str,
)
def test_the_judge_sees_a_wrong_parameter(sample: Sample, error: dict[str, Any], seen_by: Filters) -> None:
    logits, _, seeds, positions = case(129, 150)
    got = sample(logits, [replace(seen_by, **error)] * 150, seeds, positions)
    assert wrong(got, logits, [seen_by] * 150, seeds, positions) > 3


@pytest.mark.parametrize("error", ["seed", "upper seed", "position", "filters not looked at", "ids shifted"])
def test_the_judge_sees_a_wrong_step(sample: Sample, error: str) -> None:
    logits, filters, seeds, positions = case(129, 150)
    got = sample(
        logits,
        filters,
        seeds ^ [error == "seed", error == "upper seed"],
        positions + (error == "position"),
        filtered=False if error == "filters not looked at" else None,
    )
    got["token"] = (got["token"] + (error == "ids shifted")) % 129
    assert wrong(got, logits, filters, seeds, positions) > 3


def test_uniforms_equal_the_judges_bit_for_bit(sample: Sample) -> None:
    # Of 2**12 equal weights the upper 12 bits of the uniform choose one, and no sum of them is rounded.
    rng = np.random.default_rng(0)
    seeds = np.array([(0, 0), (2**32 - 1, 2**32 - 1), (1, 0), (0, 1), *rng.integers(0, 2**32, (200, 2))])
    positions = np.array([0, 2**31 - 1, 1, 1, *rng.integers(0, 2**31, 200)])
    out = sample(np.zeros((204, 4096)), [Filters()] * 204, seeds, positions)
    right = [int(uniform((int(a), int(b)), int(p)) * 4096) for (a, b), p in zip(seeds, positions, strict=True)]
    assert out["token"].tolist() == right


def test_greedy_ties_go_to_the_lowest_id(sample: Sample) -> None:
    logits = np.zeros((6, 300))
    logits[1, [7, 200, 299]] = 1
    logits[2, 299] = 1
    logits[3] = -np.inf
    logits[3, [130, 131]] = -5
    logits[4, :40] = -0.0
    logits[5] = -np.inf
    assert sample(logits, [GREEDY] * 6)["token"].tolist() == [0, 7, 299, 130, 0, 0]
    for vocab in (1, 15, 17, 127, 129, 257):
        rows = np.full((vocab, vocab), -1.0)
        rows[np.triu_indices(vocab)] = 2.5  # row i has its maximum from id i on
        assert sample(rows, [GREEDY] * vocab)["token"].tolist() == list(range(vocab))


def test_top_k_keeps_ties_at_the_kth(sample: Sample) -> None:
    row = [3, 2, 2, 2, 1, 0.0]
    kept = {k: support(sample, row, Filters(top_k=k)) for k in (1, 2, 3, 4, 5, 6, 100)}
    assert kept == {k: list(range({1: 1, 2: 4, 3: 4, 4: 4, 5: 5}.get(k, 6))) for k in kept}
    spread = np.full(2000, -3.0)
    spread[[5, 700, 701, 1500, 1999]] = [4, 3, 3, 3, 3]
    for k, tokens in ((1, [5]), (2, [5, 700, 701, 1500, 1999]), (5, [5, 700, 701, 1500, 1999])):
        assert support(sample, spread, Filters(top_k=k)) == tokens
    assert support(sample, [0.0, -0.0, -1], Filters(top_k=1)) == [0, 1]
    lanes = np.where(np.arange(256) % 128 < 16, 1.0, 0.0)  # one of the 32 highest in each lane of each block, and no other
    assert support(sample, lanes, Filters(top_k=32)) == np.flatnonzero(lanes).tolist()
    assert len(support(sample, lanes, Filters(top_k=33))) > 200


def test_ties_that_the_temperature_makes_are_kept(sample: Sample) -> None:
    high = np.float32(1.0)
    low = np.nextafter(high, np.float32(0))
    same = next(t for t in np.linspace(1, 2, 99, dtype=np.float32) if high / t == low / t)
    for filters in (Filters(top_k=1), Filters(top_p=1e-9), Filters(min_p=1.0)):
        assert support(sample, [0, low, high], replace(filters, temperature=float(same))) == [1, 2]
    assert support(sample, [0, low, high], Filters(top_k=1)) == [2]


def test_top_p_and_min_p_keep_at_least_the_likeliest(sample: Sample) -> None:
    for filters in (Filters(top_p=1e-30), Filters(min_p=1.0), Filters(top_p=1e-9, min_p=1.0, top_k=1)):
        assert support(sample, [0, 5, 0, 4.9, *[1] * 200], filters) == [1]
        assert support(sample, [1.0] * 4, filters) == [0, 1, 2, 3]


def test_filters_that_keep_all_change_nothing(sample: Sample) -> None:
    logits, _, seeds, positions = case(1000, 60)
    for filters in (Filters(), Filters(top_k=1000), Filters(top_k=2**31 - 1)):
        kept = sample(logits, [filters] * 60, seeds, positions, filtered=True)
        assert np.array_equal(kept, sample(logits, [Filters()] * 60, seeds, positions))


@pytest.mark.parametrize("share", [0.5, 0.99, 0.998])
def test_masked_logits_are_never_chosen(sample: Sample, share: float) -> None:
    logits, filters, seeds, positions = case(1003, 90)
    logits[np.random.default_rng(2).random(logits.shape) < share] = -np.inf
    logits[:, 500] = 0
    out = sample(logits, filters, seeds, positions)
    assert np.isfinite(logits[np.arange(90), out["token"]]).all() and not out["finite"].any()
    assert wrong(out, logits, filters, seeds, positions) == 0


def test_the_ends_of_the_distribution_are_reached_and_never_passed(sample: Sample) -> None:
    seeds = np.array([(4_166_419, 0), (5_994_809, 0)])  # found by search: of the least and the greatest uniform there is
    assert [uniform((int(a), int(b)), 0) for a, b in seeds] == [2.0**-24, 1 - 2.0**-24]
    rng = np.random.default_rng(0)
    for vocab in (5, 128, 129, 500, 1000):
        for spread in (0.0, 1.0, *[1.0] * 50):  # sums that are rounded up must not carry the choice past the end
            logits = np.full((2, vocab), -np.inf)
            some = np.arange(1, vocab - vocab // 3, 3)  # tokens of no weight before, between and behind
            logits[:, some] = rng.standard_normal(len(some)) * spread
            assert sample(logits, [Filters()] * 2, seeds)["token"].tolist() == [1, some[-1]]


def test_extreme_temperatures_and_logits(sample: Sample) -> None:
    logits, _, seeds, positions = case(1000, 60)
    for filters in (Filters(temperature=1e-5), Filters(temperature=100.0), Filters(temperature=100.0, top_p=0.9, min_p=0.99)):
        assert wrong(sample(logits, [filters] * 60, seeds, positions), logits, [filters] * 60, seeds, positions) == 0
    peak = sample(logits, [GREEDY] * 60)["token"]
    # Over such a temperature they overflow: the limit is the likeliest.
    for scale in (1e34, 1e30):
        hot = sample(logits * np.float32(scale), [Filters(temperature=1e-5, top_k=5, top_p=0.9)] * 60, seeds, positions)
        assert np.array_equal(hot["token"], peak)


def test_rows_that_are_not_numbers_are_marked_and_leave_the_others_alone(sample: Sample) -> None:
    logits, filters, seeds, positions = case(300, 45)
    before = sample(logits, filters, seeds, positions, logprobs=True)
    assert before["finite"].all()
    places = np.random.default_rng(1).integers(0, 300, 45)
    places[:3] = 0, 299, 255
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        rows = logits.copy()
        rows[::3, places[::3]] = bad
        rows[3] = bad
        after = sample(rows, filters, seeds, positions, logprobs=True)
        touched = ~np.isfinite(rows).all(axis=1)
        assert np.array_equal(after["finite"], ~touched)
        assert np.array_equal(after[~touched], before[~touched])
        if bad != -np.inf:  # those are masks
            assert np.array_equal(after["token"][touched], sample(rows[touched], [GREEDY] * touched.sum())["token"])
            assert np.isnan(after["logprob"][touched]).all()
        assert ((after["rank"] >= 1) & (after["rank"] <= 300)).all() and (
            (after["top_ids"] >= 0) & (after["top_ids"] < 300)
        ).all()


# ── a pure function of the row ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_row_depends_on_no_thread_neighbour_or_address(sample: Sample) -> None:
    logits, filters, seeds, positions = case(1003, 60)  # odd: rows begin at every alignment
    once = sample(logits, filters, seeds, positions, logprobs=True)
    for threads in (1, 2, 3):
        order = np.random.default_rng(threads).permutation(60)
        mixed = [filters[i] for i in order]
        again = sample(logits[order], mixed, seeds[order], positions[order], logprobs=True, threads=threads)
        assert again.tobytes() == once[order].tobytes()


FORKED = """
import os, signal, threading
from tests.test_native_sampling import case, sampler

sample = sampler()
logits, filters, seeds, positions = case(1003, 60)
run = lambda: sample(logits, filters, seeds, positions, threads=3).tobytes()
once, ended = run(), threading.Event()

def compute():
    while not ended.is_set():
        run()

other = threading.Thread(target=compute)
other.start()
for _ in range(10):
    if not (child := os.fork()):
        signal.alarm(600)  # rather than hang for ever
        os._exit(run() != once)
    if status := os.waitpid(child, 0)[1]:
        break
ended.set()
other.join()
assert status == 0, status
"""


def test_a_process_forked_while_kernels_run_computes_with_a_team_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_both_ways_to_compile_it_give_the_same_bits() -> None:
    logits, filters, seeds, positions = case(5003, 60)
    logits[::5, ::3] = -np.inf
    one, other = (
        build_(logits, filters, seeds, positions, logprobs=True) for build_ in (sampler(), sampler("-DTANDEM_PORTABLE"))
    )
    assert one.tobytes() == other.tobytes()


def test_the_digest_sees_every_bit(sample: Sample) -> None:
    for vocab in (1, 17, 200):
        row = np.random.default_rng(vocab).standard_normal(vocab).astype(np.float32)
        flipped = np.tile(row.view(np.uint32), (vocab * 32, 1))
        flipped[np.arange(vocab * 32), np.arange(vocab * 32) // 32] ^= np.uint32(1) << (
            np.arange(vocab * 32, dtype=np.uint32) % 32
        )
        digests = sample(flipped.view(np.float32), [GREEDY] * (vocab * 32))["digest"]
        whole = sample(row[None], [Filters(top_k=3)], logprobs=True)["digest"]
        assert not (digests == whole).any()
        # As unlikely to be equal to each other as random numbers are.
        assert len(np.unique(digests)) >= vocab * 32 - 3


def test_the_digest_sees_order_and_pairs_of_signs(sample: Sample) -> None:
    for vocab in (64, 700):
        row = np.random.default_rng(0).standard_normal(vocab).astype(np.float32)
        rows = [row]
        pairs = [(i, i + distance) for distance in (1, 16, 64, 128) for i in range(vocab - distance)]
        for i, j in pairs:
            swapped, signs = row.copy(), row.copy()
            swapped[[i, j]] = row[[j, i]]
            signs[[i, j]] *= -1
            rows += [swapped, signs]
        digests = sample(np.stack(rows), [GREEDY] * len(rows))["digest"]
        # As unlikely to be equal as random numbers are.
        assert not (digests[1:] == digests[0]).any() and len(np.unique(digests)) >= len(rows) - 3


# ── logprobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("vocab", [1, 7, 19, 20, 21, 129, 2000, 49_152])
def test_logprobs_and_ranks_equal_the_judges_ties_included(sample: Sample, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    rows = 30 if vocab < 10_000 else 9
    logits = rng.standard_normal((rows, vocab)).astype(np.float32) * 3
    logits[0], logits[1], logits[2] = np.sort(logits[0]), 1.5, np.sort(logits[2])[::-1]
    logits[3 : rows // 2] = np.round(logits[3 : rows // 2])  # many ties, as bfloat16 has them
    logits[-1, rng.random(vocab) < 0.9] = -np.inf
    logits[-1, vocab // 2] = 1
    out = sample(logits, [Filters(), Filters(top_k=3), GREEDY] * (rows // 3), (3, 4), np.arange(rows), logprobs=True)
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    row, k = np.arange(rows), min(MAX_LOGPROBS, vocab)
    near = lambda got, right: np.isclose(got, right, rtol=2**-24, atol=SLACK)  # noqa: E731
    assert near(out["logprob"], exact[row, out["token"]]).all()
    assert out["rank"].tolist() == (1 + (logits > logits[row, out["token"]][:, None]).sum(axis=1)).tolist()
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    assert np.array_equal(out["top_ids"][:, :k], order)
    assert near(out["top_logprobs"][:, :k], np.take_along_axis(exact, order, 1)).all()
    assert (out["top_ids"][:, k:] == 0).all() and (out["top_logprobs"][:, k:] == -np.inf).all()


def test_logprobs_are_of_the_raw_logits_whatever_the_filters(sample: Sample) -> None:
    logits, _, seeds, positions = case(1000, 60)
    out = sample(logits, [Filters(temperature=0.1, top_k=2, top_p=0.5)] * 60, seeds, positions, logprobs=True)
    exact = np.array([np.log(probabilities(row, Filters())[token]) for row, token in zip(logits, out["token"], strict=True)])
    assert np.isclose(out["logprob"], exact, rtol=2**-24, atol=SLACK).all()
