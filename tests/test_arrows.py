"""Who may import whom, and what nobody may use."""

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


def sources(package: str) -> Iterator[tuple[str, ast.AST]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    # Other people's engines live in experiments/baselines, and bring their own framework.
    assert {path: bad for path, tree in sources(package) if (bad := imports(tree) & OTHERS[package])} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_source_runs_what_it_reads(package: str) -> None:
    assert {path: bad for path, tree in sources(package) if (bad := list(forbidden(tree)))} == {}


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("common.llm, common.engine, common.weights.zoo, common.schedule.trace", JAX | TORCH),
        ("experiments.compare, experiments.bench, experiments.correctness", JAX | TORCH),
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
