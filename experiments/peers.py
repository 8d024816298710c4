"""Engines with requirements that ours cannot share: each runs in an environment of its own, `.venv-<name>`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from importlib import util
from pathlib import Path

from common.errors import BackendError
from common.weights.checkpoint import Checkpoint
from experiments.convert import gguf_file, hugging_face_directory

ROOT = Path(__file__).resolve().parent.parent
PEERS: Mapping[str, Callable[[Checkpoint, str], Path]] = {"llamacpp": gguf_file, "vllm": hugging_face_directory}
"""Each with what writes a checkpoint in the form, and in the dtype, that it reads."""
PACKAGES: Mapping[str, str] = {"hf": "transformers"}
"""What an engine that runs in our own environment needs there beside what all need."""


def peers_folder() -> Path:
    """Where `make peers` puts the environments: the root of the repository, unless $TANDEM_PEERS names another folder."""
    return Path(os.environ.get("TANDEM_PEERS") or ROOT)


def interpreter(name: str) -> Path:
    """The Python that runs engine `name`: this one, or that of a peer's environment. Raises `BackendError` if there is none, or
    not all of it."""
    if name not in PEERS:
        package = PACKAGES.get(name)
        if package and not util.find_spec(package):
            raise BackendError(f"engine={name} needs the package {package!r}. Run: pip install -e '.[baselines]'")
        return Path(sys.executable)
    folder = peers_folder() / f".venv-{name}"
    python = folder / "bin" / "python"
    if not python.exists() or not (folder / "done").exists():
        there = f"{folder} is not whole" if python.exists() else f"there is no {python}"
        raise BackendError(
            f"engine={name} runs in an environment of its own, and {there}. Run: make peers. "
            "(TANDEM_PEERS names another folder to look in.)"
        )
    return python.absolute()


def module_settings(name: str) -> dict[str, str]:
    """Where a peer's Python finds our modules, and nothing else of this process's."""
    return {"PYTHONPATH": str(ROOT)} if name in PEERS else {}
