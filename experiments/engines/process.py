"""Run an engine in a process of its own: `IsolatedEngine` is the parent's side, `experiments.engines.worker` the child's.

Each process imports one framework. Its threads are set in the environment before the import, so that two engines can be alive
at once and compute in turn. The processes exchange frames (`common.process.frames`) over the child's standard input and
output. An idle child sleeps on a read. It exits when the pipe closes, so it cannot outlive its parent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import EngineGoneError, TandemError, by_name
from common.interface import Progress
from common.process.child import how_it_ended
from common.process.frames import Message, NoFrame, read_frame, write_frame
from common.system.hardware import cores, thread_settings
from common.weights.checkpoint import open_checkpoint
from experiments.engines.environments import PEERS, interpreter, module_settings
from experiments.load.driver import Window
from experiments.load.profiler import CollectiveTimes, Profile
from experiments.load.workload import Workload

if TYPE_CHECKING:
    from experiments.engines.spec import EngineSpec

TAIL_LINES = 15
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""What keeps an engine's process off the network, and a library from warning of a fork."""


class EngineFailure(RuntimeError):
    """An engine's process died, or failed in a way its user did not cause."""

    def __init__(self, message: str, *, kind: str = "error", label: str = "", log: str = "") -> None:
        """`kind`: `died`, `killed`, `timeout`, `garbage` (no frame came) or `error` (it said so). `log`: the end of it."""
        super().__init__(message)
        self.message, self.kind, self.label, self.log = message, kind, label, log

    def __str__(self) -> str:
        indented = "".join(f"\n  {line}" for line in self.log.splitlines())
        return f"{self.message}\nThe end of its log:{indented}" if indented else self.message

    @classmethod
    def of(cls, error: EngineFailure | TandemError, label: str) -> EngineFailure:
        """What an engine that has loaded refuses is no longer the user's to mend: the run is worth keeping."""
        return error if isinstance(error, EngineFailure) else cls(str(error), label=label)

    def record(self) -> dict[str, str]:
        """For the results."""
        return {"kind": self.kind, "message": self.message, "log": self.log}


