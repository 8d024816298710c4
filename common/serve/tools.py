"""The grammar of a tool call that a request enforces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from common.text.grammar import SPACES
from common.text.tool_calls import HERMES


def call_grammar(functions: Mapping[str, Any]) -> str:
    """Return the grammar of one call of one of these functions (name → JSON Schema), in the format `HERMES`."""
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
    (begin,), end = HERMES.begin, HERMES.end
    schema = {"x-guidance": {"whitespace_pattern": SPACES}, "anyOf": calls}
    return f'start: "{begin}\\n" call "\\n{end}"\ncall: %json {json.dumps(schema)}'


def moved(schema: Any, to: str) -> Any:
    """Return a JSON Schema, or a part of one, for the place `to` in another schema: its references to itself follow it."""
    match schema:
        case {"$ref": str(reference)} if reference == "#" or reference.startswith("#/"):
            return {**{name: moved(part, to) for name, part in schema.items()}, "$ref": to + reference[1:]}
        case dict():
            return {name: moved(part, to) for name, part in schema.items()}
        case list():
            return [moved(part, to) for part in schema]
    return schema
