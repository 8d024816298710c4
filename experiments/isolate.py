"""An engine in a process of its own: `IsolatedEngine` here, `python -m experiments.isolate` there.

Each process imports one framework, with its threads settled in the environment before the import, so that two engines can be
alive at once and compute in turn. They speak JSON in frames (`MAGIC`, four bytes of length, little-endian, then UTF-8) over the
child's standard input and output. The child sleeps on a read while it is idle, and ends when that pipe does: it cannot outlive
us.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module, util
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from common import errors
from common.config import EngineConfig
from common.interface import InferenceEngine, Progress
from common.platform import cores, peak_rss, rss
from common.weights.checkpoint import Checkpoint, open_checkpoint
from experiments.convert import gguf_file, hugging_face_directory
from experiments.drive import Window, drive
from experiments.profiled import Profile, profiled
from experiments.workload import Item, Workload

if TYPE_CHECKING:
    from experiments.config import EngineSpec

ROOT = Path(__file__).resolve().parent.parent
PEERS: Mapping[str, Callable[[Checkpoint, str], Path]] = {"llamacpp": gguf_file, "vllm": hugging_face_directory}
"""Engines with requirements that ours cannot share: each runs in an environment of its own, `.venv-<name>`, and is given the
checkpoint in the form, and in the dtype, that it reads."""

Message = dict[str, Any]
MAGIC = b"TNDM"
"""Starts every frame: what else gets onto a pipe is taken for no length."""
MAX_FRAME = 1 << 30
TAIL_LINES = 15
PROGRESS_PERIOD_S = 0.1


class EngineFailure(RuntimeError):
    """An engine's process died, or failed in a way its user did not cause."""

    def __init__(self, message: str, *, kind: str = "error", label: str = "", log: str = "") -> None:
        """`kind`: `died`, `killed`, `timeout`, `garbage` (no frame came) or `error` (it said so). `log`: the end of it."""
        super().__init__(message)
        self.message, self.kind, self.label, self.log = message, kind, label, log

    def __str__(self) -> str:
        indented = "".join(f"\n  {line}" for line in self.log.splitlines())
        return f"{self.message}\nThe end of its log:{indented}" if indented else self.message

    def record(self) -> dict[str, str]:
        """For the results."""
        return {"kind": self.kind, "message": self.message, "log": self.log}


