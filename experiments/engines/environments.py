"""Find the Python environment of an outside engine whose requirements conflict with ours: `.venv-<environment>`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from gguf import LlamaFileType

from common.config import expect
from common.errors import BackendError
from common.weights.checkpoint import Checkpoint
from common.weights.gguf_parts import open_parts, read_metadata
from experiments.engines.conversion import gguf_file, hugging_face_directory

ROOT = Path(__file__).resolve().parents[2]


def own_file(checkpoint: Checkpoint, dtype: str) -> Path:
    """Return the GGUF file of a checkpoint as it is, of several parts the first. `dtype` does not change it.

    Raises `ConfigError` for a checkpoint that is no GGUF file."""
    expect(
        checkpoint.path.suffix == ".gguf",
        f"engine=llamacpp_gguf computes on the weights of a GGUF file as stored, and {checkpoint.path} is no GGUF file. "
        "Set model=path/to/file.gguf, or use engine=llamacpp, which converts the checkpoint.",
    )
    return open_parts(checkpoint.path)[0].path


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How to run an outside engine."""

    environment: str
    """The part after `.venv-` in the name of its folder."""
    weights: Callable[[Checkpoint, str], Path]
    """Returns a checkpoint in the format that the engine reads, and in a dtype."""


PEERS: Mapping[str, Peer] = {
    "llamacpp": Peer(environment="llamacpp", weights=gguf_file),
    "llamacpp_gguf": Peer(environment="llamacpp", weights=own_file),
    "vllm": Peer(environment="vllm", weights=hugging_face_directory),
}
PACKAGES: Mapping[str, str] = {"hf": "transformers"}
"""The packages that an engine in our own environment needs beside those of all engines."""


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
    folder = peers_folder() / f".venv-{PEERS[name].environment}"
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


def stored_weights(name: str, checkpoint: Checkpoint) -> str | None:
    """Return the quantization of a GGUF file, such as `Q4_1`, if engine `name` computes on its weights as stored, else None.

    The name is llama.cpp's. For a file without one, it lists the encodings of the tensors.
    Raises `ConfigError` if the engine needs a GGUF file and the checkpoint is none."""
    if name not in PEERS or PEERS[name].weights is not own_file:
        return None
    kind = read_metadata(own_file(checkpoint, "")).get("general.file_type", -1)
    try:
        return LlamaFileType(kind).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return ", ".join(sorted({checkpoint[each].encoding for each in checkpoint.names()}))
