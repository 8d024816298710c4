"""`engine=llamacpp_server`: llama.cpp as it is deployed, behind llama-server, given the GGUF file that it reads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from common.config import EngineConfig
from common.interface import Progress
from common.weights.checkpoint import open_checkpoint
from experiments.baselines import openai_http
from experiments.baselines.openai_http import CompletionsEngine, Options
from experiments.engines.conversion import gguf_file

if TYPE_CHECKING:
    from common.weights.checkpoint import Checkpoint

__all__ = ["Options", "build_engine"]

EXACT = ("--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32")
"""Where float32 is asked for: both would round to float16. The last of an option counts."""


def build_engine(
    checkpoint: Checkpoint, config: EngineConfig, progress: Progress | None = None, *, options: Options
) -> CompletionsEngine:
    """As that of `openai_http`; weights in another form are converted once, and kept."""
    written = open_checkpoint(gguf_file(checkpoint, config.dtype))
    if options.command and config.dtype == "float32":
        options = replace(options, command=[*options.command, *EXACT])
    return openai_http.build_engine(written, config, progress, options=options)
