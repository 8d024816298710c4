"""Create the directory of a run, and write the options, the machine, every request and the results to it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from common.config import expect
from common.errors import ConfigError, TandemError
from common.process.exits import unwritable
from common.system.hardware import cores, cpu_name
from experiments.runs.source import code_digest, compiler, lines_of, source, versions

PARTIAL = ".partial"
ROWS = "requests.jsonl"
"""Of each request of each window that has ended, as `experiments.runs.records` writes it."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
VARIABLES = ("XLA_FLAGS", "OMP_NUM_THREADS", "PJRT_NPROC", "CXX", "TANDEM_CXXFLAGS")


class DiskFullError(Exception):
    """The disk was too full to write a run. Another command would not help."""


def runs_folder(config: DictConfig) -> Path:
    """Where run directories go."""
    expect(isinstance(config.runs, str) and bool(config.runs), f"runs must be the path of a folder, got {config.runs!r}.")
    return Path(config.runs)


@contextlib.contextmanager
def run_directory(root: Path, what: str, directory: Path | None = None) -> Iterator[Path]:
    """A new directory `root/<date-time>-<what>`, which ends in `.partial` until the block has ended well. Runs that
    start in the same second get a directory each.

    `directory` names it instead: a job's of a sweep (`experiments.sweep.job.job_directory`), which replaces what an attempt
    that was cut short has left there. A `TandemError` before the first window has ended removes it, since nothing was run;
    after a later one, a crash or a kill it stays as `.partial`, with its logs. Where the disk is full it stays too, and
    `DiskFullError` says with what.
    """
    try:
        if directory is None:
            partial = new_partial(root, f"{datetime.now():%Y%m%d-%H%M%S}-{what}")
        else:
            partial = directory.with_name(directory.name + PARTIAL)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"The run directory {directory or root} cannot be made: {error.strerror}. Set runs to a folder that can."
        ) from error
    try:
        yield partial
    except TandemError:
        if (partial / ROWS).exists():
            print(f"Cut short. What was written so far is in {partial}.", file=sys.stderr)
            raise
        shutil.rmtree(partial)
        with contextlib.suppress(OSError):
            partial.parent.rmdir()  # if it was made for this run, it is empty now
        raise
    except KeyboardInterrupt:
        results = any((partial / name).exists() for name in ("results.json", ROWS))
        said = "What was written so far is" if results else "There are no results yet; configuration and logs are"
        print(f"Interrupted. {said} in {partial}.", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno not in FULL or unwritable():
            raise
        kept = ", ".join(sorted(path.name for path in partial.iterdir()))
        raise DiskFullError(
            f"The run could not be written: {error.strerror}. Kept in {partial}: {kept or 'nothing'}."
        ) from error
    partial.rename(finished(partial))


def new_partial(root: Path, stem: str) -> Path:
    """Create `root/NAME.partial` and return it. NAME is the first of `stem`, `stem-2`, `stem-3`, … that no run has.

    The file system decides between runs that start at the same time: `mkdir` succeeds for one process only.
    """
    names = numbered(stem)
    name = next(names)
    while True:
        root.mkdir(parents=True, exist_ok=True)
        partial = root / (name + PARTIAL)
        try:
            partial.mkdir()
        except FileNotFoundError:
            continue  # a run that failed has just removed `root`, which was empty
        except FileExistsError:
            name = next(names)
            continue
        if not (root / name).exists():
            return partial
        partial.rmdir()  # the run that has this name ended before `mkdir`
        name = next(names)


def numbered(stem: str) -> Iterator[str]:
    """Yield `stem`, `stem-2`, `stem-3`, … without end."""
    yield stem
    yield from (f"{stem}-{number}" for number in itertools.count(2))


def finished(partial: Path) -> Path:
    """The name that `partial` takes when its run has ended."""
    return partial.with_name(partial.name.removesuffix(PARTIAL))


def write_setup(directory: Path, config: DictConfig) -> None:
    """The resolved configuration and the machine, written before anything runs."""
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True), encoding="utf-8")
    write_json(directory / "environment.json", environment())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """The file is there whole or as it was before, whatever ends this process or the machine."""
    write_whole(path, [json.dumps(finite(value), indent=1) + "\n"])


def write_whole(path: Path, texts: Iterable[str]) -> None:
    """As `write_json` does, any texts, one after the other."""
    beside = path.with_name(path.name + ".new")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(texts)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    beside.replace(path)


def finite(value: Any) -> Any:
    """The same with None for each number that JSON has no word for: NaN and the infinities."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rerun_command() -> list[str]:
    """The words of the command line that runs this again. Those of a launcher stay, for the sweep that a job belongs to; a run
    alone takes no notice of them."""
    if not HydraConfig.initialized():
        return sys.orig_argv
    hydra = HydraConfig.get()
    wanted = [word for word in hydra.overrides.hydra if not word.startswith(("hydra.mode=", "hydra.sweep."))]
    wanted += [word for word in hydra.overrides.task if not word.startswith("sweep=")]
    return ["python", "-m", f"experiments.{hydra.job.config_name}", *config_folders(hydra), *wanted]


def config_folders(hydra: Any) -> list[str]:
    """The words of a command line that name folders of configurations beside ours; `hydra` is Hydra's own part of one."""
    given = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    return [word for folder in given for word in ("--config-dir", folder)]


def environment() -> dict[str, Any]:
    """Return the environment that the figures depend on, as far as the machine reports it."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(rerun_command()),
        "overrides": list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else [],
        "argv": sys.orig_argv,
        "cpu": cpu_name(),
        "cores": cores(),
        "governor": governors(),
        "frequency_mhz": frequency(),
        "memory_gib": round(memory.total / 2**30, 1),
        "memory_available_gib": round(memory.available / 2**30, 1),
        "swap_used_gib": round(swap.used / 2**30, 1),
        "hugepages": hugepages(),
        "gpus": lines_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "compiler": compiler(),
        "code": code_digest(),
        **source(),
    }


def governors() -> list[str]:
    """How the processors choose their clock, each name once; empty if the machine does not report it."""
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    return sorted({text for file in files if (text := text_of(file))})


def frequency() -> dict[str, float] | None:
    """The processors' clock in MHz: its mean now, and its bounds if the machine reports them; None if it reports nothing."""
    try:
        clock = psutil.cpu_freq()
    except (OSError, NotImplementedError, ValueError):
        return None
    return {name: value for name, value in clock._asdict().items() if value} or None if clock else None


def hugepages() -> dict[str, Any]:
    """Whether memory comes in large pages: the mode of transparent ones, and how many are set aside; None: not reported."""
    mode = re.search(r"\[(\w+)\]", text_of(Path("/sys/kernel/mm/transparent_hugepage/enabled")))
    count = re.search(r"HugePages_Total:\s*(\d+)", text_of(Path("/proc/meminfo")))
    return {"transparent": mode[1] if mode else None, "reserved": int(count[1]) if count else None}


def text_of(file: Path) -> str:
    """What stands in a file of the system's; nothing where there is none to read."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
