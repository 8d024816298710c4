"""The server of `common.serve` as a deployment of Ray Serve: replicas on the machines of a cluster behind one address, with the
same OpenAI API. `make ray`, then

    .venv-ray/bin/python -m experiments.ray_serve --backend torch --model smollm2-135m --replicas 2 --threads 1

Ray places replicas and restarts a replica that has ended. With `--max-replicas` their number follows the load. A request goes
to one replica. If the replica ends before it has answered, the client gets a status of 500 or above, or a stream that breaks
off. OpenAI's clients then send the request again, and another replica answers.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

from fastapi import FastAPI

from common.config import expect
from common.errors import BackendError, TandemError
from common.model.partition import expect_shareable
from common.options import engine_options, parse
from common.process.exits import FAILURE, USER_ERROR, fail
from common.serve.command import api_key, listen, make_app, make_parser
from common.weights.checkpoint import open_checkpoint
from common.weights.zoo import resolve

NAME = "tandem"
LOGS = "/tmp/ray/session_latest/logs/serve"


def ray_parser() -> argparse.ArgumentParser:
    """Options of the server, and of Ray."""
    parser = make_parser("python -m experiments.ray_serve")
    group = parser.add_argument_group("Ray Serve")
    group.add_argument(
        "--replicas", type=int, default=1, help="engines, each in a process of its own, with --threads of its own"
    )
    group.add_argument("--max-replicas", type=int, help="as many as this where the load asks for them")
    group.add_argument("--gpus", type=float, default=0, help="of each replica")
    group.add_argument("--address", help="of a Ray cluster; without one, Ray is started on this machine")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal ends the server. Return the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = parse(ray_parser(), given)
        ray, serve = import_ray()
        expect_able(options)
        application = make_application(serve, options, given, api_key(options))
    except TandemError as error:
        fail(str(error), USER_ERROR)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    ray.init(address=options.address, include_dashboard=False, log_to_driver=False)
    try:
        print(f"Loading {options.replicas} replicas; their logs are in {LOGS}.", flush=True)
        try:
            serve.start(http_options={"host": options.host, "port": options.port})
            serve.run(application, name=NAME, route_prefix="/")
        except RuntimeError as error:  # with what a replica has raised
            fail(f"Ray could not start the replicas: {error} Their logs are in {LOGS}.", FAILURE)
        print(f"Serving {options.model} ({options.backend}) at http://{options.host}:{options.port}", flush=True)
        stop.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
    print("Ended.", flush=True)
    return 0


def expect_able(options: argparse.Namespace) -> None:
    """Raise now an error that each replica would raise in its own log."""
    checkpoint = open_checkpoint(resolve(options.model))
    config, model = checkpoint.engine_config(**engine_options(options)), checkpoint.config
    config.model_len(model)
    expect_shareable(model, config.tensor_parallel_size, config.pipeline_parallel_size)
    if options.address is None:  # else others listen
        listen(options).close()


def make_application(serve: Any, options: argparse.Namespace, given: Sequence[str], key: str | None) -> Any:
    """What Ray is to run. Raises `ConfigError` for what only a server of its own can do."""
    expect("," not in options.backend, f"Ray Serve has one backend for all replicas, got --backend {options.backend}.")
    expect(options.replicas >= 1, f"--replicas must be at least 1, got {options.replicas}.")
    most = options.max_replicas
    expect(most is None or most >= options.replicas, f"--max-replicas={most} is less than --replicas={options.replicas}.")

    def build() -> FastAPI:
        return app_of(tuple(given), key)

    class Replica:
        def check_health(self) -> None:
            worker = app_of(tuple(given), key).state.serving.worker
            if worker.hopeless or worker.stalled > options.stall_s:
                raise RuntimeError("The step loop has ended, or hangs.")

    scaling: dict[str, Any] = {"num_replicas": options.replicas}
    if most is not None:
        busy = {"target_ongoing_requests": max(1, options.max_num_seqs // 2)}
        scaling = {"autoscaling_config": {"min_replicas": options.replicas, "max_replicas": most, **busy}}
    deployment = serve.deployment(
        name=NAME,
        max_ongoing_requests=options.max_num_seqs,  # what is more waits for whichever replica has room first
        graceful_shutdown_timeout_s=options.drain_s,
        health_check_period_s=2.0,
        ray_actor_options={"num_cpus": options.threads or 1, "num_gpus": options.gpus},
        **scaling,
    )
    return deployment(serve.ingress(build)(Replica)).bind()


@cache
def app_of(given: tuple[str, ...], key: str | None) -> FastAPI:
    """The application of this replica, over an engine that is ready. One that names no threads has one, as Ray counts. The key
    comes from where the server was started, whose environment a replica elsewhere does not have."""
    options = parse(ray_parser(), given)
    options.threads, options.api_key = options.threads or 1, key
    return make_app(options)


def import_ray() -> tuple[Any, Any]:
    """`ray` and `ray.serve`. Raises `BackendError` where they are not installed."""
    for check in ("READY", "HEALTH"):  # which Ray reads as it is imported; its own few seconds a busy machine needs to start it
        os.environ.setdefault(f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S", "60")
    try:
        import ray
        from ray import serve
    except ModuleNotFoundError as error:
        raise BackendError("Ray Serve is not installed here. Run: make ray, and use .venv-ray/bin/python.") from error
    return ray, serve


if __name__ == "__main__":
    # Under its name: what Ray sends to a replica it finds there by the module's name, which `__main__` is none of.
    from experiments import ray_serve

    sys.exit(ray_serve.main())
