"""Sweeps: every job in a process of its own, what is done stays done, and whatever is killed leaves nothing half written."""

import contextlib
import itertools
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hydra
import pandas as pd
import psutil
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from common.errors import ConfigError
from experiments import bench, compare
from experiments.runs.directory import run_directory
from experiments.runs.results import sweep_table
from experiments.runs.sweep_jobs import Job, digest, is_done, merged, read_jobs, write_jobs
from experiments.sweep.board import duration, told_apart
from experiments.sweep.launcher import describe, found_there, only_launcher, quoted, run_process
from experiments.sweep.sweeper import combinations
from experiments.sweep.table import print_sweep
from tests.history_backend import command, interruptible, last_line
from tests.sweep_backend import OVERRIDES, folder, starts

__all__ = ["folder"]

PATIENCE_S = 120
TWO = ("engine.max_num_seqs=4,5",)
MEASURED = ("throughput", "_ms", "_s", "_mib", "duration", "share", "run", "unsure", "contaminated")
"""Parts of the names of columns that no two runs have alike."""


def sweep(monkeypatch: pytest.MonkeyPatch, *overrides: str, main: Callable[[], None] = bench.main) -> int:
    """The exit code of a sweep that is launched from this process."""
    engine = () if main is compare.main else ("engine=history",)
    try:
        command(monkeypatch, main, "-m", *engine, *OVERRIDES, *overrides)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def launch(*overrides: str) -> subprocess.Popen[str]:
    """A launcher in a process group of its own, to be killed."""
    words = [
        sys.executable,
        "-m",
        "experiments.bench",
        "--config-dir",
        "configs",
        "-m",
        "engine=history",
        *OVERRIDES,
        *overrides,
    ]
    with interruptible():
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def what_was_asked(name: str) -> list[dict[str, object]]:
    """A sweep's table without what is measured."""
    table = sweep_table(Path("runs/sweeps") / name)
    return table[[name for name in table if not any(part in name for part in MEASURED)]].to_dict("records")


# Whole sweeps.


def test_a_sweep_runs_every_combination_alone_and_once_and_ends_in_one_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sweep(monkeypatch, "sweep=s", *TWO, "workload.num_requests=1,2") == 0
    output, progress = capfd.readouterr()
    result = last_line(output)
    assert (result["jobs"], result["ok"], result["failed"], result["failures"]) == (4, 4, 0, {})
    assert "job 4 of 4: workload.num_requests=2 engine.max_num_seqs=5" in progress and "1 left, about" in progress
    table = pd.read_parquet(result["table"])
    assert list(table["engine.max_num_seqs"]) == [4, 5, 4, 5] and list(table["workload.num_requests"]) == [1, 1, 2, 2]
    assert list(table["total_output_tokens"]) == [2, 2, 4, 4] and set(table["status"]) == {"ok"}
    assert list(pd.read_csv("runs/sweeps/s/sweep.csv")["run"]) == list(table["run"])
    assert all((folder / "runs/sweeps/s" / run / "results.json").exists() for run in table["run"])
    assert not list(folder.rglob("*.partial")) and not list(folder.rglob("*.new"))
    assert len(set(starts(folder))) == 4 and not (folder / "overlap").exists()

    command_line = json.loads((folder / "runs/sweeps/s" / table["run"][3] / "environment.json").read_text())["command"]
    assert "experiments.bench" in command_line and command_line.endswith("engine.max_num_seqs=5")
    assert "workload.num_requests=2" in command_line and "sweep=" not in command_line

    assert sweep(monkeypatch, "sweep=s", "engine.max_num_seqs=4", "workload.num_requests=1,2,3") == 0  # two of them are done
    output, progress = capfd.readouterr()
    assert last_line(output)["ok"] == 5 and len(starts(folder)) == 5
    assert "runs/sweeps/s holds 2 jobs of other settings, 1 added; give another sweep=" in progress
    assert "2 of 3 jobs done before, skipped" in progress


