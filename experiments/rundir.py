"""A run is a directory: what was asked, on which machine, every request, and the results."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from omegaconf import DictConfig, OmegaConf

from common.errors import ConfigError, TandemError
from common.platform import cores, cpu_name

PARTIAL = ".partial"
PACKAGES = ("tandem-infer", "jax", "jaxlib", "flax", "torch", "transformers", "numpy", "ml_dtypes", "gguf", "tokenizers")


@contextlib.contextmanager
def run_directory(root: Path, what: str) -> Iterator[Path]:
    """A new directory `root/<date-time>-<what>`, which ends in `.partial` until the block has ended well.

    A `TandemError` removes it, since nothing was run; after a crash or a kill it stays as `.partial`, with its logs.
    """
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{what}"
    names = (stem if number == 1 else f"{stem}-{number}" for number in range(1, 1000))
    name = next(name for name in names if not (root / name).exists() and not (root / (name + PARTIAL)).exists())
    partial = root / (name + PARTIAL)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"The run directory {partial} cannot be made: {error}. Set runs to a folder that can.") from error
    try:
        yield partial
    except TandemError:
        shutil.rmtree(partial)
        with contextlib.suppress(OSError):
            root.rmdir()  # if it was made for this run, it is empty now
        raise
    partial.rename(root / name)


def finished(partial: Path) -> Path:
    """The name that `partial` takes when its run has ended."""
    return partial.with_name(partial.name.removesuffix(PARTIAL))


def write_setup(directory: Path, config: DictConfig) -> None:
    """The resolved configuration and the machine, written before anything runs."""
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    write_json(directory / "environment.json", environment())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def environment() -> dict[str, Any]:
    """What a number measured here depends on, as far as the machine tells."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "argv": sys.orig_argv,
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": lines_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := installed_version(name))},
        "variables": {name: os.environ[name] for name in ("XLA_FLAGS", "OMP_NUM_THREADS", "PJRT_NPROC") if name in os.environ},
        "commit": next(iter(lines_of("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")), None),
    }


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def lines_of(*command: str) -> list[str]:
    """What a program prints; nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return []
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return []
    return answer.stdout.split("\n")[:-1] if answer.returncode == 0 else []
