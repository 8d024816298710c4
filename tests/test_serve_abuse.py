"""Whatever is sent to the server: it answers as it should, tells nothing about the machine, and goes on to serve the others.

The table is `tests/bad_requests.py`. Checkpoints and settings that are refused are tables of their own tests, all of which pass
under `python -O` too, as the server does.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from common.errors import RequestError
from common.request import SamplingParams
from common.serve.cost import expect_affordable
from common.serve.model import MAX_TEXT
from common.serve.protocol import reworded
from common.text.json_cost import MAX_UNITS, expect_parsable, json_units
from tests.bad_requests import (
    BYTES,
    CASES,
    CHAT,
    COMPLETIONS,
    CONTEXT,
    DETOKENIZE,
    EMBEDDINGS,
    FINE,
    POST,
    RESPONSES,
    TOKENIZE,
    Bad,
    combined,
    http,
    largest,
    together,
    wrong,
)
from tests.http_server import PATIENCE_S, ROOT, SMALL, Served, history, raw_request, serving, until

LEAK = re.compile(r"0x[0-9a-f]{6,}|/usr/|/home/|/root/|/tmp/|site-packages|\.py\b|Traceback", re.IGNORECASE)
PYTHON = re.compile(r"\b(None|True|False|nan|inf|dict|tuple|str|int|bool|float|NoneType|Dictionary|Input should)\b|[(\[{]'")
"""Words of Python, and its quotes within values."""
BYSTANDER: dict[str, Any] = {
    "prompt": "a bystander",
    "max_tokens": 40,
    "seed": 1,
    "temperature": 1.0,
    "ignore_eos": True,
    "logprobs": 1,
}

WITHIN_S = 1.0
REFUSALS = ("request", "config", "checkpoint", "gguf", "tokenizer", "chat", "serve_parts")
"""Tests of what is refused at other doors than HTTP's."""


