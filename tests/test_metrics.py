"""Figures from rows, steps and counters: definitions, what is not told, and what spoils a measurement."""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.step_log import StepRecord
from experiments.load.driver import Row, Window
from experiments.load.workload import Slo
from experiments.metrics.metrics import block_contaminations, contaminations, counters, summarize, unsure
from experiments.metrics.phases import steady_part


def row(sent: float, times: tuple[float, ...], asked: int | None = None) -> Row:
    return Row(
        request_id="0",
        prompt_len=10,
        output_len=asked or len(times),
        scheduled=sent,
        sent=sent,
        times=times,
        tokens=tuple(range(len(times))),
    )


def test_figures_follow_their_definitions() -> None:
    windows = [Window((row(0.1, (0.3, 0.4, 0.8)), row(0.0, (0.5,))), 1.0), Window((row(0.0, (0.2, 0.6)),), 3.0)]
    figures = summarize(windows)
    assert figures["duration"] == 4.0
    assert (figures["completed"], figures["failed"]) == (3, 0)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (30, 6)
    assert figures["output_throughput"] == 6 / 4
    assert figures["total_token_throughput"] == 36 / 4
    assert figures["request_throughput"] == 3 / 4
    assert figures["block_output_throughput"] == [4 / 1, 2 / 3]
    assert figures["mean_ttft_ms"] == pytest.approx(1e3 * (0.2 + 0.5 + 0.2) / 3)
    assert figures["median_ttft_ms"] == pytest.approx(200)
    assert figures["mean_tpot_ms"] == pytest.approx(1e3 * (0.25 + 0.4) / 2)  # a request of one token has none
    assert figures["mean_itl_ms"] == pytest.approx(1e3 * (0.1 + 0.4 + 0.4) / 3)
    assert figures["p99_itl_ms"] == pytest.approx(np.percentile([100, 400, 400], 99))
    assert figures["std_e2el_ms"] == pytest.approx(np.std([700, 500, 600]))


def test_failed_requests_are_counted_and_left_out_of_the_rest() -> None:
    figures = summarize([Window((row(0.0, (0.1, 0.2)), row(0.0, (0.1,), asked=9)), 1.0)])
    assert (figures["completed"], figures["failed"], figures["output_throughput"]) == (1, 1, 2.0)


def test_a_figure_without_a_sample_is_none() -> None:
    figures = summarize([Window((row(0.0, (0.1,)),), 1.0)])
    assert figures["mean_tpot_ms"] is None and figures["p99_itl_ms"] is None
    assert summarize([Window((), 0.0)])["output_throughput"] is None


def test_counters_become_rates() -> None:
    stats = {
        "steps": 4,
        "host_seconds": 0.002,
        "driver_seconds": 0.01,
        "log_seconds": 0.02,
        "communication_bytes": 2**22,
        "prefix_cache_queries": 10,
        "prefix_cache_hits": 5,
        "compilations": 1,
    }
    figures = summarize([Window((), 1.0, stats), Window((), 1.0, stats | {"prefix_cache_hits": 0})])
    assert figures["num_steps"] == 8
    assert figures["host_ms_per_step"] == pytest.approx(0.5) and figures["harness_overhead_share"] == pytest.approx(0.03)
    assert figures["communication_mib_per_step"] == 1 and figures["communication_ms_per_step"] is None
    assert figures["prefix_cache_hit_rate"] == 0.25
    assert figures["compilations_in_window"] == 2


def test_what_spoils_a_measurement_is_named() -> None:
    clean = summarize([Window((row(0.0, (0.1,)),), 1.0)])
    assert contaminations(clean, shares_prefixes=False) == []
    spoilt = clean | {"compilations_in_window": 3, "prefix_cache_hit_rate": 0.5, "num_resets": 1, "failed": 2}
    assert len(contaminations(spoilt, shares_prefixes=False)) == 4
    assert len(contaminations(spoilt, shares_prefixes=True)) == 3


def test_a_busy_machine_is_noticed() -> None:
    def figures(foreign: float) -> dict[str, Any]:
        return summarize([Window((row(0.0, (0.1,)),), 10.0, {"foreign_cpu_seconds": foreign, "watched_seconds": 10.0})])

    processors = os.cpu_count() or 1
    assert figures(2.0)["foreign_cpu_share"] == pytest.approx(2.0 / 10 / processors)
    assert contaminations(figures(0.04 * 10 * processors), shares_prefixes=False) == []
    assert "other programs used 50%" in contaminations(figures(0.5 * 10 * processors), shares_prefixes=False)[0]


