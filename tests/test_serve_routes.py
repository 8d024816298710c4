"""Routes beside completions over both engines: embeddings, profiles; and what an answer tells beside its text."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from common.serve.completions import LogprobLists
from common.serve.model import ServedModel
from common.serve.profiler import trace
from common.text.tokenizer import open_tokenizer
from common.weights.zoo import resolve
from tests.backends import checkpoint
from tests.http_server import SMALL, Served, serving
from tests.test_embed import expected

MODEL, PROMPT = "tiny-llama", "the and of "
LONG = PROMPT * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("routes")


@pytest.fixture(scope="module")
def served(backend: str, folder: Path) -> Iterator[Served]:
    options = ("--backend", backend, "--admin", "--profile-dir", str(folder / "profiles"))
    with serving(folder, *options, *SMALL) as server:
        yield server


def test_the_openai_client_gets_the_embeddings_that_transformers_computes(served: Served) -> None:
    texts = ["a", PROMPT, LONG, "who"]
    tokens = [open_tokenizer(resolve(MODEL)).encode(text) for text in texts]
    right = [expected(MODEL, ids, "last") for ids in tokens]
    given: list[Any] = [texts, tokens]
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        for what in given:
            found = client.embeddings.create(model=MODEL, input=what)  # it asks for base64 by itself
            assert [each.index for each in found.data] == [0, 1, 2, 3]
            np.testing.assert_allclose([each.embedding for each in found.data], right, atol=2e-6)
            assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, tokens))
        one = client.embeddings.create(model=MODEL, input=tokens[1], encoding_format="float", extra_body={"pooling": "mean"})
        np.testing.assert_allclose(one.data[0].embedding, expected(MODEL, tokens[1], "mean"), atol=2e-6)
        size = len(right[0])
        assert len(client.embeddings.create(model=MODEL, input="a", dimensions=size).data[0].embedding) == size
        with pytest.raises(openai.BadRequestError, match="dimensions"):
            client.embeddings.create(model=MODEL, input="a", dimensions=size - 1)
    raw = served.post("/v1/embeddings", input="a", encoding_format="base64").json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(raw), "<f4"), right[0], atol=2e-6)
    served.wait_idle()


@pytest.mark.parametrize(
    "body",
    [{}, {"input": ""}, {"input": []}, {"input": ["a", ""]}, {"input": [[1], []]}, {"input": [1, 320]}, {"input": [1, -1]},
     {"input": 5}, {"input": [1, "a"]}, {"input": "a", "encoding_format": "int8"}, {"input": "a", "pooling": "max"},
     {"input": [5] * 513}, {"input": ["a"] * 2049}, {"input": "a", "dimensions": 0},
     {"input": "a", "normalize": False}],
)  # fmt: skip
def test_what_cannot_be_embedded_is_refused(served: Served, body: dict[str, Any]) -> None:
    answer = served.post("/v1/embeddings", **body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "BadRequestError")


def test_embeddings_are_counted_as_requests(served: Served) -> None:
    names = ("request_success_total", "request_prompt_tokens_sum", "e2e_request_latency_seconds_count", "prompt_tokens_total")
    before = [served.metric(name) for name in names]
    usage = served.post("/v1/embeddings", input=[PROMPT, LONG], normalize=True).json()["usage"]
    grown = [served.metric(name) - was for name, was in zip(names, before, strict=True)]
    assert grown == [2, usage["prompt_tokens"], 2, usage["prompt_tokens"]]
    assert served.metric("request_success_total", finished_reason="stop") >= 2


def test_one_model_is_told_by_its_name(served: Served, backend: str) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        listed = {model.id: model for model in client.models.list()}
        assert {name: client.models.retrieve(name) for name in listed} == listed and len(listed) == 2
        with pytest.raises(openai.NotFoundError, match=f"served here: {MODEL}, {MODEL}@{backend}"):
            client.models.retrieve("others/gpt")


def test_embeddings_and_completions_do_not_disturb_each_other(served: Served) -> None:
    body = {"prompt": PROMPT, "max_tokens": 100, "ignore_eos": True, "return_token_ids": True}
    right = served.complete(**body)["choices"][0]["token_ids"]
    alone = served.post("/v1/embeddings", input=LONG).json()
    got: list[Any] = []
    reader = threading.Thread(target=lambda: got.append(served.complete(**body)["choices"][0]["token_ids"]))
    reader.start()
    embedded = [served.post("/v1/embeddings", input=LONG).json() for _ in range(5)]
    reader.join()
    assert got == [right] and embedded == [alone] * 5
    served.wait_idle()


def test_usage_tells_how_much_of_a_prompt_the_cache_had(served: Served) -> None:
    def cached(**more: Any) -> int:
        usage = served.complete(prompt=LONG, max_tokens=2, cache_salt="own", **more)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    length = len(open_tokenizer(resolve(MODEL)).encode(LONG))
    full = (length - 1) // 16 * 16
    assert [cached(), cached(), cached(n=3, temperature=1.0)] == [0, full, full] and full > 0
    chunks = served.events(prompt=LONG, max_tokens=2, cache_salt="own", stream_options={"include_usage": True})
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": full}


def test_a_profile_says_what_ran_between_its_start_and_its_stop(served: Served, folder: Path) -> None:
    body = {"prompt": PROMPT, "max_tokens": 6, "ignore_eos": True}
    right = served.complete(**body)["choices"][0]["text"]
    assert served.post("/stop_profile").status_code == 409
    assert served.post("/start_profile").status_code == 200
    assert served.post("/start_profile").status_code == 409
    assert served.complete(**body)["choices"][0]["text"] == right
    stopped = served.post("/stop_profile")
    assert stopped.status_code == 200, stopped.text
    events = json.loads((folder / "profiles" / stopped.json()["file"]).read_text())["traceEvents"]
    ran = [event for event in events if event["ph"] == "X"]
    assert ran and min(event["ts"] for event in ran) == 0 and all(event["dur"] >= 0 for event in ran)
    assert served.complete(**body)["choices"][0]["text"] == right


def test_a_profile_of_nothing_is_a_trace_without_events() -> None:
    assert trace([])["traceEvents"] == []


def test_many_greedy_choices_are_refused_as_in_python(served: Served) -> None:
    answer = served.post(prompt=PROMPT, temperature=0.0, n=2)
    assert answer.status_code == 400 and "n must be 1 where temperature is 0" in answer.json()["error"]["message"]


def test_what_is_not_there_is_an_error_as_openai_has_them(served: Served) -> None:
    missing, method = served.client.get("/v1/nothing"), served.client.get("/v1/completions")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "NotFoundError")
    assert (method.status_code, method.json()["error"]["type"]) == (405, "MethodNotAllowedError")
    assert "path" in missing.json()["error"]["message"] and "method" in method.json()["error"]["message"]


def test_a_character_that_never_came_moves_what_follows_it() -> None:
    """`text_offset` points into the text, in which bytes that became no character are U+FFFD."""
    tokenizer = open_tokenizer(resolve(MODEL))
    of = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    model = ServedModel.of(["m"], checkpoint(MODEL), tokenizer, 512)
    try:
        for parts, offsets in (
            ([b"a", b"\xe2", b"\x82", b"\xac", b"b"], [0, 1, 1, 1, 2]),
            ([b"a", b"\xe2", b"b", b"c"], [0, 1, 2, 3]),
            ([b"\xe2", b"\xe2", b"b"], [0, 1, 2]),
        ):
            listed = LogprobLists(model, False, True)
            assert listed.push([of[part] for part in parts], [None] * len(parts))["text_offset"] == offsets
    finally:
        model.close()


def test_offsets_point_at_special_tokens_that_show(served: Served) -> None:
    tokenizer = open_tokenizer(resolve(MODEL))
    special = max(tokenizer.special_ids - set(tokenizer.eos_token_ids))
    shown = tokenizer.decode([special], skip_special_tokens=False)
    body = {"prompt": PROMPT, "max_tokens": 3, "logprobs": 0, "allowed_token_ids": [special], "ignore_eos": True}
    for skips, offsets in ((False, [0, len(shown), 2 * len(shown)]), (True, [0, 0, 0])):
        choice = served.complete(**body, skip_special_tokens=skips)["choices"][0]
        assert (choice["text"], choice["logprobs"]["text_offset"]) == ("" if skips else shown * 3, offsets)


@pytest.mark.parametrize("skips", [True, False])
def test_offsets_point_at_special_tokens_that_an_echoed_prompt_spells(served: Served, skips: bool) -> None:
    tokenizer = open_tokenizer(resolve(MODEL))
    special = max(tokenizer.special_tokens, key=len)
    prompt = f"{special}the 🤖{special} and{special}"
    body = {"max_tokens": 3, "logprobs": 0, "echo": True, "ignore_eos": True, "skip_special_tokens": skips}
    choice = served.complete(prompt=prompt, **body)["choices"][0]
    assert choice["text"].startswith(prompt)
    told = list(zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True))
    assert [token for token, _ in told].count(special) >= 3
    whole = [(token, at) for token, at in told[:-3] if not token.startswith("bytes:")]
    assert [choice["text"][at : at + len(token)] for token, at in whole] == [token for token, _ in whole]
    assert [choice["text"][at] for token, at in told[:-3] if token.startswith("bytes:")] == ["🤖"] * 4
    assert told[-3][1] == len(prompt)
    ids = tokenizer.encode(prompt)  # of which the text is what they become
    choice = served.complete(prompt=ids, **body)["choices"][0]
    assert choice["text"].startswith(tokenizer.decode(ids, skips))
    assert choice["logprobs"]["text_offset"][-3] == len(tokenizer.decode(ids, skips))


def test_of_a_prompt_that_is_cut_what_is_left_is_echoed(served: Served) -> None:
    body = {"prompt": PROMPT, "max_tokens": 2, "logprobs": 0, "ignore_eos": True, "echo": True}
    whole, cut = (served.complete(**body, truncate_prompt_tokens=kept)["choices"][0] for kept in (-1, 3))
    assert whole["text"].startswith(PROMPT)
    lists = cut["logprobs"]
    assert len(lists["tokens"]) == 5 and cut["text"].startswith("".join(lists["tokens"][:3]))
    for at, token in zip(lists["text_offset"][:3], lists["tokens"], strict=False):
        assert cut["text"][at : at + len(token)] == token


def test_a_span_for_each_request_reaches_a_collector(tmp_path: Path) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    got: list[Any] = []
    collector = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=collector.serve_forever)
    thread.start()
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    try:
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        with serving(tmp_path, "--backend", "torch", *SMALL, "--otlp-endpoint", endpoint) as server:
            body = {"prompt": "a", "max_tokens": 7, "ignore_eos": True, "temperature": 0.5, "seed": 3}
            headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
            answer = server.client.post("/v1/completions", json=body, headers=headers).json()
            server.post(prompt="a", deadline=0.0)
            embedded = server.post("/v1/embeddings", input="a b", model="tiny-llama@torch").json()["usage"]
            assert server.stop() == 0  # by then all are exported
    finally:
        collector.shutdown()
        thread.join()
        collector.server_close()
    spans = [span for one in got for resource in one.resource_spans for scope in resource.scope_spans for span in scope.spans]
    first, late, last = sorted(spans, key=lambda span: span.start_time_unix_nano)
    facts = {attribute.key: attribute.value for attribute in first.attributes}
    assert (first.trace_id.hex(), first.name) == (trace_id, "text_completion tiny-llama")
    assert facts["gen_ai.response.id"].string_value == answer["id"]
    assert facts["gen_ai.usage.output_tokens"].int_value == facts["gen_ai.request.max_tokens"].int_value == 7
    assert facts["gen_ai.usage.input_tokens"].int_value == answer["usage"]["prompt_tokens"]
    assert facts["gen_ai.request.temperature"].double_value == 0.5
    assert [each.string_value for each in facts["gen_ai.response.finish_reasons"].array_value.values] == ["length"]
    whole = (first.end_time_unix_nano - first.start_time_unix_nano) * 1e-9
    assert 0 < facts["gen_ai.response.time_to_first_chunk"].double_value <= whole
    assert {each.key: each.value.string_value for each in late.attributes}["error.type"] == "timeout"
    told = {each.key: each.value for each in last.attributes}
    assert (last.name, told["gen_ai.request.model"].string_value) == ("embeddings tiny-llama", "tiny-llama@torch")
    assert told["gen_ai.usage.input_tokens"].int_value == embedded["prompt_tokens"] and "error.type" not in told
