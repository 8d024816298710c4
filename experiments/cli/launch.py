"""Run a command: Hydra composes the options, and this file reports errors and chooses exit codes."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from importlib import metadata, resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from common.config import EngineConfig, expect
from common.errors import ConfigError, TandemError, nearest_hint
from common.process.exits import (
    DEFECT,
    FAILURE,
    GATE,
    USER_ERROR,
    exit_code,
    fail,
    printing,
    replace_unprintable,
    sigterm_raises,
)
from experiments.cli.help import help_text, is_asked
from experiments.engines.process import EngineFailure
from experiments.report.verdict import defects, timed_defects
from experiments.runs.conditions import Condition, expect_quotes, violations
from experiments.runs.directory import DiskFullError, write_json
from experiments.runs.source import code_digest
from experiments.runs.sweep_jobs import code_of, is_whole, set_aside
from experiments.sweep.job import job_directory
from experiments.sweep.launcher import ProcessLauncher, quoted
from experiments.sweep.sweeper import CheckedSweeper

ROOT_OPTIONS = ("engine", "engines", "peers", "model", "workload", "parallel", "kernels", "dtype", "seed", "device", "fail_if")
"""Overrides at the root that stay as they are from version to version."""
ENGINE_OPTIONS = frozenset(field.name for field in fields(EngineConfig))
FLAGS = (
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--shell-completion"),
    *("--config-path", "--config-name", "--config-dir", "--experimental-rerun", "--info"),
)
"""The flags of `--hydra-help`, which may be shortened. `--version` prints the version of this package."""
WITH_VALUE = ("-c", "-p", "-i", "--c", "--p", "--i", "--e")
"""How those begin that a value follows: --cfg and --config-dir, --package, --info, --experimental-rerun."""


@printing()
def launch(task: Callable[[DictConfig], None], config_name: str) -> None:
    """Compose `configs/<config_name>.yaml` with the command line and run `task`.

    An error that the user can correct ends the process with one message on stderr and exit code 2. A defect
    of the code prints its traceback.
    """
    replace_unprintable()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, where it would print and exit with 1
    for plugin in (CheckedSweeper, ProcessLauncher):  # under the one package that Hydra takes plugins from
        Plugins.instance().class_name_to_class[f"hydra_plugins.tandem.{plugin.__name__}"] = plugin

    composed = False

    def run(config: DictConfig) -> None:
        nonlocal composed
        composed = True
        try:
            if (job := job_directory(config)) and is_whole(job):  # of a sweep that another launcher goes on with
                if code_of(job) == code_digest():
                    return
                print(f"Other code computed {job}: it runs again. Its results are now {set_aside(job)}.", file=sys.stderr)
            wanted = config.get("report", True)
            expect(isinstance(wanted, bool), f"report must be true or false, got {wanted!r}.")
            table = config.get("table", "short")
            expect(table in ("short", "all"), f"table must be short or all, got {table!r}.")
            with printing():  # here as well, since Hydra would first print a message of its own
                task(config)
        except (TandemError, OmegaConfBaseException) as error:
            fail(explain(error), USER_ERROR)
        except (EngineFailure, DiskFullError) as error:
            fail(str(error), FAILURE)  # a defect, whose traceback is the other process's; or of the machine

    command = hydra.main(version_base="1.3", config_path="pkg://configs", config_name=config_name)(run)
    meant = [piece for argument in overrides_first(sys.argv[1:]) for piece in spell_out_model(set_not_added(argument))]
    try:
        if is_asked(sys.argv[1:]):
            print(help_text(command, meant, config_name))
            return
        expect_words(sys.argv[1:])
        if "--version" in sys.argv[1:]:
            print(f"tandem {metadata.version('tandem-infer')}")
            return
        sys.argv[1:] = meant
        with sigterm_raises():
            command()
    except (HydraException, OmegaConfBaseException, TandemError, ValueError) as error:
        if composed and isinstance(error, ValueError):
            raise
        fail(explain(error), USER_ERROR)
    except KeyboardInterrupt as end:
        sys.exit(exit_code(end))


def expect_words(words: Sequence[str]) -> None:
    """Raises `ConfigError` for what no option can be."""
    expect_quotes(words)
    if value := torn(words):
        raise ConfigError(f"No spaces inside […], or quote the word: {shlex.quote(value)}")
    if unknown := next((word for word in words if word.startswith("--") and not is_flag(word)), None):
        raise ConfigError(no_such_flag(unknown))
    if taken := next((match for word in words if (match := re.fullmatch(r"~(\w+)(=.*)?", word))), None):
        raise ConfigError(f"{taken[0]} would take away an option, and a run needs each. Set it instead: {taken[1]}=…")


def report_on(config: DictConfig, result: Mapping[str, Any]) -> bool:
    """Write the report of a run, if it is wanted, and say where. Returns False if it is wanted and cannot be made."""
    if not config.report:
        return True
    from experiments.report.writer import make_report  # imports matplotlib, which takes long

    page = make_report(Path(result["run"]))
    if page:
        print(f"Report: {page}")
    return page is not None


def keep_part(config: DictConfig, directory: Path, result: Mapping[str, Any], parts: str) -> None:
    """Of a run that was cut short: its results so far, and their report if it is wanted. `parts` are those that are whole."""
    write_json(directory / "results.json", result)
    if config.report:
        from experiments.report.writer import make_report

        if page := make_report(directory):
            print(f"Report of the {parts}: {page}", file=sys.stderr)


def conclude(conditions: Sequence[Condition], result: Mapping[str, Any], reported: bool) -> None:
    """End the process with the exit code that a result deserves, once it is written and printed."""
    wrong = [f"float32 pass: {found}." for found in defects(result)] + [f"timed: {found}." for found in timed_defects(result)]
    held = [*wrong, *violations(conditions, result)]
    if failures := result["failures"]:
        failed = [str(EngineFailure(failure["message"], log=failure["log"])) for failure in failures.values()]
        fail("\n".join(failed + held), FAILURE)
    if held:
        fail("\n".join(held), DEFECT if wrong else GATE)
    if unmeasured := result.get("unmeasured"):
        fail(unmeasured, FAILURE)
    if not reported:
        again = f"python -m experiments.report {result['run']}"
        fail(f"The report could not be made; all else is there. Try again: {again}", FAILURE)


def overrides_first(words: Sequence[str]) -> list[str]:
    """Then the flags, with their values: argparse takes no override behind a flag that stands among them, as -m may."""
    flags = [word.startswith("-") or is_value(before) for before, word in pairwise(["", *words])]
    return [word for last in (False, True) for word, flag in zip(words, flags, strict=True) if flag == last]


def is_value(before: str) -> bool:
    """Whether what follows this word of the command line is its value."""
    return before.startswith(WITH_VALUE) and "=" not in before


def is_flag(word: str) -> bool:
    """Whether a word that starts with dashes is one of `FLAGS`, be it shortened."""
    return any(flag.startswith(word.partition("=")[0]) for flag in FLAGS)


def no_such_flag(word: str) -> str:
    name = word.lstrip("-").partition("=")[0]
    hint = nearest_hint(name, [*ROOT_OPTIONS, "measure", "sweep", "runs", "report", "table"])
    return (
        f"There is no option {word!r}.{hint} Options are written without dashes, as in model=smollm2-135m; --help lists them."
    )


def torn(words: Sequence[str]) -> str | None:
    """The override with spaces in its brackets that a shell has made several words of, as one again; None if there is none."""
    for start, word in enumerate(words):
        if "=" in word and left_open(word) > 0:
            for end in range(start + 2, len(words) + 1):
                if left_open(value := " ".join(words[start:end])) == 0:
                    return value
    return None


def left_open(text: str) -> int:
    """How many brackets that are opened in `text` are not closed in it."""
    return sum((sign in "[{(") - (sign in "]})") for sign in text)


def set_not_added(argument: str) -> str:
    """`+foo=1` as `foo=1`: every option has its default in a file, so that Hydra refuses one that would have to be added. What
    mappings of an engine hold, as `+engine.extra_body.top_k=1`, is free."""
    return re.sub(r"^\+{1,2}(?!engine\.\w+\.|hydra)(?=[^\s=]+=)", "", argument)


def spell_out_model(argument: str) -> list[str]:
    """`model=X`, where X is no name of the group `model`, means the checkpoint at X."""
    match = re.fullmatch(r"model=(?P<name>[^,\[\]{}]+)", argument)
    if not match or (name := match["name"]) in group_options("model"):
        return [argument]
    return ["model=path", f"model.name={quoted(name) if '=' in name else name}"]


def group_options(group: str) -> list[str]:
    """The names of a config group that ship with the package."""
    folder = resources.files("configs") / group
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def explain(error: BaseException) -> str:
    """Return the message of an error as one paragraph, with the nearest known name if a name is misspelled."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for cause in chain:
        if isinstance(cause, MissingConfigException) and cause.options and cause.missing_cfg_file:
            group, _, name = cause.missing_cfg_file.rpartition("/")
            return f"Unknown {group} {name!r}.{nearest_hint(name, cause.options)} Known: {', '.join(cause.options)}."
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and isinstance(cause.parent_node, DictConfig):
            known = [str(key) for key in cause.parent_node if key != "hydra"]
            name = str(cause.key)
            if "engines" in cause.parent_node and (name == "engine" or name in ENGINE_OPTIONS):
                return in_braces(str(error))
            hint = level_hint(name, cause.parent_node) or nearest_hint(name, known)
            return f"Unknown option {cause.full_key!r}.{hint} Known here: {', '.join(known) or 'none'}."
        if several := re.match(r"Ambiguous value for argument '(?P<key>[^=]+)=(?P<values>.*)'$", str(cause), re.MULTILINE):
            key, values = several["key"], several["values"]
            return f"{key}={values} gives several values: for a list, write {key}=[{values}]; for a run of each, add -m."
        if "Config group override must be a string" in str(cause) and (given := unnamed(sys.argv[1:])):
            return given
        if misplaced := re.match(r"Could not override '(\w+)'\.\s*No match in the defaults list", str(cause)):
            others = [option for option in ROOT_OPTIONS if option != misplaced[1]]
            return f"This command has no option {misplaced[1]!r}.{nearest_hint(misplaced[1], others)}"
    if isinstance(error, TandemError):
        return str(error).strip()  # a compiler's words keep their lines
    texts = (str(cause).split("\n    full_key:")[0] for cause in chain)
    return " ".join(dict.fromkeys(" ".join(text.split()) for text in texts if text))