@pytest.fixture(scope="module", params=["", pytest.param("1", marks=pytest.mark.accept)], ids=["", "-O"])
def served(request: pytest.FixtureRequest, backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONOPTIMIZE", request.param)
        with serving(tmp_path_factory.mktemp("abuse"), "--backend", backend, *SMALL) as server:
            yield server


@contextmanager
def bystanders(served: Served) -> Iterator[None]:
    """Somebody else is served all the while, with the answer that it has alone; and nothing is left over."""
    alone = served.complete(**BYSTANDER)["choices"]
    over = False

    def go_on() -> int:
        times = 0
        while not over or not times:
            assert served.complete(**BYSTANDER)["choices"] == alone
            times += 1
        return times

    with ThreadPoolExecutor(1) as others:
        bystander = others.submit(go_on)
        try:
            yield
        finally:
            over = True
        assert bystander.result() > 0
    assert served.client.get("/health").status_code == 200
    served.wait_idle()


def connect(served: Served) -> socket.socket:
    where = urlsplit(served.url)
    return socket.create_connection((where.hostname or "", where.port or 0), PATIENCE_S)


def send(served: Served, data: bytes, half_closed: bool = False) -> tuple[int, str]:
    """The status and body of what comes back for some bytes. The server may stop reading before their end."""
    with connect(served) as connection, ThreadPoolExecutor(1) as sender:
        sending = sender.submit(connection.sendall, data)
        if half_closed:
            sending.result()
            connection.shutdown(socket.SHUT_WR)
        with HTTPResponse(connection) as answer:
            answer.begin()
            text = answer.read().decode()
        sending.exception()
    return answer.status, text


def ask(served: Served, case: Bad) -> tuple[int, str]:
    answer = served.client.request(case.method, case.path, content=case.body, headers=case.headers)
    return answer.status_code, answer.text


def faults(status: int, text: str, expected: int) -> str:
    """What is wrong with a refusal; nothing if all is as it should be."""
    if status != expected:
        return f"{status} instead of {expected}: {text[:200]}"
    try:
        error = json.loads(text)["error"]
        sound = (
            error.keys() == {"message", "type", "param", "code"}
            and error["code"] in (status, "context_length_exceeded")
            and bool(error["message"])
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound or len(text) > 2000:
        return f"no error as OpenAI writes it: {text[:300]}"
    if PYTHON.search(error["message"]):
        return f"it speaks Python: {text[:300]}"
    return f"it leaks: {text[:300]}" if LEAK.search(text) else ""


def test_bad_requests_are_refused_and_hurt_nobody(served: Served) -> None:
    assert len(CASES) + len(BYTES) >= 300
    with bystanders(served):
        wrong = {f"{case.method} {case.path} {case.body[:80]!r}": faults(*ask(served, case), case.status) for case in CASES}
    assert {what: fault for what, fault in wrong.items() if fault} == {}


def test_a_refusal_names_the_field_that_is_to_blame(served: Served) -> None:
    blamed = {
        "max_tokens": CONTEXT, "top_p": 2.0, "stop": [""], "stop_token_ids": [10**6], "allowed_token_ids": [10**6],
        "prompt": [10**6], "logit_bias": {"x": 1.0}, "truncate_prompt_tokens": 0, "n": 0, "deadline": 1e300, "priority": 2**63,
    }  # fmt: skip
    said = {"role": "user", "content": "x"}
    messages = ([{**said, "content": "x " * 2000}], [{**said, "role": "king"}], [{"role": "user"}], [{**said, "content": 5}])
    in_chat = [("max_tokens", CONTEXT), ("max_completion_tokens", CONTEXT), ("max_completion_tokens", 0), ("top_logprobs", 21)]
    in_chat += [("messages", value) for value in messages]
    cases = [wrong(COMPLETIONS, **{name: value}) for name, value in blamed.items()]
    cases += [wrong(CHAT, **{"logprobs": True, name: value}) for name, value in in_chat]
    answers = [ask(served, case) for case in (*cases, wrong(DETOKENIZE, tokens=[-1]))]
    told = [json.loads(text)["error"]["param"] for _, text in answers]
    assert told == [*blamed, *(name for name, _ in in_chat), "tokens"]


def named(message: str) -> set[str]:
    """Return the fields that a message names: those that differ between the APIs."""
    return set(re.findall(r"\b(prompt_token_ids|messages|max_(?:output_|completion_)?tokens)\b", message))


@pytest.mark.parametrize(
    "given",
    [
        {"input": [{"role": "user", "content": "x"}] * 10_001},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}] * 10_000}]},
        {"max_output_tokens": CONTEXT},
        {"max_output_tokens": 2**31},
        {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "[" * 200_000}]},
    ],
)
def test_a_refused_response_names_the_fields_of_its_own_api(served: Served, given: dict[str, Any]) -> None:
    status, text = ask(served, wrong(RESPONSES, **given))
    error, (field,) = json.loads(text)["error"], given
    assert (status, error["param"], named(error["message"]) - {field}) == (400, field, set()), text
    assert field in error["message"]


def test_messages_quote_a_request_as_it_came() -> None:
    renamed = reworded('messages and max_tokens, got "a \\"messages\\" of messages", max_tokens_2', {"messages": "input"})
    assert renamed == 'input and max_tokens, got "a \\"messages\\" of messages", max_tokens_2'


def test_a_context_that_is_too_short_is_an_error_that_clients_recognize(served: Served) -> None:
    """By the code within the message, as langchain does, and by the words, as litellm does."""
    long = {"role": "user", "content": "x " * CONTEXT}
    cases = [(COMPLETIONS, "prompt", [1] * CONTEXT), (COMPLETIONS, "prompt", "x " * 500_000)]
    cases += [(COMPLETIONS, "max_tokens", CONTEXT), (CHAT, "max_tokens", CONTEXT), (CHAT, "max_completion_tokens", CONTEXT)]
    cases += [(CHAT, "messages", [long]), (RESPONSES, "max_output_tokens", CONTEXT)]
    cases += [(RESPONSES, "input", [long]), (RESPONSES, "input", "x " * 500_000), (RESPONSES, "instructions", "x " * CONTEXT)]
    for path, name, value in cases:
        status, text = ask(served, wrong(path, **{name: value}))
        error = json.loads(text)["error"]
        field = "input" if name == "instructions" else name
        assert (error["param"], named(error["message"]) - {field}) == (field, set()), text
        assert field in error["message"]
        assert (status, error["code"]) == (400, "context_length_exceeded"), text
        assert f"This model's maximum context length is {CONTEXT} tokens" in error["message"]
        assert error["code"] in error["message"]
    counted = served.post(TOKENIZE, messages=[long]).json()  # to be shortened by the client
    assert counted["count"] == len(counted["tokens"]) > counted["max_model_len"] == CONTEXT
    assert served.post(TOKENIZE, prompt="x " * 5000).json()["count"] > CONTEXT


