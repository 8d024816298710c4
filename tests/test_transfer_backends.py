"""Keys and values of one backend's engine, on pages of one size, gone on with by another's on pages of another: nothing in the
logits tells."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from common.batch import KV
from common.config import EngineConfig
from common.engine import Engine
from common.kv_transfer.layout import layouts_of, model_fingerprint
from common.kv_transfer.protocol import Offer, Tag, common_layout
from common.request import Request, SamplingParams
from common.weights import zoo
from tests.backends import BACKENDS, checkpoint, engine_config, make_engine
from tests.ranks import Ranks
from tests.test_parallel import judge

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
    offered, mine = (layouts_of(each.runner, each.config.block_size, "m") for each in (first, then))
    offer = Offer(Tag(request.request_id, 0), len(request.prompt_token_ids), tuple(each.fingerprint for each in offered))
    layout = common_layout(offer, mine)
    alike = first.config.block_size == then.config.block_size and first.runner.caps.kernels == then.runner.caps.kernels
    assert (layout.page is not None) == alike
    arrays = layout.view(np.empty(layout.num_bytes(offer.tokens), np.uint8), offer.tokens)
    first.read_kept(request.request_id, 0, arrays)
    kv.set_result(arrays)
    first.drop_kept(request.request_id)
    before = then.stats()["external_prefix_cache_hits"]
    more = run(then, replace(request, output_token_ids=tuple(tokens), kv=kv))
    assert then.stats()["external_prefix_cache_hits"] == before + len(request.prompt_token_ids)
    return tokens + more[0], digests + more[1]


def requests(**params: object) -> list[Request]:
    return [
        Request(request_id=str(i), prompt_token_ids=prompt, params=SamplingParams(max_tokens=24, seed=i, **params))
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


@pytest.mark.parametrize(("writer", "reader"), [pytest.param("jax", "torch", marks=pytest.mark.accept), ("torch", "jax")])
def test_tokens_are_those_of_one_engine_where_each_has_its_framework_s_kernels(writer: str, reader: str) -> None:
    config = config_of(16, kernels="framework")
    first, then, one = (make_engine(backend, MODEL, config, pages=PAGES) for backend in (writer, reader, reader))
    for request in requests(temperature=0.0):
        assert handed_over(first, then, request)[0] == run(one, request)[0]


ASKED = [(list(prompt), {"temperature": 0.0, "logprobs": 5, "max_tokens": 8}) for prompt in PROMPTS[1:]]


@pytest.mark.parametrize("kernels", ["native", pytest.param("framework", marks=pytest.mark.accept)])
@pytest.mark.parametrize("writer", ["jax", pytest.param("torch", marks=pytest.mark.accept)])
def test_engines_of_other_numbers_of_ranks_and_sizes_of_pages_go_on_with_what_the_judge_would_say(
    writer: str, kernels: str
) -> None:
    with Ranks(writer) as process:
        for reader in BACKENDS:
            for giving, taking in ((1, 2), (2, 1), (4, 2)):
                what = {"ranks": giving, "other": reader, "others": taking, "block_size": 32}
                answers = process.ask("handed_over", model=zoo.resolve(MODEL), kernels=kernels, asked=ASKED, **what)
                for (prompt, _), answer in zip(ASKED, answers, strict=True):
                    judge(MODEL, prompt, answer)


def test_both_backends_have_the_same_layouts_and_another_dtype_others() -> None:
    """Of pages as they lie for each kind of kernels and size, of tokens for all of them."""
    model = model_fingerprint(checkpoint(MODEL))
    settings = [(16, "native", "float32"), (32, "native", "float32"), (16, "framework", "float32"), (16, "native", "bfloat16")]

    def prints_of(backend: str, setting: tuple[int, str, str]) -> list[str]:
        runner = make_engine(backend, MODEL, config_of(*setting), pages=PAGES).runner
        return [layout.fingerprint for layout in layouts_of(runner, setting[0], model)]

    prints = [[prints_of(backend, setting) for backend in BACKENDS] for setting in settings]
    assert all(jax == torch for jax, torch in prints)
    as_they_lie, tokens = zip(*(mine for mine, _ in prints), strict=True)
    assert len(set(as_they_lie)) == 4 and len(set(tokens)) == 2 and len(set(tokens[:3])) == 1
