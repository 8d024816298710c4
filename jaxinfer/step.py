"""One step in JAX's own operations: what `kernels=framework` runs.

A step is one pure function of (weights, state, inputs), compiled ahead of time for each bucket of tokens. The state (KV pages
and each row's last token) is donated, so XLA updates it in place. All inputs of a step travel as one int32 array.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from common.config import EngineConfig, ModelConfig
from common.interface import Progress
from common.schedule.batch import Batch
from common.weights.checkpoint import Checkpoint
from jaxinfer import cache as pages
from jaxinfer import sampling
from jaxinfer.arrays import to_host
from jaxinfer.attention import Plan, _plan_shape, make_plan, paged_attention
from jaxinfer.cache import KVCache
from jaxinfer.model import Decoder, forward, logits
from jaxinfer.observe import Names, keeper
from jaxinfer.weights import load_model


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


class Step:
    """A model in the framework's operations. `load` first; then `run` takes a state and a batch, and gives the next state."""

    kernels = "framework"

    def __init__(self, config: EngineConfig, device: jax.Device) -> None:
        self.config, self.device = config, device
        self.token_buckets = _token_buckets(config.max_num_batched_tokens)
        self.decode_buckets = _decode_buckets(config.max_num_seqs)
        self._compiled: dict[tuple[_Bucket, Names], Any] = {}

    def load(self, checkpoint: Checkpoint, positions: int, progress: Progress | None = None) -> None:
        """Bring the weights to the device, with room for `positions` rotary positions."""
        self.model_config: ModelConfig = checkpoint.config
        self._positions = positions
        graph, state = nnx.split(load_model(checkpoint, self.config.dtype, positions, self.device, progress))
        # Plain arrays in a tuple: walking NNX variables would cost milliseconds a step.
        leaves, tree = jax.tree.flatten(state)
        self._weights = tuple(leaves)
        self._merge = lambda leaves: nnx.merge(graph, jax.tree.unflatten(tree, leaves))

    def make_state(self, num_pages: int) -> State:
        """Empty pages and rows."""
        config = self.config
        cache = pages.make_cache(self.model_config, num_pages, config.block_size, config.dtype, self.device)
        return State(cache, jnp.zeros((config.max_num_seqs + 1,), jnp.int32, device=self.device))

    def warmup(self, state: State, progress: Progress | None = None) -> State:
        """Compile what later steps need."""
        buckets = [self._bucket(size, False) for size in self.decode_buckets]
        buckets += [self._bucket(size, True) for size in self.token_buckets]
        # XLA holds no lock while it compiles: a second thread fills what one leaves idle between its parallel phases.
        with ThreadPoolExecutor(2) as pool:
            compiled = pool.map(lambda bucket: self._compile(bucket, state), buckets)
            for done, (bucket, step) in enumerate(zip(buckets, compiled, strict=True)):
                self._compiled[bucket, frozenset()] = step
                if progress:
                    kind = "chunks and decodes" if bucket.chunked else "decodes"
                    progress(done + 1, len(buckets), f"compiled steps of {bucket.tokens} tokens, {kind}")
        for (bucket, _), step in self._compiled.items():
            state, *_ = step(self._weights, state, np.zeros(bucket.size, np.int32))
        return state

    def run(self, state: State, batch: Batch) -> tuple[State, Callable[[], tuple[Any, ...]]]:
        """One step, and what brings its results to the host: the arguments of `interface.make_result`."""
        sizes, chunked = self._sizes(batch)
        bucket = self._bucket(next(size for size in sizes if size >= batch.num_tokens), chunked)
        state, sampled, _ = self._run(bucket, state, batch)
        return state, lambda: to_host(sampled)

    def observe(self, state: State, batch: Batch, names: Names) -> tuple[State, dict[str, Array]]:
        """One step, and what it computes on the way, padded and on the device: those of `names`, or all."""
        # Two sizes serve all steps, and every token may ask for logits.
        sizes, chunked = self._sizes(batch)
        bucket = replace(self._bucket(sizes[-1], chunked), seqs=sizes[-1])
        state, _, taps = self._run(bucket, state, batch, names)
        return state, taps

    def read_pages(self, state: State, pages_: Sequence[int]) -> dict[str, np.ndarray]:
        """Copies `k` and `v`: [L, pages, B, K, H]."""
        return pages.read_pages(state.cache, pages_)

    def write_pages(self, state: State, pages_: Sequence[int], arrays: dict[str, np.ndarray]) -> State:
        """The inverse of `read_pages`."""
        return state._replace(cache=pages.write_pages(state.cache, pages_, arrays))

    def _sizes(self, batch: Batch) -> tuple[tuple[int, ...], bool]:
        chunked = batch.num_tokens > int(batch.num_decodes[0])
        return self.token_buckets if chunked else self.decode_buckets, chunked

    def _bucket(self, tokens: int, chunked: bool) -> _Bucket:
        config = self.config
        seqs = min(tokens, max(config.max_num_seqs, 2))
        return _Bucket(tokens, seqs, -(-self._positions // config.block_size), chunked)

    def _run(self, bucket: _Bucket, state: State, batch: Batch, names: Names = frozenset()) -> Any:
        if (bucket, names) not in self._compiled:
            self._compiled[bucket, names] = self._compile(bucket, state, names)
        return self._compiled[bucket, names](self._weights, state, self._pack(bucket, batch))

    def _compile(self, bucket: _Bucket, state: State, names: Names = frozenset()) -> Any:
        step = jax.jit(lambda weights, state, packed: self._step(bucket, names, weights, state, packed), donate_argnums=1)
        return step.lower(self._weights, state, jax.ShapeDtypeStruct((bucket.size,), jnp.int32)).compile()

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

    def _step(
        self, bucket: _Bucket, names: Names, weights: tuple[Array, ...], state: State, packed: Array
    ) -> tuple[State, sampling.Sampled, dict[str, Array]]:
        """The pure function that is compiled."""
        taps, keep = keeper(names)

        def unpack(entry: tuple[int, tuple[int, ...], Any]) -> Array:
            at, shape, dtype = entry
            return lax.bitcast_convert_type(lax.slice(packed, (at,), (at + math.prod(shape),)), dtype).reshape(shape)

        x: Inputs = jax.tree.map(unpack, bucket.layout, is_leaf=lambda x: type(x) is tuple)
        model: Decoder = self._merge(weights)
        token_ids = jnp.where(x.fill_row >= 0, state.last_tokens[x.fill_row], x.token_ids)
        attend = paged_attention(self.model_config, x.plan)
        hidden_TD, cache = forward(model, token_ids, x.positions, attend, state.cache, keep)
        logits_RV = logits(model, hidden_TD[x.logit_rows])
        sampled = self._sample(logits_RV, x)
        keep(logits=logits_RV, tokens=sampled.tokens)
        return State(cache, state.last_tokens.at[x.rows].set(sampled.tokens)), sampled, taps

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
