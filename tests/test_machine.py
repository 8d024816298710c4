"""Counters of the machine, as Linux writes them: read right, and left out where the machine does not tell."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest

from common.config import EngineConfig
from common.process.agents import Agents, RemoteProcess
from common.process.workers import WorkerHandle
from experiments.load import machine
from experiments.load.machine import (
    Watch,
    busy_seconds,
    clock_limit_mhz,
    cpu_joules,
    cpu_seconds,
    major_faults,
    own_processes,
    swapped_bytes,
    thermal_throttles,
    throttled_seconds,
)
from tests.test_launch import launch_of


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_work_of_others_is_counted_and_that_of_this_process_is_in_it_too() -> None:
    machine, own = busy_seconds(), time.process_time()
    while time.process_time() - own < 0.2:
        pass
    assert busy_seconds() - machine >= 0.2 - 0.03  # it counts in ticks


def test_a_childs_work_is_our_own_while_it_lives_and_when_it_has_ended() -> None:
    script = "import time, sys\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\nsys.stdin.read()"
    before = cpu_seconds(own_processes())
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout and child.stdin
        child.stdout.readline()
        assert child.pid in {process.pid for process in own_processes()}
        assert cpu_seconds(own_processes()) - before >= 0.4
        child.stdin.close()
        child.wait()
    assert cpu_seconds(own_processes()) - before >= 0.4


def test_the_processes_of_a_launch_that_are_on_this_machine_are_our_own_with_what_they_start() -> None:
    with launch_of(2) as (found, (started,)):
        (agent,) = found.all
        start = partial(RemoteProcess, agent, found.secret)
        rank = WorkerHandle("torch", 0, 1, asdict(EngineConfig()), [None, 1, 0], ended=lambda _: None, start=start)
        try:
            assert {started.pid, rank.pid} <= counted_as_own(found)
            elsewhere = found._replace(all=[agent._replace(machine="another")])
            assert not {started.pid, rank.pid} & counted_as_own(elsewhere)
        finally:
            rank.close()


def counted_as_own(launch: Agents) -> set[int]:
    """By an engine's process of that launch, which has started none of the others."""
    script = "from experiments.load.machine import own_processes; print(*(process.pid for process in own_processes()))"
    command, environment = [sys.executable, "-c", script], os.environ | launch.environment()
    return set(map(int, subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()))


def stat(name: str, minor: int, major: int, childrens: int) -> str:
    return f"7 ({name}) S 1 7 7 0 -1 4194304 {minor} 0 {major} {childrens} 5 6 0 0 20 0 1 0 77089"


def test_major_faults_are_those_of_all_processes_and_of_their_ended_children(tmp_path: Path) -> None:
    write(tmp_path / "7" / "stat", stat("a) S 9 (b", 100, 3, 4))
    write(tmp_path / "8" / "stat", stat("c", 100, 10, 0))
    assert major_faults([7, 8, 9], tmp_path) == 17  # 9 has ended meanwhile


def test_a_system_that_counts_no_faults_at_all_does_not_tell(tmp_path: Path) -> None:
    write(tmp_path / "7" / "stat", stat("a", 0, 0, 0))
    assert major_faults([7], tmp_path) is None
    assert major_faults([7], tmp_path / "nowhere") is None


def test_swapped_memory_is_that_of_all_processes(tmp_path: Path) -> None:
    for pid, size in ((7, 12), (8, 30)):
        write(tmp_path / f"{pid}" / "status", f"Name:\tx\nVmRSS:\t 99 kB\nVmSwap:\t {size} kB\n")
    assert swapped_bytes([7, 8], tmp_path) == 42 * 1024
    write(tmp_path / "9" / "status", "Name:\tx\n")
    assert swapped_bytes([9], tmp_path) is None and swapped_bytes([10], tmp_path) is None


