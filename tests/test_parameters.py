"""Every sampling parameter, through whole engines: each token and each logprob is what the NumPy judge makes of the engine's
own logits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from common.config import EngineConfig
from common.engine import Engine
from common.errors import RequestError
from common.interface import Caps, KVGroup, ModelRunner, Pending, Progress, load_backend
from common.platform import cxx_compiler
from common.request import Logprobs, Request, SamplingParams, TokenEvent
from common.schedule.batch import Batch, Mask, Want, masked
from common.schedule.seeds import mix64
from tests.backends import Packer, checkpoint, engine_config, shared_runner
from tests.numpy_sampler import Filters, adjusted, choices, scores, uniform

MODEL = "tiny-llama"
VOCAB = checkpoint(MODEL).config.vocab_size
PAGES = 48
SLACK = 1e-4
"""Relative error of a weight: its logit, of up to 100 after a bias, is rounded a few times, and so are sums."""
EOS = (7,)


class Judged(ModelRunner):
    """Passes every call on, and keeps the raw logits of every step with what they were for."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.engine: Engine
        self.sampled: dict[tuple[str, int], np.ndarray] = {}
        """(request, place in its output) → logits."""
        self.scored: dict[tuple[str, int], np.ndarray] = {}
        """(request, place in its prompt) → logits."""
        self.changed = 0

    def submit(self, batch: Batch, mask: Mask = None) -> Pending:
        batch = masked(batch, mask)
        names: Collection[str] = ("logits", "tokens")
        taps = self._runner.observe(batch, names)
        running = {seq.row: seq for seq in self.engine.scheduler.running}
        self.changed += batch.adjusts
        for r, owner in enumerate(batch.logit_owner):
            seq = running[int(batch.rows[owner])]
            if batch.want[r] & Want.SAMPLE:
                self.sampled[seq.request.request_id, len(seq.output)] = taps["logits"][r]
            else:
                at = int(batch.positions[batch.logit_rows[r]]) + 1
                self.scored[seq.request.request_id, at] = taps["logits"][r]
        pending = self._runner.submit(batch)  # the same step again: it writes what is there
        sample = (batch.want & Want.SAMPLE) > 0
        assert pending.result().tokens.tolist() == taps["tokens"][sample].tolist()
        return pending

    @property
    def caps(self) -> Caps:
        return self._runner.caps

    @property
    def compilations(self) -> int:
        return self._runner.compilations

    def load(self, checkpoint: Any, progress: Progress | None = None) -> None:
        raise NotImplementedError

    def kv_groups(self) -> tuple[KVGroup, ...]:
        return self._runner.kv_groups()

    def allocate(self, pages_per_group: Sequence[int]) -> None:
        raise NotImplementedError

    def warmup(self, progress: Progress | None = None) -> None:
        raise NotImplementedError

    def read_pages(self, group: int, pages: Sequence[int]) -> dict[str, np.ndarray]:
        return self._runner.read_pages(group, pages)

    def write_pages(self, group: int, pages: Sequence[int], arrays: dict[str, np.ndarray]) -> None:
        self._runner.write_pages(group, pages, arrays)

    def reset(self) -> None:
        self._runner.reset()

    def close(self) -> None:
        pass


NATIVE = pytest.param("native", marks=pytest.mark.skipif(cxx_compiler() is None, reason="there is no C++ compiler"))


@pytest.fixture(params=["framework", NATIVE])
def config(request: pytest.FixtureRequest) -> EngineConfig:
    return engine_config(kernels=request.param, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128)


def judged_run(backend: str, config: EngineConfig, requests: list[Request], few: int = PAGES) -> tuple[Judged, dict, Engine]:
    """The requests' events, held against the judge."""
    runner = shared_runner(backend, MODEL, PAGES, replace(config, seed=0))
    spy = Judged(runner)
    engine = spy.engine = Engine(spy, config, num_pages=few)
    events = engine.run(requests)
    assert engine.stats()["num_resets"] == 0
    undecided = 0
    for number, request in enumerate(requests):
        undecided += judge(spy, request, number, events[request.request_id], config.seed)
    assert undecided <= 2 + len(spy.sampled) // 10
    return spy, events, engine


