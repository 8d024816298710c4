"""An outside judge of figures: from the raw rows of a run, with nothing but the standard library and the definitions.

`python -m tests.judge_figures RUN …` prints how far each figure in `results.json` is from what the rows of that run give, and
which figures it leaves alone: those that need more than rows. They are held to cases worked out by hand, roofline, MBU and
MFU in `tests/test_roofline.py`, ratios, intervals and verdicts in `tests/test_statistics.py`; of a single run nobody counts
them again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STATISTICS = ("mean", "median", "std", "p50", "p90", "p99")


def read(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of the counted blocks."""
    with (directory / "requests.jsonl").open() as file:
        return [row for row in map(json.loads, file) if not row.get("dropped")]


def figures(rows: Sequence[Mapping[str, Any]], slo: Mapping[str, float] | None = None) -> dict[str, float | None]:
    """Every figure that rows alone decide, for the rows of one engine."""
    duration = sum(max(row["times"][-1] for row in rows if row["block"] == block) for block in {row["block"] for row in rows})
    good = [row for row in rows if row["error"] is None and len(row["tokens"]) == row["output_len"]]
    answered = sum(len(row["tokens"]) for row in good)
    asked = sum(row["prompt_len"] for row in good)
    found: dict[str, float | None] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(rows) - len(good),
        "total_input_tokens": asked,
        "total_output_tokens": answered,
        "request_throughput": len(good) / duration,
        "output_throughput": answered / duration,
        "total_token_throughput": (asked + answered) / duration,
        "goodput": sum(is_good(row, slo) for row in good) / duration if slo else None,
    }
    for name, samples in milliseconds(good).items():
        for statistic in STATISTICS:
            found[f"{statistic}_{name}_ms"] = summary(statistic, samples) if samples else None
    return found


def milliseconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {
        name: []
        for name in (
            *("ttft", "tpot", "itl", "e2el", "queue", "admission", "ttft_from_sent", "e2el_from_sent"),
            *("ttft_from_schedule", "e2el_from_schedule"),
        )
    }
    for row in rows:
        times = [1e3 * time for time in row["times"]]
        sent, due = 1e3 * row["sent"], 1e3 * row["scheduled"]
        samples["ttft"].append(times[0] - due)
        samples["e2el"].append(times[-1] - due)
        samples["ttft_from_sent"].append(times[0] - sent)
        samples["e2el_from_sent"].append(times[-1] - sent)
        samples["queue"].append(sent - due)
        samples["ttft_from_schedule"].append(times[0] - due)
        samples["e2el_from_schedule"].append(times[-1] - due)
        if row["started"] is not None:
            samples["admission"].append(1e3 * row["started"] - sent)
        if len(times) > 1:
            samples["tpot"].append((times[-1] - times[0]) / (len(times) - 1))
        for i in range(1, len(times)):
            samples["itl"].append(times[i] - times[i - 1])
    return samples


def is_good(row: Mapping[str, Any], slo: Mapping[str, float]) -> bool:
    times, due = row["times"], row["scheduled"]
    reached = {
        "ttft_ms": 1e3 * (times[0] - due),
        "tpot_ms": 1e3 * (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0,
        "e2el_ms": 1e3 * (times[-1] - due),
    }
    return all(reached[name] <= limit for name, limit in slo.items())


def summary(statistic: str, samples: Sequence[float]) -> float:
    if statistic == "mean":
        return math.fsum(samples) / len(samples)
    if statistic == "std":
        mean = math.fsum(samples) / len(samples)
        return math.sqrt(math.fsum((sample - mean) ** 2 for sample in samples) / len(samples))
    share = 0.5 if statistic == "median" else int(statistic[1:]) / 100
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def left_out(reported: Mapping[str, Any], judged: Mapping[str, Any]) -> list[str]:
    """Names of numbers among the results of an engine, or of a comparison, that are not judged."""
    is_number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)  # noqa: E731
    return sorted(name for name, value in reported.items() if name not in judged and is_number(value))


def distance(one: float | None, other: float | None) -> float:
    """How far two figures are apart, relative to the larger, or in ms where that is less than one; 0 for the same, or none."""
    if one is None or other is None:
        return 0.0 if one is other else math.inf
    return abs(one - other) / max(abs(one), abs(other), 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.judge_figures", description="Judge the figures of runs.")
    parser.add_argument("run", type=Path, nargs="+", help="the directory that bench or compare has left")
    for directory in parser.parse_args().run:
        try:
            results, rows = json.loads((directory / "results.json").read_text()), read(directory)
            engines = results.get("engines") or {results["engine"]: results}
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"{directory} is no directory of a run: {error!r}")
        for label, reported in engines.items():
            mine = figures([row for row in rows if row["engine"] == label], reported.get("slo"))
            worst = max(mine, key=lambda name: distance(mine[name], reported[name]))
            print(
                f"{directory} {label}: {len(mine)} figures, at most {distance(mine[worst], reported[worst]):.1e} off ({worst})"
            )
            print(f"  not judged: {', '.join(left_out(reported, mine))}")
        for label, comparison in (results.get("comparisons") or {}).items():
            print(f"{directory} {label} against {comparison['against']}")
            print(f"  not judged: {', '.join([*left_out(comparison, {}), 'verdict'])}")


if __name__ == "__main__":
    main()
