"""What surrounds the windows of a run."""

import re
from pathlib import Path

import pytest

from common.config import EngineConfig
from common.errors import BackendError, ConfigError
from experiments import bench, compare
from experiments.engines.spec import EngineSpec
from experiments.load.workload import WorkloadConfig, draw
from experiments.measure.session import PROBED, expect_fits, sparing, whole_rank_mib
from experiments.roofline.limits import READ, Limits
from experiments.runs.records import read_rows
from tests.backends import checkpoint
from tests.history_backend import command, history, last_line, written

__all__ = ["history"]
SHORT = (
    *("model=tiny-llama", "workload=fixed", "workload.num_requests=3", "workload.output_len=5"),
    *("measure=quick", "measure.warmup_requests=0", "correctness.num_requests=0"),
)
LIMITS = Limits(
    ways={READ: {"way": 1e11}, "float32": {"way": 1e12}, "bfloat16": {"way": 1e12}}, threads=1, cache_bytes=0, buffer_bytes=0
)


def test_the_bandwidth_is_probed_beside_every_long_window_and_beside_short_ones_for_a_share_of_the_time() -> None:
    now, probes = 0.0, 0

    def probe() -> float:
        nonlocal now, probes
        now, probes = now + 1.0, probes + 1
        return float(probes)

    spared = sparing(probe, lambda: now)
    assert spared() == 1.0
    for expected in (2.0, 3.0):
        now += 1 / PROBED
        assert spared() == expected
    answers: list[float] = []
    for _ in range(3 * int(1 / PROBED)):
        now += 1.0
        answers.append(spared())
    assert answers == sorted(answers) and answers[0] == 3.0 and answers[-1] == probes == 6.0


@pytest.mark.parametrize(("beyond", "raising"), [(0, True), (1, False)])
def test_a_request_that_is_too_long_is_met_with_advice_that_can_help(beyond: int, raising: bool) -> None:
    model = checkpoint("tiny-llama")
    longest = model.config.max_position + beyond
    asked = WorkloadConfig.of({"name": "long", "num_requests": 1, "prompt_len": longest - 1, "output_len": 1})
    workload = draw(asked, 0, model.config.vocab_size, frozenset())
    spec = EngineSpec(label="torch", name="torch", config=EngineConfig(max_model_len=128))
    with pytest.raises(ConfigError, match=f"request of {longest} tokens") as refused:
        expect_fits(workload, spec, model)
    assert bool(re.search("raise max_model_len, to", str(refused.value))) == raising
    assert "serves 128" in str(refused.value) and f"{model.config.max_position}" in str(refused.value)


def test_a_replica_holds_all_weights_and_its_part_of_the_pages() -> None:
    memory = {"weights_mib": 6.0, "kv_pool_mib": 3.0}  # the pages of all
    told = [whole_rank_mib(memory, EngineConfig(**options)) for options in ({}, {"data_parallel_size": 3})]
    assert told == [9.0, 7.0]
    assert whole_rank_mib(memory, EngineConfig(data_parallel_size=2, prefill_parallel_size=1)) == 7.0


def test_limits_that_can_be_measured_but_once_cost_a_run_their_shares_and_nothing_else(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[float] = []

    def measure_limits(seconds: float) -> Limits:
        asked.append(seconds)
        if len(asked) == 2:
            raise BackendError("The machine's limits could not be measured (exit code 1).")
        return LIMITS

    monkeypatch.setattr("experiments.measure.session.measure_limits", measure_limits)
    monkeypatch.setattr("experiments.measure.session.bandwidth_probe", lambda seconds: lambda: 1e11)
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, compare.main, *SHORT, "engines=[history,history]", "measure.limits_s=0.01")
    out, err = capsys.readouterr()
    result = last_line(out)
    assert exit.value.code == 1 and "could not be measured (exit code 1).\nAll else is there." in err
    assert result["failures"] == {} and result["unmeasured"] and written(result) == result
    for figures in result["engines"].values():
        assert figures["completed"] == 3 and figures["limits"] is None and figures["roofline"] is None


FRAIL = """
import os
from pathlib import Path
import historyinfer

class ModelRunner(historyinfer.ModelRunner):
    steps = 0

    def __init__(self, config):
        if Path("broken").exists():
            os._exit(7)
        super().__init__(config)

    def submit(self, batch, *more):
        self.steps += 1
        if self.steps > 8:
            Path("broken").touch()
            os._exit(7)
        return super().submit(batch, *more)
"""


@pytest.fixture
def frail(history: Path) -> Path:
    """Makes `engine=frail` known, which ends in its ninth step, or where it loads, if there is a file `broken`."""
    (history / "packages" / "frailinfer").mkdir()
    (history / "packages" / "frailinfer" / "__init__.py").write_text(FRAIL)
    (history / "configs" / "engine" / "frail.yaml").write_text("defaults: [history, _self_]\nname: frail\n")
    return history


@pytest.mark.parametrize("when", ["as it loads", pytest.param("in a window", marks=pytest.mark.accept)])
def test_an_engine_whose_replicas_are_lost_for_good_loses_its_own_row(
    when: str, frail: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if when == "as it loads":
        (frail / "broken").touch()
    words = [*SHORT, "engines=[history,{name:frail,data_parallel_size:2}]", "workload.concurrency=1", "measure.limits_s=0"]
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, compare.main, *words, "workload.num_requests=6")
    assert exit.value.code == 1
    result = last_line(capsys.readouterr().out)
    (failure,) = result["failures"].values()
    assert failure["kind"] == "died" and "replica of this engine" in failure["message"]
    assert set(result["engines"]) == {"history"} and result["engines"]["history"]["completed"] == 6


def test_what_goes_wrong_behind_the_windows_leaves_their_rows_and_the_logs(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise ConfigError("too late")

    monkeypatch.setattr("experiments.measure.session.Outcome.compared", refused)
    with pytest.raises(SystemExit):
        command(monkeypatch, bench.main, "engine=history", *SHORT[:-1], "measure.limits_s=0")
    (partial,) = (history / "runs").iterdir()
    assert partial.suffix == ".partial" and len(read_rows(partial)) == 3 and (partial / "history.log").exists()
    assert f"What was written so far is in runs/{partial.name}" in capsys.readouterr().err


def test_a_mistake_that_shows_as_an_engine_loads_leaves_nothing(
    frail: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = frail / "packages" / "frailinfer" / "__init__.py"
    mistaken = FRAIL.replace("os._exit(7)", "raise ConfigError('not so')", 1)
    source.write_text("from common.errors import ConfigError\n" + mistaken)
    (frail / "broken").touch()
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, compare.main, *SHORT, "engines=[history,frail]", "measure.limits_s=0")
    assert exit.value.code == 2 and "error: not so" in capsys.readouterr().err and not (frail / "runs").exists()