def test_a_response_without_a_limit_is_incomplete_where_the_context_ends(served: Served) -> None:
    """The reason names the limit of OpenAI's API. The field of that name stays null, for the client set none."""
    text = "x"
    while (used := served.post(TOKENIZE, messages=[{"role": "user", "content": text}]).json()["count"]) < CONTEXT - 4:
        text += " x" * max((CONTEXT - 6 - used) // 2, 1)
    body = {"input": text, "temperature": 0}
    whole = served.post(RESPONSES, **body).json()
    last = json.loads(served.post(RESPONSES, **body, stream=True).text.rpartition("data: ")[2])
    assert last["type"] == "response.incomplete"
    for response in (whole, last["response"]):
        assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert [item["status"] for item in response["output"]] == ["incomplete"]
        assert response["max_output_tokens"] is None and response["error"] is None
        assert response["usage"]["total_tokens"] == CONTEXT


def took(served: Served, case: Bad) -> float:
    began = time.perf_counter()
    ask(served, case)
    return time.perf_counter() - began


@pytest.mark.accept
def test_every_refusal_comes_within_a_second(served: Served) -> None:
    """In one of three attempts: the machine may have other things to do."""
    assert [case.body[:80] for case in CASES if all(took(served, case) > WITHIN_S for _ in range(3))] == []


def test_what_is_no_http_is_refused_and_hurts_nobody(served: Served) -> None:
    with bystanders(served):
        wrong = {what: faults(*send(served, data), status) for what, (data, status) in BYTES.items()}
    assert {what: fault for what, fault in wrong.items() if fault} == {}
    assert "Traceback" not in served.log.read_text()


def test_a_request_of_two_lengths_ends_its_connection(served: Served) -> None:
    """What one server takes for its body, another may take for the next request."""
    head = http(POST + "Content-Length: 5\nTransfer-Encoding: chunked", b"0\r\n\r\n") + http("GET /version HTTP/1.1\nHost: x")
    with connect(served) as connection:
        connection.sendall(head)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1") == 1 and b"connection: close" in answer.lower()


UNFINISHED = [
    http(POST + "Content-Length: 100", b"{"),
    http(POST + "Transfer-Encoding: chunked", b"2\r\n{}\r\n"),
    http(POST + "Transfer-Encoding: chunked", b"10\r\n{"),
    http(POST + "Transfer-Encoding: chunked", b"2\n{}\n0\n\n"),
]


def test_a_client_that_closes_its_side_within_a_body_is_told(served: Served) -> None:
    for data in UNFINISHED:
        status, text = send(served, data, half_closed=True)
        assert faults(status, text, 400) == "" and "ended before its last byte" in text
    assert "Traceback" not in served.log.read_text()


def test_odd_requests_are_answered(served: Served) -> None:
    with bystanders(served):
        answers = {f"{case.path} {case.body[:80]!r}": ask(served, case) for case in FINE}
    assert {what: answer for what, answer in answers.items() if answer[0] != 200} == {}
    assert all("NaN" not in text and json.loads(text)["choices"] for _, text in answers.values())


def test_a_body_that_ends_early_is_given_up(served: Served) -> None:
    with bystanders(served), connect(served) as connection:
        connection.sendall(http(POST + "Content-Length: 100", b"{"))
    until(lambda: "status=499" in served.log.read_text())
    assert "Traceback" not in served.log.read_text()


def test_nobody_may_take_forever_over_a_head(tmp_path: Path) -> None:
    packages, _ = history(tmp_path)
    with (packages / "historyinfer" / "__init__.py").open("a") as file:
        file.write("import common.serve.http\ncommon.serve.http.HEAD_PATIENCE_S = 0.2\n")
    with serving(tmp_path, "--backend", "history", "--max-model-len", "512", packages=[packages]) as served:
        for beginning in (b"", b"POST /v1/comp", http(POST + "A: b")[:-2]):
            assert faults(*send(served, beginning), 408) == ""


def test_who_never_reads_is_hung_up_on_and_its_requests_end(tmp_path: Path) -> None:
    """What comes before it is noticed fills the buffers of the system."""
    packages, control = history(tmp_path)
    with (packages / "historyinfer" / "__init__.py").open("a") as file:
        file.write("import common.serve.http\ncommon.serve.http.READ_PATIENCE_S = 0.1\n")
    with serving(tmp_path, "--backend", "history", "--max-model-len", "2048", packages=[packages]) as served:
        (control / "slow").touch()
        body: dict[str, Any] = {"prompt": "the", "max_tokens": 2000, "ignore_eos": True, "n": 64, "logprobs": 20}
        with raw_request(served, **body, stream=True):
            until(lambda: "Ended early" in served.log.read_text())
            (control / "slow").unlink()
            served.wait_idle()
        assert served.metric("request_success_total", finished_reason="abort") > 0
        assert served.complete(prompt="the", max_tokens=2)["choices"]
        assert "Traceback" not in served.log.read_text()


@pytest.mark.accept
def test_nothing_is_refused_by_an_assert() -> None:
    """Python leaves them out under -O; pytest keeps those of its tests."""
    tests = [f"tests/test_{name}.py" for name in REFUSALS]
    command = [sys.executable, "-O", "-m", "pytest", "-m", "not accept", "-W", "ignore::pytest.PytestConfigWarning", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]


HEALTH_S = 0.5
"""Within which /health answers, whatever is asked of the server meanwhile."""
TWICE = 2.0
"""By which the time of a bystander may grow."""
REPRODUCED = [
    wrong(COMPLETIONS, n=64, temperature=1.0, allowed_token_ids=[5, 6, 7, 8] * 65536),
    wrong(COMPLETIONS, n=64, temperature=1.0, bad_words=[f"{i:04}" + "x" * 1020 for i in range(1024)]),
    wrong(COMPLETIONS, **{f"k{i}": 1 for i in range(900_000)}),
    wrong(COMPLETIONS, n=64, temperature=1.0, **largest("stop", MAX_UNITS, 1), **largest("allowed_token_ids", MAX_UNITS, 1)),
]
"""Each field is within its own limit; together they are too much."""


def slowest_health(served: Served, case: Bad) -> tuple[int, float]:
    """The status of the answer to a request, and the longest time that /health took meanwhile."""
    slowest = 0.0
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, served, case)
        while not asking.done():
            slowest = max(slowest, took(served, Bad(b"", 200, "/health", "GET")))
            time.sleep(0.01)
        return asking.result()[0], slowest


