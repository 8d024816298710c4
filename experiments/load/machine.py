"""Read the machine's counters before and after a window: processor time, swapping, throttling and energy.

A counter that the machine does not report is left out. It is never 0.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

from common.process.agents import agents, machine
from common.system.hardware import cgroup_files, family

SYSTEM = Path("/sys")
PROCESSES = Path("/proc")
GROUP_LIMITS = (("", "usec", 1e-6), ("cpu", "time", 1e-9))
"""Hierarchy, and the name and unit of the time held back, in `cpu.stat` of cgroup v2 and v1."""


class Watch:
    """Reads the counters now, and tells by how much each has risen since. Of `own_processes` where a counter is a process's
    own; of the whole machine where it is not. `device` is what `Caps.device` says."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._before = read(device)
        self._begin = time.perf_counter()

    def rise(self) -> dict[str, float]:
        """Since the start, in the units that the names say:

        `watched_seconds` that passed, which the others are to be held against: a window that is watched is a little shorter;
        `foreign_cpu_seconds` of processors that other programs had or that were taken away, `major_faults` (pages read from
        disk) and `swapped_out_bytes` of these processes, `throttled_seconds` held back by a CPU quota, `thermal_throttles`
        (times that a core was too hot), `clock_limit_drop_mhz` (by which the highest allowed clock fell), `joules` and of those
        `joules_cpu`, `joules_gpu` (processor packages with their memory; the GPU that the engine is on).
        """
        watched = time.perf_counter() - self._begin
        after = read(self._device)
        rise = {name: after[name] - value for name, value in self._before.items() if name in after}
        same: tuple[str, ...] = ("major_faults", "throttled_seconds", "thermal_throttles")
        told = {"watched_seconds": watched} | {name: rise[name] for name in same if name in rise}
        if "busy_seconds" in rise and "own_seconds" in rise:
            told["foreign_cpu_seconds"] = max(0.0, rise["busy_seconds"] - rise["own_seconds"])
        if "swapped_bytes" in rise:
            told["swapped_out_bytes"] = max(0.0, rise["swapped_bytes"])
        if "clock_limit_mhz" in rise:
            told["clock_limit_drop_mhz"] = max(0.0, -rise["clock_limit_mhz"])
        energy = {name: rise[name] for name in ("joules_cpu", "joules_gpu") if name in rise and rise[name] >= 0}
        return told | energy | ({"joules": sum(energy.values())} if energy else {})


def read(device: str) -> dict[str, float]:
    """Every counter that the machine tells, as it stands."""
    own = own_processes()
    counters = {
        "busy_seconds": busy_seconds() or None,  # a sandbox that does not tell says 0
        "own_seconds": cpu_seconds(own),
        "major_faults": major_faults(process.pid for process in own),
        "swapped_bytes": swapped_bytes(process.pid for process in own),
        "throttled_seconds": throttled_seconds(),
        "thermal_throttles": thermal_throttles(),
        "clock_limit_mhz": clock_limit_mhz(),
        "joules_cpu": cpu_joules(),
        "joules_gpu": gpu_joules() if device.startswith("cuda") else None,
    }
    return {name: float(value) for name, value in counters.items() if value is not None}


# Who computed.


def busy_seconds() -> float:
    """Seconds that all processors of this machine have worked, or were taken away, since it started."""
    times = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "guest", "guest_nice")  # guests are counted as user time already
    return float(sum(seconds for name, seconds in times.items() if name not in idle))


def own_processes() -> list[psutil.Process]:
    """This process and its descendants, and of a launch those that are on this machine and start ranks, with theirs."""
    launch = agents()
    return family([os.getpid(), *(agent.pid for agent in (launch.all if launch else ()) if agent.machine == machine())])


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """What they have computed, and what their children that have ended had."""
    seconds = 0.0
    for process in processes:
        with suppress(psutil.Error):  # it has ended since it was listed, and its parent has its time
            seconds += sum(process.cpu_times()[:4])
    return seconds


# Memory.


def major_faults(pids: Iterable[int], root: Path = PROCESSES) -> int | None:
    """Pages that these processes, and their children that have ended, had to wait for while they were read from disk."""
    major = minor = 0
    for pid in pids:
        with suppress(OSError):
            fields = (
                (root / f"{pid}" / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            )  # the name before may hold anything
            minor += int(fields[7])
            major += int(fields[9]) + int(fields[10])
    return major if minor else None  # no process runs without minor faults: where there are none, nobody counts


def swapped_bytes(pids: Iterable[int], root: Path = PROCESSES) -> int | None:
    """Memory of these processes that lies in swap now."""
    sizes = []
    for pid in pids:
        with suppress(OSError):
            lines = (root / f"{pid}" / "status").read_text(encoding="utf-8").splitlines()
            sizes += [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSwap:")]
    return sum(sizes) if sizes else None


# Throttling.


def throttled_seconds() -> float | None:
    """How long the CPU quota of this process's group, and of those above it, has held it back."""
    seconds = [
        int(stat[f"throttled_{name}"]) * unit
        for controller, name, unit in GROUP_LIMITS
        for (text,) in cgroup_files(controller, "cpu.stat")
        if f"throttled_{name}" in (stat := dict(line.split(maxsplit=1) for line in text.splitlines()))
    ]
    return sum(seconds) if seconds else None


def thermal_throttles(root: Path = SYSTEM) -> int | None:
    """How often the processors were slowed down because they were too hot."""
    counts = numbers_of((root / "devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count"))
    return sum(counts) if counts else None


def clock_limit_mhz(root: Path = SYSTEM) -> float | None:
    """The highest clock that the processors are allowed now, on average."""
    limits = numbers_of((root / "devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_max_freq"))
    return sum(limits) / len(limits) / 1e3 if limits else None


# Energy.


def cpu_joules(root: Path = SYSTEM) -> float | None:
    """Energy that the processor packages and their memory have taken (Intel and AMD: RAPL). Only root may read it on most
    systems. The counter begins anew every few hours or days, which gives a negative rise once."""
    zones = [zone for zone in (root / "class/powercap").glob("intel-rapl:*") if zone_name(zone).startswith(("package", "dram"))]
    energies = numbers_of(zone / "energy_uj" for zone in zones)
    return sum(energies) / 1e6 if energies and len(energies) == len(zones) else None


def zone_name(zone: Path) -> str:
    try:
        return (zone / "name").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def gpu_joules() -> float | None:
    """Energy that the first GPU of this process has taken since its driver was loaded, where NVIDIA's library is installed."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
        by_name = nvml.nvmlDeviceGetHandleByUUID
        handle = nvml.nvmlDeviceGetHandleByIndex(int(visible)) if visible.isdigit() else by_name(visible)
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except Exception:  # not installed, no driver, no such counter: it has an error of its own for each
        return None


def numbers_of(files: Iterable[Path]) -> list[int]:
    """The integers in those of the files that can be read."""
    values = []
    for file in files:
        with suppress(OSError, ValueError):
            values.append(int(file.read_text(encoding="utf-8")))
    return values
