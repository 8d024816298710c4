"""`/start_profile` and `/stop_profile`: what ran between them, as a trace for Perfetto or chrome://tracing."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib import import_module, util
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.interface import KernelEvent
from common.serve.errors import ApiError
from common.serve.worker import Worker

Profile = Callable[[Callable[[], object]], list[KernelEvent]]
"""`profile.profile` of a backend."""


@dataclass
class Profiler:
    """Writes traces to a folder, one for each time it is started and stopped."""

    profile: Profile
    folder: Path
    _stop: threading.Event = field(default_factory=threading.Event)
    _running: Future[list[KernelEvent]] | None = None

    @classmethod
    def of(cls, backend: str, folder: str) -> Profiler:
        """Raises `ConfigError` for a backend that cannot be profiled, or a folder that cannot be made."""
        name = f"{backend}infer.profile"
        if util.find_spec(name) is None:
            raise ConfigError(f"The {backend} engine has no profiler; leave --profile-dir out.")
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"Cannot make --profile-dir {folder} ({error.strerror}).") from error
        return cls(import_module(name).profile, Path(folder))

    def start(self, worker: Worker) -> None:
        """Everything that is asked of the worker from now on is profiled."""
        if self._running is not None:
            raise ApiError(409, "A profile is running; stop it first.")
        self._stop = threading.Event()
        self._running = worker.profile(self.profile, self._stop)

    async def stop(self, worker: Worker) -> str:
        """The name of the file that was written. Requests wait while the profile is gathered."""
        if self._running is None:
            raise ApiError(409, "No profile is running; start one first.")
        running, self._running = self._running, None
        await worker.ask(lambda _: self._stop.set())
        events = await asyncio.wrap_future(running)
        name = f"profile-{time.strftime('%Y%m%d-%H%M%S')}-{time.perf_counter_ns() % 10**6:06}.json"
        await asyncio.to_thread(lambda: (self.folder / name).write_text(json.dumps(trace(events)), encoding="utf-8"))
        return name


def trace(events: Sequence[KernelEvent]) -> dict[str, Any]:
    """Chrome's trace event format: times in microseconds from the first event."""
    threads = {name: number for number, name in enumerate(dict.fromkeys(event.thread for event in events), 1)}
    first = min((event.start for event in events), default=0.0)
    named = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": name}} for name, number in threads.items()
    ]
    ran = [
        {"ph": "X", "name": e.name, "pid": 1, "tid": threads[e.thread], "ts": (e.start - first) * 1e6, "dur": e.duration * 1e6}
        for e in events
    ]
    return {"displayTimeUnit": "ms", "traceEvents": named + ran}
