"""Fixtures that every test of a backend shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backends import BACKENDS
from tests.families import FAMILIES, save_family


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A seeded checkpoint of every model family, as a user's directory: name → directory."""
    root = tmp_path_factory.mktemp("families")
    return {name: save_family(name, root / name) for name in FAMILIES}