def unnamed(words: Sequence[str]) -> str | None:
    """What is wrong with the first override that gives a config group no name, as `engine=null`; None if there is none."""
    for override in OverridesParser.create().parse_overrides([word for word in words if re.match("[^-].*=", word)]):
        group = override.key_or_group
        if group in ("engine", "experiment", "measure", "workload") and not isinstance(override.value(), str | list):
            return f"{group} must be one of {', '.join(group_options(group))}; got {override.input_line}."
    return None


def in_braces(refused: str) -> str:
    """How an option of an engine is given to a command that runs several. `refused` is what Hydra says of it."""
    word = refused.partition("use +")[2] or "engine"
    plain = re.fullmatch(r"(?:engine\.)?(\w+)=([^{}]+)", word)
    given = ":".join(plain.groups()) if plain else "max_num_seqs:4"
    return (
        f"This command runs several engines and has no option {word.partition('=')[0]!r}: each engine takes its own in braces, "
        f"as in 'engines=[{{name:jax,{given}}},{{name:torch,{given}}}]'. For a run of each value, add -m and write such a list "
        "for each, with a comma between them: engines=[…],[…]."
    )


def level_hint(name: str, node: DictConfig) -> str:
    """A sentence for an option that is given one level too high, or the empty string."""
    below = {str(key): child for key, child in node.items_ex(resolve=False) if isinstance(child, DictConfig) and key != "hydra"}
    places = [f"{key}.{name}" for key, child in below.items() if name in child]
    return f" Did you mean {' or '.join(places)}?" if places else ""
