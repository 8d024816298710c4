"""Engines with requirements that ours cannot share: each runs in an environment of its own, `.venv-<name>`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from common.errors import BackendError
from common.weights.checkpoint import Checkpoint
from experiments.convert import gguf_file, hugging_face_directory

ROOT = Path(__file__).resolve().parent.parent
PEERS: Mapping[str, Callable[[Checkpoint, str], Path]] = {"llamacpp": gguf_file, "vllm": hugging_face_directory}
"""Each with what writes a checkpoint in the form, and in the dtype, that it reads."""


def peers_folder() -> Path:
    """Where `make peers` puts the environments: the root of the repository, unless $TANDEM_PEERS names another folder."""
    return Path(os.environ.get("TANDEM_PEERS") or ROOT)


def interpreter(name: str) -> Path:
    """The Python that runs engine `name`: this one, or that of a peer's environment. Raises `BackendError` if there is none."""
    if name not in PEERS:
        return Path(sys.executable)
    python = peers_folder() / f".venv-{name}" / "bin" / "python"
    if not python.exists():
        raise BackendError(
            f"engine={name} runs in an environment of its own, and there is no {python}. Run: make peers. "
            "(TANDEM_PEERS names another folder to look in.)"
        )
    return python.absolute()


def module_settings(name: str) -> dict[str, str]:
    """Where a peer's Python finds our modules, and nothing else of this process's."""
    return {"PYTHONPATH": str(ROOT)} if name in PEERS else {}
