"""What ran and when, as PyTorch's profiler saw it: on a device that is no CPU, else operators on the host."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from common.interface import KernelEvent

_WINDOW = "tandem window"
"""Marks the run in the profile: so the profiler's clock and ours are laid on each other."""


def profile(run: Callable[[], object]) -> list[KernelEvent]:
    """Call `run` under the profiler and return what ran meanwhile. Events of a thread may nest."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        began = time.perf_counter()
        with torch.profiler.record_function(_WINDOW):
            run()
    found = profiler.events() or []
    mark = next(event for event in found if event.name == _WINDOW)
    operators = [event for event in found if event.name != _WINDOW and not event.is_user_annotation]
    on_device = [event for event in operators if not _on_host(event)]
    return [_event(event, began - mark.time_range.start * 1e-6) for event in on_device or operators]


def _event(event: FunctionEvent, shift: float) -> KernelEvent:
    """`shift`: seconds from the profiler's clock, which is in microseconds, to ours."""
    thread = f"thread {event.thread}" if _on_host(event) else f"stream {event.device_resource_id}"
    time_range = event.time_range
    return KernelEvent(event.name, shift + time_range.start * 1e-6, (time_range.end - time_range.start) * 1e-6, thread)


def _on_host(event: FunctionEvent) -> bool:
    return event.device_type.name == "CPU"
