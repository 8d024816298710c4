"""Every sampling parameter, through whole engines: each token and each logprob is what the NumPy judge makes of the engine's
own logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.batch import Want
from common.config import EngineConfig
from common.engine import Engine
from common.errors import RequestError
from common.interface import load_backend
from common.request import Request, SamplingParams
from common.system.hardware import cxx_compiler
from tests.backends import Packer, checkpoint, dense_logits, engine_config, make_engine, shared_runner
from tests.judged import MODEL, PAGES, PROMPT, VALUES, VOCAB, judged_run, pairwise, request

NATIVE = pytest.param("native", marks=pytest.mark.skipif(cxx_compiler() is None, reason="there is no C++ compiler"))


@pytest.fixture(params=["framework", NATIVE])
def config(request: pytest.FixtureRequest) -> EngineConfig:
    return engine_config(kernels=request.param, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128)


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


@pytest.mark.parametrize("kernels", ["framework", "native"])
def test_a_prompt_is_scored_in_as_few_steps_as_it_is_computed_in(backend: str, kernels: str) -> None:
    """Not in as many as its tokens take with a logit row for each sequence, of which there are 8."""
    engine = make_engine(backend, MODEL, engine_config(kernels=kernels), pages=40)
    prompt = list(range(10, 210))
    logits = dense_logits(backend, checkpoint(MODEL).path, prompt).astype(np.float64)
    before = engine.stats()
    for beside in ([], [Request(request_id="b", prompt_token_ids=[5, 6], params=SamplingParams(seed=1, max_tokens=9))]):
        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=1, prompt_logprobs=2)
        scored = Request(request_id="a", prompt_token_ids=prompt, params=params)
        engine.reset_prefix_cache()
        (event,) = engine.run([*beside, scored])["a"]
        if not beside:
            assert engine.stats()["steps"] - before["steps"] == 4  # of 64 tokens
        right = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert event.token_id == logits[-1].argmax() and event.prompt_logprobs is not None
        assert event.logprobs is not None and abs(event.logprobs.logprob - right[-1].max()) < 1e-4
        for at, found in enumerate(event.prompt_logprobs[1:]):
            assert found is not None and abs(found.logprob - right[at, prompt[at + 1]]) < 1e-4, at
            assert found.rank == 1 + (logits[at] > logits[at, prompt[at + 1]]).sum()
            np.testing.assert_allclose(found.top_logprobs, np.sort(right[at])[:-3:-1], atol=1e-4)
    assert engine.stats()["compilations"] == before["compilations"]
