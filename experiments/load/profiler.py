"""Run one window under an engine's own profiler, and list its kernels and their times. No figure counts this window."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, util
from typing import Any, NamedTuple, Self

from common.engine import Engine
from common.interface import COLLECTIVES, InferenceEngine, KernelEvent
from experiments.load.driver import Window, drive
from experiments.load.workload import Item

MOST_KERNELS = 200_000
"""Of one engine: more make a file that no viewer opens."""
HALF_NS = 5e-10
"""Times are whole nanoseconds, but for what floats lose."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One window under the profiler."""

    window: Window
    kernels: tuple[KernelEvent, ...]
    """By start, in seconds since the window's; those of a thread may nest."""
    left_out: int = 0
    """How many came after the last of `kernels`."""

    def record(self) -> dict[str, Any]:
        """What JSON can hold, but for the arrays in the window."""
        return vars(self) | {"window": self.window.record()}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of `record` and a trip through JSON."""
        kernels = tuple(KernelEvent(*values) for values in record["kernels"])
        return cls(window=Window.of(record["window"]), kernels=kernels, left_out=record["left_out"])


def profiled(name: str, engine: InferenceEngine, items: Sequence[Item], most: int = MOST_KERNELS) -> Profile | None:
    """Drive the engine `name` under its profiler, in its process, and keep at most so many kernels; None if it has none."""
    if not (found := seen(name, engine, items)):
        return None
    window, kernels = found
    ordered = sorted(kernels, key=outer_first)
    since = tuple(kernel._replace(start=kernel.start - window.began) for kernel in ordered[:most])
    return Profile(window=window, kernels=since, left_out=len(ordered) - len(since))


class CollectiveTimes(NamedTuple):
    """How long ranks were at telling each other what they did, waiting included."""

    seconds: float
    """A step, of all ranks together."""
    step_seconds: float
    """What such a step took."""


def time_collectives(name: str, engine: InferenceEngine, items: Sequence[Item]) -> CollectiveTimes | None:
    """What the profiler of the engine `name` saw of its ranks' telling; None if it has no profiler, or that saw none."""
    if not (found := seen(name, engine, items)):
        return None
    window, kernels = found
    told, steps = [kernel.duration for kernel in kernels if kernel.name in COLLECTIVES], window.steps
    return CollectiveTimes(sum(told) / len(steps), window.duration / len(steps)) if told and steps else None


def seen(name: str, engine: InferenceEngine, items: Sequence[Item]) -> tuple[Window, Sequence[KernelEvent]] | None:
    """A window of the engine `name`, and every kernel that its profiler saw in it; None if it has none."""
    if not isinstance(engine, Engine):  # what runs elsewhere this process's profiler does not see
        return None
    if not (name.isidentifier() and util.find_spec(f"{name}infer") and util.find_spec(f"{name}infer.profile")):
        return None
    windows: list[Window] = []
    profile: Callable[..., Sequence[KernelEvent]] = import_module(f"{name}infer.profile").profile
    kernels = profile(lambda: windows.append(drive(engine, items)))
    return windows[0], kernels


def outer_first(kernel: KernelEvent) -> tuple[float, float]:
    return kernel.start, -kernel.duration


def own_seconds(kernels: Iterable[KernelEvent]) -> dict[str, tuple[int, float]]:
    """Name → how often it ran, and how long in all, without what ran within it; the longest first."""
    found: dict[str, tuple[int, float]] = {}

    def add(name: str, times: int, seconds: float) -> None:
        count, total = found.get(name, (0, 0.0))
        found[name] = count + times, total + seconds

    within: dict[str, list[KernelEvent]] = {}
    for kernel in sorted(kernels, key=outer_first):
        outer = within.setdefault(kernel.thread, [])
        while outer and outer[-1].start + outer[-1].duration < kernel.start + HALF_NS:
            outer.pop()
        add(kernel.name, 1, kernel.duration)
        if outer:
            add(outer[-1].name, 0, -kernel.duration)
        outer.append(kernel)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))
