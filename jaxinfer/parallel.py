"""The ranks that share a model, and what they exchange inside a step.

Ranks exchange sums for the residual stream, and what a sampler needs to know of the whole logits. They never exchange logits.
Stages, of one rank or several, share the layers: each sends the residual stream to the next.

JAX drives all ranks from one process. The step of a stage is one program on a mesh of devices. `shard_map` gives each device
its part of weights, pages and logits. So the program states what a rank computes and what ranks exchange.

Agents may start more processes (`common.launch`), on one machine or several. Each drives as many ranks of every stage, and a
mesh has devices of all processes (`jax.distributed`). A program on a mesh runs when all processes have started it. So the first
process, which is the caller's, sends every call to the others. JAX cannot continue without one of them, nor with one that is
elsewhere in a step. Then this process ends, and its supervisor (`common.replicas`) starts it again.

A stage is a program of its own and not a place on another axis of the mesh. On such an axis every stage would have the shapes
of all others. It would need room for embedding, LM head and the most layers, and would run the code of all stages.

Letters: R logit rows · V vocabulary, of which each rank has n · k candidates.
"""

from __future__ import annotations

import logging
import math
import os
import re
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from common.batch import Batch, Mask
from common.config import EngineConfig, ModelConfig
from common.errors import BackendError
from common.interface import Progress
from common.process.agents import Agents, RemoteProcess, agents, machine
from common.process.exits import FAILURE
from common.process.workers import ProcessExited, WorkerHandle
from common.system.hardware import cores, family_memory
from common.weights.checkpoint import Checkpoint
from jaxinfer.arrays import to_device
from jaxinfer.device import make_cpu_devices, open_device

_log = logging.getLogger(__name__)

_PATIENCE_S = 60
"""Until all processes have come together."""
_NEVER_S = 7 * 24 * 3600
_LEAVE_S = 5
"""For the first, once it leaves, until all have."""

_AXIS = "tensor"
REPLICATED, HEADS, COLUMNS = PartitionSpec(), PartitionSpec(_AXIS), PartitionSpec(None, _AXIS)
"""Of what all ranks have alike; of pools, whose heads they share out; and of logits, whose columns."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """One rank that has all of a model, and therefore exchanges nothing.

    The docstrings of the methods describe the ranks of one stage.
    """

    _stage: int = 0
    _stages: int = 1
    _device: jax.Device | None = None
    """Of a stage that has one."""

    @property
    def ranks(self) -> int:
        return 1

    @property
    def rank(self) -> Any:
        """Which of them computes."""
        return 0

    @property
    def stages(self) -> int:
        return self._stages

    @property
    def stage(self) -> int:
        """Which of them computes."""
        return self._stage

    def all_reduce(self, x: Array) -> Array:
        """The sum of every rank's x."""
        return x

    def gather(self, x: Array) -> Array:
        """Every rank's x, in their order: [ranks, ...]."""
        return x[None]

    def fold(self, reduce: Callable[..., Array], x: Array) -> Array:
        """`reduce` (a sum, a maximum, …) over every rank's x, in their order: the same bits on each of them."""
        return x

    def join(self, x: Array) -> Array:
        """Every rank's columns beside each other: [R, n] -> [R, ranks * n]."""
        return x

    def look_up(self, table: Callable[[Array], Array], ids: Array, n: int) -> Array:
        """`table(ids)`, where each rank's table has n entries of the whole."""
        return table(ids)

    def columns(self, x: Array, n: int) -> Array:
        """Those n of the columns of x that are this rank's."""
        return x[:, :n]

    def own(self, n: int, ids: Array, *others: Array) -> tuple[Array, ...]:
        """Those of `ids`, and what belongs to them, that are among this rank's n, counted from its first."""
        return ids, *others

    def real(self, logits: Array, vocab: int) -> Array:
        """Logits with -inf where a rank has more columns than there are tokens."""
        return logits

    def best(self, logits: Array, ids: Array) -> Array:
        """Of every rank's token for each row, the one of the highest logit, of equals the first."""
        return ids

    def highest(self, logits: Array, ids: Array, n: int) -> tuple[Array, Array]:
        """The k highest of every rank's k highest logits [R, k], falling, and their tokens. Of equals the first come first."""
        return logits, ids

    @property
    def _here(self) -> Sequence[int]:
        """Those that this process drives."""
        return (0,)

    def _place(self, device: jax.Device, spec: PartitionSpec) -> jax.sharding.Sharding:
        return SingleDeviceSharding(self._device or device)

    def _devices(self, device: jax.Device) -> Sequence[jax.Device]:
        """Those of `_here`, of which `device` is the first, unless a stage has its own."""
        return (self._device or device,)

    def _put(self, parts: Sequence[np.ndarray], axis: int | None, device: jax.Device) -> Array:
        """Each part of an array, of the ranks `_here`, on its device, as `_whole` has them."""
        return self._whole([to_device(part, place) for part, place in zip(parts, self._devices(device), strict=True)], axis)

    def _whole(self, parts: Sequence[Array], axis: int | None) -> Array:
        """The array of which each rank's device has a part: they lie side by side along `axis`, or are all the same. `parts`:
        of those `_here`."""
        return parts[0]

    def _spread(self, function: Callable[..., Any], takes: Any, gives: Any) -> Callable[..., Any]:
        """A function of each rank's parts as one of whole arrays. `takes`, `gives`: how they are shared out, or arrays that are
        shared out so."""
        return function

    def _bring(self, x: Array) -> Array:
        """What all ranks of another stage have alike, to the devices of this."""
        return jax.device_put(x, self._device)

    def _staged(self, make: Callable[[Group], Any]) -> Any:
        """The step that `make` makes for a group."""
        return make(self)


