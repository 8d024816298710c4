"""Servers in processes of their own, as a user starts them, and the history backend for those that need no framework."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

ROOT = Path(__file__).parent.parent
PATIENCE_S = 300.0
"""Machines that run tests may be slow; nothing waits this long where all is well."""
SMALL = ("--dtype", "float32", "--threads", "1", "--max-model-len", "512", "--max-num-seqs", "8",
         "--max-num-batched-tokens", "64", "--num-blocks", "513")  # fmt: skip
PACKAGE = """
import os
import time
from pathlib import Path
from common.replicas import worker
from tests.history_runner import HistoryRunner

CONTROL = Path({control!r})
if (CONTROL / "no room").exists():
    worker.MAX_WAITING_BYTES = 1

class ModelRunner(HistoryRunner):
    def __init__(self, config):
        while (CONTROL / "load").exists():
            (CONTROL / "loading").touch()
            time.sleep(0.01)
        super().__init__(num_pages=2, block_size=config.block_size, vocab_size=320, max_seqs=config.max_num_seqs)

    def stats(self):
        while (CONTROL / "hang outside a step").exists():
            time.sleep(0.01)
        return super().stats()

    def submit(self, batch, *more):
        if (CONTROL / "hold").exists():
            (CONTROL / "hold").unlink()
            sum(range(1_000_000_000))  # in C, with Python's lock
        if (CONTROL / "slow").exists():
            time.sleep(0.02)
        while (CONTROL / "hang").exists():
            (CONTROL / "hanging").touch()
            time.sleep(0.01)
        if (CONTROL / "fail").exists():
            raise RuntimeError("a kernel at 0x7ffd12345678 failed in /usr/lib/secret.so")
        if (CONTROL / "die").exists():
            raise SystemExit("the step loop is to die")
        if (CONTROL / "poison").exists() and int((CONTROL / "poison").read_text()) in batch.kv_lengths:
            os._exit(9)
        return super().submit(batch, *more)

    def page_memory(self, group):
        return None  # else nobody would see that pages are read and written

    def read_pages(self, group, pages):
        self.hold("reading", pages)
        return super().read_pages(group, pages)

    def write_pages(self, group, pages, arrays):
        self.hold("writing", pages)
        super().write_pages(group, pages, arrays)

    def hold(self, what, pages):
        # where a file says so: leave another that says that this is going on, and stay in it
        while len(pages) and (CONTROL / f"hold {{what}}").exists():
            (CONTROL / what).touch()
            time.sleep(0.01)