# From the schedule, and queues.


def test_latencies_count_from_the_time_when_a_request_is_due() -> None:
    late = replace(row(0.3, (0.5, 0.9)), scheduled=0.1, started=0.35)
    figures = summarize([Window((late,), 1.0)])
    assert figures["mean_queue_ms"] == pytest.approx(200)
    assert figures["mean_admission_ms"] == pytest.approx(50)
    for name, due, sent in (("ttft", 400, 200), ("e2el", 800, 600)):
        assert figures[f"mean_{name}_ms"] == figures[f"mean_{name}_from_schedule_ms"] == pytest.approx(due)
        assert figures[f"mean_{name}_from_sent_ms"] == pytest.approx(sent)


def test_when_an_engine_does_not_tell_when_it_began_there_is_no_admission_time() -> None:
    assert summarize([Window((row(0.0, (0.1,)),), 1.0)])["mean_admission_ms"] is None


def test_percentiles_of_too_few_samples_are_given_and_named() -> None:
    few = summarize([Window(tuple(row(0.0, (0.1, 0.1 + n / 10)) for n in range(1, 13)), 2.0)])
    assert few["p50_ttft_ms"] == pytest.approx(100) and few["p99_ttft_ms"] is not None
    assert "p99_ttft_ms" in few["unsupported"] and "p99_itl_ms" in few["unsupported"]
    assert "p90_ttft_ms" not in few["unsupported"] and "p50_ttft_ms" not in few["unsupported"]
    assert "p99_admission_ms" not in few["unsupported"]  # it has no sample and no figure
    assert summarize([Window(tuple(row(0.0, (0.1, 0.2)) for _ in range(100)), 2.0)])["unsupported"] == []
    assert "p90_ttft_ms" in summarize([Window((row(0.0, (0.1,)),) * 9, 1.0)])["unsupported"]


# Goodput.


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(ttft_ms=150), 2),
        (Slo(ttft_ms=99), 0),
        (Slo(tpot_ms=100), 2),  # of the one with a single token nothing is asked
        (Slo(e2el_ms=150), 1),
        (Slo(ttft_ms=150, tpot_ms=100), 1),
        (Slo(ttft_ms=1e9), 3),
    ],
)
def test_goodput_counts_requests_that_meet_every_limit(slo: Slo, good: int) -> None:
    rows = (row(0.0, (0.1,)), row(0.0, (0.1, 0.4)), row(0.0, (0.2, 0.25)), row(0.0, (0.1,), asked=2))  # the last one failed
    figures = summarize([Window(rows, 2.0)], slo)
    assert figures["goodput"] == good / 2.0
    assert figures["slo"] == {name: limit for name, limit in vars(slo).items() if limit is not None}


def test_goodput_is_measured_from_when_a_request_was_due() -> None:
    late = replace(row(0.3, (0.4,)), scheduled=0.0)
    assert summarize([Window((late,), 1.0)], Slo(ttft_ms=200))["goodput"] == 0.0


def test_without_limits_there_is_no_goodput() -> None:
    figures = summarize([Window((row(0.0, (0.1,)),), 1.0)])
    assert figures["goodput"] is None and figures["slo"] is None


# The steady state.


def test_the_steady_state_is_when_nearly_all_users_have_a_request_in_flight() -> None:
    rows = (row(0.0, (1.0, 2.0, 4.0)), row(1.0, (2.0, 3.0)))  # two in flight from 1 to 3, and three tokens seen in that time
    assert steady_part(rows, None) == (3, 2.0)
    assert steady_part(rows, 2) == (3, 2.0)
    assert steady_part(rows, 3) == (0, 0.0)  # three users never were
    figures = summarize([Window(rows, 4.0), Window(rows, 4.0)], concurrency=2)
    assert figures["steady_output_throughput"] == 1.5 and figures["steady_share"] == 0.5


def test_a_user_between_two_requests_does_not_interrupt_the_steady_state() -> None:
    back_to_back = (row(0.0, (0.5, 1.0)), row(1.0, (1.5, 2.0)), row(0.0, (1.0, 2.0)))
    assert steady_part(back_to_back, 2) == (6, 2.0)


