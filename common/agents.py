"""Processes that an agent starts for this one, on this machine or another: what `common.child` does here.

An agent listens. Who connects tells it the secret of the launch and what to start. From then on the connection is standard
input and output of that process, and no longer the agent's: so the process ends when the connection does, and who is at our
end of it hears at once that it has ended.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import select
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from common import child
from common.errors import BackendError
from common.lines import heed, reach, say

log = logging.getLogger(__name__)

_AGENTS = "TANDEM_AGENTS"
"""The environment variable in which a process finds the agents of its launch."""
_MAX_STRANGERS = 64
"""Who have connected and not yet said what for."""
_AGAIN_S = 0.1


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
        """In which a process has them as its own."""
        return {_AGENTS: json.dumps(self)}


def agents() -> Agents | None:
    """Those of the launch that this process belongs to, or None if nobody launched it."""
    given = os.environ.get(_AGENTS)
    if not given:
        return None
    host, secret, every = json.loads(given)
    return Agents(host, secret, [Agent(*each) for each in every])


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


class There:
    """A process that an agent has started: a `common.followers.Process`."""

    def __init__(self, agent: Agent, secret: str, main: str, *arguments: Any) -> None:
        """Raises `AgentLost` if it does not answer."""
        self._where = f"{agent.host}:{agent.port}"
        try:
            hello = {"secret": secret, "main": main, "arguments": arguments}
            self._line, started = reach(agent.host, agent.port, hello)
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
    """Start what is asked for by those who connect and know the secret, for ever."""
    room = threading.BoundedSemaphore(_MAX_STRANGERS)
    while True:
        room.acquire()
        try:
            line, _ = listener.accept()
        except OSError as trouble:  # as where the process has no descriptors left
            log.warning("Nobody could connect: %s.", trouble)
            room.release()
            time.sleep(_AGAIN_S)
            continue
        # The process ends with the thread that has started it.
        threading.Thread(target=_serve, args=(line, secret, room), daemon=True).start()


def _serve(line: socket.socket, secret: str, room: threading.Semaphore) -> None:
    """One process, to its end. There is `room` again once it is known who has connected."""
    with line:
        try:
            hello = heed(line, secret)
        except OSError as trouble:
            log.warning("Nothing was started for a connection: %s.", trouble)
            return
        finally:
            room.release()
        process = child.start(hello["main"], *hello["arguments"], line=line)
        with suppress(OSError):  # who asked is gone, which the process hears too
            say(line, {"pid": process.pid})
    child.watch(process)
    if process.returncode:
        log.warning("A rank of this launch (pid %d) %s.", process.pid, child.how_it_ended(process.returncode))
