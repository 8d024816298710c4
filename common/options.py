"""The options of `EngineConfig` on a command line."""

from __future__ import annotations

import argparse
import ast
import inspect
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any, get_args, get_type_hints

from common.config import EngineConfig
from common.errors import ConfigError, nearest_hint
from common.weights.zoo import names


def add_model_options(parser: argparse.ArgumentParser, backends: str) -> None:
    """Which model, on which backend."""
    parser.add_argument("--model", default="smollm2-135m", help=f"a path, a hub id, or one of {', '.join(names())}")
    parser.add_argument("--backend", default="jax", help=backends)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    hints, docs = get_type_hints(EngineConfig), field_docs(EngineConfig)
    for field in fields(EngineConfig):
        told = docs[field.name].replace("%", "%%") + " (default: %(default)s)"
        group.add_argument(flag(field.name), default=field.default, help=told, **_reading(hints[field.name]))


def engine_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those that are for `EngineConfig`."""
    return {field.name: getattr(options, field.name) for field in fields(EngineConfig)}


def field_docs(kind: type[Any]) -> dict[str, str]:
    """The words that stand below the fields of a dataclass, in one line each."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in pairwise(definition.body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                found[name] = " ".join(words.split())
    return found


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Underscores are as good as hyphens. Raises `ConfigError` for an unknown option, with the nearest known one."""
    known = [name for action in parser._actions for name in action.option_strings]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    spelt = list(arguments)
    for i, argument in enumerate(arguments[:end]):
        if argument.startswith("--"):
            option, equals, value = argument.partition("=")
            option = flag(option[2:])
            if option not in known:
                raise ConfigError(f"Unknown option {option}.{nearest_hint(option, known)} See --help.")
            spelt[i] = option + equals + value
    return parser.parse_args(spelt)


def without(option: str, arguments: Sequence[str]) -> list[str]:
    """A command line that `parse` has taken, less an option and its values."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skip:
            skip = False
        elif argument.startswith("--") and flag(name[2:]) == option:
            skip = not equals
        else:
            kept.append(argument)
    return kept


def _reading(hint: Any) -> dict[str, Any]:
    """How argparse turns the text of an option into a value of the type `hint`."""
    if hint is bool:
        return {"type": _boolean, "metavar": "true|false"}
    if int in (hint, *get_args(hint)):
        return {"type": int, "metavar": "N"}
    return {"metavar": "|".join(arg for arg in get_args(hint) if isinstance(arg, str)) or "NAME"}


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"
