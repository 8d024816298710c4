"""Expand the options `engines` and `peers` to one checked specification for each engine, over what Hydra composed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, open_dict

from common.config import expect
from common.errors import ConfigError, nearest_hint
from experiments.engines.spec import EngineSpec, engine_spec
from experiments.options import resolved

LABEL_LENGTH = 80
CHOSEN_LENGTH = 24
"""Of a label that a user gives: a legend has room for all of it."""
READABLE = 40
"""A longer label leaves out what all engines of its name have alike."""


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
