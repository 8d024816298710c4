"""The server's command line, its socket, and its end."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, get_args

import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from common.config import expect as expect_config
from common.errors import ConfigError, TandemError
from common.interface import Progress, expect_backend
from common.options import add_engine_options, add_model_options, engine_options, parse, without
from common.process.child import die_with_parent
from common.process.exits import FAILURE, INTERRUPTED, USER_ERROR, exit_code, sigterm_raises
from common.replicas.factory import open_engine
from common.serve.app import create_app
from common.serve.front import Backends, create_front
from common.serve.guard import JsonLines, TextLines
from common.serve.http import Http
from common.serve.metrics import Metrics
from common.serve.model import ServedModel
from common.serve.profiler import Profiler
from common.serve.serving import Serving
from common.serve.spans import Spans
from common.serve.worker import Worker
from common.text.opened import defaults_of, tokenizer_of
from common.text.reasoning import ReasoningParser
from common.text.tool_calls import FORMATS
from common.weights.checkpoint import open_checkpoint
from common.weights.zoo import resolve

log = logging.getLogger("common.serve.main")
SAME_S = 0.1
"""Interval within which a second SIGINT counts as the first: a launcher may pass it on."""
FAILED_DRAIN_S = 2
"""Time for requests to get the error that no engine is left."""
TELL_S = 5.0
"""Interval between two log lines about the progress of loading."""
ANY_REQUEST: dict[str, Any] = {"allow_methods": ["*"], "allow_headers": ["*"], "expose_headers": ["x-request-id"]}
"""Methods and headers for pages of an allowed origin."""
TOLD_BY_THE_FRONT = (log.name, "common.serve.guard")
"""Loggers of each HTTP request and of the end of the server, which the front writes for all backends."""


def make_parser(prog: str = "python -m common.serve") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [MODEL] [options]",
        description="Serve a model to OpenAI's clients, and to people at /.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_options(parser, "jax, torch, or jax,torch: each in a process of its own")
    parser.add_argument("--served-model-name", nargs="+", default=[], help="names to serve it by, instead of --model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every one of this machine")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--uds", help=argparse.SUPPRESS)  # a socket in the file system; ends when standard input does
    parser.add_argument("--api-key", help="ask for it; None takes $TANDEM_API_KEY")
    parser.add_argument(
        "--allowed-origins",
        type=origins,
        default=[],
        metavar="JSON",
        help="""origins whose pages may call this server from a browser, such as '["http://localhost:3000"]', or '["*"]'""",
    )
    parser.add_argument(
        "--tool-call-parser",
        choices=("auto", *FORMATS),
        default="auto",
        help="the format in which the model writes calls of tools; auto reads it from the chat template",
    )
    parser.add_argument("--enable-auto-tool-choice", action="store_true", help="always so: accepted for vLLM's command lines")
    parser.add_argument(
        "--reasoning-parser",
        choices=get_args(ReasoningParser),
        help="answers have the reasoning of the model, <think>…</think>, in a field of its own",
    )
    parser.add_argument("--admin", action="store_true", help="offer /reset_prefix_cache")
    parser.add_argument(
        "--profile-dir", help="with --admin: offer /start_profile and /stop_profile, which writes a trace there"
    )
    parser.add_argument(
        "--otlp-endpoint", help="send a span for each request there: OTLP over HTTP, http://host:4318/v1/traces"
    )
    parser.add_argument("--drain-s", type=int, default=60, help="seconds that running requests have once it is told to end")
    parser.add_argument(
        "--stall-s",
        type=float,
        default=Serving.stall_s,
        help="a step that takes longer makes /health answer 503; of several backends, one that is in it is started again",
    )
    parser.add_argument("--log-json", action="store_true", help="log lines are JSON objects")
    parser.add_argument("--log-prompts", action="store_true", help="log what is asked; never done otherwise")
    add_engine_options(parser)
    return parser


def origins(text: str) -> list[str]:
    """Read a JSON list of origins. vLLM writes them so."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise argparse.ArgumentTypeError(f"""expected a JSON list of strings such as '["*"]', got {text!r}""")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to end. Returns the exit code: 0 after a drain, 1 where no engine is left, 2 for a mistake of the
    caller, and where no engine can be had."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["serve"] and not os.path.exists("serve"):  # as in `vllm serve MODEL`
        del given[0]
    try:
        options = parse(make_parser(), given)
        for name in options.backend.split(","):
            expect_backend(name)
        configure_logging(options.log_json, options.backend if options.uds else None)
        with sigterm_raises():  # SIGTERM during loading also ends the backends
            if options.uds:
                die_with_parent()  # where that is killed, even while this process is stopped or hangs
                threading.Thread(target=end_with_parent, daemon=True).start()  # where that ends in order
            with listen(options) as listener:
                return serve(options, given, listener)
    except TandemError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt as end:
        # It loads: Python would wait for the threads that compile. Replicas and ranks end as their input does.
        os._exit(exit_code(end))


def serve(options: argparse.Namespace, given: Sequence[str], listener: socket.socket) -> int:
    """Get ready and serve, at the command line `given`, until told to end or no engine is left; the exit code."""
    names = options.backend.split(",")
    backends = start_backends(options, names, given) if len(names) > 1 else None
    try:
        app = make_app(options) if backends is None else create_front(backends, api_key=api_key(options))
        if options.allowed_origins and not options.uds:  # outside of the guard: a preflight request has no key
            app.add_middleware(CORSMiddleware, allow_origins=options.allowed_origins, **ANY_REQUEST)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            http=Http,
            timeout_keep_alive=75,  # seconds; longer than clients keep a connection, or they send on one that is being closed
            ws="none",
            lifespan="on",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=options.drain_s,
        )
        engines = app.state.serving.worker if backends is None else backends
        server = Server(config, engines)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, server.told_to_end)
        if not options.uds:
            host, port = listener.getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            log.info("Serving %s (%s) at %s", options.model, options.backend, url)
        freeze_objects()
        server.run(sockets=[listener])
    finally:
        if backends is not None:
            backends.stop()
    log.info("Ended.")
    return FAILURE if server.failed else 0


def freeze_objects() -> None:
    """Leave the objects that exist now out of later collections of garbage: a full one visits all objects of a framework, which
    stops the process for up to 0.6 s."""
    gc.collect()
    gc.freeze()


class Server(uvicorn.Server):
    """Logs the beginning of its end. A second SIGINT ends the process at once. The server also ends if no engine is left, so
    that a supervisor can restart it."""

    def __init__(self, config: uvicorn.Config, engines: Worker | Backends) -> None:
        super().__init__(config)
        self._engines = engines
        self._backends = engines if isinstance(engines, Backends) else None
        self.failed = False
        """Whether the server ends because no engine is left."""
        self._told = -SAME_S

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is to end."""
        told = await super().on_tick(counter)
        self.failed = not told and self._engines.hopeless
        if self.failed:  # nothing that is unfinished can still be answered otherwise than with an error
            self.config.timeout_graceful_shutdown = min(self.config.timeout_graceful_shutdown or 0, FAILED_DRAIN_S)
        return told or self.failed

    def told_to_end(self, *_: object) -> None:
        """For signals before uvicorn listens to them, and those that it raises again once it has drained."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        left, most = len(self.server_state.tasks), self.config.timeout_graceful_shutdown
        unfinished = f"{left} HTTP request{'s are' if left != 1 else ' is'} unfinished, with {most} s left"
        why = "No engine is left, so the server ends" if self.failed else "Told to end"
        log.info("%s: takes nothing new; %s. A second Ctrl-C ends it at once.", why, unfinished)
        if self._backends is not None:
            self._backends.restart_no_more()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        before, self._told = self._told, time.monotonic()
        if self.should_exit and sig == signal.SIGINT:
            if self._told - before < SAME_S:
                return
            log.warning("Told to end once more: at once, and what is unfinished is lost.")
            if self._backends is not None:
                self._backends.kill()
            os._exit(INTERRUPTED)  # whatever threads compute; replicas and ranks end as their input does
        super().handle_exit(sig, frame)


def make_app(options: argparse.Namespace) -> FastAPI:
    """The application over one engine, which is ready."""
    key = api_key(options)
    checkpoint = open_checkpoint(resolve(options.model))
    config = checkpoint.engine_config(**engine_options(options))
    tokenizer = tokenizer_of(checkpoint, options.tokenizer, options.chat_template)
    expect_config(options.admin or not options.profile_dir, "--profile-dir is for /start_profile, which needs --admin.")
    expect_config(
        (config.data_parallel_size == 1 and not config.prefill_parallel_size) or not options.profile_dir,
        "--profile-dir is for an engine in the server's own process, not for replicas: leave out --data-parallel-size and "
        "--prefill-parallel-size.",
    )
    profiler = Profiler.of(options.backend, options.profile_dir) if options.profile_dir else None
    spans = Spans.to(options.otlp_endpoint) if options.otlp_endpoint else None
    log.info("Loading %s (%s).", options.model, options.backend)
    worker = Worker(lambda: open_engine(options.backend, checkpoint, config, telling_now_and_then()))
    engine = worker.wait_ready()
    served = options.served_model_name or [model_name(options), f"{model_name(options)}@{options.backend}"]
    serving = Serving(
        model=ServedModel.of(
            served,
            checkpoint,
            tokenizer,
            engine.caps.max_model_len,
            defaults=defaults_of(checkpoint, options.generation_config),
            tool_format=FORMATS.get(options.tool_call_parser),
            reasoning=options.reasoning_parser,
        ),
        worker=worker,
        metrics=Metrics(served[0], options.backend),
        stall_s=options.stall_s,
        log_prompts=options.log_prompts,
        spans=spans,
    )
    return create_app(serving, api_key=key, with_admin=options.admin, profiler=profiler)


def telling_now_and_then() -> Progress:
    """For the log: how far loading has come, every few seconds."""
    told = time.monotonic()

    def progress(done: int, total: int, what: str) -> None:
        nonlocal told
        if (now := time.monotonic()) - told >= TELL_S:
            told = now
            log.info("Loading: %s (%d/%d).", what, done, total)

    return progress


def start_backends(options: argparse.Namespace, backends: Sequence[str], given: Sequence[str]) -> Backends:
    """One server process for each backend, for a front that passes requests on to them, and asks for the key that none of them
    is told: a command line can be read by all users of a machine."""
    api_key(options)
    expect_config(len(set(backends)) == len(backends), f"--backend names a backend twice: {options.backend}.")
    names = options.served_model_name or [model_name(options)]
    served = {backend: [*(f"{name}@{backend}" for name in names), *names] for backend in backends}  # answers carry the first
    return Backends.start(served, without("--api-key", given))


def model_name(options: argparse.Namespace) -> str:
    """What the model is called, unless told otherwise."""
    model: str = options.model
    return os.path.basename(os.path.normpath(model)) if os.path.exists(model) else model


def listen(options: argparse.Namespace) -> socket.socket:
    """Return the socket, bound before the model loads. Connections are refused until the server is ready."""
    family = socket.AF_UNIX if options.uds else socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family is not socket.AF_UNIX:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(options.uds or (options.host, options.port))
    except (OSError, OverflowError) as error:
        listener.close()
        where = options.uds or f"{options.host}:{options.port}"
        raise ConfigError(f"Cannot listen at {where} ({error}); give another --port or --host.") from error
    return listener


def api_key(options: argparse.Namespace) -> str | None:
    """Return the key of the server; None: requests need no key."""
    key: str | None = os.environ.get("TANDEM_API_KEY") if options.api_key is None else options.api_key
    if options.uds:
        return key or None  # the front checks the key; its backends have none
    expect_config(key != "", "The API key is empty; give one, or leave out --api-key and $TANDEM_API_KEY to ask for none.")
    return key


def end_with_parent() -> None:
    """Wait until the parent process has closed standard input, then end as after SIGTERM."""
    while os.read(sys.stdin.fileno(), 4096):  # not `sys.stdin.read`: a thread must not hold its lock while Python ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def configure_logging(as_json: bool, engine: str | None) -> None:
    """`engine`: of which of several backends this process is, behind a front."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(engine) if as_json else TextLines(engine))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("uvicorn", "httpx", *(TOLD_BY_THE_FRONT if engine else ())):
        logging.getLogger(name).setLevel(logging.WARNING)
