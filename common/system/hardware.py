"""The machine: which device to compute on and why, and facts about it that need no framework.

The choice of a device is pure logic. Only a backend knows which platforms are usable, and provides one probe per platform.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from common.errors import BackendError, ConfigError, nearest_hint

logger = logging.getLogger(__name__)

PLATFORMS = ("cuda", "rocm", "xpu", "tpu", "cpu")
"""In the order in which `auto` tries them."""
_CANDIDATES = {"auto": PLATFORMS, "gpu": ("cuda", "rocm", "xpu")} | {name: (name,) for name in PLATFORMS}

Probe = Callable[[], str | None]
"""Returns None where the platform can be used, else a short reason why not. May be slow; must not raise."""


@dataclass(frozen=True)
class Choice:
    """The platform to compute on, and why each one tried before it was passed over."""

    platform: str
    reasons: Mapping[str, str]


def choose(requested: str, probes: Mapping[str, Probe]) -> Choice:
    """Return the first usable platform for `requested`: `auto` tries all in the order of `PLATFORMS`, `gpu` only GPUs.

    A name tries only that platform. `probes` holds what the backend supports; a platform without a probe is skipped. Probes run
    one by one until one succeeds. The debug log has the reasons of the others. Raises `ConfigError` for an unknown name, and
    `BackendError` if no platform is usable.
    """
    if requested not in _CANDIDATES:
        hint = nearest_hint(requested, _CANDIDATES)
        raise ConfigError(f"Unknown device {requested!r}.{hint} Known: {', '.join(_CANDIDATES)}.")
    reasons: dict[str, str] = {}
    for name in _CANDIDATES[requested]:
        reason = probes[name]() if name in probes else "this backend has no support for it"
        if reason is None:
            none = " (no accelerator found; device=gpu tells why)" if name == "cpu" and reasons else ""
            logger.info("device=%s: using %s%s", requested, name, none)
            if reasons:
                logger.debug("%s", _sentence(reasons))
            return Choice(name, reasons)
        reasons[name] = reason
    advice = "" if requested == "auto" else " Use device=auto to fall back to what is there."
    raise BackendError(f"device={requested} cannot be used here: {_sentence(reasons)}.{advice}")


def _sentence(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def cores() -> int:
    """Cores this process may use: its affinity mask, cut by the CPU quota of its cgroup where there is one; at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [tuple(text.split()) for (text,) in cgroup_files("", "cpu.max")]
    quotas += cgroup_files("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")
    for quota, period in quotas:
        if quota not in ("max", "-1"):
            count = min(count, max(1, int(quota) // int(period)))
    return count


def memory_available() -> int:
    """Bytes that can be allocated without swapping, within the memory limit of this process's cgroup."""
    available = psutil.virtual_memory().available
    groups = cgroup_files("", "memory.max", "memory.current", "memory.stat")
    groups += cgroup_files("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    for limit, used, stat in groups:
        if limit != "max":
            reclaimable = dict(line.split() for line in stat.splitlines()).get("inactive_file", 0)
            available = min(available, max(0, int(limit) - int(used) + int(reclaimable)))
    return available


def cgroup_files(controller: str, *names: str) -> list[tuple[str, ...]]:
    """The contents of control files in this process's group and in each above it that has them all, innermost first.

    `controller` is empty for the one hierarchy of cgroup v2, else names a hierarchy of v1.
    """
    try:
        entries = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    root = Path("/sys/fs/cgroup") / controller
    own = next((root / path.lstrip("/") for _, kinds, path in entries if controller in kinds.split(",")), root)
    folders = [folder for folder in (own, *own.parents) if folder.is_relative_to(root)]
    files = [[folder / name for name in names] for folder in folders]
    return [
        tuple(file.read_text(encoding="utf-8").strip() for file in group) for group in files if all(map(Path.is_file, group))
    ]


def cpu_name() -> str:
    """Return the processor's name as its maker prints it, or its architecture if that is unknown."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_vendor() -> str:
    """Return the maker as Linux names it (`GenuineIntel`, `AuthenticAMD`), or an empty string if unknown."""
    return _cpuinfo("vendor_id")


def cpu_features() -> str:
    """Return the instruction sets that Linux reports for the processor; none if unknown."""
    return _cpuinfo("flags", "Features")


@cache
def matrix_unit() -> bool:
    """Request Intel's matrix unit (AMX) for bfloat16 from Linux, and return whether this process may use it.

    Linux refuses where a thread's signal stack is too small for the unit's registers, or where a sandbox is strict.
    """
    if platform.machine() != "x86_64" or "amx_bf16" not in cpu_features().split():
        return False
    arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18  # arch/x86/include/uapi/asm/prctl.h
    return ctypes.CDLL(None).syscall(arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0


def _cpuinfo(*names: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(names):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""


def rss(pid: int | None = None) -> int:
    """Bytes of memory this process holds, or another; 0 if that has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def peak_rss(pid: int | None = None) -> int:
    """Return the peak memory in bytes of this process or of another. If Linux does not report it, return the current memory."""
    try:
        # Not getrusage: on Linux its peak survives exec, so a child would report its parent's.
        for line in Path(f"/proc/{pid or 'self'}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                # Linux adds up its two counts in batches of pages, so that the peak can lag behind what is held.
                return max(int(line.split()[1]) * 1024, rss(pid))
    except OSError:
        pass
    if pid is not None:
        return rss(pid)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def family(pids: Iterable[int]) -> list[psutil.Process]:
    """These processes and their descendants, each once; without those that are no more."""
    found: list[psutil.Process] = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            found += [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return list(dict.fromkeys(found))


def family_memory(pids: Iterable[int]) -> tuple[int, int]:
    """Bytes that these processes and their descendants hold, and have held at most, each by itself, added up."""
    found = family(pids)
    return sum(rss(process.pid) for process in found), sum(peak_rss(process.pid) for process in found)


def thread_settings(threads: int) -> dict[str, str]:
    """The environment in which every framework starts with so many compute threads."""
    count = str(threads)
    return {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "PJRT_NPROC": count,  # XLA's pool, which neither of the others reaches
    }


def cxx_compiler() -> list[str]:
    """The C++ compiler and its own arguments: $CXX, split as a shell would, or else g++, clang++ or c++. Raises `BackendError`
    if there is none, or not the one that CXX names."""
    named = os.environ.get("CXX", "")
    try:
        command = shlex.split(named)
    except ValueError as error:
        raise BackendError(f"CXX={named!r} cannot be split into a compiler and its arguments: {error}.") from error
    for program in command[:1] or ("g++", "clang++", "c++"):
        if path := shutil.which(program):
            return [path, *command[1:]]
    if command:
        raise BackendError(f"CXX={named!r} names no program that is there. Set it to a C++ compiler, or unset it to find one.")
    raise BackendError("There is no C++ compiler: no g++, clang++ or c++ in PATH. Install one, or set CXX.")


def expect_not_forked(framework: str) -> None:
    """Raise `BackendError` in a process forked from one that called this for the same framework.

    The framework's threads do not exist in the fork, so a wait for them would never end.
    """
    if _first_process(framework) != os.getpid():
        raise BackendError(
            f"The threads of {framework} were started before this process was forked, and a fork does not have them. Start "
            'processes anew (multiprocessing.get_context("spawn")), or make the first engine after the fork.'
        )


@cache
def _first_process(framework: str) -> int:
    return os.getpid()
