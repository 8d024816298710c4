"""Print `--help`: every option with its default and the comment on it in its configuration file."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import resources

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

EXPLAINED = {
    "": ("config",),
    "engine.": ("engine_base", "engine/openai_http"),
    "workload.": ("workload/fixed",),
    "measure.": ("measure/default",),
    "parallel.": ("parallel/none",),
}
"""The files of `configs` that explain the options which begin so."""
ENGINES = """\
== Options of each engine ==
Put into braces, as in engines=[jax,{name:torch,max_num_seqs:8}]; a name in configs/engine may have defaults of its own, and
more options: python -m experiments.bench engine=openai_http --help
"""
"""Of a command that runs several, whose configuration has none of these options."""
FOOTER = "\nPowered by Hydra"
COLUMN = 34
"""Where what is said of an option begins."""


def is_asked(words: Sequence[str]) -> bool:
    return any(word == "-h" or (len(word) > len("--h") and "--help".startswith(word)) for word in words)


def help_text(command: Callable[[], None], words: Sequence[str], config_name: str) -> str:
    """What a command of Hydra's tells of itself, of the options as `words` set them. Where they cannot be composed, as those
    of -m that have several values, of the defaults."""
    try:
        text = printed(command, [word for word in words if word != "--version"])
    except (HydraException, OmegaConfBaseException, ValueError, SystemExit):
        print("What else was given makes no one configuration: these are the defaults.", file=sys.stderr)
        text = printed(command, ["--help"])
    shown = explained(text, config_name)
    if config_name != "compare":
        return shown
    options, footer, rest = shown.partition(FOOTER)
    return f"{options.rstrip()}\n\n\n{ENGINES}\n{engine_options()}\n{footer}{rest}"


def engine_options() -> str:
    """Every option of an engine but its name, with its default, as the file that has them explains them."""
    _, _, told = config_file("engine_base").partition("name: ???\n")
    return told


def printed(command: Callable[[], None], words: Sequence[str]) -> str:
    sys.argv[1:] = words
    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(io.StringIO()):  # where argparse complains of an unknown flag
        try:
            command()
        except SystemExit as end:
            if end.code:
                raise
    return text.getvalue()


def explained(text: str, config_name: str) -> str:
    """`text`, in which a configuration stands as YAML, with our comments on its options."""
    known = comments(config_file(config_name))
    for prefix, files in EXPLAINED.items():
        for file in files:
            known = {prefix + name: said for name, said in comments(config_file(file)).items()} | known
    lines = []
    for line, name in options(text):
        above, beside = known.get(name, ([], []))
        indent = line[: len(line) - len(line.lstrip())]
        lines += [f"{indent}# {said}" for said in above]
        first, *more = beside or [""]
        lines.append(f"{line + '  ':<{COLUMN}}# {first}" if first else line)
        lines += [f"{'':<{COLUMN}}# {said}" for said in more]
    return "\n".join(lines)


def config_file(name: str) -> str:
    return (resources.files("configs") / f"{name}.yaml").read_text(encoding="utf-8")


def comments(text: str) -> dict[str, tuple[list[str], list[str]]]:
    """Of each option in a file, by its dotted name, that anything is said of: the lines above it and those beside it."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    above: list[str] = []
    beside: list[str] | None = None
    """Of the last option; None before the first, above which the file is explained."""
    for line, name in options(text):
        code, _, said = line.partition("# ")
        if name:
            found[name] = (above if beside is not None else [], beside := [said] if said else [])
            above = []
        elif said and beside and len(code) > COLUMN // 2:
            beside.append(said)
        else:
            above = [*above, said] if said else []
    return {name: pair for name, pair in found.items() if any(pair)}


def options(text: str) -> Iterator[tuple[str, str]]:
    """Each line of YAML, with the dotted name of the option that it sets; empty where it sets none."""
    place: list[tuple[int, str]] = []
    for line in text.splitlines():
        option = re.match(r"( *)(\w+):", line)
        if option:
            depth = len(option[1])
            place = [*(outer for outer in place if outer[0] < depth), (depth, option[2])]
        yield line, ".".join(name for _, name in place) if option else ""
