"""Embeddings of prompts, on both engines and both kinds of kernels: what `transformers` says, and no harm to anybody else."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from common.engine import Engine
from common.errors import EngineGoneError, RequestError
from common.llm import LLM
from common.request import Request, SamplingParams
from common.schedule.embeddings import Pooler, Pooling, num_fitting
from tests.backends import BACKENDS, checkpoint, engine_config, hidden_states, make_engine, shared_runner
from tests.history_runner import HistoryRunner

MODEL, PAGES, SIZE = "tiny-llama", 40, 16
PROMPTS = [[7], list(range(40, 90)), [3, 5], list(range(100, 117)), list(range(110, 310)), list(range(30, 95)), [9]]
"""Some fit a step of 64 tokens together; two take several steps, one of them with a single token in its last."""
CASES = [(backend, kernels) for backend in BACKENDS for kernels in ("framework", "native")]


@cache
def states(model: str, tokens: tuple[int, ...]) -> np.ndarray:
    """The last hidden states by `transformers`, float32."""
    with torch.no_grad():
        judge = AutoModel.from_pretrained(checkpoint(model).path, dtype=torch.float32, attn_implementation="eager").eval()
        result: np.ndarray = judge(torch.tensor(tokens)[None]).last_hidden_state[0].numpy()
    return result


def expected(model: str, tokens: list[int], pooling: Pooling) -> np.ndarray:
    states_TD = states(model, tuple(tokens))
    pooled_D = states_TD[-1] if pooling == "last" else states_TD.mean(0)
    unit: np.ndarray = pooled_D / np.linalg.norm(pooled_D)
    return unit


def embed(engine: Engine, model: str, pooling: Pooling) -> list[np.ndarray]:
    pooler, pooled = Pooler.of(checkpoint(model)), list[np.ndarray]()
    while len(pooled) < len(PROMPTS):
        pooled += [pooler.pool(x_TD, pooling) for x_TD in hidden_states(engine, PROMPTS[len(pooled) :])]
    return pooled


@pytest.mark.parametrize(
    ("case", "model"),
    [  # XLA compiles Gemma's step for twenty seconds, and Llama's shows the same
        pytest.param(case, model, marks=pytest.mark.accept if (case, model) == (("jax", "framework"), "tiny-gemma3") else ())
        for case in CASES
        for model in (MODEL, "tiny-gemma3")
    ],
)
def test_an_embedding_is_what_transformers_says(case: tuple[str, str], model: str) -> None:
    engine = make_engine(case[0], model, engine_config(kernels=case[1]), pages=PAGES)
    for pooling in ("last", "mean"):
        for tokens, got in zip(PROMPTS, embed(engine, model, pooling), strict=True):
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, expected(model, tokens, pooling), atol=2e-6)


def test_native_kernels_give_both_engines_the_same_bits() -> None:
    one, other = (
        embed(make_engine(backend, MODEL, engine_config(kernels="native"), pages=PAGES), MODEL, "mean") for backend in BACKENDS
    )
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_who_runs_meanwhile_says_the_same_and_every_page_comes_back(backend: str) -> None:
    """Also where the pool has too few pages for both, so that somebody has to make room."""
    params = SamplingParams(temperature=0.0, max_tokens=30)
    requests = [Request(request_id=str(i), prompt_token_ids=tuple(range(50 + i, 90 + i)), params=params) for i in range(4)]
    alone = make_engine(backend, MODEL, engine_config(kernels="native"), pages=PAGES).run(requests)
    engine = make_engine(backend, MODEL, engine_config(kernels="native"), pages=PAGES, few=21)
    tokens: dict[str, list[int | None]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.scheduler.live:
        states = engine.hidden_states([PROMPTS[4]])
        while not states.done():
            for event in engine.step():
                tokens[event.request_id].append(event.token_id)
        pooled = Pooler.of(checkpoint(MODEL)).pool(states.result()[0], "last")
        np.testing.assert_allclose(pooled, expected(MODEL, PROMPTS[4], "last"), atol=2e-6)
    assert tokens == {name: [event.token_id for event in events] for name, events in alone.items()}
    assert engine.stats()["num_preemptions"] > 0 and engine.scheduler.pool.num_free == 20
    assert engine.reset_prefix_cache()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_gets_a_token_between_any_two_pieces_of_an_embedding(backend: str) -> None:
    """A piece has at most the tokens of a step."""
    engine = make_engine(backend, MODEL, engine_config(kernels="native"), pages=PAGES)
    pieces: list[int] = []
    observe = engine.runner.observe
    engine.add(Request(request_id="a", prompt_token_ids=(5, 6, 7), params=SamplingParams(temperature=0.0, max_tokens=40)))
    engine.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runner, "observe", lambda batch, names: pieces.append(batch.num_tokens) or observe(batch, names))
        asked = [engine.hidden_states([prompt]) for prompt in (PROMPTS[4], PROMPTS[1], PROMPTS[5])]
        dropped = engine.hidden_states([PROMPTS[4]])
        counts = []
        while not all(states.done() for states in asked):
            before = len(pieces)
            events = engine.step()
            counts.append((len(pieces) - before, len(events)))
            dropped.cancel()
    assert counts == [(1, 1)] * 7 and pieces == [64, 64, 64, 8, 50, 64, 1]
    assert engine.abort("a") and engine.step() and not engine.has_work
    assert engine.scheduler.pool.num_free == PAGES - 1


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_compiled_for_an_embedding_of_any_size(case: tuple[str, str]) -> None:
    engine = make_engine(case[0], MODEL, engine_config(kernels=case[1]), pages=PAGES)
    before = engine.stats()["compilations"]
    embed(engine, MODEL, "mean")
    for size in (1, 2, 31, 33, 63, 64, 65, 130):
        hidden_states(engine, [[7] * size])
    assert engine.stats()["compilations"] == before


def test_states_that_are_still_to_come_when_an_engine_closes_never_do() -> None:
    engine = Engine(shared_runner("torch", MODEL, PAGES, engine_config(kernels="native")), engine_config(), num_pages=PAGES)
    states, dropped = engine.hidden_states([PROMPTS[4]]), engine.hidden_states([[1]])
    engine.step()
    dropped.cancel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runner, "close", lambda: None)  # others use it
        engine.close()
    with pytest.raises(EngineGoneError, match="was closed"):
        states.result(0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_that_cannot_be_computed_is_refused_before_any_runs(backend: str) -> None:
    engine = make_engine(backend, MODEL, engine_config(kernels="native"), pages=PAGES, few=4)
    for prompts, says in (
        ([[1], []], "Prompt 1 has 0 tokens"),
        ([[1], [2] * 49], "expected 1 to 48"),
        ([[1, 999_999]], r"Prompt 0\[1\] must be"),
        ([[1.5]], r"Prompt 0\[0\] must be"),
    ):
        with pytest.raises(RequestError, match=says):
            engine.hidden_states(prompts)
    assert engine.scheduler.pool.num_free == 3


def test_a_step_that_raises_costs_the_embedding_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("torch", MODEL, engine_config(kernels="native"), pages=PAGES)
    request = Request(request_id="a", prompt_token_ids=(5, 6, 7), params=SamplingParams(temperature=0.0, max_tokens=8))
    right = [event.token_id for event in engine.run([request])["a"]]
    engine.add(request)
    events = engine.step()

    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "observe", fail)
        states, later = engine.hidden_states([[1, 2]]), engine.hidden_states([[3, 4]])
        events += engine.step()
    with pytest.raises(RuntimeError, match="planted"):
        states.result(0)
    while engine.has_work:
        events += engine.step()
    assert [event.token_id for event in events] == right
    assert engine.scheduler.pool.num_free == PAGES - 1 and len(later.result(0)) == 1


def test_an_engine_that_does_not_show_its_states_says_so() -> None:
    runner = HistoryRunner(num_pages=PAGES, block_size=SIZE)
    with pytest.raises(RequestError, match="no embeddings"):
        Engine(runner, engine_config(), num_pages=PAGES).hidden_states([[1]])


def test_a_model_in_python_embeds_what_it_is_given_while_a_stream_is_open() -> None:
    options: Any = {"kernels": "native", "dtype": "float32", "max_model_len": 256, "max_num_seqs": 4, "threads": 1}
    with LLM(MODEL, backend="torch", **options) as llm:
        stream = llm.stream("the ", SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
        text = next(stream).text
        outputs = llm.embed([PROMPTS[2], "the and of ", PROMPTS[1]], pooling="mean")
        text += "".join(delta.text for delta in stream)
        (again,) = llm.generate("the ", SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
        for output in outputs:
            np.testing.assert_allclose(output.outputs.embedding, expected(MODEL, output.prompt_token_ids, "mean"), atol=2e-6)
        assert text == again.outputs[0].text and outputs[0].prompt_token_ids == PROMPTS[2]
        assert llm.embed([]) == []
        with pytest.raises(RequestError, match="pooling must be one of mean, last"):
            llm.embed("a", pooling="max")


def test_as_many_prompts_are_taken_as_fit() -> None:
    assert num_fitting([3, 3, 3], 6, 8, 4) == 2
    assert num_fitting([3, 3, 3], 9, 2, 4) == 2
    assert num_fitting([3, 3, 3], 9, 3, 4) == 3
    assert num_fitting([30, 3], 9, 9, 4) == 1
