"""langchain-openai against two servers of one model: python calls_langchain.py MODEL URL URL_OF_A_SHORT_CONTEXT

It runs in an environment of its own, so it imports nothing of this project.
"""

from __future__ import annotations

import asyncio
import sys
from importlib.metadata import version
from typing import Any, Literal

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

MODEL, URL, SHORT_URL = sys.argv[1:]
HERE: dict[str, Any] = {"model": MODEL, "base_url": f"{URL}/v1", "api_key": "none", "max_retries": 0}
SHORT = HERE | {"base_url": f"{SHORT_URL}/v1"}
QUESTION = "What is the weather in Rome?"
APIS = (False, True)
"""Whether to use the Responses API in place of chat completions."""


class GetWeather(BaseModel):
    """Return the weather of a city."""

    city: Literal["Paris", "Rome"]


def chats() -> None:
    for responses in APIS:
        model = ChatOpenAI(**HERE, temperature=0, max_tokens=12, use_responses_api=responses)
        whole, streamed = model.invoke(QUESTION).text, "".join(chunk.text for chunk in model.stream(QUESTION))
        assert whole and whole == streamed, (whole, streamed)
    assert OpenAI(**HERE, max_tokens=4).invoke("One, two,")
    texts = OpenAIEmbeddings(**HERE, check_embedding_ctx_length=False).embed_documents(["one", "two"])
    assert len(texts) == 2 and texts[0] != texts[1]


async def at_once() -> None:
    """Both APIs in one event loop: langchain keeps its connections for the first."""
    models = [ChatOpenAI(**HERE, temperature=0, max_tokens=12, use_responses_api=responses) for responses in APIS]
    chat, response = await asyncio.gather(*(model.ainvoke(QUESTION) for model in models))
    assert chat.text and chat.text == response.text


def bound_tools() -> None:
    for responses in APIS:
        model = ChatOpenAI(**HERE, temperature=0, max_tokens=100, use_responses_api=responses)
        bound = model.bind_tools([GetWeather], tool_choice="any")
        answer = bound.invoke(QUESTION)
        (call,) = answer.tool_calls
        assert call["name"] == "GetWeather" and GetWeather(**call["args"])
        first, *others = bound.stream(QUESTION)
        (streamed,) = sum(others, start=first).tool_calls
        assert streamed["args"] == call["args"]
        conversation = [HumanMessage(QUESTION), answer, ToolMessage("dry", tool_call_id=call["id"])]
        assert model.bind_tools([GetWeather]).invoke(conversation).usage_metadata["output_tokens"]


def structured_outputs() -> None:
    for responses in APIS:
        model = ChatOpenAI(**HERE, temperature=0, max_tokens=100, use_responses_api=responses)
        for method in ("json_schema", "function_calling"):
            answer = model.with_structured_output(GetWeather, method=method).invoke(QUESTION)
            assert isinstance(answer, GetWeather), (method, answer)


def context_overflow() -> None:
    for responses in APIS:
        for asked, most in (("x " * 1000, 4), ("x", 600)):
            try:
                ChatOpenAI(**SHORT, max_tokens=most, use_responses_api=responses).invoke(asked)
            except ContextOverflowError:
                continue
            raise AssertionError(f"{len(asked)} characters and {most} tokens more were answered")


for test in (chats, bound_tools, structured_outputs, context_overflow):
    test()
asyncio.run(at_once())
print("langchain-openai", version("langchain-openai"), "langchain-core", version("langchain-core"))
