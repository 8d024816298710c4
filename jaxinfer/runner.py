"""One model on JAX devices, a step at a time.

A step is one pure function of (weights, state, inputs), compiled ahead of time for each bucket of tokens. The state (KV pages
and each row's last token) is donated, so XLA updates it in place. All inputs of a step travel as one int32 array.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from common import interface
from common.config import EngineConfig, ModelConfig
from common.errors import BackendError
from common.interface import Caps, KVGroup, Progress
from common.schedule.batch import Batch
from common.weights.checkpoint import Checkpoint
from jaxinfer import cache as pages
from jaxinfer import sampling
from jaxinfer.arrays import to_device, to_host
from jaxinfer.attention import Plan, _plan_shape, make_plan, paged_attention
from jaxinfer.cache import KVCache
from jaxinfer.device import describe, open_device
from jaxinfer.model import Decoder, forward, logits
from jaxinfer.weights import load_model

_COPIES = 16
"""Page copies of one call."""


class State(NamedTuple):
    """What a step takes, changes and gives back."""

    cache: KVCache
    last_tokens: Array
    """int32[rows + 1]: the last token sampled for each permanent row; the spare one takes what padding writes."""


class Inputs(NamedTuple):
    """One step's inputs, padded to T tokens and R logit rows. Also used for their shapes and dtypes."""

    token_ids: Any  # [T]
    positions: Any  # [T]
    fill_row: Any  # [T], row whose last token goes here, or -1
    logit_rows: Any  # [R]
    rows: Any  # [R], permanent row of each logit row
    seeds: Any  # [R, 2], uint32
    temperature: Any  # [R], float32
    top_k: Any  # [R]
    top_p: Any  # [R], float32
    min_p: Any  # [R], float32
    modes: Any  # [3]: any row samples, any row filters, any row wants logprobs
    plan: Plan


@dataclass(frozen=True)
class _Bucket:
    """The padded sizes of one compiled step. Without chunks every sequence has one token, and half the program falls away."""

    tokens: int
    seqs: int
    pages: int
    chunked: bool

    def shapes(self) -> Inputs:
        T, R = (self.tokens,), (self.seqs,)
        return Inputs(T, T, T, R, R, (*R, 2), R, R, R, R, (3,), _plan_shape(self.tokens, self.seqs, self.pages, self.chunked))

    @cached_property
    def layout(self) -> Inputs:
        """(offset, shape, dtype) of each input in the packed array."""
        dtypes = {"seeds": np.uint32, "temperature": np.float32, "top_p": np.float32, "min_p": np.float32}
        flat, tree = jax.tree.flatten(self.shapes(), is_leaf=lambda x: type(x) is tuple)
        starts = np.cumsum([0, *(math.prod(shape) for shape in flat)])
        names = [*Inputs._fields[:-1], *Plan._fields]
        entries = [
            (int(at), shape, dtypes.get(name, np.int32)) for at, shape, name in zip(starts[:-1], flat, names, strict=True)
        ]
        return jax.tree.unflatten(tree, entries)

    @cached_property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in jax.tree.leaves(self.shapes(), is_leaf=lambda x: type(x) is tuple))


