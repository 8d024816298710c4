"""Fixtures that every test of a backend shares. Frameworks are imported by those who ask for them."""

from __future__ import annotations

from pathlib import Path

import pytest


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
