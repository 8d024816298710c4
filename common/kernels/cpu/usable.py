"""Whether the CPU kernels serve a model under an engine's settings."""

from __future__ import annotations

import logging
from collections.abc import Callable

from common.config import EngineConfig, ModelConfig
from common.errors import BackendError, ConfigError
from common.kernels.cpu.pack import LANES, MAX_HEAD_DIM

log = logging.getLogger(__name__)


def unusable(config: EngineConfig, model: ModelConfig, device: str, open_library: Callable[[], object]) -> str | None:
    """Why `kernels` does not mean native here; None where it does. Where `auto` cannot have it, the log says so too; where
    `native` cannot, `ConfigError` or `BackendError` does. `open_library` compiles and loads it."""
    if config.kernels == "framework":
        return "kernels=framework"
    told = "kernels=auto: using framework (%s)"
    if reason := against(config, model, device):
        if config.kernels == "native":
            raise ConfigError(f"kernels=native cannot be used here: {reason}. Use kernels=auto or kernels=framework.")
        log.info(told, reason)
        return reason
    try:
        try:
            open_library()
        except OSError as error:
            raise BackendError(f"kernels=native cannot load its library: {error}") from error
    except BackendError as error:
        if config.kernels == "native":
            raise
        log.warning(told, error)  # several times slower, and nobody asked for it
        return str(error)
    return None


def against(config: EngineConfig, model: ModelConfig, device: str) -> str | None:
    """What in the settings or the model the kernels do not serve; None if nothing."""
    if device != "cpu":
        return f"there are native kernels for cpu, not for {device}"
    if config.dtype == "float16":
        return "native kernels compute in float32 and bfloat16, not in float16"
    if config.compile:
        return "compile=true has nothing to compile there"
    if config.block_size % LANES:
        return f"block_size must be a multiple of {LANES}, got {config.block_size}"
    if model.head_dim > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {model.head_dim}"
    return None
