"""Run directories: whole or partial, and what they say of the machine."""

import contextlib
import errno
import json
import math
import os
import resource
import shlex
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import hydra
import psutil
import pytest

from common.errors import ConfigError
from common.system.hardware import matrix_unit
from experiments.runs import directory
from experiments.runs.directory import DiskFullError, environment, run_directory, write_json, write_whole


def test_a_named_directory_replaces_what_an_attempt_left_there(tmp_path: Path) -> None:
    named = tmp_path / "jobs" / "000-aa"
    with pytest.raises(RuntimeError), run_directory(tmp_path, "unused", named) as partial:
        (partial / "half").touch()
        raise RuntimeError
    assert (tmp_path / "jobs" / "000-aa.partial" / "half").exists()
    with run_directory(tmp_path, "unused", named) as partial:
        assert not any(partial.iterdir())
        (partial / "whole").touch()
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["000-aa"] and (named / "whole").exists()


def test_runs_that_start_in_the_same_second_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run looks for a name while others start, fail and end, as threads here and as processes in use."""

    class Now(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Now":
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(directory, "datetime", Now)
    runs, together = 12, threading.Barrier(12)

    def run(number: int) -> None:
        together.wait()
        for attempt in range(8):
            with contextlib.suppress(ConfigError), run_directory(tmp_path / "runs", "same") as partial:
                (partial / "mine").write_text(f"{number} {attempt}")
                time.sleep(0.001)
                assert [path.name for path in partial.iterdir()] == ["mine"]
                assert (partial / "mine").read_text() == f"{number} {attempt}"
                if attempt % 2:
                    raise ConfigError("no")

    with ThreadPoolExecutor(runs) as threads:
        list(threads.map(run, range(runs)))
    kept = {path.name: (path / "mine").read_text() for path in (tmp_path / "runs").iterdir()}
    assert sorted(kept.values()) == sorted(f"{number} {attempt}" for number in range(runs) for attempt in range(0, 8, 2))
    assert "20260102-030405-same" in kept and not any(name.endswith(".partial") for name in kept)


def test_a_name_is_taken_by_the_run_that_makes_its_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both looked before either had made a folder: whatever `exists` says, the folder of the other is not touched."""
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "rows").touch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda _: False)
        assert directory.new_partial(tmp_path, "a").name == "a-2.partial"
    assert (tmp_path / "a.partial" / "rows").exists()
    (tmp_path / "a.partial").rename(tmp_path / "a")
    assert directory.new_partial(tmp_path, "a").name == "a-3.partial"  # `a` has ended, `a-2` runs
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a-2.partial", "a-3.partial"]


def test_who_interrupts_a_run_is_told_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), run_directory(tmp_path, "mine") as partial:
        raise KeyboardInterrupt
    told = f"Interrupted. There are no results yet; configuration and logs are in {partial}.\n"
    assert capsys.readouterr().err == told and partial.exists()
    for kept in ("results.json", "requests.jsonl"):
        with pytest.raises(KeyboardInterrupt), run_directory(tmp_path, kept) as partial:
            (partial / kept).touch()
            raise KeyboardInterrupt
        assert capsys.readouterr().err == f"Interrupted. What was written so far is in {partial}.\n"


def test_a_mistake_leaves_nothing_of_a_named_directory_and_all_of_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "jobs" / "neighbour").mkdir(parents=True)
    with pytest.raises(ConfigError), run_directory(tmp_path, "unused", tmp_path / "jobs" / "000-aa"):
        raise ConfigError("no")
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["neighbour"]


def test_a_mistake_that_shows_late_leaves_the_rows_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError), run_directory(tmp_path, "mine") as partial:
        (partial / directory.ROWS).touch()
        raise ConfigError("too late")
    assert capsys.readouterr().err == f"Cut short. What was written so far is in {partial}.\n"
    assert (partial / directory.ROWS).exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(OSError, match="full"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_number_that_json_has_no_word_for_is_written_as_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": math.nan, "b": {"c": (1.5, -math.inf, "NaN")}, "d": [[math.inf], True]})

    def refused(word: str) -> None:
        raise AssertionError(word)

    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=refused)
    assert read == {"a": None, "b": {"c": [1.5, None, "NaN"]}, "d": [[None], True]}


def test_a_run_that_outgrows_its_disk_keeps_what_is_whole_and_says_what_that_is(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = r"File too large\. Kept in .*\.partial: config.yaml, results.json\.$"
    with pytest.raises(DiskFullError, match=said), run_directory(tmp_path, "what") as directory:
        (directory / "config.yaml").touch()
        write_json(directory / "results.json", {"a": 1})
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
            write_whole(directory / "requests.jsonl", ("line\n" for _ in range(1 << 16)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (partial,) = tmp_path.iterdir()
    assert sorted(path.name for path in partial.iterdir()) == ["config.yaml", "results.json"]


def test_an_error_that_no_disk_has_to_do_with_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConnectionRefusedError), run_directory(tmp_path, "what"):
        raise OSError(errno.ECONNREFUSED, "refused")


def test_the_environment_tells_the_machine_as_far_as_it_tells_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = json.loads(json.dumps(environment()))
    assert told["memory_gib"] >= told["memory_available_gib"] > 0 and isinstance(told["governor"], list)
    assert {"transparent", "reserved"} == set(told["hugepages"])
    assert {"commit", "tree", "changed_files", "changes_digest", "compiler"} <= set(told)
    assert told["compiler"] == {} or ("-DTANDEM_AMX" in told["compiler"]["options"]) == matrix_unit()
    monkeypatch.setattr(directory, "text_of", lambda _: "")
    monkeypatch.setattr(psutil, "cpu_freq", lambda: None)
    told = environment()
    assert (told["governor"], told["frequency_mhz"]) == ([], None)
    assert told["hugepages"] == {"transparent": None, "reserved": None}


def test_without_hydra_the_command_is_that_of_the_process() -> None:
    assert shlex.split(environment()["command"]) == sys.orig_argv


def test_a_file_that_the_system_has_not_is_empty(tmp_path: Path) -> None:
    assert directory.text_of(tmp_path / "governor") == ""


def test_the_configuration_of_every_command_says_where_a_sweep_goes() -> None:
    with hydra.initialize_config_module("configs", version_base="1.3"):
        for name in ("bench", "compare"):
            config = hydra.compose(name, ["sweep=x", "runs=y"], return_hydra_config=True)
            assert config.hydra.sweep.dir == "y/sweeps/x"
