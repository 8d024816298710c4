"""Ctrl-C before anything runs: while a command imports what it needs, loads, or has a compiler at work."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from common.errors import BackendError
from common.kernels.cpu import build
from tests.history_backend import interruptible
from tests.http_server import ROOT, until

PROMPTLY_S = 10.0
"""Machines that run tests may be slow. What these commands would wait for takes longer."""
SLOW_TO_IMPORT = """
import time
from pathlib import Path

Path({begun!r}).touch()
for _ in range(6000):
    time.sleep(0.01)  # once, for a minute, would not notice a signal that comes just before
"""
DROPS_EXCEPTIONS = """
import time
from pathlib import Path

class Gone:
    def __del__(self):
        Path({begun!r}).touch()
        for _ in range(6000):
            time.sleep(0.01)

Gone()
"""
LOADS_IN_A_POOL = """
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

def load():
    Path({begun!r}).touch()
    time.sleep(60)

class ModelRunner:
    def __init__(self, config):
        with ThreadPoolExecutor(1) as pool:  # whose threads Python waits for as it ends
            pool.submit(load).result()

    @classmethod
    def requires_supervision(cls, config):
        return False
"""
COMPILER = """#!/bin/sh
[ "$1" = --version ] && exec echo 1.0
{does}
"""
DRIVER = "sleep 60 & echo $! > {begun}.half; mv {begun}.half {begun}; wait"
"""A compiler is a program that starts another."""


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    with interruptible():
        yield


def command(*arguments: str, first: Path, **environment: str) -> subprocess.Popen[str]:
    """A command of ours in a process, which imports what is in the folder `first` before all else."""
    paths = os.pathsep.join(map(str, (first, ROOT)))
    return subprocess.Popen(
        [sys.executable, *arguments], env=os.environ | {"PYTHONPATH": paths} | environment, stderr=subprocess.PIPE, text=True
    )


def compiler(folder: Path, does: str) -> str:
    """A program to set CXX to."""
    program = folder / "compiler"
    program.write_text(COMPILER.format(does=does))
    program.chmod(0o755)
    return str(program)


def interrupt(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code after Ctrl-C, and what it wrote to standard error."""
    process.send_signal(signal.SIGINT)
    try:
        _, told = process.communicate(timeout=PROMPTLY_S)
    finally:
        process.kill()
    return process.returncode, told


@pytest.mark.parametrize("name", ["common.serve", "common.llm", "experiments.compare", "experiments.report"])
def test_ctrl_c_while_a_command_imports_ends_it_without_a_word(name: str, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    (tmp_path / "numpy.py").write_text(SLOW_TO_IMPORT.format(begun=str(begun)))
    process = command("-m", name, "x", first=tmp_path)
    until(begun.exists)
    assert interrupt(process) == (130, "")


def test_ctrl_c_in_a_callback_of_a_library_that_drops_exceptions_ends_a_server_that_imports(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    (tmp_path / "uvicorn.py").write_text(DROPS_EXCEPTIONS.format(begun=str(begun)))
    process = command("-m", "common.serve", first=tmp_path)
    until(begun.exists)
    assert interrupt(process) == (130, "")


def test_ctrl_c_while_a_library_is_imported_is_the_importers_to_handle(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import common, experiments\nraise KeyboardInterrupt\n")
    told = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert told.returncode == -signal.SIGINT and "Traceback" in told.stderr


def test_ctrl_c_while_a_server_loads_ends_it_whatever_its_threads_compute(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    (tmp_path / "loadinginfer").mkdir()
    (tmp_path / "loadinginfer" / "__init__.py").write_text(LOADS_IN_A_POOL.format(begun=str(begun)))
    process = command("-m", "common.serve", "--model=tiny-llama", "--port=0", "--backend=loading", first=tmp_path)
    until(begun.exists)
    code, told = interrupt(process)
    assert code == 130 and re.fullmatch(r".* INFO common\.serve\.main: Loading tiny-llama \(loading\)\.\n", told), told


@pytest.mark.accept
def test_ctrl_c_while_xla_compiles_ends_a_server(tmp_path: Path) -> None:
    options = ("--model=tiny-llama", "--port=0", "--backend=jax", "--kernels=framework")
    process = command("-m", "common.serve", *options, first=tmp_path, TANDEM_CACHE=str(tmp_path))
    until(lambda: any(tmp_path.glob("xla-*/*")))  # the first program, of several
    code, told = interrupt(process)
    assert code == 130 and "Traceback" not in told


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_compiler_ends_with_all_it_has_started_when_who_started_it_does(end: signal.Signals, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    code = "from common.kernels.cpu.build import build; build('limits')"
    driver = compiler(tmp_path, DRIVER.format(begun=begun))
    process = command("-c", code, first=tmp_path, TANDEM_CACHE=str(tmp_path), CXX=driver)
    until(begun.exists)
    started = psutil.Process(process.pid).children(recursive=True)
    assert int(begun.read_text()) in {child.pid for child in started}
    process.send_signal(end)
    process.communicate(timeout=PROMPTLY_S)
    assert psutil.wait_procs(started, PROMPTLY_S)[1] == []


def test_nothing_is_left_of_a_compiler_that_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = psutil.Process().children(recursive=True)
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    build.build("limits")
    assert psutil.Process().children(recursive=True) == before


@pytest.mark.parametrize(
    ("does", "told"), [("kill -KILL $$", "it was killed by SIGKILL."), ("exit 3", "it ended with exit code 3.")]
)
def test_a_compiler_that_ends_without_a_word_is_told_by_how_it_ended(
    does: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler(tmp_path, does))
    with pytest.raises(BackendError) as raised:
        build.build("limits")
    assert str(raised.value) == f"{tmp_path}/compiler could not compile limits.cc: {told}"
