"""Compile a C++ file of this folder into a shared library: once for each source, compiler and processor."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.errors import BackendError
from common.platform import cpu_features, cpu_name, has_cxx_compiler
from common.weights.zoo import cache_directory

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-ffp-contract=off")
"""`-ffp-contract=off`: an a * b + c in the source stays two operations. Where one is meant, the source calls fma."""


def build(
    name: str, include: Sequence[str] = (), options: Sequence[str] = (), linked: Sequence[str] = (), version: str = ""
) -> Path:
    """The library made from `<name>.cc` and the headers beside it, compiled unless an earlier call did. `include` names folders
    of headers that are not ours, `version` tells which they are; `options` and `linked` go before and after the source, and the
    options in the environment's TANDEM_CXXFLAGS behind ours. Raises `BackendError` with the compiler's words if it fails."""
    compiler = has_cxx_compiler()
    if compiler is None:
        raise BackendError("kernels=native needs a C++ compiler and found none: install g++ or set CXX.")
    flags = [*OPTIONS, *options, *os.environ.get("TANDEM_CXXFLAGS", "").split(), *(f"-I{folder}" for folder in include)]
    command = [compiler, *flags, str(FOLDER / f"{name}.cc"), *linked]
    target = cache_directory() / "kernels" / f"{name}-{_digest([*command, version])}.so"
    whole = target.with_suffix(".digest")
    if not (target.exists() and whole.exists() and whole.read_text() == _file_digest(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        log.info("compiling %s.cc", name)
        # Under a name of its own first: two processes may build at once, and neither may load half a file.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            half = Path(folder) / target.name
            done = subprocess.run([*command, "-o", str(half)], capture_output=True, text=True, errors="replace")
            if done.returncode:
                raise BackendError(f"{compiler} could not compile {name}.cc:\n{done.stderr[-2000:]}")
            # A library that was cut short would take the process down with it: its digest tells.
            (half.parent / "digest").write_text(_file_digest(half))
            os.replace(half, target)
            os.replace(half.parent / "digest", whole)
    return target


def _file_digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _digest(command: Sequence[str]) -> str:
    """What the library depends on: our sources, the compiler, its options, the processor that `-march=native` means."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, errors="replace").stdout
    sources = [path.read_text() for path in sorted([*FOLDER.glob("*.h"), *FOLDER.glob("*.cc")])]
    parts = [*command, version, cpu_name(), cpu_features(), *sources]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()