def judge(spy: Judged, request: Request, number: int, events: list[TokenEvent], engine_seed: int) -> int:
    """How many tokens of a request the judge leaves open; every token must be one that it allows."""
    params, name, output, undecided = request.params, request.request_id, [], 0
    seed = mix64(engine_seed, number) if params.seed is None else params.seed
    filters = (
        Filters(temperature=0.0)
        if params.greedy
        else Filters(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p)
    )
    for i, event in enumerate(events):
        token, raw = event.token_id, spy.sampled[name, i]
        assert token is not None
        x = adjusted(raw, request, output)
        u = uniform((seed & 0xFFFF_FFFF, seed >> 32), len(request.prompt_token_ids) + i)
        allowed = choices(x, filters, u, slack=SLACK)
        if params.greedy:
            allowed |= set(np.flatnonzero(x >= x.max() - SLACK).tolist())
        assert token in allowed, (name, i, params)
        assert np.isfinite(x[token]), (name, i, params)
        undecided += len(allowed) > 1
        check_scores(event.logprobs, raw, token, params.logprobs)
        assert (event.prompt_logprobs is not None) == (i == 0 and params.prompt_logprobs is not None)
        output.append(token)
    if params.prompt_logprobs is not None:
        got = events[0].prompt_logprobs
        assert got is not None and len(got) == len(request.prompt_token_ids) and got[0] is None
        for at, token in list(enumerate(request.prompt_token_ids))[1:]:
            check_scores(got[at], spy.scored[name, at], token, params.prompt_logprobs)
    return undecided


def check_scores(got: Logprobs | None, logits: np.ndarray, token: int, k: int | None) -> None:
    if k is None:
        assert got is None
        return
    logprob, rank, top, top_logprobs = scores(logits, token, k)
    assert got is not None and abs(got.logprob - logprob) < 1e-5
    assert abs(got.rank - rank) <= 1 and len(got.top_ids) == k
    assert np.allclose(got.top_logprobs, top_logprobs, atol=1e-5)
    assert set(got.top_ids[: k - 1]) <= {*top, *scores(logits, token, k + 1)[2]}


def request(name: str, prompt: Sequence[int], bad_words: Sequence[Sequence[int]] = (), **params: Any) -> Request:
    texts = ["x"] * bool(bad_words)
    return Request(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(bad_words=texts, **params),
        bad_words=tuple(map(tuple, bad_words)),
        eos_token_ids=EOS,
    )


PROMPT = np.random.default_rng(0).integers(0, VOCAB, 40).tolist()

VALUES: dict[str, tuple[Any, ...]] = {
    "temperature": (0.0, 1.0, 0.6),
    "top_k": (0, 5),
    "top_p": (1.0, 0.8),
    "min_p": (0.0, 0.05),
    "presence_penalty": (0.0, 1.5, -1.0),
    "frequency_penalty": (0.0, 0.7),
    "repetition_penalty": (1.0, 1.4, 0.8),
    "logit_bias": (None, {3: 4.0, 11: 100.0, 12: 99.5, 20: -100.0}),
    "allowed_token_ids": (None, tuple(range(5, VOCAB, 3))),
    "bad_words": ((), ((11,), (12, 11), (8, 17, 23))),
    "min_tokens": (0, 4),
    "stop_token_ids": ((), (11, 12)),
    "ignore_eos": (False, True),
    "logprobs": (None, 0, 3),
    "prompt_logprobs": (None, 0, 4),
    "seed": (None, 5),
}


def pairwise(values: dict[str, tuple[Any, ...]], least: int, seed: int) -> list[dict[str, Any]]:
    """Random settings until every pair of values of every two names has come up, and `least` of them."""
    rng = np.random.default_rng(seed)
    names = list(values)
    missing = {
        (a, i, b, j)
        for k, a in enumerate(names)
        for b in names[k + 1 :]
        for i, j in product(range(len(values[a])), range(len(values[b])))
    }
    drawn = []
    while missing or len(drawn) < least:
        trials = [{name: int(rng.integers(len(values[name]))) for name in names} for _ in range(20)]
        covers = [{(a, t[a], b, t[b]) for k, a in enumerate(names) for b in names[k + 1 :]} & missing for t in trials]
        best = max(range(len(trials)), key=lambda i: len(covers[i]))
        missing -= covers[best]
        drawn.append({name: values[name][i] for name, i in trials[best].items()})
    return drawn


