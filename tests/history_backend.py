"""A third backend for tests of the harness: the history-hash runner as the package `historyinfer`, with a config of its own.

It shows what adding one takes, and lets whole runs be tested in real processes without loading a framework.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
VOCABULARY = 320
"""Tokens of `tiny-llama`, whose name the runs go by."""
PACKAGE = f"""
import os
import time
from tests.history_runner import HistoryRunner

class ModelRunner(HistoryRunner):
    def __init__(self, config):
        super().__init__(num_pages=2, block_size=config.block_size, vocab_size={VOCABULARY}, max_seqs=config.max_num_seqs)

    def submit(self, batch, *more):
        if os.environ.get("HISTORY_DIES"):
            os._exit(7)
        if os.environ.get("HISTORY_SLEEPS"):
            time.sleep(60)
        print("a library that prints")
        return super().submit(batch, *more)
"""
CONFIG = "defaults: [/engine_base@_here_, _self_]\nname: history\nmax_model_len: 512\n"


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes `engine=history` known; returns the folder to run in, which holds `configs` for --config-dir."""
    return install(PACKAGE, tmp_path, monkeypatch)


def install(package: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the source `package` known as `engine=history`; returns the folder, which is the working folder now."""
    (folder / "packages" / "historyinfer").mkdir(parents=True)
    (folder / "packages" / "historyinfer" / "__init__.py").write_text(package)
    (folder / "configs" / "engine").mkdir(parents=True)
    (folder / "configs" / "engine" / "history.yaml").write_text(CONFIG)
    monkeypatch.setenv("PYTHONPATH", f"{folder / 'packages'}:{ROOT}")
    monkeypatch.chdir(folder)
    return folder


def command(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], *overrides: str) -> None:
    """Call a command's entry point as its command line would, without a report unless one is asked for (`report=true`)."""
    options = [word for word in overrides if "=" not in word]
    words = ["report=false", *(word for word in overrides if "=" in word)]
    monkeypatch.setattr(sys, "argv", ["command", "--config-dir", "configs", *options, *words])
    main()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Who is started as a job in the background ignores Ctrl-C, and so would all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def written(result: Mapping[str, Any]) -> dict[str, Any]:
    """`results.json` of a run by its last line, which leaves out what is told of every position."""
    results: dict[str, Any] = json.loads((Path(result["run"]) / "results.json").read_text())
    for found in results.get("agreement", {}).values():
        del found["by_position"]
    return results


def last_line(output: str) -> dict[str, Any]:
    return json.loads(output.rstrip("\n").rpartition("\n")[2])
