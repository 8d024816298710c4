"""The ranks that share out a model, and what they tell each other inside a step: sums for the residual stream, and of logits
that are shared out what a sampler must know of all of them. Never the logits. Stages of several ranks, or of one, share out its
layers: each passes the residual stream on to the next.

PyTorch has one process a rank. The caller's is the first of the last stage, where tokens are chosen: its runner starts the
others, and whatever it is told it tells them, down to the bytes of each batch. All run the same step, each on its part, and
only the caller's reads what came of it. Inside it the ranks of a stage tell each other what they do through memory that all
have mapped. From each of them a pipe leads to that of the next stage which has its number. Where agents start the others
(`common.launch`), stages may be on several machines, and it is a connection.

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
from functools import partial
from io import FileIO, RawIOBase
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.agents import Agent, Agents, There, agents, machine
from common.config import EngineConfig
from common.errors import BackendError
from common.followers import Ended, Follower, Here, Process, follow
from common.kernels.cpu.sums import Exchange, Left, Place, expect_told, meeting_place, open_library, open_place, place_of
from common.lines import let_in, raw, reach
from common.platform import family_memory
from common.schedule.batch import Batch, Mask, masked
from common.weights.checkpoint import open_checkpoint
from torchinfer.arrays import to_device, to_host

_log = logging.getLogger(__name__)

_SUMS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""What can be added up."""
_ATTEMPTS = 3
"""How often ranks try to meet."""
_PIPE_BYTES = 1 << 20
"""What may lie between two stages: a stage need not wait for the next, which is at an earlier step."""
_UNREAD_S = 30
"""That what is passed on over a network may wait for a stage that is at a long step."""


class Group:
    """One rank that has all of a model. What it would ask the others for, it has.

    What is said below of ranks is of those of one stage."""

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
        """Have them load a checkpoint, and whoever takes the place of one of them."""

    def _hand_out(self, batch: Batch, mask: Mask) -> tuple[Batch, Mask]:
        """Have them run a step; what is left to run of it here."""
        return batch, mask

    def _settle(self) -> None:
        """Wait until they have done what they were told. Raises `BackendError` if they could not."""

    def _meet(self) -> None:
        """Connect all ranks, anew if they were: who is still in a step leaves it with an error, and in the place of one that
        has ended another is started. Raises `RuntimeError` if they cannot come together."""

    def _stats(self) -> dict[str, float]:
        """As `ModelRunner.stats`."""
        return {}

    def _close(self) -> None:
        """End the other ranks."""


ALONE = Group()


class _Ways(NamedTuple):
    """How a rank meets others: what JSON can hold."""

    place: Place | None
    """Where its stage does, if it has several ranks."""
    before: Place | None = None
    """The pipe from the stage before, and that to the one behind, if there are such."""
    behind: Place | None = None
    network: _Network | None = None
    """Instead of pipes."""


class _Network(NamedTuple):
    """How a rank meets those of other stages that may be on other machines: what JSON can hold."""

    secret: str
    """Which who comes from the stage before knows."""
    behind: tuple[str, int] | None = None
    """Where the one of the stage behind waits for this one: host and port."""