def _count_compilations() -> Callable[[], int]:
    """Start counting what XLA compiles in this process, by whomever; the returned function tells how many so far."""
    count = [0]

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        count[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: count[0]


def _decode_buckets(most: int) -> tuple[int, ...]:
    """2, 4, 8, 16, 24, 32, 48, 64, …: powers of two and from 16 their midpoints, the last at least `most`. Never 1: XLA:CPU has
    no fast bfloat16 matrix-vector product."""
    sizes = {size for power in range(1, 31) for size in (1 << power, 3 << power >> 1 if power > 3 else 2)}
    return _up_to(sizes, most)


def _token_buckets(most: int) -> tuple[int, ...]:
    """32, 64, 128, …: powers of two, the last at least `most`."""
    return _up_to({1 << power for power in range(5, 31)}, most)


def _up_to(sizes: set[int], most: int) -> tuple[int, ...]:
    return (*sorted(size for size in sizes if size < most), max(most, min(sizes)))


class ModelRunner(interface.ModelRunner):
    """`common.interface.ModelRunner` on JAX."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.device = open_device(config.device, config.threads)
        self.weights: tuple[Array, ...] = ()
        self.state: Any = None  # a State once allocated
        self._compiled: dict[_Bucket, Any] = {}
        self._compilations = _count_compilations()

    @property
    def caps(self) -> Caps:
        return self._caps

    def load(self, checkpoint: Checkpoint, progress: Progress | None = None) -> None:
        self.model_config: ModelConfig = checkpoint.config
        self.max_model_len = self.config.model_len(checkpoint.config)
        self._caps = Caps(
            backend="jax",
            device=describe(self.device),
            dtypes=("float32", "bfloat16"),
            kernels=("framework",),
            token_buckets=_token_buckets(self.config.max_num_batched_tokens),
            decode_buckets=_decode_buckets(self.config.max_num_seqs),
            max_tokens=self.config.max_num_batched_tokens,
            max_seqs=self.config.max_num_seqs,
            max_model_len=self.max_model_len,
            vocab_size=self.model_config.vocab_size,
        )
        model = load_model(checkpoint, self.config.dtype, self.max_model_len, self.device, progress)
        graph, state = nnx.split(model)
        # Plain arrays in a tuple: walking NNX variables would cost milliseconds a step.
        leaves, tree = jax.tree.flatten(state)
        self.weights = tuple(leaves)
        self._merge = lambda leaves: nnx.merge(graph, jax.tree.unflatten(tree, leaves))

    def kv_groups(self) -> tuple[KVGroup, ...]:
        return interface.one_group(self.model_config, self.config)

    def allocate(self, pages_per_group: Sequence[int]) -> None:
        self._num_pages = pages_per_group[0]
        self.reset()

    def reset(self) -> None:
        config = self.config
        self._expect_open()
        self.state = None  # the old pool goes before the new one comes
        cache = pages.make_cache(self.model_config, self._num_pages, config.block_size, config.dtype, self.device)
        self.state = State(cache, jnp.zeros((config.max_num_seqs + 1,), jnp.int32, device=self.device))

    def warmup(self, progress: Progress | None = None) -> None:
        caps = self.caps
        buckets = [self._bucket(size, False) for size in caps.decode_buckets]
        buckets += [self._bucket(size, True) for size in caps.token_buckets]
        # XLA holds no lock while it compiles: a second thread fills what one leaves idle between its parallel phases.
        with ThreadPoolExecutor(2) as pool:
            for done, (bucket, step) in enumerate(zip(buckets, pool.map(self._compile, buckets), strict=True)):
                self._compiled[bucket] = step
                self._run(bucket, np.zeros(bucket.size, np.int32))
                if progress:
                    kind = "chunks and decodes" if bucket.chunked else "decodes"
                    progress(done + 1, len(buckets), f"compiled steps of {bucket.tokens} tokens, {kind}")
        self._copy_pages(np.zeros((0, 2), np.int32))

    @property
    def compilations(self) -> int:
        return self._compilations()

    def submit(self, batch: Batch) -> interface.Pending:
        self._expect_open()
        if batch.copies.shape[1]:
            self._copy_pages(batch.copies[0])
        chunked = batch.num_tokens > int(batch.num_decodes[0])
        bucket = self._bucket(self.caps.bucket(batch.num_tokens, chunked), chunked)
        if bucket not in self._compiled:
            self._compiled[bucket] = self._compile(bucket)
        sampled = self._run(bucket, self._pack(bucket, batch))
        return interface.Fetched(batch, lambda: to_host(sampled))

    def read_pages(self, group: int, pages_: Sequence[int]) -> dict[str, np.ndarray]:
        return pages.read_pages(self.state.cache, pages_)

    def write_pages(self, group: int, pages_: Sequence[int], arrays: dict[str, np.ndarray]) -> None:
        self.state = self.state._replace(cache=pages.write_pages(self.state.cache, pages_, arrays))

    def close(self) -> None:
        self.weights, self.state = (), None
        self._compiled.clear()

    def _expect_open(self) -> None:
        if not self.weights:
            raise BackendError("This runner has no weights: load a checkpoint, or, if it is closed, make a new one.")

    def _bucket(self, tokens: int, chunked: bool) -> _Bucket:
        config = self.config
        seqs = min(tokens, max(config.max_num_seqs, 2))
        return _Bucket(tokens, seqs, -(-self.max_model_len // config.block_size), chunked)

    def _compile(self, bucket: _Bucket) -> Any:
        step = jax.jit(lambda weights, state, packed: self._step(bucket, weights, state, packed), donate_argnums=1)
        return step.lower(self.weights, self.state, jax.ShapeDtypeStruct((bucket.size,), jnp.int32)).compile()

    def _run(self, bucket: _Bucket, packed: np.ndarray) -> sampling.Sampled:
        self.state, sampled = self._compiled[bucket](self.weights, self.state, packed)
        return sampled

    def _copy_pages(self, pairs: np.ndarray) -> None:
        for at in range(0, max(len(pairs), 1), _COPIES):
            part = np.zeros((_COPIES, 2), np.int32)
            part[: len(pairs[at : at + _COPIES])] = pairs[at : at + _COPIES]
            self.state = self.state._replace(cache=pages.copy_pages(self.state.cache, to_device(part, self.device)))

    def _pack(self, bucket: _Bucket, batch: Batch) -> np.ndarray:
        """A batch as the one array of inputs of its bucket."""
        R, owner = len(batch.logit_rows), batch.logit_owner
        fill_row = np.full(bucket.tokens, -1, np.int32)
        fill_row[batch.fill_at] = batch.fill_row
        rows = np.full(bucket.seqs, self.config.max_num_seqs, np.int32)
        rows[:R] = batch.rows[owner]
        by_owner = lambda array: None if array is None else array[owner]  # noqa: E731
        modes = np.array([batch.seeds is not None, batch.top_k is not None, batch.num_top is not None], np.int32)
        values = Inputs(
            batch.token_ids,
            batch.positions,
            fill_row,
            batch.logit_rows,
            rows,
            by_owner(batch.seeds),
            by_owner(batch.temperature),
            by_owner(batch.top_k),
            by_owner(batch.top_p),
            by_owner(batch.min_p),
            modes,
            make_plan(batch, self.model_config, self.config.block_size),
        )
        packed = np.zeros(bucket.size, np.int32)
        layout = bucket.layout
        for (at, shape, dtype), value in zip((*layout[:-1], *layout.plan), (*values[:-1], *values.plan), strict=True):
            if value is not None:
                view = packed[at : at + math.prod(shape)].view(dtype).reshape(shape)
                view[tuple(slice(size) for size in value.shape)] = value
        return packed

    def _step(self, bucket: _Bucket, weights: tuple[Array, ...], state: State, packed: Array) -> tuple[State, sampling.Sampled]:
        """The pure function that is compiled."""

        def unpack(entry: tuple[int, tuple[int, ...], Any]) -> Array:
            at, shape, dtype = entry
            return lax.bitcast_convert_type(lax.slice(packed, (at,), (at + math.prod(shape),)), dtype).reshape(shape)

        x: Inputs = jax.tree.map(unpack, bucket.layout, is_leaf=lambda x: type(x) is tuple)
        model: Decoder = self._merge(weights)
        token_ids = jnp.where(x.fill_row >= 0, state.last_tokens[x.fill_row], x.token_ids)
        attend = paged_attention(self.model_config, x.plan)
        hidden_TD, cache = forward(model, token_ids, x.positions, attend, state.cache)
        logits_RV = logits(model, hidden_TD[x.logit_rows])
        sampled = self._sample(logits_RV, x)
        return State(cache, state.last_tokens.at[x.rows].set(sampled.tokens)), sampled

    def _sample(self, logits_RV: Array, x: Inputs) -> sampling.Sampled:
        sampled, filtered, logprobs = x.modes[0] > 0, x.modes[1] > 0, x.modes[2] > 0
        u = sampling.uniform(x.seeds, x.positions[x.logit_rows] + 1)
        tokens = lax.cond(
            sampled,
            lambda: sampling.sample(logits_RV, x.temperature, x.top_k, x.top_p, x.min_p, u, filtered),
            lambda: sampling.greedy(logits_RV),
        )
        shapes = jax.eval_shape(sampling.logprobs_of, logits_RV, tokens)
        extra = lax.cond(
            logprobs,
            lambda: sampling.logprobs_of(logits_RV, tokens),
            lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
        )
        return sampling.Sampled(tokens, jnp.isfinite(logits_RV.sum(axis=-1)), *extra)
