"""Write the report of a run or a sweep into its directory.

The files are `report.html` (one file, for any browser), `report.md` (for a pull request), `figures/` and, for a run,
`trace.perfetto.json`. All are made before the first is moved into place, so a crash leaves the older report complete.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from common.config import expect
from common.errors import ConfigError, TandemError
from experiments.report import page, perfetto
from experiments.report.charts import canvas
from experiments.report.rows import with_ok
from experiments.report.run_page import run_page
from experiments.report.sweep_page import sweep_page
from experiments.runs.records import PROFILED, read_kernels, read_rows, read_steps
from experiments.runs.results import RunFiles, is_sweep, read_run

HTML = "report.html"


def write_report(directory: Path) -> Path:
    """Write the report of a run, or of a sweep, into its directory. Returns the path of the page.

    Raises `ConfigError` for a folder that is neither, or that takes no files."""
    expect(directory.is_dir(), f"A report needs the folder of a run or of a sweep; {directory} is none.")
    files: dict[str, bytes] = {}
    if is_sweep(directory):
        made = sweep_page(directory)
    else:
        run = read_run(directory)
        made, rows, steps = run_page(run)
        rows, steps = with_profiled(run, rows, steps)
        if made.traced:
            order = run.results.get("order") or ()
            trace = perfetto.trace(rows, steps, list(run.engines), order, read_kernels(directory))
            files["trace.perfetto.json"] = json.dumps(trace, separators=(",", ":")).encode()
    for drawing in made.drawings:
        files[f"figures/{drawing.name}.svg"] = canvas.standalone(drawing.svg).encode()
        files[f"figures/{drawing.name}.png"] = drawing.png
    files["report.md"] = page.markdown(made).encode()
    colours = [f"var({canvas.VARIABLES[canvas.colour(i)]})" for i in range(len(made.engines))]
    files[HTML] = page.html(made, canvas.theme(":root"), colours).encode()
    try:
        put(directory, files)
    except OSError as error:
        raise ConfigError(f"The report cannot be written to {directory}: {error}.") from error
    return directory / HTML


def with_profiled(run: RunFiles, rows: pd.DataFrame, steps: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Append the windows under a profiler, if any, as one block more."""
    folder = run.directory / PROFILED
    if not folder.exists():
        return rows, steps
    more_rows, more_steps = (frame.assign(block=run.blocks) for frame in (with_ok(read_rows(folder)), read_steps(folder)))
    return pd.concat([rows, more_rows]), pd.concat([steps, more_steps])


def make_report(directory: Path) -> Path | None:
    """`write_report`; if it cannot be made, None, and why is printed: results are worth having without."""
    try:
        return write_report(directory)
    except TandemError as error:
        print(f"error: {error}", file=sys.stderr)
        return None
    except Exception:
        traceback.print_exc()
        return None


def put(directory: Path, files: Mapping[str, bytes]) -> None:
    """Put all files in place, each whole; figures of an older report that are no longer made go. The page comes last."""
    scratch = Path(tempfile.mkdtemp(prefix=".report-", dir=directory))
    try:
        for name, data in files.items():
            (scratch / name).parent.mkdir(exist_ok=True)
            (scratch / name).write_bytes(data)
        for name in files:
            (directory / name).parent.mkdir(exist_ok=True)
            os.replace(scratch / name, directory / name)
        for old in (directory / "figures").glob("*"):
            if f"figures/{old.name}" not in files:
                old.unlink()
    finally:
        shutil.rmtree(scratch)