def expect_health(served: Served, cases: dict[str, Bad], statuses: set[int]) -> None:
    """In one of three attempts: the machine may have other things to do."""
    slow = {}
    for what, case in cases.items():
        for _ in range(3):
            status, seconds = slowest_health(served, case)
            assert status in statuses, what
            if seconds <= HEALTH_S:
                break
        else:
            slow[what] = seconds
    assert slow == {}


def test_fields_that_are_too_much_together_are_refused_and_hold_up_nobody(served: Served) -> None:
    with bystanders(served):
        expect_health(served, {case.body[:80].decode(): case for case in REPRODUCED}, {400})
    status, text = ask(served, REPRODUCED[0])
    error = json.loads(text)["error"]
    assert (status, error["param"]) == (400, "allowed_token_ids") and f"may have {MAX_UNITS}" in error["message"]


def test_the_largest_fields_together_hold_up_nobody(served: Served) -> None:
    some = [(("allowed_token_ids", each), 64, 3, COMPLETIONS) for each in ("bad_words", "unknown")]
    some += [(("messages", "calls"), 1, 3, RESPONSES), (("chat_template_kwargs", "instructions"), 1, 1, RESPONSES)]
    with bystanders(served):
        expect_health(served, {str(each): combined(*each) for each in some}, {200, 400})


