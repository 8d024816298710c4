"""litellm against two servers of one model: python calls_litellm.py MODEL URL URL_OF_A_SHORT_CONTEXT

It runs in an environment of its own, so it imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

import litellm

MODEL, URL, SHORT_URL = sys.argv[1:]
HERE: dict[str, Any] = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": "none", "num_retries": 0}
SHORT = HERE | {"api_base": f"{SHORT_URL}/v1"}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": PARAMETERS}}]
QUESTION: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
LONG: Any = [{"role": "user", "content": "x " * 1000}]
"""Too long for the short context only."""


def chats() -> None:
    options = HERE | {"messages": QUESTION, "temperature": 0, "max_tokens": 12}
    whole = litellm.completion(**options).choices[0].message.content
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**options, stream=True))
    assert whole and whole == streamed, (whole, streamed)
    text = litellm.text_completion(**HERE | {"model": f"text-completion-openai/{MODEL}"}, prompt="One, two,", max_tokens=4)
    assert text.choices[0].text


def tools() -> None:
    options = HERE | {"messages": QUESTION, "tools": TOOLS, "tool_choice": "required", "temperature": 0, "max_tokens": 100}
    answer = litellm.completion(**options).choices[0]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    rebuilt = litellm.stream_chunk_builder(list(litellm.completion(**options, stream=True)))
    (streamed,) = rebuilt.choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "dry"}
    after = litellm.completion(**HERE, messages=[*QUESTION, answer.message.model_dump(), result], tools=TOOLS, max_tokens=4)
    assert after.choices[0].message.content


def structured_outputs() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "place", "schema": PARAMETERS, "strict": True}}
    answer = litellm.completion(**HERE, messages=QUESTION, response_format=schema, temperature=0, max_tokens=100)
    assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome")


def context_fallback() -> None:
    """litellm recognizes that the context is too short, and its router asks the deployment with the longer one."""
    try:
        litellm.completion(**SHORT, messages=LONG, max_tokens=4)
    except litellm.ContextWindowExceededError:
        pass
    else:
        raise AssertionError("the long conversation was answered")
    names = {"short": SHORT, "long": HERE}
    deployments: Any = [{"model_name": name, "litellm_params": given} for name, given in names.items()]
    router = litellm.Router(deployments, context_window_fallbacks=[{"short": ["long"]}], num_retries=0)
    assert router.completion(model="short", messages=LONG, max_tokens=4).usage.prompt_tokens > 1000


for test in (chats, tools, structured_outputs, context_fallback):
    test()
print("litellm", version("litellm"))
