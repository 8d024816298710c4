"""Write the notes beside figures: the meaning of the signs in a table, and doubts about a measurement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from experiments.metrics.metrics import too_short
from experiments.report.figures_table import FIGURES

BRACKETS = "in brackets: percentiles of too few samples"
SPOILT = "a contaminated engine's ratio is not to be quoted: what disturbs a run seldom slows two engines down alike"


def explanations(engines: Mapping[str, Mapping[str, Any]], comparisons: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the meaning of each sign that the table has."""
    for comparison in list(comparisons.values())[:1]:
        bounds = f" and its {100 * comparison['confidence']:.3g} % interval" if comparison["low"] is not None else ""
        yield f"× {comparison['against']}: geometric mean of the blocks' ratios{bounds}"
        if contaminated(engines, engines):
            yield SPOILT
    yield from interval_notes(engines)
    few = {key for figures in engines.values() for key in figures.get("unsupported") or ()}
    if few.intersection(key for key, _ in FIGURES):
        yield BRACKETS


def interval_notes(engines: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Explain the intervals of latencies in a table, or why there are none."""
    estimates = [
        each
        for figures in engines.values()
        for key, each in (figures.get("latency_intervals") or {}).items()
        if figures.get(key) is not None and key not in (figures.get("unsupported") or ())
    ]
    if there := [each for each in estimates if each["low"] is not None]:
        confidence = 100 * there[0]["confidence"]
        yield f"latency (low–high): {confidence:.3g} % interval of the geometric mean of the blocks' percentiles"
    for why in dict.fromkeys(each["why"] for each in estimates if each["why"]):
        yield f"no interval: {why}" if there else f"no intervals of latencies: {why}"


def spoilt_cells(engines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a cell for each engine: whether it is contaminated, or ran too short a time to judge."""
    fine = ["too short to judge" if too_short(mine) else "no" for mine in engines.values()]
    return ["contaminated" if mine.get("contaminated") else said for mine, said in zip(engines.values(), fine, strict=True)]


def contaminated(engines: Mapping[str, Mapping[str, Any]], labels: Iterable[str]) -> list[str]:
    """Return the labels of the contaminated engines."""
    return [label for label in labels if engines[label].get("contaminated")]


def dropped(blocks: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each dropped block of `dropped_blocks`."""
    return [f"block {each['block']} is dropped, its times are not counted: {each['reason']}" for each in blocks]


def fallback(figures: Mapping[str, Any]) -> list[str]:
    """Return why `kernels=auto` did not take the native kernels; else nothing."""
    why = figures.get("auto_took_framework")
    return [f"kernels=auto took the framework's kernels, not the native ones: {why}"] if why else []


def other_weights(figures: Mapping[str, Any]) -> list[str]:
    """Return a sentence on the quantization of an engine that computes on the weights as stored; else nothing."""
    stored = figures.get("stored_weights")
    return [f"computes on the weights as stored in the file: {stored}"] if stored else []


def between_ranks(figures: Mapping[str, Any]) -> list[str]:
    """Return how the time between ranks was measured if the engine does not count it, or why it was not."""
    what = figures.get("communication_time")
    return [f"the time between ranks is {what}"] if what else []


def left_out(figures: Mapping[str, Any]) -> list[str]:
    """Return why an engine has no share of the limits of the machine, although these were measured; else nothing."""
    why = figures.get("no_roofline_because")
    return [f"roofline, MBU and MFU are {why}"] if why else []
