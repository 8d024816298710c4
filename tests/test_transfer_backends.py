"""Keys and values of one backend's engine, on pages of one size, gone on with by another's on pages of another: nothing in the
logits tells."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from common.config import EngineConfig
from common.engine import Engine
from common.request import Request, SamplingParams
from common.schedule.kv import KV, layout_of, model_fingerprint
from tests.backends import BACKENDS, checkpoint, engine_config, make_engine

MODEL, PAGES = "tiny-llama", 48
RNG = np.random.default_rng(0)
VOCAB = checkpoint(MODEL).config.vocab_size
PROMPTS = [tuple(RNG.integers(3, VOCAB, length).tolist()) for length in (1, 16, 45, 101)]


def config_of(size: int, kernels: str = "native", dtype: str = "float32") -> EngineConfig:
    return engine_config(kernels=kernels, dtype=dtype, block_size=size)


def run(engine: Engine, request: Request) -> tuple[list[int], list[int]]:
    """Its tokens, and of each the digest of the bits of its logits."""
    digests: list[int] = []
    update = engine.scheduler.update

    def noting(step, result, time):  # type: ignore[no-untyped-def]
        digests.extend([] if result.digests is None else result.digests.tolist())
        return update(step, result, time)

    engine.scheduler.update = noting  # type: ignore[method-assign]
    events = engine.run([request])[request.request_id]
    engine.scheduler.update = update  # type: ignore[method-assign]
    return [event.token_id for event in events if event.token_id is not None], digests


def handed_over(first: Engine, then: Engine, request: Request) -> tuple[list[int], list[int]]:
    """As `run`, the prompt by one engine and the rest by another."""
    capped = replace(request.params, max_tokens=1)
    tokens, digests = run(first, replace(request, params=capped, keep_pages=True))
    kv: Future[KV] = Future()
    kv.set_result(first.read_kept(request.request_id, 0, len(request.prompt_token_ids)))
    first.drop_kept(request.request_id)
    before = then.stats()["external_prefix_cache_hits"]
    more = run(then, replace(request, output_token_ids=tuple(tokens), kv=kv))
    assert then.stats()["external_prefix_cache_hits"] == before + len(request.prompt_token_ids)
    return tokens + more[0], digests + more[1]


def requests(**params: object) -> list[Request]:
    return [
        Request(request_id=str(i), prompt_token_ids=prompt, params=SamplingParams(max_tokens=24, seed=i, **params))  # type: ignore[arg-type]
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("giving", "taking"), [(16, 16), (32, 16), (16, 64)])
@pytest.mark.parametrize(("writer", "reader"), [(a, b) for a in BACKENDS for b in BACKENDS])
def test_logits_are_to_the_byte_those_of_one_engine(writer: str, reader: str, giving: int, taking: int, dtype: str) -> None:
    make = lambda backend, size: make_engine(  # noqa: E731
        backend, MODEL, config_of(size, dtype=dtype), pages=PAGES, enable_prefix_caching=False
    )
    for request in requests():
        whole = run(make(reader, taking), request)
        assert len(whole[1]) == 24 and handed_over(make(writer, giving), make(reader, taking), request) == whole


@pytest.mark.parametrize(("writer", "reader"), [("jax", "torch"), ("torch", "jax")])
def test_tokens_are_those_of_one_engine_where_each_has_its_framework_s_kernels(writer: str, reader: str) -> None:
    config = config_of(16, kernels="framework")
    first, then, one = (make_engine(backend, MODEL, config, pages=PAGES) for backend in (writer, reader, reader))
    for request in requests(temperature=0.0):
        assert handed_over(first, then, request)[0] == run(one, request)[0]


def test_both_backends_have_one_layout_and_another_dtype_another() -> None:
    model = model_fingerprint(checkpoint(MODEL))
    prints = {
        (backend, size, kernels, dtype): layout_of(
            make_engine(backend, MODEL, config_of(size, kernels, dtype), pages=PAGES).runner, model
        ).fingerprint
        for backend in BACKENDS
        for size, kernels, dtype in ((16, "native", "float32"), (32, "native", "float32"), (16, "native", "bfloat16"))
    }
    by_dtype = [{value for key, value in prints.items() if key[3] == dtype} for dtype in ("float32", "bfloat16")]
    assert [len(values) for values in by_dtype] == [1, 1] and by_dtype[0] != by_dtype[1]
