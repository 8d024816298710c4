"""Start a server for a run, wait until it answers, and stop it when the run ends for any reason.

The server runs under a supervisor, `python -m experiments.engines.server`, which sleeps on a read of its standard input. The
pipe closes when the run is over or was killed. Then the supervisor stops the server and every process that it started.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import SplitResult, urlsplit

import psutil

from common.config import expect
from common.errors import BackendError
from common.system.hardware import peak_rss, rss

POLL_S = 0.1
PATIENCE_S = 10.0
"""For one answer, for a server to end once it was asked to, and for the one before it to leave the port."""
TAIL_LINES = 15


def parse_url(url: Any, what: str = "base_url") -> SplitResult:
    """The parts of `http://host:port`. Raises `ConfigError` for anything else."""
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        good = parts is not None and parts.scheme == "http" and bool(parts.hostname) and (parts.port or 80) > 0
        good = good and parts is not None and parts.path in ("", "/")
    except ValueError:  # of the port
        good = False
    expect(good, f"{what} must be the address of a server such as http://127.0.0.1:8000, without a path, got {url!r}.")
    assert parts is not None
    return parts


def free_port() -> int:
    """A port of this machine that nobody has at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def listens(url: str) -> bool:
    """Whether anybody takes connections at `url`."""
    parts = parse_url(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 80), PATIENCE_S).close()
    except OSError:
        return False
    return True


def get(url: str, path: str, timeout: float = PATIENCE_S) -> tuple[int, bytes]:
    """Status and body of a GET. Raises `OSError` or `HTTPException` where no such answer comes."""
    parts = parse_url(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=timeout)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def models(url: str) -> list[str]:
    """The names of the models that a server offers; empty while it loads them. Raises `OSError` where no server answers."""
    try:
        status, body = get(url, "/v1/models")
        return [str(model["id"]) for model in json.loads(body)["data"]] if status == 200 else []
    except (http.client.HTTPException, ValueError, KeyError, TypeError):
        return []


def program(name: str) -> str:
    """The path of a program on the PATH, or of our own environment though that is not activated. Raises `BackendError`."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise BackendError(
            f"There is no program {name!r} to start a server with. `make peers` brings vLLM's, and `make llama-server` "
            "llama.cpp's; or name where it is as the first word of command."
        )
    return found


class Server:
    """A process that is to answer at `url`. Its output goes to our standard error, and so into the log of the engine."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], url: str, patience_s: float = PATIENCE_S
    ) -> None:
        """Start it. Raises `BackendError` if there is no such program, or if `url` is somebody else's for `patience_s`."""
        end = time.monotonic() + patience_s
        while listens(url):
            if time.monotonic() > end:
                raise BackendError(
                    f"Something listens at {url} already, so that the server {command[0]!r} cannot be started there. End it, "
                    "name another port, or leave command out to use what is there."
                )
            time.sleep(POLL_S)
        self.url = url
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.engines.server", program(command[0]), *command[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment),
            start_new_session=True,  # who ends our group leaves it to the supervisor to end the server
        )
        assert self._process.stdout
        self._reader = threading.Thread(target=self._copy, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def wait(self, timeout_s: float) -> list[str]:
        """Wait until it offers models, and return their names. Raises `BackendError`, and ends it, if it does not."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                if names := models(self.url):
                    return names
            if self._process.poll() is not None:
                break
            time.sleep(POLL_S)
        code = self._process.poll()
        self.close()
        what = f"did not offer a model at {self.url} within {timeout_s:g} s" if code is None else f"ended with exit code {code}"
        raise BackendError(f"The server {what}; see its log, and command and start_timeout_s.{self.tail()}")

    def tail(self) -> str:
        """The end of its log, as part of a message."""
        lines = [f"  {line}" for line in self._tail]
        return "\n".join(["\nThe end of its log:", *lines]) if lines else " Its log is empty."

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def memory(self) -> tuple[int, int]:
        """Bytes that it and its descendants hold, and have held at most, each by itself, added up."""
        try:
            family = psutil.Process(self._process.pid).children(recursive=True)  # without the supervisor
        except psutil.NoSuchProcess:
            family = []
        return sum(rss(process.pid) for process in family), sum(peak_rss(process.pid) for process in family)

    def close(self) -> None:
        """End it, and wait until it has ended. Idempotent."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        self._reader.join(PATIENCE_S)

    def _copy(self, output: IO[bytes]) -> None:
        with output:
            for line in output:
                self._tail.append(line.decode(errors="replace").rstrip())
                os.write(2, line)


# The supervisor.


def supervise(command: Sequence[str]) -> int:
    """Run `command` in a group of its own until it ends or our standard input does; the exit code is its own."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def listen() -> None:
        while os.read(0, 1024):
            pass
        signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
        signal_group(process, signal.SIGKILL)  # it, or what it leaves behind

    threading.Thread(target=listen, daemon=True).start()
    code = process.wait()
    signal_group(process, signal.SIGKILL)
    return code if code >= 0 else 128 - code


def signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))