@pytest.mark.parametrize(
    ("files", "seconds"),
    [
        ({"": ["usage_usec 9\nnr_throttled 3\nthrottled_usec 2500000"]}, 2.5),
        ({"": ["nr_throttled 1\nthrottled_usec 500000", "usage_usec 9", "throttled_usec 250000"]}, 0.75),  # and groups above
        ({"cpu": ["nr_periods 0\nnr_throttled 0\nthrottled_time 3000000000"]}, 3.0),
        ({"": ["usage_usec 9"]}, None),
        ({}, None),
    ],
)
def test_throttling_is_read_from_either_version_of_cgroups(
    files: dict[str, list[str]], seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cgroup_files", lambda controller, name: [(text,) for text in files.get(controller, [])])
    assert throttled_seconds() == seconds


def test_thermal_events_and_the_clock_limit_are_those_of_all_processors(tmp_path: Path) -> None:
    assert thermal_throttles(tmp_path) is None and clock_limit_mhz(tmp_path) is None
    for cpu, count, limit in ((0, 2, 3_000_000), (1, 5, 2_000_000)):
        folder = tmp_path / "devices/system/cpu" / f"cpu{cpu}"
        write(folder / "thermal_throttle/core_throttle_count", f"{count}\n")
        write(folder / "cpufreq/scaling_max_freq", f"{limit}\n")
    write(tmp_path / "devices/system/cpu/cpufreq/scaling_max_freq", "1\n")  # no processor
    assert thermal_throttles(tmp_path) == 7 and clock_limit_mhz(tmp_path) == 2500.0


def test_energy_is_that_of_packages_and_their_memory_once(tmp_path: Path) -> None:
    zones = tmp_path / "class/powercap"
    for zone, name, energy in (
        ("intel-rapl:0", "package-0", 5_000_000),
        ("intel-rapl:0:0", "core", 3_000_000),  # a part of the package
        ("intel-rapl:0:1", "dram", 2_000_000),
        ("intel-rapl:1", "psys", 90_000_000),  # all of them again
        ("intel-rapl-mmio:0", "package-0", 5_000_000),  # the same package by another way
    ):
        write(zones / zone / "name", name + "\n")
        write(zones / zone / "energy_uj", f"{energy}\n")
    assert cpu_joules(tmp_path) == 7.0
    (zones / "intel-rapl:0:1" / "energy_uj").unlink()  # as where only root may read it
    assert cpu_joules(tmp_path) is None
    assert cpu_joules(tmp_path / "nowhere") is None


def rise(monkeypatch: pytest.MonkeyPatch, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    readings = iter([before, after])
    monkeypatch.setattr(machine, "read", lambda device: next(readings))
    return Watch().rise()


def test_a_watch_tells_by_how_much_counters_rose(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {"busy_seconds": 100.0, "own_seconds": 10.0, "major_faults": 5, "swapped_bytes": 50.0, "throttled_seconds": 1.0}
    before |= {"thermal_throttles": 2, "clock_limit_mhz": 3000.0, "joules_cpu": 10.0, "joules_gpu": 100.0}
    after = {"busy_seconds": 108.0, "own_seconds": 15.0, "major_faults": 9, "swapped_bytes": 20.0, "throttled_seconds": 1.5}
    after |= {"thermal_throttles": 3, "clock_limit_mhz": 2200.0, "joules_cpu": 14.0, "joules_gpu": 120.0}
    told = rise(monkeypatch, before, after)
    assert told.pop("watched_seconds") >= 0
    assert told == {
        "foreign_cpu_seconds": 3.0,
        "major_faults": 4,
        "swapped_out_bytes": 0.0,  # it came back from swap
        "throttled_seconds": 0.5,
        "thermal_throttles": 1,
        "clock_limit_drop_mhz": 800.0,
        "joules_cpu": 4.0,
        "joules_gpu": 20.0,
        "joules": 24.0,
    }


def test_what_was_not_told_both_times_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rise(monkeypatch, {"own_seconds": 1.0, "joules_cpu": 9.0}, {"own_seconds": 2.0, "major_faults": 3.0}).keys() == {
        "watched_seconds"
    }


def test_an_energy_counter_that_began_anew_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rise(monkeypatch, {"joules_cpu": 262_000.0}, {"joules_cpu": 12.0}).keys() == {"watched_seconds"}


def test_this_machine_can_be_watched() -> None:
    watch = Watch()
    begin = time.process_time()
    while time.process_time() - begin < 0.05:
        pass
    told = json.loads(json.dumps(watch.rise()))
    assert all(isinstance(value, float) and value >= 0 for value in told.values())
    assert ("foreign_cpu_seconds" in told) == (busy_seconds() > 0)