def test_a_job_that_fails_fails_alone_and_is_the_only_one_that_runs_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "dies").write_text("4")
    assert sweep(monkeypatch, "sweep=s", *TWO) == 1
    result = last_line(capfd.readouterr().out)
    assert (result["ok"], result["failed"]) == (1, 1)
    (failure,) = result["failures"].values()
    assert "exit code 7" in failure
    table = pd.read_parquet(result["table"])
    assert list(table["status"]) == ["failed", "ok"] and list(table["engine.max_num_seqs"]) == [4, 5]
    assert "exit code 7" in (folder / "runs/sweeps/s" / f"{table['run'][0]}.log").read_text()

    (folder / "dies").unlink()
    before = starts(folder)
    assert sweep(monkeypatch, "sweep=s", *TWO) == 0
    assert len(starts(folder)) == len(before) + 1
    assert list(sweep_table("runs/sweeps/s")["status"]) == ["ok", "ok"]


def test_a_job_that_hangs_is_ended_with_all_that_it_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "hangs").write_text("1")
    assert sweep(monkeypatch, "sweep=s", "hydra.launcher.timeout_s=4") == 1
    (failure,) = last_line(capfd.readouterr().out)["failures"].values()
    assert failure.startswith("took longer than 4 s")
    wait_for(lambda: all(is_gone(int(pid)) for pid in starts(folder)))


def test_a_comparison_has_a_row_for_each_engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    engines = "engines=[history,{name:history,max_num_seqs:4}]"
    assert sweep(monkeypatch, "sweep=s", engines, "correctness.num_requests=0", "seed=1", main=compare.main) == 0
    table = pd.read_parquet(last_line(capfd.readouterr().out)["table"])
    assert table["engine"][0] == "history" and table["engine"].nunique() == len(table) == 2
    assert set(table["seed"]) == {1} and table["job"].nunique() == 1


@pytest.mark.accept
def test_the_command_that_a_report_gives_runs_the_sweep_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sweep(monkeypatch, "sweep=s", "hydra.launcher.timeout_s=500", *TWO) == 0
    report = Path(last_line(capfd.readouterr().out)["report"]).with_suffix(".md").read_text()
    words = shlex.split(report.rstrip().splitlines()[-1])
    assert words[:4] == ["python", "-m", "experiments.bench", "--config-dir"] and "hydra.launcher.timeout_s=500" in words
    again = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=True)
    result = last_line(again.stdout)
    assert result["ok"] == 2 and result["sweep"] != "runs/sweeps/s" and len(starts(folder)) == 4


def test_results_of_other_code_are_not_taken_for_those_of_this_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sweep(monkeypatch, "sweep=s", *TWO) == 0
    (changed,) = Path("runs/sweeps/s/jobs").glob("001-*/environment.json")
    by_other = json.loads(changed.read_text()) | {"code": "0ther"}
    changed.write_text(json.dumps(by_other))
    name = changed.parent.name
    capfd.readouterr()

    assert sweep(monkeypatch, "sweep=s", "hydra.launcher.keep_other_code=true", *TWO) == 0
    output, progress = capfd.readouterr()
    assert len(starts(folder)) == 2 and "1 of 2 jobs done before by other code" in progress and "kept because" in progress
    assert "Different code computed the jobs" in output and "1 by code 0ther" in output

    assert sweep(monkeypatch, "sweep=s", *TWO) == 0
    output, progress = capfd.readouterr()
    assert len(starts(folder)) == 3 and last_line(output)["ok"] == last_line(output)["jobs"] == 2
    assert "1 of 2 jobs done before by other code" in progress and "they run again" in progress
    assert "1 of 2 jobs done before, skipped" in progress and "Different code" not in output
    assert json.loads(changed.read_text())["code"] == sweep_table("runs/sweeps/s")["code"][0]
    assert json.loads((Path("runs/sweeps/s/other_code") / f"{name}-0ther" / "environment.json").read_text()) == by_other


# Killed.


