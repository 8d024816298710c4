"""Which code a run is made of: the commit, what has changed since, and what its native kernels are compiled with."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import BackendError
from common.kernels.cpu.build import machine_options
from common.platform import cxx_compiler

SOURCES = ("*.py", "*.cc", "*.h", "*.yaml")
"""Files that decide what a run does. Others may lie beside them, large ones too."""


def source(folder: Path = Path(__file__).parent) -> dict[str, Any]:
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
