"""Launch the jobs of a sweep (`-m`), each in a fresh process, one after another.

So no job inherits memory, threads or caches from another, none is timed beside another, and a crash ends one job only. A job
ends with its launcher. A killed launcher leaves only complete runs, and the next launcher continues after them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from common.config import expect, real
from common.errors import ConfigError
from common.process.exits import DEFECT, GATE
from experiments.runs.directory import config_folders
from experiments.runs.source import code_digest
from experiments.runs.sweep_jobs import (
    JOBS,
    OTHER_CODE,
    Job,
    code_of,
    digest,
    is_done,
    is_whole,
    merged,
    read_jobs,
    set_aside,
    write_jobs,
)
from experiments.sweep.board import Board, told_apart

POLL_S = 0.1
TAIL_LINES = 15


class ProcessLauncher(Launcher):
    """`hydra/launcher=process`."""

    def __init__(self, timeout_s: float | None = None, keep_other_code: bool = False) -> None:
        self._timeout_s = timeout_s
        self._keep_other_code = keep_other_code

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        expect(
            self._timeout_s is None or (real(self._timeout_s, 0, float("inf")) and self._timeout_s > 0),
            f"hydra.launcher.timeout_s must be a number of seconds > 0, or null, got {self._timeout_s!r}.",
        )
        expect(
            isinstance(self._keep_other_code, bool),
            f"hydra.launcher.keep_other_code must be true or false, got {self._keep_other_code!r}.",
        )
        self._context = hydra_context
        self._config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs that are not done. A job that fails is recorded and raises nothing; its return value is its failure."""
        folder = Path(self._config.hydra.sweep.dir)
        wanted = [(digest(self._compose(overrides)), tuple(overrides)) for overrides in job_overrides]
        expect_distinct(wanted)
        folder.mkdir(parents=True, exist_ok=True)
        with only_launcher(folder):
            known = read_jobs(folder)
            jobs = {job.digest: job for job in merged(known, wanted)}
            write_jobs(folder, list(jobs.values()))
            mine = [jobs[key] for key, _ in wanted]
            with Board(told_apart([job.overrides for job in mine])) as board:
                if said := other_code(folder, mine, self._keep_other_code):
                    board.say(said)
                for line in found_there(folder, known, mine):
                    board.say(line)
                for number, job in enumerate(mine):
                    if is_done(folder, job):
                        board.skipped()
                        continue
                    if is_whole(folder / JOBS / job.name):  # but it failed
                        shutil.rmtree(folder / JOBS / job.name)
                    jobs[job.digest] = replace(job, failure=None)  # if this attempt is cut short, its directory alone counts
                    write_jobs(folder, list(jobs.values()))
                    board.started(number)
                    try:
                        jobs[job.digest] = self._attempt(folder, job, board)
                    except KeyboardInterrupt:
                        resume, finish = resume_command(self._config.hydra, folder), finish_command(folder)
                        board.say(
                            f"Interrupted: {board.done} of {len(mine)} jobs are done. Go on with:\n  {resume}\n"
                            f"Table and report of what is done:\n  {finish}"
                        )
                        raise
                    write_jobs(folder, list(jobs.values()))
                    board.ended(jobs[job.digest].seconds, jobs[job.digest].failure)
        return [returned(jobs[key]) for key, _ in wanted]

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        return self._context.config_loader.load_sweep_config(self._config, list(overrides))

    def _attempt(self, folder: Path, job: Job, board: Board) -> Job:
        """Run one job to its end. Returns it with what became of it."""
        directory, log = folder / JOBS / job.name, folder / JOBS / f"{job.name}.log"
        log.parent.mkdir(exist_ok=True)
        start = time.monotonic()
        code = run_process(self._command(directory, job), log, self._timeout_s, lambda: board.working(log))
        seconds = time.monotonic() - start
        whole = is_whole(directory)
        failure = (
            None if code == 0 and whole else describe(code, self._timeout_s, log) | {"final": code in (GATE, DEFECT) and whole}
        )
        return replace(job, seconds=seconds, failure=failure)

    def _command(self, directory: Path, job: Job) -> list[str]:
        hydra = self._config.hydra
        mine = [f"hydra.sweep.dir={quoted(str(directory.parent.parent))}", f"hydra.sweep.subdir={JOBS}/{job.name}"]
        return [
            *(sys.executable, "-m", "experiments.sweep.job", hydra.job.config_name, str(directory)),
            *config_folders(hydra),
            *(word for word in hydra.overrides.hydra if not word.startswith(("hydra.mode=", "hydra.sweep."))),
            *job.overrides,
            *mine,
        ]


