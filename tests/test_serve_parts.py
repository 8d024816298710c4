"""Parts of the server that need no server."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.config import EngineConfig
from common.errors import ConfigError, RequestError
from common.options import field_docs, without
from common.options import parse as parse_options
from common.serve import protocol
from common.serve.command import main, make_parser
from common.serve.encoding import JsonList, encode
from common.serve.errors import PRIVATE, ApiError, api_error, public
from common.serve.items import messages_of
from common.serve.model import ServedModel
from common.serve.protocol import ChatRequest, CompletionRequest, parse
from common.serve.responses import Output
from common.serve.serving import Answer
from common.text.tokenizer import open_tokenizer
from common.text.tool_calls import ToolCalls
from common.weights.checkpoint import open_checkpoint
from common.weights.zoo import resolve

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TEMPLATE = (
    "{% for tool in tools or [] %}<tools>{{ tool | tojson }}</tools>{% endfor %}"
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("text", "plain", "names"),
    [
        ("no call <tool", "no call <tool", []),
        (CALL, "", ["weather"]),
        (f"Let me see. {CALL}{CALL} done", "Let me see.  done", ["weather", "weather"]),
        ("<tool_call>{not json}</tool_call>", "<tool_call>{not json}</tool_call>", []),
        ('<tool_call>{"name": 5, "arguments": {}}</tool_call>', '<tool_call>{"name": 5, "arguments": {}}</tool_call>', []),
        ('<tool_call>{"name": "f"', '<tool_call>{"name": "f"', []),
        (f"a << b <<tool_call> {CALL}", f"a << b <<tool_call> {CALL}", []),
        ("<<tool_call>[]</tool_call><", "<<tool_call>[]</tool_call><", []),
    ],
)
def test_calls_are_found_however_the_text_is_cut(text: str, plain: str, names: list[str]) -> None:
    for size in (1, 2, 3, 7, 1000):
        parser, shown, calls = ToolCalls(), "", []
        for i in range(0, len(text), size):
            part, found = parser.push(text[i : i + size], last=i + size >= len(text))
            shown += part
            calls += found
        assert (shown, [call["function"]["name"] for call in calls]) == (plain, names)
        assert [call["index"] for call in calls] == list(range(len(calls)))
        assert all(json.loads(call["function"]["arguments"]) == {"city": "Köln"} for call in calls)


@pytest.mark.parametrize(
    "arguments", [r'{"x": "\ud83d"}', r'{ "a" : [1e400, 1.50,{"}": "\u00fc, ü"}],"a":{} }', "{}", '{"n": -0.0, "n": 2}']
)
@pytest.mark.parametrize("named", ['{"name": "f", "arguments": %s}', '\n{ "parameters" :\t%s , "id": {"x": 1}, "name":"f" }\n'])
def test_arguments_are_the_models_own_text(named: str, arguments: str) -> None:
    text, (call,) = ToolCalls().push(f"<tool_call>{named % arguments}</tool_call>", last=True)
    assert (text, call["function"]) == ("", {"name": "f", "arguments": arguments})
    assert json.loads(encode(call)) == call


def test_half_a_character_in_the_name_of_a_tool_does_not_stop_an_answer() -> None:
    _, (call,) = ToolCalls().push(r'<tool_call>{"name": "f\ud83d", "arguments": {}}</tool_call>', last=True)
    assert json.loads(encode(call))["function"] == {"name": "f?", "arguments": "{}"}


def test_plain_text_is_not_held_back_for_long() -> None:
    parser = ToolCalls()
    assert parser.push("a < b ")[0] == "a < b "
    assert parser.push("<tool")[0] == ""
    assert parser.push("box")[0] == "<toolbox"


def test_tools_reach_a_template_whether_it_knows_them_or_not(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    messages = [{"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "of"}]}]
    shutil.copytree(resolve("tiny-llama"), tmp_path / "model")
    with_tools, without = tmp_path / "model", resolve("tiny-llama")
    (with_tools / "chat_template.jinja").write_text(TEMPLATE)
    for path in (with_tools, without):
        model = ServedModel.of(["m"], open_checkpoint(path), open_tokenizer(path), 512)
        try:
            if path == without:
                text = model.chat_prompt(messages, tools).text or ""
                assert "<tool_call>" in text and json.dumps(tools[0]) in text
            else:
                assert model.chat_prompt(messages, tools).text == f"<tools>{json.dumps(tools[0])}</tools>the\nof"
        finally:
            model.close()


@pytest.mark.parametrize(
    "message",
    [
        "failed at 0x7ffd12345678",
        "No such file: /usr/lib/x.so",
        "'/root/models/a' is missing",
        'Traceback (most recent call last):\n  File "x"',
        "C:\\Users\\me\\model",
    ],
)
def test_what_tells_about_the_machine_stays_inside(message: str) -> None:
    for error in (RequestError(message), ApiError(500, message)):
        assert message not in str(api_error(error).body)
    assert "x-request-id" in public(500, message)
    assert not PRIVATE.search(public(400, message))


def test_the_advice_of_a_refusal_survives_beside_facts_about_the_machine() -> None:
    advice = "send the text so far to /v1/completions."
    assert public(400, advice) == advice
    assert public(400, f"'/root/models/a' is missing; {advice}") == f"'…' is missing; {advice}"


def test_other_messages_go_out_as_they_are_unless_they_are_long() -> None:
    for message in ("temperature must be in [0, 100], got 1/2.", "The path /v1/x is unknown."[:8], "max_tokens: 5 and/or 6"):
        assert public(400, message) == public(500, message) == message
    assert len(public(400, "x" * 10_000)) < 600


def test_what_asks_for_nothing_is_taken_whether_or_not_the_engine_knows_it() -> None:
    body = {"prompt": "a", "presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": None,
            "n": 1, "best_of": 1, "stop": None, "seed": None, "suffix": None, "user": "me",
            "use_beam_search": False, "unheard_of": 5}  # fmt: skip
    request = parse(CompletionRequest, json.dumps(body).encode())
    request.check()
    assert request.params(16, None).max_tokens == 16
    assert request.request_fields(0.0) == {}


def test_a_chat_fills_the_context_unless_told_otherwise() -> None:
    request = parse(ChatRequest, b'{"messages": [{"role": "user", "content": "a"}], "temperature": 0}')
    assert request.params(request.max_tokens, None).max_tokens is None


@pytest.mark.parametrize(
    ("stop", "told"),
    [
        ("a" * 1025, "stop[0] may have at most 1024 characters"),
        (["a"] * 65, "stop may hold at most 64 items"),
        (["a", 5], "stop[1] must be a string"),
        (5, "stop must be a list"),
    ],
)
def test_a_stop_that_is_none_is_refused_by_what_is_wrong_with_it(stop: object, told: str) -> None:
    with pytest.raises(ApiError, match=re.escape(told)) as refused:
        parse(CompletionRequest, json.dumps({"prompt": "a", "stop": stop}).encode())
    assert refused.value.param == "stop"


def test_a_wrong_field_is_named() -> None:
    with pytest.raises(ApiError, match="temperature") as caught:
        parse(CompletionRequest, b'{"prompt": "a", "temperature": "hot"}')
    assert (caught.value.status, caught.value.param) == (400, "temperature")


def test_of_the_name_of_a_field_that_is_ignored_no_more_is_kept_than_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    for end in "ab":
        parse(CompletionRequest, json.dumps({"prompt": "a", "unheard of " + "x" * 100_000 + end: 1}).encode())
    (told,) = [record.getMessage() for record in caplog.records if "unheard of" in record.getMessage()]
    assert len(told) < 160
    assert max(map(len, protocol._ignored)) <= 80


def test_a_logit_bias_by_words_is_told_what_it_is_by() -> None:
    with pytest.raises(RequestError, match="logit_bias must be a map of token ids to numbers"):
        parse(CompletionRequest, b'{"prompt": "a", "logit_bias": {"the": 1.0}}').params(16, None)


def test_every_option_of_the_engine_is_explained() -> None:
    docs = field_docs(EngineConfig)
    assert [field.name for field in fields(EngineConfig) if len(docs.get(field.name, "")) < 10] == []
    assert docs["max_waiting"].startswith("Requests that may wait")


def test_an_option_is_left_out_however_it_is_spelt() -> None:
    for key in (["--api-key", "--secret"], ["--api-key=secret"], ["--api_key", "secret"], ["--api_key=a b"]):
        assert without("--api-key", ["--port", "1", *key, "--admin"]) == ["--port", "1", "--admin"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["tiny-qwen3", "--port", "9"], {"model": "tiny-qwen3", "port": 9}),
        (["--compile"], {"compile": True}),
        (["--compile", "--port=9"], {"compile": True, "port": 9}),
        (["--compile", "false"], {"compile": False}),
        (["--enforce-eager"], {"compile": False}),
        (["--no-enable-prefix-caching", "--no_enable_chunked_prefill"], {"enable_prefix_caching": False}),
        (["--no-enable_chunked_prefill"], {"enable_chunked_prefill": False}),
        (["-tp", "2", "-pp=3", "-dp", "4"], {"tensor_parallel_size": 2, "pipeline_parallel_size": 3, "data_parallel_size": 4}),
        (["--max-model-len", "8k", "--max-num-batched-tokens=1K"], {"max_model_len": 8000, "max_num_batched_tokens": 1024}),
        (["--max-model-len", "auto"], {"max_model_len": None}),
        (["--num-gpu-blocks-override", "77"], {"num_blocks": 77}),
    ],
)
def test_a_command_line_of_vllm_means_the_same(given: list[str], expected: dict[str, object]) -> None:
    found = vars(parse_options(make_parser(), given))
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--gpu-memory-utilization", "0.9"], "--num-blocks sets its pages"),
        (["--trust-remote-code"], "never runs"),
        (["--ssl-keyfile", "x"], "proxy"),
        (["--no-compile=true"], "takes no value"),
        (["--no-port"], "Unknown option --no-port"),
        (["--max-num-seq", "8"], "Did you mean '--max-num-seqs'"),
    ],
)
def test_an_option_that_is_not_there_says_what_to_do(given: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_options(make_parser(), given)


@pytest.mark.parametrize("backend", ["foo", "torch,foo"])
def test_a_wrong_backend_is_refused_before_a_process_starts(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "tiny-llama", "--backend", backend, "--port", "0"]) == 2
    captured = capsys.readouterr()
    assert "Unknown backend 'foo'" in captured.err and "Loading" not in captured.err + captured.out


def test_a_call_that_was_admitted_as_its_client_left_is_aborted() -> None:
    """The engine may answer in the millisecond between the end of the connection and the cancellation."""
    aborted: list[object] = []

    async def admit(call: object) -> None:
        for _ in range(9):  # iterations of the loop; the server sees the end of the connection in the third
            await asyncio.sleep(0)

    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def checked(request: object) -> None:
        pass

    worker = SimpleNamespace(run=admit, abort=aborted.append)
    serving = SimpleNamespace(worker=worker, metrics=SimpleNamespace(begin=lambda call: None, end=lambda call: None))
    call = SimpleNamespace(requests=[None])
    answer: Any = SimpleNamespace(call=call, serving=serving, _check_grammar=checked)
    http: Any = SimpleNamespace(receive=gone)
    unused: Any = None
    with pytest.raises(ApiError) as left:
        asyncio.run(Answer.send(answer, http, unused, unused))
    assert left.value.status == 499 and aborted == [call]


def test_the_items_of_a_response_are_the_same_however_its_text_is_cut() -> None:
    call = lambda i: {"index": i, "id": f"call_{i}", "function": {"name": "f", "arguments": ""}}  # noqa: E731
    more = lambda i, text: {"index": i, "function": {"arguments": text}}  # noqa: E731
    for cut in (1, 3, 1000):
        pieces = lambda text: [text[i : i + cut] for i in range(0, len(text), cut)]  # noqa: E731,B023
        deltas = [{"reasoning": text} for text in pieces("Hm. Rain?")]
        deltas += [{"content": text} for text in pieces("\n\nI look it up.")]
        for i in range(2):
            deltas += [{"tool_calls": [call(i)]}, *({"tool_calls": [more(i, text)]} for text in pieces('{"x": 1}'))]
        output = Output()
        events = [event for delta in deltas for event in output.push(delta)] + output.end("completed")
        reasoning, message, *calls = [item.as_dict() for item in output.items]
        assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm. Rain?"}]
        assert message["content"][0]["text"] == "I look it up."
        assert [(each["call_id"], each["arguments"]) for each in calls] == [("call_0", '{"x": 1}'), ("call_1", '{"x": 1}')]
        for kind in ("added", "done"):
            found = [event["output_index"] for event in events if event["type"] == f"response.output_item.{kind}"]
            assert found == [0, 1, 2, 3]
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert done == [reasoning, message, *calls] and {item["status"] for item in done} == {"completed"}
    empty = Output()
    empty.end("incomplete")
    assert [item.as_dict()["status"] for item in empty.items] == ["incomplete"] and not empty.items[0].text


def test_the_calls_of_one_turn_join_its_message() -> None:
    call = lambda i: {"type": "function_call", "call_id": i, "name": "f", "arguments": "{}"}  # noqa: E731
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "reasoning", "summary": []},
        call("1"),
        call("2"),
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "dry"}]},
        call("3"),
    ]
    system, said, result, asked = messages_of(items, None)
    assert system == {"role": "system", "content": "Be brief."} and result["content"] == "dry" and result["role"] == "tool"
    assert said["content"] == "I look." and [each["id"] for each in said["tool_calls"]] == ["1", "2"]
    assert [each["id"] for each in asked["tool_calls"]] == ["3"]


def test_a_list_that_grew_as_json_is_the_list() -> None:
    entries = [{"a": [i, "\u20ac", None]} for i in range(600)]
    grown = JsonList()
    sizes = [grown.add(entries[:1]), grown.add([]), grown.add(JsonList.of(entries[1:]))]
    message = {"before": [1], "grown": grown, "twice": [grown, {"inside": JsonList()}], "after": "\ud800"}
    expected = {"before": [1], "grown": entries, "twice": [entries, {"inside": []}], "after": "?"}
    assert json.loads(encode(message)) == expected
    assert sum(sizes) == sum(map(len, grown.parts)) and len(grown.parts) == 4
    with pytest.raises(TypeError, match="set has no JSON"):
        encode({"a": set()})
