"""A server does not grow: 20,000 requests leave no page, thread, file, object or memory behind.

It runs in this process, so that all of these can be counted.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from typing import Any, NamedTuple

import psutil
import pytest
import uvicorn
from scipy.stats import theilslopes

from common.engine import Engine
from common.options import parse
from common.request import Request
from common.serve.command import make_app, make_parser
from common.serve.http import Http
from common.serve.serving import Serving
from tests.http_server import PATIENCE_S, SMALL, until

pytestmark = pytest.mark.accept
REQUESTS, BATCHES, WARM, USERS = 20_000, 20, 5, 8
FEWER = REQUESTS // 2
"""Enough to see a leak of 1 KB."""
MOST_BYTES = 256
MOST_OBJECTS = 200
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
KINDS: list[tuple[str, int, dict[str, Any]]] = [
    (COMPLETIONS, 200, {"temperature": 0}),
    (COMPLETIONS, 200, {"stream": True, "stream_options": {"include_usage": True}}),
    (CHAT, 200, {"messages": [{"role": "user", "content": "Say it"}]}),
    (COMPLETIONS, 200, {"n": 2, "seed": 5, "cache_salt": "salt"}),
    (COMPLETIONS, 200, {"stop": ["e"], "logprobs": 3, "echo": True}),
    (COMPLETIONS, 200, {"logit_bias": {"5": 9}, "presence_penalty": 1, "bad_words": ["the"], "prompt_logprobs": 1}),
    (COMPLETIONS, 400, {"temperature": -1}),
    (CHAT, 200, {"messages": [{"role": "user", "content": "Say it"}], "stream": True, "top_k": 5}),
]
"""What requests are like, in turn: path, status, body."""


class Left(NamedTuple):
    """What is there after all requests and was not before them."""

    bytes_a_request: float
    objects: int
    threads: int
    files: int
    pages: float
    """As a share of all."""


@contextmanager
def running(backend: str) -> Iterator[tuple[int, Engine]]:
    """A server on a thread."""
    app = make_app(parse(make_parser(), ["--model", "tiny-llama", "--backend", backend, *SMALL]))
    serving: Serving = app.state.serving
    config = uvicorn.Config(app, port=0, http=Http, log_config=None, access_log=False, ws="none", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield port, serving.worker.wait_ready()
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)


def ask(connection: HTTPConnection, number: int) -> None:
    """The request of this number, like no other, though its words are few: the tokenizer keeps the first 10,000 it meets. Every
    16th is left after its first bytes."""
    path, status, body = KINDS[number % len(KINDS)]
    prompt = {"prompt": f"{' '.join(str(number))} is the mark of this one"} if path == COMPLETIONS else {}
    leave = number % 16 == 1
    data = json.dumps({"max_tokens": 200 if leave else 4, **prompt, **body})
    connection.request("POST", path, data, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == status
    answer.read(1 if leave else None)
    if leave:
        connection.close()  # the next request opens it anew


def serve(port: int, numbers: range) -> None:
    """All of these, by several users with a connection each."""

    def user(mine: range) -> None:
        with closing(HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as connection:
            for number in mine:
                ask(connection, number)

    with ThreadPoolExecutor(USERS) as users:
        list(users.map(user, [numbers[i::USERS] for i in range(USERS)]))


def held() -> int:
    """Bytes that are this process's own, after all that can be given back was."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_full_info().uss)


def left_after(backend: str, requests: int) -> Left:
    process, each = psutil.Process(), requests // BATCHES
    with running(backend) as (port, engine):
        seen: list[int] = []
        for batch in range(BATCHES):
            serve(port, range(batch * each, (batch + 1) * each))
            until(lambda: not engine.has_work)
            if batch == WARM:
                until(lambda: not connections(process, port))
                threads, files, objects = process.num_threads(), process.num_fds(), len(gc.get_objects())
            seen.append(held())
        until(lambda: not connections(process, port))
        slope = theilslopes(seen[WARM:], [each * i for i in range(BATCHES - WARM)]).slope
        return Left(
            float(slope),
            len(gc.get_objects()) - objects,
            process.num_threads() - threads,
            process.num_fds() - files,
            engine.stats()["kv_cache_usage"],
        )


def connections(process: psutil.Process, port: int) -> int:
    """That somebody has with the server, from either side."""
    return sum(port in (c.laddr.port, c.raddr.port) for c in process.net_connections("tcp") if c.raddr)


def test_20_000_requests_leave_nothing_behind(backend: str) -> None:
    left = left_after(backend, REQUESTS)
    assert left.bytes_a_request <= MOST_BYTES, left
    assert left.objects <= MOST_OBJECTS, left
    assert (left.threads, left.files, left.pages) == (0, 0, 0.0), left


def test_a_leak_of_1_kb_a_request_is_seen(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bytes] = []
    add = Engine.add

    def leak(engine: Engine, request: Request) -> None:
        kept.append(os.urandom(1024))
        add(engine, request)

    monkeypatch.setattr(Engine, "add", leak)
    assert left_after(backend, FEWER).bytes_a_request > MOST_BYTES
