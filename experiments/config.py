"""From the command line to checked, frozen configuration, over what Hydra composed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from common.config import EngineConfig, expect
from common.errors import ConfigError, nearest_hint
from experiments.isolate import interpreter


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One engine of a run."""

    label: str
    """What it is called in results: its name, or `name-2` for the second of that name."""
    name: str
    config: EngineConfig


def engine_spec(options: DictConfig, label: str | None = None) -> EngineSpec:
    """Check the composed group `engine`."""
    values: dict[str, Any] = dict(resolved(options))
    name = values.pop("name")
    expect(isinstance(name, str), f"engine.name must be a name, got {name!r}.")
    return EngineSpec(label=label or name, name=name, config=EngineConfig.of(**values))


def engine_specs(config: DictConfig) -> list[EngineSpec]:
    """Expand `engines`, then `peers`: lists of names or of mappings with a name. Each takes its group's defaults, then its own
    options. Raises `BackendError` for one that has no interpreter to run it."""
    options = resolved(config)
    engines, peers = options["engines"], options["peers"]
    expect(isinstance(engines, list) and len(engines) >= 1, f"engines must be a list such as [jax,torch], got {engines!r}.")
    expect(isinstance(peers, list), f"peers must be a list such as [vllm,llamacpp], or [] for none, got {peers!r}.")
    specs: list[EngineSpec] = []
    for entry in engines + peers:
        options = {"name": entry} if isinstance(entry, str) else entry
        expect(
            isinstance(options, Mapping) and isinstance(options.get("name"), str),
            f"An entry of engines is a name, or a mapping with a name such as {{name:torch,compile:true}}; got {entry!r}.",
        )
        name = options["name"]
        count = sum(spec.name == name for spec in specs)
        composed = compose_group(config, "engine", name)
        known = [str(key) for key in composed]
        for key in options:
            hint = nearest_hint(str(key), known)
            expect(key in known, f"Unknown option {key!r} of engine {name}.{hint} Known: {', '.join(known)}.")
        composed.merge_with(options)
        specs.append(engine_spec(composed, f"{name}-{count + 1}" if count else name))
        interpreter(name)
    return specs


def compose_group(config: DictConfig, group: str, name: str) -> DictConfig:
    """The node `group=name` would have put into `config`, its interpolations pointing there."""
    known = GlobalHydra.instance().config_loader().get_group_options(group)
    if name not in known:
        raise ConfigError(f"Unknown {group} {name!r}.{nearest_hint(name, known)} Known: {', '.join(known)}.")
    whole = config.copy()
    with open_dict(whole):
        whole.merge_with(hydra.compose(f"{group}/{name}"))
    return whole[group]


def runs_folder(config: DictConfig) -> Path:
    """Where run directories go."""
    expect(isinstance(config.runs, str) and bool(config.runs), f"runs must be the path of a folder, got {config.runs!r}.")
    return Path(config.runs)


def resolved(node: DictConfig) -> dict[str, Any]:
    """Plain Python, with interpolations resolved. Raises `ConfigError` for a value that must be given and is not."""
    try:
        values = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).partition("\n")[0]) from error
    return values  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """How long and how often is measured."""

    blocks: int
    budget_s: float
    warmup_requests: int
    warmup_output_len: int
    limits_s: float
    kernel_passes: int = 0

    def __post_init__(self) -> None:
        check_integers("measure", self, blocks=1, warmup_requests=0, warmup_output_len=1, kernel_passes=0)
        expect(
            isinstance(self.budget_s, (int, float)) and self.budget_s >= 0,
            f"measure.budget_s must be a number of seconds ≥ 0, got {self.budget_s!r}.",
        )
        expect(
            isinstance(self.limits_s, (int, float)) and 0 <= self.limits_s <= 60,
            f"measure.limits_s must be a number of seconds in [0, 60], got {self.limits_s!r}.",
        )


@dataclass(frozen=True, kw_only=True)
class CorrectnessConfig:
    """The pass in float32."""

    num_requests: int
    output_len: int
    tolerance: float
    perplexity: bool = False
    perplexity_text: str | None = None

    def __post_init__(self) -> None:
        check_integers("correctness", self, num_requests=0, output_len=1)
        expect(
            isinstance(self.tolerance, (int, float)) and self.tolerance > 0,
            f"correctness.tolerance must be a number > 0, got {self.tolerance!r}.",
        )
        expect(isinstance(self.perplexity, bool), f"correctness.perplexity must be true or false, got {self.perplexity!r}.")
        text = self.perplexity_text
        expect(
            text is None or (isinstance(text, str) and Path(text).is_file()),
            f"correctness.perplexity_text must be the path of a text, or null, got {text!r}.",
        )


def check_integers(where: str, config: object, **least: int) -> None:
    for name, low in least.items():
        value = getattr(config, name)
        expect(
            isinstance(value, int) and not isinstance(value, bool) and value >= low,
            f"{where}.{name} must be an integer ≥ {low}, got {value!r}.",
        )
