"""`experiments.handover`: pages of every pair of backends come over, and what it says of them adds up."""

from __future__ import annotations

import json
import sys

import pytest

from common.config import EngineConfig
from experiments import handover
from experiments.handover import Pool, check
from tests.backends import BACKENDS


@pytest.mark.parametrize("kernels", ["native", "framework"])
def test_each_pair_of_backends_hands_over_pages_as_they_lie(
    kernels: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["handover", "--model", "tiny-llama", "--tokens", "100", "--times", "1", "--kernels", kernels]
    monkeypatch.setattr(sys, "argv", words)
    handover.main()
    table, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    rows = json.loads(last)["handover"]
    assert [(row["from"], row["to"]) for row in rows] == [(a, b) for a in BACKENDS for b in BACKENDS]
    assert "memory copy" in table and {row["form"] for row in rows} == {f"{kernels} bfloat16 16"}
    copies = [row["copy_bytes_per_s"] for row in rows]
    assert ("The machine was not the same" in table) == (max(copies) > handover.STEADY * min(copies))
    for row in rows:
        apart = 1 / row["fetch_bytes_per_s"] + 1 / row["write_bytes_per_s"]
        assert row["handover_bytes_per_s"] * apart == pytest.approx(1)
        assert row["share"] == pytest.approx(row["handover_bytes_per_s"] / row["copy_bytes_per_s"])


def test_pages_that_are_not_those_that_were_held_are_noticed() -> None:
    from common.weights import zoo

    pool = Pool("torch", str(zoo.resolve("tiny-llama")), EngineConfig(kernels="native", device="cpu", threads=1), 40)
    with pytest.raises(RuntimeError, match="are not those that were held"):
        check(pool)
    pool.fill()
    check(pool)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "nosuch"], "nosuch"),
        (["--times", "0"], "--times must be 1 or more, got 0"),
        (["--tokens", "-3"], "--tokens must be 1 or more, got -3"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["handover", *words])
    with pytest.raises(SystemExit) as exit:
        handover.main()
    assert exit.value.code == 2 and said in capsys.readouterr().err
