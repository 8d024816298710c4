"""`experiments.report.charts`, `timeline` and `canvas`: the numbers that are drawn, their bounds, and what every figure keeps
to."""

import itertools
import math
import re
import xml.etree.ElementTree as xml
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from experiments.report import timeline
from experiments.report.charts import canvas
from experiments.report.charts.agreement import thinned
from experiments.report.charts.latency import curves, distribution, percentile_99, samples_ms
from experiments.report.charts.ratio import ratio
from experiments.report.charts.roofline import roofline
from experiments.report.charts.scatter import scatter
from experiments.report.page import Drawing
from tests.synthetic_run import HOSTILE, simulate

SVG = "{http://www.w3.org/2000/svg}"


def frame(rows: list[dict[str, Any]], engine: str = "jax", block: int = 0) -> pd.DataFrame:
    whole = [{"scheduled": row.get("sent"), "started": row.get("sent")} | row for row in rows]
    return pd.DataFrame(whole).assign(engine=engine, block=block, ok=True)


def a_drawing(title: str = "A title", name: str = "one") -> Drawing:
    return canvas.draw(name, title, "What is to be seen", lambda axes: axes.plot([0, 1], [2, 3]), x="x", y="y")


def linear(colour: str) -> np.ndarray:
    """Linear sRGB, float64[3]."""
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


