"""The ranks that share a model, and what they exchange inside a step.

Ranks exchange sums for the residual stream, and what a sampler needs to know of the whole logits. They never exchange logits.
Stages, of one rank or several, share the layers: each sends the residual stream to the next.

PyTorch has one process per rank. The caller's process is the first rank of the last stage, where tokens are chosen. Its runner
starts the other processes and sends them every call, down to the bytes of each batch. All run the same step, each on its part.
Only the caller's process reads the results. Agents may start the others (`common.launch`), on one machine or several.

On CPUs the ranks of a stage exchange data through shared memory. A pipe leads from each rank to the rank of the next stage that
has its number. Where agents start the ranks, a connection replaces the pipe. A rank that ends is started again, and all ranks
connect anew. On other devices each process has one device, and `torch.distributed` (NCCL on NVIDIA's) moves all data between
devices. Its collectives wait for a lost rank without an end. So this process ends too, and its supervisor (`common.replicas`)
starts it again.

Letters: R logit rows · V vocabulary, of which each rank has n · k candidates.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from io import FileIO, RawIOBase
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from common.batch import Batch, Mask, masked
from common.config import EngineConfig
from common.errors import BackendError
from common.kernels.cpu.sums import (
    PeerLeft,
    SharedFile,
    SharedMemoryGroup,
    expect_told,
    meeting_place,
    open_library,
    open_place,
    place_of,
)
from common.process.agents import Agent, AgentLost, Agents, RemoteProcess, agents, machine
from common.process.connection import accept_one, connect, raw
from common.process.exits import FAILURE
from common.process.secret import SECRET
from common.process.workers import LocalProcess, Process, ProcessExited, WorkerHandle
from common.system.hardware import family_memory
from torchinfer.arrays import to_device, to_host
from torchinfer.device import choose_device, local_device

_log = logging.getLogger(__name__)

_SUMS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""What can be added up."""
_ATTEMPTS = 3
"""How often ranks try to meet."""
_PIPE_BYTES = 1 << 20
"""What may lie between two stages: a stage need not wait for the next, which is at an earlier step."""
_UNREAD_S = 30
"""That what is passed on over a network may wait for a stage that is at a long step."""
_PATIENCE_S = 60
"""Until a process has found the store of `torch.distributed`."""
_HUNG_S = 600
"""After which `torch.distributed` gives up one that neither ends nor does what all do."""
_HEARD_S = 1.0
"""Seconds within which the end of a process is detected. A failed rendezvous waits for it, because its report states more."""