def test_requests_drawn_over_all_parameters_are_what_the_judge_says(backend: str, config: EngineConfig) -> None:
    rng = np.random.default_rng(3)
    requests = []
    for i, params in enumerate(pairwise(VALUES, 110, 1)):
        start, length = int(rng.integers(0, 20)), int(rng.integers(1, 20))
        requests.append(request(str(i), PROMPT[start : start + length], max_tokens=int(rng.integers(5, 9)), **params))
    spy, events, _ = judged_run(backend, config, requests)
    assert spy.changed > 50 and all(e[-1].finish for e in events.values())
    tokens = {token.token_id for e in events.values() for token in e}
    assert {11, 12} <= tokens and len(tokens) > 40


def test_pages_that_run_out_and_chunks_change_no_score(backend: str, config: EngineConfig) -> None:
    """Check 29: prompts longer than a step and than the logit rows, and too few pages for all."""
    requests = [
        request(
            str(i), (PROMPT + PROMPT)[i : i + 50], max_tokens=30, prompt_logprobs=2, repetition_penalty=1.3, ignore_eos=True
        )
        for i in range(4)
    ]
    _, _, engine = judged_run(backend, config, requests, few=9)
    assert engine.stats()["num_preemptions"] > 0 and engine.stats()["prefix_cache_hits"] == 0


GREEDY = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}


def greedy_output(backend: str, config: EngineConfig, **params: Any) -> list[int]:
    _, events, _ = judged_run(backend, config, [request("r", PROMPT[:9], **({**GREEDY} | params))])
    return [event.token_id for event in events["r"]]


def test_check_26_each_parameter_does_what_it_is_for(backend: str, config: EngineConfig) -> None:
    plain = greedy_output(backend, config)
    first, second = plain[:2]
    strong = greedy_output(backend, config, logit_bias={30: 100.0})
    assert strong == [30] * 8
    assert set(greedy_output(backend, config, logit_bias={30: 100.0, 31: 99.0}, presence_penalty=2.0)) == {30, 31}
    fair = greedy_output(backend, config, logit_bias={30: 100.0, 31: 100.0}, frequency_penalty=2.0)
    assert abs(fair.count(30) - fair.count(31)) <= 1 + 8 // 4
    seen = {PROMPT[0]: 50.0, 30: 40.0}  # halved, each loses to the other until both have been
    assert greedy_output(backend, config, logit_bias=seen) == [PROMPT[0]] * 8
    assert greedy_output(backend, config, logit_bias=seen, repetition_penalty=2.0) == [30] + [PROMPT[0]] * 7
    assert greedy_output(backend, config, allowed_token_ids=[41]) == [41] * 8
    assert first not in greedy_output(backend, config, bad_words=[(first,)])
    two = greedy_output(backend, config, bad_words=[(first, second)])
    assert two[0] == first and two[1] != second
    assert greedy_output(backend, config, logit_bias={30: 100.0}, bad_words=[(30, 30, 30)])[:3] != [30, 30, 30]
    assert greedy_output(backend, config, stop_token_ids=[second, first]) == [first]  # check 30: whichever comes first
    late = greedy_output(backend, config, stop_token_ids=[first], min_tokens=3)
    assert first not in late[:3] and len(late) > 3


def test_check_31_a_row_does_not_depend_on_the_rows_beside_it(backend: str, config: EngineConfig) -> None:
    """Rows come, go and change places; everyone gets what they get alone."""
    rng = np.random.default_rng(5)
    requests = [
        request(str(i), PROMPT[i % 7 : i % 7 + 6], max_tokens=int(rng.integers(4, 9)), **(params | {"seed": i}))
        for i, params in enumerate(pairwise(VALUES, 24, 2)[:24])
    ]
    _, together, _ = judged_run(backend, config, requests)
    for one in requests[::3]:
        _, alone, _ = judged_run(backend, config, [one])
        ids = [[e.token_id for e in events[one.request_id]] for events in (together, alone)]
        assert ids[0] == ids[1]