def write_frame(stream: IO[bytes], message: Message) -> None:
    data = json.dumps(message, separators=(",", ":"), default=lambda array: array.tolist()).encode()
    stream.write(MAGIC + struct.pack("<I", len(data)) + data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> Message | None:
    """The next message; None where the stream ends, be it in the middle of a frame. Raises `EngineFailure` for what is none."""
    head = stream.read(len(MAGIC) + 4)
    if head[: len(MAGIC)] != MAGIC[: len(head)]:
        raise EngineFailure(f"expected a frame, got {head!r}", kind="garbage")
    if len(head) < len(MAGIC) + 4:
        return None
    (length,) = struct.unpack("<I", head[len(MAGIC) :])
    if length > MAX_FRAME:
        raise EngineFailure(f"got a frame of {length} bytes, at most {MAX_FRAME} are expected", kind="garbage")
    data = stream.read(length)
    if len(data) < length:
        return None
    try:
        message = json.loads(data)
    except ValueError as error:
        raise EngineFailure(f"got a frame that is no JSON: {error}", kind="garbage") from error
    if not isinstance(message, dict):
        raise EngineFailure(f"got a frame with {message!r:.80}", kind="garbage")
    return message


def interpreter(name: str) -> Path:
    """The Python that runs engine `name`: this one, or that of a peer's environment, which `make peers` puts into the root of
    the repository ($TANDEM_PEERS names another folder). Raises `BackendError` if there is none."""
    if name not in PEERS:
        return Path(sys.executable)
    python = Path(os.environ.get("TANDEM_PEERS") or ROOT) / f".venv-{name}" / "bin" / "python"
    if not python.exists():
        raise errors.BackendError(
            f"engine={name} runs in an environment of its own, and there is no {python}. Run: make peers. "
            "(TANDEM_PEERS names another folder to look in.)"
        )
    return python.absolute()


class IsolatedEngine:
    """The parent's handle on one engine's process. Use as a context manager."""

    def __init__(self, spec: EngineSpec, log: Path, timeout_s: float = 1800.0) -> None:
        """Start the process; its standard error goes to `log`. A command that takes longer than `timeout_s` ends it."""
        self.spec = spec
        self._log = log
        self._timeout_s = timeout_s
        self._expired = False
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [interpreter(spec.name), "-m", "experiments.isolate"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=os.environ | thread_settings(spec.config.threads or cores()) | module_settings(spec.name),
                process_group=0,  # so that it can be ended with the processes that it started
            )

    def load(self, model: Path, progress: Progress | None = None) -> Message:
        """Build the engine. Returns `load_s` and `warmup_s`, what it can do, and the memory it holds then (`rss_mb`), held at
        most until then (`peak_load_mb`) and has for KV pages (`kv_pool_mb`, None where it does not tell). A peer's weights are
        converted here, once, so that neither its times nor its memory include that."""
        if self.spec.name in PEERS:
            model = PEERS[self.spec.name](open_checkpoint(model), self.spec.config.dtype)
        config, options = asdict(self.spec.config), dict(self.spec.options)
        return self._call("load", progress, name=self.spec.name, model=str(model), config=config, options=options)

    def run(self, workload: Workload, logprobs: int | None = None) -> Window:
        """One window, from an empty prefix cache."""
        items = [vars(item) for item in workload.items]
        return Window.of(self._call("run", items=items, logprobs=logprobs, concurrency=workload.concurrency))

    def profile(self, workload: Workload) -> Profile | None:
        """One window as `run`, under the framework's profiler; None of an engine that has none."""
        answer = self._call("profile", name=self.spec.name, items=[vars(item) for item in workload.items])
        return Profile.of(answer) if answer else None

    def time_kernels(
        self, model: Path, shapes: Sequence[Sequence[Any]], passes: int, progress: Progress | None = None
    ) -> Message:
        """Instead of `load`: what `experiments.pieces.time_kernels` returns of this engine's kernels."""
        arguments = {"name": self.spec.name, "model": str(model), "config": asdict(self.spec.config)}
        return self._call("time_kernels", progress, **arguments, shapes=shapes, passes=passes)

    def observe(self, what: str, progress: Progress | None = None, **arguments: Any) -> Message:
        """What `experiments.observe.on_<what>` returns of this engine, once it is loaded."""
        return self._call("observe", progress, what=what, **arguments)

    def peak_rss_mb(self) -> float:
        return float(self._call("peak_rss_mb")["value"])

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

    def _call(self, command: str, progress: Progress | None = None, **arguments: Any) -> Message:
        """Send a command and wait for its answer. Raises what the child raised if it is the user's, else `EngineFailure`."""
        assert self._process.stdin and self._process.stdout
        with self._deadline():
            try:
                write_frame(self._process.stdin, {"command": command} | arguments)
                while (answer := self._read(command)) is not None:
                    if "progress" in answer:
                        if progress:
                            progress(*answer["progress"])
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
        if code >= 0:
            raise self._failure("died", f"ended with exit code {code} during {command!r}")
        name = signal.Signals(-code).name
        hint = ". So Linux ends a process when memory runs out; smaller num_blocks, max_num_seqs and max_model_len need less"
        raise self._failure("killed", f"was killed by {name} during {command!r}{hint if name == 'SIGKILL' else ''}")

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
            return read_frame(self._process.stdout)
        except EngineFailure as error:
            self._kill()
            raise self._failure(error.kind, f"wrote something else than an answer to {command!r}: {error.message}") from None

    def _error(self, kind: str, message: str, trace: str) -> Exception:
        known = getattr(errors, kind, None)
        if isinstance(known, type) and issubclass(known, errors.TandemError):
            return known(message)
        failure = self._failure("error", f"raised {kind}: {message}")
        failure.log = f"{failure.log}\n{trace}".strip()
        return failure

    def _failure(self, kind: str, what: str) -> EngineFailure:
        lines = self._log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        message = f"The process of engine {self.spec.label!r} {what}."
        return EngineFailure(message, kind=kind, label=self.spec.label, log="\n".join(lines))


def thread_settings(threads: int) -> dict[str, str]:
    """The environment that gives every framework `threads` compute threads and keeps it off the network."""
    count = str(threads)
    return {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "PJRT_NPROC": count,  # XLA's pool, which neither of the others reaches
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def module_settings(name: str) -> dict[str, str]:
    """Where a peer's Python finds our modules, and nothing else of this process's."""
    return {"PYTHONPATH": str(ROOT)} if name in PEERS else {}


# The child.


def build(
    name: str, model: str, config: EngineConfig, progress: Progress, options: Mapping[str, Any] | None = None
) -> InferenceEngine:
    """The engine `name`: another people's from `experiments.baselines`, with `options` of its own if it has any, else ours over
    the backend of that name."""
    checkpoint = open_checkpoint(model)
    if name.isidentifier() and util.find_spec(f"experiments.baselines.{name}"):
        try:
            module = import_module(f"experiments.baselines.{name}")
            own = {"options": module.Options(**options)} if options else {}
            engine: InferenceEngine = module.build_engine(checkpoint, config, progress, **own)
        except ModuleNotFoundError as error:
            remedy = "make peers" if name in PEERS else "pip install -e '.[baselines]'"
            raise errors.BackendError(
                f"engine={name} needs the package {error.name!r}, which is not installed. Run: {remedy}"
            ) from error
        return engine
    from common.engine import build_engine

    return build_engine(name, checkpoint, config, progress)


def items_of(records: Sequence[Message]) -> list[Item]:
    return [Item(**record | {"prompt": tuple(record["prompt"])}) for record in records]


class Worker:
    """The child's end: one engine and the commands on it."""

    def __init__(self, output: IO[bytes]) -> None:
        self._output = output
        self._engine: InferenceEngine | None = None
        self._last_progress = 0.0
        self._stage_ended: float | None = None
        """When the first stage of `build` was done: weights come first, then warm-up."""

    def answer(self, message: Message) -> Message:
        command = getattr(self, f"on_{message.pop('command')}")
        return command(**message)

    def on_load(self, name: str, model: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> Message:
        start = time.perf_counter()
        self._engine = build(name, model, EngineConfig(**config), self.progress, options)
        end = time.perf_counter()
        loaded = self._stage_ended or end
        stats = self._engine.stats()
        pool = stats.get("kv_pool_bytes")
        return {
            "load_s": loaded - start,
            "warmup_s": end - loaded,
            "rss_mb": (rss() + stats.get("server_rss_bytes", 0)) / 2**20,
            "peak_load_mb": (peak_rss() + stats.get("server_peak_rss_bytes", 0)) / 2**20,
            "kv_pool_mb": None if pool is None else pool / 2**20,
            "caps": asdict(self._engine.caps),
        }

    def on_run(self, items: list[Message], logprobs: int | None, concurrency: int | None) -> Message:
        assert self._engine, "run before load"
        self._engine.reset_prefix_cache()
        return drive(self._engine, items_of(items), logprobs, concurrency).record()

    def on_profile(self, name: str, items: list[Message]) -> Message:
        assert self._engine, "profile before load"
        self._engine.reset_prefix_cache()
        profile = profiled(name, self._engine, items_of(items))
        return profile.record() if profile else {}

    def on_time_kernels(
        self, name: str, model: str, config: Mapping[str, Any], shapes: list[list[Any]], passes: int
    ) -> Message:
        from experiments import kernels, pieces  # not in a peer's environment

        steps = [kernels.Shape(*shape) for shape in shapes]
        return pieces.time_kernels(name, open_checkpoint(model), EngineConfig(**config), steps, passes, self.progress)

    def on_observe(self, what: str, **arguments: Any) -> Message:
        from experiments import observe  # not in a peer's environment

        assert self._engine, "observe before load"
        answer: Message = getattr(observe, f"on_{what}")(self._engine, self.progress, **arguments)
        return answer

    def on_peak_rss_mb(self) -> Message:
        server = self._engine.stats().get("server_peak_rss_bytes", 0) if self._engine else 0
        return {"value": (peak_rss() + server) / 2**20}

    def progress(self, done: int, total: int, what: str) -> None:
        now = time.perf_counter()
        if done == total:
            self._stage_ended = self._stage_ended or now
        if done == total or now - self._last_progress >= PROGRESS_PERIOD_S:
            self._last_progress = now
            write_frame(self._output, {"progress": [done, total, what]})


def serve() -> None:
    """Answer commands until the parent is gone, even in the middle of one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes our input
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is a log, not an answer
    commands: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def listen() -> None:
        while (message := read_frame(sys.stdin.buffer)) is not None:
            commands.put(message)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    worker = Worker(output)
    while True:
        message = commands.get()
        try:
            answer = worker.answer(message)
        except (Exception, SystemExit) as error:
            answer = {"error": {"kind": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}}
        write_frame(output, answer)


if __name__ == "__main__":
    serve()
