"""The imports: which package may import which, no cycle of files, no private name of another file, no unsafe call."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "jaxinfer", "torchinfer", "experiments")
JAX = {"jax", "jaxlib", "flax", "jaxinfer"}
TORCH = {"torch", "torchinfer"}
OTHERS = {"common": {"experiments", "tests"} | JAX | TORCH, "jaxinfer": {"experiments", "tests"} | TORCH}
OTHERS |= {"torchinfer": {"experiments", "tests"} | JAX, "experiments": {"tests", "jaxinfer", "torchinfer"}}
"""package → what it never imports."""
GROUPED = ("common", "experiments")
"""Top-level packages whose files are grouped in packages by question."""
MOST_ROOT_FILES = 12
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "torch.load", "np.load", "numpy.load", "yaml.load", "os.system", "os.popen", "builtins.eval"}
KEYWORDS = {"trust_remote_code", "allow_pickle", "shell"}
"""Keyword arguments that may be given False only."""


def imports(tree: ast.AST) -> set[str]:
    """Top-level names of all modules a source imports, wherever it does."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found |= {alias.name.partition(".")[0] for alias in names}
            case ast.ImportFrom(module=str(module), level=0):
                found.add(module.partition(".")[0])
            case ast.Call(
                func=ast.Name("import_module") | ast.Attribute(attr="import_module"), args=[ast.Constant(str(name)), *_]
            ):
                found.add(name.partition(".")[0])
    return found


def forbidden(tree: ast.AST) -> Iterator[str]:
    """What a source uses and nobody may."""
    yield from imports(tree) & MODULES
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=function, keywords=keywords):
                if (name := ast.unparse(function)) in CALLS:
                    yield f"{name}()"
                for keyword in keywords:
                    if keyword.arg in KEYWORDS and not (
                        isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                    ):
                        yield f"{keyword.arg}={ast.unparse(keyword.value)}"
            case ast.ImportFrom(module=str(module), names=names):
                yield from (f"{module}.{alias.name}" for alias in names if f"{module}.{alias.name}" in CALLS)


def files() -> dict[str, ast.AST]:
    """Return module name → tree for every file of the packages."""
    found = {}
    for package in PACKAGES:
        for path, tree in sources(package):
            found[path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")] = tree
    return found


def imported(trees: dict[str, ast.AST]) -> dict[str, set[tuple[str, str]]]:
    """Return module → (module of `trees`, name or "") for every absolute import, inside functions and for types too."""
    found: dict[str, set[tuple[str, str]]] = {module: set() for module in trees}
    for module, tree in trees.items():
        for node in ast.walk(tree):
            match node:
                case ast.ImportFrom(module=str(source), names=names, level=0):
                    for alias in names:
                        whole = f"{source}.{alias.name}"
                        target, name = (whole, "") if whole in trees else (source, alias.name)
                        if target in trees:
                            found[module].add((target, name))
                case ast.Import(names=names):
                    found[module] |= {(alias.name, "") for alias in names if alias.name in trees}
    return found


def file_imports(trees: dict[str, ast.AST]) -> dict[str, set[str]]:
    """Return module → the other modules that it imports."""
    return {module: {target for target, _ in targets if target != module} for module, targets in imported(trees).items()}


def package_imports(trees: dict[str, ast.AST]) -> dict[str, set[str]]:
    """Return package → the other packages that it imports, for the packages inside each top-level package.

    A file at the root of a top-level package counts as a package. A `__main__` is a command, above its package."""

    def package(module: str) -> str:
        return module if module.endswith(".__main__") else ".".join(module.split(".")[:2])

    arrows: dict[str, set[str]] = {package(module): set() for module in trees}
    for module, targets in file_imports(trees).items():
        arrows[package(module)] |= {package(target) for target in targets} - {package(module)}
    return arrows


def cycle(arrows: dict[str, set[str]]) -> list[str]:
    """Return the nodes on the cycles of a graph, and between them.

    Each round removes the nodes without a successor, and those without a predecessor."""
    while True:
        used = set().union(*arrows.values())
        gone = {module for module, targets in arrows.items() if not targets or module not in used}
        if not gone:
            return sorted(arrows)
        arrows = {module: targets - gone for module, targets in arrows.items() if module not in gone}


def private(trees: dict[str, ast.AST]) -> list[str]:
    """Return "module: name" for each import of a private name or module from another file."""
    return sorted(
        f"{module}: {target}.{name}".removesuffix(".")
        for module, targets in imported(trees).items()
        for target, name in targets
        if any(part.startswith("_") and not part.startswith("__") for part in (*target.split("."), name))
    )


def sources(package: str) -> Iterator[tuple[str, ast.AST]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    # Other people's engines live in experiments/baselines, and bring their own framework.
    assert {path: bad for path, tree in sources(package) if (bad := imports(tree) & OTHERS[package])} == {}


def test_no_imports_of_files_form_a_cycle() -> None:
    assert cycle(file_imports(files())) == []


@pytest.mark.parametrize("top", GROUPED)
def test_no_imports_of_packages_form_a_cycle(top: str) -> None:
    assert [node for node in cycle(package_imports(files())) if node.startswith(f"{top}.")] == []


@pytest.mark.parametrize("top", GROUPED)
def test_the_root_of_a_package_holds_few_files(top: str) -> None:
    assert len([path for path in (ROOT / top).iterdir() if path.is_file()]) <= MOST_ROOT_FILES


@pytest.mark.parametrize("top", GROUPED)
def test_every_package_states_its_question(top: str) -> None:
    folders = [folder for folder in (ROOT / top).rglob("*") if any(folder.glob("*.py"))]
    assert [folder.name for folder in folders if not ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))] == []


