"""An engine that dies, is killed, hangs, raises or writes garbage loses its own row, with its log, and the others go on.

Real child processes: a package whose engine misbehaves in the way its name in `engines` says, at a step of its own.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from common.config import EngineConfig
from common.weights import zoo
from experiments import bench, compare
from experiments.engines.process import EngineFailure, IsolatedEngine
from experiments.engines.spec import EngineSpec
from experiments.load.workload import WorkloadConfig, draw
from tests.history_backend import VOCABULARY, command, history, last_line, written

__all__ = ["history"]
SMALL = (
    "model=tiny-llama",
    "workload=fixed",
    "workload.num_requests=2",
    "workload.output_len=6",
    "measure.limits_s=0",
    "measure.blocks=4",
    "measure.warmup_requests=0",
)
FAST = {compare.main: ("correctness.num_requests=0",)}
PACKAGE = """
import os, signal, sys, time
import historyinfer

def garbage():
    "Writes on the pipe that the answers take: standard output as it was before `serve` put the log in its place."
    requests = os.fstat(0).st_ino
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("pipe:") and os.fstat(int(name)).st_ino != requests:
                os.write(int(name), b"progress: 50% done\\n")
        except OSError:
            pass

def stray_child():
    "A forked process that keeps the pipe of answers open, and then the engine hangs."
    if os.fork() == 0:
        time.sleep(600)
        os._exit(0)
    time.sleep(600)

WAYS = {
    "dies": lambda: os._exit(9),
    "exits": lambda: sys.exit("the library gave up"),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "crashes": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "hangs": lambda: time.sleep(600),
    "strays": stray_child,
    "garbage": garbage,
}

class ModelRunner(historyinfer.ModelRunner):
    STEP = int(os.environ.get("FRAIL_STEP", 8))  # a window of the test takes six
    steps = 0

    def __init__(self, config):
        super().__init__(config)
        if os.environ.get("FRAIL_DTYPE", config.dtype) != config.dtype:
            self.STEP = sys.maxsize

    def submit(self, batch, *more):
        self.steps += 1
        if os.environ["FRAIL_WAY"] == "raises":
            if self.steps >= self.STEP:
                raise ValueError("this kernel is broken")
        elif self.steps == self.STEP:
            print("about to go wrong", flush=True)
            WAYS[os.environ["FRAIL_WAY"]]()
        return super().submit(batch, *more)

    def load(self, checkpoint, progress=None):
        if self.STEP == 0:
            raise MemoryError("no room for the weights")