ALONE = Group()


@dataclass(frozen=True, kw_only=True)
class _Ranks(Group):
    """Devices of one mesh. Everything but what has an underscore is for the inside of `_spread`."""

    mesh: Mesh

    @property
    def ranks(self) -> int:
        return int(self.mesh.size)

    @property
    def rank(self) -> Any:
        return lax.axis_index(_AXIS)

    def all_reduce(self, x: Array) -> Array:
        return lax.psum(x, _AXIS)

    def gather(self, x: Array) -> Array:
        return lax.all_gather(x, _AXIS)

    def fold(self, reduce: Callable[..., Array], x: Array) -> Array:
        return reduce(self.gather(x), axis=0)

    def join(self, x: Array) -> Array:
        return lax.all_gather(x, _AXIS, axis=1, tiled=True)

    def look_up(self, table: Callable[[Array], Array], ids: Array, n: int) -> Array:
        (local,) = self.own(n, ids)
        x = table(jnp.minimum(local, n - 1))
        return self.all_reduce(jnp.where((local < n).reshape(-1, *[1] * (x.ndim - 1)), x, 0))

    def columns(self, x: Array, n: int) -> Array:
        whole = jnp.pad(x, ((0, 0), (0, max(self.ranks * n - x.shape[1], 0))))
        return lax.dynamic_slice_in_dim(whole, self.rank * n, n, axis=1)

    def own(self, n: int, ids: Array, *others: Array) -> tuple[Array, ...]:
        local = ids - self.rank * n
        return jnp.where((local >= 0) & (local < n), local, n), *others  # n is beyond them: what is written there is dropped

    def real(self, logits: Array, vocab: int) -> Array:
        n = logits.shape[1]
        return jnp.where(self.rank * n + jnp.arange(n) < vocab, logits, -jnp.inf)

    def best(self, logits: Array, ids: Array) -> Array:
        logits, ids = self.highest(jnp.take_along_axis(logits, ids[:, None], axis=1), ids[:, None], logits.shape[1])
        return ids[:, 0]

    def highest(self, logits: Array, ids: Array, n: int) -> tuple[Array, Array]:
        top, at = lax.top_k(without_negative_zero(self.join(logits)), logits.shape[1])
        return top, jnp.take_along_axis(self.join(self.rank * n + ids), at, axis=1)

    def _place(self, device: jax.Device, spec: PartitionSpec) -> jax.sharding.Sharding:
        return NamedSharding(self.mesh, spec)

    @property
    def _here(self) -> Sequence[int]:
        return [rank for rank, device in enumerate(self.mesh.devices) if device.process_index == jax.process_index()]

    def _devices(self, device: jax.Device) -> Sequence[jax.Device]:
        return [self.mesh.devices[rank] for rank in self._here]

    def _whole(self, parts: Sequence[Array], axis: int | None) -> Array:
        shape = tuple(size * (self.ranks if i == axis else 1) for i, size in enumerate(parts[0].shape))
        spec = REPLICATED if axis is None else PartitionSpec(*[None] * axis, _AXIS)
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(self.mesh, spec), list(parts))

    def _spread(self, function: Callable[..., Any], takes: Any, gives: Any) -> Callable[..., Any]:
        specs = lambda tree: jax.tree.map(lambda x: x if isinstance(x, PartitionSpec) else x.sharding.spec, tree)  # noqa: E731
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs(takes), out_specs=specs(gives), check_vma=False)

    def _bring(self, x: Array) -> Array:
        shards = zip(x.addressable_shards, self._devices(self.mesh.devices[0]), strict=True)
        return self._whole([jax.device_put(shard.data, device) for shard, device in shards], None)


