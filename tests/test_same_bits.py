"""With native kernels both engines give the same logits, byte for byte, on real models through the whole engine; and a request
gives the same whatever runs beside it, in whatever pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.batch import Batch, Mask
from common.config import EngineConfig
from common.engine import Engine
from common.interface import ModelRunner, StepHandle, load_backend
from common.request import Request, SamplingParams
from tests.backends import BACKENDS, checkpoint


class Spy:
    """A runner that writes down what it gave: (permanent row, position, digest) of every logit row."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.seen: list[tuple[int, int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def submit(self, batch: Batch, mask: Mask = None) -> StepHandle:
        pending = self._runner.submit(batch, mask)
        digests = pending.result().digests
        assert digests is not None and len(digests) == len(batch.logit_rows)
        rows = zip(batch.rows[batch.logit_owner], batch.positions[batch.logit_rows], digests, strict=True)
        self.seen += [(int(row), int(position), int(digest)) for row, position, digest in rows]
        return pending


def requests(model: str, count: int, output: int) -> list[Request]:
    """Prompts of 1 to 90 ids, some with a common beginning; greedy and sampled in turn."""
    rng = np.random.default_rng(3)
    vocab = checkpoint(model).config.vocab_size
    shared = rng.integers(0, vocab, 40).tolist()
    made = []
    for i in range(count):
        prompt = (shared if i % 3 == 0 else []) + rng.integers(0, vocab, int(rng.integers(1, 50))).tolist()
        params = SamplingParams(temperature=0.0 if i % 2 else 1.0, seed=i, max_tokens=output, ignore_eos=True, detokenize=False)
        made.append(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    return made


def make_runner(backend: str, model: str, dtype: str, threads: int = 2) -> tuple[ModelRunner, EngineConfig]:
    config = EngineConfig(
        kernels="native",
        dtype=dtype,
        device="cpu",
        threads=threads,
        max_num_seqs=32,
        max_num_batched_tokens=256,
        max_model_len=256,
    )
    runner = load_backend(backend, config)
    runner.load(checkpoint(model))
    runner.allocate([512])
    runner.warmup()
    return runner, config


Rows = list[tuple[int, int, int]]


def run(runner: ModelRunner, config: EngineConfig, asked: Sequence[Request]) -> tuple[Rows, dict[str, list[int]]]:
    """What every logit row was, in the order of the steps; and the tokens of each request."""
    spy = Spy(runner)
    engine = Engine(spy, config, num_pages=512)
    events = engine.run(asked)
    return spy.seen, {name: [event.token_id for event in each if event.token_id is not None] for name, each in events.items()}


def compare(model: str, dtype: str, count: int, output: int) -> None:
    outputs = []
    for backend in BACKENDS:
        runner, config = make_runner(backend, model, dtype)
        outputs.append(run(runner, config, requests(model, count, output)))
        runner.close()
    assert outputs[0] == outputs[1]
    assert len(outputs[0][0]) == count * output


def test_both_engines_give_the_same_bytes_on_smollm2() -> None:
    compare("smollm2-135m", "bfloat16", 12, 8)


@pytest.mark.accept
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["smollm2-135m", "gemma3-270m"])
def test_both_engines_give_the_same_bytes_over_200_prompts_of_64_tokens(model: str, dtype: str) -> None:
    compare(model, dtype, 200, 64)


@pytest.mark.accept
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["smollm2-135m", "gemma3-270m"])
def test_company_changes_no_byte(model: str, dtype: str) -> None:
    """Each request alone and cold, then all together with a warm prefix cache, in small chunks and with pages for half of
    them, so that some are preempted: the set of (position, digest) stays the same."""
    runner, config = make_runner("torch", model, dtype)
    asked = requests(model, 24, 24)
    alone: set[tuple[int, int]] = set()
    for request in asked:
        alone |= {(position, digest) for _, position, digest in run(runner, config, [request])[0]}
    for num_pages, budget in ((512, 256), (60, 256), (60, 32)):
        spy = Spy(runner)
        engine = Engine(spy, replace(config, max_num_batched_tokens=budget), num_pages=num_pages)
        engine.run(asked)
        before = len(spy.seen)
        engine.run(asked)  # again, with a warm prefix cache
        assert before and {(position, digest) for _, position, digest in spy.seen} == alone
        assert engine.stats()["prefix_cache_hits"] > 0
        assert (engine.stats()["num_preemptions"] > 0) == (num_pages == 60)
    runner.close()
