"""The server under load: many connections, many that leave at once, an end in the middle of it, and what HTTP costs."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from common.config import EngineConfig
from common.engine import build_engine
from common.llm import LLM
from common.request import SamplingParams
from common.system.hardware import cores
from experiments.baselines import openai_http
from experiments.load.driver import drive
from experiments.load.workload import Item, Lengths, WorkloadConfig, draw
from tests.backends import checkpoint
from tests.http_server import PATIENCE_S, SMALL, Served, raw_request, serving, until

pytestmark = pytest.mark.accept
MODEL = "tiny-llama"
CONNECTIONS, REQUESTS, LEAVERS = 256, 2000, 1000
RAGGED = WorkloadConfig(
    name="ragged",
    num_requests=64,
    prompt_len=Lengths(mu=4.7, sigma=0.8, low=8, high=1024),
    output_len=Lengths(mu=4.5, sigma=0.7, low=8, high=512),
)
SHARE_OF_ENGINE = {"framework": 0.90, "native": 0.80}


@pytest.fixture(scope="module")
def served(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("load"), "--backend", backend, "--admin", *SMALL) as server:
        yield server


class Got(NamedTuple):
    """The answer to one request."""

    id: str
    text: str
    tokens: list[int]


async def ask(client: httpx.AsyncClient, prompt: str, stream: bool) -> Got:
    """The prompt and what follows it, in one piece or in many."""
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "echo": True, "return_token_ids": True}
    answer = await client.post("/v1/completions", json={**body, "stream": stream})
    assert answer.status_code == 200, answer.text
    if not stream:
        whole = answer.json()
        return Got(whole["id"], whole["choices"][0]["text"], whole["choices"][0]["token_ids"])
    *chunks, done = answer.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    parts = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
    choices = [part["choices"][0] for part in parts]
    (name,) = {part["id"] for part in parts}
    return Got(name, "".join(c["text"] for c in choices), [token for c in choices for token in c["token_ids"]])


async def ask_all(url: str, prompts: Sequence[str]) -> list[Got]:
    """As many connections as there may be; whichever is free takes the next prompt. Every other answer is streamed."""
    got: dict[int, Got] = {}
    left = iter(enumerate(prompts))
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=PATIENCE_S) as client:

        async def take() -> None:
            for i, prompt in left:
                got[i] = await ask(client, prompt, stream=i % 2 == 1)

        await asyncio.gather(*(take() for _ in range(CONNECTIONS)))
    return [got[i] for i in range(len(prompts))]


def test_every_one_of_2000_requests_gets_its_own_answer_over_256_connections(served: Served, backend: str) -> None:
    """Prompts carry their mark, which the answer repeats; what follows it is what the engine says of this prompt alone."""
    prompts = [f"{i:04d} is the mark of this one" for i in range(REQUESTS)]
    options: dict[str, Any] = {"dtype": "float32", "threads": 1, "max_model_len": 512, "max_num_seqs": 8}
    with LLM(MODEL, backend=backend, max_num_batched_tokens=64, use_tqdm=False, **options) as llm:
        alone = llm.generate(prompts, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    before = served.metric("request_success_total")
    got = asyncio.run(ask_all(served.url, prompts))
    assert [each.text for each in got] == [prompt + each.outputs[0].text for prompt, each in zip(prompts, alone, strict=True)]
    assert [each.tokens for each in got] == [each.outputs[0].token_ids for each in alone]
    assert len({each.id for each in got}) == REQUESTS and len({tuple(each.tokens) for each in got}) > REQUESTS // 10
    assert served.metric("request_success_total") - before == REQUESTS
    served.wait_idle()


def arrived(served: Served) -> float:
    """Requests that the engine has or had."""
    return sum(map(served.metric, ("num_requests_running", "num_requests_waiting", "request_success_total")))


def burst(served: Served) -> float:
    """Seconds for some work that fills the engine."""
    began = time.perf_counter()
    with ThreadPoolExecutor(8) as users:
        list(users.map(lambda i: served.complete(prompt=[i + 20] * 8, max_tokens=64, ignore_eos=True), range(32)))
    return time.perf_counter() - began


def test_a_thousand_that_leave_within_a_second_cost_nobody_anything(served: Served) -> None:
    burst(served)
    usual = min(burst(served) for _ in range(3))
    before = arrived(served)
    gone = [
        raw_request(served, prompt=[i % 300 + 20] * 20, max_tokens=450, ignore_eos=True, stream=i % 2 == 0)
        for i in range(LEAVERS)
    ]
    until(lambda: arrived(served) - before >= LEAVERS)
    began = time.perf_counter()
    for connection in gone:
        connection.close()
    left = time.perf_counter()
    served.wait_idle()
    idle = time.perf_counter()
    assert served.post("/reset_prefix_cache").status_code == 200  # which is refused while any page is held
    time.sleep(max(0.0, left + 2 - time.perf_counter()))
    after = min(burst(served) for _ in range(3))
    assert left - began < 1.0 and idle - left < 1.0
    assert after < usual / 0.9


def test_told_to_end_it_first_gives_all_their_answers(backend: str, tmp_path: Path) -> None:
    with serving(tmp_path, "--backend", backend, *SMALL) as served:
        body: dict[str, Any] = {"max_tokens": 100, "ignore_eos": True, "stream": True}
        readers = [raw_request(served, prompt=[i + 20] * 20, **body) for i in range(64)]
        until(lambda: arrived(served) >= 64)
        served.process.send_signal(signal.SIGTERM)
        with ThreadPoolExecutor(64) as threads:
            answers = list(threads.map(read_all, readers))
        assert served.process.wait(PATIENCE_S) == 0
    for answer in answers:
        assert answer.endswith("data: [DONE]\n\n\r\n0\r\n\r\n") and answer.count('"finish_reason":"length"') == 1


def read_all(connection: socket.socket) -> str:
    """What comes until the other side closes it."""
    with connection, connection.makefile("rb") as file:
        return file.read().decode()


class Cost(NamedTuple):
    """What HTTP leaves of an engine's throughput."""

    of_engine: float
    """Output tokens a second through HTTP, as a share of those without; the median of rounds."""
    of_cores: float
    """CPU seconds of the client as a share of what all cores have."""


