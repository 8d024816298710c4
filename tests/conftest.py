"""Fixtures that every test of a backend shares. Frameworks are imported by those who ask for them."""

from __future__ import annotations

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
    from experiments.peers import PEERS

    for name in PEERS:
        folder = tmp_path / f".venv-{name}"
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
