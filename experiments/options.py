"""Check options: the values that Hydra composed, unknown names and ranges of integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from common.config import expect, whole
from common.errors import ConfigError, nearest_hint

if TYPE_CHECKING:
    from omegaconf import DictConfig


def resolved(node: DictConfig) -> dict[str, Any]:
    """Plain Python, with interpolations resolved. Raises `ConfigError` for a value that must be given and is not."""
    from omegaconf import OmegaConf  # not in a peer's environment, which checks the options of a workload only
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).partition("\n")[0]) from error
    return values  # type: ignore[return-value]


def check_integers(where: str, config: object, **least: int) -> None:
    for name, low in least.items():
        value = getattr(config, name)
        expect(
            whole(value, low),
            f"{where}.{name} must be an integer ≥ {low}, got {value!r}.",
        )


def known_options(cls: type, where: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` for the dataclass `cls`. Raises `ConfigError` for one that it does not know, or needs and does not get."""
    names = [field.name for field in fields(cls)]
    for name in options:
        expect(name in names, f"Unknown option {where}.{name}.{nearest_hint(str(name), names)} Known: {', '.join(names)}.")
    needed = [field.name for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING]
    missing = [name for name in needed if name not in options]
    expect(not missing, f"{where} lacks {', '.join(missing)}.")
    return dict(options)
