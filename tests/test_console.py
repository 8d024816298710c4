"""What people are told is told as it stands: a message, a path or an override may hold what looks like rich's markup."""

from __future__ import annotations

import pandas as pd
import pytest

from experiments.console import Narrator, print_table
from experiments.sweep import print_sweep

HOSTILE = "a template with [INST] but no [/INST]"


def test_a_failure_is_told_word_by_word(capsys: pytest.CaptureFixture[str]) -> None:
    with Narrator() as narrator:
        narrator.alarm(HOSTILE)
        narrator.say(HOSTILE)
    assert capsys.readouterr().err.count(HOSTILE) == 2


def test_a_title_is_printed_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(f"/models/{HOSTILE}", {"jax": {"completed": 1, "contaminated": [HOSTILE]}})
    assert capsys.readouterr().out.count(HOSTILE) == 2


def test_an_override_that_is_a_list_shows_in_the_table_of_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    table = pd.DataFrame([{"job": 0, "engine": "jax", "engines": "[jax,torch]", "runs": "[/x]", "status": "ok"}])
    table.attrs["swept"] = ["engines", "runs"]
    print_sweep("runs/sweeps/[/y]", table)
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[jax,torch]", "[/x]", "runs/sweeps/[/y]"))
