"""Calls of tools in what a model writes, as Hermes and Qwen do: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"
SPACE = re.compile(r"[ \t\n\r]*")
"""What JSON allows between its parts."""


class ToolCalls:
    """Follows one text. What may be part of a call is held back; a call comes out whole, once it is complete."""

    def __init__(self) -> None:
        self.count = 0
        self._held = ""

    def push(self, text: str, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """(plain text, calls) that `text` completes. What turns out to be no call is plain text."""
        text, plain, calls = self._held + text, "", []
        while BEGIN in text:
            before, _, after = text.partition(BEGIN)
            inner, end, rest = after.partition(END)
            plain += before
            if not end:
                text = BEGIN + after
                break
            call = parse_call(inner)
            if call is None:
                plain += BEGIN + inner + END
            else:
                calls.append({"index": self.count, "id": f"call-{uuid.uuid4().hex}", "type": "function", "function": call})
                self.count += 1
            text = rest
        keep = 0 if last else len(text) if text.startswith(BEGIN) else _overlap(text)
        self._held = text[len(text) - keep :]
        return plain + text[: len(text) - keep], calls


def _overlap(text: str) -> int:
    """How many characters at the end of `text` may begin a call."""
    return next(n for n in range(len(BEGIN) - 1, -1, -1) if text.endswith(BEGIN[:n]))


def parse_call(text: str) -> dict[str, str] | None:
    """`name` and `arguments`, these as the JSON text that the model wrote, as OpenAI has them; None if it is no call."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    match call:
        case {"name": str(name), "arguments": dict()}:
            return {"name": name, "arguments": written(text)["arguments"]}
        case {"name": str(name), "parameters": dict()}:
            return {"name": name, "arguments": written(text)["parameters"]}
    return None


def written(text: str) -> dict[str, str]:
    """The members of a JSON object as they stand in its text: numbers and escapes may say what Python's values cannot."""
    read, members = json.JSONDecoder().raw_decode, dict[str, str]()
    at = _after_space(text, text.index("{") + 1)
    while text[at] != "}":
        name, at = read(text, at)
        begin = _after_space(text, _after_space(text, at) + 1)  # behind the colon
        _, at = read(text, begin)
        members[name] = text[begin:at]
        at = _after_space(text, at)
        if text[at] == ",":
            at = _after_space(text, at + 1)
    return members


def _after_space(text: str, at: int) -> int:
    space = SPACE.match(text, at)
    assert space is not None  # none is some
    return space.end()


def call_grammar(functions: Mapping[str, Any]) -> str:
    """A grammar, as `StructuredOutputsParams` takes it, of one call of one of these functions: name → JSON Schema."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                "arguments": {"type": "object"} if schema is None else moved(schema, f"#/anyOf/{i}/properties/arguments"),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, (name, schema) in enumerate(functions.items())
    ]
    return f'start: "{BEGIN}\\n" call "\\n{END}"\ncall: %json {json.dumps({"anyOf": calls})}'


def moved(schema: Any, to: str) -> Any:
    """A JSON Schema, or a part of one, that comes to stand at `to` in another, and whose references to itself follow it."""
    match schema:
        case {"$ref": str(reference)} if reference == "#" or reference.startswith("#/"):
            return {**{name: moved(part, to) for name, part in schema.items()}, "$ref": to + reference[1:]}
        case dict():
            return {name: moved(part, to) for name, part in schema.items()}
        case list():
            return [moved(part, to) for part in schema]
    return schema
