"""Run one job of a sweep in a process of its own: `python -m experiments.sweep.job`."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
from importlib import import_module
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.runs.sweep_jobs import JOBS, Job, digest


def job_directory(config: DictConfig) -> Path | None:
    """Where the run that goes on in this process is kept if it is a job of a sweep, else None."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    if hydra.sweep.subdir != ".":  # our launcher named it
        return Path(hydra.sweep.dir) / str(hydra.sweep.subdir)
    if hydra.mode != RunMode.MULTIRUN:
        return None
    job = Job(number=hydra.job.num, digest=digest(config), overrides=())  # another launcher's
    return Path(hydra.sweep.dir) / JOBS / job.name


def end_with_launcher() -> None:
    """End this process and all that it has started as soon as the launcher is gone: then its end of our input is closed."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """`python -m experiments.runs.sweep_jobs COMMAND DIRECTORY OVERRIDES…`: the run that COMMAND makes of OVERRIDES, kept as
    DIRECTORY.

    Of one sweep no two compute at once, be it that a launcher was killed and the next is quick: each waits for the last to end.
    """
    threading.Thread(target=end_with_launcher, daemon=True).start()
    command, directory, overrides = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sys.argv = [command, *overrides]
        import_module(f"experiments.{command}").main()


if __name__ == "__main__":
    main()
