"""Calls of tools and reasoning in the text of a model, however the text is cut into pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest

from common.text.reasoning import Reasoning, ReasoningParser
from common.text.tool_calls import FORMATS, HERMES, LLAMA3_JSON, MISTRAL, PYTHONIC, ToolCalls, ToolFormat, format_of_template
from common.text.tool_prompt import with_tools

SIZES = (1, 2, 3, 7, 1000)
NESTED = r'{"x": [1, {"y": "}, \" ]"}], "é": "\ud83d"}'
CALLS = [("f", NESTED), ("g", "{}")]


def followed(form: ToolFormat, text: str, size: int, **options: Any) -> tuple[str, list[tuple[str, str]], int]:
    """Return the plain text, the calls, and the number of parts that they came in."""
    parser, plain, calls, count = ToolCalls(form, **options), "", list[list[str]](), 0
    for i in range(0, len(text), size):
        shown, parts = parser.push(text[i : i + size], last=i + size >= len(text))
        plain += shown
        for part in parts:
            count += 1
            if "id" in part:
                assert part["index"] == len(calls) and part["type"] == "function"
                calls.append([part["function"]["name"], ""])
            assert part["index"] == len(calls) - 1
            calls[-1][1] += part["function"]["arguments"]
    return plain, [(name, arguments) for name, arguments in calls], count


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    ("name", "text", "plain"),
    [
        ("hermes", 'I see. <tool_call>\n{"name": "f", "arguments": %s }\n</tool_call><tool_call>{"arguments":{},"name":"g"}'
         "</tool_call> Done.", "I see.  Done."),
        ("llama3_json", ' {"name": "f", "parameters": %s}; {"name": "g", "parameters": {}}', ""),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": %s};{"type": "x", "name": "g", "parameters": {}}', ""),
        ("mistral", 'Well.[TOOL_CALLS][{"name": "f", "arguments": %s}, {"name": "g", "arguments": {}, "id": "1"}]', "Well."),
        ("mistral", "[TOOL_CALLS]f%s[TOOL_CALLS]g[ARGS]{}", ""),
    ],
)  # fmt: skip
def test_the_calls_of_each_format_are_found_as_the_model_wrote_them(name: str, text: str, plain: str, eager: bool) -> None:
    for size in SIZES:
        shown, calls, _ = followed(FORMATS[name], text % NESTED, size, eager=eager)
        assert (shown, calls) == (plain, CALLS)
        assert followed(FORMATS[name], text % NESTED, size, eager=eager, most=1)[:2] == (plain, CALLS[:1])


def test_a_pythonic_list_of_calls_is_parsed_and_never_evaluated() -> None:
    text = '[f(city="Köln", n=-1, deep={"a": [True, None]}), shop.order()]'
    for size in SIZES:
        plain, calls, _ = followed(PYTHONIC, text, size)
        assert plain == "" and [(name, json.loads(arguments)) for name, arguments in calls] == [
            ("f", {"city": "Köln", "n": -1, "deep": {"a": [True, None]}}), ("shop.order", {}),
        ]  # fmt: skip
    for other in ('[f(a=__import__("os"))]', "[f(1)]", "[f(**x)]", "[1, 2]", "[f(a=1)", "[" * 5000, "[f(a=1e999)]", "[]"):
        assert followed(PYTHONIC, other, 1000)[:2] == (other, [])


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, "no call <tool"),
        (HERMES, "<tool_call>{not json}</tool_call>"),
        (HERMES, '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": "text"}</tool_call>'),
        (HERMES, '<tool_call>f{"x": 1}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f"'),
        (HERMES, "a << b <<tool_call"),
        (LLAMA3_JSON, 'An answer with {"name": "f", "parameters": {}}'),
        (LLAMA3_JSON, '{"answer": 42}'),
        (LLAMA3_JSON, '{"name": "Ann", "age": 7'),
        (MISTRAL, "[TOOL_CALLS]nothing"),
        (PYTHONIC, "Words [f(x=1)]"),
    ],
)
def test_text_that_is_no_call_stays_as_it_is(form: ToolFormat, text: str) -> None:
    for size in SIZES:
        for eager in (False, True):
            assert followed(form, text, size, eager=eager)[:2] == (text, [])


def test_arguments_come_while_they_are_written() -> None:
    arguments = json.dumps({"text": "x" * 200})
    text = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
    _, calls, parts = followed(HERMES, text, 5, eager=True)
    assert calls == [("f", arguments)] and parts > 35
    assert followed(HERMES, text, 5)[2] == 1


def test_a_template_decides_the_format() -> None:
    named = {
        "{{ '[TOOL_CALLS]' }}": MISTRAL,
        "{% if '<|python_tag|>' %}": LLAMA3_JSON,
        "<tool_call> <|python_tag|>": HERMES,
        "": HERMES,
    }
    assert {text: format_of_template(text) for text in named} == named and format_of_template(None) is HERMES


@pytest.mark.parametrize(
    ("parser", "text", "reasoning", "answer"),
    [
        ("qwen3", "<think>\nHm.</think>\n\nYes.", "\nHm.", "\n\nYes."),
        ("qwen3", " \n<think>Hm.</think>Yes.", "Hm.", "Yes."),
        ("qwen3", "Yes, a <think> and a </think>.", "", "Yes, a <think> and a </think>."),
        ("qwen3", "<think>Hm. </thi", "Hm. </thi", ""),
        ("qwen3", "  ", "", "  "),
        ("deepseek_r1", "Hm.</think>Yes.", "Hm.", "Yes."),
        ("deepseek_r1", "<think>Hm.</think>Yes. </think>", "Hm.", "Yes. </think>"),
    ],
)
def test_reasoning_and_answer_are_apart(parser: ReasoningParser, text: str, reasoning: str, answer: str) -> None:
    for size in SIZES:
        reader, found = Reasoning.of(parser), ["", ""]
        for i in range(0, len(text), size):
            parts = reader.push(text[i : i + size], last=i + size >= len(text))
            found = [old + new for old, new in zip(found, parts, strict=True)]
        assert found == [reasoning, answer]


def test_a_conversation_with_tools_becomes_text_for_a_template_that_knows_none() -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "dry"},
    ]
    system, user, assistant, result = with_tools(messages, tools)
    assert system["content"].startswith("Be brief.\n\nYou can call") and json.dumps(tools[0]) in system["content"]
    assert user == messages[1] and result == {"role": "user", "content": "<tool_response>\ndry\n</tool_response>"}
    (found,) = followed(HERMES, assistant["content"], 1000)[1]
    assert found == ("weather", '{"city": "Köln"}') and "tool_calls" not in assistant
    assert with_tools(messages[1:2], tools)[0]["role"] == "system" and with_tools(messages[:2], None) == messages[:2]
