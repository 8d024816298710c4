"""Fixtures that every test of a backend shares. Frameworks are imported by those who ask for them."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

from tests.history_backend import interruptible


@pytest.fixture(scope="session", params=("jax", "torch"))
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A seeded checkpoint of every model family, as a user's directory: name → directory."""
    from tests.families import FAMILIES, save_family

    root = tmp_path_factory.mktemp("families")
    return {name: save_family(name, root / name) for name in FAMILIES}


@pytest.fixture
def peers_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every peer has an environment, and llama.cpp its server, as far as is looked before one is started."""
    from experiments.engines.environments import PEERS

    for environment in {peer.environment for peer in PEERS.values()}:
        folder = tmp_path / f".venv-{environment}"
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to(sys.executable)
        (folder / "done").touch()
    monkeypatch.setenv("TANDEM_PEERS", str(tmp_path))
    (tmp_path / "llama-server").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Press it."""
    with interruptible():
        yield lambda: signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def no_command_line_is_left() -> Iterator[None]:
    """A command that ran in this process leaves its configuration with Hydra, which the next test should not find."""
    yield
    HydraConfig.instance().cfg = None


def signal_handlers() -> dict[signal.Signals, tuple[object, list[bool]]]:
    """Return how this process takes SIGINT and SIGTERM: the handler in Python, and whether the system ignores the signal or
    calls a handler, which a library may have installed without Python."""
    masks = [int(line.split()[1], 16) for line in status_lines() if line.startswith(("SigIgn", "SigCgt"))]
    return {
        number: (signal.getsignal(number), [bool(mask >> (number - 1) & 1) for mask in masks])
        for number in (signal.SIGINT, signal.SIGTERM)
    }


def status_lines() -> list[str]:
    """Return the lines of /proc/self/status. Empty where it does not exist."""
    path = Path("/proc/self/status")
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(autouse=True)
def no_signal_handler_is_left() -> Iterator[None]:
    """A test that leaves a handler of Ctrl-C or SIGTERM fails: with it, the suite would not end when it is told to."""
    before = signal_handlers()
    yield
    left = signal_handlers()
    for number, (handler, _) in before.items():
        if callable(handler) or isinstance(handler, signal.Handlers):
            signal.signal(number, handler)  # the next test is not to blame
    assert left == before, f"Signal handlers were {before} before the test and are {left} after it."


@pytest.fixture(autouse=True)
def no_log_handler_is_left() -> Iterator[None]:
    """Restore the root logger. A command that ran in this process logs to a stream that pytest closes after the test."""
    root = logging.getLogger()
    level, before = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if handler not in before]:
        if not type(handler).__module__.startswith("_pytest"):  # pytest replaces its own in each phase of a test
            root.removeHandler(handler)