@dataclass(frozen=True, kw_only=True)
class _Stages(Group):
    """All stages, whose groups are of devices of their own."""

    groups: tuple[Group, ...]

    @property
    def ranks(self) -> int:
        return self.groups[0].ranks

    def _staged(self, make: Callable[[Group], Any]) -> Any:
        return _Pipeline([make(group) for group in self.groups])


_Advanced = Future[tuple[Any, Any]]
"""Of a stage that has run a step: its state afterwards, and what it passes on, or at last what brings results to the host."""


class _Pipeline:
    """The steps of all stages as one. Its state is the last `_Advanced` of each stage.

    Each stage has a thread that runs its steps in order. So a stage computes a step while the next stage computes the step
    before.
    """

    def __init__(self, stages: Sequence[Any]) -> None:
        self._stages = stages
        self._threads = [ThreadPoolExecutor(1, f"stage {at}") for at in range(len(stages))]
        self.kernels, self.token_buckets, self.decode_buckets = (
            getattr(stages[0], name) for name in ("kernels", "token_buckets", "decode_buckets")
        )

    @property
    def max_logits(self) -> int:
        rows: int = self._stages[-1].max_logits
        return rows

    @property
    def _told(self) -> int:
        told: int = self._stages[-1]._told
        return told

    def load(self, checkpoint: Checkpoint, positions: int, progress: Progress | None = None) -> None:
        for at, stage in enumerate(self._stages):
            stage.load(checkpoint, positions, self._told_of(at, progress))

    def make_state(self, num_pages: int) -> tuple[_Advanced, ...]:
        make = lambda stage: (stage.make_state(num_pages), None)  # noqa: E731
        return tuple(thread.submit(make, stage) for thread, stage in zip(self._threads, self._stages, strict=True))

    def page_bytes(self, model: ModelConfig) -> int:
        size: int = self._stages[0].page_bytes(model)
        return size

    def held(self, state: tuple[_Advanced, ...]) -> int:
        size: int = self._stages[-1].held(state[-1].result()[0])
        return size

    def warmup(self, state: tuple[_Advanced, ...], progress: Progress | None = None) -> tuple[_Advanced, ...]:
        return self._each(state, lambda at, stage, before: (stage.warmup(before, self._told_of(at, progress)), None), wait=True)

    def run(
        self, state: tuple[_Advanced, ...], batch: Batch, mask: Mask = None
    ) -> tuple[tuple[_Advanced, ...], Callable[[], Any]]:
        done: list[_Advanced] = []

        def advance(at: int, stage: Any, before: Any) -> tuple[Any, Any]:
            passed = [stage.group._bring(done[at - 1].result()[1])] if at else []
            advanced: tuple[Any, Any] = stage._advance(before, batch, mask, *passed)
            return advanced

        for at, before in enumerate(state):
            done.append(self._then(at, before, advance))
        return tuple(done), lambda: done[-1].result()[1]()

    def read_pages(self, state: tuple[_Advanced, ...], pages: Sequence[int]) -> dict[str, np.ndarray]:
        done = self._each(state, lambda at, stage, before: (before, stage.read_pages(before, pages)))
        read = [each.result()[1] for each in done]
        return {name: np.concatenate([arrays[name] for arrays in read]) for name in read[0]}

    def write_pages(
        self, state: tuple[_Advanced, ...], pages: Sequence[int], arrays: dict[str, np.ndarray]
    ) -> tuple[_Advanced, ...]:
        def write(at: int, stage: Any, before: Any) -> tuple[Any, Any]:
            own = {name: x[stage._layers.start : stage._layers.stop] for name, x in arrays.items()}
            return stage.write_pages(before, pages, own), None

        return self._each(state, write, wait=True)  # an array may be the caller's again

    def _copy_pages(self, state: tuple[_Advanced, ...], pairs: np.ndarray) -> tuple[_Advanced, ...]:
        return self._each(state, lambda at, stage, before: (stage._copy_pages(before, pairs), None))

    def _told_of(self, at: int, progress: Progress | None) -> Progress | None:
        """Of one stage."""
        return progress and (lambda done, total, what: progress(done, total, f"{what}, stage {at + 1} of {len(self._stages)}"))

    def _each(self, state: tuple[_Advanced, ...], change: Callable[..., Any], wait: bool = False) -> tuple[_Advanced, ...]:
        done: list[_Advanced] = []
        for at, before in enumerate(state):
            done.append(self._then(at, before, change))
            if wait:
                done[-1].result()
        return tuple(done)

    def _then(self, at: int, before: _Advanced, change: Callable[[int, Any, Any], tuple[Any, Any]]) -> _Advanced:
        """What `change` makes of a stage's state, once that is there."""
        return self._threads[at].submit(lambda: change(at, self._stages[at], before.result()[0]))


