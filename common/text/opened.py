"""The tokenizer, the chat template and the sampling defaults of a model, or others that a user puts in their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import CheckpointError
from common.text.chat import MAX_TEMPLATE
from common.text.tokenizer import Tokenizer, open_tokenizer
from common.weights.checkpoint import Checkpoint
from common.weights.files import read_file
from common.weights.generation import sampling_defaults
from common.weights.zoo import resolve


def tokenizer_of(checkpoint: Checkpoint, tokenizer: str | None = None, chat_template: str | None = None) -> Tokenizer:
    """Return the tokenizer of a checkpoint, or that of another model, with its chat template or another one.

    `tokenizer` is a name, a path or a hub id (`common.weights.zoo`). `chat_template` is the path of a file, or the template
    itself. Raises `CheckpointError` if either cannot be had, or if the vocabulary does not fit the model.
    """
    opened = open_tokenizer(checkpoint.path if tokenizer is None else resolve(tokenizer))
    opened.check_fits(checkpoint.config.vocab_size)
    if chat_template is not None:
        opened.chat_template = _template(chat_template)
    return opened


def defaults_of(checkpoint: Checkpoint, generation_config: str = "auto") -> dict[str, Any]:
    """Return sampling parameters for requests that give none.

    `auto`: those that the checkpoint recommends. `vllm`: none, as vLLM calls it. Otherwise a directory with a
    generation_config.json. Raises `ConfigError` or `CheckpointError` if they cannot be read.
    """
    if generation_config == "vllm":
        return {}
    path = checkpoint.path if generation_config == "auto" else Path(generation_config)
    if generation_config != "auto" and not (path / "generation_config.json").exists():
        raise CheckpointError(f"{generation_config} has no generation_config.json. Give a directory, auto, or vllm for none.")
    found = sampling_defaults(path)
    found.pop("max_tokens", None)  # a default must not refuse a prompt for which it leaves no room
    return found


def _template(given: str) -> str:
    if "{" in given:
        return given
    path = Path(given).expanduser()
    if not path.exists():
        raise CheckpointError(f"The chat template {given!r:.200} is neither a file nor a Jinja template, which has braces.")
    return read_file(path, MAX_TEMPLATE).decode("utf-8", errors="replace")
