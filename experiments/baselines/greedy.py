"""What outside engines have in common: which requests they take, and that they refuse settings they would ignore."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from common.config import EngineConfig
from common.config import expect as expect_config
from common.interface import Caps
from common.request import Request, expect


def check_policies(name: str, config: EngineConfig, **policies: Any) -> None:
    """Raise `ConfigError` unless `config` has the `policies` that engine `name` cannot do without."""
    for option, value in policies.items():
        given = getattr(config, option)
        expect_config(given == value, f"engine={name} has {option}={value} and nothing else; got {given!r}.")


def check_request(request: Request, caps: Caps, live: Container[str], advice: str = "") -> int:
    """How many tokens `request` is to get. Raises `RequestError` for one that is not greedy and of a fixed length, that is
    longer than `caps` allow (with `advice` on that), that holds no tokens of the model, or whose id is among the `live`."""
    params, prompt = request.params, request.prompt_token_ids
    where, output_len = f"Request {request.request_id!r}", params.max_tokens or 0
    expect(
        params.greedy and params.ignore_eos and not params.stop and not params.stop_token_ids and output_len > 0,
        f"{where}: engine={caps.backend} takes greedy requests with ignore_eos=True, max_tokens and no stops.",
    )
    expect(all(0 <= token < caps.vocab_size for token in prompt), f"{where}: token ids must lie in [0, {caps.vocab_size}).")
    expect(
        len(prompt) + output_len <= caps.max_model_len,
        f"{where}: {len(prompt)} prompt and {output_len} output tokens exceed max_model_len={caps.max_model_len}.{advice}",
    )
    expect(request.request_id not in live, f"{where} is still live; give each request an id of its own.")
    return output_len
