"""The front: one address for several backends. It starts a server process for each and routes requests by model name."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Self

import httpx
from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from pydantic import ConfigDict
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from common.errors import BackendError, quoted
from common.process.child import Silence, how_it_ended
from common.replicas.supervisor import ATTEMPTS, BUSY_SILENCE_S, RETRY_S, SILENCE_S
from common.serve.app import OFFERED_WITH, new_app, page, tell_version
from common.serve.cut_stream import Chunks, Passing, ResponseEvents
from common.serve.errors import ApiError
from common.serve.folder import PrivateFolder
from common.serve.guard import Guard
from common.serve.protocol import Body, parse
from common.serve.serving import json_response, read_bytes, unless_left

POLL_S = 0.1
LOOK_S = 1.0
"""Interval between two health checks of a backend, and the timeout of one check."""
PATIENCE_S = 5.0
"""Timeout of a request that needs no computation, and of the end of a process after its standard input is closed."""
PASSED_ON = ("content-type", "accept", "x-request-id", "traceparent")
PASSED_BACK = ("cache-control", "retry-after", "x-should-retry")
"""Headers, beside the content type."""
RESPONSES = "/v1/responses"
log = logging.getLogger(__name__)

router = APIRouter()
router.get("/")(page)
router.get("/version")(tell_version)


@dataclass(eq=False)
class Backend:
    """One server process, which listens on a socket in a private folder.

    `keep` restarts a process that has ended. `watch` kills a process that is stopped or does not respond."""

    name: str
    models: Sequence[str]
    path: Path
    command: Sequence[str]
    client: httpx.AsyncClient
    process: subprocess.Popen[bytes] = field(init=False)
    keeping: Sequence[asyncio.Task[None]] = ()
    given_up: bool = False
    served: bool = True
    """Whether the process has accepted connections since its start."""

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, start_new_session=True)

    @property
    def accepts(self) -> bool:
        """Whether the process runs and accepts connections."""
        return self.process.poll() is None and accepts(self.path)

    @property
    def lives(self) -> bool:
        """Whether the process runs and has become ready, without a connection to it."""
        return self.served and self.process.poll() is None

    async def keep(self) -> None:
        """Restart the process whenever it has ended. Stop after `ATTEMPTS` starts in a row that did not become ready, as with
        replicas (`common.replicas.supervisor`)."""
        failures = 0
        while not self.given_up:
            while self.process.poll() is None:
                await asyncio.sleep(POLL_S)
                if not self.served and self.accepts:
                    self.served = True
                    log.info("The %s engine serves again.", self.name)
            failures, self.served = 0 if self.served else failures + 1, False
            self.given_up = failures == ATTEMPTS
            then = "once more before it served, and is given up" if self.given_up else "and is started again"
            log.warning("The server of the %s engine %s %s.", self.name, how_it_ended(self.process.returncode), then)
            if not self.given_up:
                await asyncio.sleep(failures * RETRY_S)
                self.start()

    async def watch(self) -> None:
        """Kill the process if it is stopped, does not respond, or reports a failure twice in a row. `keep` restarts it.

        A process under load answers late. `common.process.child.Silence` extends the timeout while the CPU time of the process
        advances."""
        process = None
        while True:
            if process is not self.process:
                process, unwell = self.process, False
                silence = Silence(process.pid, SILENCE_S, BUSY_SILENCE_S)
                absence = Silence(process.pid, inf, inf)
            await asyncio.sleep(0 if silence.seconds else LOOK_S)
            why = ""
            try:
                answer = await self.client.get("/health", timeout=LOOK_S)
            except httpx.TimeoutException:
                why, unwell = silence.go_on(LOOK_S), False
            except httpx.HTTPError:  # no connection: the process loads, has ended, or is stopped
                why, unwell = absence.go_on(LOOK_S), False
                silence.end()
            else:
                silence.end()
                before, unwell = unwell, answer.status_code == 503 and "retry-after" not in answer.headers
                if before and unwell:
                    why = f"is not well ({answer.json()['error']['message']})"
            if why:
                log.error("The server of the %s engine %s, and is ended.", self.name, why)
                process.kill()

    async def get(self, path: str) -> httpx.Response:
        """Send a GET request. Raises `ApiError` if the backend does not answer with 200."""
        try:
            answer = await self.client.get(path, timeout=PATIENCE_S)
        except httpx.HTTPError:
            raise self.gone() from None
        if answer.status_code != 200:
            raise ApiError(503, f"The {self.name} engine is not well.", headers={"Retry-After": "30"})
        return answer

    async def post(self, path: str) -> httpx.Response:
        """Send a POST request without a timeout. Raises `ApiError` if the backend does not answer."""
        try:
            return await self.client.post(path)
        except httpx.HTTPError:
            raise self.gone() from None

    def gone(self) -> ApiError:
        return ApiError(503, f"The {self.name} engine does not answer.", headers={"Retry-After": "30"})


@dataclass(frozen=True)
class Backends:
    """All backends. The first one gets the requests that name no model."""

    folder: PrivateFolder
    each: list[Backend]

    @classmethod
    def start(cls, served: Mapping[str, Sequence[str]], given: Sequence[str]) -> Self:
        """Start a process for each item of `backend → model names` with the command line `given`, and wait until all are ready.

        Raises `BackendError` if one ends before."""
        self = cls(PrivateFolder.make(), [])
        try:
            for backend, models in served.items():
                path = self.folder.path / backend
                own = ["--backend", backend, "--uds", str(path), "--api-key", "", "--served-model-name", *models]
                transport = httpx.AsyncHTTPTransport(uds=str(path), limits=httpx.Limits(max_connections=None))
                client = httpx.AsyncClient(transport=transport, base_url="http://backend", timeout=None)
                command = [sys.executable, "-m", "common.serve", *given, *own]
                self.each.append(Backend(backend, models, path, command, client))
            for started in self.each:
                self._wait(started)
        except BaseException:
            self.stop()
            raise
        return self

    def _wait(self, backend: Backend) -> None:
        while backend.process.poll() is None:
            if backend.accepts:
                return
            time.sleep(POLL_S)
        raise BackendError(f"The server of the {backend.name} engine ended with exit code {backend.process.returncode}.")

    def keep(self) -> None:
        """Supervise all processes, on the running event loop, until `restart_no_more`."""
        for backend in self.each:
            backend.keeping = [asyncio.create_task(backend.keep()), asyncio.create_task(backend.watch())]

    @property
    def hopeless(self) -> bool:
        """Whether no backend will be restarted."""
        return all(backend.given_up for backend in self.each)

    def restart_no_more(self) -> None:
        for backend in self.each:
            for task in backend.keeping:
                task.cancel()

    def kill(self) -> None:
        """Kill all processes."""
        for backend in self.each:
            backend.process.kill()
        self.folder.remove()

    async def get(self, path: str) -> list[httpx.Response]:
        """Return the answers of the backends that answer. Raises `ApiError` if none does."""
        answers = await asyncio.gather(*(backend.get(path) for backend in self.each), return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        if len(errors) == len(answers):
            raise errors[0]
        return [answer for answer in answers if isinstance(answer, httpx.Response)]

    def stop(self) -> None:
        """Ask all processes to end, wait, and kill those that remain."""
        for backend in self.each:
            if backend.process.stdin is not None:
                backend.process.stdin.close()
        for backend in self.each:
            try:
                backend.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                backend.process.kill()
                backend.process.wait()
        self.folder.remove()

    def by_model(self, name: str | None) -> Backend:
        """Return the backend that `model@backend` names. A plain name or None selects the first backend that is ready."""
        named = [backend for backend in self.each if name is None or name in backend.models]
        if named:
            return next((backend for backend in named if backend.lives), named[0])
        known = ", ".join(dict.fromkeys(model for backend in self.each for model in backend.models))
        raise ApiError(404, f"The model {quoted(name)} does not exist; served here: {known}.", "model")

    @classmethod
    def of(cls, http: HttpRequest) -> Self:
        backends: Self = http.app.state.backends
        return backends


def accepts(path: Path) -> bool:
    """Whether a process accepts connections at a socket of the file system."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.setblocking(False)  # else the call blocks if the queue of the socket is full
        return connection.connect_ex(str(path)) == 0