def without_negative_zero(x: Array) -> Array:
    """x without -0, which equals 0, but comes behind it in the order of bits, and of `lax.top_k`."""
    return jnp.where(x == 0, 0, x)


def communicated_bytes(program: str) -> int:
    """Return the number of bytes that a rank sends in a compiled program. Every branch of the program counts."""
    told = 0
    for gives, kind, ranks in re.findall(r"= (.*?) (all-reduce|all-gather)\(.*?replica_groups=\{\{([\d,]*)\}", program):
        given = sum(
            math.prod(int(size) for size in shape.split(",") if size) * (int(bits) if bits else 8) // 8
            for bits, shape in re.findall(r"[a-z]+(\d*)\[([\d,]*)\]", gives)
        )
        told += given // (len(ranks.split(",")) if kind == "all-gather" else 1)
    return told


class ProcessInfo(NamedTuple):
    """One of several processes that share out a model: what JSON can hold."""

    address: str
    """Where the first has them come together."""
    processes: int
    process: int
    neighbours: int
    """How many of them are on its machine, and of those come before it."""
    before: int


class RemoteRanks:
    """The processes that make the calls which this one, the first of them, makes, in their order."""

    def __init__(self, config: EngineConfig, launch: Agents) -> None:
        """Start one beside each that was launched, and come together. Raises `BackendError` where they cannot."""
        _expect_even(config.tensor_parallel_size, 1 + len(launch.all))
        info, *others = _process_infos(launch.host, [machine(), *(agent.machine for agent in launch.all)])
        self._followers: list[WorkerHandle] = []
        try:
            for agent, own in zip(launch.all, others, strict=True):
                start = partial(RemoteProcess, agent, launch.secret)
                self._followers.append(WorkerHandle("jax", asdict(config), own, ended=self._lose, start=start))
            for other in self._followers:
                other.tell("connect")
            self.config, self.device, self.group = init_distributed(info, config)
        except BackendError:
            self._end()
            raise

    def tell(self, call: str, *arguments: Any, data: Sequence[np.ndarray] = ()) -> None:
        """Have them make a call, at which they may wait for this process to make it too."""
        for other in self._followers:
            other.tell(call, *arguments, data=data)

    def memory(self) -> dict[str, float]:
        """As `ModelRunner.stats`, of those on this machine."""
        held, most = family_memory(other.pid for other in self._followers if other.here)
        return {"others_rss_bytes": held, "others_peak_rss_bytes": most}

    def close(self) -> None:
        """Stop the processes after they have made all calls."""
        for other in self._followers:
            with suppress(ProcessExited):
                other.tell("shut_down")
        shut_down_distributed()
        self._end()

    def _end(self) -> None:
        followers, self._followers = self._followers, []
        for other in followers:
            other.close()

    def _lose(self, other: WorkerHandle) -> None:
        if other in self._followers:
            # A process that computes with it would wait for it, possibly without an end, and cannot compute without it.
            _log.error("%s JAX cannot go on without it, so this one ends too.", other.how_it_ended())
            os._exit(FAILURE)


def _process_infos(host: str, machines: Sequence[str]) -> list[ProcessInfo]:
    """Of processes on these machines, the first of which others reach at `host`."""
    with socket.create_server((host, 0)) as free:
        address = f"{host}:{free.getsockname()[1]}"
    every = Counter(machines)
    return [ProcessInfo(address, len(machines), at, every[name], machines[:at].count(name)) for at, name in enumerate(machines)]


def _expect_even(ranks: int, processes: int) -> None:
    """Raise `BackendError` unless so many processes can share out the ranks of a stage."""
    if ranks % processes:
        raise BackendError(
            f"tensor_parallel_size={ranks} cannot be shared out over the {processes} processes of this launch: each of JAX's "
            f"drives as many ranks of every stage. Set a multiple of {processes}, or launch another number of processes."
        )


