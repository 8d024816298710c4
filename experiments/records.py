"""The raw rows of a run, as files in its directory: one line of JSON for each request of each window."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from experiments.drive import Window


def write_rows(directory: Path, windows: Mapping[str, Sequence[Window]]) -> None:
    """One line for each request of each window: `requests.jsonl`."""
    with (directory / "requests.jsonl").open("w") as file:
        for engine, blocks in windows.items():
            for block, window in enumerate(blocks):
                for row in window.rows:
                    file.write(json.dumps({"engine": engine, "block": block} | asdict(row)) + "\n")
