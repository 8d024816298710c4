"""The ranks that share out a model, and what they tell each other inside a step: sums for the residual stream, and of logits
that are shared out what a sampler must know of all of them. Never the logits. Stages of several ranks, or of one, share out its
layers: each passes the residual stream on to the next.

PyTorch has one process a rank. The caller's is the first of the last stage, where tokens are chosen: its runner starts the
others, and whatever it is told it tells them, down to the bytes of each batch. All run the same step, each on its part, and
only the caller's reads what came of it. Ranks speak gloo over loopback, in a group of their own, so that a process may have
several engines; from stage to stage there are pipes, which whoever ends or fails closes.

Letters: R logit rows · V vocabulary, of which each rank has n · k candidates.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import asdict
from datetime import timedelta
from io import FileIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from common.config import EngineConfig
from common.errors import BackendError
from common.followers import Ended, Follower, follow
from common.platform import family_memory
from common.schedule.batch import Batch, Mask, masked
from common.weights.checkpoint import open_checkpoint
from torchinfer.arrays import to_device, to_host

_log = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_MEETING = timedelta(seconds=5)
"""How long ranks that are there may take to connect."""
_ATTEMPTS = 3
"""How often they try."""
_PIPE_BYTES = 1 << 20
"""What may lie between two stages: a stage need not wait for the next, which is at an earlier step."""


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


class _Ranks(Group):
    """Processes of this machine."""

    def __init__(self, stage: int, rank: int, config: EngineConfig) -> None:
        self._stage, self._stages = stage, config.pipeline_parallel_size
        self._rank, self._ranks = rank, config.tensor_parallel_size
        self._gloo: Any = None
        self._before: FileIO | None = None
        self._behind: FileIO | None = None
        self._seconds, self._bytes = 0.0, 0

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
        if self._ranks > 1:
            self._exchange(x, lambda: self._gloo.allreduce([x]).wait())
        return x

    def gather(self, x: Tensor) -> Tensor:
        if self._ranks == 1:
            return super().gather(x)
        every = x.new_empty((self._ranks, *x.shape))
        self._exchange(x, lambda: self._gloo.allgather([list(every)], [x.contiguous()]).wait())
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

    def _enter(self, begin: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self._stage == 0:
            return begin()
        x = torch.empty(tuple(shape), dtype=dtype)
        self._exchange(x, lambda: _move(x, self._before.readinto if self._before else None))
        return x

    def _pass_on(self, x: Tensor) -> None:
        x = x.contiguous()
        self._exchange(x, lambda: _move(x, self._behind.write if self._behind else None))

    def _stack(self, x: np.ndarray, first: int) -> np.ndarray:
        if self._stages == 1:
            return x
        mine: Tensor = to_device(x, torch.device("cpu"))
        every = torch.cat([self._enter(lambda: mine[:0], (first, *mine.shape[1:]), mine.dtype), mine])
        if self._stage < self._stages - 1:
            self._pass_on(every)
        whole: np.ndarray = to_host(every)
        return whole

    def _exchange(self, x: Tensor, tell: Callable[[], Any]) -> None:
        """Wait for what is told or heard of x, and count it."""
        start = time.perf_counter()
        tell()
        self._seconds += time.perf_counter() - start
        self._bytes += x.nbytes

    def _join(self, port: int, listening: int | None = None) -> None:
        """Connect with those who come to the same port, at which the first listens, through a socket that is its own from now
        on. Raises `RuntimeError` if one does not."""
        self._leave()
        store = dist.TCPStore(  # type: ignore[attr-defined]
            _HOST, port, None, listening is not None, _MEETING, wait_for_workers=False, master_listen_fd=listening
        )
        store.set(f"here {self._stage} {self._rank}", "")
        self._await_others(store)
        self._gloo = self._connect(store)

    def _await_others(self, store: Any) -> None:
        """Wait until all are where they connect. Who is not the first learns from it if one has ended."""

    def _connect(self, store: Any) -> Any:
        """With all of this stage, who are there."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=_HOST)]
        patience, options._timeout = options._timeout, _MEETING
        own = dist.PrefixStore(str(self._stage), store)  # type: ignore[attr-defined]
        gloo = dist.ProcessGroupGloo(own, self._rank, self._ranks, options)
        gloo.set_timeout(patience)  # in a step one may compile while the others wait
        return gloo

    def _link(self, before: str | None, behind: str | None) -> None:
        """Open the pipes from the stage before and to the one behind this."""
        self._unlink()
        if before:
            self._before = FileIO(before, "r")
        if behind:
            self._behind = FileIO(behind, "w")

    def _unlink(self) -> None:
        for pipe in filter(None, (self._before, self._behind)):
            pipe.close()
        self._before = self._behind = None

    def _leave(self) -> None:
        """Disconnect: what the others wait for here fails there."""
        self._unlink()
        if self._gloo is not None:
            self._gloo.abort()
            self._gloo = None


