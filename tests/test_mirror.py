"""The mirror: both backends have the same files, the same public names in the same order, and the same signatures.

The tests read the sources, so a framework's decorators and base classes change nothing. Types may differ. `ONE_SIDED` lists
the public names that only one framework needs; a name used in its own file only has a leading underscore.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JAX, TORCH = ROOT / "jaxinfer", ROOT / "torchinfer"
FILES = sorted({path.name for package in (JAX, TORCH) for path in package.glob("*.py")})

SAME = {"__call__": "forward"}
"""What one framework calls by another name: nnx modules are called, PyTorch's run `forward`."""
OPAQUE = ("Plan", "Inputs")
"""Made and read by one file of one backend: how such a value holds a step is each framework's own."""
ONE_SIDED: dict[str, dict[str, set[str]]] = {
    # JAX compiles a program for each shape, and a mesh shards an array over processes.
    "jaxinfer": {
        "arrays.py": {"gather_to_host"},
        "attention.py": {"plan_shape"},
        "cache.py": {"copy_all_pages"},
        "device.py": {"make_cpu_devices"},
        "parallel.py": {
            *("REPLICATED", "HEADS", "COLUMNS", "without_negative_zero", "communicated_bytes"),
            *("ProcessInfo", "RemoteRanks", "init_distributed", "shut_down_distributed", "start_remote_ranks"),
        },
        "step.py": {"MAX_EDITS", "choice_shape"},
    },
    # torch.distributed knows ranks: each computes on its own device and calls the collectives itself.
    "torchinfer": {
        "device.py": {"choose_device", "local_device"},
        "parallel.py": {"Endpoints", "NetworkEndpoint", "RankInfo", "RankZero", "Ranks", "SharedMemoryTransport"},
    },
}
"""package → file → public names that the other package has no counterpart of."""


def outline(source: str) -> list[str]:
    """One line for every public name of a module, in order: constants, functions with their parameters and defaults, classes
    with their fields and methods."""
    return list(_outline(ast.parse(source).body, ""))


def _outline(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    declares = any(isinstance(node, ast.FunctionDef) and node.name == "__init__" for node in body)
    for node in body:
        match node:
            case ast.FunctionDef(name=name):
                name = SAME.get(name, name)
                if _public(name):
                    decorators = [ast.unparse(d) for d in node.decorator_list]
                    kind = next((d for d in decorators if d in ("property", "classmethod", "staticmethod")), "def")
                    yield f"{prefix}{kind} {name}({ast.unparse(_untyped(node.args))})"
            case ast.ClassDef(name=name) if _public(name):
                yield f"{prefix}class {name}"
                if name not in OPAQUE:
                    yield from _outline(node.body, f"{prefix}{name}.")
            case ast.AnnAssign(target=ast.Name(id=name)) if _public(name) and not declares:  # else for the type checker
                yield f"{prefix}{name}"
            case ast.Assign(targets=targets):
                names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
                yield from (f"{prefix}{name}" for name in names if _public(name))


def shared(lines: list[str], package: str, file: str) -> list[str]:
    """Return the lines of an outline without the names that only `package` has in `file`."""
    extra = ONE_SIDED[package].get(file, set())
    return [line for line in lines if _top(line) not in extra]


def _top(line: str) -> str:
    """Return the module-level name that a line of an outline is about."""
    name = line.split("(")[0].split(".")[0]
    return name.split()[-1]


def _public(name: str) -> bool:
    return not name.startswith("_") or name == "__init__"


def _untyped(arguments: ast.arguments) -> ast.arguments:
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return arguments


def test_both_packages_have_the_same_files() -> None:
    assert FILES == [path.name for path in sorted(JAX.glob("*.py"))] == [path.name for path in sorted(TORCH.glob("*.py"))]
    assert {"runner.py", "model.py", "layers.py", "attention.py", "cache.py", "sampling.py", "weights.py"} <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_public_names_and_signatures_are_the_same(file: str) -> None:
    jax, torch = outline((JAX / file).read_text()), outline((TORCH / file).read_text())
    assert shared(jax, "jaxinfer", file) == shared(torch, "torchinfer", file)


@pytest.mark.parametrize(("package", "other"), [(JAX, TORCH), (TORCH, JAX)], ids=["jaxinfer", "torchinfer"])
def test_a_one_sided_name_exists_on_its_side_only(package: Path, other: Path) -> None:
    for file, names in ONE_SIDED[package.name].items():
        assert names <= {_top(line) for line in outline((package / file).read_text())}, file
        assert not names & {_top(line) for line in outline((other / file).read_text())}, file


MODULE = """
LIMIT = 3
class Pool(NamedTuple):
    k: Array
    def take(self, n: int = 1) -> Array: ...
    def _spare(self): ...
def write(pool: Array, *, at: int) -> Array: ...
def _hidden(): ...
"""


@pytest.mark.parametrize(
    ("old", "new", "seen"),
    [
        ("Array", "Tensor", False),
        ("_hidden", "_other", False),
        ("_spare", "_rest", False),
        ("LIMIT = 3", "LIMIT = 4", False),
        ("LIMIT", "BOUND", True),
        ("k: Array", "v: Array", True),
        ("n: int = 1", "n: int = 2", True),
        ("n: int", "count: int", True),
        ("*, at", "at", True),
        ("def write", "def put", True),
        ("class Pool", "class Cache", True),
        ("_hidden", "shown", True),
    ],
)
def test_the_mirror_shows_a_difference_and_only_those_it_should(old: str, new: str, seen: bool) -> None:
    assert old in MODULE
    assert (outline(MODULE) != outline(MODULE.replace(old, new))) == seen


def test_order_counts() -> None:
    assert outline("A = 1\nB = 2") != outline("B = 2\nA = 1")
