"""`engine=vllm_server`: vLLM as it is deployed, behind its own server, given the Hugging Face directory that it reads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from common.config import EngineConfig
from common.interface import Progress
from common.weights.checkpoint import open_checkpoint
from experiments.baselines import openai_http
from experiments.baselines.openai_http import CompletionsEngine, Options
from experiments.engines.conversion import hugging_face_directory

if TYPE_CHECKING:
    from common.weights.checkpoint import Checkpoint

__all__ = ["Options", "build_engine"]


def build_engine(
    checkpoint: Checkpoint, config: EngineConfig, progress: Progress | None = None, *, options: Options
) -> CompletionsEngine:
    """As that of `openai_http`; weights in another form are converted once, and kept. A server compiles unless told."""
    written = open_checkpoint(hugging_face_directory(checkpoint, config.dtype))
    if options.command and not config.compile:
        options = replace(options, command=[*options.command, "--enforce-eager"])
    return openai_http.build_engine(written, config, progress, options=options)