@pytest.mark.accept
def test_a_sweep_that_is_killed_goes_on_where_it_was(folder: Path) -> None:
    (folder / "hangs").write_text("2")
    killed = launch("sweep=killed", *TWO)
    wait_for(lambda: len(starts(folder)) == 2)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    (folder / "hangs").unlink()
    done = next(Path("runs/sweeps/killed/jobs").glob("000-*/results.json")).read_bytes()
    assert list(sweep_table("runs/sweeps/killed")["status"]) == ["ok", "waiting"]

    again = launch("sweep=killed", *TWO)
    output, errors = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0, errors
    assert last_line(output)["ok"] == 2
    assert len(starts(folder)) == 3  # the first job once, the second twice
    assert next(Path("runs/sweeps/killed/jobs").glob("000-*/results.json")).read_bytes() == done
    assert not list(folder.rglob("*.partial"))
    wait_for(lambda: all(is_gone(int(pid)) for pid in starts(folder)))

    unbroken = launch("sweep=unbroken", *TWO)
    unbroken.communicate(timeout=PATIENCE_S)
    assert what_was_asked("killed") == what_was_asked("unbroken")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_who_ends_a_sweep_ends_the_running_job_and_is_told_how_to_go_on(folder: Path, how: signal.Signals) -> None:
    (folder / "hangs").write_text("1")
    launcher = launch("sweep=s", *TWO)
    wait_for(lambda: len(starts(folder)) == 1)
    launcher.send_signal(how)
    _, errors = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 128 + how
    assert "0 of 2 jobs are done" in errors and "sweep=s" in errors and "Traceback" not in errors
    assert "python -m experiments.sweep runs/sweeps/s\n" in errors and sys.executable not in errors
    (again,) = (shlex.split(line) for line in errors.splitlines() if line.startswith("  python -m experiments.bench"))
    assert again[3] == "--config-dir" and again[5:8] == ["-m", "engine=history", OVERRIDES[0]]
    assert again[-2:] == ["sweep=s", *TWO]
    wait_for(lambda: is_gone(int(starts(folder)[0])))


@pytest.mark.accept
def test_killed_at_any_moment_no_job_is_lost_or_done_twice(folder: Path) -> None:
    axes = (*TWO, "workload.num_requests=1,2,3")
    rng = random.Random(0)
    seen: dict[str, bytes] = {}
    for _ in range(25):
        launcher = launch("sweep=killed", *axes)
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(rng.uniform(0.5, 12))
        if rng.random() < 0.3:
            with contextlib.suppress(psutil.NoSuchProcess):
                for job in psutil.Process(launcher.pid).children():
                    job.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(rng.uniform(0.1, 3))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.communicate()
        if Path("runs/sweeps/killed/jobs.json").exists():
            table = sweep_table("runs/sweeps/killed")  # whatever is there can be read
            for run in table[table["status"] == "ok"]["run"]:
                result = (Path("runs/sweeps/killed") / run / "results.json").read_bytes()
                assert seen.setdefault(run, result) == result
    launcher = launch("sweep=killed", *axes)
    output, errors = launcher.communicate(timeout=600)
    assert launcher.returncode == 0, errors
    assert last_line(output)["ok"] == 6
    assert not list(folder.rglob("*.partial"))
    launch("sweep=unbroken", *axes).communicate(timeout=600)
    assert what_was_asked("killed") == what_was_asked("unbroken")


# Refused before anything runs.


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("workload.num_reqests=1,2",), "Did you mean 'num_requests'?"),
        (("model=tiny-llama,tiny-lama",), "Did you mean 'tiny-llama'?"),
        (("workload.num_requests=2,0",), "an integer ≥ 1, got 0. (Of the job workload.num_requests=0. No job was run.)"),
        (("workload.prompt_len=4,400", "workload.output_len=200"), "engine history serves 512"),
        (("engine.dtype=float32,float8",), "dtype"),
        (("seed=3,3",), "same run"),
        (("seed=interval(1,2)",), "A sweep needs values to choose from"),
        (("seed=1,2", "hydra.launcher.timeout_s=0"), "a number of seconds > 0"),
        (("seed=1,2", "hydra.launcher.timeout_s=true"), "a number of seconds > 0"),
        (("seed=1,2", "sweep=../x"), "sweep must be the name of a folder"),
        (("seed=1,2", "sweep=a/b"), "got 'a/b'"),
        (("seed=1,2", "sweep=/x"), "got '/x'"),
        (("seed=1,2", "sweep=.."), "got '..'"),
        (("seed=1,2", "sweep="), "got ''"),
        (("seed=1,2", "sweep=null"), "got None"),
        (("+sede=1,2",), "Did you mean 'seed'?"),
        (("parallel.tensor=1,3",), "tensor_parallel_size=3 does not divide the 128 features"),
    ],
)
def test_what_is_wrong_with_any_job_is_said_before_the_first_runs(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    overrides: tuple[str, ...],
    said: str,
) -> None:
    assert sweep(monkeypatch, *overrides) == 2
    assert said in capfd.readouterr().err
    assert not (folder / "runs").exists() and not starts(folder)


