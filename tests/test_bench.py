"""The isolated process, the run directory and `experiments.bench` as a whole."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from common.config import EngineConfig
from common.errors import CheckpointError, ConfigError, RequestError
from common.request import Request, SamplingParams
from common.system.hardware import thread_settings
from common.weights import zoo
from common.weights.checkpoint import open_checkpoint
from experiments import bench, compare, diverge
from experiments.cli.launch import FLAGS, overrides_first, torn
from experiments.display.formatting import number
from experiments.engines.process import EngineFailure, IsolatedEngine
from experiments.engines.spec import EngineSpec
from experiments.load.workload import WorkloadConfig, draw
from experiments.runs.directory import environment, run_directory
from tests.history_backend import ROOT, VOCABULARY, command, history, last_line
from tests.history_runner import expected

__all__ = ["history"]


# The console.


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (float("-inf"), "–"),
        (0, "0"),
        (0.0, "0"),
        (1234567, "1,234,567"),
        (12345.6, "12,346"),
        (1.5, "1.500"),
        (0.00123456, "0.001235"),
    ],
)
def test_numbers_are_printed_with_four_digits(value: float | None, text: str) -> None:
    assert number(value) == text


# The process.


@pytest.fixture
def isolated(history: Path) -> Iterator[IsolatedEngine]:
    spec = EngineSpec(label="history", name="history", config=EngineConfig(max_model_len=512, seed=5))
    with IsolatedEngine(spec, history / "log", 600.0) as engine:
        yield engine


def tiny() -> Path:
    return zoo.resolve("tiny-llama")


def test_an_isolated_engine_gives_the_tokens_of_the_oracle_and_starts_each_window_cold(isolated: IsolatedEngine) -> None:
    loaded = isolated.load(tiny())
    assert loaded["caps"]["backend"] == "history" and loaded["load_s"] >= 0 and loaded["warmup_s"] >= 0
    wanted = WorkloadConfig(name="w", num_requests=5, prompt_len=40, output_len=12)
    workload = draw(wanted, 0, VOCABULARY)
    first, second = isolated.run(workload), isolated.run(workload)
    for item, a, b in zip(workload.items, first.rows, second.rows, strict=True):
        params = SamplingParams(temperature=0.0, max_tokens=item.output_len, ignore_eos=True)
        request = Request(request_id="0", prompt_token_ids=item.prompt, params=params)
        oracle = expected(request, vocab_size=VOCABULARY, max_tokens=item.output_len)
        assert a.tokens == b.tokens == tuple(oracle.tokens)
    assert second.stats["prefix_cache_hits"] == 0
    assert isolated.peak_rss_mib() > 10


def test_the_childs_environment_settles_its_threads(isolated: IsolatedEngine) -> None:
    assert {"OMP_NUM_THREADS": "3", "PJRT_NPROC": "3"}.items() <= thread_settings(3).items()
    isolated.load(tiny())  # before the child runs, the kernel may still show the environment of this process
    settings = psutil.Process(isolated._process.pid).environ()
    assert settings["OMP_NUM_THREADS"] == settings["PJRT_NPROC"] == settings["MKL_NUM_THREADS"]


def test_what_a_library_prints_goes_to_the_log(isolated: IsolatedEngine, history: Path) -> None:
    isolated.load(tiny())
    isolated.run(draw(WorkloadConfig(name="w", num_requests=1, prompt_len=4, output_len=2), 0, 320))
    isolated.close()
    assert "a library that prints" in (history / "log").read_text()


def test_errors_come_back_with_their_type(isolated: IsolatedEngine, history: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        isolated.load(history / "nowhere")
    isolated.load(tiny())  # it lives on
    with pytest.raises(RequestError, match="token"):
        isolated.run(draw(WorkloadConfig(name="w", num_requests=1, prompt_len=4, output_len=2), 0, 100_000, range(320)))


def test_a_child_that_dies_is_noticed_at_once_with_its_log(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTORY_DIES", "1")
    spec = EngineSpec(label="frail", name="history", config=EngineConfig(max_model_len=512))
    with IsolatedEngine(spec, history / "log", 600.0) as engine:
        engine.load(tiny())
        with pytest.raises(EngineFailure, match=r"'frail' ended with exit code 7 during 'run'"):
            engine.run(draw(WorkloadConfig(name="w", num_requests=1, prompt_len=4, output_len=2), 0, 320))
        with pytest.raises(EngineFailure, match="frail"):
            engine.load(tiny())


def test_a_child_that_is_killed_is_named_with_its_signal(isolated: IsolatedEngine) -> None:
    isolated.load(tiny())
    isolated._process.send_signal(signal.SIGKILL)
    with pytest.raises(EngineFailure, match="SIGKILL"):
        isolated.peak_rss_mib()


def test_an_idle_child_does_not_compute(isolated: IsolatedEngine) -> None:
    isolated.load(tiny())
    process = psutil.Process(isolated._process.pid)
    before = process.cpu_times()
    time.sleep(0.3)
    after = process.cpu_times()
    assert after.user + after.system - before.user - before.system <= 0.02  # two ticks of the clock that counts it


def test_a_child_ends_with_its_parent_even_while_it_computes(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTORY_SLEEPS", "1")
    script = """
