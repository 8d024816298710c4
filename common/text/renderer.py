"""A process that renders chat templates (`render.py`), with limits on its CPU time and on the time to wait for it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

from common.errors import RequestError, UnavailableError

MAX_CPU_SECONDS = 1.0
"""CPU time of one conversation. An honest template needs a thousandth of it."""
PATIENCE_S = 10.0
"""Time to wait for one conversation. Only a machine that pauses or is overloaded needs so long."""
START_PATIENCE_S = 60.0
ATTEMPTS = 2


class Renderer:
    """The worker process starts when it is first needed. `close` ends it. Calls from several threads run one after another."""

    def __init__(self) -> None:
        self._worker: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, line: str) -> dict[str, str]:
        """Return the answer of the worker to one line of JSON; `render.py` describes both.

        Raises `RequestError` if the template uses up its CPU time or its memory. Raises `UnavailableError` if the worker does
        not answer in time although the template has CPU time left: the machine is paused or overloaded."""
        with self._lock:
            try:
                for _ in range(ATTEMPTS):
                    worker = self._started()
                    answer = _exchange(worker, line + "\n", PATIENCE_S)
                    if answer:
                        reply: dict[str, str] = json.loads(answer)
                        return reply
                    _check_end(self._stop())
                told = f"The chat template did not get CPU time within {PATIENCE_S:g} s: the machine is busy. Try again."
                raise UnavailableError(told)
            except BaseException:  # Ctrl-C too: the next caller must not read the answer to this line
                self._stop()
                raise

    def _started(self) -> subprocess.Popen[str]:
        if self._worker is not None and self._worker.poll() is None:
            return self._worker
        self._stop()
        program = Path(__file__).with_name("render.py")
        told = f"The process that renders chat templates does not start ({sys.executable} {program})"
        try:
            # -P: the folder of the program holds no modules for it.
            self._worker = subprocess.Popen(
                [sys.executable, "-P", str(program), str(MAX_CPU_SECONDS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
            )
        except OSError as error:
            raise UnavailableError(f"{told}: {error}.") from error
        if not _exchange(self._worker, "", START_PATIENCE_S):
            raise UnavailableError(f"{told}.")
        return self._worker

    def _stop(self) -> int:
        """End the worker, if there is one. Returns its exit status, negative for a signal."""
        if self._worker is None:
            return 0
        worker, self._worker = self._worker, None
        worker.kill()
        worker.communicate()
        return worker.returncode

    def close(self) -> None:
        """End the worker. Idempotent. Another `ask` starts a new one."""
        with self._lock:
            self._stop()


def _check_end(status: int) -> None:
    """Raise `RequestError` for an end of the worker that the template caused. `SIGKILL` comes from outside."""
    if status == -signal.SIGPROF:
        told = f"The chat template was stopped: it took more than {MAX_CPU_SECONDS:g} s of CPU time."
        raise RequestError(told, "messages")
    if status != -signal.SIGKILL:
        raise RequestError("The chat template was stopped: it took too much memory.", "messages")


def _exchange(worker: subprocess.Popen[str], line: str, seconds: float) -> str:
    """Write `line` and read one line. Returns "" if the worker ended, or was ended because it took longer than `seconds`."""
    assert worker.stdin is not None and worker.stdout is not None
    timer = threading.Timer(seconds, worker.kill)
    timer.start()
    try:
        worker.stdin.write(line)
        worker.stdin.flush()
        answer = worker.stdout.readline()
        return answer if answer.endswith("\n") else ""
    except BrokenPipeError:
        return ""
    finally:
        timer.cancel()
