"""The history backend for sweeps: its engine writes down each start, and fails or hangs as files in the working folder say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.history_backend import VOCABULARY, install

PACKAGE = f"""
import os
import time
from pathlib import Path
from tests.history_runner import HistoryRunner

def alive(pid):
    return Path("/proc/" + pid).exists()

class ModelRunner(HistoryRunner):
    def __init__(self, config):
        super().__init__(num_pages=2, block_size=config.block_size, vocab_size={VOCABULARY}, max_seqs=config.max_num_seqs)
        earlier = Path("starts").read_text().split() if Path("starts").exists() else []
        if any(map(alive, earlier)):
            Path("overlap").touch()
        with open("starts", "a") as file:
            file.write(str(os.getpid()) + "\\n")
        if Path("dies").exists() and Path("dies").read_text() == str(config.max_num_seqs):
            os._exit(7)
        if Path("hangs").exists() and Path("hangs").read_text() == str(len(earlier) + 1):
            time.sleep(100000)
"""
OVERRIDES = (
    "model=tiny-llama",
    "measure=quick",
    "measure.limits_s=0",
    "measure.warmup_requests=0",
    "workload=fixed",
    "workload.num_requests=2",
    "workload.prompt_len=4",
    "workload.output_len=2",
)
"""A run as short as can be."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes `engine=history` known, of the kind above; returns the folder to run in, which holds `configs` for --config-dir."""
    return install(PACKAGE, tmp_path, monkeypatch)


def starts(folder: Path) -> list[str]:
    """The process of each engine that was started, in order."""
    return (folder / "starts").read_text().split() if (folder / "starts").exists() else []