import sys
from pathlib import Path
from common.config import EngineConfig
from common.weights import zoo
from common.weights.checkpoint import open_checkpoint
from experiments.engines.spec import EngineSpec
from experiments.engines.process import IsolatedEngine
from experiments.load.workload import WorkloadConfig, draw
engine = IsolatedEngine(EngineSpec(label="e", name="history", config=EngineConfig(max_model_len=512)), Path("log"), 600.0)
engine.load(zoo.resolve("tiny-llama"))
print(engine._process.pid, flush=True)
engine.run(draw(WorkloadConfig(name="w", num_requests=1, prompt_len=4, output_len=2), 0, 320))
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    child.wait(timeout=10)
    assert not child.is_running()


# The run directory.


def test_a_run_has_its_name_only_when_it_is_finished(tmp_path: Path) -> None:
    with run_directory(tmp_path / "runs", "what") as directory:
        assert directory.name.endswith("-what.partial")
        (directory / "results.json").write_text("{}")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [directory.name.removesuffix(".partial")]


def test_a_users_mistake_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError), run_directory(tmp_path / "runs", "what"):
        raise ConfigError("no")
    assert list(tmp_path.iterdir()) == []


def test_a_crash_leaves_its_evidence_unfinished(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), run_directory(tmp_path, "what") as directory:
        (directory / "jax.log").write_text("why")
        raise RuntimeError
    assert (directory / "jax.log").exists() and directory.name.endswith(".partial")


def test_two_runs_in_one_second_have_two_names(tmp_path: Path) -> None:
    with run_directory(tmp_path, "what") as one, run_directory(tmp_path, "what") as two:
        assert one != two
    with run_directory(tmp_path, "what") as three:
        pass
    assert len(list(tmp_path.iterdir())) == 3, three


def test_a_place_that_cannot_be_written_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / ("a" * 300)):
        with pytest.raises(ConfigError, match="cannot be made"), run_directory(root, "what"):
            pass


def test_the_environment_names_machine_and_versions() -> None:
    facts = json.loads(json.dumps(environment()))
    assert facts["cores"] >= 1 and facts["cpu"] and facts["versions"]["numpy"] == np.__version__


# The command.

SMALL = (
    "engine=history",
    "model=tiny-llama",
    "dtype=float32",
    "workload=fixed",
    "workload.num_requests=3",
    "workload.output_len=5",
    "measure.limits_s=0",
)


