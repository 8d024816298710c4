"""Refuse options that an engine does not have, before weights are converted or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.config import EngineConfig, expect

ALONE = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1, "prefill_parallel_size": 0}
"""One engine on one rank."""
LLAMACPP = ALONE | {
    "schedule": "continuous",
    "cache": "dense",
    "enable_chunked_prefill": True,
    "enable_prefix_caching": False,
    "compile": False,  # it is compiled already
}
POLICIES: Mapping[str, Mapping[str, Any]] = {
    "hf": ALONE | {"schedule": "static", "cache": "dense", "compile": False},
    "llamacpp": LLAMACPP,
    "llamacpp_gguf": LLAMACPP,
    "vllm": ALONE | {"schedule": "continuous", "cache": "paged"},
}
"""engine → each option of which it has one value alone, with that."""


def check_policies(name: str, config: EngineConfig) -> None:
    """Raise `ConfigError` unless `config` has the options that engine `name` needs."""
    config.check_backend(name)
    for option, value in POLICIES.get(name, {}).items():
        given = getattr(config, option)
        expect(given == value, f"engine={name} has {option}={spelt(value)} and nothing else; got {spelt(given)}.")


def spelt(value: Any) -> str:
    """As the command line has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
