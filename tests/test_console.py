"""What people are told is told as it stands: a message, a path or an override may hold what looks like rich's markup."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments import handover
from experiments.display.formatting import shortened
from experiments.display.progress import ProgressReporter
from experiments.metrics.statistics import Criteria, compare_all
from experiments.report.console import print_conclusion, print_table
from experiments.report.figures_table import FIGURES
from experiments.roofline import __main__ as roofline_command
from experiments.sweep.table import print_sweep

HOSTILE = "a template with [INST] but no [/INST]"
ROOT = Path(__file__).parents[1]


def test_a_failure_is_told_word_by_word(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReporter() as narrator:
        narrator.alarm(HOSTILE)
        narrator.say(HOSTILE)
    assert capsys.readouterr().err.count(HOSTILE) == 2


def test_a_title_is_printed_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(f"/models/{HOSTILE}", {"jax": {"completed": 1, "contaminated": [HOSTILE]}})
    assert capsys.readouterr().out.count(HOSTILE) == 2


LONG = [f"torch-max_num_batched_tokens={most}-enable_chunked_prefill=False" for most in (64, 1024, 2048)]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_heads_of_a_table_are_not_cut(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
    compared = compare_all({label: [1.0] * 6 for label in LONG}, Criteria(), seed=0)
    figures = {"output_throughput": 1.0, "contaminated": []}
    print_table("title", dict.fromkeys(LONG, figures), {label: asdict(comparison) for label, comparison in compared.items()})
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    heads = [[cell.strip() for cell in line[1:-1].split("┃")] for line in lines if line.startswith("┃")]
    first = "".join(line[1:].split("│")[0].strip() for line in lines if line.startswith("│"))
    assert ["".join(parts) for parts in zip(*heads, strict=True)] == ["", *LONG] and f"×{LONG[0]}" in first.replace(" ", "")


@pytest.mark.parametrize(
    "names",
    [
        ["jax", "torch-compile"],
        LONG,
        [f"torch-block_size={size}-enable_chunked_prefill=False" for size in (8, 16)],
        ["torch" + "-x=1" * 10, "torch" + "-x=1" * 11],
        [f"torch-{'a' * 20}{i}{'a' * 40}" for i in range(12)],
        ["x" * 30],
    ],
)
@pytest.mark.parametrize("limit", [3, 24])
def test_names_that_are_cut_stay_different(names: list[str], limit: int) -> None:
    short = shortened(names, limit)
    assert len(set(short)) == len(names)
    assert all(len(cut) <= max(limit, 3) for cut in short) and all(
        cut == name for cut, name in zip(short, names, strict=True) if len(name) <= limit
    )


def test_an_override_that_is_a_list_shows_in_the_table_of_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    table = pd.DataFrame([{"job": 0, "engine": "jax", "engines": "[jax,torch]", "runs": "[/x]", "status": "ok"}])
    table.attrs["swept"] = ["engines", "runs"]
    print_sweep("runs/sweeps/[/y]", table)
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[jax,torch]", "[/x]", "runs/sweeps/[/y]"))


def test_a_result_is_json_for_programs_and_a_file_name_at_a_terminal() -> None:
    script = "from experiments.report.console import print_result; print_result({'a': 1}, 'runs/x/results.json')"
    command = [sys.executable, "-c", script]
    piped = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert piped.stdout == b'{"a":1}\n'
    ours, terminal = pty.openpty()
    try:
        subprocess.run(command, cwd=ROOT, stdout=terminal, check=True)
        assert os.read(ours, 1000) == b"Results: runs/x/results.json\r\n"
    finally:
        os.close(ours)
        os.close(terminal)


@pytest.mark.parametrize(("blocks", "told"), [(1, "ratios; in"), (6, "ratios and its 95 % interval; in")])
def test_the_signs_in_a_table_are_explained_below_it(blocks: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    speeds = [100.0 + i for i in range(blocks)]
    figures: dict[str, Any] = {"output_throughput": 100.0, "p99_itl_ms": 3.0, "contaminated": []}
    compared = compare_all({"jax": speeds, "torch": [2.0 + speed for speed in speeds]}, Criteria(), seed=0)
    comparisons = {label: asdict(comparison) for label, comparison in compared.items()}
    print_table("title", {"jax": figures, "torch": figures | {"unsupported": ["p99_itl_ms"]}}, comparisons)
    *_, below = capsys.readouterr().out.splitlines()
    assert below.startswith("× jax: geometric mean of the blocks' ratios") and told in below
    assert below.endswith("in brackets: percentiles of too few samples")
    print_table("title", {"jax": figures})
    assert "brackets" not in capsys.readouterr().out


@pytest.mark.parametrize("spoilt", ["", "jax", "torch", "hf"])
def test_the_line_of_a_verdict_on_contaminated_engines_says_so(spoilt: str, capsys: pytest.CaptureFixture[str]) -> None:
    speeds = {"jax": [100.0] * 6, "torch": [90.0] * 6, "hf": [30.0] * 6}
    engines = {label: {"contaminated": ["swapped"] * (label == spoilt)} for label in speeds}
    comparisons = {label: asdict(compared) for label, compared in compare_all(speeds, Criteria(), seed=0).items()}
    result = {"engines": engines, "comparisons": comparisons, "failures": {}, "stopped": "all 6 blocks were run", "advice": ""}
    correctness = dict.fromkeys(("unjustified_divergences", "max_abs_logprob_diff", "first_divergence", "tokens_equal_share"))
    print_conclusion(result | correctness)
    said = " ".join(capsys.readouterr().out.split()).partition("outputs:")[2]
    torch, hf = re.findall(r"(contaminated: )?(?:torch|hf) is [^()]*\([^()]*\)", said)
    assert (bool(torch), bool(hf)) == (spoilt in ("jax", "torch"), spoilt in ("jax", "hf"))


def test_a_table_has_ten_rows_by_default_and_all_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    speeds = {"jax": [100.0] * 6, "torch": [90.0] * 6}
    comparisons = {label: asdict(compared) for label, compared in compare_all(speeds, Criteria(), seed=0).items()}
    engines = {label: {key: 1.0 for key, _ in FIGURES} | {"contaminated": ["swapped"]} for label in speeds}

    def names(every: bool) -> list[str]:
        print_table("title", engines, comparisons, {"torch": {"max_abs_logprob_diff": 2e-6}}, every)
        return re.findall(r"^│ (.*?)\s+│", capsys.readouterr().out, re.MULTILINE)

    assert names(every=False) == [
        *(
            "output tokens/s",
            "× jax (6 blocks)",
            "contaminated: see below",
            "TTFT median, ms",
            "TPOT median, ms",
            "ITL p99, ms",
        ),
        *("roofline: least time / time", "kernels", "peak memory, MiB", "log-probability difference, most"),
    ]
    assert len(names(every=True)) == len(FIGURES) + 3
    print_table("title", engines, every=False)
    assert f"{len(FIGURES) - 7} more rows: table=all" in capsys.readouterr().out


def test_long_work_that_reports_nothing_is_reported_as_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReporter() as narrator, narrator.waiting("jax: step 3, compiled first", period_s=0.02):
        time.sleep(0.2)
    told = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(told) >= 2 and set(told) == {"jax: step 3, compiled first: 0 s so far"}
    time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_a_table_says_beside_the_ratio_which_engines_are_contaminated(capsys: pytest.CaptureFixture[str]) -> None:
    engines = {label: {"output_throughput": 1.0, "contaminated": ["swapped"] * (label == "jax")} for label in ("jax", "torch")}
    print_table("title", engines)
    (row,) = re.findall(r"contaminated: see below.*", capsys.readouterr().out)
    assert re.findall(r"\w+", row)[3:] == ["contaminated", "no"]
    print_table("title", {"torch": engines["torch"]})
    assert "contaminated" not in capsys.readouterr().out


def test_an_engine_that_ran_too_short_a_time_is_not_called_clean_beside_a_contaminated_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoilt = {"output_throughput": 1.0, "contaminated": ["swapped"], "duration": 9.0}
    clean: dict[str, Any] = spoilt | {"contaminated": []}
    print_table("title", {"jax": spoilt, "torch": clean, "hf": clean | {"duration": 0.5}})
    (row,) = re.findall(r"contaminated: see below.*", capsys.readouterr().out)
    assert [cell.strip() for cell in row.split("│")[1:4]] == ["contaminated", "no", "too short to judge"]


@pytest.mark.parametrize("spoilt", [True, False])
def test_the_ratio_of_a_contaminated_engine_is_not_to_be_quoted(spoilt: bool, capsys: pytest.CaptureFixture[str]) -> None:
    compared = compare_all({"jax": [1.0] * 6, "torch": [2.0] * 6}, Criteria(), seed=0)
    engines = {"jax": {"output_throughput": 1.0, "contaminated": []}, "torch": {"contaminated": ["swapped"] * spoilt}}
    print_table("title", engines, {label: asdict(comparison) for label, comparison in compared.items()})
    assert ("is not to be quoted" in " ".join(capsys.readouterr().out.split())) == spoilt


@pytest.mark.parametrize(("main", "what"), [(roofline_command.main, "limits"), (handover.main, "rates")])
def test_what_only_standard_output_would_tell_is_not_measured_where_that_is_closed(
    main: Callable[[], None], what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["command"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.stdout", None)  # as Python has it
        main()
    said = f"error: Standard output is closed, so that there is nowhere to write the {what}.\n"
    assert end.value.code == 2 and capsys.readouterr().err == said


def test_an_engine_without_shares_of_the_limits_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("title", {"torch": {"contaminated": [], "no_roofline_because": "not measured over several engines"}})
    assert "torch: roofline, MBU and MFU are not measured over several engines." in capsys.readouterr().out


def test_a_time_between_ranks_that_was_not_counted_is_told_with_its_origin(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("title", {"jax": {"contaminated": [], "communication_time": "not told: nobody counts it"}})
    assert "jax: the time between ranks is not told: nobody counts it." in capsys.readouterr().out


def test_kernels_that_auto_fell_back_to_are_told_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("title", {"jax": {"contaminated": [], "kernels_used": "framework", "auto_took_framework": "no compiler"}})
    assert "jax: kernels=auto took the framework's kernels, not the native ones: no compiler." in capsys.readouterr().out
