"""Tools for a model whose chat template does not know them: described in the system message, in the format `HERMES`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from common.text.tool_calls import HERMES

_INSTRUCTIONS = """You can call functions, each with a JSON Schema of its arguments:
<tools>
{tools}
</tools>
To call a function, write:
<tool_call>
{{"name": "function name", "arguments": {{"argument": "value"}}}}
</tool_call>"""


def with_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Return a conversation in which tools, calls and results of calls are text of system, assistant and user messages.

    `messages` have texts as their content. Without tools, calls and results the conversation comes back unchanged.
    """
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    text = _INSTRUCTIONS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if plain and plain[0].get("role") in ("system", "developer"):
        return [{**plain[0], "content": f"{plain[0].get('content') or ''}\n\n{text}".strip()}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in message.items() if name not in ("tool_calls", "tool_call_id")}
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"}
    calls = message.get("tool_calls")
    if message.get("role") == "assistant" and isinstance(calls, list) and calls:
        written = "\n".join(_written(call) for call in calls)
        return {**rest, "content": f"{message.get('content') or ''}\n{written}".strip()}
    return rest


def _written(call: Any) -> str:
    """Return a call of the history as the model would write it. `arguments` are JSON text, or an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    named = function if isinstance(function, Mapping) else {}
    arguments = named.get("arguments") or "{}"
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    (begin,), name = HERMES.begin, json.dumps(named.get("name"), ensure_ascii=False)
    return f'{begin}\n{{"name": {name}, "arguments": {text}}}\n{HERMES.end}'