LONGER: dict[str, Bad] = {
    "completion": wrong(COMPLETIONS, prompt="\U0001f600" * 300_000, truncate_prompt_tokens=10),
    "chat": wrong(CHAT, messages=[{"role": "user", "content": "\U0001f600" * 300_000}], truncate_prompt_tokens=10),
    "count": wrong(TOKENIZE, prompt="\U0001f600" * 300_000),
    "tools": wrong(TOKENIZE, prompt=None, messages=[{"role": "user", "content": "a"}], tools=[{"d": "\U0001f600" * 300_000}]),
    "embedding": wrong(EMBEDDINGS, input="\U0001f600" * 300_000, truncate_prompt_tokens=10),
}
"""Texts that may be longer than the context, of a million bytes and few characters."""


def test_a_text_that_is_truncated_or_counted_has_a_limit_in_bytes(served: Served) -> None:
    for what, case in LONGER.items():
        status, text = ask(served, case)
        error = json.loads(text)["error"]
        assert (status, f"at most {MAX_TEXT}" in error["message"]) == (400, True), (what, text)
        fits = Bad(case.body.replace(b"\\ud83d\\ude00", b"", 50_000), 200, case.path)
        assert ask(served, fits)[0] == 200, what


LONG_ANSWERS = [
    wrong(CHAT, n=16, max_tokens=450, logprobs=True, top_logprobs=20, ignore_eos=True),
    wrong(COMPLETIONS, prompt=["a"] * 100, max_tokens=100, logprobs=20, ignore_eos=True),
    wrong(COMPLETIONS, prompt=[5, 6, 7, 8] * 120, n=24, prompt_logprobs=20, logprobs=20, echo=True, temperature=1.0),
    wrong(TOKENIZE, prompt="\U0001f600" * 250_000, return_token_strs=True),
    wrong(COMPLETIONS, prompt="x" * 16_000_000, truncate_prompt_tokens=10),
    wrong(CHAT, messages=[{"role": "user", "content": "\U0001f600" * 1_200_000}], truncate_prompt_tokens=10),
]


@pytest.mark.accept
def test_a_long_answer_holds_up_nobody(served: Served) -> None:
    expect_health(served, {case.body[:80].decode(): case for case in (*LONG_ANSWERS, *LONGER.values())}, {200, 400})


def test_choices_share_the_log_probabilities_of_their_prompt(served: Served) -> None:
    prompt = [5, 6, 7, 8] * 20
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 3, "ignore_eos": True, "logprobs": 2, "prompt_logprobs": 2}
    alone, *several = (choice for n in (1, 3) for choice in served.complete(**body, echo=True, n=n, temperature=1.0)["choices"])
    of_prompt = lambda choice: {name: values[: len(prompt)] for name, values in choice["logprobs"].items()}  # noqa: E731
    assert [choice["index"] for choice in several] == [0, 1, 2]
    for choice in several:
        assert choice["prompt_logprobs"] == alone["prompt_logprobs"] and of_prompt(choice) == of_prompt(alone)
    assert len(alone["prompt_logprobs"]) == len(prompt) == len(alone["logprobs"]["tokens"]) - 3
    begin, *_ = served.events(**{**body, "prompt_logprobs": None}, echo=True)
    assert begin["choices"][0]["logprobs"] == of_prompt(alone)