def test_no_file_imports_a_private_name_of_another() -> None:
    assert private(files()) == []


@pytest.mark.parametrize(
    "statement", ["import common.batch", "from common.batch import Batch", "def f():\n    from common import batch"]
)
def test_a_cycle_is_seen_wherever_the_import_stands(statement: str) -> None:
    trees = files()
    assert "common.batch" in {target for target, _ in imported(trees)["common.schedule.request_table"]}
    trees |= {"common.planted": ast.parse(statement), "common.batch": ast.parse("from common.planted import x")}
    assert cycle(file_imports(trees)) == ["common.batch", "common.planted"]


def test_a_cycle_of_packages_without_a_cycle_of_files_is_seen() -> None:
    trees = files() | {"common.process.planted": ast.parse("from common.schedule.planted import x")}
    trees |= {"common.schedule.planted": ast.parse("from common.process.frames import Frame")}
    assert cycle(file_imports(trees)) == []
    assert cycle(package_imports(trees)) == ["common.process", "common.schedule"]


@pytest.mark.parametrize("statement", ["from common.batch import _x", "def f():\n    from common.batch import x, _y"])
def test_an_import_of_a_private_name_is_seen(statement: str) -> None:
    assert len(private(files() | {"common.planted": ast.parse(statement)})) == 1


def test_every_import_inside_the_packages_is_absolute() -> None:
    relative = [m for m, tree in files().items() for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    assert relative == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_source_runs_what_it_reads(package: str) -> None:
    assert {path: bad for path, tree in sources(package) if (bad := list(forbidden(tree)))} == {}


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("common.llm, common.engine, common.weights.zoo, common.schedule.trace", JAX | TORCH),
        ("experiments.compare, experiments.bench, experiments.correctness.judge", JAX | TORCH),
        ("jaxinfer", TORCH),
        ("torchinfer", JAX),
    ],
)
def test_importing_brings_no_more_than_it_should(modules: str, absent: set[str]) -> None:
    code = f"import sys, {modules}; print(sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "eval(text)",
        "torch.load(path)",
        "from torch import load",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "subprocess.run(command, shell=True)",
        "yaml.load(text)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_a_forbidden_use_is_seen(source: str) -> None:
    assert list(forbidden(ast.parse(source)))


@pytest.mark.parametrize("source", ["yaml.safe_load(text)", "model.eval()", "f(shell=False)", "jax.lax.map(f)", "import json"])
def test_a_harmless_use_is_not(source: str) -> None:
    assert not list(forbidden(ast.parse(source)))


@pytest.mark.parametrize(
    "source", ["import torch.nn", "from torch import nn", "def f():\n    import torch", "import_module('torch')"]
)
def test_an_import_is_seen_wherever_it_stands(source: str) -> None:
    assert imports(ast.parse(source)) == {"torch"}