def test_bench_prints_one_json_line_and_keeps_the_run(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, bench.main, *SMALL, "measure.blocks=2")
    result = last_line(capsys.readouterr().out)
    assert result["engine"] == "history" and result["workload"] == "fixed" and len(result["workload_hash"]) == 32
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (6, 0, 30)
    for key in ("load_s", "warmup_s", "compilations_in_window", "num_preemptions", "host_ms_per_step"):
        assert isinstance(result[key], (int, float)), key
    directory = Path(result["run"])
    assert json.loads((directory / "results.json").read_text()) == result
    rows = [json.loads(line) for line in (directory / "requests.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and {row["block"] for row in rows} == {0, 1}
    assert "name: history" in (directory / "config.yaml").read_text()
    assert (directory / "environment.json").exists() and not list(directory.parent.glob("*.partial"))


def test_bench_reports_memory_and_what_it_is_needed_for(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, bench.main, *SMALL, "engine.num_blocks=100", "table=all")
    out = capsys.readouterr().out
    result = last_line(out)
    assert 10 < result["rss_mib"] <= result["peak_load_mib"] <= result["peak_rss_mib"]
    assert result["kv_pool_mib"] == 100 * 16 * 16 / 2**20  # 16 bytes for each of a page's 16 tokens
    weights = sum(np.prod(entry.shape) for entry in open_checkpoint(tiny()).entries.values())
    assert result["weights_mib"] == weights * 4 / 2**20
    assert result["rank_mib"] == result["weights_mib"] + result["kv_pool_mib"]
    for name in (
        "weights, MiB",
        "KV pages, MiB",
        "weights and pages of a rank, MiB",
        "memory after warm-up, MiB",
        "peak memory until then, MiB",
    ):
        assert name in out


def test_bench_takes_a_path_for_a_model(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, bench.main, *SMALL, f"model={tiny()}")
    assert last_line(capsys.readouterr().out)["model"] == str(tiny())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("workload=raged", "Did you mean 'ragged'?"),
        ("wrokload=ragged", "Did you mean 'workload'?"),
        ("engine=histroy", "Did you mean 'history'?"),
        ("engine.max_num_sqs=3", "Did you mean 'max_num_seqs'?"),
        ("workload.num_reqests=3", "Did you mean 'num_requests'?"),
        ("experiment=smok", "Did you mean 'smoke'?"),
        ("dtype=bflot16", "Did you mean 'bfloat16'?"),
        ("model=tiny-lama", "Did you mean 'tiny-llama'?"),
        ("model=/nowhere/at/all", "/nowhere/at/all"),
        ("model=/nowhere=b", "/nowhere=b"),
        ("engine=base", "Unknown engine 'base'"),
        ("engine=3", "engine must be one of hf, jax"),
        ("engine=null", "got engine=null"),
        ("measure=null", "measure must be one of default, kernels, quick; got measure=null"),
        ("workload=null", "got workload=null"),
        ("engine.name=../x", "engine.name must be the name of an engine"),
        ("workload.num_requests=100000000", "at most 1000000"),
        (f"model={'a' * 300}", "File name too long"),
        ("seed=-1", "seed"),
        ("seed=[", "override"),
        ("threads=0", "threads"),
        ("kernels=nativ", "native"),
        ("measure.blocks=0", "measure.blocks must be an integer ≥ 1"),
        ("measure.budget_s=soon", "measure.budget_s"),
        ("measure.limits_s=soon", "measure.limits_s"),
        ("measure.limits_s=.inf", "measure.limits_s"),
        ("workload.num_requests=0", "workload.num_requests"),
        ("workload.prompt_len=600", "serves 512"),
        ("engine.block_size=3", "power of two"),
        ("engine.num_blocks=2", "page"),
        ("engine.num_blocks=1000000000000", "bytes of free memory"),
        ("+measure.blcks=1", "Did you mean 'blocks'?"),
        ("+sede=1", "Did you mean 'seed'?"),
        ("++model.nme=1", "Did you mean 'name'?"),
        ("+foo.bar.baz=1", "Unknown option 'foo'"),
        ("+engine.foo.bar=1", "Unknown engine option 'foo'"),
        ("+workload.trace.x=1", "workload.trace.x"),
        ("+engines=[jax,torch]", "Did you mean 'engine'?"),
        ("~measure.blocks", "measure lacks blocks"),
        ("~workload.num_requests", "workload lacks num_requests"),
        ("workload.prompt_len={mu:much,sigma:1,low:1,high:2}", "mu must be a finite number"),
        ("workload.name=a/b", "workload.name must be letters"),
        ("runs=null", "runs must be the path of a folder"),
        ("engines=[jax,torch]", "Did you mean 'engine'?"),
        ("max_num_seqs=8", "Did you mean engine.max_num_seqs?"),
        ("~workload", "~workload would take away an option, and a run needs each. Set it instead: workload=…"),
        ("~report", "Set it instead: report=…"),
        ("~workload=fixed", "Set it instead: workload=…"),
        ("engine=jax,torch", "for a list, write engine=[jax,torch]; for a run of each, add -m"),
    ],
)
def test_a_mistake_is_told_in_one_message_with_exit_code_2_and_no_run_directory(
    override: str, said: str, history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, bench.main, "engine=history", "model=tiny-llama", "workload=fixed", override)
    assert exit.value.code == 2
    out, err = capfd.readouterr()
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and said in told[0]
    assert out == "" and "Traceback" not in err
    assert not (history / "runs").exists() and not (history / "multirun").exists()


