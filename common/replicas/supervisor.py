"""The process of one replica: started, watched, and started again when it has ended, is stopped, or gives no sign of life.

A thread for each does this, and says what happens in the order in which it does. It waits for the next frame in short turns and
counts those in which none came, instead of looking at a clock: so time in which this process did not run itself, suspended or
on a machine that was asleep, is nobody's silence.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, NamedTuple

from common.interface import ReplicaState
from common.process import child
from common.process.frames import Frame, Message, NoFrame, read_frame, write_frame

BEAT_S = 0.25
"""Between two signs of life of a replica."""
SILENCE_S = 10.0
"""Without one, and without using the processor, after which it counts as dead."""
BUSY_SILENCE_S = 60.0
"""Likewise while it uses the processor: a library may hold up all threads of a process, and a machine have much to do."""
LOADING_SILENCE_S = 60.0
"""Likewise before it serves."""
TURN_S = 0.1
GRACE_S = 2.0
"""For a replica that serves to end as it likes to, which is nicer to processes of its own."""
ATTEMPTS = 3
"""How often in a row a replica may end without having served until it is given up."""
RETRY_S = 1.0


class Link:
    """The way to a process. To send on it takes no time, whatever the process does, and is in vain once it has ended."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._caller = stream, os.getpid()
        self._orders: queue.SimpleQueue[tuple[Message, bytes] | None] = queue.SimpleQueue()
        threading.Thread(target=self._write, daemon=True).start()

    def send(self, message: Message, data: bytes = b"") -> None:
        """Raises `BackendError` in a fork of the process that has started it."""
        child.expect_no_fork(self._caller)
        self._orders.put((message, data))

    def close(self) -> None:
        """At which the process ends, once it has had what was sent before."""
        self._orders.put(None)

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while (order := self._orders.get()) is not None:
                write_frame(self._stream, order[0], [order[1]])
        with contextlib.suppress(OSError):
            self._stream.close()


class Ready(NamedTuple):
    """A replica serves: what it says of itself, and the way to it."""

    replica: int
    told: Message
    link: Link


class Reported(NamedTuple):
    """What a replica says."""

    replica: int
    frame: Frame


class Exited(NamedTuple):
    """A replica has ended."""

    replica: int
    how: str
    """The rest of a sentence."""
    error: Mapping[str, str] | None
    """`kind` and `message` of what was raised in it, if it told."""
    given_up: bool


SupervisorEvent = Ready | Reported | Exited


class Supervisor:
    """Keeps replica `index`: the function `main` with `arguments`, as `child.start` takes them. `post` is called on a
    thread. `again` returns the arguments of further starts, from the report of a process that serves."""

    def __init__(
        self,
        index: int,
        main: str,
        arguments: Sequence[Any],
        environment: Mapping[str, str],
        post: Callable[[SupervisorEvent], object],
        again: Callable[[Message], Sequence[Any]] | None = None,
    ) -> None:
        self._index, self._main, self._arguments, self._environment = index, main, arguments, environment
        self._post, self._again = post, again
        self._state = ReplicaState(0, False, 0.0)
        self._closing = threading.Event()
        self._lock = threading.Lock()  # over the start of a process and the end of them all
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None
        self._thread = threading.Thread(target=self._keep, name=f"replica {index}", daemon=True)
        self._thread.start()

    @property
    def state(self) -> ReplicaState:
        """Any thread may ask."""
        return self._state

    def close(self) -> None:
        """Begin to end it; `join` waits."""
        with self._lock:
            self._closing.set()
            if self._link is not None:
                self._link.send({"order": "end"})

    def join(self) -> None:
        """Wait until it has ended, and insist."""
        self._thread.join(GRACE_S if self._state.serves else 0)
        if self._link is not None:
            self._link.close()
        self._thread.join(child.PATIENCE_S)
        if self._thread.is_alive() and self._process is not None:
            self._process.kill()
            self._thread.join()

    def _keep(self) -> None:
        failures = 0
        while process := self._start():
            how, error = self._watch(process)
            failures = 0 if self._state.serves else failures + 1
            self._state = ReplicaState(process.pid, False, 0.0, failures == ATTEMPTS)
            self._post(Exited(self._index, how, error, failures == ATTEMPTS))
            if failures == ATTEMPTS or self._closing.wait(failures * RETRY_S):
                break

    def _start(self) -> subprocess.Popen[bytes] | None:
        """None once it is to end."""
        with self._lock:
            if self._closing.is_set():
                return None
            process = child.start(self._main, *self._arguments, environment=self._environment)
            assert process.stdin
            self._process, self._link = process, Link(process.stdin)
        self._state = ReplicaState(process.pid, False, 0.0)
        return process

    def _watch(self, process: subprocess.Popen[bytes]) -> tuple[str, Mapping[str, str] | None]:
        """Tell what it says until it has ended; then how, and the error that it told."""
        assert process.stdout and self._link
        silence = child.Silence(process.pid, LOADING_SILENCE_S, BUSY_SILENCE_S)
        source, error, how = HeartbeatReader(process, silence, self._note_silence), None, ""
        try:
            while (frame := read_frame(source)) is not None:
                match frame.message:
                    case {"beat": seconds}:
                        self._state = self._state._replace(step_seconds=seconds)
                    case {"ready": told}:
                        silence.expect(SILENCE_S)
                        if self._again:
                            self._arguments = self._again(told)
                        self._state = self._state._replace(serves=True)
                        self._post(Ready(self._index, told, self._link))
                    case {"failed_to_start": told}:
                        error = told
                    case _:
                        self._post(Reported(self._index, frame))
        except NoFrame as garbage:
            how = f"wrote something else than an answer ({garbage})"
        except TimeoutError as silence:
            how = str(silence)
        if not how:
            with contextlib.suppress(subprocess.TimeoutExpired):
                how = child.how_it_ended(process.wait(child.PATIENCE_S))
        process.kill()
        process.wait()
        self._link.close()
        process.stdout.close()
        return how or "closed its output", error

    def _note_silence(self, turn_s: float) -> None:
        """A process that gives no sign of life is in a unit of work, as far as its keeper knows."""
        self._state = self._state._replace(step_seconds=self._state.step_seconds + turn_s)


class HeartbeatReader:
    """The output of a process that must neither be silent for long nor be stopped: then to read raises `TimeoutError`."""

    def __init__(self, process: subprocess.Popen[bytes], silence: child.Silence, note: Callable[[float], object]) -> None:
        """`note` is called for each turn without a sign of life, behind the first few, which are between two beats."""
        assert process.stdout
        self._silence, self._note = silence, note
        self._file, self._poll = process.stdout.fileno(), select.poll()
        self._poll.register(self._file, select.POLLIN)

    def read(self, size: int, /) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            if not self._poll.poll(TURN_S * 1e3):
                if why := self._silence.go_on(TURN_S):
                    raise TimeoutError(why)
                if self._silence.seconds > 2 * BEAT_S:
                    self._note(TURN_S)
                continue
            part = os.read(self._file, size - len(parts))
            if not part:
                break
            parts += part
            self._silence.end()
        return bytes(parts)
