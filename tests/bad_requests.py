"""Requests that are to be refused, and with what status: the ways in which people, programs and attackers get them wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 326
CONTEXT = 512
COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "the", "max_tokens": 2},
    CHAT: {"messages": [{"role": "user", "content": "Say it"}], "max_tokens": 2},
    TOKENIZE: {"prompt": "the"},
    DETOKENIZE: {"tokens": [1, 2]},
}


@dataclass(frozen=True)
class Bad:
    """One request and the status of its answer."""

    body: bytes
    status: int = 400
    path: str = COMPLETIONS
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})


def wrong(path: str, status: int = 400, **changes: Any) -> Bad:
    """A good body with something changed; None leaves it out."""
    body = {key: value for key, value in (GOOD[path] | changes).items() if value is not None}
    return Bad(json.dumps(body).encode(), status, path)


def raw(text: str, path: str = COMPLETIONS) -> Bad:
    return Bad(text.encode("utf-8", "surrogatepass"), path=path)


LOGICAL: dict[str, list[Any]] = {
    "max_tokens": [0, -1, 2**31, 2**63, 10**400, 1.5, "10", True, [], CONTEXT],
    "min_tokens": [-1, 3, "1", 2**31],
    "temperature": [-0.1, 1e308, "hot", [], True, 1000],
    "top_p": [0, -1, 1.0001, "x"],
    "top_k": [-2, 2**40, 1.5, "5"],
    "min_p": [-0.1, 1.1, "x"],
    "seed": [-1, 2**64, 1.5, "a"],
    "n": [0, -1, 129, 10**9, 1.5, "2"],
    "stop": ["", [""], [1], {"a": 1}, ["a"] * 65, "a" * 2000],
    "stop_token_ids": [[-1], [VOCABULARY * 10], [2**31], ["1"], 5],
    "stream": ["yes", 1],
    "stream_options": [{"include_usage": True}, 5],
    "ignore_eos": ["true", 1],
    "skip_special_tokens": ["no"],
    "presence_penalty": [3, "x", 1e9],
    "frequency_penalty": [-3],
    "repetition_penalty": [0, -1],
    "logit_bias": [{"abc": 1}, {"-1": 1}, {str(VOCABULARY * 10): 1}, {"1": "x"}, 5],
    "response_format": [{"type": "nonsense"}, 5],
    "cache_salt": ["", 5, "a" * 10_000],
    "priority": [1.5, 2**63],
    "truncate_prompt_tokens": [0, -2, "x"],
    "user": ["u" * 100_000, 5],
}
"""Field → values that neither kind of completion takes."""
ONLY: dict[str, dict[str, list[Any]]] = {
    COMPLETIONS: {
        "prompt": [None, "", [], [[]], ["the", 5], [5, "the"], [[1], "", [2]], [-1], [VOCABULARY * 10], [2**31], [2**63], [1.0],
                   [True], ["5", 5], {"a": 1}, 5, [1] * CONTEXT, "a " * 4000, ["x"] * 2000, "a" * 2_000_000,
                   [[1, [2]]], [None]],
        "logprobs": [-1, 21, 10**6, "true", True],
        "best_of": [2, 0],
        "suffix": ["x"],
    },
    CHAT: {
        "messages": [None, [], "hello", [5], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": "king", "content": "x"}],
                     [{"role": "user", "content": None}], [{"role": "user", "content": 5}],
                     [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}],
                     [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": "x"}] * 10_001],
        "logprobs": [5, "yes"],
        "top_logprobs": [3],
        "tools": [[{"type": "function", "function": {"name": "f"}}], [{"type": "x"}], [{"type": "function"}], 5,
                  [{"type": "function", "function": {"name": "a\nb"}}]],
        "tool_choice": ["required"],
        "chat_template": ["{{ ''.__class__.__mro__ }}"],
        "chat_template_kwargs": [{"chat_template": "x"}, {"tokenize": True}],
        "max_completion_tokens": [0, -1],
    },
    TOKENIZE: {"prompt": [None, 5, ["a"]], "messages": [[{"role": "user", "content": "x"}], 5], "add_special_tokens": [1]},
    DETOKENIZE: {"tokens": [None, [-1], [VOCABULARY * 10], ["a"], [1.5], 5, [True]]},
}  # fmt: skip
JSON = {"content-type": "application/json"}
FRAMING = [
    raw(""), raw("{"), raw('{"prompt": "the"'), raw("[]"), raw("null"), raw('"text"'), raw("5"), raw("[" * 100_000),
    raw('{"prompt":' * 50_000), raw('{"prompt": "\ud800"}'), raw(r'{"prompt": "\ud800"}'), Bad(b'{"prompt": "\xff\xfe"}'),
    raw('{"prompt": "the", "temperature": NaN}'), raw('{"prompt": "the", "temperature": Infinity}'),
    raw('{"prompt": "the", "temperature": 1e999}'), raw('{"prompt": "the", "top_p": NaN}'),
    Bad(b"prompt=the", 415, headers={"content-type": "application/x-www-form-urlencoded"}), Bad(b"{}", 415, headers={}),
    Bad(b"\x1f\x8b", 415, headers={**JSON, "content-encoding": "gzip"}), Bad(b" " * ((1 << 24) + 1), 413),
    Bad(b"", 405, method="GET"), Bad(b"", 405, method="DELETE"), Bad(b"", 404, "/v1/nothing"),
    Bad(b"", 404, "/../../etc/passwd"), Bad(b"", 405, "/v1/models"), Bad(b"{}", 400, "/v1/embeddings"),
    Bad(b"", 404, "/start_profile"),
    wrong(COMPLETIONS, 404, model="other"), wrong(CHAT, 404, model="gpt-4"), wrong(COMPLETIONS, model=5),
    wrong(TOKENIZE, 404, model="other"), wrong(COMPLETIONS, 404, model="x" * 100_000),
    wrong(COMPLETIONS, 404, model="\r\nx: y"),
]  # fmt: skip
CASES = [
    *FRAMING,
    *(wrong(path, **{name: value}) for name, values in LOGICAL.items() for value in values for path in (COMPLETIONS, CHAT)),
    *(wrong(path, **{name: value}) for path, fields in ONLY.items() for name, values in fields.items() for value in values),
]
