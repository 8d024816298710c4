"""From the command line to checked, frozen configuration, over what Hydra composed."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module, util
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from common.config import EngineConfig, expect, real, whole
from common.errors import ConfigError, nearest_hint
from experiments.peers import PEERS, interpreter
from experiments.perplexity import read_text
from experiments.policies import check_policies
from experiments.statistics import Criteria
from experiments.workload import known_options

ADAPTIVE_BLOCKS = 6
"""Fewer are too few for an interval to stop by: they run as they are."""
LABEL_LENGTH = 80
CHOSEN_LENGTH = 24
"""Of a label that a user gives: a legend has room for all of it."""
READABLE = 40
"""A longer label leaves out what all engines of its name have alike."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One engine of a run."""

    label: str
    """What it is called in results and files: what its entry says, else its name, then the options that differ from the
    defaults of that name, and a number if it is not the first so called."""
    name: str
    config: EngineConfig
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the engine has beside `EngineConfig`, as plain Python: the fields of `Options` in `experiments.baselines.<name>`,
    whose `check` is given the `EngineConfig` too."""

    @property
    def is_server(self) -> bool:
        """Whether the engine is a server over HTTP, which need not report the ids of its tokens."""
        return "base_url" in self.options


def engine_spec(options: DictConfig, label: str | None = None) -> EngineSpec:
    """Check the composed group `engine`. Raises `BackendError` where what runs it is not installed."""
    values: dict[str, Any] = dict(resolved(options))
    name = values.pop("name")
    expect(
        isinstance(name, str) and name.isidentifier(), f"engine.name must be the name of an engine, such as jax, got {name!r}."
    )  # or files that are called after it lie anywhere
    own = own_options(name, values)
    interpreter(name)
    engine = EngineConfig.of(**{key: value for key, value in values.items() if key not in own})
    check_policies(name, engine)
    if own:
        declared_options(name)(**own).check(engine)
    expect(
        not (engine.compile and engine.kernels == "native") or name in PEERS,  # a peer has kernels of its own
        f"Engine {label or name} has kernels=native and compile=true, but native kernels leave a compiler nothing to compile. "
        "Use kernels=framework, or compile=false.",
    )
    return EngineSpec(label=label or name, name=name, config=engine, options=own)


def own_options(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that only an outside engine has, checked. Its module is imported only where there are any."""
    known = {each.name for each in fields(EngineConfig)}
    own = {key: value for key, value in values.items() if key not in known}
    declared = declared_options(name) if own and util.find_spec(f"experiments.baselines.{name}") else None
    if declared is None:
        return {}
    declared(**known_options(declared, f"engine={name}:", own))
    return own


def declared_options(name: str) -> Any:
    """The class of the options that only engine `name` has, None if it has none."""
    return getattr(import_module(f"experiments.baselines.{name}"), "Options", None)


def engine_specs(config: DictConfig) -> list[EngineSpec]:
    """Expand `engines`, then `peers`: lists of names or of mappings with a name. Each takes its group's defaults, then its own
    options, and is called by its `label` if it has one."""
    values = resolved(config)
    engines, peers = values["engines"], values["peers"]
    expect(isinstance(engines, list) and len(engines) >= 1, f"engines must be a list such as [jax,torch], got {engines!r}.")
    expect(isinstance(peers, list), f"peers must be a list such as [vllm,llamacpp], or [] for none, got {peers!r}.")
    chosen, entries = zip(*map(checked_entry, engines + peers), strict=True)
    specs: list[EngineSpec] = []
    labels: list[str] = []
    for own_label, options in zip(chosen, entries, strict=True):
        name = options["name"]
        composed = compose_group(config, "engine", name)
        known = [*map(str, composed), "label"]
        for key in options:
            hint = nearest_hint(str(key), known)
            expect(key in known, f"Unknown option {key!r} of engine {name}.{hint} Known: {', '.join(known)}.")
        defaults = resolved(composed)
        label = own_label or engine_label(options, defaults)
        if len(label) > READABLE:
            label = engine_label(told_apart(options, entries), defaults)
        with open_dict(composed):  # its own options are checked: this is for those that are mappings of anything
            composed.merge_with(options)
        count = 1 + labels.count(label)
        labels.append(label)
        specs.append(engine_spec(composed, f"{label}-{count}" if count > 1 and not own_label else label))
    expect_unique([spec.label for spec in specs])
    return specs


def checked_entry(entry: Any) -> tuple[str | None, Mapping[str, Any]]:
    """The label that an entry of `engines` gives, if any, and the rest of it as a mapping with a name."""
    options = {"name": entry} if isinstance(entry, str) else entry
    expect(
        isinstance(options, Mapping) and isinstance(options.get("name"), str),
        f"An entry of engines is a name, or a mapping with a name such as {{name:torch,compile:true}}; got {entry!r}.",
    )
    rest = {key: value for key, value in options.items() if key != "label"}
    return checked_label(options["label"], rest["name"]) if "label" in options else None, rest


