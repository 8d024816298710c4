"""Beam search against all continuations there are, on a tiny vocabulary, and against `transformers`, on both engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from common.errors import BackendError, RequestError
from common.llm import LLM
from common.llm.outputs import RequestOutput
from common.request import SamplingParams
from common.sampling.beam_search import Beam, BeamSearchParams, beam_search
from common.weights.zoo import resolve

SMALL = {
    "dtype": "float32",
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "max_model_len": 64,
    "num_blocks": 64,
    "threads": 1,
}


def found(output: RequestOutput) -> list[tuple[list[int], str | None]]:
    return [(one.token_ids, one.finish_reason) for one in output.outputs]


# ── a model that is a table ──────────────────────────────────────────────────────────────────────────────────────────────

VOCAB = 3
Sequences = Sequence[tuple[int, ...]]


def logprobs(sequence: tuple[int, ...]) -> np.ndarray:
    """Of a next token, whatever came before; fixed by it."""
    x = np.random.default_rng(sequence).standard_normal(VOCAB)
    return x - np.log(np.exp(x).sum())


def likeliest(sequences: Sequences, k: int) -> list[list[tuple[int, float]]]:
    rows = [logprobs(sequence) for sequence in sequences]
    return [[(int(token), float(row[token])) for token in np.argsort(-row)[:k]] for row in rows]


def every_beam(prompt: tuple[int, ...], length: int, ends: set[int]) -> list[Beam]:
    """All continuations that end, or are `length` long."""
    beams = []
    for tokens in (tokens for n in range(1, length + 1) for tokens in product(range(VOCAB), repeat=n)):
        if not ends & {*tokens[:-1]} and (tokens[-1] in ends or len(tokens) == length):
            steps = [logprobs((*prompt, *tokens[:i]))[token] for i, token in enumerate(tokens)]
            beams.append(Beam(tokens, float(sum(steps)), tokens[-1] in ends))
    return beams


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(("ends", "width", "length"), [((), 9, 3), ((0,), 16, 4)])
def test_beams_that_leave_nothing_out_find_the_best_of_all(
    ends: tuple[int, ...], width: int, length: int, penalty: float
) -> None:
    params = BeamSearchParams(beam_width=width, max_tokens=length, length_penalty=penalty)
    prompts = [(1,), (2, 2), (5, 0, 1)]
    for prompt, beams in zip(prompts, beam_search(prompts, params, ends, likeliest), strict=True):
        right = sorted(every_beam(prompt, length, {*ends}), key=lambda beam: beam.score(penalty), reverse=True)[:width]
        assert [(beam.token_ids, beam.ended) for beam in beams] == [(beam.token_ids, beam.ended) for beam in right]
        assert np.allclose([beam.logprob for beam in beams], [beam.logprob for beam in right])


def test_one_beam_is_greedy() -> None:
    tokens: list[int] = []
    while len(tokens) < 12:
        tokens.append(int(logprobs((4, *tokens)).argmax()))
    ((beam,),) = beam_search([(4,)], BeamSearchParams(beam_width=1, max_tokens=12), (), likeliest)
    assert beam.token_ids == tuple(tokens) and not beam.ended


def test_it_stops_where_nothing_better_can_come() -> None:
    """A sequence that ends at once with nearly all the probability leaves nothing to look for."""
    asked = []

    def sure(sequences: Sequences, k: int) -> list[list[tuple[int, float]]]:
        asked.append(len(sequences))
        return [[(0, -0.001), (1, -7.0), (2, -8.0)] for _ in sequences]

    params = BeamSearchParams(beam_width=1, max_tokens=50, length_penalty=0.0)
    assert beam_search([(1,), (2,)], params, (0,), sure) == [[Beam((0,), -0.001, True)]] * 2
    assert asked == [2]
    beam_search([(1,)], BeamSearchParams(beam_width=1, max_tokens=50, length_penalty=3.0), (0,), sure)
    assert asked[1:] == [1] * 18  # 17 tokens at -7 each, over 50³, are more than -0.001


# ── engines ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", params=["jax", "torch"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM("tiny-llama", backend=request.param, **SMALL) as llm:
        yield llm
        assert not llm._live and not llm._deltas
        assert llm.engine.reset_prefix_cache(), "a beam left pages behind"


@cache
def judge(path: Path) -> Any:
    where: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path.suffix == ".gguf":
        dequantize = GgufConfig(dequantize=True)
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "quantization_config": dequantize}
    return AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()


def by_transformers(path: Path, prompt: Sequence[int], params: BeamSearchParams, eos: Sequence[int]) -> list[list[int]]:
    with torch.inference_mode():
        sequences = judge(path).generate(
            torch.tensor([prompt]),
            num_beams=params.beam_width,
            num_return_sequences=params.beam_width,
            max_new_tokens=params.max_tokens,
            length_penalty=params.length_penalty,
            early_stopping="never",
            eos_token_id=list(eos) or None,
            pad_token_id=-1,
            do_sample=False,
        )
    return [[token for token in row[len(prompt) :].tolist() if token >= 0] for row in sequences]


PROMPTS = [tuple(np.random.default_rng(i).integers(0, 320, 3 + 7 * i).tolist()) for i in range(4)]


@pytest.mark.parametrize(("width", "penalty"), [(2, 0.0), (4, 1.0), (4, -2.0), (7, 3.0)])
def test_beams_are_those_of_transformers(llm: LLM, width: int, penalty: float) -> None:
    params = BeamSearchParams(beam_width=width, max_tokens=10, length_penalty=penalty)
    everywhere = beam_search(PROMPTS, params, (), llm._likeliest)
    eos = sorted({beam.token_ids[n] for beams in everywhere for beam in beams for n in (2, 5)})[:4]  # so that some do end
    path, ended = resolve("tiny-llama"), 0
    for ends in ((), eos):
        for prompt, beams in zip(PROMPTS, beam_search(PROMPTS, params, ends, llm._likeliest), strict=True):
            assert [list(beam.token_ids) for beam in beams] == by_transformers(path, prompt, params, ends)
            ended += sum(beam.ended for beam in beams)
    assert ended


@pytest.mark.accept
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_beams_of_real_weights_are_those_of_transformers(backend: str) -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=16)
    with LLM("smollm2-135m", backend=backend, **(SMALL | {"threads": 2})) as llm:
        for output in llm.beam_search(["The capital of France is", "Once upon a time there was a"], params):
            right = by_transformers(resolve("smollm2-135m"), output.prompt_token_ids, params, llm._builder.eos_token_ids)
            assert [one.token_ids for one in output.outputs] == right


def test_outputs_say_what_their_tokens_are(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=6)
    outputs = llm.beam_search(["the", [5, 6, 7]], params)
    assert [output.prompt for output in outputs] == ["the", None] and outputs[1].prompt_token_ids == [5, 6, 7]
    for output in outputs:
        assert [one.index for one in output.outputs] == [0, 1, 2]
        scores = [one.cumulative_logprob or 0.0 for one in output.outputs]
        assert scores == sorted(scores, reverse=True)
        for one, score in zip(output.outputs, scores, strict=True):
            assert one.finish_reason == "length" and len(one.token_ids) == 6
            assert one.text == llm.tokenizer.decode(one.token_ids)
            scored = SamplingParams(max_tokens=1, prompt_logprobs=0)
            (again,) = llm.generate([[*output.prompt_token_ids, *one.token_ids]], scored)
            assert again.prompt_logprobs is not None
            each = [
                entry[token].logprob for entry, token in zip(again.prompt_logprobs[-6:], one.token_ids, strict=True) if entry
            ]
            assert score == pytest.approx(sum(each), abs=1e-4)


def test_an_eos_token_ends_a_beam_unless_ignored(llm: LLM) -> None:
    free = BeamSearchParams(beam_width=2, max_tokens=5, ignore_eos=True)
    (output,) = llm.beam_search("the", free)
    first = output.outputs[0].token_ids[0]
    eos, llm._builder.eos_token_ids = llm._builder.eos_token_ids, (first,)
    try:
        assert found(llm.beam_search("the", free)[0]) == found(output)
        (ending,) = llm.beam_search("the", BeamSearchParams(beam_width=2, max_tokens=5, length_penalty=0.0))
    finally:
        llm._builder.eos_token_ids = eos
    assert ([first], "stop") in found(ending)
    assert next(one.text for one in ending.outputs if one.finish_reason == "stop") == ""


def test_streams_go_on_beside_a_search_and_change_nothing_in_it(llm: LLM) -> None:
    params, greedy = (
        BeamSearchParams(beam_width=5, max_tokens=9),
        SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True),
    )
    alone, text = found(llm.beam_search("of", params)[0]), list(llm.stream("the", greedy))
    stream = llm.stream("the", greedy)
    read = [next(stream)]
    assert found(llm.beam_search("of", params)[0]) == alone
    assert read + list(stream) == text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"beam_width": 0}, r"beam_width must be an integer in \[1, 20\], got 0"),
        ({"beam_width": 21}, "beam_width"),
        ({"beam_width": True}, "beam_width"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.0}, "max_tokens"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"temperature": 0.5}, "samples nothing"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"length_penalty": 1000}, "length_penalty"),
    ],
)
def test_a_search_that_cannot_be_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        BeamSearchParams(**({"beam_width": 2, "max_tokens": 4} | options))


def test_what_cannot_be_followed_to_its_end_is_refused_before_anything_runs(llm: LLM) -> None:
    steps = llm.engine.stats()["steps"]
    with pytest.raises(RequestError, match="ask for at most 62"):
        llm.beam_search([[1, 2]], BeamSearchParams(beam_width=2, max_tokens=63))
    with pytest.raises(RequestError, match=r"set beam_width to at most \d+, or ignore_eos"):
        llm.beam_search([[1, 2]], BeamSearchParams(beam_width=20, max_tokens=3))
    with pytest.raises(RequestError, match="must be BeamSearchParams, got SamplingParams"):
        llm.beam_search("the", SamplingParams())
    assert llm.engine.stats()["steps"] == steps
    wide = BeamSearchParams(beam_width=20, max_tokens=2, ignore_eos=True)
    assert len(llm.beam_search([[1, 2]], wide)[0].outputs) == 20


def test_a_model_without_logprobs_is_told(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(batch: Any) -> None:
        raise RuntimeError("no device")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "submit", raises)  # type: ignore[attr-defined]
        with pytest.raises(BackendError, match="beam search cannot go on"):
            llm.beam_search("the", BeamSearchParams(beam_width=2, max_tokens=4))
    assert len(llm.beam_search("the", BeamSearchParams(beam_width=2, max_tokens=4))[0].outputs) == 2
