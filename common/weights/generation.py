"""The sampling parameters that the author of a model recommends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import ConfigError, RequestError
from common.request import SamplingParams
from common.weights.files import read_json
from common.weights.gguf_parts import read_metadata

FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Fields of a generation_config.json, as vLLM uses them, and their names in `SamplingParams`."""
GGUF_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def sampling_defaults(path: Path | str) -> dict[str, Any]:
    """Return the recommended sampling parameters of a checkpoint by their names in `SamplingParams`.

    Reads `generation_config.json` of a directory or `general.sampling.*` of a GGUF model. Fields that are absent or null are
    left out, so that a model without recommendations gives an empty mapping. Raises `ConfigError` for a value that
    `SamplingParams` does not take, and `CheckpointError` for a file that cannot be read."""
    path = Path(path)
    if path.suffix == ".gguf":
        return _valid(path, read_metadata(path), GGUF_KEYS)
    file = path / "generation_config.json"
    return _valid(file, read_json(file), FIELDS) if file.exists() else {}


def _valid(file: Path, data: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for field, name in names.items():
        value = data.get(field)
        if value is not None:
            try:
                found[name] = getattr(SamplingParams(**{name: value}), name)
            except RequestError as error:
                raise ConfigError(f"{file}: {field}: {error}") from error
    return found