def cost_of_http(folder: Path, backend: str, kernels: str, model: str, items: Sequence[Item], rounds: int) -> Cost:
    """Both run on the same cores and have no prefix cached; rounds alternate between them."""
    options: dict[str, Any] = {"kernels": kernels, "max_model_len": 2048, "enable_prefix_caching": False}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value).lower())]
    config = EngineConfig.of(**options)
    shares: list[float] = []
    client_s = http_s = 0.0
    process = psutil.Process()
    with serving(folder, "--backend", backend, "--model", model, *flags) as served:
        client = openai_http.build_engine(checkpoint(model), config, options=openai_http.Options(base_url=served.url))
        own = build_engine(backend, checkpoint(model), config)
        try:
            for number in range(rounds + 1):
                alone = drive(own, items)
                before = sum(process.cpu_times()[:2])
                through = drive(client, items)
                used = sum(process.cpu_times()[:2]) - before
                assert all(row.ok for window in (alone, through) for row in window.rows)
                if number:  # the first round warms both up
                    shares.append(alone.duration / through.duration)
                    client_s, http_s = client_s + used, http_s + through.duration
        finally:
            own.close()
            client.close()
    return Cost(statistics.median(shares), client_s / http_s / cores())


@pytest.mark.parametrize("kernels", SHARE_OF_ENGINE)
def test_http_leaves_most_of_the_throughput(
    backend: str, kernels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "smollm2-135m"
    items = draw(RAGGED, 0, checkpoint(model).config.vocab_size).items
    cost = cost_of_http(tmp_path, backend, kernels, model, items, rounds=3)
    with capsys.disabled():
        print(f"\n{backend}, {kernels}: {cost.of_engine:.1%} through HTTP; the client took {cost.of_cores:.1%} of the cores")
    assert cost.of_engine >= SHARE_OF_ENGINE[kernels]