class Group:
    """One rank that has all of a model, and therefore exchanges nothing.

    The docstrings of the methods describe the ranks of one stage.
    """

    @property
    def ranks(self) -> int:
        return 1

    @property
    def rank(self) -> int:
        """Which of them computes."""
        return 0

    @property
    def stages(self) -> int:
        return 1

    @property
    def stage(self) -> int:
        """Which of them computes."""
        return 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's x, in their order: [ranks, ...]."""
        return x[None]

    def fold(self, reduce: Callable[..., Tensor], x: Tensor) -> Tensor:
        """`reduce` (a sum, a maximum, …) over every rank's x, in their order: the same bits on each of them."""
        return x

    def join(self, x: Tensor) -> Tensor:
        """Every rank's columns beside each other: [R, n] -> [R, ranks * n]."""
        return x

    def look_up(self, table: Callable[[Tensor], Tensor], ids: Tensor, n: int) -> Tensor:
        """`table(ids)`, where each rank's table has n entries of the whole."""
        return table(ids)

    def columns(self, x: Tensor, n: int) -> Tensor:
        """Those n of the columns of x that are this rank's."""
        return x[:, :n]

    def own(self, n: int, ids: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Those of `ids`, and what belongs to them, that are among this rank's n, counted from its first."""
        return ids, *others

    def real(self, logits: Tensor, vocab: int) -> Tensor:
        """Logits with -inf where a rank has more columns than there are tokens."""
        return logits

    def best(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Of every rank's token for each row, the one of the highest logit, of equals the first."""
        return ids

    def highest(self, logits: Tensor, ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The k highest of every rank's k highest logits [R, k], falling, and their tokens. Of equals the first come first."""
        return logits, ids

    def _exchange_in(self, kernel: Callable[[Tensor, int, int], int]) -> None:
        """Call a kernel that exchanges something itself: with the memory that ranks share, rank and ranks."""
        kernel(torch.empty(0, dtype=torch.uint8), 0, 1)

    def _claim(self, device: torch.device) -> torch.device:
        """Of the devices of this kind that which this rank computes on. Raises `BackendError` if there are not enough."""
        return device

    def _enter(self, begin: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What `begin` gives in the first stage; in any other what the one before has passed on."""
        return begin()

    def _pass_on(self, x: Tensor) -> None:
        """To the next stage."""

    def _stack(self, x: np.ndarray, first: int) -> np.ndarray:
        """[L, ...] of this stage's layers, of which `first` is the first, behind those of all stages before."""
        return x

    def _tell(self, call: str, *arguments: Any, data: Sequence[np.ndarray] = ()) -> None:
        """Have the other ranks of all stages do what this one is about to do."""

    def _load(self, path: Path) -> None:
        """Send the other ranks, and each later replacement, the path of a checkpoint to load."""

    def _hand_out(self, batch: Batch, mask: Mask) -> tuple[Batch, Mask]:
        """Have them run a step; what is left to run of it here."""
        return batch, mask

    def _settle(self) -> None:
        """Wait until the other ranks have made all calls. Raises `BackendError` if they could not."""

    def _rendezvous(self) -> None:
        """Connect all ranks, or connect them again. Raises `RuntimeError` if they cannot connect.

        A rank that is still in a step leaves it with an error. A new process replaces a rank that has ended.
        """

    def _stats(self) -> dict[str, float]:
        """As `ModelRunner.stats`."""
        return {}

    def _close(self) -> None:
        """End the other ranks."""


ALONE = Group()


class Endpoints(NamedTuple):
    """How a rank meets others: what JSON can hold."""

    place: SharedFile | None
    """Where its stage does, if it has several ranks."""
    before: SharedFile | None = None
    """The pipe from the stage before, and that to the one behind, if there are such."""
    behind: SharedFile | None = None
    network: NetworkEndpoint | None = None
    """Instead of pipes."""
    store: tuple[str, int] | None = None
    """Instead of all these: where that of `torch.distributed` is, host and port."""


class NetworkEndpoint(NamedTuple):
    """How a rank meets those of other stages that may be on other machines: what JSON can hold."""

    behind: tuple[str, int] | None = None
    """Where the one of the stage behind waits for this one: host and port."""


class RankInfo(NamedTuple):
    """Where a rank computes: what JSON can hold."""

    backend: str | None
    """The backend of `torch.distributed` for this rank. None on CPUs, which use shared memory and pipes."""
    neighbours: int
    """How many ranks are on its machine, and of those come before it."""
    before: int


class SharedMemoryTransport:
    """The transport of a rank on a CPU: shared memory within its stage, pipes or a network between stages."""

    bound = False
    """Whether the ranks have come together for good."""

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank, self._ranks = rank, ranks
        self.exchange: Any = None  # a SharedMemoryGroup after the first rendezvous
        self._before: RawIOBase | None = None
        self._behind: RawIOBase | None = None
        self._door: socket.socket | None = None
        """Where it waits for the stage before, until that is there."""
        self._seconds, self._bytes = 0.0, 0
        """Seconds and bytes of earlier rendezvous, and of pipes."""

    def add(self, x: Tensor) -> None:
        """Have x be the sum of every rank's."""
        if x.dtype not in _SUMS:  # float16: summed in float32
            wide = x.float()
            self.add(wide)
            x.copy_(wide)
            return
        self.exchange.add(x.data_ptr(), x.numel(), _SUMS[x.dtype])

    def gather(self, x: Tensor, every: Tensor) -> None:
        """Have `every` [ranks, ...] be every rank's x."""
        self.exchange.gather(x.data_ptr(), x.nbytes, every.data_ptr())

    def receive(self, x: Tensor) -> None:
        """Have x be what the stage before sends."""
        self._move(x, self._before.readinto if self._before else None)

    def send(self, x: Tensor) -> None:
        """To the stage behind."""
        self._move(x, self._behind.write if self._behind else None)

    def _move(self, x: Tensor, move: Callable[[memoryview], int | None] | None) -> None:
        """Transfer all bytes of x from or to another stage. Each `move` returns the number of bytes that it took.

        Raises `PeerLeft` if the other end is closed.
        """
        start, left = time.perf_counter(), x.reshape(-1).view(torch.uint8).numpy().data
        while left:
            try:
                moved = move(left) if move else None
            except OSError:
                moved = None
            if not moved:
                raise PeerLeft("A stage of this engine has left the step; its log says more.")
            left = left[moved:]
        self._seconds += time.perf_counter() - start
        self._bytes += x.nbytes

    def join(self, ways: Endpoints, device: torch.device) -> None:
        """Connect to the other ranks, which all connect now after they have parted. Raises `RuntimeError` on failure."""
        if ways.place:
            exchange = SharedMemoryGroup(ways.place, self._rank, self._ranks)
            told, self.exchange = self.told(), exchange
            self._seconds, self._bytes = told["communication_seconds"], int(told["communication_bytes"])
        if ways.before:
            self._before = FileIO(open_place(ways.before, os.O_RDONLY), "r")
        if ways.behind:
            self._behind = FileIO(open_place(ways.behind, os.O_WRONLY), "w")
        if ways.network:
            self._join_over(ways.network)

    def _join_over(self, network: NetworkEndpoint) -> None:
        secret = os.environ[SECRET]
        try:
            if network.behind:
                self._behind = raw(connect(*network.behind, secret, {}, _UNREAD_S)[0])
            if self._door:
                self._before = raw(accept_one(self._door, secret))
        except OSError as error:
            raise PeerLeft(f"The stages of this engine did not meet: {error}") from error

    def open_door(self, host: str) -> int:
        """The port at which it waits for the stage before."""
        self._door = socket.create_server((host, 0))
        port: int = self._door.getsockname()[1]
        return port

    def part(self) -> None:
        """What the others wait for here fails there, in other stages too: of a pipe whose one end is closed the other ends."""
        if self.exchange is not None:
            self.exchange.leave()
        ways: list[Any] = [self._before, self._behind, self._door]
        for way in filter(None, ways):
            way.close()
        self._before = self._behind = self._door = None

    def fail(self) -> None:
        """Release the other ranks from waits for this one, because a common call has raised here."""
        self.part()

    def told(self) -> dict[str, float]:
        """As `ModelRunner.stats`."""
        seconds, size = self._seconds, self._bytes
        if self.exchange is not None:
            told = self.exchange.told
            seconds, size = seconds + told.seconds, size + told.bytes
        return {"communication_seconds": seconds, "communication_bytes": size}


class _Collectives:
    """By which ranks on devices of their own do: as `SharedMemoryTransport`, but by `torch.distributed`, and once they have
    met they cannot part to meet anew."""

    def __init__(self, backend: str, stage: int, rank: int, config: EngineConfig) -> None:
        self._backend, self._stage, self._stages = backend, stage, config.pipeline_parallel_size
        self._ranks, self._number = config.tensor_parallel_size, stage * config.tensor_parallel_size + rank
        self._group: Any = None
        """Of this stage; None for that of all."""
        self._store: Any = None
        self._sent: Any = None
        """What was passed on last, and whether it has been received."""
        self._bytes = 0
        self.bound = False

    def add(self, x: Tensor) -> None:
        dist.all_reduce(x, group=self._group)
        self._bytes += x.nbytes

    def gather(self, x: Tensor, every: Tensor) -> None:
        dist.all_gather(list(every), x, group=self._group)
        self._bytes += x.nbytes

    def receive(self, x: Tensor) -> None:
        dist.recv(x, self._number - self._ranks)
        self._bytes += x.nbytes

    def send(self, x: Tensor) -> None:
        if self._sent:
            self._sent[1].wait()
        # Not waited for here: this stage goes on to its next step while the one behind is at an earlier one.
        self._sent = x, dist.isend(x, self._number + self._ranks)
        self._bytes += x.nbytes

    def open_store(self, host: str) -> tuple[str, int]:
        """Where all come together."""
        listener = socket.create_server((host, 0))
        host, port = listener.getsockname()
        self._store = _store(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
        return host, port

    def join(self, ways: Endpoints, device: torch.device) -> None:
        assert ways.store
        self.bound = True
        self._store = self._store or _store(*ways.store)
        dist.init_process_group(
            self._backend,
            store=self._store,
            rank=self._number,
            world_size=self._stages * self._ranks,
            timeout=timedelta(seconds=_HUNG_S),
            device_id=None if device.type == "cpu" else device,
        )
        if self._stages > 1 and self._ranks > 1:  # else all are of one stage, or each has one to itself
            starts = range(0, self._stages * self._ranks, self._ranks)
            self._group = [dist.new_group(list(range(start, start + self._ranks))) for start in starts][self._stage]

    def part(self) -> None:
        self.bound = False
        if dist.is_initialized():
            dist.destroy_process_group()
        self._group = self._store = self._sent = None

    def fail(self) -> None:
        if self.bound:
            time.sleep(_HEARD_S)
            os._exit(FAILURE)  # or the others would wait for it

    def told(self) -> dict[str, float]:
        return {"communication_bytes": self._bytes}


def _store(host: str, port: int, **options: Any) -> Any:
    """That of `torch.distributed` in which processes find each other."""
    return dist.TCPStore(host, port, timeout=timedelta(seconds=_PATIENCE_S), **options)  # type: ignore[attr-defined]


def _collective(device: torch.device) -> str | None:
    """Return the backend of `torch.distributed` for ranks on such devices. None for CPUs, which need none.

    Raises `BackendError` if PyTorch was built without it.
    """
    if device.type == "cpu":
        return None
    name = dist.get_default_backend_for_device(device) if dist.is_available() else "torch.distributed"
    if not (dist.is_available() and dist.is_backend_available(name)):
        raise BackendError(
            f"Several ranks on {device.type} need {name}, which this build of PyTorch lacks. Install one that has it, or set "
            "tensor_parallel_size and pipeline_parallel_size to 1."
        )
    return name


class Ranks(Group):
    """Processes that share out a model."""

    def __init__(self, stage: int, rank: int, config: EngineConfig, seat: RankInfo) -> None:
        self._stage, self._stages = stage, config.pipeline_parallel_size
        self._rank, self._ranks = rank, config.tensor_parallel_size
        self._seat = seat
        self._line: Any = (
            _Collectives(seat.backend, stage, rank, config) if seat.backend else SharedMemoryTransport(rank, self._ranks)
        )
        self._device = torch.device("cpu")

    @property
    def ranks(self) -> int:
        return self._ranks

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def stages(self) -> int:
        return self._stages

    @property
    def stage(self) -> int:
        return self._stage

    def all_reduce(self, x: Tensor) -> Tensor:
        if self._ranks == 1:
            return x
        x = x.contiguous()
        self._line.add(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        if self._ranks == 1:
            return super().gather(x)
        x, every = x.contiguous(), x.new_empty((self._ranks, *x.shape))
        self._line.gather(x, every)
        return every

    def fold(self, reduce: Callable[..., Tensor], x: Tensor) -> Tensor:
        return reduce(self.gather(x), dim=0)

    def join(self, x: Tensor) -> Tensor:
        return torch.cat(list(self.gather(x)), dim=1)

    def look_up(self, table: Callable[[Tensor], Tensor], ids: Tensor, n: int) -> Tensor:
        local = ids - self._rank * n
        here = (local >= 0) & (local < n)
        x = table(torch.where(here, local, 0))
        return self.all_reduce(torch.where(here.reshape(-1, *[1] * (x.ndim - 1)), x, 0))

    def columns(self, x: Tensor, n: int) -> Tensor:
        x = x[:, self._rank * n : (self._rank + 1) * n]
        return F.pad(x, (0, n - x.shape[1]))

    def own(self, n: int, ids: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        local = ids - self._rank * n
        here = (local >= 0) & (local < n)
        return local[here], *(x[here] for x in others)

    def real(self, logits: Tensor, vocab: int) -> Tensor:
        n = logits.shape[1]
        return torch.where(self._rank * n + torch.arange(n, device=logits.device) < vocab, logits, -torch.inf)

    def best(self, logits: Tensor, ids: Tensor) -> Tensor:
        logits, ids = self.highest(logits.gather(1, ids[:, None]), ids[:, None], logits.shape[1])
        return ids[:, 0]

    def highest(self, logits: Tensor, ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
        top, at = self.join(logits).sort(dim=-1, descending=True, stable=True)
        k = logits.shape[1]
        return top[:, :k], self.join(self._rank * n + ids).gather(1, at[:, :k])

    def _exchange_in(self, kernel: Callable[[Tensor, int, int], int]) -> None:
        expect_told(kernel(torch.from_numpy(self._line.exchange.memory), self._rank, self._ranks))

    def _claim(self, device: torch.device) -> torch.device:
        self._device = local_device(device, self._seat.before, self._seat.neighbours)
        return self._device

    def _enter(self, begin: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self._stage == 0:
            return begin()
        x = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        self._line.receive(x)
        return x

    def _pass_on(self, x: Tensor) -> None:
        self._line.send(x.contiguous())

    def _stack(self, x: np.ndarray, first: int) -> np.ndarray:
        if self._stages == 1:
            return x
        mine: Tensor = to_device(x, self._device)
        every = torch.cat([self._enter(lambda: mine[:0], (first, *mine.shape[1:]), mine.dtype), mine])
        if self._stage < self._stages - 1:
            self._pass_on(every)
        whole: np.ndarray = to_host(every)
        return whole

    def _join(self, ways: Endpoints) -> None:
        """Connect to the other ranks, which all connect now after they have parted. Raises `RuntimeError` on failure."""
        self._line.join(ways, self._device)

    def _part(self) -> None:
        """What the others wait for here fails there."""
        self._line.part()


class RankZero(Ranks):
    """The rank that has started the others, and leads them."""

    def __init__(
        self, config: EngineConfig, device: torch.device, host: str = "127.0.0.1", machines: Sequence[str] | None = None
    ) -> None:
        """`host`: by which the others reach this process. `machines`: that of each rank, this one's first, where they may be
        several. Raises `BackendError` where the ranks cannot be started."""
        machines = machines or [""] * config.ranks
        first, *others = (
            RankInfo(_collective(device), machines.count(each), machines[:at].count(each)) for at, each in enumerate(machines)
        )
        super().__init__(config.pipeline_parallel_size - 1, 0, config, first)
        self._claim(device)
        self._config, self._host = config, host
        self._meetings: list[SharedMemoryGroup] = []
        """Of all stages."""
        _, *self._places = product(reversed(range(self._stages)), range(self._ranks))
        """Stage and rank of each of the others."""
        self._seats = dict(zip(self._places, others, strict=True))
        self._others: list[WorkerHandle] = []
        self._checkpoint: str | None = None
        try:
            for place in self._places:
                self._others.append(self._start(place))
        except BackendError:
            self._close()
            raise

    def _start(self, place: tuple[int, int]) -> WorkerHandle:
        own = (*place, *self._seats[place])
        return WorkerHandle("torch", asdict(self._config), own, ended=self._lose, start=self._where(place))

    def _where(self, place: tuple[int, int]) -> Callable[..., Process]:
        """What starts the rank of a place."""
        return LocalProcess

    def _lose(self, other: WorkerHandle) -> None:
        """Release all ranks from waits for a rank that has ended."""
        if other not in self._others:  # another has taken its place, or all are to end
            return
        self._leave()
        if self._line.bound:
            _log.error("%s The ranks of this engine cannot go on without it, so this process ends too.", other.how_it_ended())
            os._exit(FAILURE)
        _log.warning("%s", other.how_it_ended())

    def _leave(self) -> None:
        """What ranks of any stage wait for in memory fails there. Any thread may."""
        for meeting in self._meetings:
            meeting.leave()

    def _part(self) -> None:
        self._leave()
        super()._part()

    def _tell(self, call: str, *arguments: Any, data: Sequence[np.ndarray] = ()) -> None:
        for other in self._others:
            other.tell(call, *arguments, data=data)

    def _load(self, path: Path) -> None:
        self._checkpoint = str(path)
        self._tell("load", self._checkpoint)

    def _hand_out(self, batch: Batch, mask: Mask) -> tuple[Batch, Mask]:
        batch = masked(batch, mask)
        self._tell("submit", data=[batch.buffer])
        return batch, None

    def _settle(self) -> None:
        for other in self._others:
            other.settle()

    def _rendezvous(self) -> None:
        if self._line.bound:
            time.sleep(_HEARD_S)  # if one of them is gone, this process ends here
            raise BackendError(
                f"The ranks of this engine compute together by {self._seat.backend}, and cannot start over. Make a new engine."
            )
        for attempts_left in reversed(range(_ATTEMPTS)):
            for other in self._others:
                with suppress(ProcessExited):
                    other.tell("part")  # without it a rank that did not receive the step would make others wait
            self._part()
            try:
                self._replace()
                with self._open_endpoints() as ways:
                    for other, place in zip(self._others, self._places, strict=True):
                        other.tell("join", ways[place])
                    self._join(ways[self._stage, self._rank])
                    self._settle()
                return
            except RuntimeError as error:
                if not attempts_left or isinstance(error, AgentLost):
                    raise
                _log.warning("The ranks of this engine could not meet; trying again: %s", error)

    @contextmanager
    def _open_endpoints(self) -> Iterator[dict[tuple[int, int], Endpoints]]:
        """Yield the endpoints of each rank, by its stage and its number.

        At the end this process closes its copies. Then a pipe has only the ends of its two ranks, and closes when one of them
        ends.
        """
        if self._seat.backend:
            store = self._line.open_store(self._host)
            yield dict.fromkeys([(self._stage, self._rank), *self._places], Endpoints(None, store=store))
            return
        with ExitStack() as ours:
            places = [ours.enter_context(meeting_place(self._ranks)) if self._ranks > 1 else None for _ in range(self._stages)]
            self._meetings = [SharedMemoryGroup(place, 0, self._ranks) for place in places if place]
            ways = {(stage, rank): Endpoints(place) for stage, place in enumerate(places) for rank in range(self._ranks)}
            for stage, rank in product(range(1, self._stages), range(self._ranks)):
                self._link(ways, (stage - 1, rank), (stage, rank), ours)
            yield ways

    def _link(
        self, ways: dict[tuple[int, int], Endpoints], before: tuple[int, int], at: tuple[int, int], ours: ExitStack
    ) -> None:
        """Have the way of one rank lead to that of another, of the next stage. What is ours of it is closed with `ours`."""
        out, into = os.pipe()
        ours.callback(os.close, out)
        ours.callback(os.close, into)
        with suppress(OSError):  # it is a matter of speed
            fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        ways[at] = ways[at]._replace(before=place_of(out))
        ways[before] = ways[before]._replace(behind=place_of(into))

    def _replace(self) -> None:
        """Wait until the other ranks have made all calls, and replace each that has ended."""
        fresh = []
        for at, other in enumerate(self._others):
            try:
                other.settle()
            except ProcessExited as ended:
                _log.warning("One is started again. %s", ended)
                other.close()
                fresh.append(self._start(self._places[at]))
                self._others[at] = fresh[-1]
                fresh[-1].tell("load", self._checkpoint)
            except BackendError:
                pass  # at which it failed is being started over
        for other in fresh:
            try:
                other.settle()
            except BackendError:
                other.close()  # of no use without the model
                raise

    def _stats(self) -> dict[str, float]:
        held, most = family_memory(other.pid for other in self._others if other.here)
        told: dict[str, float] = self._line.told()
        return {"others_rss_bytes": held, "others_peak_rss_bytes": most} | told

    def _close(self) -> None:
        self._part()
        others, self._others = self._others, []
        for other in others:
            other.close()


class _FirstOfLaunch(RankZero):
    """The rank that leads others which agents start."""

    def __init__(self, config: EngineConfig, device: torch.device, launch: Agents) -> None:
        """Raises `BackendError` where the agents do not suffice."""
        needed = launch.all[: config.ranks - 1]
        if len(needed) < config.ranks - 1:
            raise BackendError(
                f"An engine of {config.ranks} ranks needs as many processes, and {1 + len(needed)} were launched. Launch "
                f"{config.ranks}, or change tensor_parallel_size and pipeline_parallel_size."
            )
        machines = [machine(), *(agent.machine for agent in needed)]
        if config.tensor_parallel_size > 1 and not _collective(device) and len(set(machines)) > 1:
            raise BackendError(
                f"tensor_parallel_size={config.tensor_parallel_size} has ranks that add up in memory which they share, and the "
                f"first {config.ranks} processes of this launch are on several machines. Launch as many on one, or share out "
                "the layers alone (pipeline_parallel_size)."
            )
        self._launch = launch
        super().__init__(config, device, launch.host, machines)

    def _agent(self, place: tuple[int, int]) -> Agent:
        return self._launch.all[self._places.index(place)]

    def _where(self, place: tuple[int, int]) -> Callable[..., Process]:
        return partial(RemoteProcess, self._agent(place), self._launch.secret)

    def _link(
        self, ways: dict[tuple[int, int], Endpoints], before: tuple[int, int], at: tuple[int, int], ours: ExitStack
    ) -> None:
        if at == (self._stage, self._rank):
            host = self._host
            port = self._line.open_door(host)
        else:
            host, other = self._agent(at).host, self._others[self._places.index(at)]
            other.tell("open_door", host)
            port = other.settle()
        ways[at] = ways[at]._replace(network=NetworkEndpoint())
        ways[before] = ways[before]._replace(network=NetworkEndpoint((host, port)))


def start(config: EngineConfig, device: torch.device) -> Group:
    """The ranks of an engine, of which this process is the first. Raises `BackendError` where they cannot be."""
    if config.ranks == 1:
        return ALONE
    if not _collective(device):
        if config.tensor_parallel_size > 1:
            open_library()
    elif dist.is_initialized():
        raise BackendError(
            "The ranks of this engine compute together by torch.distributed, of which a process can have one group, and this "
            "one has it already, of another engine or its own. Close that, or make this engine in another process."
        )
    launch = agents()
    return _FirstOfLaunch(config, device, launch) if launch else RankZero(config, device)


def requires_supervision(config: EngineConfig) -> bool:
    """As `ModelRunner.requires_supervision`."""
    return config.ranks > 1 and _collective(choose_device(config.device)) is not None
