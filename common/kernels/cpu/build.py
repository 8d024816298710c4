"""Compile a C++ file of this folder into a shared library: once for each source, compiler and processor."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from common.config import Dtype
from common.errors import BackendError, CheckpointError
from common.process import process_group
from common.process.child import how_it_ended
from common.system.hardware import cpu_features, cpu_name, cpu_vendor, cxx_compiler, matrix_unit
from common.weights.zoo import cache_directory

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-ffp-contract=off")
"""`-ffp-contract=off`: an a * b + c in the source stays two operations. Where one is meant, the source calls fma."""
INTEL = ("-DTANDEM_WIDEN", "-DTANDEM_FEW_ROWS=0", "-DTANDEM_NEAR=2048")
"""For Intel's processors, as measured on Emerald Rapids: a dot product of pairs is slower than the two fused multiply-adds that
it replaces; and weights want to be fetched ahead even where they meet a single row, and again into the nearest cache."""
AMX = ("-DTANDEM_AMX",)
"""Where this process may use Intel's matrix unit: products of bfloat16 go through it."""
BUILDING = "building-"
READ = 2000
"""Characters of a compiler that are told."""
UNUSED = 30 * 24 * 3600
"""Seconds after its last use when a library goes."""


def build(
    name: str, include: Sequence[str] = (), options: Sequence[str] = (), linked: Sequence[str] = (), version: str = ""
) -> Path:
    """The library made from `<name>.cc` and the headers beside it, compiled unless an earlier call did. `include` names folders
    of headers that are not ours, `version` tells which they are; `options` and `linked` go before and after the source, and the
    options in the environment's TANDEM_CXXFLAGS behind ours. Raises `BackendError` with the compiler's words if it fails, or if
    libraries cannot be kept."""
    compiler = cxx_compiler()
    flags = [*options, *machine_options(), *(f"-isystem{folder}" for folder in include)]
    command = [*compiler, *flags, str(FOLDER / f"{name}.cc"), *linked]
    digest = _digest([*command, version, _run([*compiler, "--version"]).stdout])
    try:
        target = cache_directory() / "kernels" / f"{name}-{digest}.so"
        if not (target.exists() and _use(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _alone(target.parent / f"{name}.lock"):
                if not (target.exists() and _use(target)):  # another has not done it meanwhile
                    _compile(name, command, target)
                    _remove_unused(target.parent, name)
    except (CheckpointError, OSError) as error:
        raise BackendError(f"Native kernels need a cache that can be written; TANDEM_CACHE can name one: {error}") from error
    return target


def machine_options() -> tuple[str, ...]:
    """What every library is compiled with on this machine. What a processor is to compute with is among it."""
    tuned = (*(INTEL if cpu_vendor() == "GenuineIntel" else ()), *(AMX if matrix_unit() else ()))
    return (*OPTIONS, *tuned, *os.environ.get("TANDEM_CXXFLAGS", "").split())


def arithmetic(library: Path, dtype: Dtype) -> str:
    """What an engine's library multiplies with in `dtype`: `AMX`, `AVX-512 BF16`, `AVX-512` or `portable vectors`."""
    told = ctypes.CDLL(str(library)).tandem_arithmetic
    told.argtypes, told.restype = [ctypes.c_bool], ctypes.c_char_p
    return str(told(dtype == "bfloat16"), "ascii")


def _compile(name: str, command: Sequence[str], target: Path) -> None:
    log.warning("compiling %s.cc for this processor, once, which can take a minute; kept in %s", name, target.parent)
    # Under a name of its own first: where there are no locks two processes may build at once, and neither may load half a file.
    with tempfile.TemporaryDirectory(prefix=BUILDING, dir=target.parent) as folder:
        half = Path(folder) / target.name
        done = _run([*command, "-o", str(half)])
        if done.returncode or not half.exists():
            told = f"{command[0]} could not compile {name}.cc: it {how_it_ended(done.returncode)}.\n{first_error(done.stderr)}"
            raise BackendError(told.rstrip())
        # A library that was cut short would take the process down with it: its digest tells.
        (half.parent / "digest").write_text(_file_digest(half), encoding="utf-8")
        os.replace(half, target)
        os.replace(half.parent / "digest", target.with_suffix(".digest"))


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time; the others wait, and find what it has made."""
    import fcntl  # not on Windows

    with lock.open("a") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _use(target: Path) -> bool:
    """Whether a library is there and whole. It has been used now, so that nobody removes it before it is loaded."""
    import fcntl  # not on Windows

    whole = target.with_suffix(".digest")
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: there nobody removes
            fcntl.flock(folder, fcntl.LOCK_SH)
        with suppress(OSError):  # it may be another's
            os.utime(target)
        return target.exists() and whole.exists() and whole.read_bytes() == _file_digest(target).encode()
    finally:
        os.close(folder)


def _remove_unused(folder: Path, name: str) -> None:
    """Remove what older sources, compilers and frameworks left of a kernel. Where others are in the way: the next time."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for library in folder.glob(f"{name}-*.so"):
                if library.stat().st_mtime < time.time() - UNUSED:
                    library.unlink()
                    library.with_suffix(".digest").unlink(missing_ok=True)
            for left in folder.glob(f"{BUILDING}*"):  # of a build that was killed
                if left.stat().st_mtime < time.time() - UNUSED:
                    shutil.rmtree(left, ignore_errors=True)
    finally:
        os.close(handle)


def first_error(words: str) -> str:
    """A compiler's words from its first error on, as many as somebody reads: what follows a wrong line can be long. Their end
    where none is called so."""
    found = re.search(r"^.*\berror\b", words, re.MULTILINE)
    return words[found.start() :][:READ] if found else words[-READ:]


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return process_group.run(command)
    except OSError as error:
        raise BackendError(f"The C++ compiler {command[0]} cannot be run ({error}). Set CXX to one that can.") from error


def _file_digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _digest(command: Sequence[str]) -> str:
    """What the library depends on: our sources, the compiler, its options, the processor that `-march=native` means."""
    sources = [path.read_text(encoding="utf-8") for path in sorted([*FOLDER.glob("*.h"), *FOLDER.glob("*.cc")])]
    parts = [*command, cpu_name(), cpu_features(), *sources]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()