class IsolatedEngine:
    """The parent's handle on one engine's process. Use as a context manager."""

    def __init__(self, spec: EngineSpec, log: Path, timeout_s: float) -> None:
        """Start the process; its standard error goes to `log`. A command that takes longer than `timeout_s` ends it."""
        self.spec = spec
        self._log = log
        self._timeout_s = timeout_s
        self._expired = False
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [interpreter(spec.name), "-m", "experiments.engines.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=os.environ | OFFLINE | thread_settings(spec.config.threads or cores()) | module_settings(spec.name),
                process_group=0,  # so that it can be ended with the processes that it started
            )

    def load(self, model: Path, progress: Progress | None = None) -> Message:
        """Build the engine. Returns `load_s` and `warmup_s`, what it can do, and the memory it holds then (`rss_mib`), held at
        most until then (`peak_load_mib`) and has for KV pages (`kv_pool_mib`, None if it does not report it). A peer's weights
        are converted here, once, so that neither its times nor its memory include that."""
        if self.spec.name in PEERS:
            model = PEERS[self.spec.name].weights(open_checkpoint(model), self.spec.config.dtype)
        config, options = asdict(self.spec.config), dict(self.spec.options)
        return self._call("load", progress, name=self.spec.name, model=str(model), config=config, options=options)

    def run(self, workload: Workload, logprobs: int | None = None) -> Window:
        """One window, from an empty prefix cache."""
        items, marks = [vars(item) for item in workload.items], list[float]()
        answer = self._call("run", marks=marks, items=items, logprobs=logprobs, concurrency=workload.concurrency)
        begin, end = marks
        answer["stats"]["outer_seconds"] = end - begin
        return Window.of(answer)

    def profile(self, workload: Workload) -> Profile | None:
        """One window as `run`, under the framework's profiler; None of an engine that has none."""
        answer = self._call("profile", name=self.spec.name, items=[vars(item) for item in workload.items])
        return Profile.of(answer) if answer else None

    def time_collectives(self, workload: Workload) -> CollectiveTimes | None:
        """Return the communication between ranks in a window as `profile` runs it; None if the profiler does not see it."""
        answer = self._call("time_collectives", name=self.spec.name, items=[vars(item) for item in workload.items])
        return CollectiveTimes(**answer) if answer else None

    def time_kernels(
        self, model: Path, shapes: Sequence[Sequence[Any]], passes: int, progress: Progress | None = None
    ) -> Iterator[Message]:
        """Yield the results of `experiments.kernels.operators.time_kernels` for each shape. Replaces `load`."""
        arguments: dict[str, Any] = {"name": self.spec.name, "model": str(model), "config": asdict(self.spec.config)}
        self._call("time_kernels", progress, **arguments, shapes=shapes, passes=passes)
        for _ in shapes:
            yield self._call("time_next_shape", progress)

    def observe(self, what: str, progress: Progress | None = None, **arguments: Any) -> Message:
        """What `experiments.correctness.observe.on_<what>` returns of this engine, once it is loaded."""
        return self._call("observe", progress, what=what, **arguments)

    def peak_rss_mib(self) -> float:
        return float(self._call("peak_rss_mib")["value"])

    def close(self) -> None:
        """End the process. Idempotent."""
        if self._process.stdin and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # it is dead already
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def __enter__(self) -> IsolatedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(
        self, command: str, progress: Progress | None = None, marks: list[float] | None = None, **arguments: Any
    ) -> Message:
        """Send a command and wait for its answer. The time of each mark that the child sends is added to `marks`.

        Raises what the child raised if it is the user's, else `EngineFailure`."""
        assert self._process.stdin and self._process.stdout
        with self._deadline():
            try:
                write_frame(self._process.stdin, {"command": command} | arguments)
                while (answer := self._read(command)) is not None:
                    if "progress" in answer:
                        if progress:
                            progress(*answer["progress"])
                    elif "mark" in answer:
                        if marks is not None:
                            marks.append(time.perf_counter())
                    elif "error" in answer:
                        raise self._error(**answer["error"])
                    else:
                        return answer
            except BrokenPipeError:
                pass
            code = self._process.wait()
        if self._expired:
            raise self._failure(
                "timeout", f"did not answer {command!r} within measure.timeout_s={self._timeout_s:g}: it was ended"
            )
        hint = ". So Linux ends a process when memory runs out; smaller num_blocks, max_num_seqs and max_model_len need less"
        how = f"{how_it_ended(code)} during {command!r}{hint if code == -signal.SIGKILL else ''}"
        raise self._failure("died" if code >= 0 else "killed", how)

    @contextlib.contextmanager
    def _deadline(self) -> Iterator[None]:
        """Ends the process if the block takes longer than `timeout_s`; reads and writes then end too."""

        def expire() -> None:
            self._expired = True
            self._kill()

        timer = threading.Timer(self._timeout_s, expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _kill(self) -> None:
        """End the process and those that it started, which may hold its end of the pipe."""
        if self._process.returncode is None:  # not waited for, so that its group is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self, command: str) -> Message | None:
        assert self._process.stdout
        try:
            frame = read_frame(self._process.stdout)
            return frame.message if frame else None
        except NoFrame as error:
            self._kill()
            raise self._failure("garbage", f"wrote something else than an answer to {command!r}: {error}") from None

    def _error(self, kind: str, message: str, trace: str) -> Exception:
        known = by_name(kind, message)
        if isinstance(known, EngineGoneError):  # a process of the engine has died, though not the one that reports it
            return self._failure("died", f"has lost what it needs: {message}")
        if known:
            return known
        failure = self._failure("error", f"raised {kind}: {message}")
        failure.log = f"{failure.log}\n{trace}".strip()
        return failure

    def _failure(self, kind: str, what: str) -> EngineFailure:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        message = f"The process of engine {self.spec.label!r} {what}."
        return EngineFailure(message, kind=kind, label=self.spec.label, log="\n".join(lines))
