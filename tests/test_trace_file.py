"""Traces: what a line may say, what is refused and how, and the workload that comes of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from experiments.load.trace import Entry, read_trace
from experiments.load.workload import WorkloadConfig, draw

GOOD = {"arrival": 0.5, "prompt_len": 4, "output_len": 2}


def trace(folder: Path, *lines: object) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_line_gives_ids_or_their_number_and_may_say_more(tmp_path: Path) -> None:
    path = trace(
        tmp_path,
        {"arrival": 2, "prompt_token_ids": [5, 6, 7], "output_len": 1},
        "",
        GOOD,
        {"arrival": 3.0, "prompt_token_ids": [8, 9], "prompt_len": 2, "output_len": 9},
    )
    assert read_trace(path, 10) == [Entry(0.5, (), 4, 2), Entry(2.0, (5, 6, 7), 3, 1), Entry(3.0, (8, 9), 2, 9)]
    assert read_trace(path, 10, limit=2) == read_trace(path, 10)[:2]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # as Windows writes it
    assert len(read_trace(path, 10)) == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"expected a JSON object such as .*, got '\{"),
        ("[1, 2]", "expected a JSON object"),
        ("[" * 100_000, "expected a JSON object"),
        (GOOD | {"arrival": 10**400}, "subtract the first date"),
        (GOOD | {"prompt_len": 10**12}, "prompt_len must be at most 16777216"),
        ({"prompt_len": 4, "output_len": 2}, "arrival is missing"),
        ({"arival": 1.0, "prompt_len": 4, "output_len": 2}, "unknown key 'arival'. Did you mean 'arrival'"),
        (GOOD | {"output_ln": 3}, "unknown key 'output_ln'. Did you mean 'output_len'\\? Known: arrival, prompt_token_ids"),
        (GOOD | {"": 3}, "unknown key ''\\. Known: arrival"),
        ({"arrival": 1.0, "output_len": 2}, r"prompt_len \(or prompt_token_ids\) is missing"),
        ({"arrival": 1.0, "prompt_len": 4}, "output_len is missing"),
        (GOOD | {"arrival": "soon"}, "arrival must be a number of seconds, got 'soon'"),
        (GOOD | {"arrival": float("nan")}, "arrival must be a number of seconds, got nan"),
        (GOOD | {"arrival": True}, "arrival must be a number"),
        (GOOD | {"arrival": -1}, "arrival must be seconds after the start"),
        (GOOD | {"arrival": 1.7e9}, "subtract the first date"),
        (GOOD | {"prompt_len": 0}, "prompt_len must be an integer ≥ 1, got 0"),
        (GOOD | {"output_len": 2.5}, "output_len must be an integer ≥ 1, got 2.5"),
        ({"arrival": 1.0, "prompt_token_ids": [], "output_len": 2}, "a list of one id or more"),
        ({"arrival": 1.0, "prompt_token_ids": "abc", "output_len": 2}, "a list of one id or more, got 'abc'"),
        (
            {"arrival": 1.0, "prompt_token_ids": [1, 10], "output_len": 2},
            r"prompt_token_ids\[1\] must be an integer in \[0, 10\)",
        ),
        ({"arrival": 1.0, "prompt_token_ids": [1, True], "output_len": 2}, r"prompt_token_ids\[1\]"),
        (GOOD | {"prompt_token_ids": [1, 2]}, "prompt_len is 4, but there are 2 prompt_token_ids"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(line: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"trace.jsonl, line 3: .*{said}"):
        read_trace(trace(tmp_path, GOOD, "", line, GOOD), 10)


def test_a_file_without_a_request_or_with_too_few_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no request"):
        read_trace(trace(tmp_path, "", " "), 10)
    with pytest.raises(ConfigError, match=r"num_requests=3, but the trace .* holds 2"):
        read_trace(trace(tmp_path, GOOD, GOOD), 10, limit=3)


def test_prompts_that_are_too_long_together_are_refused_before_they_are_drawn(tmp_path: Path) -> None:
    path = trace(tmp_path, *[GOOD | {"prompt_len": 1 << 24}] * 5)
    assert len(read_trace(path, 10, limit=4)) == 4
    with pytest.raises(ConfigError, match=r"83886080 tokens in all, at most 67108864 .*set a lower workload.num_requests"):
        read_trace(path, 10)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: .*Set workload.trace"):
        read_trace(tmp_path / "nowhere.jsonl", 10)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "binary", 10)


def config(path: Path, **options: Any) -> WorkloadConfig:
    return WorkloadConfig.of(
        {"name": "t", "num_requests": None, "prompt_len": None, "output_len": None, "trace": str(path)} | options
    )


def test_a_trace_becomes_a_workload_whose_missing_ids_come_from_the_seed(tmp_path: Path) -> None:
    path = trace(tmp_path, {"arrival": 1.0, "prompt_token_ids": [5, 6], "output_len": 3}, GOOD)
    one, again, other = draw(config(path), 0, 10), draw(config(path), 0, 10), draw(config(path), 1, 10)
    assert [(item.arrival, len(item.prompt), item.output_len) for item in one.items] == [(0.5, 4, 2), (1.0, 2, 3)]
    assert one.items[1].prompt == other.items[1].prompt == (5, 6)
    assert one.digest == again.digest != other.digest
    assert len(draw(config(path, num_requests=1), 0, 10).items) == 1


def test_whether_a_trace_shares_prefixes_is_seen_in_its_prompts(tmp_path: Path) -> None:
    same = {"arrival": 0.0, "prompt_token_ids": [*range(9)], "output_len": 1}
    assert draw(config(trace(tmp_path, same, same)), 0, 10).shares_prefixes
    assert not draw(config(trace(tmp_path, same, same | {"prompt_token_ids": [1, *range(9)]})), 0, 10).shares_prefixes