@router.get("/v1/models")
async def models(http: HttpRequest) -> Response:
    """List the models of the backends that run."""
    answers = [answer.json() for answer in await Backends.of(http).get("/v1/models")]
    first = {model["id"]: model for answer in reversed(answers) for model in answer["data"]}
    ids = dict.fromkeys(model["id"] for answer in answers for model in answer["data"])
    return json_response({"object": "list", "data": [first[name] for name in ids]})


@router.get("/v1/models/{name:path}")
async def one_model(http: HttpRequest, name: str) -> Response:
    return json_response((await Backends.of(http).by_model(name).get(http.scope["path"])).json())


@router.get("/health")
async def health(http: HttpRequest) -> Response:
    """Return 200 while all backends do."""
    for backend in Backends.of(http).each:
        await backend.get("/health")
    return Response()


@router.get("/metrics")
async def metrics(http: HttpRequest) -> Response:
    """Return the metrics of all backends that answer, with the label `engine`."""
    backends = Backends.of(http)
    texts = [answer.text for answer in await backends.get("/metrics")]
    registry = CollectorRegistry()
    registry.register(_Merged(texts))
    serves = Gauge("tandem:backend_serves", "Whether the process of a backend serves.", ("engine",), registry=registry)
    for backend in backends.each:
        serves.labels(engine=backend.name).set(backend.accepts)
    return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")