def test_an_answer_that_outgrows_its_limit_is_to_be_a_stream(tmp_path: Path) -> None:
    packages, _ = history(tmp_path)
    with (packages / "historyinfer" / "__init__.py").open("a") as file:
        file.write("import common.serve.serving\ncommon.serve.serving.MAX_ANSWER = 10_000\n")
    with serving(tmp_path, "--backend", "history", "--max-model-len", "512", packages=[packages]) as served:
        for path, fields in ((COMPLETIONS, {"logprobs": 5}), (CHAT, {"logprobs": True, "top_logprobs": 5})):
            long = {**fields, "max_tokens": 400, "ignore_eos": True}
            status, text = ask(served, wrong(path, **long))
            error = json.loads(text)["error"]
            assert (status, error["param"]) == (400, "logprobs") and "Set stream to true" in error["message"]
            assert ask(served, wrong(path, 200, **long | {"max_tokens": 4}))[0] == 200
            status, text = ask(served, wrong(path, 200, **long, stream=True))
            assert status == 200 and text.count("data: {") >= 400 and "error" not in text
        served.wait_idle()


TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{% endfor %}{{ tools | tojson }}
"""
"""A chat template that knows tools, unlike the one of `tiny-llama`."""


@pytest.mark.accept
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES])
@pytest.mark.parametrize("count", [2, 3])
def test_no_combination_of_fields_holds_up_anybody(tmp_path: Path, count: int, path: str) -> None:
    """Behind a front, which ends a backend that seems dead. /health answers in time, and a bystander takes at most twice its
    time, in one of three attempts: the machine may have other things to do."""
    packages, _ = history(tmp_path, "one", "two")
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    options = ("--backend", "one,two", "--max-model-len", "1024", "--chat-template", str(template))
    bystander = wrong(COMPLETIONS, 200, **{**BYSTANDER, "max_tokens": 900})
    slow = {}
    with serving(tmp_path, *options, packages=[packages]) as front, ThreadPoolExecutor(1) as pool:
        alone = sorted(took(front, bystander) for _ in range(5))[2]
        for what, case in together(count, path):
            for _ in range(3):
                beside = pool.submit(took, front, bystander)
                status, slowest = slowest_health(front, case)
                assert status in {200, 400}, what
                ratio = beside.result() / alone
                if slowest <= HEALTH_S and ratio <= TWICE:
                    break
            else:
                slow[what] = (slowest, ratio)
        assert slow == {}
        assert "ended" not in front.log.read_text()


def test_the_cost_of_a_request_counts_choices_times_fields() -> None:
    ids = tuple(range(10_000))
    expect_affordable(SamplingParams(n=64, allowed_token_ids=ids), [10])
    for params, prompts, blamed in (
        (SamplingParams(n=64, allowed_token_ids=ids * 2), [10], "allowed_token_ids"),
        (SamplingParams(allowed_token_ids=ids), [10] * 128, "allowed_token_ids"),
        (SamplingParams(n=64, bad_words=["x" * 1000] * 5), [10], "bad_words"),
        (SamplingParams(n=64, stop=["x" * 1000] * 5), [10], "stop"),
        (SamplingParams(n=64, logit_bias=dict.fromkeys(ids, 1.0)), [10], "logit_bias"),
        (SamplingParams(n=64, repetition_penalty=1.1), [10_000], "prompt_token_ids"),
        (SamplingParams(prompt_logprobs=20), [20_000], "prompt_token_ids"),
        (SamplingParams(n=64), [10] * 64, "n"),
    ):
        with pytest.raises(RequestError, match=f"may have {MAX_UNITS}.*Ask for at most") as refused:
            expect_affordable(params, prompts)
        assert refused.value.param == blamed


def test_the_parts_of_a_body_are_counted_outside_of_its_strings() -> None:
    text = json.dumps({"prompt": ',:[{"\\' * (MAX_UNITS // 8)}).encode()
    assert json_units(text) == 16 + 15
    expect_parsable([json.dumps({"prompt": [1] * 1_000_000}).encode()])
    for much in ({f"k{i}": 1 for i in range(70_000)}, [[]] * 70_000, [1] * 1_100_000):
        with pytest.raises(RequestError, match="too many parts"):
            expect_parsable([json.dumps(much).encode()])
