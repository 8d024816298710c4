"""What ran and when, as JAX's profiler saw it: on a device that is no CPU, else XLA's operations on the host."""

from __future__ import annotations

import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from common.interface import COLLECTIVES, KernelEvent

_WINDOW = "tandem window"
"""Marks the run in the profile: so the profiler's clock and ours are laid on each other."""
_CALL = re.compile(r'([\w.-]+) = .*custom-call\(.*custom_call_target="([^"]+)"')
_COLLECTIVE = re.compile(rf"([\w.-]+) = .*? ({'|'.join(COLLECTIVES)})\(")
_Targets = Mapping[tuple[str, str], set[str]]


def profile(run: Callable[[], object]) -> list[KernelEvent]:
    """Call `run` under the profiler and return what ran meanwhile. Events of a thread may nest."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # a record of each Python call would slow what is profiled
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            began = time.perf_counter()
            with jax.profiler.TraceAnnotation(_WINDOW):
                run()
        (file,) = Path(directory).rglob("*.xplane.pb")
        return list(_events(jax.profiler.ProfileData.from_file(str(file)), began))


def _events(data: Any, began: float) -> Iterator[KernelEvent]:
    found = [(plane.name, line.name, event) for plane in data.planes for line in plane.lines for event in line.events]
    mark = next(event for _, _, event in found if event.name == _WINDOW)
    on_device = any(plane.startswith("/device:") for plane, _, _ in found)
    targets = _targets()
    for plane, line, event in found:
        stats = dict(event.stats)
        if plane.startswith("/device:") if on_device else "hlo_op" in stats:
            start = began + (event.start_ns - mark.start_ns) * 1e-9
            yield KernelEvent(_name(event.name, stats, targets), start, event.duration_ns * 1e-9, line)


def _targets() -> _Targets:
    """Return (module, operation) → the operators that it calls, or the collective that it is.

    A profile has XLA's numbers for foreign calls and not their names. It names a collective as the program did. The value is a
    set, because a profile does not distinguish programs of one name.
    """
    targets = defaultdict(set)
    for executable in jax.devices("cpu")[0].client.live_executables():
        for module in executable.hlo_modules():
            text = module.to_string()
            for operation, target in _CALL.findall(text) + _COLLECTIVE.findall(text):
                targets[module.name, operation].add(target)
    return targets


def _name(name: str, stats: Mapping[str, Any], targets: _Targets) -> str:
    """The operator's name, where it is certain which one was called."""
    found = targets.get((stats.get("hlo_module", ""), name), set())
    return min(found) if len(found) == 1 else name