def test_a_value_that_a_shell_tore_at_its_spaces_is_shown_whole() -> None:
    assert torn(["dtype=float32", "engines=[{name:", "torch},", "jax]", "seed=1"]) == "engines=[{name: torch}, jax]"
    assert torn(["--config-dir", "a]", "engines=[jax, torch]", "seed=[", "threads=1"]) is None


def test_a_torn_value_is_refused_with_how_to_write_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for main, run in ((compare.main, []), (diverge.main, ["runs/one"])):
        monkeypatch.setattr(sys, "argv", ["command", *run, "engines=[jax,", "torch]"])
        with pytest.raises(SystemExit) as exit:
            main()
        assert exit.value.code == 2
        assert capfd.readouterr().err == "error: No spaces inside […], or quote the word: 'engines=[jax, torch]'\n"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["a=1", "-m", "b=1,2"], ["a=1", "b=1,2", "-m"]),
        (["--cfg", "job", "a=1"], ["a=1", "--cfg", "job"]),
        (["--config-dir=x", "a=1", "-cn", "y", "~b.c"], ["a=1", "~b.c", "--config-dir=x", "-cn", "y"]),
        ([], []),
    ],
)
def test_flags_may_stand_among_the_overrides(words: list[str], meant: list[str]) -> None:
    assert overrides_first(words) == meant


def test_what_no_engine_is_is_not_named_as_one(
    history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for main, word in ((bench.main, "engine=histroy"), (compare.main, "engines=[histroy]")):
        with pytest.raises(SystemExit):
            command(monkeypatch, main, word)
        err = capfd.readouterr().err
        assert "history" in err and "jax" in err and "engine_base" not in err


def test_help_ends_without_a_traceback_when_its_reader_leaves() -> None:
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "experiments.bench", "--help"]
    ended = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, b"")  # 128 + SIGPIPE


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("full", "told"),
    [
        ("stdout", "error: Standard output cannot be written: No space left on device.\n"),
        ("stderr", "error: Standard error cannot be written: No space left on device.\n"),
    ],
)
def test_a_stream_that_takes_no_more_ends_a_run_with_one_line_on_the_other(
    full: str, told: str, unbuffered: str, history: Path
) -> None:
    words = [sys.executable, "-m", "experiments.bench", "--config-dir", "configs", *SMALL, "measure.blocks=1", "report=false"]
    with open("/dev/full", "w") as nowhere:
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {full: nowhere}
        ended = subprocess.run(words, **streams, env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, text=True, check=False)
    said = ended.stdout or ended.stderr
    assert ended.returncode == 1 and said.endswith(told) and said.count("rror") == told.count("rror")  # and no traceback


def test_where_no_stream_takes_anything_the_exit_code_tells() -> None:
    with open("/dev/full", "w") as nowhere:
        words = [sys.executable, "-m", "experiments.bench", "--help"]
        assert subprocess.run(words, stdout=nowhere, stderr=nowhere, check=False).returncode == 1
        words = [sys.executable, "-m", "experiments.bench", "engine=nobodys"]
        assert subprocess.run(words, stdout=nowhere, stderr=nowhere, check=False).returncode == 2


def test_a_mistake_is_told_where_standard_error_takes_nothing() -> None:
    with open("/dev/full", "w") as nowhere:
        words = [sys.executable, "-m", "experiments.bench", "engine=jaxx"]
        ended = subprocess.run(words, stdout=subprocess.PIPE, stderr=nowhere, text=True, check=False)
    assert ended.returncode == 2 and ended.stdout.startswith("error: Unknown engine 'jaxx'")


def test_an_engine_that_dies_ends_the_command_with_1_and_its_failure_in_the_results(
    history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HISTORY_DIES", "1")
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, bench.main, *SMALL)
    assert exit.value.code == 1
    out, err = capfd.readouterr()
    assert "ended with exit code 7" in err
    result = last_line(out)
    assert result["failures"]["history"]["kind"] == "died" and "output_throughput" not in result
    assert json.loads((Path(result["run"]) / "results.json").read_text()) == result


