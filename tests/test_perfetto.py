"""`experiments.report.perfetto`: a trace that a viewer can draw, and that says what the rows say."""

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.report.perfetto import trace
from experiments.report.rows import rows_of, steps_of
from experiments.runs.results import read_run
from tests.synthetic_run import write_run

ENGINES = ("jax", "torch", "hf")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", ENGINES, blocks=3, count=12, output_len=6)


@pytest.fixture(scope="module")
def events(run: Path) -> list[dict[str, Any]]:
    order = json.loads((run / "results.json").read_text())["order"]
    opened = read_run(run)
    made = json.loads(json.dumps(trace(rows_of(opened), steps_of(opened), ENGINES, order), allow_nan=False))
    assert made["displayTimeUnit"] == "ms"
    found: list[dict[str, Any]] = made["traceEvents"]
    return found


def test_each_engine_is_a_process(events: list[dict[str, Any]]) -> None:
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {1: "jax", 2: "torch", 3: "hf"}


def test_requests_are_nested_slices_that_end(events: list[dict[str, Any]]) -> None:
    open_slices: dict[Any, list[tuple[str, float]]] = defaultdict(list)
    whole = 0
    for event in events:
        if event["ph"] == "b":
            open_slices[event["pid"], event["id2"]["local"]].append((event["name"], event["ts"]))
        elif event["ph"] == "e":
            name, begin = open_slices[event["pid"], event["id2"]["local"]].pop()
            assert name == event["name"] and event["ts"] >= begin
            whole += name.startswith("request")
    assert whole == 3 * 3 * 12 and not any(open_slices.values())


def test_phases_are_those_of_the_rows(run: Path, events: list[dict[str, Any]]) -> None:
    row = next(
        row
        for row in rows_of(read_run(run)).to_dict("records")
        if (row["engine"], row["block"], row["request_id"]) == ("torch", 1, "5")
    )
    mine = {(e["ph"], e["name"]): e["ts"] for e in events if e.get("id2") == {"local": "1/5"} and e["pid"] == 2}
    spent = mine["e", "decode"] - mine["b", "decode"]
    assert spent == pytest.approx(1e6 * (row["times"][-1] - row["times"][0]), abs=0.2)
    waited = mine["b", "prefill"] - mine["b", "request 1/5"]
    assert waited == pytest.approx(1e6 * (row["sent"] - row["scheduled"]), abs=0.2)


def test_steps_do_not_overlap_and_carry_their_numbers(events: list[dict[str, Any]]) -> None:
    for pid in (1, 2):
        steps = [event for event in events if event["ph"] == "X" and event["pid"] == pid]
        assert all(a["ts"] + a["dur"] <= b["ts"] + 0.2 for a, b in pairwise(steps))
        assert {"tokens", "num_seqs"} <= steps[0]["args"].keys() and {step["name"] for step in steps} == {"prefill", "decode"}
        counters = {event["name"] for event in events if event["ph"] == "C" and event["pid"] == pid}
        assert counters == {"requests running", "requests waiting", "pages used"}
    assert not [event for event in events if event["pid"] == 3 and event["ph"] in "XC"]  # that engine does not tell


def test_two_steps_in_flight_share_the_device_in_turn() -> None:
    rows = pd.DataFrame(columns=["engine", "block", "sent", "times"])
    steps = pd.DataFrame({"engine": "jax", "block": 0, "submitted": [0.0, 0.1], "landed": [1.0, 2.0]})
    first, second = (event for event in trace(rows, steps, ["jax"], [])["traceEvents"] if event["ph"] == "X")
    assert (first["ts"], first["dur"], second["ts"], second["dur"]) == (0.0, 1e6, 1e6, 1e6)


def test_windows_follow_one_another_as_they_ran(events: list[dict[str, Any]]) -> None:
    spans: dict[tuple[int, int], tuple[float, float]] = {}
    for event in events:
        if event["ph"] in "be":
            key = event["pid"], int(event["id2"]["local"].partition("/")[0])
            low, high = spans.get(key, (event["ts"], event["ts"]))
            spans[key] = min(low, event["ts"]), max(high, event["ts"])
    in_time = sorted(spans, key=lambda key: spans[key])
    assert in_time == [(1, 0), (2, 0), (3, 0), (3, 1), (2, 1), (1, 1), (1, 2), (2, 2), (3, 2)]
    assert all(spans[a][1] < spans[b][0] for a, b in pairwise(in_time))


def test_a_request_that_failed_is_there_with_its_error() -> None:
    row = {
        "engine": "jax",
        "block": 0,
        "request_id": "0",
        "prompt_len": 3,
        "output_len": 2,
        "scheduled": 0.0,
        "sent": 0.5,
        "times": [],
    }
    rows = pd.DataFrame([row | {"tokens": [], "finish": "error", "error": "out of pages"}])
    events = trace(rows, pd.DataFrame(columns=["engine", "block"]), ["jax"], [])["traceEvents"]
    begin = next(event for event in events if event["name"] == "request 0/0")
    assert begin["args"]["error"] == "out of pages"