def checked_label(label: Any, name: str) -> str:
    """The label of an entry of engine `name`, if it may be one. Log files are called after it."""
    expect(
        isinstance(label, str) and len(label) <= CHOSEN_LENGTH and bool(re.fullmatch(r"[A-Za-z][A-Za-z0-9_.+-]*", label)),
        f"label must be a word of at most {CHOSEN_LENGTH} letters, digits and _ . + -, a letter first, as in "
        f"{{name:{name},label:whole}}; got {label!r}.",
    )
    others = [known for known in GlobalHydra.instance().config_loader().get_group_options("engine") if known != name]
    expect(label not in others, f"label must not be the name of another engine: {label!r} for {name}. Take another.")
    return str(label)


def expect_unique(labels: Sequence[str]) -> None:
    """Raises `ConfigError` where a given label is also another's, given or not."""
    twice = next((label for i, label in enumerate(labels) if label in labels[:i]), None)
    expect(
        twice is None,
        f"Two engines are called {twice!r}, but results need one label for each engine. Give one another label.",
    )


def told_apart(options: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An entry without the options that all entries of its name have alike, if there are others of that name."""
    others = [other for other in entries if other["name"] == options["name"] and other is not options]
    alike = [key for key in options if others and all(key in other and other[key] == options[key] for other in others)]
    return {key: value for key, value in options.items() if key == "name" or key not in alike}


def engine_label(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Return the name of an entry of `engines` with the options that differ from the defaults, as in `torch-compile`.

    The label has only characters that a file name may have."""
    name = options["name"]
    differing = {key: value for key, value in options.items() if key != "name" and value != defaults[key]}
    parts = [f"-{key}" if value is True else f"-{key}={value}" for key, value in flat(differing)]
    return name + re.sub(r"[^\w.+=-]+", "_", "".join(parts))[: LABEL_LENGTH - len(name)]


def flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option with its value; those of a mapping by dotted key."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


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
    max_blocks: int = 40
    precision: float = 0.04
    """Width of the interval of a ratio that is narrow enough, as a share of the ratio."""
    confidence: float = Criteria.confidence
    equivalence: float = Criteria.equivalence
    timeout_s: float = 1800.0
    """For one command to an engine: to load, or to run a window."""
    kernel_passes: int = 0
    profile: bool = False
    """Whether each engine runs one more window, uncounted, under its framework's profiler."""

    def __post_init__(self) -> None:
        check_integers("measure", self, blocks=1, max_blocks=1, warmup_requests=0, warmup_output_len=1, kernel_passes=0)
        for name, high in (("budget_s", float("inf")), ("limits_s", 60), ("precision", 10)):
            value = getattr(self, name)
            expect(
                real(value, 0, high),
                f"measure.{name} must be a number in [0, {high:g}], got {value!r}.",
            )
        expect(
            real(self.timeout_s, 0, threading.TIMEOUT_MAX) and self.timeout_s > 0,
            f"measure.timeout_s must be a number of seconds > 0, got {self.timeout_s!r}.",
        )
        expect(
            self.max_blocks >= self.blocks,
            f"measure.max_blocks={self.max_blocks} contradicts measure.blocks={self.blocks}: so many run at least. Set both.",
        )
        expect(isinstance(self.profile, bool), f"measure.profile must be true or false, got {self.profile!r}.")
        self.criteria  # noqa: B018 - checked as it is built

    @property
    def criteria(self) -> Criteria:
        return Criteria(confidence=self.confidence, equivalence=self.equivalence)

    @property
    def most_blocks(self) -> int:
        """Where the blocks end, however wide the interval."""
        return self.blocks if self.blocks < ADAPTIVE_BLOCKS else self.max_blocks


@dataclass(frozen=True, kw_only=True)
class CorrectnessConfig:
    """The pass in float32."""

    num_requests: int
    """Whose whole rows of logits are compared; 0 leaves the pass out."""
    output_len: int
    """Tokens of each of these at most."""
    tolerance: float
    tokens: int = 12_288
    """Prompt and output tokens of the timed schedule that the pass repeats, about."""
    perplexity: bool = False
    perplexity_text: str | None = None

    def __post_init__(self) -> None:
        check_integers("correctness", self, num_requests=0, output_len=1, tokens=1)
        expect(
            real(self.tolerance, 0, float("inf")) and self.tolerance > 0,
            f"correctness.tolerance must be a number > 0, got {self.tolerance!r}.",
        )
        expect(isinstance(self.perplexity, bool), f"correctness.perplexity must be true or false, got {self.perplexity!r}.")
        text = self.perplexity_text
        expect(
            text is None or isinstance(text, str),
            f"correctness.perplexity_text must be the path of a text, or null, got {text!r}.",
        )
        read_text(text)  # now, and not when all has been timed


def correctness_config(config: DictConfig) -> CorrectnessConfig:
    """The checked group `correctness`."""
    given = config.correctness
    expect(isinstance(given, DictConfig), f"correctness holds options such as correctness.num_requests=0, got {given!r}.")
    return CorrectnessConfig(**known_options(CorrectnessConfig, "correctness", resolved(given)))


def check_integers(where: str, config: object, **least: int) -> None:
    for name, low in least.items():
        value = getattr(config, name)
        expect(
            whole(value, low),
            f"{where}.{name} must be an integer ≥ {low}, got {value!r}.",
        )