def test_one_of_ten_may_be_missing() -> None:
    rows = tuple(row(0.0, (1.0, 2.0)) for _ in range(9))
    assert steady_part(rows, 10) == (18, 2.0) and steady_part(rows, 11) == (0, 0.0)


def test_a_peak_of_a_moment_is_no_steady_state() -> None:
    rows = (row(0.0, (5.0,)), row(5.0 - 0.1, (10.0,)))
    figures = summarize([Window(rows, 10.0)])
    assert figures["steady_share"] == pytest.approx(0.01) and figures["steady_output_throughput"] is None


def test_without_a_token_nothing_is_steady() -> None:
    figures = summarize([Window((row(0.0, (), asked=3),), 1.0)])
    assert (figures["steady_share"], figures["steady_output_throughput"]) == (0.0, None)


# Steps.


def step(begin: float, end: float, counts: list[int], **load: int) -> StepRecord:
    by_seq = np.array(counts, np.int32)
    told = {"prompt_tokens": 0, "running": len(counts), "waiting": 0, "pages_used": 5, "pages_total": 10, "pages_empty": 0}
    return StepRecord(begin, end, len(counts), by_seq, by_seq, by_seq, **(told | load))


def test_pure_decode_is_what_steps_without_prompts_give_in_their_time() -> None:
    steps = (
        step(0.0, 1.0, [30], prompt_tokens=30),
        step(1.0, 1.5, [1, 1]),
        step(1.6, 2.0, [1, 1, 1]),
        step(2.0, 9.0, [1, 9], prompt_tokens=9),
    )
    figures = summarize([Window((), 9.0, steps=steps)])
    assert figures["decode_throughput"] == pytest.approx(5 / 0.9)
    only_prompts = summarize([Window((), 9.0, steps=steps[:1])])
    assert only_prompts["decode_throughput"] is None


def test_occupancy_is_averaged_over_time_and_peaks_are_peaks() -> None:
    steps = (step(0.0, 3.0, [1], pages_used=2, pages_empty=1), step(3.0, 4.0, [1, 1, 1], pages_used=10, pages_empty=5))
    figures = summarize([Window((), 4.0, steps=steps)])
    assert (figures["mean_running"], figures["peak_running"]) == (pytest.approx(1.5), 3)
    assert figures["mean_pages_used_share"] == pytest.approx(0.2 * 0.75 + 1.0 * 0.25)
    assert figures["mean_pages_empty_share"] == pytest.approx(0.1 * 0.75 + 0.5 * 0.25)
    assert figures["peak_pages_used_share"] == 1.0


def test_an_engine_that_does_not_tell_its_steps_has_no_figures_of_them() -> None:
    figures = summarize([Window((), 1.0)])
    assert figures["decode_throughput"] is figures["mean_running"] is figures["mean_pages_empty_share"] is None


# What is not told.


def test_what_nobody_counted_is_none_and_never_0() -> None:
    figures = summarize([Window((row(0.0, (0.1,)),), 1.0)])
    for name in (
        *("num_steps", "num_preemptions", "compilations_in_window", "prefix_cache_hit_rate", "foreign_cpu_share"),
        *("major_faults", "swapped_out_mib", "throttled_share", "thermal_throttles", "clock_limit_drop_mhz"),
        *("joules", "joules_per_token", "harness_overhead_share", "prompts_handed_over", "prompts_recomputed"),
    ):
        assert figures[name] is None, name
    assert contaminations(figures, shares_prefixes=False) == []


def test_a_counter_that_one_window_lacks_is_not_told_of_their_sum() -> None:
    one, other = Window((), 1.0, {"joules": 5.0, "major_faults": 1}), Window((), 1.0, {"major_faults": 2})
    figures = summarize([one, other])
    assert figures["joules"] is None and figures["major_faults"] == 3


def test_energy_by_token() -> None:
    figures = summarize([Window((row(0.0, (0.1, 0.2)),), 1.0, {"joules": 30.0, "joules_cpu": 30.0})])
    assert (figures["joules"], figures["joules_cpu"], figures["joules_gpu"], figures["joules_per_token"]) == (30, 30, None, 15)


def test_the_share_of_others_is_never_above_all_there_is() -> None:
    foreign = {"foreign_cpu_seconds": 0.02 * (os.cpu_count() or 1), "watched_seconds": 0.005}  # two ticks in half a tick
    assert summarize([Window((), 0.005, foreign)])["foreign_cpu_share"] == 1.0


