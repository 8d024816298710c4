"""Every notebook runs from its first cell to its last, on both backends; what is committed has outputs and is fit to be read.

`python -m tests.test_notebooks [NUMBER …]` runs them (all, or those whose names start so) and writes their outputs afresh.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image

from common.config import EngineConfig
from common.engine import Engine
from experiments import lab, widgets
from tests.history_runner import HistoryRunner

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
ONCE = ("04_two_engines", "05_results", "06_parallelism")
"""Of both backends, or of none: they run once."""
RESULTS = ROOT / "notebooks" / "05_results.ipynb"
MAX_BYTES = 60_000
PATIENCE_S = 1800


def execute(path: Path, variables: dict[str, str]) -> Any:
    """The notebook at `path` with the outputs of a fresh kernel of this interpreter. Raises `CellExecutionError`."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory(prefix="nb") as folder:
        private = dict.fromkeys(("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"), folder)
        modules = {"PYTHONPATH": os.pathsep.join((str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])))}
        kernel = AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),  # ipykernel's own, whatever the user has installed
            transport="ipc",
            ip=f"{folder}/kernel",
            connection_file=f"{folder}/kernel.json",
        )
        client = NotebookClient(
            notebook,
            km=kernel,
            timeout=PATIENCE_S,
            startup_timeout=PATIENCE_S,
            record_timing=False,
            resources={"metadata": {"path": str(path.parent)}},
        )
        # On a thread: on the main one the client would handle SIGTERM by ending its kernel, and this process would go on.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, _run(client, kernel, os.environ | private | modules | variables)).result()
    return notebook


async def _run(client: NotebookClient, kernel: AsyncKernelManager, variables: Mapping[str, str]) -> None:
    try:
        await client.async_execute(env=variables, cleanup_kc=True)  # its sockets too, which it leaves to who made the kernel
    finally:
        if kernel.has_kernel:
            await kernel.shutdown_kernel(now=True)  # a client ends only kernels that it has made


def texts(notebook: Any) -> Iterator[str]:
    """What each output says as text."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            yield output.get("text", "")
            yield from (text for kind, text in output.get("data", {}).items() if not kind.startswith("image/png"))


@pytest.mark.parametrize(
    ("path", "backend"),
    [  # one backend of each with every change, in turn, and the other with `make accept`
        pytest.param(path, backend, id=f"{path.stem}-{backend}", marks=() if i % 2 == k else pytest.mark.accept)
        for i, path in enumerate(path for path in NOTEBOOKS if path.stem not in ONCE)
        for k, backend in enumerate(("jax", "torch"))
    ],
)
def test_a_notebook_runs_on_either_backend(path: Path, backend: str) -> None:
    execute(path, {"TANDEM_BACKEND": backend})


@pytest.mark.parametrize("name", ["04_two_engines", "06_parallelism"])
def test_a_notebook_of_both_backends_runs(name: str) -> None:
    execute(ROOT / "notebooks" / f"{name}.ipynb", {})


def test_the_notebook_of_results_reads_what_the_lab_has_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    comparison = lab.compare("engines=[torch,torch]", "experiment=smoke", "correctness.num_requests=0", "measure.limits_s=0")
    assert type(comparison) is lab.Comparison and comparison.directory.parent == Path("runs")
    assert comparison.figures.loc["total_output_tokens"].nunique() == 1
    said = "".join(texts(execute(RESULTS, {"TANDEM_RUNS": str(tmp_path / "runs")})))
    assert "Finished runs: 1" in said and repr(comparison) in said


def test_the_notebook_of_results_runs_where_there_are_none_and_sigterm_ends_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled, install = list[int](), signal.signal
    monkeypatch.setattr(signal, "signal", lambda number, handler: (handled.append(number), install(number, handler))[1])
    assert "Make one" in "".join(texts(execute(RESULTS, {"TANDEM_RUNS": str(tmp_path)})))
    assert handled == []  # while it runs, too


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_fit_to_be_read(path: Path) -> None:
    assert path.stat().st_size <= MAX_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for cell in code for output in cell.outputs)
    assert sum(bool(cell.outputs) for cell in code) > len(code) / 2
    for text in texts(notebook):
        assert not re.search(r"/(home|root|work|tmp|Users)/|[A-Z]:\\", text), text


def test_the_counters_that_committed_notebooks_show_are_those_that_an_engine_has() -> None:
    runner = HistoryRunner(num_pages=9, block_size=4, max_seqs=2)
    engine = Engine(runner, EngineConfig(block_size=4, max_num_seqs=2, max_num_batched_tokens=8), num_pages=9)
    names = [name for name, _ in widgets.counters(engine.stats()).rows]
    said = [text for path in NOTEBOOKS for text in texts(nbformat.read(path, as_version=4)) if text.startswith("Engine\n")]
    assert len(said) == 2
    assert all([line.split()[0] for line in text.splitlines()[2:]] == names for text in said)


def test_there_are_six_notebooks() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


def main() -> None:
    wanted = tuple(sys.argv[1:]) or ("",)
    for path in NOTEBOOKS:
        if path.name.startswith(wanted):
            print(path.name, flush=True)
            with tempfile.TemporaryDirectory() as runs:
                if path == RESULTS:
                    make_examples(f"runs={runs}")
                notebook = execute(path, {"TANDEM_RUNS": runs})
            for cell in notebook.cells:
                cell.metadata = {}
                for output in cell.get("outputs", ()):
                    if "image/png" in output.get("data", {}):
                        output.data["image/png"] = smaller(output.data["image/png"])
            nbformat.write(notebook, path)


def make_examples(*overrides: str) -> None:
    """Runs to be looked at: one engine against itself, since what is committed shall claim nothing about speed."""
    tiny = ("experiment=smoke", "workload.num_requests=32", "workload.output_len=48", *overrides)
    lab.compare("engines=[torch,torch]", "measure.blocks=6", "measure.max_blocks=6", *tiny)
    for engine in ("jax", "torch"):
        lab.bench(f"engine={engine}", *tiny)


def smaller(png: str) -> str:
    """The same picture in 64 colours: a quarter of the bytes."""
    target = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(64).save(target, "png", optimize=True)
    return base64.b64encode(target.getvalue()).decode()


if __name__ == "__main__":
    main()