def test_two_launchers_do_not_work_on_one_sweep(tmp_path: Path) -> None:
    with only_launcher(tmp_path), pytest.raises(ConfigError, match=f"run by process {os.getpid()}"), only_launcher(tmp_path):
        pass
    with only_launcher(tmp_path):
        pass


# The parts.


def test_every_combination_is_a_job_the_last_option_changing_fastest() -> None:
    overrides = OverridesParser.create().parse_overrides(["a=1,2", "b=x", "c='p q',[1,2]"])
    assert combinations(overrides) == [
        ["a=1", "b=x", "c='p q'"],
        ["a=1", "b=x", "c=[1,2]"],
        ["a=2", "b=x", "c='p q'"],
        ["a=2", "b=x", "c=[1,2]"],
    ]


def test_a_sweep_says_what_its_folder_holds_already(tmp_path: Path) -> None:
    one, two, three = (Job(number=number, digest=digest, overrides=()) for number, digest in enumerate("abc"))
    assert found_there(tmp_path, [], [one, two]) == found_there(tmp_path, [one, two], [one, two]) == []
    assert found_there(tmp_path, [one], [one, two]) == []  # more of the same
    assert found_there(tmp_path, [one, two], [one]) == []
    (mixed,) = found_there(tmp_path, [one], [two, three])
    assert mixed.startswith(f"{tmp_path} holds 1 job of other settings, 2 added;") and "sweep=" in mixed
    (tmp_path / "jobs" / one.name).mkdir(parents=True)
    (tmp_path / "jobs" / one.name / "results.json").write_text("{}")
    assert found_there(tmp_path, [one, two], [one, two]) == ["1 of 2 jobs done before, skipped."]


def test_a_sweeps_figures_are_headed_as_those_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    table = pd.DataFrame([{"job": 0, "engine": "jax", "status": "ok", "output_throughput": 5.0, "median_ttft_ms": 2.0}])
    table.attrs["swept"] = []
    print_sweep("s", table)
    printed = " ".join(capsys.readouterr().out.replace("┃", " ").split())
    assert "output TTFT" in printed and "tokens/s median, ms" in printed  # of two lines


def test_a_sweep_brackets_a_percentile_of_too_few_samples_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"job": 0, "engine": "jax", "status": "ok", "p99_e2el_ms": 38.2, "unsupported": None}
    for few, shown in ((None, "38.20"), ("p99_ttft_ms", "38.20"), ("p99_ttft_ms; p99_e2el_ms", "(38.20)")):
        table = pd.DataFrame([row | {"unsupported": few}])
        table.attrs["swept"] = []
        print_sweep("s", table)
        printed = capsys.readouterr().out
        assert f" {shown} " in printed and ("in brackets: percentiles of too few samples" in printed) == ("(" in shown)


def test_a_sweep_tells_which_rows_are_contaminated_and_which_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    fine = {"job": 0, "engine": "jax", "status": "ok", "contaminated": None, "unsure": None}
    spoilt, doubtful = {"engine": "torch", "contaminated": "2 requests failed; too hot"}, {"job": 1, "unsure": "too short"}
    table = pd.DataFrame([fine, fine | spoilt, fine | doubtful])
    table.attrs["swept"] = []
    print_sweep("s", table)
    out = capsys.readouterr().out
    assert out.count("ok, contaminated") == 1
    told = [line for line in out.splitlines() if " of job " in line]
    assert told == ["contaminated torch of job 0: 2 requests failed; too hot.", "jax of job 1: too short."]


