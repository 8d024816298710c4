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
from common.unsupported import why_left_out
from common.weights.zoo import names

SWITCH = "true|false"
"""The metavar of an option that is true or false."""
SPELLINGS = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "--enforce-eager": "--no-compile",
    "--num-gpu-blocks-override": "--num-blocks",
}
"""Options of vLLM under another name → the option here."""
_SUFFIXES = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}


def add_model_options(parser: argparse.ArgumentParser, backends: str) -> None:
    """Which model, on which backend."""
    parser.add_argument("--model", default="smollm2-135m", help=f"a path, a hub id, or one of {', '.join(names())}")
    parser.add_argument("--backend", default="jax", help=backends)
    parser.add_argument("--tokenizer", help="take the tokenizer of this model instead: a name, a path or a hub id")
    parser.add_argument("--chat-template", help="take this chat template instead: a file, or the template itself")
    parser.add_argument(
        "--generation-config",
        default="auto",
        help="sampling defaults: auto (those of the model), vllm (none), or a directory with a generation_config.json",
    )


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
    """Parse a command line in the spellings that vLLM accepts.

    An option may have underscores for hyphens. A switch may stand alone (`--compile`), with a value (`--compile true`), or
    negated (`--no-compile`). A parser without positional arguments takes a first argument that is no option as `--model`.
    Raises `ConfigError` for an unknown option, with the nearest known option or the reason why Tandem has no such option.
    """
    switches = {name for action in parser._actions if action.metavar == SWITCH for name in action.option_strings}
    known = [name for action in parser._actions for name in action.option_strings] + ["--no-" + name[2:] for name in switches]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    spelt = list(arguments)
    for i, argument in enumerate(arguments[:end]):
        if i == 0 and not argument.startswith("-") and all(action.option_strings for action in parser._actions):
            spelt[i] = "--model=" + argument
        if not argument.startswith("-") or argument == "-":
            continue
        option, equals, value = argument.partition("=")
        option = flag(option[2:]) if option.startswith("--") else option
        option = SPELLINGS.get(option, option)
        if option.startswith("--") and option not in known:
            name = option.removeprefix("--").replace("-", "_")
            reason = why_left_out(name, flag) or f"{nearest_hint(option, known)} See --help."
            raise ConfigError(f"Unknown option {option}. {reason.strip()}")
        negated = "--" + option.removeprefix("--no-")
        if negated in switches and option not in switches:
            if equals:
                raise ConfigError(f"{option} takes no value, got {value!r}. Write {negated}={value} or {option}.")
            option, equals, value = negated, "=", "false"
        elif option in switches and not equals and arguments[i + 1 : i + 2] not in (["true"], ["false"]):
            equals, value = "=", "true"
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
        return {"type": _boolean, "metavar": SWITCH}
    if int in (hint, *get_args(hint)):
        return {"type": _count_or_none if type(None) in get_args(hint) else _count, "metavar": "N"}
    return {"metavar": "|".join(arg for arg in get_args(hint) if isinstance(arg, str)) or "NAME"}


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def _count(text: str) -> int:
    """Read an integer with an optional suffix: 8k is 8,000 and 8K is 8,192, as in vLLM."""
    digits, suffix = (text[:-1], text[-1:]) if text[-1:] in _SUFFIXES else (text, "")
    try:
        return int(digits) * _SUFFIXES.get(suffix, 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer, with an optional suffix as in 8k or 8K, got {text!r}") from None


def _count_or_none(text: str) -> int | None:
    """Read an integer, or `auto` for the default."""
    return None if text == "auto" else _count(text)