async def all_backends(http: HttpRequest) -> Response:
    """Pass an operator's request to every backend, or to the one that `?model=` names. Return the answers by backend."""
    backends, name = Backends.of(http), http.query_params.get("model")
    asked = backends.each if name is None else [backends.by_model(name)]
    answers = await asyncio.gather(*(backend.post(http.scope["path"]) for backend in asked))
    for backend, answer in zip(asked, answers, strict=True):
        if answer.status_code != 200:
            error = answer.json()["error"]
            raise ApiError(answer.status_code, f"{backend.name}: {error['message']}", error["param"])
    said = {backend.name: answer.json() for backend, answer in zip(asked, answers, strict=True) if answer.content}
    return json_response(said) if said else Response()


for path in OFFERED_WITH:
    router.post(path)(all_backends)


class Named(Body):
    """The part of a body that routes it."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _Merged(Collector):
    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def collect(self) -> list[Metric]:
        families: dict[str, Metric] = {}
        for text in self._texts:
            for family in text_string_to_metric_families(text):
                families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                ).samples += family.samples
        return list(families.values())


@router.api_route("/{path:path}", methods=["GET", "POST"])
async def pass_on(http: HttpRequest) -> Response:
    """Pass any other request to the backend of its model, unchanged. The body of a GET is dropped."""
    has_body = "transfer-encoding" in http.headers or http.headers.get("content-length", "0") != "0"
    data = await read_bytes(http) if has_body and http.method == "POST" else b""
    name = (await asyncio.to_thread(parse, Named, data)).model if data else http.query_params.get("model")
    backend = Backends.of(http).by_model(name)
    headers = {name.encode(): http.headers[name].encode("latin-1") for name in PASSED_ON if name in http.headers}
    try:
        url = backend.client.base_url.copy_with(raw_path=http.scope["raw_path"])  # a path that starts with // names no host
        request = httpx.Request(http.method, url, content=data, headers=headers)
    except httpx.InvalidURL:  # longer than any path here is
        raise HTTPException(404) from None
    return Passed(request, backend)


class Passed(Response):
    """The answer of a backend, passed on as it arrives.

    If the client disconnects, the connection to the backend is closed, and the backend aborts the request."""

    def __init__(self, request: httpx.Request, backend: Backend) -> None:
        super().__init__()
        self._request, self._backend = request, backend

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await unless_left(receive, self._pass(noted))
        except ApiError:
            if not begun:  # else the status has been sent
                raise

    async def _pass(self, send: Send) -> None:
        # The transport serves one request. A shared pool leaks the connection of a request that is cancelled before the first
        # byte of its answer.
        async with httpx.AsyncHTTPTransport(uds=str(self._backend.path), verify=False) as transport:  # no TLS, no certificates
            try:
                answer = await transport.handle_async_request(self._request)
            except httpx.HTTPError:
                raise self._backend.gone() from None
            headers = {name: answer.headers[name] for name in PASSED_BACK if name in answer.headers}
            kind = answer.headers.get("content-type", "")
            content = self._events(answer) if kind.startswith("text/event-stream") else answer.aiter_raw()
            await StreamingResponse(content, answer.status_code, headers, kind).stream_response(send)

    async def _events(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        """Yield the events of a stream. If the backend dies, the last events are an error as the client of the path expects."""
        passing: Passing = ResponseEvents() if self._request.url.path == RESPONSES else Chunks()
        try:
            async for chunk in answer.aiter_raw():
                if events := passing.push(chunk):
                    yield events
        except httpx.HTTPError:
            yield passing.end(self._backend.gone())


def create_front(backends: Backends, *, api_key: str | None = None) -> FastAPI:
    """Return the application. It restarts backends that end before it does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        backends.keep()
        yield
        backends.restart_no_more()

    app = new_app(lifespan)
    app.state.backends = backends
    app.include_router(router)
    app.add_middleware(Guard, api_key=api_key)
    return app