def test_the_shell_can_complete_what_is_typed(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", "command engine=")
    completed = output_of(bench.main, ["-sc", "query=bash"], monkeypatch, capsys)
    assert {"engine=jax", "engine=torch", "engine=hf"} <= set(completed.split())


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("experiments.bench engine=", {"hf", "jax", "torch"}),  # behind a sign at which bash breaks words
        ("experiments.bench engine=jax wor", {"workload.", "workload="}),
        ("experiments.compare measure.bl", {"measure.blocks="}),
        ("experiments.compare", set()),
        ("pytest wor", set()),
    ],
)
def test_the_shell_can_complete_what_is_typed_after_python_m(typed: str, offered: set[str]) -> None:
    line = f"{sys.executable} -m {typed}"
    script = 'source experiments/cli/completion.bash; _tandem_options "$0"; printf "%s\\n" "${COMPREPLY[@]}"'
    ask = os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = subprocess.run(
        ["bash", "--norc", "-c", script, sys.executable], cwd=ROOT, env=ask, capture_output=True, text=True, check=True
    )
    words = set(done.stdout.split())
    assert words >= offered and bool(words) == bool(offered), done.stderr


def output_of(
    main: Callable[[], None], words: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What a command prints that ends well, be it by itself or, as after --help, by Hydra."""
    monkeypatch.setattr(sys, "argv", ["command", *words])
    try:
        main()
    except SystemExit as end:
        assert not end.code
    return capsys.readouterr().out


@pytest.mark.parametrize("main", [bench.main, compare.main, diverge.main])
def test_help_names_every_option_and_the_shell_can_complete_each(
    main: Callable[[], None], history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = lambda *words: output_of(main, words, monkeypatch, capsys)  # noqa: E731
    listed = re.findall(r"^(\w+):", printed("--cfg", "job"), re.MULTILINE)
    shown = printed("--help")
    monkeypatch.setenv("COMP_LINE", "command ")
    completed = {word.strip("=.") for word in printed("-sc", "query=bash").split()}
    assert len(listed) >= 5 and completed >= set(listed)
    assert all(f"\n{name}:" in shown for name in listed) and max(map(len, shown.splitlines())) <= 150
    assert "complete" in printed("-sc", "install=bash")


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "engine=jax,torch", "--help"],
        ["--hel", "workload=raged"],
        ["-h", "--modle=x", "engine=torch"],
        ["--help", "engines=[jax,", "torch]"],
        ["--version", "--help", "seed=["],
    ],
)
def test_help_is_given_whatever_stands_beside_it(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = output_of(bench.main, words, monkeypatch, capsys)
    assert shown.startswith("Time one engine") and "name: ragged" in shown and "name: jax" in shown


def test_help_shows_the_options_as_they_are_set_beside_it_and_what_each_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--help", "workload=single", "engine=openai_http", "model=/a=b"]
    lines = [" ".join(line.split()) for line in output_of(bench.main, words, monkeypatch, capsys).splitlines()]
    assert {"name: single", "name: /a=b"} <= set(lines)
    assert "prefix_len: 0 # tokens at the start of each prompt that all of a group share" in lines
    assert "block_size: 16 # tokens a page" in lines and "served_model: null # null: the first that it offers" in lines
    assert lines[lines.index("fail_if: []") - 1].startswith("# 'fail_if=[")
    beside = next(number for number, line in enumerate(lines) if line.startswith("limits_s:"))
    assert lines[beside + 1].startswith("# Beside each window")


def test_help_on_several_engines_tells_what_each_can_be_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [" ".join(line.split()) for line in output_of(compare.main, ["--help"], monkeypatch, capsys).splitlines()]
    told = lines[lines.index("== Options of each engine ==") :]
    for option in fields(EngineConfig):
        assert any(line.startswith(f"{option.name}: ") for line in told), option.name
    assert "block_size: 16 # tokens a page" in told and any("{name:torch,max_num_seqs:8}" in line for line in told)


def test_the_flags_that_are_known_are_those_of_hydra() -> None:
    """In a process of its own: for this flag Hydra sets up logging anew, and closes what handlers of others wrote to."""
    command = [sys.executable, "-m", "experiments.bench", "--hydra-help"]
    printed = subprocess.run(command, env=os.environ, check=True, capture_output=True, text=True).stdout
    assert set(re.findall(r"^(--[a-z-]+)", printed, re.MULTILINE)) == set(FLAGS)


def test_the_command_needs_no_framework(history: Path) -> None:
    script = (
        "import sys, experiments.bench, experiments.compare; sys.exit(bool({'jax', 'torch', 'transformers'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", script], env=os.environ, check=False).returncode == 0
