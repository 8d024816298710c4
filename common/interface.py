"""The two contracts of the house: `InferenceEngine`, at the level of requests, and `ModelRunner`, at the level of steps.

`common.engine.Engine` implements the first once, over any `ModelRunner`; each backend implements the second once.
A request never knows its backend; a backend never sees a request, text, or a policy.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import import_module, util
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common.batch import Batch, Mask, Want
from common.config import ITEMSIZES
from common.errors import BackendError, nearest_hint
from common.request import Request, TokenEvent

if TYPE_CHECKING:
    from common.config import EngineConfig, ModelConfig
    from common.step_log import StepRecord
    from common.weights.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Caps:
    """What an engine or a runner can do on this machine. The scheduler sees the numbers, never the backend."""

    backend: str
    """`jax`, `torch`, …"""
    device: str
    """Platform and kind, as people name it: `cpu`, `cuda:NVIDIA H100`."""
    dtypes: tuple[str, ...]
    kernels: tuple[str, ...]
    kernel_library: str | None = None
    """The name of the loaded file of native kernels, which identifies its sources; None without."""
    kernel_arithmetic: str | None = None
    """What the native kernels multiply with, by its name: `AMX`, `AVX-512`, …; None without."""
    framework_because: str | None = None
    """Why the kernels are the framework's and not native; None where they are native, or another's."""
    token_buckets: tuple[int, ...] = ()
    """Sizes T that a step is padded to, rising; empty where any size runs as it is."""
    decode_buckets: tuple[int, ...] = ()
    """Likewise for steps in which every sequence has one token."""
    max_tokens: int = 1 << 30
    """Packed tokens a step at most."""
    max_seqs: int = 1 << 30
    """Sequences a step at most; also the number of permanent rows."""
    max_logits: int = 0
    """Logit rows a step at most, where prompts are scored. `max_seqs` if that is more."""
    max_model_len: int = 1 << 30
    vocab_size: int = 1 << 30
    depth: int = 0
    """Steps that may be in flight beside the one being built."""
    pipelined: bool = False
    """Whether steps in flight are computed at once, in stages, each with its share of the requests.

    A request that gets a token from a step is in no other step before that one lands.
    """
    observes: bool = False
    """Whether the runner has `ModelRunner.observe`."""

    def bucket(self, tokens: int, chunked: bool) -> int:
        """The padded size of a step of `tokens` tokens, where any sequence has more than one (`chunked`) or none."""
        for size in self.token_buckets if chunked else self.decode_buckets:
            if size >= tokens:
                return size
        return tokens


@dataclass(frozen=True, kw_only=True)
class KVGroup:
    """Layers that share one page table."""

    layers: tuple[int, ...]
    window: int
    """Keys a query sees in every layer of the group; 0 is all."""
    page_bytes: int
    """Bytes of one page over all layers of the group, K and V together, as they are stored."""


LOGITS_BYTES = 32 << 20
"""Bytes of a step's logits at most, unless those of `max_num_seqs` rows take more."""


def one_group(model: ModelConfig, page_bytes: int) -> tuple[KVGroup]:
    """All layers of a model on one page table."""
    return (KVGroup(layers=tuple(range(model.num_layers)), window=0, page_bytes=page_bytes),)


