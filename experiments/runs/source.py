"""Identify the code of a run: the commit, the changes since, and the compiler of its native kernels."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from common.errors import BackendError
from common.kernels.cpu.build import machine_options
from common.system.hardware import cxx_compiler

SOURCES = ("*.py", "*.cc", "*.h", "*.yaml")
"""Files that decide what a run does. Others may lie beside them, large ones too."""
FOLDERS = ("common", "configs", "experiments", "jaxinfer", "torchinfer")
"""The packages of a run, in the folder that holds them all."""
PACKAGES = ("tandem-infer", "jax", "jaxlib", "flax", "torch", "transformers", "numpy", "ml_dtypes", "gguf", "tokenizers")


def source(folder: Path = Path(__file__).parent.parent) -> dict[str, Any]:
    """The state of the repository that holds `folder`: `commit`; `tree`, which is `as committed` or `changed`; `changed_files`
    among `SOURCES`, new ones too, as `git status --porcelain` marks them; `changes_digest` of those and of what stands in them.
    None and empty where git knows of no such repository."""
    found = git(folder, "rev-parse", "HEAD", "--show-toplevel")
    if len(found) < 2 or not git(folder, "ls-files", "."):  # or in one that is another program's
        return {"commit": None, "tree": None, "changed_files": [], "changes_digest": None}
    commit, root = found[0], Path(found[1])
    marked = git(root, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--", *SOURCES, end="\0")
    return {
        "commit": commit,
        "tree": "changed" if marked else "as committed",
        "changed_files": marked,
        "changes_digest": digest(root, marked) if marked else None,
    }


def digest(root: Path, marked: Sequence[str]) -> str:
    """Of files as git marks them (` M common/engine.py`) and of their contents, in hexadecimal."""
    total = hashlib.blake2b(digest_size=12)
    for line in marked:
        file = root / line[3:]
        content = file.read_bytes() if file.is_file() else b""  # it may be the change that it has gone
        total.update(f"{line}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


def code_digest(root: Path = Path(__file__).parents[2]) -> str:
    """Return a hexadecimal digest of the `SOURCES` in `FOLDERS` of `root` and of the versions of `PACKAGES`, without git.

    A commit that changes none of these files, such as one of the documentation, leaves the digest as it is.
    """
    total = hashlib.blake2b(digest_size=6)
    files = (file for folder in FOLDERS for pattern in SOURCES for file in (root / folder).rglob(pattern))
    for file in sorted(files):
        content = file.read_bytes()
        total.update(f"{file.relative_to(root)}\0{len(content)}\0".encode() + content)
    total.update(repr(versions()).encode())
    return total.hexdigest()


def versions() -> dict[str, str]:
    """Return the version of each of `PACKAGES` that is installed."""
    return {name: version for name in PACKAGES if (version := installed_version(name))}


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def compiler() -> dict[str, str]:
    """The C++ compiler that native kernels are made with: its `command`, the first line of its `version`, and the `options` on
    this machine; empty without."""
    try:
        command = cxx_compiler()
    except BackendError:
        return {}
    version = next(iter(lines_of(*command, "--version")), "")
    return {"command": " ".join(command), "version": version, "options": " ".join(machine_options())}


def git(folder: Path, *words: str, end: str = "\n") -> list[str]:
    return lines_of("git", "-C", str(folder), *words, end=end)


def lines_of(*command: str, end: str = "\n") -> list[str]:
    """What a program prints, each line up to its `end`; nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return []
    try:
        answer = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return []
    return answer.stdout.split(end)[:-1] if answer.returncode == 0 else []
