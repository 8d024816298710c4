"""Both engines follow Hugging Face `transformers` on real weights: greedy, float32, judged by margin against float64."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.utils import logging

from common.request import Logprobs, Request, SamplingParams
from experiments.correctness.judge import Reference, float64_reference, judge
from experiments.correctness.reference import NumpyModel
from tests.backends import checkpoint, engine_config, make_engine

logging.disable_progress_bar()

TOLERANCE = 1e-3
"""Of a log-probability in float32, as of the logits; 1e-4 is seen."""
BATCH = 10
CASES = {"smollm2-135m": (50, 64), "gemma3-270m": (20, 32)}
"""model → prompts, tokens"""


def prompts(name: str, count: int) -> list[list[int]]:
    """Random ids, of lengths across several pages and chunks."""
    rng = np.random.default_rng(0)
    config = checkpoint(name).config
    bos = [] if config.bos_token_id is None else [config.bos_token_id]
    return [bos + rng.integers(0, config.vocab_size, int(rng.integers(4, 60))).tolist() for _ in range(count)]


Output = tuple[list[int], list[Logprobs]]


@cache
def by_transformers(name: str) -> list[Output]:
    """Greedy tokens, each with the 20 likeliest, in left-padded batches of prompts of like length."""
    count, length = CASES[name]
    path, asked = checkpoint(name).path, prompts(name, count)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False, max_new_tokens=length)
    outputs: dict[int, Output] = {}
    by_length = sorted(range(count), key=lambda i: len(asked[i]))
    for part in (by_length[at : at + BATCH] for at in range(0, count, BATCH)):
        width = max(len(asked[i]) for i in part)
        ids = torch.tensor([[0] * (width - len(asked[i])) + asked[i] for i in part])
        mask = torch.tensor([[0] * (width - len(asked[i])) + [1] * len(asked[i]) for i in part])
        with torch.inference_mode():
            done: Any = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True)
        top, top_ids = (x.tolist() for x in torch.stack(done.logits, 1).log_softmax(-1).topk(20))
        tokens = done.sequences[:, width:].tolist()
        for row, i in enumerate(part):
            likeliest = zip(top_ids[row], top[row], strict=True)
            outputs[i] = tokens[row], [Logprobs(values[0], 1, ids_, values) for ids_, values in likeliest]
    return [outputs[i] for i in range(count)]


@cache
def by_engine(backend: str, name: str) -> list[Output]:
    count, length = CASES[name]
    config = engine_config(max_num_batched_tokens=128, max_num_seqs=16, max_model_len=128, threads=2)
    params = SamplingParams(max_tokens=length, temperature=0.0, logprobs=20, ignore_eos=True)
    requests = [
        Request(request_id=str(i), prompt_token_ids=prompt, params=params) for i, prompt in enumerate(prompts(name, count))
    ]
    events = make_engine(backend, name, config, pages=129).run(requests)
    return [
        ([e.token_id for e in es if e.token_id is not None], [e.logprobs for e in es if e.logprobs])
        for es in (events[request.request_id] for request in requests)
    ]


@cache
def reference(name: str) -> Reference:
    return float64_reference(NumpyModel(checkpoint(name)))


def compare(name: str, ours: Sequence[Output], theirs: Sequence[Output]) -> None:
    """No unjustified divergence, and hardly any that needs to be justified."""
    equal = 0
    for prompt, (tokens_a, logprobs_a), (tokens_b, logprobs_b) in zip(prompts(name, len(ours)), ours, theirs, strict=True):
        result = judge(prompt, tokens_a, tokens_b, logprobs_a, logprobs_b, reference(name), TOLERANCE)
        assert len(tokens_a) == len(tokens_b) == CASES[name][1]
        assert result.divergence is None or result.divergence.justified, (prompt, result)
        assert result.max_abs_logprob_diff < TOLERANCE
        equal += result.divergence is None
    assert equal >= 0.9 * len(ours)


@pytest.mark.accept
@pytest.mark.parametrize("name", CASES)
def test_an_engine_follows_transformers(backend: str, name: str) -> None:
    compare(name, by_engine(backend, name), by_transformers(name))


@pytest.mark.accept
@pytest.mark.parametrize("name", CASES)
def test_the_engines_follow_each_other(name: str) -> None:
    compare(name, by_engine("jax", name), by_engine("torch", name))