"""


class Served:
    """A running server."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log
        self.client = httpx.Client(base_url=url, timeout=PATIENCE_S)

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def complete(self, **body: Any) -> dict[str, Any]:
        """The answer to a completion, greedy unless told otherwise."""
        response = self.post(**({"temperature": 0.0} | body))
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def events(self, path: str = "/v1/completions", **body: Any) -> list[Any]:
        """The messages of a stream, which ends as it should."""
        with self.client.stream("POST", path, json={"temperature": 0.0, **body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            raw = response.read().decode()
        assert raw.endswith("data: [DONE]\n\n")
        return [json.loads(part.removeprefix("data: ")) for part in raw.split("\n\n")[:-2]]

    def metric(self, name: str, **labels: str) -> float:
        """The value of the sample `vllm:name` with these labels among its own; 0 where there is none. A busy engine may not
        answer at once."""
        from prometheus_client.parser import text_string_to_metric_families

        answers: list[httpx.Response] = []

        def told() -> bool:
            answers.append(self.client.get("/metrics"))
            return answers[-1].status_code == 200

        until(told)
        families = text_string_to_metric_families(answers[-1].text)
        samples = [s for f in families for s in f.samples if s.name == f"vllm:{name}" and labels.items() <= s.labels.items()]
        return sum(sample.value for sample in samples)

    def wait_idle(self) -> None:
        """Until no request runs, waits or holds a page. Fails after long."""
        until(lambda: not any(map(self.metric, ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting"))))

    def stop(self) -> int:
        """Ask it to end; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


def raw_request(served: Served, **body: Any) -> socket.socket:
    """A connection on which a completion was asked for."""
    where, data = urlsplit(served.url), json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection((where.hostname or "", where.port or 0))
    connection.sendall(head.encode() + data)
    return connection


def expect_told_that_it_ends(served: Served) -> None:
    """Told to end, a server that has little patience and two long requests answers both, and leaves no trace of an error."""
    long: dict[str, Any] = {"prompt": "a long one", "max_tokens": 450, "ignore_eos": True}
    whole, chunks = list[httpx.Response](), list[Any]()
    readers = [
        threading.Thread(target=lambda: whole.append(served.post(**long))),
        threading.Thread(target=lambda: chunks.extend(served.events(**long))),
    ]
    for reader in readers:
        reader.start()
    until(lambda: served.metric("num_requests_running") == 2)
    until(lambda: served.metric("generation_tokens_total") > 10)
    assert served.stop() == 0
    for reader in readers:
        reader.join()
    error = whole[0].json()["error"]
    assert (whole[0].status_code, error["type"]) == (503, "ServiceUnavailableError")
    assert "--drain-s" in error["message"]
    assert "choices" in chunks[-2] and chunks[-1] == {"error": error}
    log = served.log.read_text()
    assert log.count("it outlasted --drain-s") == 2 and "Traceback" not in log, log


def interrupt_twice(served: Served) -> None:
    """It ends at the second Ctrl-C, whatever runs."""
    served.process.send_signal(signal.SIGINT)
    served.process.send_signal(signal.SIGINT)  # the same, as one that a launcher has passed on
    until(lambda: "Told to end: " in served.log.read_text())
    time.sleep(0.2)
    assert served.process.poll() is None
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(10) == 130
    assert "Traceback" not in served.log.read_text()


def until(condition: Any) -> None:
    """Wait for something that comes soon, unless something is wrong."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)


class Awake:
    """Seconds in which this process ran: what passes while it is suspended counts for a tenth of a second."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last = time.monotonic()

    def wait(self, condition: Callable[[], bool], most: float = PATIENCE_S) -> float:
        while not condition():
            time.sleep(0.01)
            now = time.monotonic()
            self.seconds += min(now - self._last, 0.1)
            self._last = now
            assert self.seconds < most, "it does not come"
        return self.seconds


@contextmanager
def serving(folder: Path, *options: str, packages: Sequence[Path] = ()) -> Iterator[Served]:
    """A server on a free port, which has ended by the end."""
    log = folder / "server.log"
    paths = os.pathsep.join(map(str, (*packages, ROOT)))
    command = [sys.executable, "-m", "common.serve", "--model", "tiny-llama", "--port", "0", *options]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"PYTHONPATH": paths})
    try:
        served = Served(process, address(process, log), log)
        with served.client:
            until(lambda: answers(served))
            yield served
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where it says that it serves."""
    found: list[str] = []

    def told() -> bool:
        found.extend(re.findall(r"at (http://\S+:\d+)", log.read_text()))
        assert found or process.poll() is None, log.read_text()
        return bool(found)

    until(told)
    return found[0]


def answers(served: Served) -> bool:
    try:
        return served.client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def history(folder: Path, *names: str) -> tuple[Path, Path]:
    """Backends without a framework, by name: the folder to import them from, and the one whose files say what goes wrong."""
    control = folder / "control"
    control.mkdir()
    for name in names or ("history",):
        package = folder / "packages" / f"{name}infer"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(PACKAGE.format(control=str(control)))
    return folder / "packages", control


@contextmanager
def known_history(folder: Path) -> Iterator[Path]:
    """Makes `history` known to processes that are started; the folder whose files say what goes wrong in them."""
    packages, control = history(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{packages}{os.pathsep}{ROOT}")
        yield control