def expect_distinct(jobs: Sequence[tuple[str, tuple[str, ...]]]) -> None:
    """Raises `ConfigError` for two jobs that ask for the same."""
    seen: set[str] = set()
    for key, overrides in jobs:
        expect(
            key not in seen,
            f"Two jobs of this sweep are the same run: {' '.join(overrides)}. To repeat a run, sweep over seed=0,1,2.",
        )
        seen.add(key)


def found_there(folder: Path, known: Sequence[Job], wanted: Sequence[Job]) -> list[str]:
    """What a sweep's folder holds before its jobs run, in sentences: others that the wanted come beside, and wanted ones that
    are done. `known` is its list until now."""
    said = []
    digests = {job.digest for job in known}
    others = len(digests - {job.digest for job in wanted})
    added = sum(job.digest not in digests for job in wanted)
    if others and added:
        beside = f"{folder} holds {jobs_of(others)} of other settings, {added} added"
        said.append(f"{beside}; give another sweep= to keep them apart.")
    if done := sum(is_done(folder, job) for job in wanted):
        said.append(f"{done} of {jobs_of(len(wanted))} done before, skipped.")
    return said


def other_code(folder: Path, wanted: Sequence[Job], keep: bool) -> str:
    """Set aside the results of `wanted` jobs that other code computed, unless `keep`.

    Return a message, which is empty where there are no such results.
    """
    code = code_digest()
    done = [folder / JOBS / job.name for job in wanted if is_done(folder, job)]
    others = [directory for directory in done if code_of(directory) != code]
    if not others:
        return ""
    said = f"{len(others)} of {jobs_of(len(wanted))} done before by other code (now {code})"
    if keep:
        return f"{said}, kept because of hydra.launcher.keep_other_code=true."
    for directory in others:
        set_aside(directory)
    return (
        f"{said}: they run again. Their results are now in {folder / OTHER_CODE}. "
        "To keep results of other code, set hydra.launcher.keep_other_code=true."
    )


def jobs_of(count: int) -> str:
    return f"{count} job{'s' * (count != 1)}"


@contextlib.contextmanager
def only_launcher(folder: Path) -> Iterator[None]:
    """Raises `ConfigError` if another launcher, that is alive, works on this sweep."""
    with (folder / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read() or "of another user"
            raise ConfigError(f"The sweep {folder} is being run by process {owner}. Wait for it, or end it.") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def run_process(command: Sequence[str], log: Path, timeout_s: float | None, tell: Callable[[], None]) -> int | None:
    """Run `command` with its output in `log`; `tell` is called while it runs.

    Returns its exit code, the negative number of the signal that ended it, or None if its time ran out. Nothing of it survives:
    it leads a process group of its own, which is ended after it, and, should this process be killed, ends itself (`job`).
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    assert process.stdin
    start = time.monotonic()
    late = False
    try:
        while not late and os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            tell()
            time.sleep(POLL_S)
            late = timeout_s is not None and time.monotonic() - start > timeout_s
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its leader is not reaped yet, so the number is still its own
        process.wait()
        process.stdin.close()
    return None if late else process.returncode


def describe(code: int | None, timeout_s: float | None, log: Path) -> dict[str, Any]:
    """Why a job failed, for its row: what ended it, and the end of its log."""
    if code is None:
        kind = f"took longer than {timeout_s:g} s"
    elif code < 0:
        kind = f"killed by {signal.Signals(-code).name}"
    else:
        kind = f"exit code {code}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    return {"kind": kind, "message": "\n".join(lines), "log": str(log)}


def returned(job: Job) -> JobReturn:
    return JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED, _return_value=job.failure)


def quoted(text: str) -> str:
    """A string for Hydra's grammar, whatever signs are in it."""
    return QuotedString(text, Quote.single).with_quotes()


def resume_command(hydra: DictConfig, folder: Path) -> str:
    """The command line that continues a sweep. `hydra` is Hydra's own part of its configuration."""
    asked = [word for word in (*hydra.overrides.hydra, *hydra.overrides.task) if not word.startswith("hydra.mode=")]
    named = any(word.startswith(("sweep=", "hydra.sweep.dir=")) for word in asked)
    words = ["python", "-m", f"experiments.{hydra.job.config_name}", *config_folders(hydra), "-m", *asked]
    return shlex.join(words if named else [*words, f"sweep={folder.name}"])


def finish_command(folder: Path) -> str:
    """The command line that makes table and report of a sweep as far as it is done."""
    return shlex.join(["python", "-m", "experiments.sweep", str(folder)])
