"""`engine=openai_http`: any OpenAI-compatible server as an engine, one that runs already or one started for the run.

Times are those of a client: a token is seen when its bytes are read from the socket, and HTTP, JSON and detokenization are part
of what is measured. One thread does it all, asleep on the sockets of all requests at once; each request has a connection of its
own, and to end a request is to close that.
"""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from common.config import EngineConfig, expect, real
from common.errors import BackendError
from common.interface import Caps, Progress
from common.request import Request, Status, TokenEvent
from common.system.hardware import cores
from experiments.baselines.greedy import GreedyEngine, check_request
from experiments.engines.constraints import ALONE
from experiments.engines.environments import peers_folder
from experiments.engines.http_stream import DONE, UNNAMED, EventStream, WireError, http_request, read_chunk
from experiments.engines.server import Server, free_port, models, parse_url, program

if TYPE_CHECKING:
    from common.weights.checkpoint import Checkpoint

READ = 1 << 16
"""Bytes at a time."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where the server is, or how it is started; beside the options that all engines have."""

    base_url: str | None = None
    """`http://host:port`; None takes a free port of this machine for `command`."""
    command: Sequence[str] = ()
    """Program and arguments, in which `{model}`, `{port}`, `{threads}`, `{peers}` (the folder of `.venv-vllm` and others),
    `{kv_tokens}` (max_num_seqs × max_model_len) and any `{option}` of `EngineConfig` are filled in. Empty: it runs already."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to that of `command`."""
    served_model: str | None = None
    """The model to ask for; None takes the first that the server offers."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """More keys of every request; null takes one out."""
    start_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        texts = isinstance(self.command, Sequence) and all(isinstance(part, str) and part for part in self.command)
        expect(
            texts and not isinstance(self.command, str),
            f"command must be a list such as [llama-server, --port, '{{port}}'], got {self.command!r}.",
        )
        expect(
            bool(self.command) or self.base_url is not None,
            "engine=openai_http needs base_url, where a server runs, or command, which starts one.",
        )
        if self.base_url is not None:
            parse_url(self.base_url)
        expect(
            isinstance(self.environment, Mapping) and all(isinstance(value, str) for value in self.environment.values()),
            f"environment must be a mapping from names to texts, got {self.environment!r}.",
        )
        expect(bool(self.command) or not self.environment, "environment is for the server that command starts.")
        expect(isinstance(self.extra_body, Mapping), f"extra_body must be a mapping, got {self.extra_body!r}.")
        expect(
            self.served_model is None or (isinstance(self.served_model, str) and bool(self.served_model)),
            f"served_model must be a name or null, got {self.served_model!r}.",
        )
        seconds = self.start_timeout_s
        expect(
            real(seconds, 0, float("inf")) and seconds > 0,
            f"start_timeout_s must be a number of seconds > 0, got {seconds!r}.",
        )

    def check(self, config: EngineConfig) -> None:
        """Raise `ConfigError` for several ranks or replicas of which the server would not be told, and `BackendError` if there
        is no program to start it."""
        for option, alone in ALONE.items():
            number = getattr(config, option)
            expect(
                number == alone or any(f"{{{option}}}" in part for part in self.command),
                f"{option}={number} does not reach the server: only a command that has the word {{{option}}} passes it on. "
                f"Put it there, or give this engine {option}:{alone}.",
            )
        for name in fill(self.command[:1], {"peers": str(peers_folder())}):
            if "{" not in name:  # else the model decides, which is not known yet
                program(name)


def build_engine(
    checkpoint: Checkpoint, config: EngineConfig, progress: Progress | None = None, *, options: Options
) -> CompletionsEngine:
    """Start the server, if that is asked for, and wait until it offers the model. Raises `BackendError` if it does not."""
    if progress:
        progress(0, 1, "server")
    server, url = None, options.base_url or f"http://127.0.0.1:{free_port()}"
    if options.command:
        server = Server(fill(options.command, placeholders(checkpoint, config, url)), options.environment, url)
        offered = server.wait(options.start_timeout_s)
    else:
        try:
            offered = models(url)
        except OSError as error:
            raise BackendError(f"No server answers at {url} ({error}); start it, or set command so that we do.") from error
    name = options.served_model or next(iter(offered), None)
    if name not in offered:
        tail = server.tail() if server else ""
        if server:
            server.close()
        raise BackendError(f"The server at {url} offers {', '.join(offered) or 'no model'}, not {name or 'one'}.{tail}")
    if progress:
        progress(1, 1, "server")
    caps = Caps(
        backend="openai_http",
        device="server",
        dtypes=("float32", "bfloat16"),
        kernels=("framework",),
        max_seqs=config.max_num_seqs,
        max_model_len=config.model_len(checkpoint.config),
        vocab_size=checkpoint.config.vocab_size,
    )
    return CompletionsEngine(url, name, caps, options.extra_body, server)


def placeholders(checkpoint: Checkpoint, config: EngineConfig, url: str) -> dict[str, str]:
    length = config.model_len(checkpoint.config)
    values: dict[str, Any] = asdict(config) | {
        "model": checkpoint.path,
        "port": parse_url(url).port or 80,
        "threads": config.threads or cores(),
        "peers": peers_folder(),
        "max_model_len": length,
        "kv_tokens": config.max_num_seqs * length,
    }
    return {name: str(value) for name, value in values.items()}


def fill(command: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """Each `{name}` by its value; other braces stay."""
    filled = []
    for part in command:
        for name, value in values.items():
            part = part.replace(f"{{{name}}}", value)
        filled.append(part)
    return filled


@dataclass(eq=False)
class _Exchange:
    """One request on its connection."""

    request: Request
    connection: socket.socket
    unsent: bytes
    stream: EventStream = field(default_factory=EventStream)
    seen: int = 0
    """Tokens that have come."""
    finish: Status | None = None


class CompletionsEngine(GreedyEngine[_Exchange]):
    """Greedy requests of a fixed length, each a completion of the server. A request that fails leaves the others alone."""

    def __init__(self, url: str, model: str, caps: Caps, extra: Mapping[str, Any], server: Server | None = None) -> None:
        """`server`, if given, ends with the engine."""
        super().__init__(caps)
        self._url, self._model, self._extra, self._server = parse_url(url), model, extra, server
        self._selector = selectors.DefaultSelector()

    def add(self, request: Request) -> None:
        check_request(request, self._caps, self._live)
        unsent = http_request(self._url, request, self._model, self._extra)
        try:
            host = (self._url.hostname or "", self._url.port or 80)
            family, kind, protocol, _, address = socket.getaddrinfo(*host, type=socket.SOCK_STREAM)[0]
            connection = socket.socket(family, kind, protocol)
        except OSError as error:
            self._ended.append(self._failure(request, f"{error}"))
            return
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.connect_ex(address)  # how it went shows once the socket can be written to
        self._live[request.request_id] = exchange = _Exchange(request, connection, unsent)
        self._selector.register(connection, selectors.EVENT_WRITE, exchange)

    def step(self, timeout: float | None = None) -> list[TokenEvent]:
        events, self._ended = self._ended, []
        if self._live:
            for key, _ in self._selector.select(0 if events else timeout):
                events += self._advance(key.data)
        return events

    def _advance(self, exchange: _Exchange) -> list[TokenEvent]:
        """Send or receive what the socket is ready for."""
        events: list[TokenEvent] = []
        try:
            if exchange.unsent:
                self._send(exchange)
                return events
            data = exchange.connection.recv(READ)
            now = time.perf_counter()
            arrived = exchange.stream.feed(data) if data else exchange.stream.close()
            for message in [*arrived, DONE] if exchange.stream.ended else arrived:
                if message == DONE:
                    events.append(self._finish(exchange, now))
                    break
                events += self._tokens(exchange, message, now)
        except (WireError, OSError) as error:
            self._drop(exchange.request.request_id)
            events.append(self._failure(exchange.request, str(error)))
        return events

    def _send(self, exchange: _Exchange) -> None:
        if code := exchange.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(code, f"cannot connect to {self._url.netloc}: {os.strerror(code)}")
        exchange.unsent = exchange.unsent[exchange.connection.send(exchange.unsent) :]
        if not exchange.unsent:
            self._selector.modify(exchange.connection, selectors.EVENT_READ, exchange)

    def _tokens(self, exchange: _Exchange, message: str, now: float) -> list[TokenEvent]:
        request = exchange.request
        wanted = request.params.logprobs
        chunk = read_chunk(message, exchange.seen, wanted, request.params.max_tokens or 0)
        if strange := [token for token in chunk.tokens if token != UNNAMED and not 0 <= token < self.caps.vocab_size]:
            raise WireError(f"it gives token {strange[0]}, which the model does not have")
        if wanted is not None and chunk.tokens and (chunk.logprobs is None or UNNAMED in chunk.tokens):
            raise WireError("it names no tokens with their log-probabilities; correctness.num_requests=0 asks for none")
        exchange.seen += len(chunk.tokens)
        exchange.finish = chunk.finish or exchange.finish
        logprobs = chunk.logprobs or [None] * len(chunk.tokens)
        return [TokenEvent(request.request_id, token, now, entry) for token, entry in zip(chunk.tokens, logprobs, strict=True)]

    def _finish(self, exchange: _Exchange, now: float) -> TokenEvent:
        """The answer is complete, or its connection has ended in good order."""
        self._drop(exchange.request.request_id)
        if exchange.finish in (None, Status.FINISHED_ERROR):
            return self._failure(exchange.request, "the answer ended without a finish_reason of length or stop")
        return TokenEvent(exchange.request.request_id, None, now, finish=exchange.finish)

    def _failure(self, request: Request, why: str) -> TokenEvent:
        if self._server and self._server.exit_code is not None:
            why = f"{why} (it has ended with exit code {self._server.exit_code}){self._server.tail()}"
        error = f"The server at {self._url.netloc} failed: {why}"
        return TokenEvent(request.request_id, None, time.perf_counter(), finish=Status.FINISHED_ERROR, error=error)

    def _drop(self, request_id: str) -> None:
        """Close its connection, at which a server stops computing it."""
        exchange = self._live.pop(request_id)
        self._selector.unregister(exchange.connection)
        exchange.connection.close()

    def stats(self) -> dict[str, Any]:
        """Of the server nothing but its memory is seen, and of one that we did not start not even that."""
        if self._server is None:
            return {}
        held, most = self._server.memory()
        return {"others_rss_bytes": held, "others_peak_rss_bytes": most}

    def reset_prefix_cache(self) -> bool:
        """There is no common way to ask a server for it: start one that has none, or know that it is warm."""
        return False

    def close(self) -> None:
        for request_id in list(self._live):
            self._drop(request_id)
        self._selector.close()
        if self._server:
            self._server.close()
