"""The server over both engines, in processes of its own, driven by the clients that people have."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from common.request import Request, SamplingParams
from common.serve import app, chat, completions, embeddings, responses, tokens
from common.serve.protocol import ChatRequest
from common.serve.schema import paths_of
from common.text.tokenizer import Tokenizer, open_tokenizer
from common.weights.zoo import resolve
from experiments.baselines.openai_http import Options, build_engine
from tests.backends import checkpoint, engine_config, make_engine
from tests.http_server import SMALL, Served, raw_request, serving

MODEL = "tiny-llama"
PROMPT = "the and of "
CHAT = [{"role": "user", "content": "Say it"}]


@pytest.fixture(scope="module")
def served(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("serve"), "--backend", backend, "--admin", *SMALL) as server:
        yield server


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return open_tokenizer(resolve(MODEL))


def test_it_tells_what_it_is(served: Served, backend: str, tokenizer: Tokenizer) -> None:
    models = served.client.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == [MODEL, f"{MODEL}@{backend}"]
    assert models["object"] == "list" and models["data"][0]["object"] == "model"
    assert models["data"][0]["max_model_len"] == 512
    assert open_tokenizer(checkpoint(MODEL).path).vocab_size == tokenizer.vocab_size
    assert models["data"][0]["root"] == checkpoint(MODEL).path.name  # no path of this machine
    assert "version" in served.client.get("/version").json()
    info = served.client.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"]) == ("<|im_end|>", "<|endoftext|>") and info["chat_template"]


def test_the_openai_client_completes_and_streams(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        whole = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0, logprobs=2)
        stream = client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert client.models.list().data[0].id == MODEL
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.completions.create(model="other", prompt=PROMPT)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(model=MODEL, prompt=PROMPT, temperature=-1)
    choice, usage = whole.choices[0], whole.usage
    assert usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert "".join(c.choices[0].text for c in chunks[:-1]) == choice.text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [choice.finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage == usage
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    assert len(choice.logprobs.tokens) == usage.completion_tokens == len(chunks) - 1  # one token an event


def test_the_openai_client_chats(served: Served) -> None:
    async def ask() -> tuple[Any, list[Any]]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            options: Any = {"model": MODEL, "messages": CHAT, "max_tokens": 12, "temperature": 0, "logprobs": True}
            whole = await client.chat.completions.create(**options, top_logprobs=3)
            return whole, [chunk async for chunk in await client.chat.completions.create(**options, stream=True)]

    whole, chunks = asyncio.run(ask())
    choice = whole.choices[0]
    assert (choice.message.role, whole.object, chunks[0].object) == ("assistant", "chat.completion", "chat.completion.chunk")
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    assert "".join(c.choices[0].delta.content for c in chunks) == choice.message.content
    assert len(chunks) == 1 + whole.usage.completion_tokens
    entries = choice.logprobs.content
    assert len(entries) == whole.usage.completion_tokens and all(len(entry.top_logprobs) == 3 for entry in entries)
    assert entries[0].logprob == entries[0].top_logprobs[0].logprob  # greedy takes the likeliest
    assert all(chunk.usage is None for chunk in chunks)


def test_the_harness_drives_it_as_an_engine_and_gets_the_tokens_of_the_engine_inside(served: Served, backend: str) -> None:
    """One token an event, each by its id: the harness's own client counts and names them."""
    config = engine_config(max_model_len=512, kernels="auto")
    requests = [
        Request(
            request_id=str(i),
            prompt_token_ids=tuple(range(3 + i, 40 + 5 * i)),
            params=SamplingParams(temperature=0.0, max_tokens=6 + i, ignore_eos=True, logprobs=2),
        )
        for i in range(6)
    ]
    client = build_engine(checkpoint(MODEL), config, options=Options(base_url=served.url))
    try:
        over_http = client.run(requests)
    finally:
        client.close()
    inside = make_engine(backend, MODEL, config, pages=513).run(requests)
    for request in requests:
        name = request.request_id
        got = [event for event in over_http[name] if event.token_id is not None]
        want = [event for event in inside[name] if event.token_id is not None]
        assert [event.token_id for event in got] == [event.token_id for event in want]
        for one, other in zip(got, want, strict=True):
            assert one.logprobs is not None and other.logprobs is not None
            assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=2e-4)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 3, "seed": 5, "temperature": 1.0},
        {"seed": 7, "temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
        {"min_tokens": 10, "ignore_eos": True},
        {"stop": [" ", "e"]},
        {"stop": "t", "include_stop_str_in_output": True},
        {"skip_special_tokens": False, "seed": 3, "temperature": 2.0},
    ],
)
def test_streamed_text_is_the_unstreamed(served: Served, path: str, options: dict[str, Any]) -> None:
    what: dict[str, Any] = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": CHAT}
    body = {**what, "max_tokens": 16, "temperature": 0.0, "return_token_ids": True, **options}
    whole = served.post(path, **body)
    assert whole.status_code == 200, whole.text
    chunks = served.events(path, **body, stream_options={"include_usage": True, "continuous_usage_stats": True})
    answer, usage = whole.json(), chunks.pop()
    assert usage["choices"] == [] and usage["usage"] == answer["usage"] == chunks[-1]["usage"]
    for choice in answer["choices"]:
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        text = "".join(part["text"] if "text" in part else part["delta"]["content"] for part in mine)
        assert text == (choice["text"] if "text" in choice else choice["message"]["content"])
        assert [token for part in mine for token in part.get("token_ids", [])] == choice["token_ids"]
        assert [part["finish_reason"] for part in mine if part["finish_reason"]] == [choice["finish_reason"]]
        assert mine[-1]["stop_reason"] == choice["stop_reason"]


