"""Raw rows and steps as files: what was written is what is read, quickly, and never half."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.config import EngineConfig
from common.engine import Engine
from common.errors import ConfigError
from experiments.load.driver import Row, Window, drive
from experiments.load.workload import Item
from experiments.runs.records import read_rows, read_steps, write_rows, write_steps
from tests.history_runner import HistoryRunner


def window(logprobs: int | None = None) -> Window:
    config = EngineConfig(max_model_len=100, max_num_seqs=4, max_num_batched_tokens=16)
    engine = Engine(HistoryRunner(num_pages=60), config, num_pages=60)
    return drive(engine, [Item(0.0, tuple(range(20)), 3), Item(0.0, (1,), 2)], logprobs)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    windows = {"a": [window(), window()], "b": [window(logprobs=2)]}
    write_rows(tmp_path, windows)
    frame = read_rows(tmp_path)
    assert list(zip(frame.engine, frame.block, strict=True)) == [("a", 0), ("a", 0), ("a", 1), ("a", 1), ("b", 0), ("b", 0)]
    again = [Row.of(record) for record in frame.drop(columns=["engine", "block"]).to_dict("records")]
    assert [replaced(row) for row in again] == [replaced(row) for blocks in windows.values() for w in blocks for row in w.rows]


def replaced(row: Row) -> Row:
    """pandas has no None among numbers."""
    return Row.of(row.record() | {"error": None})


def test_steps_are_told_in_sums_with_the_load_around_them(tmp_path: Path) -> None:
    one = window()
    write_steps(tmp_path, {"a": [one], "silent": [Window(one.rows, one.duration)]})
    frame = read_steps(tmp_path)
    assert one.steps and len(frame) == len(one.steps) and set(frame.engine) == {"a"}
    first = frame.iloc[0]
    assert (first.tokens, first.prompt_tokens, first.num_seqs, first.kv_tokens) == (16, 16, 1, 16)
    assert (first.running, first.waiting, first.pages_total, first.pages_used, first.pages_empty) == (1, 1, 59, 2, 1)
    assert frame.tokens.sum() == 20 + 1 + 2 + 1 and frame.prompt_tokens.sum() == 21
    assert (frame.landed > frame.submitted).all() and (frame.submitted >= 0).all()
    assert set(json.loads((tmp_path / "steps.jsonl").read_text().splitlines()[0])) == {
        *("engine", "block", "submitted", "landed", "tokens", "prompt_tokens", "num_seqs", "logit_rows", "kv_tokens"),
        *("running", "waiting", "pages_used", "pages_total", "pages_empty"),
    }


def test_a_run_whose_engines_tell_no_steps_has_an_empty_table_of_them(tmp_path: Path) -> None:
    write_steps(tmp_path, {"silent": [Window((), 1.0)]})
    frame = read_steps(tmp_path)
    assert frame.empty and "pages_used" in frame.columns


def test_ten_thousand_requests_are_read_whole(tmp_path: Path) -> None:
    times = tuple((np.arange(50) / 7).tolist())
    row = Row(request_id="0", prompt_len=5, output_len=50, scheduled=0.0, sent=0.0, times=times, tokens=tuple(range(50)))
    write_rows(tmp_path, {"a": [Window((row,) * 10_000, 9.0)]})
    frame = read_rows(tmp_path)
    assert len(frame) == 10_000 and tuple(frame.times[9_999]) == times


def test_a_line_cut_short_is_refused_with_its_number_and_a_missing_file_by_its_name(tmp_path: Path) -> None:
    write_rows(tmp_path, {"a": [window()]})
    path = tmp_path / "requests.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ConfigError, match=r"requests.jsonl, line 2: expected a JSON object"):
        read_rows(tmp_path)
    with pytest.raises(ConfigError, match=r"steps.jsonl cannot be read: .*a finished run"):
        read_steps(tmp_path)