def max_logits(model: ModelConfig, config: EngineConfig) -> int:
    """Return the logit rows that a step takes, one for each sequence and each token of a prompt that is scored."""
    return max(config.max_num_seqs, min(config.max_num_batched_tokens, LOGITS_BYTES // (4 * model.vocab_size)))


def last_residual(num_layers: int) -> str:
    """Return the name by which `ModelRunner.observe` knows the residual stream behind the last layer."""
    return f"layers.{num_layers - 1}.residual"


def page_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Bytes of one page over all layers that is stored as it is: [K, B, H] in each layer, twice."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * ITEMSIZES[config.dtype] * config.block_size


class Rows(NamedTuple):
    """Where the pages of a group's keys, or values, lie: each head of each layer has a row of them, one behind the other."""

    starts: np.ndarray
    """uint64[rows]: the address of page 0 in each, of memory that is this process's."""
    pages: int
    bytes: int
    """Of one page in one row."""


def rows_of(starts: Sequence[int], shape: Sequence[int], itemsize: int) -> Rows:
    """Of pools that start at these addresses, each [heads, pages, ...]."""
    heads, pages, *page = shape
    size = math.prod(page) * itemsize
    every = np.array(starts, np.uint64)[:, None] + np.arange(heads, dtype=np.uint64) * np.uint64(pages * size)
    return Rows(every.ravel(), pages, size)


class PageMemory(NamedTuple):
    """The pages of a group as they lie."""

    form: str
    """A name: bytes of a page that are copied to one of the same form, be it another backend's, are the same page."""
    rows: Mapping[str, Rows]
    """`k` and `v`."""


def page_form(kernels: str, config: EngineConfig) -> str:
    """Of both backends: a step keeps pages as its kernels want them."""
    return f"{kernels} {config.dtype} {config.block_size}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one step gives back, ragged: sequence s owns tokens[token_starts[s] : token_starts[s + 1]].

    Without drafts a sequence has one token if it asked for one and none otherwise.
    """

    tokens: np.ndarray
    """int32[n]"""
    token_starts: np.ndarray
    """int32[S + 1]"""
    finite: np.ndarray
    """bool[R]: whether all logits of the row were finite."""
    logprobs: np.ndarray | None = None
    """float32[R]: log-probability of each row's token, sampled or to score, under the raw logits; None if not requested."""
    ranks: np.ndarray | None = None
    """int32[R]: 1 + the number of greater logits."""
    top_ids: np.ndarray | None = None
    """int32[R, k]: the k likeliest tokens, falling, ties to the lower id."""
    top_logprobs: np.ndarray | None = None
    """float32[R, k]"""
    digests: np.ndarray | None = None
    """uint32[R]: a digest of the bits of each row's raw logits, where the kernels compute one."""


def make_result(
    batch: Batch,
    tokens: np.ndarray,
    finite: np.ndarray,
    logprobs: np.ndarray | None,
    ranks: np.ndarray | None,
    top_ids: np.ndarray | None,
    top_logprobs: np.ndarray | None,
    digests: np.ndarray | None = None,
) -> Result:
    """The `Result` of a step that sampled at most one token for each sequence, from arrays by logit row, padded at the end."""
    R, seqs = len(batch.want), batch.num_seqs
    # Where each sequence has one row and samples, few calls do: after a step no cache knows their code.
    if seqs == R and batch.score_ids is None:
        tokens, starts = tokens[:R], np.arange(seqs + 1, dtype=np.int32)
    else:
        rows = np.flatnonzero(batch.want & Want.SAMPLE)
        tokens, starts = tokens[rows], np.zeros(seqs + 1, np.int32)
        np.cumsum(np.bincount(batch.logit_owner[rows], minlength=seqs), out=starts[1:])
    finite, tokens = finite[:R], tokens.astype(np.int32, copy=False)
    if batch.num_top is None or logprobs is None or ranks is None or top_ids is None or top_logprobs is None:
        return Result(tokens=tokens, token_starts=starts, finite=finite, digests=digests)
    k = int(batch.num_top.max(initial=0))
    return Result(
        tokens=tokens,
        token_starts=starts,
        finite=finite,
        logprobs=logprobs[:R],
        ranks=ranks[:R].astype(np.int32, copy=False),
        top_ids=top_ids[:R, :k].astype(np.int32, copy=False),
        top_logprobs=top_logprobs[:R, :k],
        digests=digests,
    )


class StepHandle(ABC):
    """A step that was submitted. `result()` waits for it; calling it twice returns the same object."""

    @abstractmethod
    def result(self) -> Result: ...


class LazyResult(StepHandle):
    """A step whose arrays by logit row, as `make_result` takes them, `fetch` brings to the host."""

    def __init__(self, batch: Batch, fetch: Callable[[], tuple[Any, ...]]) -> None:
        self._batch, self._fetch = batch, fetch
        self._result: Result | None = None

    def result(self) -> Result:
        if self._result is None:
            self._result = make_result(self._batch, *self._fetch())
        return self._result


Progress = Callable[[int, int, str], None]
"""Called with (done, total, what) during long work."""


COLLECTIVES = ("all-reduce", "all-gather")
"""Names of kernels in which ranks wait for each other and exchange data."""


class KernelEvent(NamedTuple):
    """One kernel or operator that a backend's `profile.profile` saw run."""

    name: str
    start: float
    """On the clock of `perf_counter`."""
    duration: float
    """In seconds, with what it called."""
    thread: str
    """Where it ran: a thread of the host or a stream of the device."""


class ModelRunner(ABC):
    """One model on the devices of one backend, a step at a time.

    Order of calls: `load` → `kv_groups` → `allocate` → `warmup` → any number of `submit`, `read_pages`, `write_pages`.
    After any exception out of `submit` or `StepHandle.result` the pages and rows are undefined: call `reset()` and start over.
    """

    @classmethod
    def requires_supervision(cls, config: EngineConfig) -> bool:
        """Return whether a runner of these ranks needs a process of its own.

        It does if it ends the process when it loses a rank, or if this process can no longer have the ranks.
        """
        return False

    @property
    @abstractmethod
    def caps(self) -> Caps: ...

    @abstractmethod
    def load(self, checkpoint: Checkpoint, progress: Progress | None = None) -> None:
        """Bring the weights to the device in the runner's dtype. Raises `CheckpointError` naming every mismatch."""

    @abstractmethod
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """The page groups G, known after `load`."""

    @abstractmethod
    def allocate(self, pages_per_group: Sequence[int]) -> None:
        """Make the KV pools; page 0 of each is the null page."""

    @abstractmethod
    def warmup(self, progress: Progress | None = None) -> None:
        """Compile every shape a later `submit` can need. After it `compilations` does not rise."""

    @property
    @abstractmethod
    def compilations(self) -> int:
        """Programs that the framework has compiled so far in this process, for whomever."""

    def stats(self) -> dict[str, float]:
        """Return counters since the start. A runner of one rank has none.

        `communication_bytes` is what a rank of the last stage sent to others or received from the stage before it.
        `communication_seconds`, where known, is the time for that, waits included. `rank_bytes` is its weights and pages.
        `others_rss_bytes` and `others_peak_rss_bytes` are the memory of ranks in other processes of this machine, now and at
        most.
        """
        return {}

    @abstractmethod
    def submit(self, batch: Batch, mask: Mask = None) -> StepHandle:
        """Start one step. It runs after every earlier one.

        `mask` returns the masks of the rows in `mask_rows`. The runner calls it once, before tokens are chosen, and it may
        block. Where one process runs the step, the call follows the dispatch of the forward pass. Where several do, or the step
        is recorded, it comes first: the masks go with the batch.
        """

    def observe(self, batch: Batch, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """Run one step as `submit` does, and return its intermediate tensors by name, in order of computation, float32.

        The first is `embedding` [T, D], and the last are `final_norm` [T, D], `logits` [R, V] and `tokens` int32[R]. Layer l
        has, with `layers.l.` before each name:

        - `attn_norm` [T, D], `q` [T, N, H], `k` and `v` [T, K, H], `attention` [T, N, H]
        - `attn_residual` [T, D], `mlp` [T, D] as it is added, `residual` [T, D]

        What lies inside one kernel is not visible. `names` limits what is brought to the host. Programs are compiled at the
        first call, except for `last_residual` alone of a step without logit rows. The programs of `submit` compute that one, so
        embeddings compile nothing. Raises `BackendError` where `caps.observes` is False.
        """
        raise BackendError(f"The {self.caps.backend} engine does not show what is inside its steps.")

    @abstractmethod
    def read_pages(self, group: int, pages: Sequence[int]) -> dict[str, np.ndarray]:
        """Copies of pages, `k` and `v`: [L of the group, pages, B, K, H] in the pool's dtype. Ordered after earlier submits."""

    @abstractmethod
    def write_pages(self, group: int, pages: Sequence[int], arrays: dict[str, np.ndarray]) -> None:
        """The inverse of `read_pages`."""

    def page_memory(self, group: int) -> PageMemory | None:
        """Return the memory of the pages, where the host can see it and no other rank has a part of it.

        The caller may read and write it in place until the next call on the runner. The call waits for earlier submits.
        """
        return None

    @abstractmethod
    def reset(self) -> None:
        """Forget every page and row; keep weights and compiled programs. Raises `BackendError` on a closed runner."""

    @abstractmethod
    def close(self) -> None:
        """Give back device memory. Idempotent."""


class InferenceEngine(ABC):
    """Requests in, token events out. Single-threaded: the thread that steps also adds and aborts."""

    @property
    @abstractmethod
    def caps(self) -> Caps: ...

    @abstractmethod
    def add(self, request: Request) -> None:
        """Queue a request. Raises `RequestError` if it cannot be served, `QueueFullError` if not now; nothing changes then."""

    @abstractmethod
    def step(self, timeout: float | None = None) -> list[TokenEvent]:
        """Advance by one step and return what became visible. An engine that must wait does so at most `timeout` s."""

    @abstractmethod
    def abort(self, request_id: str) -> bool:
        """End a request in whatever state it is; its terminal event comes with the next `step`. False if it is not live."""

    @property
    @abstractmethod
    def has_work(self) -> bool:
        """Whether `step` has anything left to do or to report."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Counters since the start, as plain numbers."""

    @abstractmethod
    def reset_prefix_cache(self) -> bool:
        """Forget all cached pages; False, and nothing changes, while any page is in use."""

    @abstractmethod
    def close(self) -> None: ...

    def run(self, requests: Iterable[Request]) -> dict[str, list[TokenEvent]]:
        """Add all requests, step until the engine is idle, and return each request's events in order."""
        events: dict[str, list[TokenEvent]] = {}
        for request in requests:
            self.add(request)
            events[request.request_id] = []
        while self.has_work:
            for event in self.step():
                events.setdefault(event.request_id, []).append(event)
        return events


class ReplicaState(NamedTuple):
    """One of the processes that an engine consists of."""

    pid: int
    serves: bool
    """Else it has been started, and loads."""
    step_seconds: float
    """Seconds that the step in progress has taken, at its last report; 0 between steps."""
    given_up: bool = False
    """It has ended, and is not started again."""
    role: str = "both"
    """Or `prefill` or `decode`: what it computes of a request."""
    backend: str = ""
    """Of its engine."""


class ServingEngine(InferenceEngine):
    """What `LLM` and the server need besides: an engine of ours, be it one or several behind a router."""

    step_log: list[StepRecord] | None = None
    """A list that receives every step that lands, or None. The caller limits its length."""

    @abstractmethod
    def finish(self, request_id: str, stop_reason: str) -> bool:
        """Like `abort`, for a request whose text has come to a stop string: it ends with `FINISHED_STOP`."""

    @abstractmethod
    def drain(self) -> None:
        """From now on `add` raises `DrainingError`; what was added before goes on to its end. Idempotent."""

    @abstractmethod
    def hidden_states(self, prompts: Sequence[Sequence[int]]) -> Future[list[np.ndarray]]:
        """Compute the residual stream behind the last layer, float32[T, D], of the first `prompts` that fit into one step.

        A prompt that no step takes is computed in several. Each `step` of the engine computes one piece of it, of at most
        `max_num_batched_tokens` tokens. So running requests wait no longer than for a chunk of another prompt. The future
        resolves within `step`; cancel it to drop the work. Raises `RequestError` for a prompt that can never be computed.
        """

    @property
    @abstractmethod
    def replicas(self) -> tuple[ReplicaState, ...]:
        """The processes behind a router; none of an engine that is one. Any thread may ask."""


def load_backend(name: str, config: EngineConfig) -> ModelRunner:
    """A `ModelRunner` of the backend `name`."""
    make: Any = find_backend(name, config)
    runner: ModelRunner = make(config)
    return runner


def find_backend(name: str, config: EngineConfig) -> type[ModelRunner]:
    """The `ModelRunner` of the backend `name`: `jax` is the package `jaxinfer`, `torch` is `torchinfer`, and so on. Raises
    `BackendError` for an unknown one, `ConfigError` for what it does not take."""
    expect_backend(name)
    config.check_backend(name)
    runner: type[ModelRunner] = import_module(f"{name}infer").ModelRunner
    return runner


def expect_backend(name: str) -> None:
    """Raise `BackendError` for a backend that has no package. Imports nothing."""
    package = f"{name}infer"
    if not isinstance(name, str) or not name.isidentifier() or util.find_spec(package) is None:
        raise BackendError(
            f"Unknown backend {name!r}: there is no package {package!r}.{nearest_hint(str(name), ('jax', 'torch'))} "
            "Known here: jax, torch."
        )