def test_n_choices_are_the_requests_with_the_next_seeds(served: Served) -> None:
    body = {"prompt": [PROMPT, "who "], "max_tokens": 8, "temperature": 1.0, "return_token_ids": True}
    answer = served.complete(**body, n=3, seed=11)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for p, prompt in enumerate(body["prompt"]):
        alone = [served.complete(**{**body, "prompt": prompt}, seed=11 + i)["choices"][0] for i in range(3)]
        together = answer["choices"][3 * p : 3 * p + 3]
        assert [choice["token_ids"] for choice in together] == [choice["token_ids"] for choice in alone]
        assert len({tuple(choice["token_ids"]) for choice in together}) == 3
    assert answer["usage"]["prompt_tokens"] == sum(len(choice["prompt_token_ids"]) for choice in answer["choices"][::3])


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("kind", ["stop id", "stop text", "nothing"])
def test_what_ends_a_request(served: Served, tokenizer: Tokenizer, include: bool, ignore_eos: bool, kind: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "ignore_eos": ignore_eos, "return_token_ids": True}
    free = served.complete(**body)["choices"][0]
    token = free["token_ids"][2]
    text = tokenizer.decode([token])
    at = free["token_ids"].index(token)
    stops: dict[str, dict[str, Any]] = {"stop id": {"stop_token_ids": [token]}, "stop text": {"stop": text}, "nothing": {}}
    choice = served.complete(**body, **stops[kind], include_stop_str_in_output=include)["choices"][0]
    if kind == "nothing":
        assert (choice["finish_reason"], choice["text"]) == ("length", free["text"])
    elif kind == "stop id":
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", token)
        assert choice["token_ids"] == free["token_ids"][: at + 1]
        assert choice["text"] == tokenizer.decode(choice["token_ids"][: None if include else -1])
    else:
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", text)
        assert choice["text"] == free["text"][: free["text"].index(text) + (len(text) if include else 0)]


