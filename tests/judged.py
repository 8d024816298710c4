"""The judge at an engine's elbow: it sees the raw logits of every step, and each token and each logprob must be what NumPy
makes of them. And requests drawn over all sampling parameters for it to judge."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from common.batch import Batch, Mask, Want, masked
from common.config import EngineConfig
from common.engine import Engine
from common.interface import Caps, KVGroup, ModelRunner, Progress, StepHandle
from common.request import Logprobs, Request, SamplingParams, TokenEvent
from common.sampling.seeds import mix64
from tests.backends import checkpoint, shared_runner
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

    def submit(self, batch: Batch, mask: Mask = None) -> StepHandle:
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


def filters_of(params: SamplingParams) -> Filters:
    if params.greedy:
        return Filters(temperature=0.0)
    return Filters(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p)


def uniform_of(request: Request, number: int, place: int, engine_seed: int) -> float:
    """The number that chooses a place of the output of an engine's `number`-th request."""
    seed = mix64(engine_seed, number) if (own := request.own_seed) is None else own
    return uniform((seed & 0xFFFF_FFFF, seed >> 32), len(request.prompt_token_ids) + place)


def judge(spy: Judged, request: Request, number: int, events: list[TokenEvent], engine_seed: int) -> int:
    """How many tokens of a request the judge leaves open; every token must be one that it allows."""
    params, name, output, undecided = request.params, request.request_id, [], 0
    filters = filters_of(params)
    for i, event in enumerate(events):
        token, raw = event.token_id, spy.sampled[name, i]
        assert token is not None
        x = adjusted(raw, request, output)
        allowed = choices(x, filters, uniform_of(request, number, i, engine_seed), slack=SLACK)
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


def request(
    name: str,
    prompt: Sequence[int],
    bad_words: Sequence[Sequence[int]] = (),
    cache_salt: str = "",
    priority: int = 0,
    **params: Any,
) -> Request:
    texts = ["x"] * bool(bad_words)
    return Request(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        cache_salt=cache_salt,
        priority=priority,
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
    "cache_salt": ("", "salt"),
    "priority": (0, 1),
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


def drawn(least: int, seed: int) -> list[Request]:
    """So many requests or a few more, over all pairs of the values above."""
    rng = np.random.default_rng(seed)
    requests = []
    for i, params in enumerate(pairwise(VALUES, least, seed)):
        start, length = int(rng.integers(0, 20)), int(rng.integers(1, 20))
        requests.append(request(str(i), PROMPT[start : start + length], max_tokens=int(rng.integers(5, 9)), **params))
    return requests