# Guards.

CLEAN: dict[str, Any] = {"duration": 10.0, "failed": 0}


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"compilations_in_window": 3}, "3 compilations"),
        ({"num_resets": 1}, "1 steps raised"),
        ({"failed": 2}, "2 requests failed"),
        ({"foreign_cpu_share": 0.5}, "other programs used 50%"),
        ({"swapped_out_mib": 12.5}, "12.5 MiB of the engine's memory were swapped out"),
        ({"major_faults": 5000}, "5000 pages were read from disk"),
        ({"throttled_share": 0.2}, "a CPU quota held the engine back for 20%"),
        ({"thermal_throttles": 4}, "slowed down 4 times"),
        ({"clock_limit_drop_mhz": 800.0}, "lowered by 800 MHz"),
        ({"prefix_cache_hit_rate": 0.5}, "50% of prompt tokens came from a cache"),
    ],
)
def test_each_guard_names_what_spoilt_a_measurement(figures: dict[str, Any], said: str) -> None:
    (reason,) = contaminations(CLEAN | figures, shares_prefixes=False)
    assert said in reason
    assert contaminations(CLEAN | dict.fromkeys(figures, 0), shares_prefixes=False) == []


def test_other_programs_beside_a_short_time_are_a_doubt_and_beside_a_long_one_a_contamination() -> None:
    for duration, doubts, spoils in ((0.5, 1, 0), (2.0, 0, 1)):
        figures = {"foreign_cpu_share": 0.3, "duration": duration}
        assert (len(unsure(figures)), len(contaminations(figures, False))) == (doubts, spoils)
    assert unsure({"foreign_cpu_share": 0.01, "duration": 0.5}) == unsure({}) == []


def test_a_burst_in_one_block_is_told_though_the_average_hides_it() -> None:
    quiet = {"watched_seconds": 10.0, "foreign_cpu_seconds": 0.0}
    windows = [Window((), 10.0, quiet) for _ in range(5)]
    loud = Window((), 10.0, quiet | {"foreign_cpu_seconds": 4.0 * (os.cpu_count() or 1) / 4})
    found = block_contaminations([*windows, loud], False)
    assert [len(each) for each in found] == [0, 0, 0, 0, 0, 1] and "10% of the processors" in found[5][0]


def test_cached_outputs_shrunk_times_and_stray_times_are_told() -> None:
    cached = {"duration": 9.0, "block_output_throughput": [100.0, 9000.0, 9100.0]}
    assert "jumps between blocks" in contaminations(cached, False)[0]
    assert "jumps" in unsure(cached | {"duration": 0.5})[0]
    shrunk = counters([{"missing_seconds": 3.0, "stray_times": 0}], 7.0, 10) | {"duration": 7.0}
    assert "driver's own clock shows 42.9% more" in contaminations(shrunk, False)[0]
    late = counters([{"lag_seconds": 4.5, "receipts": 100}], 7.0, 10) | {"duration": 7.0}
    assert "times of 45 ms before the driver received them" in contaminations(late, False)[0]
    stray = counters([{"missing_seconds": 0.0, "stray_times": 2}], 7.0, 10) | {"duration": 7.0}
    assert contaminations(stray, False)[0].startswith("2 events have times outside")
    assert not contaminations({"duration": 9.0, "block_output_throughput": [100.0, 90.0, 110.0]}, False)


@pytest.mark.parametrize(("own", "outer", "said"), [(7.0, 10.0, "30.0% less"), (10.0, 9.0, "11.1% more"), (9.95, 10.0, "")])
def test_a_clock_of_another_speed_is_told(own: float, outer: float, said: str) -> None:
    """A doubt where the windows are short in sum."""
    figures = counters([{"window_seconds": own, "outer_seconds": outer}], own, 10)
    assert [said in each for each in contaminations(figures | {"duration": own}, False)] == [True] * bool(said)
    assert len(contaminations(figures | {"duration": 0.9}, False)) == 0 and len(unsure(figures | {"duration": 0.9})) == bool(
        said
    )
    busy = {"duration": 1.6, "foreign_cpu_share": 0.9}
    for gap, count in ((0.06, 1), (0.3, 2)):  # as observed beside other programs, and of a clock that is slow
        assert len(contaminations(busy | {"clock_gap_share": gap}, False)) == count
    assert counters([{"window_seconds": own}], own, 10)["clock_gap_share"] is None
