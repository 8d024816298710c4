"""`engine=llamacpp_server`: llama.cpp as it is deployed, behind llama-server, given the GGUF file that it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.config import EngineConfig
from common.interface import Progress
from common.weights.checkpoint import open_checkpoint
from experiments.baselines import openai_http
from experiments.baselines.openai_http import CompletionsEngine, Options
from experiments.convert import gguf_file

if TYPE_CHECKING:
    from common.weights.checkpoint import Checkpoint

__all__ = ["Options", "build_engine"]


def build_engine(
    checkpoint: Checkpoint, config: EngineConfig, progress: Progress | None = None, *, options: Options
) -> CompletionsEngine:
    """As that of `openai_http`; weights in another form are converted once, and kept."""
    written = open_checkpoint(gguf_file(checkpoint, config.dtype))
    return openai_http.build_engine(written, config, progress, options=options)