def test_echo_puts_the_prompt_before_the_answer(served: Served, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    plain = served.complete(prompt=PROMPT, max_tokens=5)["choices"][0]["text"]
    for prompt in (PROMPT, ids, [ids]):
        assert served.complete(prompt=prompt, max_tokens=5, echo=True)["choices"][0]["text"] == PROMPT + plain
    nothing = served.complete(prompt=PROMPT, max_tokens=0, echo=True)
    assert (nothing["choices"][0]["text"], nothing["usage"]["completion_tokens"]) == (PROMPT, 0)
    chunks = served.events(prompt=ids, max_tokens=5, echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == PROMPT + plain


def test_check_38_only_the_end_of_a_prompt_is_kept_where_asked(served: Served, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    body: dict[str, Any] = {"max_tokens": 3, "return_token_ids": True}
    for kept in (1, 3, len(ids), len(ids) + 5):
        cut = served.complete(prompt=PROMPT, truncate_prompt_tokens=kept, **body)["choices"][0]
        assert cut["prompt_token_ids"] == ids[-kept:]
        assert cut["token_ids"] == served.complete(prompt=ids[-kept:], **body)["choices"][0]["token_ids"]
    long = served.complete(prompt=ids * 200, truncate_prompt_tokens=-1, max_tokens=1)
    assert long["usage"]["prompt_tokens"] == 511


def test_logprobs_of_completions_stand_side_by_side(served: Served) -> None:
    choice = served.complete(prompt=PROMPT, max_tokens=6, logprobs=3)["choices"][0]
    lists = choice["logprobs"]
    assert {len(values) for values in lists.values()} == {6} and lists["text_offset"][0] == 0
    for token, logprob, top in zip(lists["tokens"], lists["token_logprobs"], lists["top_logprobs"], strict=True):
        assert top[token] == logprob == max(top.values()) and 1 <= len(top) <= 4
    named = served.complete(prompt=PROMPT, max_tokens=6, logprobs=0, return_tokens_as_token_ids=True, return_token_ids=True)
    (choice,) = named["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]


def test_with_echo_the_prompt_is_scored(served: Served, tokenizer: Tokenizer) -> None:
    """As lm-eval asks for likelihoods."""
    first = served.complete(prompt=PROMPT, max_tokens=6, logprobs=1, return_token_ids=True, ignore_eos=True)["choices"][0]
    ids = first["prompt_token_ids"] + first["token_ids"]
    body = {"prompt": [ids], "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choice = served.complete(**body)["choices"][0]
    lists = choice["logprobs"]
    assert {len(values) for values in lists.values()} == {len(ids) + 1}
    assert lists["token_logprobs"][0] is lists["top_logprobs"][0] is None
    for token, logprob, top in list(zip(lists["tokens"], lists["token_logprobs"], lists["top_logprobs"], strict=True))[1:]:
        assert top[token] == logprob <= max(top.values()) and len(top) <= 2
    assert lists["token_logprobs"][-7:-1] == pytest.approx(first["logprobs"]["token_logprobs"], abs=2e-4)
    given = list(zip(lists["text_offset"], lists["tokens"], strict=True))[: len(first["prompt_token_ids"])]
    assert [choice["text"][at : at + len(token)] for at, token in given] == [token for _, token in given]
    chunks = [chunk["choices"][0]["logprobs"] for chunk in served.events(**body)]
    assert {name: [value for chunk in chunks for value in chunk[name]] for name in lists} == lists
    scores = served.complete(prompt=ids, max_tokens=1, prompt_logprobs=2)["choices"][0]["prompt_logprobs"]
    assert scores[0] is None and len(scores) == len(ids)
    assert [entry[str(token)]["logprob"] for entry, token in zip(scores[1:], ids[1:], strict=True)] == pytest.approx(
        lists["token_logprobs"][1:-1], abs=2e-4
    )


def test_what_may_not_come_does_not(served: Served, tokenizer: Tokenizer) -> None:
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}
    free = served.complete(**body)["choices"][0]
    token = next(token for token in free["token_ids"] if tokenizer.decode([token]).strip().isalpha())
    assert served.complete(**body, allowed_token_ids=[70])["choices"][0]["token_ids"] == [70] * 8
    assert served.complete(**body, logit_bias={"71": 100})["choices"][0]["token_ids"] == [71] * 8
    for given in ({"logit_bias": {str(token): -100}}, {"bad_words": [tokenizer.decode([token])]}):
        assert token not in served.complete(**body, **given)["choices"][0]["token_ids"]
    penalized = served.complete(**body, presence_penalty=2, frequency_penalty=2, repetition_penalty=5)["choices"][0][
        "token_ids"
    ]
    assert penalized != free["token_ids"] or len(set(penalized)) == 8


def test_text_becomes_tokens_and_text_again(served: Served, tokenizer: Tokenizer) -> None:
    told = served.post("/tokenize", prompt=PROMPT, return_token_strs=True).json()
    assert told["tokens"] == tokenizer.encode(PROMPT) and told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert served.post("/detokenize", tokens=told["tokens"]).json() == {"prompt": PROMPT}
    chat = served.post("/tokenize", messages=[{"role": "user", "content": [{"type": "text", "text": "Say it"}]}]).json()
    assert served.post("/detokenize", tokens=chat["tokens"]).json()["prompt"].startswith("<|im_start|>user\nSay it<|im_end|>")
    count = served.post("/v1/chat/completions", messages=CHAT, max_tokens=1).json()["usage"]["prompt_tokens"]
    assert count == chat["count"]


def test_metrics_count_what_happened(served: Served) -> None:
    before = {name: served.metric(name) for name in ("generation_tokens_total", "prompt_tokens_total")}
    ended = served.metric("request_success_total", finished_reason="length")
    firsts = served.metric("time_to_first_token_seconds_count")
    usage = served.complete(prompt=PROMPT, max_tokens=9, ignore_eos=True, n=2, temperature=1.0)["usage"]
    assert served.metric("generation_tokens_total") - before["generation_tokens_total"] == usage["completion_tokens"] == 18
    assert served.metric("prompt_tokens_total") - before["prompt_tokens_total"] == 2 * usage["prompt_tokens"]
    assert served.metric("request_success_total", finished_reason="length") - ended == 2
    assert served.metric("time_to_first_token_seconds_count") - firsts == 2


def test_two_hundred_at_once_are_not_mixed_up(served: Served) -> None:
    """Every prompt has a mark of its own, and every answer is the one that it gets alone."""

    async def ask_all(prompts: list[list[int]]) -> list[Any]:
        async with httpx.AsyncClient(base_url=served.url, timeout=None, limits=httpx.Limits(max_connections=None)) as client:

            async def ask(i: int) -> Any:
                body = {"prompt": prompts[i], "max_tokens": 4, "temperature": 0, "echo": True, "return_token_ids": True}
                answer = (await client.post("/v1/completions", json=body)).json()
                assert answer["choices"][0]["prompt_token_ids"] == prompts[i]
                return answer["choices"][0]["token_ids"]

            return await asyncio.gather(*map(ask, range(len(prompts))))

    marked = [[i // 16 + 65, i % 16 + 97, 40, 41] for i in range(200)]
    together = asyncio.run(ask_all(marked))
    for i in range(0, 200, 20):
        alone = served.complete(prompt=marked[i], max_tokens=4, return_token_ids=True)["choices"][0]["token_ids"]
        assert together[i] == alone
    assert len({tuple(tokens) for tokens in together}) > 20
    served.wait_idle()


def test_whoever_leaves_gives_its_pages_back(served: Served) -> None:
    aborted = served.metric("request_success_total", finished_reason="abort")
    sockets = [
        raw_request(served, prompt=[i + 20] * 20, max_tokens=450, ignore_eos=True, stream=i % 2 == 0) for i in range(100)
    ]
    assert sockets[0].recv(1)  # the first is being answered
    for connection in sockets:
        connection.close()
    served.wait_idle()
    assert served.metric("request_success_total", finished_reason="abort") > aborted
    assert served.post("/reset_prefix_cache").status_code == 200  # which is refused while any page is held
    assert (
        len(served.complete(prompt=PROMPT, max_tokens=3, ignore_eos=True, return_token_ids=True)["choices"][0]["token_ids"])
        == 3
    )


def test_a_client_that_cancels_ends_its_request(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=480, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
    served.wait_idle()


def test_an_enforced_call_of_a_tool_streams_its_arguments(served: Served, tokenizer: Tokenizer) -> None:
    parameters = {"type": "object", "properties": {"n": {"enum": ["ab"]}}, "required": ["n"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        options: Any = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "temperature": 0}
        breaks = [i for i in range(tokenizer.vocab_size) if b"\n" in tokenizer.token_bytes(i)]
        options |= {"tools": [tool], "tool_choice": "required", "logit_bias": dict.fromkeys(map(str, breaks), -100)}
        whole = client.chat.completions.create(**options).choices[0]
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
    (call,) = whole.message.tool_calls or []
    assert whole.finish_reason == chunks[-1].finish_reason == "tool_calls" and whole.message.content is None
    parts = [part for chunk in chunks for part in chunk.delta.tool_calls or []]
    assert parts[0].id and parts[0].function.name == call.function.name == "f"
    assert "".join(part.function.arguments for part in parts) == call.function.arguments and len(parts) > 3
    assert call.function.arguments.replace(" ", "") == '{"n":"ab"}'


def test_a_chat_continues_a_message_and_hands_variables_to_the_template(served: Served) -> None:
    chat = [*CHAT, {"role": "assistant", "content": "the and"}]
    body: dict[str, Any] = {"messages": chat, "max_tokens": 4, "temperature": 0, "return_token_ids": True}
    path = "/v1/chat/completions"
    both = served.post(path, **body, continue_final_message=True)
    assert both.status_code == 400 and "add_generation_prompt" in both.json()["error"]["message"]
    open_end = served.post(path, **body, continue_final_message=True, add_generation_prompt=False).json()
    closed = served.post(path, **body, add_generation_prompt=False).json()
    assert open_end["usage"]["prompt_tokens"] < closed["usage"]["prompt_tokens"]
    assert served.post(path, **body, chat_template_kwargs={"enable_thinking": False}).status_code == 200
    refused = served.post(path, **body, chat_template_kwargs={"messages": []})
    assert refused.status_code == 400 and "messages" in refused.json()["error"]["message"]


def test_the_schema_is_made_from_the_models_that_parse_the_bodies(served: Served) -> None:
    found = served.client.get("/openapi.json").json()
    fields = found["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields.keys() == ChatRequest.model_fields.keys() and fields["messages"]["maxItems"] == 10_000
    assert found["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/CompletionRequest"
    }
    assert "/reset_prefix_cache" in found["paths"] and "/start_profile" not in found["paths"]  # as this server was started
    routers = [each.router for each in (app, chat, completions, responses, embeddings, tokens)]
    assert paths_of([*routers, app.admin]) - {"/"} == found["paths"].keys()
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(found)))
    assert references <= found["components"]["schemas"].keys()
    page = served.client.get("/docs")
    assert page.headers["content-type"].startswith("text/html") and "http" not in page.text.replace("HTTP", "")  # works offline


def test_the_openai_client_gets_responses_equal_to_those_of_a_chat(served: Served) -> None:
    options: Any = {"model": MODEL, "temperature": 0, "max_output_tokens": 6, "instructions": "Be brief."}
    parts = [{"type": "input_text", "text": "Say it"}]
    messages: Any = [{"role": "system", "content": "Be brief."}, *CHAT]
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        create: Any = client.responses.create
        expected = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=6)
        whole = create(**options, input="Say it", metadata={"a": "b"})
        events = list(create(**options, input=[{"role": "user", "content": parts}], stream=True))
        with client.responses.stream(**options, input="Say it") as stream:
            gathered = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        with pytest.raises(openai.BadRequestError, match="send the earlier items in input") as refused:
            create(**options, input="a", previous_response_id=whole.id)
    assert refused.value.param == "previous_response_id"
    assert whole.output_text == gathered == expected.choices[0].message.content
    assert (whole.status, whole.metadata, whole.object) == ("incomplete", {"a": "b"}, "response")
    assert whole.incomplete_details and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage and expected.usage and whole.usage.total_tokens == expected.usage.total_tokens
    kinds = [event.type for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds[:4] == [f"response.{kind}" for kind in begin] and kinds[-4:] == [f"response.{kind}" for kind in end]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text


def test_responses_call_functions_and_take_their_results(served: Served) -> None:
    parameters = {"type": "object", "properties": {"n": {"enum": ["ab"]}}, "required": ["n"], "additionalProperties": False}
    tool = {"type": "function", "name": "f", "parameters": parameters, "strict": True}
    options: Any = {"model": MODEL, "tools": [tool], "temperature": 0}
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        create: Any = client.responses.create
        for choice in ("required", {"type": "function", "name": "f"}):
            events = list(create(**options, input="a", tool_choice=choice, stream=True, max_output_tokens=180))
            deltas = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
            (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
            (call,) = events[-1].response.output
            assert (call.type, call.name, call.status) == ("function_call", "f", "completed")
            assert call.arguments == done.arguments == deltas and json.loads(deltas) == {"n": "ab"}
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "dry"}
        history: Any = [{"role": "user", "content": "a"}, call.model_dump(exclude_none=True), result]
        assert create(**options, input=history, max_output_tokens=2).usage
        text: Any = {"format": {"type": "json_schema", "name": "n", "schema": parameters}}
        shaped = create(model=MODEL, input="a", text=text, temperature=0, max_output_tokens=180)
        assert json.loads(shaped.output_text) == {"n": "ab"} and shaped.status == "completed"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": "the " * 5000}, "input"),
        ({"input": "a", "conversation": "c"}, "conversation"),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "top_logprobs": False}, "top_logprobs"),
        ({"input": "a", "max_tokens": 8}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({"input": "a", "max_output_tokens": 1 << 20}, "max_output_tokens"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "a", "tool_choice": "required"}, "tool_choice"),
        ({"input": "a", "text": {"format": {"type": "json_schema", "name": "n"}}}, "text"),
        ({"input": "a", "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "none"}}}}, "text"),
        ({"input": "a", "temperature": -1}, "temperature"),
    ],
)
def test_responses_name_the_field_that_they_refuse(served: Served, body: dict[str, Any], param: str) -> None:
    refused = served.post("/v1/responses", **body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param, refused.text


def test_a_completion_without_max_tokens_ends_where_the_context_does(served: Served) -> None:
    for room, expected in ((1, 1), (5, 5), (16, 16), (100, 16)):
        answer = served.complete(prompt=[5] * (512 - room), ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == expected