PROTANOPE = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
DEUTERANOPE = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
"""How they see linear sRGB: Machado, Oliveira & Fernandes 2009, doi:10.1109/TVCG.2009.113."""
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear sRGB."""
    x, y, z = np.cbrt(XYZ @ np.clip(rgb, 1e-6, 1) / XYZ.sum(1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize(
    "sight", [np.eye(3), np.array(PROTANOPE), np.array(DEUTERANOPE)], ids=["all", "protanope", "deuteranope"]
)
def test_the_colours_of_engines_are_told_apart_by_the_colour_blind(sight: np.ndarray) -> None:
    for colours in (canvas.ENGINES, [canvas.DARK[engine] for engine in canvas.ENGINES]):
        seen = [lab(sight @ linear(colour)) for colour in colours]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 12  # about 2 can just be noticed


def contrast(one: str, other: str) -> float:
    """Of WCAG 2: the ratio of relative luminances."""

    low, high = sorted(float(XYZ[1] @ linear(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def test_text_and_marks_stand_out_from_the_paper_in_light_and_dark() -> None:
    for theme in ({colour: colour for colour in canvas.DARK}, canvas.DARK):
        for text in (canvas.INK, canvas.MUTED):
            assert contrast(theme[text], theme[canvas.PAPER]) >= 4.5
        for engine in canvas.ENGINES:
            assert contrast(theme[engine], theme[canvas.PAPER]) >= 3


def test_an_svg_says_what_it_shows_and_takes_its_colours_from_the_page() -> None:
    drawing = a_drawing("Title & <b>")
    root = xml.fromstring(drawing.svg)
    assert (root.get("role"), root.get("aria-labelledby")) == ("img", "one-title one-alt")
    assert root.findtext(f"{SVG}title") == "Title & <b>" and root.findtext(f"{SVG}desc") == "What is to be seen"
    assert "var(--ink)" in drawing.svg and not any(colour in drawing.svg for colour in canvas.DARK)
    assert "prefers-color-scheme:dark" in canvas.standalone(drawing.svg) and xml.fromstring(canvas.standalone(drawing.svg))
    assert drawing.png.startswith(b"\x89PNG")


def test_two_figures_of_a_page_share_no_id() -> None:
    ids = [set(re.findall(r'\bid="([^"]+)"', a_drawing(name=name).svg)) for name in ("one", "two")]
    assert ids[0] and not ids[0] & ids[1]
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', a_drawing(name="one").svg))
    assert used and used <= ids[0]


@pytest.mark.parametrize("title", [HOSTILE, "$x_1^2$ and \\frac{1}{2", "日本"])
def test_any_label_is_drawn_as_it_stands(title: str) -> None:
    root = xml.fromstring(a_drawing(title).svg)
    assert any(text.text == title for text in root.iter(f"{SVG}text"))


def test_a_curve_is_the_share_of_samples_at_or_below() -> None:
    axes = Figure().subplots()
    samples = np.random.default_rng(1).lognormal(1, 1, 9999)
    curves(axes, {"a": np.array([3.0, 1.0, 2.0, 2.0]), "b": samples})
    few, many = axes.get_lines()
    assert list(few.get_xdata()) == [1, 1, 2, 2, 3] and list(few.get_ydata()) == [0, 0.25, 0.5, 0.75, 1]
    x, y = np.array(many.get_xdata()), np.array(many.get_ydata())
    assert len(x) <= canvas.POINTS + 1
    assert np.abs((samples[:, None] <= x[1:]).mean(0) - y[1:]).max() <= 1 / len(samples)


def test_latencies_are_those_of_the_definitions() -> None:
    rows = frame([{"sent": 1.0, "times": [1.5, 1.75, 2.5]}, {"sent": 0.0, "times": [2.0]}])
    samples = samples_ms(rows, ["jax", "torch"])
    values = {what: list(samples[what]["jax"]) for what in ("ttft", "tpot", "itl", "e2el")}
    assert values == {"ttft": [500, 2000], "tpot": [500], "itl": [250, 750], "e2el": [1500, 2000]}
    assert len(samples["itl"]["torch"]) == 0


def test_a_p99_of_few_samples_is_not_given() -> None:
    assert percentile_99(np.arange(99.0)) == "too few"
    assert percentile_99(np.arange(101.0)) == "99.00"


def test_a_point_under_the_roofline_is_where_its_shares_put_it() -> None:
    limits = {"read_bytes_per_s": 1e10, "float32_flops_per_s": 1e11}
    limits = {"before": limits, "after": limits | {"read_bytes_per_s": 2e10}}
    mine = {"intensity": 2.0, "mfu": 0.2, "roofline": 0.7, "decode_intensity": 0.6, "limits": limits}
    mine["block_read_bytes_per_s"] = [1e10, None]
    drawing = roofline({"jax": mine}, "float32")
    assert drawing is not None and drawing.table is not None
    assert drawing.table.rows == [("jax", "whole run", "2.000", "20.00", "70.0%")]  # as in the table of figures
    assert "The roof is 20.00 GB/s up to 5.000 FLOP a byte" in drawing.alt
    faster = roofline({"jax": mine | {"block_read_bytes_per_s": [4e10]}}, "float32")
    assert faster is not None and "The roof is 40.00 GB/s up to 2.500 FLOP a byte" in faster.alt
    assert roofline({"jax": mine | {"limits": None}}, "float32") is None
    assert roofline({"jax": mine | {"intensity": None}}, "float32") is None
    without = roofline({"a_server": {"limits": limits}, "jax": mine}, "float32")  # which tells nothing of its steps
    assert without is not None and "a_server" not in without.svg and "jax" in without.svg


def test_alive_counts_the_intervals_that_hold_each_time() -> None:
    rng = np.random.default_rng(2)
    start = rng.random(500) * 8
    end = start + rng.random(500)
    at, counts = timeline.alive(start, end, 9.0)
    assert list(counts) == [int(((start <= t) & (t < end)).sum()) for t in at]


def test_a_ratio_shows_its_interval_or_says_that_it_has_none_and_what_is_called_equivalent() -> None:
    found: dict[str, Any] = {"ratio": 1.1, "low": None, "high": None, "block_ratios": [1.1], "verdict": "undecided"}
    drawings = [
        drawing
        for drawing in (
            ratio({"torch": found}, ["jax", "torch"], 0.05),
            ratio({"torch": found | {"low": 1.0, "high": 1.2}}, ["jax", "torch"], 0.075),
        )
        if drawing
    ]
    alts, svgs = ([getattr(drawing, name) for drawing in drawings] for name in ("alt", "svg"))
    assert "the band is within a factor of 1.05" in svgs[0] and "the band is within a factor of 1.075" in svgs[1]
    assert "torch 1.100, no interval" in alts[0] and "torch 1.100, interval 1.000 to 1.200" in alts[1]
    assert [">all<" in svg for svg in svgs] == ["the ratio of all" in alt for alt in alts] == [False, True]


def test_points_of_different_settings_are_named_and_have_no_middle() -> None:
    points = {"jax": ([1.0, math.nan, 3.0], [4.0, 5.0, 6.0])}
    named = scatter("a", "A", points, x="x", y="y", each="size", names={"jax": ["8", "16", "32"]})
    blocks = scatter("a", "A", points, x="x", y="y", each="block")
    assert named is not None and named.table is not None and blocks is not None
    assert [row[:2] for row in named.table.rows] == [("jax", "8"), ("jax", "32")] and named.table.columns[1] == "size"
    assert "middle" not in named.alt and "In the middle, jax: 2.000 x at 5.000 y" in blocks.alt


def test_thinning_keeps_the_mean_and_bounds_the_points() -> None:
    xs = np.arange(90_000.0)
    thin_xs, thin_ys = thinned(xs, np.sin(xs) + 5)
    assert len(thin_xs) == len(thin_ys) == canvas.POINTS and thin_ys.mean() == pytest.approx((np.sin(xs) + 5).mean())
    assert thinned(xs[:7], xs[:7])[0] is not None and len(thinned(xs[:7], xs[:7])[0]) == 7


def test_a_figure_of_ten_thousand_requests_is_no_larger_than_one_of_few() -> None:
    rows, steps = simulate(np.random.default_rng(0), 10_000, 0.2, 3)
    table, until = frame(rows), rows[-1]["times"][-1]
    drawings = [
        timeline.timeline(table, 0, "jax", until),
        timeline.batch(pd.DataFrame(steps), table, 0, "jax", until),
        timeline.occupancy(pd.DataFrame(steps), table, 0, "jax", until),
        distribution("itl", "ITL", samples_ms(table, ["jax"])["itl"]),
    ]
    for drawing in drawings:
        assert drawing is not None and len(drawing.svg) < 150_000


def test_what_steps_tell_is_averaged_over_time_and_holds_while_any_request_is_in_flight() -> None:
    steps = pd.DataFrame({"submitted": [0.0, 1.001, 6.0], "landed": [1.0, 3.0, 7.5], "running": [2, 4, 6]})
    rows = frame([{"sent": 0.0, "times": [1.0, 3.0]}, {"sent": 0.5, "times": [4.0]}, {"sent": 6.0, "times": [7.5]}])
    edges, values = timeline.over_time(steps, rows, "running", 9.0)
    assert len(edges) == len(values) + 1 == canvas.POINTS + 1
    at = lambda t: values[np.searchsorted(edges, t) - 1]  # noqa: E731
    assert [at(t) for t in (0.5, 2.5, 3.5, 4.5, 7.0, 8.5)] == pytest.approx([2, 4, 4, 0, 6, 0])
    assert values.mean() * 9 == pytest.approx(2 * 1.001 + 4 * 2.999 + 6 * 1.5)  # no time is lost, however wide the spans
    alone = timeline.over_time(steps, frame([{"sent": 0.0, "times": []}]), "running", 9.0)[1]
    assert alone.mean() * 9 == pytest.approx(2 * 1 + 4 * 1.999 + 6 * 1.5)  # where no request tells, in steps


def test_requests_are_bars_until_there_are_too_many() -> None:
    rows, _ = simulate(np.random.default_rng(0), canvas.BARS + 1, 1.0, 5)
    few, many = (timeline.timeline(frame(rows[:count]), 2, "jax", 1.0) for count in (10, canvas.BARS + 1))
    assert few is not None and "one bar for each request" in few.svg
    assert many is not None and "one bar for each request" not in many.svg


def test_an_engine_that_does_not_tell_has_no_figure_of_its_steps() -> None:
    steps = pd.DataFrame(
        {"submitted": [0.0, 0.1], "landed": [0.1, 0.2], "tokens": [3, 4], "running": [None, None], "pages_used": [1, 2]}
    )
    rows = frame([{"sent": 0.0, "times": [0.1]}])
    assert timeline.batch(steps, rows, 0, "hf", 1.0) is None and timeline.occupancy(steps, rows, 0, "hf", 1.0) is None
    assert timeline.batch(pd.DataFrame(columns=["landed", "running"]), rows, 0, "hf", 1.0) is None
    assert timeline.timeline(frame([{"sent": 0.0, "scheduled": 0.0, "times": []}]), 0, "hf", 1.0) is None


def test_an_engine_has_one_colour_in_all_figures_and_can_be_told_without_it() -> None:
    looks = [(canvas.colour(i), canvas.marker(i)) for i in range(7)]
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in itertools.combinations(looks, 2))
    rows, _ = simulate(np.random.default_rng(0), 5, 1.0, 5)
    variable = canvas.VARIABLES[canvas.colour(1)]
    drawing = timeline.timeline(frame(rows), 1, "torch", 1.0)
    curve = distribution("ttft", "TTFT", samples_ms(frame(rows, "torch"), ["jax", "torch"])["ttft"])
    assert drawing is not None and curve is not None
    assert f"var({variable})" in drawing.svg and f"var({variable})" in curve.svg and 'class="engine-1"' in curve.svg


def test_ticks_are_short() -> None:
    assert [canvas.tick(v) for v in (0, 0.05, 12, 3500, 12_000, 2e6, 1e11, 2e-9)] == [
        "0", "0.05", "12", "3500", "12k", "2M", "100G", "2e-09",
    ]  # fmt: skip