class _Ranks(Group):
    """Processes that share out a model."""

    def __init__(self, stage: int, rank: int, config: EngineConfig) -> None:
        self._stage, self._stages = stage, config.pipeline_parallel_size
        self._rank, self._ranks = rank, config.tensor_parallel_size
        self._exchange: Any = None  # an Exchange once they have met
        self._before: RawIOBase | None = None
        self._behind: RawIOBase | None = None
        self._door: socket.socket | None = None
        """Where it waits for the stage before, until that is there."""
        self._seconds, self._bytes = 0.0, 0
        """Told in earlier meetings, and through pipes."""

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
        self._exchange.add(x.data_ptr(), x.numel(), _SUMS[x.dtype])
        return x

    def gather(self, x: Tensor) -> Tensor:
        if self._ranks == 1:
            return super().gather(x)
        x, every = x.contiguous(), x.new_empty((self._ranks, *x.shape))
        self._exchange.gather(x.data_ptr(), x.nbytes, every.data_ptr())
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
        expect_told(kernel(torch.from_numpy(self._exchange.memory), self._rank, self._ranks))

    def _enter(self, begin: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self._stage == 0:
            return begin()
        x = torch.empty(tuple(shape), dtype=dtype)
        self._move(x, self._before.readinto if self._before else None)
        return x

    def _pass_on(self, x: Tensor) -> None:
        self._move(x.contiguous(), self._behind.write if self._behind else None)

    def _move(self, x: Tensor, move: Callable[[memoryview], int | None] | None) -> None:
        """All bytes of x to or from another stage, of which each `move` takes as many as it tells. Raises `Left` if its other
        end is closed."""
        start, left = time.perf_counter(), x.reshape(-1).view(torch.uint8).numpy().data
        while left:
            try:
                moved = move(left) if move else None
            except OSError:
                moved = None
            if not moved:
                raise Left("A stage of this engine has left the step; its log says more.")
            left = left[moved:]
        self._seconds += time.perf_counter() - start
        self._bytes += x.nbytes

    def _stack(self, x: np.ndarray, first: int) -> np.ndarray:
        if self._stages == 1:
            return x
        mine: Tensor = to_device(x, torch.device("cpu"))
        every = torch.cat([self._enter(lambda: mine[:0], (first, *mine.shape[1:]), mine.dtype), mine])
        if self._stage < self._stages - 1:
            self._pass_on(every)
        whole: np.ndarray = to_host(every)
        return whole

    def _join(self, ways: _Ways) -> None:
        """Meet the others, all of whom do so at once, after they have parted. Raises `Left` if that is over."""
        if ways.place:
            exchange = Exchange(ways.place, self._rank, self._ranks)
            if self._exchange is not None:
                told = self._exchange.told
                self._seconds, self._bytes = self._seconds + told.seconds, self._bytes + told.bytes
            self._exchange = exchange
        if ways.before:
            self._before = FileIO(open_place(ways.before, os.O_RDONLY), "r")
        if ways.behind:
            self._behind = FileIO(open_place(ways.behind, os.O_WRONLY), "w")
        if ways.network:
            self._join_over(ways.network)

    def _join_over(self, network: _Network) -> None:
        try:
            if network.behind:
                self._behind = raw(reach(*network.behind, {"secret": network.secret}, _UNREAD_S)[0])
            if self._door:
                with self._door as door:
                    self._before = raw(let_in(door, network.secret))
        except OSError as error:
            raise Left(f"The stages of this engine did not meet: {error}") from error

    def _open_door(self, host: str) -> int:
        """The port at which it waits for the stage before."""
        self._door = socket.create_server((host, 0))
        port: int = self._door.getsockname()[1]
        return port

    def _leave(self) -> None:
        """What the others of this stage wait for here fails there. Any thread may."""
        if self._exchange is not None:
            self._exchange.leave()

    def _part(self) -> None:
        """What the others wait for here fails there, in other stages too: of a pipe whose one end is closed the other ends."""
        self._leave()
        ways: list[Any] = [self._before, self._behind, self._door]
        for way in filter(None, ways):
            way.close()
        self._before = self._behind = self._door = None


class _First(_Ranks):
    """The rank that has started the others, and leads them."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config.pipeline_parallel_size - 1, 0, config)
        self._config = config
        self._meetings: list[Exchange] = []
        """Of all stages."""
        _, *self._places = product(reversed(range(self._stages)), range(self._ranks))
        """Stage and rank of each of the others."""
        self._others: list[Follower] = []
        self._checkpoint: str | None = None
        try:
            for place in self._places:
                self._others.append(self._start(place))
        except BackendError:
            self._close()
            raise

    def _start(self, place: tuple[int, int]) -> Follower:
        return Follower("torchinfer.parallel:_follow", *place, asdict(self._config), ended=self._lose, start=self._where(place))

    def _where(self, place: tuple[int, int]) -> Callable[..., Process]:
        """What starts the rank of a place."""
        return Here

    def _lose(self, other: Follower) -> None:
        """A rank has ended: nobody is to wait for it."""
        if other in self._others:  # else another has taken its place
            self._leave()

    def _leave(self) -> None:
        for meeting in self._meetings:
            meeting.leave()

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

    def _meet(self) -> None:
        for attempts_left in reversed(range(_ATTEMPTS)):
            self._part()
            for other in self._others:
                with suppress(Ended):
                    other.tell("part")  # who was not told of a step would be waited for there
            try:
                self._replace()
                with self._lay() as ways:
                    for other, place in zip(self._others, self._places, strict=True):
                        other.tell("join", ways[place])
                    self._join(ways[self._stage, self._rank])
                    self._settle()
                return
            except RuntimeError:
                if not attempts_left:
                    raise
                _log.warning("The ranks of this engine could not meet; trying again.", exc_info=True)

    @contextmanager
    def _lay(self) -> Iterator[dict[tuple[int, int], _Ways]]:
        """The ways of each rank, by its stage and its number. At the end ours are closed: then a pipe has no ends but those of
        its two ranks, and is at an end when one of them is."""
        with ExitStack() as ours:
            places = [ours.enter_context(meeting_place(self._ranks)) if self._ranks > 1 else None for _ in range(self._stages)]
            self._meetings = [Exchange(place, 0, self._ranks) for place in places if place]
            ways = {(stage, rank): _Ways(place) for stage, place in enumerate(places) for rank in range(self._ranks)}
            for stage, rank in product(range(1, self._stages), range(self._ranks)):
                self._link(ways, (stage - 1, rank), (stage, rank), ours)
            yield ways

    def _link(self, ways: dict[tuple[int, int], _Ways], before: tuple[int, int], at: tuple[int, int], ours: ExitStack) -> None:
        """Have the way of one rank lead to that of another, of the next stage. What is ours of it is closed with `ours`."""
        out, into = os.pipe()
        ours.callback(os.close, out)
        ours.callback(os.close, into)
        with suppress(OSError):  # it is a matter of speed
            fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        ways[at] = ways[at]._replace(before=place_of(out))
        ways[before] = ways[before]._replace(behind=place_of(into))

    def _replace(self) -> None:
        """Wait until the others have done what they were at, and start anew who has ended."""
        fresh = []
        for at, other in enumerate(self._others):
            try:
                other.settle()
            except Ended as ended:
                _log.warning("%s It is started again.", ended)
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
        memory = {"others_rss_bytes": held, "others_peak_rss_bytes": most}
        seconds, size = self._seconds, self._bytes
        if self._exchange is not None:
            told = self._exchange.told
            seconds, size = seconds + told.seconds, size + told.bytes
        return memory | {"communication_seconds": seconds, "communication_bytes": size}

    def _close(self) -> None:
        self._part()
        for other in self._others:
            other.close()


class _FirstOfLaunch(_First):
    """The rank that leads others which agents start."""

    def __init__(self, config: EngineConfig, launch: Agents) -> None:
        """Raises `BackendError` where the agents do not suffice."""
        needed = launch.all[: config.ranks - 1]
        if len(needed) < config.ranks - 1:
            raise BackendError(
                f"An engine of {config.ranks} ranks needs as many processes, and {1 + len(needed)} were launched. Launch "
                f"{config.ranks}, or change tensor_parallel_size and pipeline_parallel_size."
            )
        if config.tensor_parallel_size > 1 and {agent.machine for agent in needed} != {machine()}:
            raise BackendError(
                f"tensor_parallel_size={config.tensor_parallel_size} has ranks that add up in memory which they share, and the "
                f"first {config.ranks} processes of this launch are on several machines. Launch as many on one, or share out "
                "the layers alone (pipeline_parallel_size)."
            )
        self._launch = launch
        super().__init__(config)

    def _agent(self, place: tuple[int, int]) -> Agent:
        return self._launch.all[self._places.index(place)]

    def _where(self, place: tuple[int, int]) -> Callable[..., Process]:
        return partial(There, self._agent(place), self._launch.secret)

    def _link(self, ways: dict[tuple[int, int], _Ways], before: tuple[int, int], at: tuple[int, int], ours: ExitStack) -> None:
        if at == (self._stage, self._rank):
            host = self._launch.host
            port = self._open_door(host)
        else:
            host, other = self._agent(at).host, self._others[self._places.index(at)]
            other.tell("open_door", host)
            port = other.settle()
        ways[at] = ways[at]._replace(network=_Network(self._launch.secret))
        ways[before] = ways[before]._replace(network=_Network(self._launch.secret, (host, port)))


def start(config: EngineConfig, device: torch.device) -> Group:
    """The ranks of an engine, of which this process is the first. Raises `BackendError` where they cannot be."""
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        size = getattr(config, name)
        if size > 1 and device.type != "cpu":
            raise BackendError(f"{name}={size} has processes that compute on cpu, not on {device.type}.")
    if config.tensor_parallel_size > 1:
        open_library()
    if config.ranks == 1:
        return ALONE
    launch = agents()
    return _FirstOfLaunch(config, launch) if launch else _First(config)


def _follow(stage: int, rank: int, config: dict[str, Any]) -> None:
    """The life of every other rank."""
    from torchinfer.runner import ModelRunner  # which imports this file

    engine_config = EngineConfig(**config)
    group = _Ranks(stage, rank, engine_config)
    runner = ModelRunner(engine_config, group)

    def join(ways: Sequence[Any]) -> None:
        *places, network = ways
        place, before, behind = (way and Place(*way) for way in places)
        group._join(_Ways(place, before, behind, network and _Network(*network)))

    def submit(data: bytes) -> None:
        runner.submit(Batch.from_bytes(data))
        runner._catch_up()

    def read_pages(pages_of: int, pages: Sequence[int]) -> None:
        runner.read_pages(pages_of, pages)  # whose first has them all

    def write_pages(pages_of: int, pages: Sequence[int], dtype: str, shape: Sequence[int], data: bytes = b"") -> None:
        k, v = np.frombuffer(data, dtype).reshape(2, *shape)
        runner.write_pages(pages_of, pages, {"k": k, "v": v})

    calls: dict[str, Callable[..., object]] = {
        "load": lambda path: runner.load(open_checkpoint(path)),
        "open_door": group._open_door,
        "join": join,
        "part": group._part,
        "allocate": runner.allocate,
        "warmup": runner.warmup,
        "submit": submit,
        "read_pages": read_pages,
        "write_pages": write_pages,
    }
    follow(calls, group._part)