def init_distributed(seat: ProcessInfo, config: EngineConfig) -> tuple[EngineConfig, jax.Device, Group]:
    """Come together with the others: the engine's options with this process's share of its machine's threads, its first device,
    and all ranks. Raises `BackendError` if JAX has started before."""
    own = config.ranks // seat.processes
    config = replace(config, threads=max(1, (config.threads or cores()) // seat.neighbours))
    jax.config.update("jax_enable_preemption_service", False)  # which keeps SIGTERM from ending a process
    jax.config.update("jax_enable_recoverability", True)  # without it a process that leaves during a call is killed
    try:
        jax.distributed.initialize(
            seat.address,
            seat.processes,
            seat.process,
            local_device_ids=range(seat.before * own, (seat.before + 1) * own),
            coordinator_bind_address=seat.address,
            initialization_timeout=_PATIENCE_S,
            # That a process is gone is known from the line to it, and sooner.
            heartbeat_timeout_seconds=_NEVER_S,
            shutdown_timeout_seconds=_LEAVE_S,
        )
    except RuntimeError as error:
        raise BackendError(f"JAX's processes did not come together at {seat.address}: {error}") from error
    device = open_device(config.device, config.threads, own)
    every = jax.devices(device.platform)
    group = _share([[each for each in every if each.process_index == i] for i in range(seat.processes)], config)
    _connect_meshes(group)
    return config, device, group


def _connect_meshes(group: Group) -> None:
    """Connect the processes of each mesh while all are present. Raises `BackendError` if they cannot connect.

    XLA connects when a mesh first computes a sum, and limits the wait to half a minute. The processes may compile for minutes
    before that, so this function computes a sum at once.
    """
    for stage in group.groups if isinstance(group, _Stages) else (group,):
        ones = stage._put([np.ones(1, np.float32)] * len(stage._here), 0, jax.local_devices()[0])
        try:
            jax.jit(stage._spread(stage.all_reduce, HEADS, REPLICATED))(ones).block_until_ready()
        except RuntimeError as error:
            raise BackendError(f"JAX's processes could not connect with each other: {error}") from error


def shut_down_distributed() -> None:
    """All do so at once."""
    with suppress(RuntimeError):  # a process may have ended before
        jax.distributed.shutdown()


def start(config: EngineConfig, device: jax.Device) -> Group:
    """The ranks of an engine, of which `device` is the first. Raises `BackendError` if there are not enough devices."""
    return ALONE if config.ranks == 1 else _share([jax.local_devices(backend=device.platform)], config)


def requires_supervision(config: EngineConfig) -> bool:
    """As `ModelRunner.requires_supervision`. JAX cannot go on without one of several processes."""
    return config.ranks > 1 and (agents() is not None or _lacks_devices(config))


def _lacks_devices(config: EngineConfig) -> bool:
    """Return whether the ranks are to be CPU devices, and JAX has started in this process without so many."""
    return not make_cpu_devices(config.ranks) and (jax.default_backend() if config.device == "auto" else config.device) == "cpu"


def _share(devices: Sequence[Sequence[jax.Device]], config: EngineConfig) -> Group:
    """The ranks of an engine on the devices of each of its processes. Raises `BackendError` if those are not enough."""
    ranks, stages = config.tensor_parallel_size, config.pipeline_parallel_size
    own = config.ranks // len(devices)
    if (least := min(map(len, devices))) < own:
        raise BackendError(
            f"tensor_parallel_size={ranks} with pipeline_parallel_size={stages} needs {own} devices, and JAX has {least} of "
            f"{devices[0][0].platform}. On a CPU it makes them as it starts. `LLM` and the server start a process of their own "
            "where that is too late."
        )
    # Every process has a part of every stage, for none can run a program on devices of others alone.
    meshes = np.array([each[:own] for each in devices]).reshape(len(devices), stages, -1).swapaxes(0, 1).reshape(stages, ranks)
    if ranks == 1:
        groups = [Group(_stage=at, _stages=stages, _device=own[0]) for at, own in enumerate(meshes)]
    else:
        groups = [_Ranks(_stage=at, _stages=stages, mesh=Mesh(own, (_AXIS,))) for at, own in enumerate(meshes)]
    return groups[0] if stages == 1 else _Stages(_stages=stages, groups=tuple(groups))


def start_remote_ranks(config: EngineConfig) -> RemoteRanks | None:
    """The other processes of an engine, of which this is the first, if it has any. Before JAX starts."""
    launch = agents()
    return RemoteRanks(config, launch) if launch and config.ranks > 1 else None
