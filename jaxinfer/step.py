"""One step in JAX's own operations: what `kernels=framework` runs.

A step is one pure function of (weights, state, inputs), compiled ahead of time for each bucket of tokens. The state (KV pages
and each row's last token) is donated, so XLA updates it in place. All inputs of a step travel as one int32 array.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from common.batch import Batch, Mask, Want, masked, without_scores
from common.config import EngineConfig, ModelConfig
from common.interface import Progress, last_residual, max_logits, page_bytes
from common.model.partition import join_heads, local_config, pool_config, split_heads, stage_layers
from common.weights.checkpoint import Checkpoint
from common.weights.shard import stage_of
from jaxinfer import cache as pages
from jaxinfer import sampling
from jaxinfer.arrays import nbytes, to_host
from jaxinfer.attention import Plan, make_plan, paged_attention, plan_shape
from jaxinfer.cache import KVCache
from jaxinfer.model import Decoder, forward, logits
from jaxinfer.observe import Keep, Names, keeper
from jaxinfer.parallel import ALONE, COLUMNS, HEADS, REPLICATED, Group, communicated_bytes
from jaxinfer.weights import load_model

MAX_EDITS = 1 << 16
"""Edits of one call; a step that has more takes several."""
_SCORES = 128
"""Tokens that one call scores, where a step scores more than it has logit rows."""
_EDIT_BLOCK = 1 << 10
"""Edits are applied so many at a time, as far as there are any."""


class State(NamedTuple):
    """What a step takes, changes and gives back."""

    cache: KVCache
    last_tokens: Array
    """int32[rows + 1]: the last token sampled for each permanent row; the spare one takes what padding writes."""
    logits: Any = None
    """float32[rows, V]: where native kernels leave a step's logits, so that no step asks the system for that much memory."""


class _Choice(NamedTuple):
    """How R logit rows become tokens."""

    rows: Any  # [R], permanent row of each that samples; the spare one takes what others write
    positions: Any  # [R], of the token to choose
    score: Any  # [R], 1 + the token to report on, or 0 for the chosen one
    seeds: Any  # [R, 2], uint32
    temperature: Any  # [R], float32
    top_k: Any  # [R]
    top_p: Any  # [R], float32
    min_p: Any  # [R], float32
    modes: Any  # [3]: any row samples, any row filters, any row wants logprobs


class _Change(NamedTuple):
    """What is done to R logit rows, at most E edits and a mask each, and how they become tokens then."""

    edit_rows: Any  # [E], R for none
    edit_ids: Any  # [E]
    edits: Any  # [E, 3], float32
    mask_rows: Any  # [R], R for none
    masks: Any  # [R, W], uint32
    counts: Any  # [2]: edits, masks
    choice: _Choice


class Inputs(NamedTuple):
    """One step's inputs, padded to T tokens and R logit rows. Also used for their shapes and dtypes."""

    token_ids: Any  # [T]
    positions: Any  # [T]
    fill_row: Any  # [T], row whose last token goes here, or -1
    logit_rows: Any  # [R]
    choice: _Choice
    plan: Plan


class Part:
    """What a step has of a model that a group shares out: the layers of a stage, and of those a rank's part."""

    config: EngineConfig
    group: Group
    max_logits: int
    """Logit rows of a step at most."""

    def take(self, checkpoint: Checkpoint, positions: int) -> Checkpoint:
        """Return the stage's part of a checkpoint, with room for `positions` rotary positions."""
        self._layers = stage_layers(checkpoint.config.num_layers, self.group.stages)[self.group.stage]
        checkpoint = stage_of(checkpoint, self.group.stage, self.group.stages)
        self.model_config: ModelConfig = checkpoint.config
        self._local = local_config(checkpoint.config, self.group.ranks)
        self._positions = positions
        # What the programs that serve give besides: it is there, so embeddings need no programs of their own.
        alone = self.group.ranks * self.group.stages == 1
        self._shown = frozenset({last_residual(checkpoint.config.num_layers)} if alone else ())
        self.max_logits = self._max_logits(checkpoint.config)
        return checkpoint

    def _max_logits(self, model: ModelConfig) -> int:
        return max_logits(model, self.config)