class _First(_Ranks):
    """The rank that has started the others, and leads them."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config.pipeline_parallel_size - 1, 0, config)
        self._config = config
        _, *places = product(reversed(range(self._stages)), range(self._ranks))
        self._places = places
        """Stage and rank of each of the others."""
        self._others = [self._start(place) for place in places]
        self._checkpoint: str | None = None

    def _start(self, place: tuple[int, int]) -> Follower:
        return Follower("torchinfer.parallel:_follow", *place, asdict(self._config))

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
            self._leave()
            for other in self._others:
                with suppress(Ended):
                    other.tell("leave")
            try:
                self._replace()
                if self._ranks > 1:
                    self._join_all()
                self._link_all()
                return
            except RuntimeError:
                if not attempts_left:
                    raise
                _log.warning("The ranks of this engine could not connect; trying again.", exc_info=True)

    def _join_all(self) -> None:
        # A port, not a file: a store that is a file writes to its path once more as it ends, whatever is there then.
        with socket.create_server((_HOST, 0)) as listening:
            port = listening.getsockname()[1]
            self._tell("join", port)
            self._join(port, listening.detach())
            self._settle()

    def _link_all(self) -> None:
        """Lay a pipe from each rank to that of the next stage that has its number. Ours are closed once everyone has opened
        his: so a pipe has as many ends as it has neighbours, and ends with either."""
        ends: dict[tuple[int, int], list[str | None]] = {
            place: [None, None] for place in product(range(self._stages), range(self._ranks))
        }
        with ExitStack() as ours:
            for stage, rank in product(range(1, self._stages), range(self._ranks)):
                out, into = os.pipe()
                ours.callback(os.close, out)
                ours.callback(os.close, into)
                with suppress(OSError):  # it is a matter of speed
                    fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
                ends[stage, rank][0], ends[stage - 1, rank][1] = (f"/proc/{os.getpid()}/fd/{end}" for end in (out, into))
            for other, place in zip(self._others, self._places, strict=True):
                other.tell("link", *ends[place])
            self._link(*ends[self._stage, self._rank])
            self._settle()

    def _await_others(self, store: Any) -> None:
        keys = [f"here {stage} {rank}" for stage, rank in product(range(self._stages), range(self._ranks))]
        self._await(lambda: store.check(keys))

    def _connect(self, store: Any) -> Any:
        gloo: Future[Any] = Future()

        def connect() -> None:
            try:
                gloo.set_result(super(_First, self)._connect(store))
            except Exception as error:
                gloo.set_exception(error)

        # On a thread, for it waits its full time for one that was there and has ended since.
        threading.Thread(target=connect, name="connect", daemon=True).start()
        self._await(gloo.done)
        return gloo.result()

    def _await(self, done: Callable[[], bool]) -> None:
        """Raises `Ended` if another rank ends before."""
        while not done():
            for other in self._others:
                other.expect_alive()
            time.sleep(1e-3)

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
        held, most = family_memory(other.pid for other in self._others)
        memory = {"others_rss_bytes": held, "others_peak_rss_bytes": most}
        return memory | {"communication_seconds": self._seconds, "communication_bytes": self._bytes}

    def _close(self) -> None:
        self._leave()
        for other in self._others:
            other.close()


def start(config: EngineConfig, device: torch.device) -> Group:
    """The ranks of an engine, of which this process is the first. Raises `BackendError` where they cannot be."""
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        size = getattr(config, name)
        if size > 1 and device.type != "cpu":
            raise BackendError(f"{name}={size} has processes that compute on cpu, not on {device.type}.")
    return ALONE if config.ranks == 1 else _First(config)


def _move(x: Tensor, move: Callable[[memoryview], int | None] | None) -> None:
    """All bytes of x through a pipe, of which each `move` takes as many as it tells."""
    left = x.reshape(-1).view(torch.uint8).numpy().data
    while left:
        try:
            moved = move(left) if move else None
        except BrokenPipeError:
            moved = None
        if not moved:
            raise BackendError("A stage of this engine is gone, or has failed; its log says more.")
        left = left[moved:]


def _follow(stage: int, rank: int, config: dict[str, Any]) -> None:
    """The life of every other rank."""
    from torchinfer.runner import ModelRunner  # which imports this file

    engine_config = EngineConfig(**config)
    group = _Ranks(stage, rank, engine_config)
    runner = ModelRunner(engine_config, group)

    def submit(data: bytes) -> None:
        runner.submit(Batch.from_bytes(data))
        runner._catch_up()

    def write_pages(pages_of: int, pages: Sequence[int], dtype: str, shape: Sequence[int], data: bytes = b"") -> None:
        k, v = np.frombuffer(data, dtype).reshape(2, *shape)
        runner.write_pages(pages_of, pages, {"k": k, "v": v})

    calls: dict[str, Callable[..., object]] = {
        "load": lambda path: runner.load(open_checkpoint(path)),
        "join": group._join,
        "link": group._link,
        "leave": group._leave,
        "allocate": runner.allocate,
        "warmup": runner.warmup,
        "submit": submit,
        "read_pages": runner.read_pages,
        "write_pages": write_pages,
    }
    follow(calls, group._leave)
