"""The ranks that share out a model, and what they tell each other inside a step: sums for the residual stream, and of logits
that are shared out what a sampler must know of all of them. Never the logits.

PyTorch has one process a rank. The first is the caller's: its runner starts the others, and whatever it is told it tells them,
down to the bytes of each batch. All run the same step, each on its part, and only the first reads what came of it. Inside it
they tell each other what they do through memory that all have mapped.

Letters: R logit rows · V vocabulary, of which each rank has n · k candidates.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import EngineConfig
from common.errors import BackendError
from common.followers import Ended, Follower, follow
from common.kernels.cpu.sums import Exchange, Place, expect_told, meeting_place, open_library
from common.platform import family_memory
from common.schedule.batch import Batch, Mask, masked
from common.weights.checkpoint import open_checkpoint

_log = logging.getLogger(__name__)

_SUMS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""What can be added up."""
_ATTEMPTS = 3
"""How often ranks try to meet."""


class Group:
    """One rank that has all of a model. What it would ask the others for, it has."""

    @property
    def ranks(self) -> int:
        return 1

    @property
    def rank(self) -> int:
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

    def _tell(self, call: str, *arguments: Any, data: Sequence[np.ndarray] = ()) -> None:
        """Have the other ranks do what this one is about to do."""

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

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank, self._ranks = rank, ranks
        self._exchange: Any = None  # an Exchange once they have met
        self._seconds, self._bytes = 0.0, 0
        """Told in earlier meetings."""

    @property
    def ranks(self) -> int:
        return self._ranks

    @property
    def rank(self) -> int:
        return self._rank

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._exchange.add(x.data_ptr(), x.numel(), _SUMS[x.dtype])
        return x

    def gather(self, x: Tensor) -> Tensor:
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

    def _join(self, place: Place) -> None:
        """Meet all who come to the same place. Raises `Left` if that is over."""
        exchange = Exchange(place, self._rank, self._ranks)
        if self._exchange is not None:
            told = self._exchange.told
            self._seconds, self._bytes = self._seconds + told.seconds, self._bytes + told.bytes
        self._exchange = exchange

    def _leave(self) -> None:
        """What the others wait for here fails there. Any thread may."""
        if self._exchange is not None:
            self._exchange.leave()


class _First(_Ranks):
    """The rank that has started the others, and leads them."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(0, config.tensor_parallel_size)
        self._config = config
        self._others: list[Follower] = []
        self._others += [self._start(rank) for rank in range(1, self._ranks)]
        self._checkpoint: str | None = None

    def _start(self, rank: int) -> Follower:
        return Follower("torchinfer.parallel:_follow", rank, asdict(self._config), ended=self._lose)

    def _lose(self, other: Follower) -> None:
        """A rank has ended: nobody is to wait for it."""
        if other in self._others:  # else another has taken its place
            self._leave()

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
            try:
                self._replace()
                with meeting_place(self._ranks) as place:
                    self._tell("join", place)
                    self._join(place)
                    self._settle()
                return
            except RuntimeError:
                if not attempts_left:
                    raise
                _log.warning("The ranks of this engine could not meet; trying again.", exc_info=True)

    def _replace(self) -> None:
        """Wait until the others have done what they were at, and start anew who has ended."""
        fresh = []
        for at, other in enumerate(self._others):
            try:
                other.settle()
            except Ended as ended:
                _log.warning("%s It is started again.", ended)
                other.close()
                fresh.append(self._start(at + 1))
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
        told = self._exchange.told
        seconds, size = self._seconds + told.seconds, self._bytes + told.bytes
        return memory | {"communication_seconds": seconds, "communication_bytes": size}

    def _close(self) -> None:
        self._leave()
        for other in self._others:
            other.close()


def start(config: EngineConfig, device: torch.device) -> Group:
    """The ranks of an engine, of which this process is the first. Raises `BackendError` where they cannot be."""
    ranks = config.tensor_parallel_size
    if ranks == 1:
        return ALONE
    if device.type != "cpu":
        raise BackendError(f"tensor_parallel_size={ranks} has processes that compute on cpu, not on {device.type}.")
    open_library()
    return _First(config)


def _follow(rank: int, config: dict[str, Any]) -> None:
    """The life of every other rank."""
    from torchinfer.runner import ModelRunner  # which imports this file

    group = _Ranks(rank, config["tensor_parallel_size"])
    runner = ModelRunner(EngineConfig(**config), group)

    def write_pages(pages_of: int, pages: Sequence[int], dtype: str, shape: Sequence[int], data: bytes = b"") -> None:
        k, v = np.frombuffer(data, dtype).reshape(2, *shape)
        runner.write_pages(pages_of, pages, {"k": k, "v": v})

    calls: dict[str, Callable[..., object]] = {
        "load": lambda path: runner.load(open_checkpoint(path)),
        "join": lambda place: group._join(Place(*place)),
        "allocate": runner.allocate,
        "warmup": runner.warmup,
        "submit": lambda data: runner.submit(Batch.from_bytes(data)),
        "read_pages": runner.read_pages,
        "write_pages": write_pages,
    }
    follow(calls, group._leave)
