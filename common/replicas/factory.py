"""The engine that a configuration asks for: one in this process, or several in processes of their own."""

from __future__ import annotations

from common.config import EngineConfig
from common.engine import build_engine
from common.interface import Progress, ServingEngine, find_backend
from common.process.agents import warn_of_idle
from common.replicas.data_parallel import Replicas
from common.replicas.disaggregated import Disaggregated
from common.weights.checkpoint import Checkpoint


def open_engine(backend: str, checkpoint: Checkpoint, config: EngineConfig, progress: Progress | None = None) -> ServingEngine:
    """Ready."""
    warn_of_idle(config.ranks)
    if config.prefill_parallel_size:
        return Disaggregated(backend, checkpoint, config, progress)
    # One that ends its process with a rank is a replica too, though the only one: whoever keeps it starts it again.
    if config.data_parallel_size > 1 or find_backend(backend, config).requires_supervision(config):
        return Replicas(backend, checkpoint, config, progress)
    return build_engine(backend, checkpoint, config, progress)