class Step(Part):
    """A model in the framework's operations. `load` first; then `run` takes a state and a batch, and gives the next state."""

    kernels = "framework"

    def __init__(self, config: EngineConfig, device: jax.Device, group: Group = ALONE) -> None:
        self.config, self.device, self.group = config, device, group
        self.token_buckets = _token_buckets(config.max_num_batched_tokens)
        self.decode_buckets = _decode_buckets(config.max_num_seqs)
        self._compiled: dict[tuple[_Bucket, Names], Any] = {}
        self._choosers: dict[int, Any] = {}
        self._scorer: Any = None
        self._layouts: dict[_Bucket, Any] = {}
        self._told, self._tells = 0, dict[_Bucket, int]()  # bytes of each rank to the others, so far and in one step

    def load(self, checkpoint: Checkpoint, positions: int, progress: Progress | None = None) -> None:
        """Bring the weights to the device, with room for `positions` rotary positions."""
        checkpoint = self.take(checkpoint, positions)
        graph, state = nnx.split(load_model(checkpoint, self.config.dtype, positions, self.device, progress, self.group))
        # Plain arrays in a tuple: walking NNX variables would cost milliseconds a step.
        leaves, tree = jax.tree.flatten(state)
        self.weights: Any = tuple(leaves)
        self._merge = lambda leaves: nnx.merge(graph, jax.tree.unflatten(tree, leaves))

    def model(self, weights: Any) -> Decoder:
        """The decoder of the `weights` of a loaded step, which a program takes as its argument."""
        return self._merge(weights)

    def make_state(self, num_pages: int) -> State:
        """Empty pages and rows."""
        config, place = self.config, partial(self.group._place, self.device)
        pool = pool_config(self.model_config, self.group.ranks)
        cache = pages.make_cache(pool, num_pages, config.block_size, config.dtype, place(HEADS))
        return State(cache, jnp.zeros((config.max_num_seqs + 1,), jnp.int32, device=place(REPLICATED)))

    def page_bytes(self, model: ModelConfig) -> int:
        """Bytes of one page of all ranks, over all layers of the model."""
        return page_bytes(pool_config(model, self.group.ranks), self.config)

    def held(self, state: State) -> int:
        """Bytes of one rank's weights and pages."""
        return nbytes((self.weights, state.cache))

    def warmup(self, state: State, progress: Progress | None = None) -> State:
        """Compile what later steps need."""
        buckets = [self._bucket(size, False) for size in self.decode_buckets]
        buckets += [self._bucket(size, True) for size in self.token_buckets]
        # XLA holds no lock while it compiles: a second thread fills what one leaves idle between its parallel phases.
        with ThreadPoolExecutor(2) as pool:
            compiled = pool.map(lambda bucket: self._compile(bucket, state, self._shown), buckets)
            scorer = pool.submit(self._compile_scorer) if self.max_logits > self.config.max_num_seqs else None
            choosers = pool.map(self._chooser, {bucket.seqs for bucket in buckets if self._local.predicts})
            for done, (bucket, step) in enumerate(zip(buckets, compiled, strict=True)):
                self._compiled[bucket, self._shown] = step
                if progress:
                    kind = "chunks and decodes" if bucket.chunked else "decodes"
                    progress(done + 1, len(buckets), f"compiled steps of {bucket.tokens} tokens, {kind}")
            deque(choosers, 0)
            self._scorer = scorer and scorer.result()
        for (bucket, _), step in self._compiled.items():
            before = [jnp.zeros(x.shape, x.dtype, device=x.sharding) for x in self._before(bucket)]
            state, *_ = step(self.weights, state, np.zeros(_size(self._layout(bucket)), np.int32), *before)
        return self._warm_pages(state)

    def _warm_pages(self, state: State) -> State:
        """Compile what reads and writes pages."""
        return self.write_pages(state, [0], self.read_pages(state, [0]))

    def run(self, state: State, batch: Batch, mask: Mask = None) -> tuple[State, Callable[[], tuple[Any, ...]]]:
        """One step, and what brings its results to the host: the arguments of `interface.make_result`."""
        return self._advance(state, batch, mask)

    def observe(self, state: State, batch: Batch, names: Names) -> tuple[State, dict[str, Array]]:
        """One step, and what it computes on the way, padded and on the device: those of `names`, or all."""
        sizes, chunked = self._sizes(batch)
        if len(batch.logit_rows):  # two sizes serve all such steps, and every token may ask for logits
            bucket = replace(self._bucket(sizes[-1], chunked), seqs=sizes[-1])
        else:
            bucket = self._bucket(next(size for size in sizes if size >= batch.num_tokens), chunked)
        state, _, taps = self._run(bucket, state, batch, names)
        return state, taps

    def read_pages(self, state: State, pages_: Sequence[int]) -> dict[str, np.ndarray]:
        """Copies `k` and `v`: [L, pages, B, K, H]."""
        read = pages.read_pages(state.cache, pages_)
        return {name: join_heads(x, self.model_config, self.group.ranks) for name, x in read.items()}

    def write_pages(self, state: State, pages_: Sequence[int], arrays: dict[str, np.ndarray]) -> State:
        """The inverse of `read_pages`."""
        arrays = {name: split_heads(x, self.model_config, self.group.ranks) for name, x in arrays.items()}
        return state._replace(cache=pages.write_pages(state.cache, pages_, arrays))

    def _max_logits(self, model: ModelConfig) -> int:
        return max_logits(model, self.config) if self._shown else self.config.max_num_seqs

    def _advance(self, state: State, batch: Batch, mask: Mask, *before: Array) -> tuple[State, Any]:
        """Do what `run` does for one stage of several.

        A stage that is not the last returns its residual stream. One that is not the first takes the stream of the stage
        before.
        """
        sizes, chunked = self._sizes(batch)
        bucket = self._bucket(next(size for size in sizes if size >= batch.num_tokens), chunked)
        if len(batch.logit_rows) > bucket.seqs:
            return self._score(bucket, state, batch, mask)
        state, out, _ = self._run(bucket, state, batch, self._shown, mask, before)
        return state, (lambda: to_host(out)) if self._local.predicts else out

    def _score(self, bucket: _Bucket, state: State, batch: Batch, mask: Mask) -> tuple[State, Any]:
        """Do what `_advance` does, where a step scores more tokens than the program of its bucket has logit rows.

        Another program computes those logits, `_SCORES` rows at a time, from the residual stream behind the last layer.
        """
        state, out, taps = self._run(bucket, state, without_scores(batch), self._shown, mask)
        (states_TD,) = taps.values()
        scored = (batch.want & Want.SAMPLE) == 0

        def fetch() -> tuple[Any, ...]:
            sampled, states = to_host((out, states_TD))
            rows, ids = batch.logit_rows[scored], batch.score_ids[scored]  # type: ignore[index]
            parts = [
                self._scores(states[rows[at : at + _SCORES]], ids[at : at + _SCORES]) for at in range(0, len(rows), _SCORES)
            ]
            merged = []
            for mine, *others in zip(sampled, *parts, strict=True):
                x = np.empty((len(scored), *mine.shape[1:]), mine.dtype)
                x[~scored], x[scored] = mine[: len(scored) - len(rows)], np.concatenate(others)
                merged.append(x)
            return tuple(merged)

        return state, fetch

    def _scores(self, states: np.ndarray, ids: np.ndarray) -> sampling.Sampled:
        """What is reported on at most `_SCORES` tokens, whose residual streams are given, on the host."""
        count = len(ids)
        padded = np.zeros((_SCORES, states.shape[1]), states.dtype)
        padded[:count] = states
        if self._scorer is None:
            self._scorer = self._compile_scorer()
        found = self._scorer(self.weights, padded, np.pad(ids, (0, _SCORES - count)))
        return sampling.Sampled(*(x[:count] for x in to_host(found)))

    def _compile_scorer(self) -> Any:
        """The program of `_scores`."""

        def score(weights: Any, states_RD: Array, ids: Array) -> sampling.Sampled:
            model: Decoder = self.model(weights)
            logits_RV = logits(model, model.norm(states_RD))
            finite = jnp.isfinite(logits_RV.sum(axis=-1))
            return sampling.Sampled(ids, finite, *sampling.logprobs_of(logits_RV, ids))

        states = jax.ShapeDtypeStruct((_SCORES, self.model_config.hidden_size), self._stream_dtype)
        ids = jax.ShapeDtypeStruct((_SCORES,), jnp.int32)
        return jax.jit(score).lower(self.weights, states, ids).compile()

    def _copy_pages(self, state: State, pairs: np.ndarray) -> State:
        return state._replace(cache=pages.copy_all_pages(state.cache, pairs))

    def _sizes(self, batch: Batch) -> tuple[tuple[int, ...], bool]:
        chunked = batch.num_tokens > int(batch.num_decodes[0])
        return self.token_buckets if chunked else self.decode_buckets, chunked

    def _bucket(self, tokens: int, chunked: bool) -> _Bucket:
        config = self.config
        seqs = min(tokens, max(config.max_num_seqs, 2))
        return _Bucket(tokens, seqs, -(-self._positions // config.block_size), chunked)

    def _run(
        self,
        bucket: _Bucket,
        state: State,
        batch: Batch,
        names: Names,
        mask: Mask = None,
        before: Sequence[Array] = (),
    ) -> Any:
        if (bucket, names) not in self._compiled:
            self._compiled[bucket, names] = self._compile(bucket, state, names)
        packed = _pack(self._layout(bucket), self._inputs(bucket, batch))
        state, out, taps, logits_RV = self._compiled[bucket, names](self.weights, state, packed, *before)
        self._told += self._tells[bucket]
        if batch.adjusts and self._local.predicts:
            state, out = self._choose_changed(state, masked(batch, mask), logits_RV)
            taps |= {"tokens": out.tokens} if "tokens" in taps else {}
        return state, out, taps

    def _choose_changed(self, state: State, batch: Batch, logits_RV: Array) -> tuple[State, sampling.Sampled]:
        """Choose the step's tokens anew, from changed logits: so a step that changes none stays one program."""
        R, changed_RV, last_tokens = logits_RV.shape[0], logits_RV, state.last_tokens
        choose, layout = self._chooser(R)
        choice = self._choice(batch, R)
        count = 0 if batch.edit_rows is None else len(batch.edit_rows)
        for at in range(0, max(count, 1), MAX_EDITS):
            packed = _pack(layout, _change(batch, R, at, choice))
            last_tokens, changed_RV, sampled = choose(last_tokens, logits_RV, changed_RV, packed)
        return state._replace(last_tokens=last_tokens), sampled

    def _chooser(self, R: int) -> tuple[Any, Any]:
        """The program that changes R rows of logits and chooses from them, and the layout of its inputs."""
        if R not in self._choosers:
            layout = _layout(_change_shape(R, self.model_config.vocab_size))
            shapes = (self.config.max_num_seqs + 1,), *[(R, self._local.vocab_size * self.group.ranks)] * 2, (_size(layout),)
            specs = REPLICATED, COLUMNS, COLUMNS, REPLICATED
            choose = self.group._spread(
                lambda *args: self._choose_from(layout, *args), specs, (REPLICATED, COLUMNS, REPLICATED)
            )
            arguments = [
                jax.ShapeDtypeStruct(shape, dtype, sharding=self.group._place(self.device, spec))
                for shape, dtype, spec in zip(shapes, (jnp.int32, jnp.float32, jnp.float32, jnp.int32), specs, strict=True)
            ]
            self._choosers[R] = jax.jit(choose, donate_argnums=0).lower(*arguments).compile(), layout
        return self._choosers[R]

    def _choose_from(
        self, layout: Any, last_tokens: Array, logits_RV: Array, changed_RV: Array, packed: Array
    ) -> tuple[Array, Array, sampling.Sampled]:
        """The pure function that is compiled: the last tokens, the logits changed further, and what is chosen from them."""
        change: _Change = _unpack(layout, packed)
        changed_RV = lax.cond(
            change.counts[1] > 0,
            lambda: sampling.mask(changed_RV, change.mask_rows, change.masks, self.group),
            lambda: changed_RV,
        )

        def edit(i: Array, x_RV: Array) -> Array:
            block = lambda array: lax.dynamic_slice_in_dim(array, i * _EDIT_BLOCK, _EDIT_BLOCK)  # noqa: E731
            return sampling.edit(x_RV, block(change.edit_rows), block(change.edit_ids), block(change.edits), self.group)

        changed_RV = lax.fori_loop(0, -(-change.counts[0] // _EDIT_BLOCK), edit, changed_RV)
        sampled = self._choose(logits_RV, changed_RV, change.choice)
        return last_tokens.at[change.choice.rows].set(sampled.tokens), changed_RV, sampled

    def _compile(self, bucket: _Bucket, state: State, names: Names) -> Any:
        before = self._before(bucket)
        takes, gives = (self.weights, state, REPLICATED, *[REPLICATED] * len(before)), (state, REPLICATED, REPLICATED, COLUMNS)
        step = self.group._spread(lambda *args: self._step(bucket, names, *args), takes, gives)
        packed = jax.ShapeDtypeStruct((_size(self._layout(bucket)),), jnp.int32)
        program = jax.jit(step, donate_argnums=1).lower(self.weights, state, packed, *before).compile()
        told = communicated_bytes(program.as_text() or "") if self.group.ranks > 1 else 0
        self._tells[bucket] = told + sum(x.size * x.dtype.itemsize for x in before)
        return program

    def _before(self, bucket: _Bucket) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What a stage that is not the first takes of the one before it: the residual stream [T, D]."""
        if self._local.embeds:
            return ()
        shape, place = (bucket.tokens, self._local.hidden_size), self.group._place(self.device, REPLICATED)
        return (jax.ShapeDtypeStruct(shape, self._stream_dtype, sharding=place),)

    @property
    def _stream_dtype(self) -> Any:
        return jnp.dtype(self.config.dtype)

    def _layout(self, bucket: _Bucket) -> Any:
        """Of a bucket's inputs in the one array that they are packed into."""
        if bucket not in self._layouts:
            self._layouts[bucket] = _layout(self._shapes(bucket))
        return self._layouts[bucket]

    def _shapes(self, bucket: _Bucket) -> Any:
        """A tree of the shapes of a bucket's inputs."""
        T, plan = (bucket.tokens,), plan_shape(bucket.tokens, bucket.seqs, bucket.pages, bucket.chunked)
        return Inputs(T, T, T, (bucket.seqs,), choice_shape(bucket.seqs), plan)

    def _inputs(self, bucket: _Bucket, batch: Batch) -> Any:
        """A batch as a tree of arrays, each of which is at most as large."""
        fill_row = np.full(bucket.tokens, -1, np.int32)
        fill_row[batch.fill_at] = batch.fill_row
        plan = make_plan(batch, self.model_config, self.config.block_size)
        choice = self._first_choice(batch, bucket.seqs)
        return Inputs(batch.token_ids, batch.positions, fill_row, batch.logit_rows, choice, plan)

    def _first_choice(self, batch: Batch, R: int) -> _Choice:
        choice = self._choice(batch, R)
        return choice._replace(modes=None) if batch.adjusts else choice  # what it chooses is chosen anew

    def _choice(self, batch: Batch, R: int) -> _Choice:
        owner = batch.logit_owner
        rows = np.full(R, self.config.max_num_seqs, np.int32)
        rows[: len(owner)] = np.where(batch.want & Want.SAMPLE, batch.rows[owner], rows[0])
        by_owner = lambda array: None if array is None else array[owner]  # noqa: E731
        return _Choice(
            rows,
            batch.positions[batch.logit_rows] + 1,
            None if batch.score_ids is None else batch.score_ids + 1,
            by_owner(batch.seeds),
            by_owner(batch.temperature),
            by_owner(batch.top_k),
            by_owner(batch.top_p),
            by_owner(batch.min_p),
            np.array([batch.seeds is not None, batch.top_k is not None, batch.num_top is not None], np.int32),
        )

    def _step(
        self, bucket: _Bucket, names: Names, weights: Any, state: State, packed: Array, *before: Array
    ) -> tuple[State, Any, dict[str, Array], Array | None]:
        """The pure function that is compiled: its last result are the logits, for a step that changes them. A stage that is not
        the last gives its residual stream in place of what is sampled."""
        taps, keep = keeper(names)
        x = _unpack(self._layout(bucket), packed)
        cache, logits_RV = self._logits(bucket, weights, state, x, keep, *before)
        if not self._local.predicts:
            return State(cache, state.last_tokens), logits_RV, taps, None
        sampled = self._choose(logits_RV, logits_RV, x.choice)
        keep(logits=logits_RV, tokens=sampled.tokens)
        return State(cache, state.last_tokens.at[x.choice.rows].set(sampled.tokens)), sampled, taps, logits_RV

    def _logits(self, bucket: _Bucket, weights: Any, state: State, x: Any, keep: Keep, *before: Array) -> tuple[KVCache, Array]:
        """Return the new pages, and the logits of this rank's tokens for each row.

        A stage that is not the last returns its residual stream.
        """
        model: Decoder = self.model(weights)
        token_ids = jnp.where(x.fill_row >= 0, state.last_tokens[x.fill_row], x.token_ids)
        attend = paged_attention(self._local, x.plan)
        hidden_TD, cache = forward(model, before[0] if before else token_ids, x.positions, attend, state.cache, keep)
        return cache, logits(model, hidden_TD[x.logit_rows]) if self._local.predicts else hidden_TD

    def _choose(self, logits_RV: Array, changed_RV: Array, x: _Choice) -> sampling.Sampled:
        """Tokens from `changed_RV`, and what is reported of them from `logits_RV`."""
        group, V = self.group, self.model_config.vocab_size
        finite = jnp.isfinite(group.fold(jnp.sum, logits_RV.sum(axis=-1)))
        logits_RV, changed_RV = group.real(logits_RV, V), group.real(changed_RV, V)
        sampled, filtered, logprobs = x.modes[0] > 0, x.modes[1] > 0, x.modes[2] > 0
        u = sampling.uniform(x.seeds, x.positions)
        tokens = lax.cond(
            sampled,
            lambda: sampling.sample(changed_RV, x.temperature, x.top_k, x.top_p, x.min_p, u, filtered, group),
            lambda: sampling.greedy(changed_RV, group),
        )
        reported = jnp.where(x.score > 0, x.score - 1, tokens)
        report = partial(sampling.logprobs_of, logits_RV, reported, group)
        extra = lax.cond(
            logprobs,
            report,
            lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(report)),
        )
        return sampling.Sampled(tokens, finite, *extra)


def _change(batch: Batch, R: int, at: int, choice: _Choice) -> _Change:
    """The edits of a batch from place `at` on, as many as one call takes; with the first come all masks."""
    rows, mask_rows = np.full(MAX_EDITS, R, np.int32), np.full(R, R, np.int32)
    part = lambda array: None if array is None else array[at : at + MAX_EDITS]  # noqa: E731
    edit_rows, masked = part(batch.edit_rows), batch.mask_rows if at == 0 else None
    counts = [0 if array is None else len(array) for array in (edit_rows, masked)]
    rows[: counts[0]] = () if edit_rows is None else edit_rows
    mask_rows[: counts[1]] = () if masked is None else masked
    masks = batch.masks if counts[1] else None
    return _Change(rows, part(batch.edit_ids), part(batch.edits), mask_rows, masks, np.array(counts, np.int32), choice)


def choice_shape(R: int) -> _Choice:
    return _Choice((R,), (R,), (R,), (R, 2), (R,), (R,), (R,), (R,), (3,))


def _change_shape(R: int, V: int) -> _Change:
    return _Change((MAX_EDITS,), (MAX_EDITS,), (MAX_EDITS, 3), (R,), (R, -(-V // 32)), (2,), choice_shape(R))


@dataclass(frozen=True)
class _Bucket:
    """The padded sizes of one compiled step. Without chunks every sequence has one token, and half the program falls away."""

    tokens: int
    seqs: int
    pages: int
    chunked: bool


_DTYPES = {"seeds": np.uint32, "masks": np.uint32} | dict.fromkeys(("temperature", "top_p", "min_p", "edits"), np.float32)


def _is_leaf(x: Any) -> bool:
    return x is None or type(x) is tuple


def _layout(shapes: Any) -> Any:
    """(offset, shape, dtype) of each array of a tree of shapes, in one array of 32-bit words."""
    flat, tree = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=_is_leaf)
    starts = np.cumsum([0, *(math.prod(shape) for _, shape in flat)])
    entries = [
        (int(at), shape, _DTYPES.get(path[-1].name, np.int32)) for at, (path, shape) in zip(starts[:-1], flat, strict=True)
    ]
    return jax.tree.unflatten(tree, entries)


def _size(layout: Any) -> int:
    *_, (at, shape, _) = jax.tree.leaves(layout, is_leaf=_is_leaf)
    return at + math.prod(shape)


def _pack(layout: Any, values: Any) -> np.ndarray:
    """int32[n]: a tree of arrays in their places; what is None or smaller than its place is zero there."""
    packed = np.zeros(_size(layout), np.int32)
    entries, arrays = (jax.tree.leaves(tree, is_leaf=_is_leaf) for tree in (layout, values))
    for (at, shape, dtype), value in zip(entries, arrays, strict=True):
        if value is not None:
            view = packed[at : at + math.prod(shape)].view(dtype).reshape(shape)
            view[tuple(slice(size) for size in value.shape)] = value
    return packed


def _unpack(layout: Any, packed: Array) -> Any:
    """The inverse of `_pack`, inside a compiled function."""

    def array(entry: tuple[int, tuple[int, ...], Any]) -> Array:
        at, shape, dtype = entry
        return lax.bitcast_convert_type(lax.slice(packed, (at,), (at + math.prod(shape),)), dtype).reshape(shape)

    return jax.tree.map(array, layout, is_leaf=_is_leaf)


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
