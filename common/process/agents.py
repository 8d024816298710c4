"""Processes that an agent starts for this one, on this machine or another: what `common.process.child` does here.

An agent listens. An authenticated connection (`common.process.connection`) names an entry of
`common.process.workers.ENTRY_POINTS`, and the agent starts it. The agent imports nothing by a name that came over the network.
The connection is then standard input and output of that process: it ends when the connection does, and this end is closed when
the process ends.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import select
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from common.errors import BackendError, shown
from common.process import child
from common.process.connection import Connection, connect
from common.process.connection import serve as serve_connections
from common.process.secret import SECRET
from common.process.workers import ENTRY_POINTS

log = logging.getLogger(__name__)

_AGENTS = "TANDEM_AGENTS"
"""The environment variable in which a process finds the agents of its launch."""


class AgentLost(BackendError):
    """An agent is no more, and so nobody can start anything where it was."""


class Agent(NamedTuple):
    """Where one of them listens, and on which `machine` it has which number."""

    host: str
    port: int
    machine: str
    pid: int


class Agents(NamedTuple):
    """Those of a launch."""

    host: str
    """By which their machines reach this one."""
    secret: str
    all: Sequence[Agent]

    def environment(self) -> dict[str, str]:
        """Return the environment variables from which `agents` reads them."""
        return {_AGENTS: json.dumps([self.host, self.all]), SECRET: self.secret}


def agents() -> Agents | None:
    """Those of the launch that this process belongs to, or None if nobody launched it."""
    given = os.environ.get(_AGENTS)
    if not given:
        return None
    host, every = json.loads(given)
    return Agents(host, os.environ[SECRET], [Agent(*each) for each in every])


def warn_of_idle(ranks: int) -> None:
    """Say so where more processes were launched than an engine of so many ranks has use for."""
    launch = agents()
    if launch and (idle := len(launch.all) - max(ranks - 1, 0)) > 0:
        log.warning(
            "Of the %d processes of this launch %d have nothing to do for an engine of %d rank%s: see tensor_parallel_size and "
            "pipeline_parallel_size.", 1 + len(launch.all), idle, ranks, "s" * (ranks > 1),
        )  # fmt: skip


def machine() -> str:
    """What this process calls the machine: the same where processes see each other, and can share memory."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return platform.node()


class RemoteProcess:
    """A process that an agent has started: a `common.process.workers.Process`."""

    def __init__(self, agent: Agent, secret: str, entry: str, *arguments: Any) -> None:
        """Start an entry of `ENTRY_POINTS` with `arguments` that JSON can hold. Raises `AgentLost` if the agent does not."""
        self._where = f"{agent.host}:{agent.port}"
        try:
            hello = {"entry": entry, "arguments": arguments}
            self._line, started = connect(agent.host, agent.port, secret, hello)
        except OSError as error:
            raise AgentLost(
                f"No rank can be started at {self._where}, where a process of this launch was: {error}. Its log says more. "
                "Launch all anew."
            ) from error
        self.pid, self.here = int(started["pid"]), agent.machine == machine()
        self.input: IO[bytes] = self._line.makefile("wb")
        self.output: IO[bytes] = self._line.makefile("rb")
        self._over = threading.Event()

    def watch(self) -> None:
        over = select.poll()
        over.register(self._line, select.POLLRDHUP)
        over.poll()
        self._over.set()

    def how_it_ended(self) -> str:
        return f"at {self._where} has ended"

    def end(self) -> None:
        for how in (socket.SHUT_WR, socket.SHUT_RDWR):
            with suppress(OSError):  # it is over already
                self._line.shutdown(how)
            self._over.wait(child.PATIENCE_S)
        for each in (self.input, self.output, self._line):
            with suppress(OSError):  # what was yet to be written
                each.close()


def serve(listener: socket.socket, secret: str) -> None:
    """Start processes for authenticated connections until the listener is closed."""
    serve_connections(listener, secret, partial(_start, secret))


def _start(secret: str, connection: Connection) -> None:
    """Start one process and wait until it has ended: it ends with the thread that has started it."""
    with connection.socket as line:
        entry = connection.hello.get("entry")
        if not isinstance(entry, str) or entry not in ENTRY_POINTS:
            with suppress(OSError):
                connection.refuse(f"An agent starts {' or '.join(ENTRY_POINTS)}, and was asked for {shown(entry)}.")
            return
        arguments = connection.hello.get("arguments", [])
        process = child.start(ENTRY_POINTS[entry], *arguments, environment={SECRET: secret}, line=line)
        with suppress(OSError):  # the process sees too that the connector is gone
            connection.answer({"pid": process.pid})
    child.watch(process)
    if process.returncode:
        log.warning("A rank of this launch (pid %d) %s.", process.pid, child.how_it_ended(process.returncode))
