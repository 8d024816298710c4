"""`experiments.report`: what a report says, of whole runs and of such with holes; that it is written whole or not at all."""

import errno
import json
import math
import os
import re
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from common.errors import ConfigError
from experiments.measure.session import INTERRUPTED
from experiments.metrics.statistics import sentence, too_few
from experiments.report import __main__ as command
from experiments.report import page
from experiments.report.findings import correctness, divergences, notices, open_loop, speed
from experiments.report.run_page import facts, run_page
from experiments.report.sections import agreement_section
from experiments.report.sweep_page import sweep_command
from experiments.report.tables import figures_table
from experiments.report.writer import make_report, write_report
from experiments.runs.results import RunFiles, open_run, read_run
from experiments.runs.sweep_jobs import Job
from tests.synthetic_run import HOSTILE, write_run, write_sweep

DIVERGENCE = {"engine": "torch", "request": 1, "position": 2, "tokens": [3, 4], "margin": 0.5, "error": 0.25, "justified": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of three engines with its report, and a fourth engine that failed."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    failures = {"vllm": {"kind": "died", "message": "The process ended with signal 9.", "log": ""}}
    write_run(directory, ("jax", "torch", "hf"), blocks=6, count=12, output_len=6, failures=failures)
    (directory / "vllm.log").write_text("\n".join(f"line {number}" for number in range(99)))
    results = json.loads((directory / "results.json").read_text())
    results["engines"]["hf"]["contaminated"] = ["3 compilations inside the timed windows"]
    (directory / "results.json").write_text(json.dumps(results))
    assert write_report(directory) == directory / "report.html"
    return directory


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one engine, one of whose requests failed, with a report over an older one's."""
    directory = write_run(tmp_path_factory.mktemp("runs") / "small", ("jax",), blocks=1, count=5, output_len=4)
    lines = [json.loads(line) for line in (directory / "requests.jsonl").read_text().splitlines()]
    lines[0] |= {"error": "out of pages", "finish": "error", "times": [], "tokens": []}
    (directory / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "figures").mkdir()
    (directory / "figures" / "old.svg").write_text("")
    write_report(directory)
    return directory


class Outline(HTMLParser):
    """Tags in order, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_verdict_stands_first(run: Path) -> None:
    text = Outline((run / "report.html").read_text()).text
    places = [
        text.index(words)
        for words in (
            "jax is faster",
            "torch is slower than jax",
            "Same in float32",
            "vllm failed",
            "hf is contaminated",
            "Glossary",
        )
    ]
    assert places == sorted(places)


def test_every_part_is_there(run: Path) -> None:
    outline = Outline((run / "report.html").read_text())
    anchors = {attrs["id"] for tag, attrs in outline.tags if tag == "section"}
    wanted = {
        "figures", "ratio", "latency", "throughput-against-latency", "roofline", "continuous-batch", "pages", "agreement",
        "environment", "glossary", "again",
    }  # fmt: skip
    assert anchors == wanted
    assert {attrs["href"] for tag, attrs in outline.tags if tag == "a"} == {f"#{anchor}" for anchor in wanted}
    assert "python -m experiments.compare 'engines=[jax,torch]'" in outline.text
    assert "line 98" in outline.text and "line 1\n" not in outline.text  # the end of the log
    assert "3 compilations inside the timed windows" in outline.text


def test_the_environment_tells_which_code_ran(run: Path) -> None:
    (section,) = (section for section in run_page(open_run(run))[0].sections if section.title == "Environment")
    told = dict(section.tables[0].rows)
    assert told["kernel library: jax"] == told["kernel library: torch"] == "any-0a1b.so"
    assert told["tree"] == "changed" and told["changed_files"] == " M common/engine.py" and told["changes_digest"] == "0123abcd"
    assert told["compiler: version"] == "clang 19" and told["variables: CXX"] == "clang++"


def test_the_page_asks_for_nothing_from_outside(run: Path) -> None:
    text = (run / "report.html").read_text()
    outline = Outline(text)
    for tag, attrs in outline.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            value = attrs.get(name) or "#"
            assert value.startswith("#") or value == "data:,", (tag, name, value)
    assert not re.search(r"@import|url\((?!#)", text)


def test_figures_are_files_too_and_every_one_has_words(run: Path) -> None:
    outline = Outline((run / "report.html").read_text())
    drawn = [attrs for tag, attrs in outline.tags if tag == "svg"]
    files = {file.stem for file in (run / "figures").glob("*.svg")}
    assert files == {file.stem for file in (run / "figures").glob("*.png")} and len(files) == len(drawn)
    assert {"ratio", "ttft", "itl", "throughput-latency", "roofline", "timeline-2", "pages-1", "agreement-kld"} <= files
    for file in (run / "figures").glob("*.svg"):
        assert len(xml.parse(file).getroot().findtext("{http://www.w3.org/2000/svg}desc") or "") > 20
    ids = [attrs["id"] for _, attrs in outline.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_summary_for_a_pull_request_has_verdict_table_and_contaminations(run: Path) -> None:
    text = (run / "report.md").read_text()
    assert (
        re.search(r"\*\*jax is faster · torch gives \d\.\d+×", text)
        and "**hf is contaminated**: 3 compilations" in text
        and "engines=[jax,torch]" in text
    )
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0] == "|  | jax | torch | hf |" and len({line.count("|") for line in table}) == 1
    assert any(line.startswith("| output tokens/s |") for line in table)
    assert "| contaminated | no | no | contaminated |" in table and "**Contaminated: jax is faster · hf gives" in text


def test_what_comes_from_outside_is_text(tmp_path: Path) -> None:
    failures = {HOSTILE: {"kind": HOSTILE, "message": HOSTILE, "log": HOSTILE}}
    directory = write_run(tmp_path / "run", (HOSTILE, "$x_1$"), 2, 6, 4, model=HOSTILE, failures=failures)
    (directory / "config.yaml").write_text(f"model: '{HOSTILE}'\nengines: []\n")
    text = write_report(directory).read_text()
    assert HOSTILE not in text and "<img" not in text and text.count("</script>") == 1
    assert Outline(text).text.count(HOSTILE) > 5
    assert "<img" not in (directory / "report.md").read_text().replace("\\<", "").replace("      </script><img", "")
    for file in (directory / "figures").glob("*.svg"):
        xml.parse(file)


def test_of_a_comparison_that_was_cut_short_the_whole_blocks_are_reported(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run.partial", ("jax", "torch"), blocks=3, count=6, output_len=4, stopped=INTERRUPTED)
    results = json.loads((directory / "results.json").read_text())
    for mine in results["engines"].values():  # whose third window has rows
        mine["block_output_throughput"] = mine["block_output_throughput"][:2]
    (directory / "results.json").write_text(json.dumps(results))
    _, rows, steps = run_page(read_run(directory))
    assert set(rows["block"]) == set(steps["block"]) == {0, 1}
    write_report(directory)
    said = (directory / "report.md").read_text()
    assert said.startswith("## Partial, of 2 blocks: jax against torch\n")
    assert "The run ended before the pass in float32 did" in said
    (directory / "results.json").unlink()
    with pytest.raises(ConfigError, match=r"has not ended.* no part was whole"):
        write_report(directory)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("requests.jsonl", b"{}\n", "line 1: expected a JSON object with engine, block"),
        ("requests.jsonl", b"[1]\n", "line 1: expected a JSON object with engine, block"),
        ("requests.jsonl", b"\xff\xfe", "cannot be read"),
        ("steps.jsonl", b"{}\n", "line 1: expected a JSON object with engine"),
        ("diverge-1.json", b"[1", "diverge-1.json cannot be read"),
        ("diverge-1.json", b"[1]", "diverge-1.json is no mapping"),
        ("diverge-1.json", b"{}", "diverge-1.json is no answer of experiments.diverge"),
        ("results.json", b'{"engines": {"jax": null}}', "has no figures of one"),
    ],
)
def test_a_run_of_which_a_file_is_damaged_is_refused_by_that_file(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", ("jax", "torch"), blocks=2, count=4, output_len=4)
    (directory / name).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        write_report(directory)
    assert name in str(refused.value)


@pytest.mark.parametrize("there", [True, False], ids=["empty", "missing"])
def test_a_run_without_rows_is_reported_by_its_results(there: bool, tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", ("jax", "torch"), blocks=2, count=4, output_len=4)
    (directory / "requests.jsonl").unlink()
    if there:
        (directory / "requests.jsonl").touch()
    assert "faster" in write_report(directory).read_text()


def test_a_run_of_one_engine_is_reported(small: Path) -> None:
    text = Outline((small / "report.html").read_text()).text
    assert "of the roofline" in text and "times the output" not in text


def test_a_run_that_told_little_is_reported_without_what_it_did_not_tell(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", ("jax", "torch"), blocks=1, count=5, output_len=4)
    results = json.loads((directory / "results.json").read_text())
    kept = {key: results[key] for key in ("model", "dtype", "workload", "run")}
    figures: dict[str, dict[str, Any]] = {label: {"output_throughput": 10.0} for label in results["engines"]}
    (directory / "results.json").write_text(json.dumps(kept | {"engines": figures, "ratios": {"jax": 1.0, "torch": 0.5}}))
    (directory / "requests.jsonl").unlink()
    (directory / "steps.jsonl").unlink()
    outline = Outline(write_report(directory).read_text())
    assert "torch gave 0.5000 times the output throughput of jax" in outline.text
    assert not [tag for tag, _ in outline.tags if tag == "svg"]


def test_a_run_of_which_every_engine_failed_is_reported(tmp_path: Path) -> None:
    failures = {"jax": {"kind": "died", "message": "gone", "log": ""}}
    directory = write_run(
        tmp_path / "run", ("jax", "torch"), 1, 5, 4, engines={}, comparisons={}, ratios={}, agreement={}, failures=failures
    )
    (directory / "requests.jsonl").write_text("")
    assert "jax failed: died" in Outline(write_report(directory).read_text()).text


def compared(**changed: Any) -> RunFiles:
    """A comparison of two engines of which one block tells nothing sure."""
    found = {"against": "jax", "ratio": 0.9, "low": None, "high": None, "verdict": "undecided", "blocks": 1}
    engines: dict[str, Any] = {"jax": {"median_ttft_ms": 10.0}, "torch": {"median_ttft_ms": 12.0}}
    results: dict[str, Any] = {
        "engines": engines,
        "comparisons": {"torch": found | changed.pop("found", {})},
        "dtype": "bfloat16",
        "unjustified_divergences": 0,
        "tokens_equal": True,
        "compared_tokens": 9,
    }
    return RunFiles(Path("runs/a b"), {}, {}, results | changed)


def test_a_difference_in_the_dtype_that_was_timed_is_not_hidden_by_sameness_in_float32() -> None:
    first, second = correctness(compared(tokens_equal_share=0.4545))
    assert (first.tone, first.value) == ("good", "Same in float32")
    assert (second.tone, second.value) == ("warn", "45.4 % alike in bfloat16")
    assert second.command == "python -m experiments.diverge 'runs/a b' dtype=bfloat16"
    *_, last = correctness(compared(tokens_equal_share=0.99999))
    assert last.value == "99.9 % alike in bfloat16"
    (both,) = correctness(compared(tokens_equal_share=1.0))
    assert both.tone == "good" and "In bfloat16, the dtype timed, every token is the same too." in both.said


def test_what_diverge_found_stands_where_the_report_invited_to_it(tmp_path: Path) -> None:
    run = replace(compared(tokens_equal_share=0.4545), directory=tmp_path)
    asked = [("float32", ["jax", "torch"], "equal"), ("bfloat16", ["jax", "hf"], "undecided")]
    for number, (dtype, engines, verdict) in enumerate([*asked, ("bfloat16", ["torch", "jax"], "defect")], 1):
        invited = [each.command for each in correctness(run)]
        assert invited == ["", f"python -m experiments.diverge {tmp_path} dtype=bfloat16"]
        found = {"dtype": dtype, "engines": engines, "verdict": verdict, "said": f"the words of {number}."}
        (tmp_path / f"diverge-{number}.json").write_text(json.dumps(found))
    _, told = correctness(run)
    assert (told.tone, told.value, told.command) == ("bad", "45.4 % alike in bfloat16", "")
    assert told.said.endswith("before their request's first difference. the words of 3. (diverge-3.json)")
    others = [("good", "Equal", "jax and torch in float32"), ("warn", "Undecided", "jax and hf in bfloat16")]
    assert [(each.tone, each.value, each.word) for each in divergences(run)] == others
    same = replace(run, results=run.results | {"tokens_equal_share": 1.0})
    assert [each.value for each in divergences(same)] == ["Equal", "Undecided", "Defect"]


def test_the_command_of_a_verdict_is_on_the_page_and_in_the_summary() -> None:
    verdict = page.Verdict("warn", "45 %", "alike", "Where:", "python -m x 'a b' y_z")
    made = page.Page("run", "a", [], [verdict], [], [page.Table(("",), [])], [], [], "")
    assert "\n      python -m x 'a b' y_z\n" in page.markdown(made)
    assert "python -m x 'a b' y_z" in Outline(page.html(made, "", [])).text


def test_a_verdict_that_rests_on_too_little_says_what_to_do() -> None:
    said = sentence("torch", "jax", "undecided", 0.9, None, None, 1, 0.05, too_few(6, 0.95))
    advised = "Write measure.blocks=8"
    (few,) = speed(compared(found={"said": said}, stopped="its one block was run", advice=advised), paced=False)
    assert (few.tone, few.value) == ("calm", "Undecided")
    assert few.said.startswith(f"{said}. Its one block was run. ") and "8 blocks are the fewest" in few.said  # of 6 comparisons
    assert few.said.endswith(f" {advised}.")
    assert few.word == "torch against jax, no interval, 1 block" and "(ratio 0.900, no interval, 1 block)" in few.said
    (many,) = speed(compared(found={"low": 0.8, "high": 1.1, "blocks": 8}), paced=False)
    assert many.word.endswith("of jax, 0.800–1.100, 8 blocks") and "measure." not in many.said  # nobody advised anything
    (settled,) = speed(compared(found={"verdict": "slower"}, advice=advised), paced=False)
    assert "measure." not in settled.said  # another engine's ratio was undecided


def test_a_verdict_on_contaminated_engines_says_so() -> None:
    engines = {"jax": {"contaminated": ["2 requests failed"]}, "torch": {}}
    (spoilt,) = speed(compared(engines=engines, found={"verdict": "slower"}), paced=False)
    assert (spoilt.tone, spoilt.value) == ("warn", "Contaminated: jax is faster")
    assert "Contaminated: jax" in spoilt.said


def test_where_arrivals_set_the_pace_latency_leads(tmp_path: Path) -> None:
    assert open_loop({"request_rate": 2.0}, [0.0]) and not open_loop({"concurrency": 8}, [0.0, 1.0])
    assert open_loop({"trace": "t.jsonl"}, [0.0, 1.0]) and not open_loop({"trace": "t.jsonl"}, [0.0, 0.0])
    first, second = speed(compared(), paced=True)
    assert first.value == "Arrivals set the pace" and "median: jax 10.00 ms, torch 12.00 ms." in first.said
    assert "The arrivals set this ratio" in second.said
    directory = write_run(tmp_path / "run", blocks=1, count=5, output_len=4)
    (directory / "config.yaml").write_text("workload: {request_rate: 2.0}\nmodel: {}\nengines: []\n")
    sections = [section.title for section in run_page(open_run(directory))[0].sections]
    assert sections.index("Latency") < sections.index("Ratio")


def test_the_kernels_in_the_head_are_those_of_each_engine_where_they_differ() -> None:
    native = {"kernels_used": "native", "kernel_arithmetic": "AMX"}
    named: list[tuple[dict[str, Any], str]] = [
        ({"jax": native, "torch": native, "hf": {}}, "native (AMX) kernels"),
        (
            {"jax": native, "torch": {"kernels_used": "framework"}, "hf": {}},
            "kernels by engine: jax native (AMX), torch framework",
        ),
        ({"hf": {}, "vllm": {}}, "auto kernels"),
    ]
    for engines, said in named:
        assert [fact for fact in facts(compared(engines=engines, kernels="auto")) if "kernels" in fact] == [said]


def test_an_engine_without_shares_of_the_limits_says_why_on_the_page() -> None:
    engines = {"jax": {}, "torch": {"no_roofline_because": "not measured over several engines"}}
    (notice,) = notices(compared(engines=engines))
    assert (notice.title, notice.tone) == ("torch has no shares of the machine's limits", "calm")
    assert notice.text == "roofline, MBU and MFU are not measured over several engines."


def test_a_time_between_ranks_that_was_not_counted_is_told_with_its_origin_on_the_page() -> None:
    engines = {"torch": {}, "jax": {"communication_time": "not told: nobody counts it"}}
    (notice,) = notices(compared(engines=engines))
    assert (notice.title, notice.tone) == ("jax does not count the time between its ranks", "calm")
    assert notice.text == "the time between ranks is not told: nobody counts it."


def test_goodput_shows_its_limits() -> None:
    engines = {"jax": {"goodput": 2.0, "slo": {"ttft_ms": 500.0, "tpot_ms": 50}}}
    rows = figures_table(engines, [("goodput", "requests/s within their limits")]).rows
    assert rows == [("goodput: requests/s with TTFT ≤ 500 ms, TPOT ≤ 50 ms", "2.000")]


def test_what_is_equal_everywhere_is_a_sentence_and_no_figure() -> None:
    at = [{"position": p, "mean_abs_logprob_diff": 0.0, "kld": 0.1 * p, "same_share": 1.0} for p in range(4)]
    section = agreement_section({"agreement": {"torch": {"num_positions": 4, "by_position": at}}}, ["jax", "torch"])
    assert section.intro.endswith("At every position the log-probabilities are equal, the tokens are the same.")
    assert [drawing.name for drawing in section.drawings] == ["agreement-kld"]


def test_a_failed_request_is_in_no_latency(small: Path) -> None:
    text = Outline((small / "report.html").read_text()).text
    assert re.search(r"Time to first token\s*enginesamples.*?jax4", text, re.DOTALL)


def test_a_crash_leaves_the_report_that_was_there(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in small.rglob("*") if path.is_file()}

    def crash(*_: object) -> str:
        raise RuntimeError("out of ink")

    broken: tuple[tuple[object, str], ...] = ((page, "html"), (Path, "write_bytes"))
    for place, name in broken:
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of ink"):
            patch.setattr(place, name, crash)
            write_report(small)
    assert {path: path.read_bytes() for path in small.rglob("*") if path.is_file()} == before
    assert not list(small.glob(".report-*"))


def test_a_folder_that_takes_no_files_is_one_message(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert make_report(small) is None
    told = capsys.readouterr().err
    assert told.startswith("error: The report cannot be written") and told.count("\n") == 1 and "No space left" in told


def test_figures_of_an_older_report_go(small: Path) -> None:
    assert not (small / "figures" / "old.svg").exists() and (small / "figures" / "ttft.svg").exists()


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"results\.json"):
        write_report(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 2 and "needs the folder" in capsys.readouterr().err


def test_the_end_of_a_log_is_told_as_it_was_kept_or_else_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "jax.log").write_text("inside\n")
    (tmp_path / "other.log").write_text("outside\n")
    kept = {"kind": "died", "message": "gone", "log": "\n".join([*map(str, range(40)), "the process wrote jax.log"])}
    failures = {"torch": kept, "jax": kept | {"log": ""}, "../other": kept | {"log": ""}}
    found = notices(RunFiles(tmp_path / "run", {}, {}, {"engines": {}, "failures": failures}))
    texts = [notice.log for notice in found]
    assert texts == ["\n".join([*map(str, range(11, 40)), "the process wrote jax.log"]), "inside", ""]


def test_a_sweep_shows_every_cell_and_what_failed(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep")
    outline = Outline(write_report(folder).read_text())
    assert "5/6" in outline.text and "Job 5 failed" in outline.text and HOSTILE in outline.text
    assert "workload.num_requests=4,8,16" in outline.text and "In the middle" not in outline.text
    assert "2026-01-02T03:04:05" not in outline.text.partition("Cells")[0]  # each job has a date of its own
    files = {file.stem for file in (folder / "figures").glob("*.svg")}
    assert {"output-throughput-over-workload-num_requests", "throughput-latency"} <= files
    rows = [line for line in (folder / "report.md").read_text().splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == 6 and "1,600" in rows[2] and "failed" in rows[5]


def test_an_empty_sweep_is_reported(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    assert "0/0" in Outline(write_report(tmp_path).read_text()).text


def test_a_sweep_of_all_combinations_is_one_command() -> None:
    jobs = [
        Job(number=n, digest="", overrides=(f"engine={e}", f"seed={s}"))
        for n, (e, s) in enumerate([("a", 1), ("a", 2), ("b", 1), ("b", 2)])
    ]
    first = "python -m experiments.bench --config-dir c engine=a seed=1"
    assert sweep_command(jobs, first) == "python -m experiments.bench --config-dir c -m engine=a,b seed=1,2"
    launched = sweep_command(jobs, f"{first} hydra.launcher.timeout_s=9")
    assert launched == "python -m experiments.bench --config-dir c -m hydra.launcher.timeout_s=9 engine=a,b seed=1,2"
    assert sweep_command(jobs[:3], first).count("\n") == 2
    for some in (jobs, jobs[:3]):  # in a folder of its own: in that of the sweep every job is done
        assert "sweep=" not in sweep_command(some, f"{first} sweep=s")
    other = Job(number=4, digest="", overrides=("engine=b", "seed=1", "dtype=float32"))
    assert sweep_command([jobs[0], other], first).count("\n") == 1  # engine=a has no dtype
    assert sweep_command([], first) == ""


@pytest.mark.accept
def test_ten_thousand_requests_are_reported_within_ten_seconds(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", ("jax", "torch"), blocks=1, count=5_000, output_len=64)
    begin = time.perf_counter()
    size = write_report(directory).stat().st_size
    seconds = time.perf_counter() - begin
    print(f"{seconds:.1f} s, {size / 1e6:.2f} MB")
    assert seconds <= 10 and size < 2_000_000


# Figures that are missing or not finite.


def without(value: Any, wanted: Callable[[str], bool], instead: float | None, name: str = "") -> Any:
    """A copy of results with `instead` for each number whose innermost name is `wanted`."""
    if isinstance(value, dict):
        return {key: without(inner, wanted, instead, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [without(inner, wanted, instead, name) for inner in value]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return instead if is_number and wanted(name) else value


def names_of(value: Any) -> set[str]:
    """Every name in results."""
    if isinstance(value, dict):
        return set(value) | set().union(*map(names_of, value.values()))
    return set().union(*map(names_of, value)) if isinstance(value, list) else set()


def test_any_figure_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", blocks=2, count=4, output_len=3, first_divergence=DIVERGENCE)
    (run / "requests.jsonl").unlink()  # what is drawn of them does not depend on the results
    (run / "steps.jsonl").unlink()
    results = json.loads((run / "results.json").read_text())
    results["engines"]["jax"] |= {"goodput": 1.0, "slo": {"ttft_ms": 500.0}}
    monkeypatch.setattr(Figure, "draw_without_rendering", lambda _: None)
    monkeypatch.setattr(FigureCanvasSVG, "print_svg", lambda _, file, **__: file.write("<svg ></svg>"))
    monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda *_: None)
    for name in names_of(results):
        (run / "results.json").write_text(json.dumps(without(results, name.__eq__, None)))
        made = run_page(open_run(run))[0]
        text = Outline(page.html(made, "", ["", ""])).text + page.markdown(made)
        assert not re.search(r"\b(nan|None|inf)\b", text), name


@pytest.mark.parametrize("instead", [None, math.nan, math.inf, -math.inf])
def test_a_run_whose_figures_are_all_not_finite_is_reported(tmp_path: Path, instead: float | None) -> None:
    run = write_run(tmp_path / "run", blocks=2, count=4, output_len=3, first_divergence=DIVERGENCE)
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(without(results, lambda _: True, instead)))
    text = Outline(write_report(run).read_text()).text
    assert "Time to first token" in text and not re.search(r"\b(nan|None|inf)\b", text)


def test_a_sweep_whose_figures_are_all_not_finite_is_reported(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep")
    for file in folder.rglob("results.json"):
        file.write_text(json.dumps(without(json.loads(file.read_text()), lambda _: True, math.nan)))
    text = Outline(write_report(folder).read_text()).text
    assert "5/6" in text and not re.search(r"\b(nan|None|inf)\b", text)


def test_a_run_of_one_contaminated_engine_says_so_beside_its_figures(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", ("jax",), blocks=1, count=5, output_len=4, contaminated=["2 requests failed"])
    speeds = [verdict for verdict in run_page(open_run(directory))[0].verdicts if verdict.word.startswith("output tokens/s")]
    assert [(verdict.word, verdict.tone) for verdict in speeds] == [("output tokens/s: contaminated", "warn")]


def test_kernels_that_auto_fell_back_to_are_noticed_with_the_reason(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", ("jax",), blocks=1, count=5, output_len=4, auto_took_framework="no compiler")
    write_report(directory)
    assert re.search(r"\*\*jax does not run native kernels\*\*: .*: no compiler", (directory / "report.md").read_text())