def test_a_digest_tells_what_is_run_and_not_where() -> None:
    with hydra.initialize_config_module("configs", version_base="1.3"):
        compose = lambda *overrides: digest(hydra.compose("bench", [*OVERRIDES, *overrides]))  # noqa: E731
        assert compose() == compose("runs=elsewhere", "sweep=other") == compose("seed=0")
        different = [compose(), compose("seed=1"), compose("engine=torch"), compose("workload.num_requests=7")]
    assert all(a != b for a, b in itertools.combinations(different, 2))


def test_a_known_job_keeps_its_number_and_its_failure() -> None:
    known = [Job(number=0, digest="a", overrides=("x",)), Job(number=4, digest="b", overrides=(), failure={"kind": "k"})]
    jobs = merged(known, [("b", ("y",)), ("c", ())])
    assert [(job.number, job.digest) for job in jobs] == [(0, "a"), (4, "b"), (5, "c")]
    assert jobs[1].failure == {"kind": "k"} and jobs[1].overrides == ("y",)


def test_the_list_survives_the_trip_and_what_is_no_list_is_refused(tmp_path: Path) -> None:
    jobs = [Job(number=0, digest="a", overrides=("x=1",), seconds=2.5, failure={"kind": "k", "message": "m", "log": "l"})]
    write_jobs(tmp_path, jobs)
    assert read_jobs(tmp_path) == jobs
    (tmp_path / "jobs.json").write_text('{"jobs": [')
    with pytest.raises(ConfigError, match="is not the list"):
        read_jobs(tmp_path)


def test_a_job_is_done_if_its_run_is_whole_and_nothing_failed(tmp_path: Path) -> None:
    job = Job(number=0, digest="a", overrides=())
    directory = tmp_path / "jobs" / job.name
    assert not is_done(tmp_path, job)
    with run_directory(tmp_path, "unused", directory) as partial:
        (partial / "results.json").write_text("{}")
        assert not is_done(tmp_path, job)
    assert is_done(tmp_path, job)
    assert not is_done(tmp_path, Job(number=0, digest="a", overrides=(), failure={"kind": "exit code 1"}))
    assert is_done(tmp_path, Job(number=0, digest="a", overrides=(), failure={"kind": "exit code 3", "final": True}))
    (directory / "results.json").write_text('{"failures": {"torch": {"kind": "died"}}}')
    assert not is_done(tmp_path, job)


@pytest.mark.parametrize(
    ("code", "ended"),
    [("print('out'); import sys; sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9), ("print('out')", 0)],
)
def test_how_a_process_ended_is_told(tmp_path: Path, code: str, ended: int) -> None:
    assert run_process([sys.executable, "-c", code], tmp_path / "log", None, lambda: None) == ended
    assert (tmp_path / "log").read_text() == ("out\n" if ended >= 0 else "")


def test_what_a_process_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    child = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1e5)']).pid)"
    assert run_process([sys.executable, "-c", child], tmp_path / "log", None, lambda: None) == 0
    wait_for(lambda: is_gone(int((tmp_path / "log").read_text())))


def test_a_failure_names_its_cause_and_quotes_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("\n".join(map(str, range(100))))
    assert describe(-9, None, tmp_path / "log")["kind"] == "killed by SIGKILL"
    assert describe(None, 1.5, tmp_path / "log")["kind"] == "took longer than 1.5 s"
    assert describe(2, None, tmp_path / "log")["message"].split("\n") == [str(number) for number in range(85, 100)]


@pytest.mark.parametrize(
    "path", ["runs/a", "a\\b", "ends\\", "it\\'s", "it's here, (really) = [1]", 'a "b" #c', "ü ${x}".replace("${x}", "x")]
)
def test_any_path_survives_hydras_grammar(path: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"hydra.sweep.dir={quoted(path)}"])
    assert override.value() == path


def test_jobs_are_named_by_what_tells_them_apart() -> None:
    assert told_apart([("a=1", "b=1"), ("a=1", "b=2")]) == ["b=1", "b=2"]
    assert told_apart([("a=1", "b=1")]) == ["a=1 b=1"]
    assert told_apart([()]) == ["as configured"]


@pytest.mark.parametrize(("seconds", "said"), [(40.2, "40 s"), (720, "12 min"), (12600, "3.5 h")])
def test_time_is_said_as_people_say_it(seconds: float, said: str) -> None:
    assert duration(seconds) == said
