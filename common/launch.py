"""Run one engine on processes that `torchrun`, SLURM or a shell starts, on one machine or several:

    torchrun --nproc-per-node 2 -m common.launch common.serve --backend torch --pipeline-parallel-size 2

The first process runs the named module, as `python -m` does. Each other process is an agent (`common.process.agents`). The
agent starts one process for every engine of the first process. In PyTorch that process is one rank. In JAX it drives several
ranks if there are more ranks than processes. The engine and its callers need no code for a launch.

The launcher sets `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`; SLURM sets its own variables for the first two. The
processes connect at the port after `MASTER_PORT`, because `torchrun` listens at `MASTER_PORT`. Each process proves that it
knows the secret of the launch (`common.process.secret`, `common.process.connection`).
"""

from __future__ import annotations

import logging
import os
import queue
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

from common.config import expect
from common.errors import BackendError, TandemError
from common.process import agents
from common.process.agents import Agent, Agents, machine
from common.process.child import PARENTS
from common.process.connection import Connection, Refused, close_listener, connect, own_address, receive, send, serve
from common.process.exits import FAILURE, USER_ERROR, fail
from common.process.secret import launch_secret

log = logging.getLogger(__name__)

PATIENCE_S = 120.0
"""Until all have come together. A scheduler starts them one by one."""
_AGAIN_S = 0.1


class Launched(NamedTuple):
    """The place of this process in its launch."""

    rank: int
    size: int
    host: str
    port: int
    """Where the first is to listen."""
    secret: str
    """Of all processes of this launch."""


def launched(environment: Mapping[str, str]) -> Launched:
    """Read this process's place from the variables of its launcher. Raises `ConfigError` if one is missing."""
    ours = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "MASTER_ADDR": "MASTER_ADDR", "MASTER_PORT": "MASTER_PORT"}
    told = {name: environment.get(name) or environment.get(other) for name, other in ours.items()}
    missing = [name if name == ours[name] else f"{name} or {ours[name]}" for name, value in told.items() if not value]
    expect(
        not missing,
        f"A launched process finds its place in environment variables, and {', '.join(missing)} cannot be found. Launch it "
        "with `torchrun -m common.launch MODULE …`, or set them.",
    )
    numbers = {name: str(told[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    for name, value in numbers.items():
        expect(value.isdecimal(), f"{name} must be a number, got {value!r}.")
    rank, size, port = map(int, numbers.values())
    expect(port < 65535, f"MASTER_PORT must be less than 65535, for the port after it is used, got {port}.")
    expect(rank < size, f"RANK must be less than WORLD_SIZE={size}, got {rank}.")
    host = str(told["MASTER_ADDR"])
    return Launched(rank, size, host, port + 1, launch_secret(environment, host))


@contextmanager
def gather(told: Launched) -> Iterator[Agents]:
    """In the first process: the agents, which run until the end of the block. Raises `BackendError` if they do not connect."""
    found, deadline = dict[int, Agent](), time.monotonic() + PATIENCE_S
    arrivals: queue.SimpleQueue[Connection] = queue.SimpleQueue()
    with ExitStack() as held:
        try:
            listener = socket.create_server((told.host, told.port))
        except OSError as error:
            raise BackendError(
                f"Ranks cannot come together at {told.host}:{told.port}: {error}. Set another MASTER_PORT."
            ) from error
        with ExitStack() as until_complete:
            until_complete.callback(close_listener, listener)
            threading.Thread(target=serve, args=(listener, told.secret, arrivals.put), daemon=True).start()
            while missing := set(range(1, told.size)) - set(found):
                try:
                    connection = arrivals.get(timeout=max(1e-3, deadline - time.monotonic()))
                except queue.Empty:
                    raise BackendError(
                        f"Of the {told.size} processes of this launch {sorted(missing)} did not come to "
                        f"{told.host}:{told.port} within {PATIENCE_S:.0f} s. Their logs may say why."
                    ) from None
                with ExitStack() as refused, suppress(OSError, KeyError, TypeError):  # it has gone, or is of another version
                    refused.enter_context(connection.socket)
                    rank = connection.hello["rank"]
                    if _admits(connection, told, found):
                        found[rank] = Agent(connection.host, *(connection.hello[name] for name in ("port", "machine", "pid")))
                        held.enter_context(refused.pop_all())
        yield Agents(told.host, told.secret, [found[rank] for rank in sorted(found)])


def _admits(connection: Connection, told: Launched, found: Mapping[int, Agent]) -> bool:
    """Return whether a connection is from a missing process of this launch. Any other one is refused. Raises `OSError`."""
    rank, size = connection.hello["rank"], connection.hello["size"]
    if size != told.size:
        connection.refuse(f"WORLD_SIZE is {told.size} in the first process of this launch, and {size} here.")
    elif rank in found:
        connection.refuse(f"Another process of this launch has come with RANK={rank}.")
    elif rank in range(1, told.size):
        connection.answer({})
        receive(connection.socket)  # fails if the process has given up on this connection and connects again
        return True
    return False


def follow(told: Launched) -> None:
    """In any other process: start ranks until the first process ends. Raises `BackendError` if that is not there, or refuses
    this one."""
    begin = time.monotonic()
    while True:
        try:
            with socket.create_server((own_address(told.host), 0)) as listener:
                port = listener.getsockname()[1]
                hello = {"rank": told.rank, "size": told.size, "port": port, "machine": machine(), "pid": os.getpid()}
                line, _ = connect(told.host, told.port, told.secret, hello)
                send(line, {})
                for each in PARENTS:
                    signal.signal(each, signal.SIG_IGN)  # the first's to handle, whose end is ours
                threading.Thread(target=agents.serve, args=(listener, told.secret), daemon=True).start()
                with line, suppress(OSError):
                    line.recv(1)  # nothing ever comes but the end
                return
        except Refused as refused:
            raise BackendError(str(refused)) from refused
        except OSError as error:
            if time.monotonic() - begin > PATIENCE_S:
                raise BackendError(f"The first process of this launch is not at {told.host}:{told.port}: {error}.") from error
            time.sleep(_AGAIN_S)


def main(arguments: Sequence[str]) -> None:
    """Run a module with its arguments in the first process, and serve that process in each other one."""
    if not arguments or arguments[0].startswith("-"):
        fail("expected: torchrun --nproc-per-node N -m common.launch MODULE [ARGUMENTS].", USER_ERROR)
    try:
        told = launched(os.environ)
        if told.rank:
            logging.basicConfig(format=f"rank {told.rank}: %(message)s")
            follow(told)
            return
        with gather(told) as found:
            os.environ.update(found.environment())
            sys.argv = list(arguments)
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except TandemError as error:
        fail(str(error), FAILURE if isinstance(error, BackendError) else USER_ERROR)


if __name__ == "__main__":
    main(sys.argv[1:])
