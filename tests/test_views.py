"""`experiments.widgets`: page maps, the watched batch and sources side by side say what is so."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import StepPatch

from common.config import EngineConfig
from common.engine import Engine
from common.errors import ConfigError
from common.request import Request, SamplingParams
from experiments import widgets
from tests.history_runner import HistoryRunner, expected


def make_engine(num_pages: int = 40, **options: int) -> Engine:
    """Pages of 4 tokens, 3 requests at a time, 16 tokens a step."""
    config = EngineConfig(**{"block_size": 4, "max_num_seqs": 3, "max_num_batched_tokens": 16, "max_model_len": 128} | options)
    runner = HistoryRunner(num_pages=num_pages, block_size=4, max_seqs=3)
    return Engine(runner, config, num_pages=num_pages)


def request(name: str, prompt: int, output: int, first: int = 0) -> Request:
    ids = [(first + i) % 60 for i in range(prompt)]
    return Request(request_id=name, prompt_token_ids=ids, params=SamplingParams(temperature=0, max_tokens=output))


# ── pages ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_map_shows_who_holds_what_is_shared_and_what_is_kept() -> None:
    engine = make_engine(num_pages=12)
    engine.run([request("gone", 6, 3, first=50)])  # leaves one full page of two; its last is free again
    engine.add(request("x", 9, 5))
    engine.step()
    engine.add(request("y", 9, 5))  # the same beginning: two full pages
    engine.step()
    shown = widgets.page_map(engine)
    tables = {name: (tokens, pages) for _, name, tokens, pages in shown.tables}
    assert tables["x"][0] == 10 and tables["y"][0] == 9
    assert tables["x"][1][:2] == tables["y"][1][:2] and tables["x"][1][2] != tables["y"][1][2]
    assert shown.marks[0] == "×" and shown.marks.count("#") == 2 and shown.marks.count("+") == 2
    assert shown.marks.count("b") == shown.marks.count("c") == 1 and shown.marks[tables["x"][1][2]] == "b"
    assert len(shown.marks) == 12 and "4 held, 2 kept for their content (+), 5 free" in shown.title


def test_every_page_is_in_both_forms_of_the_map() -> None:
    engine = make_engine(num_pages=40)
    engine.add(request("<b>", 7, 3))
    engine.step()
    shown = widgets.page_map(engine)
    assert repr(shown).splitlines()[1:3] == [" ".join(shown.marks[:32]), " ".join(shown.marks[32:])]
    html = shown._repr_html_()
    assert re.findall(r'title="page (\d+)"', html) == [str(page) for page in range(40)]
    assert "&lt;b&gt;: 7 tokens" in html and "<b>: 7" not in html


# ── the batch ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def states(watched: pd.DataFrame, name: str) -> str:
    """Of one request, a letter a step, from the first step on."""
    mine = watched[watched["request"] == name].set_index("step")["state"].str[:2]
    return " ".join(mine.reindex(range(watched["step"].max() + 1), fill_value="..").tolist())


def test_a_watched_batch_shows_who_joins_waits_and_leaves() -> None:
    asked = [request("a", 4, 3), request("b", 20, 2, first=7), request("c", 2, 2, first=30), request("d", 2, 1, first=40)]
    watched = widgets.watch(make_engine(), asked, arrivals=[0, 1, 1, 2])
    assert states(watched, "a") == "pr de de .."
    assert states(watched, "b") == ".. pr pr de"
    assert states(watched, "c") == ".. wa pr de"
    assert states(watched, "d") == ".. .. wa pr"
    assert watched[watched["request"] == "b"]["tokens"].tolist() == [15, 5, 1]


def test_watching_changes_no_token_and_ends_with_an_idle_engine() -> None:
    engine, asked = make_engine(), [request(str(i), 5 + i, 6, first=9 * i) for i in range(5)]
    watched = widgets.watch(engine, asked)
    assert not engine.has_work
    work = watched.groupby("request")["tokens"].sum().to_dict()
    assert work == {str(i): 5 + i + 6 - 1 for i in range(5)}  # the last token is never fed
    assert isinstance(engine.runner, HistoryRunner) and engine.runner.violations == []
    events = engine.run(asked)  # on the pages that were written meanwhile
    assert all(
        [event.token_id for event in events[r.request_id]] == list(expected(r, vocab_size=64, max_tokens=6).tokens)
        for r in asked
    )


def test_an_engine_that_is_watched_counts_what_it_does() -> None:
    asked = [request(str(i), 8 + i, 12, first=9 * i) for i in range(3)]
    watched, other = make_engine(num_pages=8), make_engine(num_pages=8)
    widgets.watch(watched, asked)
    other.run(asked)
    did = dict(widgets.counters(watched.stats()).rows)
    assert did == dict(widgets.counters(other.stats()).rows)
    assert int(did["steps"]) > 12 and int(did["num_preemptions"]) > 0 and int(did["generation_tokens"]) == 36


def test_a_watched_request_whose_steps_raise_ends_alone() -> None:
    engine = make_engine()
    assert isinstance(engine.runner, HistoryRunner)
    engine.runner.fail_submit = RuntimeError("injected")
    watched = widgets.watch(engine, [request("a", 4, 3)])
    assert not engine.has_work and engine.stats()["num_resets"] == 1
    assert watched["tokens"].tolist() == [4, 4, 1, 1]


def test_a_prompt_of_one_token_is_a_prompt() -> None:
    assert states(widgets.watch(make_engine(), [request("a", 1, 3)]), "a") == "pr de de"


def test_a_preempted_request_is_seen_to_wait_and_to_start_over() -> None:
    engine = make_engine(num_pages=8)
    watched = widgets.watch(engine, [request("old", 8, 12), request("young", 8, 12, first=30)])
    assert engine.scheduler.num_preemptions > 0
    assert "preempted" not in set(watched[watched["request"] == "old"]["state"])
    young = watched[watched["request"] == "young"]["state"]
    changes = young[young != young.shift()].tolist()  # it may be sent back more than once
    assert changes[:4] == ["prompt", "decode", "preempted", "prompt"] and changes[-1] in ("prompt", "decode")
    assert watched["held"].max() <= 7


def test_arrivals_leave_gaps_and_come_in_any_order() -> None:
    watched = widgets.watch(make_engine(), [request("late", 3, 1), request("early", 3, 1, first=9)], arrivals=[3, 0])
    assert watched[["step", "request"]].values.tolist() == [[0, "early"], [3, "late"]]


def test_watching_refuses_a_busy_engine_and_a_wrong_number_of_arrivals() -> None:
    engine = make_engine()
    with pytest.raises(ConfigError, match="arrivals must be one for each of 1 requests, got 2"):
        widgets.watch(engine, [request("a", 3, 1)], arrivals=[0, 1])
    engine.add(request("b", 3, 1))
    with pytest.raises(ConfigError, match="idle"):
        widgets.watch(engine, [request("a", 3, 1)])


def test_the_drawn_batch_has_a_row_for_each_request_and_a_column_for_each_step() -> None:
    watched = widgets.watch(make_engine(), [request("a", 4, 3), request("b", 4, 1, first=9)], arrivals=[0, 1])
    top, bottom = widgets.plot_batch(watched, num_pages=40).axes
    grid = np.ma.filled(top.collections[0].get_array(), np.nan)
    order = list(widgets.STATES)
    np.testing.assert_array_equal(grid, [[order.index("prompt"), order.index("decode"), order.index("decode")],
                                         [np.nan, order.index("prompt"), np.nan]])  # fmt: skip
    assert [label.get_text() for label in top.get_yticklabels()] == ["a", "b"] and top.yaxis_inverted()  # the first is on top
    (held,), (limit,) = bottom.patches, bottom.lines
    assert isinstance(held, StepPatch)
    assert held.get_data()[0].tolist() == watched.groupby("step")["held"].first().tolist()
    assert np.asarray(limit.get_ydata())[0] == 39


# ── tables and sources ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_counters_show_what_was_done_and_not_how_fast() -> None:
    engine = make_engine()
    engine.run([request("a", 5, 3)])
    shown = dict(widgets.counters(engine.stats()).rows)
    assert shown["generation_tokens"] == "3" and shown["prompt_tokens"] == "5"
    assert not any(name.endswith("_seconds") for name in shown)


def test_a_table_reads_well_in_each_form() -> None:
    table = widgets.DisplayTable(
        title="T", sentences=("said & done.",), header=("", "jax"), rows=(("a|b", "1"), ("long <i>", "1,234"))
    )
    assert repr(table).splitlines() == ["T", "said & done.", "            jax", "a|b           1", "long <i>  1,234"]
    assert "| a\\|b | 1 |" in table._repr_markdown_()
    assert "said &amp; done." in table._repr_html_() and "long &lt;i&gt;" in table._repr_html_()


def left(x: int) -> int:
    y = x + 1
    return y


def right(x: int) -> int:
    z = 2
    y = x + z
    return y


def test_sources_stand_side_by_side_line_by_line() -> None:
    both = widgets.beside(left, right)
    assert [same for *_, same in both.pairs()] == [False, False, False, True]
    assert both.pairs()[-1] == ("    return y", "    return y", True)
    assert [x for x, *_ in both.pairs() if x] == list(both.left) and [y for _, y, _ in both.pairs() if y] == list(both.right)
    assert "-&gt; int" in both._repr_html_() and both._repr_html_().count("opacity") == 1
