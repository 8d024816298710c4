"""`AsyncLLM`: the answers of `LLM`, for many tasks of one event loop at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from common.errors import BackendError, RequestError
from common.llm import LLM
from common.llm.async_llm import AsyncLLM
from common.llm.outputs import RequestOutput
from common.request import SamplingParams

SMALL: dict[str, Any] = {
    "dtype": "float32", "kernels": "native", "device": "cpu", "threads": 1, "max_model_len": 256, "max_num_seqs": 8,
    "max_num_batched_tokens": 64, "num_blocks": 64,
}  # fmt: skip
PROMPTS = ["the and of", "a", [5, 6, 7, 8, 9], {"prompt": "in the"}] * 2
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=1)
LONG = replace(GREEDY, max_tokens=200)


@pytest.fixture(scope="module")
def right(backend: str) -> Iterator[list[RequestOutput]]:
    with LLM("tiny-llama", backend=backend, **SMALL) as llm:
        yield llm.generate(PROMPTS, GREEDY)


def open_llm(backend: str) -> AsyncLLM:
    return AsyncLLM("tiny-llama", backend=backend, **SMALL)


async def outputs(llm: AsyncLLM, prompt: Any, params: SamplingParams = GREEDY) -> list[RequestOutput]:
    return [output async for output in llm.generate(prompt, params)]


def test_tasks_of_one_loop_get_the_outputs_of_llm_as_they_grow(backend: str, right: list[RequestOutput]) -> None:
    async def run() -> None:
        async with open_llm(backend) as llm:
            found = await asyncio.gather(*(outputs(llm, prompt) for prompt in PROMPTS))
            for grown, expected in zip(found, right, strict=True):
                assert grown[-1].outputs == expected.outputs and grown[-1].prompt == expected.prompt
                assert [each.finished for each in grown] == [False] * (len(grown) - 1) + [True]
                lengths = [len(each.outputs[0].token_ids) for each in grown]
                assert lengths == sorted(lengths) and lengths[0] == 1
            seeded = SamplingParams(n=2, seed=3, max_tokens=5, ignore_eos=True)
            several = (await outputs(llm, "the", seeded))[-1]
            assert [len(each.token_ids) for each in several.outputs] == [5, 5]

    asyncio.run(run())


def test_an_aborted_request_ends_and_others_go_on(backend: str, right: list[RequestOutput]) -> None:
    async def run() -> None:
        async with open_llm(backend) as llm:
            other = asyncio.create_task(outputs(llm, PROMPTS[0]))
            last = None
            async for output in llm.generate("the and of", LONG, request_id="mine"):
                if last is None:
                    with pytest.raises(RequestError, match="'mine' is running"):
                        await anext(llm.generate("a", GREEDY, request_id="mine"))
                    assert await llm.abort("mine")
                last = output
            assert last is not None and last.outputs[0].finish_reason == "abort"
            assert not await llm.abort("mine")
            assert (await other)[-1].outputs == right[0].outputs
            leaving = llm.generate("the and of", LONG)
            await anext(leaving)
            await leaving.aclose()
            while (await llm._worker.ask(lambda engine: engine.stats()))["num_running"]:
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_what_cannot_be_served_is_refused_and_a_shutdown_ends_what_runs(backend: str) -> None:
    llm = open_llm(backend)

    async def run() -> None:
        with pytest.raises(RequestError, match="one prompt"):
            await outputs(llm, ["a", "b"])
        with pytest.raises(RequestError, match="max_model_len"):
            await outputs(llm, [5] * 300)
        running = llm.generate("the and of", LONG)
        await anext(running)
        await asyncio.to_thread(llm.shutdown)
        with pytest.raises(BackendError):
            async for _ in running:
                pass
        llm.shutdown()

    asyncio.run(run())
    with pytest.raises(RequestError, match="another event loop"):
        asyncio.run(outputs(llm, "a"))