"""


@pytest.fixture
def frail(history: Path) -> Path:
    """Makes `engine=frail` known, which goes wrong in its second window in the way of $FRAIL_WAY."""
    package = history / "packages" / "frailinfer"
    package.mkdir()
    (package / "__init__.py").write_text(PACKAGE)
    (history / "configs" / "engine" / "frail.yaml").write_text("defaults: [history, _self_]\nname: frail\n")
    return history


def failing(main: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *overrides: str) -> dict[str, Any]:
    """The result of a command that ends with 1, of which the whole of standard error is kept under `stderr`."""
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, main, *SMALL, *FAST.get(main, ()), *overrides)
    out, err = capfd.readouterr()
    assert exit.value.code == 1, err
    result = last_line(out)
    directory = Path(result["run"])
    assert written(result) == result and not list(directory.parent.glob("*.partial"))
    return result | {"stderr": err, "stdout": out}


@pytest.mark.parametrize(
    ("way", "kind", "said"),
    [
        ("dies", "died", "ended with exit code 9 during 'run'"),
        ("exits", "error", "raised SystemExit: the library gave up"),
        ("killed", "killed", "killed by SIGKILL during 'run'. So Linux ends a process when memory runs out"),
        ("crashes", "killed", "killed by SIGSEGV"),
        ("garbage", "garbage", "wrote something else than an answer to 'run': expected a frame, got b'progress"),
        ("raises", "error", "None of the 2 requests to engine 'frail' succeeded; the first error: "),
    ],
)
def test_an_engine_that_goes_wrong_loses_its_row_and_the_others_go_on(
    way: str, kind: str, said: str, frail: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FRAIL_WAY", way)
    result = failing(compare.main, capfd, monkeypatch, "engines=[history,frail,{name:history,block_size:8}]")
    assert set(result["failures"]) == {"frail"}
    failure = result["failures"]["frail"]
    assert failure["kind"] == kind and said in failure["message"] and failure["message"] in result["stderr"]
    assert way == "raises" or "about to go wrong" in failure["log"].splitlines()
    assert failure["message"][:40] in result["stdout"]
    assert set(result["engines"]) == set(result["ratios"]) == {"history", "history-block_size=8"}
    assert all(figures["completed"] == 8 for figures in result["engines"].values())
    assert set(result["comparisons"]) == {"history-block_size=8"} and result["tokens_equal_share"] == 1.0
    assert [len(order) for order in result["order"]] == [3, 3, 2, 2]
    rows = [json.loads(line) for line in (Path(result["run"]) / "requests.jsonl").read_text().splitlines()]
    assert sum(row["engine"] == "frail" for row in rows) == 2  # the window that went well is kept


def test_if_the_first_named_fails_the_ratios_are_over_the_first_that_is_left(
    frail: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FRAIL_WAY", "dies")
    result = failing(compare.main, capfd, monkeypatch, "engines=[frail,history,{name:history,block_size:8}]")
    assert result["ratios"]["history"] == 1.0
    assert result["comparisons"]["history-block_size=8"]["against"] == "history"
    assert result["comparisons"]["history-block_size=8"]["blocks"] == 4


def test_an_engine_that_cannot_load_fails_with_its_traceback(
    frail: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FRAIL_STEP", "0")
    result = failing(compare.main, capfd, monkeypatch, "engines=[frail,history]", "measure.blocks=3")
    failure = result["failures"]["frail"]
    assert failure["kind"] == "error" and "raised MemoryError: no room for the weights" in failure["message"]
    assert "in load" in failure["log"]
    assert (set(result["engines"]), result["comparisons"], result["ratios"]) == ({"history"}, {}, {"history": 1.0})
    assert result["order"] == [["history"]] * 3


def test_an_engine_that_fails_in_the_float32_pass_keeps_its_timed_figures_and_the_pass_goes_on(
    frail: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FRAIL_WAY", "dies")
    engines = "engines=[history,frail,{name:history,block_size:8}]"
    monkeypatch.setenv("FRAIL_DTYPE", "float32")
    monkeypatch.setenv("FRAIL_STEP", "2")
    float32 = ("correctness.num_requests=2", "measure.blocks=2")
    result = failing(compare.main, capfd, monkeypatch, engines, *float32)
    assert set(result["failures"]) == {"frail"} and set(result["engines"]) == {"history", "frail", "history-block_size=8"}
    assert result["tokens_equal"] is True and result["compared_tokens"] == 2 * 6
    assert set(result["comparisons"]) == {"frail", "history-block_size=8"}


def test_with_nobody_left_there_are_results_that_say_so(
    frail: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FRAIL_WAY", "dies")
    result = failing(compare.main, capfd, monkeypatch, "engines=[frail,frail]")
    assert set(result["failures"]) == {"frail", "frail-2"}
    assert (result["engines"], result["ratios"], result["comparisons"], result["tokens_equal"]) == ({}, {}, {}, None)
    assert result["stopped"] == "no engine was left"


def test_a_failure_outranks_a_gate_and_both_are_told(
    frail: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FRAIL_WAY", "dies")
    result = failing(bench.main, capfd, monkeypatch, "engine=frail", 'fail_if=["output_throughput < 1"]')
    assert result["failures"]["frail"]["kind"] == "died" and result["engine"] == "frail"
    assert "output_throughput was not measured" in result["stderr"]


class Impatience:
    """A `threading.Timer` that goes off, once for each log, when an engine writes there that it goes wrong. It does not go by
    the clock, so that a busy machine is never taken for an engine that hangs."""

    heard: ClassVar[set[Path]] = set()

    def __init__(self, seconds: float, function: Callable[[], None]) -> None:
        self.daemon, self.cancelled = True, threading.Event()
        self.thread = threading.Thread(target=self.watch, args=(function,), daemon=True)

    def watch(self, function: Callable[[], None]) -> None:
        while not self.cancelled.wait(0.02):
            logs = (path for path in Path.cwd().rglob("*.log") if path not in self.heard)
            if wrong := next((path for path in logs if "about to go wrong" in path.read_text()), None):
                self.heard.add(wrong)
                function()
                return

    def start(self) -> None:
        self.thread.start()

    def cancel(self) -> None:
        self.cancelled.set()
        if self.thread.is_alive():
            self.thread.join()


@pytest.mark.parametrize("way", ["hangs", "strays"])
def test_an_engine_that_hangs_is_ended_with_all_it_started(way: str, frail: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "Timer", Impatience)
    monkeypatch.setenv("FRAIL_WAY", way)
    monkeypatch.setenv("FRAIL_STEP", "1")
    spec = EngineSpec(label="slow", name="frail", config=EngineConfig(max_model_len=512))
    workload = draw(WorkloadConfig(name="w", num_requests=1, prompt_len=4, output_len=2), 0, VOCABULARY)
    with IsolatedEngine(spec, frail / "slow.log", 77.0) as engine:
        engine.load(zoo.resolve("tiny-llama"))
        with pytest.raises(EngineFailure, match=r"did not answer 'run' within measure.timeout_s=77") as caught:
            engine.run(workload)
        assert caught.value.record()["kind"] == "timeout" and "about to go wrong" in caught.value.log
        with pytest.raises(EngineFailure):  # it stays ended
            engine.run(workload)

    def alive() -> list[psutil.Process]:
        group = [process for process in psutil.process_iter(["status"]) if group_of(process) == engine._process.pid]
        return [process for process in group if process.info["status"] != psutil.STATUS_ZOMBIE]

    deadline = time.monotonic() + 10  # who is killed dies at its next turn on a processor
    while alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive()


def group_of(process: psutil.Process) -> int | None:
    """None if it has just ended."""
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(process.pid)
    return None


def test_an_engine_that_hangs_loses_its_row_after_the_time_of_the_configuration(
    frail: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threading, "Timer", Impatience)
    monkeypatch.setenv("FRAIL_WAY", "hangs")
    result = failing(compare.main, capfd, monkeypatch, "engines=[frail,history]", "measure.timeout_s=77", "measure.blocks=3")
    failure = result["failures"]["frail"]
    assert failure["kind"] == "timeout" and "measure.timeout_s=77" in failure["message"]
    assert result["engines"]["history"]["completed"] == 6