def test_check_28_seeds_of_half_a_batch_hold_and_the_others_are_the_engines(backend: str, config: EngineConfig) -> None:
    outputs = []
    for engine_seed in (0, 1):
        requests = [request(str(i), PROMPT[:6], max_tokens=8, ignore_eos=True, seed=9 if i % 2 else None) for i in range(4)]
        _, events, _ = judged_run(backend, replace(config, seed=engine_seed), requests)
        outputs.append([[event.token_id for event in events[str(i)]] for i in range(4)])
    (a, seeded, b, same), (c, again, d, _) = outputs
    assert seeded == same == again and len({*map(tuple, (a, b, c, d, seeded))}) == 5


def test_nothing_is_compiled_after_the_warm_up(backend: str, config: EngineConfig) -> None:
    engine = Engine(shared_runner(backend, MODEL, PAGES, config), config, num_pages=PAGES)
    before = engine.stats()["compilations"]
    requests = [request(str(i), PROMPT[:12], max_tokens=6, **params) for i, params in enumerate(pairwise(VALUES, 40, 3)[:40])]
    assert all(events[-1].finish for events in engine.run(requests).values())
    assert engine.stats()["compilations"] == before


def test_a_plain_step_carries_no_change(backend: str) -> None:
    config = engine_config(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128)
    spy, _, _ = judged_run(
        backend, config, [request("a", PROMPT[:5], max_tokens=6), request("b", PROMPT[:9], max_tokens=6, min_tokens=2)]
    )
    assert spy.changed == 2


def test_scores_leave_the_token_that_a_row_sampled_last(backend: str, config: EngineConfig) -> None:
    runner = shared_runner(backend, MODEL, PAGES, config)
    runner.reset()
    packer = Packer(PAGES, config.block_size, num_rows=4, max_len=128)
    row = packer.add(PROMPT[:9], length=10)
    other, token = (runner.submit(packer.step([(row, 0, n)])).result().tokens[0] for n in (5, 9))
    assert other != token
    score = {"want": [Want.SCORE | Want.LOGPROBS], "num_top": [0], "score_ids": [3]}
    runner.submit(packer.step([(row, 4, 1)], **score)).result()  # whose likeliest is `other`
    from_device = runner.observe(packer.step([(row, 9, 1)], fills=[0]), ["logits"])["logits"][0]
    packer.rows.tokens[row, 9] = token
    assert np.array_equal(from_device, runner.observe(packer.step([(row, 9, 1)]), ["logits"])["logits"][0])


def test_a_plain_step_of_jax_is_one_program_and_a_change_is_another(config: EngineConfig) -> None:
    """Whoever changes no logit compiles and runs nothing for those who do."""
    runner = load_backend("jax", replace(config, max_num_seqs=3))  # shapes that no other test has compiled
    packer, counts = Packer(8, config.block_size, num_rows=3, max_len=128), []
    runner.load(checkpoint(MODEL))
    runner.allocate([8])
    sequence = [(packer.add(PROMPT[:9]), 0, 9)]
    for change in ({}, {}, {"edit_rows": [0], "edit_ids": [30], "edits": [(1000.0, 1.0, 0.0)]}):
        before = runner.compilations
        token = runner.submit(packer.step(sequence, **change)).result().tokens[0]
        counts.append(runner.compilations - before)
    assert counts == [1, 0, 1] and token == 30


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ({"allowed_token_ids": [VOCAB]}, "allowed_token_ids"),
        ({"bad_words": [(1, VOCAB)]}, "bad_words"),
        ({"allowed_token_ids": [7], "min_tokens": 1}, "mask all"),
        ({"allowed_token_ids": [8], "bad_words": [(8,)]}, "mask all"),
    ],
)
def test_what_lies_outside_the_vocabulary_or_leaves_nothing_is_refused(params: dict[str, Any], match: str) -> None:
    config = engine_config(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128)
    engine = Engine(shared_runner("torch", MODEL, PAGES, config), config, num_pages=PAGES)
    with pytest.raises(RequestError, match=match):
        engine.add(request("r", PROMPT[:3], **params))
    assert not engine.has_work
