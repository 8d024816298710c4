"""Intervals of latencies: by hand, and how often they cover the truth in simulated runs of fixed seeds."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from experiments.load.driver import Row, Window
from experiments.measure.blocks import PRECISION, tail
from experiments.metrics.latency import HEADLINED, block_percentiles, intervals, ratios
from experiments.metrics.statistics import estimate
from experiments.report.figures_table import figure, latency_times
from experiments.report.notes import interval_notes
from tests.test_statistics import AS_SHIPPED, blocks_of, many, noise


def window(first: np.ndarray, gap: float, late: float = 0.0) -> Window:
    """Requests due at 0, sent `late`, with four tokens each."""
    rows = tuple(
        Row(
            request_id=str(i),
            prompt_len=4,
            output_len=4,
            scheduled=0.0,
            sent=late,
            times=tuple(start + gap * k for k in range(4)),
            tokens=(1, 2, 3, 4),
        )
        for i, start in enumerate(first.tolist())
    )
    return Window(rows, 10.0)


def test_a_percentile_is_taken_in_each_block_from_the_due_time() -> None:
    firsts = [np.linspace(0.1, 0.3, 100), np.linspace(0.2, 0.6, 100)]
    found = block_percentiles([window(first, 0.01, late=0.05) for first in firsts])
    assert found["median_ttft_ms"] == pytest.approx([200, 400])
    assert found["p99_e2el_ms"] == pytest.approx([1e3 * (np.percentile(first, 99) + 0.03) for first in firsts])
    assert [*found["median_itl_ms"], *found["median_tpot_ms"]] == pytest.approx([10] * 4)
    few = block_percentiles([window(firsts[0][:99], 0.01)])
    assert few["p99_ttft_ms"] == few["p99_e2el_ms"] == [None]  # the greatest of 99 samples is no p99
    assert few["p99_itl_ms"] == pytest.approx([10]) and few["median_ttft_ms"][0]


def test_the_interval_is_of_blocks_and_a_ratio_is_paired() -> None:
    drift = (0.1, 0.4, 0.2, 0.8)
    engines = {
        label: block_percentiles([window(np.full(32, factor * each), 0.01) for each in drift])
        for label, factor in (("a", 1.0), ("b", 1.5))
    }
    mine, paired = intervals(engines["a"], 0.95), ratios(engines, "a", 0.95)
    low, high = mine["median_ttft_ms"].low, mine["median_ttft_ms"].high
    assert low and high and low < 200 and high > 400  # the drift is in the engine's own interval, ...
    ttft = paired["b"]["median_ttft_ms"]
    assert (ttft.value, ttft.low, ttft.high) == pytest.approx((1.5, 1.5, 1.5)) and ttft.blocks == 4  # ... not in the ratio
    assert paired["b"]["p99_ttft_ms"].low is None and "100 samples" in paired["b"]["p99_ttft_ms"].why
    short = {label: {key: values[:2] for key, values in blocks.items()} for label, blocks in engines.items()}
    told = ratios(short, "a", 0.95)["b"]["median_ttft_ms"]
    assert (told.value, told.low, told.why) == (pytest.approx(1.5), None, "fewer than 3 blocks")
    assert ratios(engines, "a", 0.95, tail=0.6)["b"].keys() == HEADLINED.keys()


def test_tables_show_the_interval_or_why_there_is_none() -> None:
    blocks = block_percentiles([window(np.full(32, each), 0.01) for each in (0.86, 0.88, 0.9)])
    figures: dict[str, Any] = {"median_ttft_ms": 880.0, "p99_ttft_ms": 880.0, "unsupported": ["p99_ttft_ms"]}
    figures["latency_intervals"] = {key: asdict(each) for key, each in intervals(blocks, 0.95).items()}
    assert figure("median_ttft_ms", figures) == "880.0 (831.5–931.0)"
    assert figure("p99_ttft_ms", figures) == "(880.0)"
    notes = list(interval_notes({"a": figures}))
    assert notes[0].startswith("latency (low–high): 95 % interval") and len(notes) == 1
    assert list(interval_notes({"a": figures | {"unsupported": []}}))[1].startswith("no interval: a p99 needs 100 samples in a")
    alone = {key: asdict(each) for key, each in intervals({"median_ttft_ms": [1.0]}, 0.95).items()}
    one = {"median_ttft_ms": 1.0, "latency_intervals": alone}
    assert list(interval_notes({"a": one})) == ["no intervals of latencies: fewer than 3 blocks"]
    paired = {key: asdict(each) for key, each in ratios({"a": blocks, "b": blocks}, "a", 0.95)["b"].items()}
    rows = latency_times(HEADLINED, {"b": {"latencies": paired}}, ["a", "b"])
    assert rows[0] == ("TTFT median", "1", "1.000 (1.000–1.000)")


@pytest.mark.parametrize("percent", [50, 99])
def test_the_interval_of_a_percentile_covers_the_truth_in_94_to_96_runs_of_100(percent: int) -> None:
    """The true ratio is 0.9. Requests vary by a half and share the disturbance of their window."""
    runs, blocks, requests = 1500, 6, 120
    rng = np.random.default_rng(percent)
    logs = 0.5 * rng.standard_normal((runs, blocks, 2, requests)) + 0.05 * rng.standard_normal((runs, blocks, 2, 1))
    own = np.percentile(logs, percent, axis=3)  # of the logarithms, which keep the order
    apart = own[..., 1] - own[..., 0] + np.log(0.9)
    hold([estimate(each, 0.95, 0.95, "") for each in apart], 0.9, runs)


@pytest.mark.accept
@pytest.mark.parametrize("kind", ["normal", "ar 0.7", "bursts 1.5", "rhythm 4x5"])
@pytest.mark.parametrize("shared", [0.0, 0.7, 1.0])
def test_a_run_that_its_throughputs_end_covers_the_ratio_of_its_latencies(kind: str, shared: float) -> None:
    """The default rule ends each run. Latencies have the share `shared` of their noise in common with throughputs.

    A run that ends early has intervals of 97 %, because its throughputs are selected to vary little. Latencies are selected
    only as far as they vary with throughputs. Otherwise their intervals are wider than they need be, by design.
    """
    runs, scale = 4000, 0.025
    rng = np.random.default_rng(4)
    speed, own = (noise(kind, scale, runs, 2 * AS_SHIPPED.max_blocks, rng) for _ in range(2))
    mixed = np.stack([speed, -shared * speed + np.sqrt(1 - shared**2) * own])
    speeds, slowness = (blocks_of(mixed[i], 0.1 * i, np.random.default_rng(5)) for i in range(2))
    found = []
    for i, blocks in enumerate(many(speeds, flips=False)[3].tolist()):
        stopped = PRECISION if blocks < AS_SHIPPED.max_blocks else "measure.max_blocks"
        inner = 1 - 0.05 * tail(AS_SHIPPED, 1, blocks, stopped)
        found.append(estimate(slowness[i, :blocks], inner, 0.95, ""))
    hold(found, float(np.exp(0.1)), runs, high=0.96 if shared == 1 else 0.97)


def hold(found: list[Any], truth: float, runs: int, high: float = 0.96) -> None:
    """Expect that 94 % to `high` of the intervals cover the truth, within two standard errors of the simulation."""
    covered = np.mean([each.low <= truth <= each.high for each in found])
    slack = 2 * np.sqrt(0.05 * 0.95 / runs)
    assert 0.94 - slack <= covered <= high + slack, covered
