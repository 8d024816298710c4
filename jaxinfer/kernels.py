"""Native kernels as XLA custom calls, and the step that is made of them: what `kernels=native` runs.

Handlers are in C++ (`common/kernels/cpu/jax.cc`) and run inside the compiled step. An array that a handler changes in place is
an argument aliased to a result, down to the donated pages. Between handlers XLA computes nothing. The kernels take the real
sizes from the packed step, so padding costs only untouched memory. Two programs serve steps of every size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.batch import Batch, Mask, masked
from common.config import EngineConfig, ModelConfig
from common.interface import Progress
from common.kernels.cpu import usable as cpu
from common.kernels.cpu.build import build
from common.kernels.cpu.pack import pack_head, pack_layers
from common.kernels.cpu.pages import keys_in, keys_out, page_bytes, pool_shapes, values_in, values_out
from common.kernels.cpu.step import HEADER, SAMPLED, max_step_size, pack_changes, pack_step, unpack_sampled, without_modes
from common.model.partition import join_heads, local_config, split_heads
from common.model.rope import rope_tables
from common.system.hardware import cores
from common.weights.checkpoint import Checkpoint
from jaxinfer.arrays import gather_to_host, nbytes
from jaxinfer.cache import KVCache, copy_all_pages
from jaxinfer.observe import Keep, Names, ignore, keeper
from jaxinfer.parallel import ALONE, REPLICATED, Group
from jaxinfer.step import MAX_EDITS, Part, State, choice_shape
from jaxinfer.step import Step as FrameworkStep

_PAGES = 16
"""Pages that one call writes."""
_OPERATORS = (
    *("embed", "layers", "project", "attend", "combine", "head", "adjust", "sample"),
    *("attention_term", "add_attention", "mlp_term", "add_mlp"),
)


class Weights(NamedTuple):
    """The model, packed for the kernels."""

    layers: Array
    """uint8[L, n]: of each a header, norms, biases and matrices."""
    head: Array
    """uint8[n]: embedding, final norm, LM head."""
    ropes: Array
    """float32[tables, positions, H]: cos, then sin."""


@cache
def built_library() -> Path:
    """Compile the operators if needed, and return their path. Its name identifies the sources. Raises `BackendError`."""
    return build("jax", (jax.ffi.include_dir(),), (), (), jax.__version__)


@cache
def open_library() -> ctypes.CDLL:
    """Compile and load the operators. Raises `BackendError` if that fails."""
    library = ctypes.CDLL(str(built_library()))
    for name in _OPERATORS:
        handler = jax.ffi.pycapsule(getattr(library, f"tandem_{name}"))
        jax.ffi.register_ffi_target(f"tandem_{name}", handler, platform="cpu")
    return library


def unusable(config: EngineConfig, model: ModelConfig, device: jax.Device) -> str | None:
    """Why `kernels` does not mean native here, or None. Raises `ConfigError` or `BackendError` if it must and cannot."""
    return cpu.unusable(config, model, device.platform, open_library)


def load_weights(
    checkpoint: Checkpoint, dtype: Any, positions: int, progress: Progress | None = None, group: Group = ALONE
) -> Weights:
    """Pack a checkpoint, one layer at a time. In a `group` it is each rank's part, side by side along the first axis, as far as
    this process drives them."""
    config, ranks, here = checkpoint.config, group.ranks, group._here
    total = len(here) * config.num_layers + 1
    done = lambda count: progress and progress(count, total, "weights")  # noqa: E731
    layers, head = [], []
    for at, rank in enumerate(here):
        done_here = partial(lambda before, count: done(before + count), at * config.num_layers)
        layers.append(pack_layers(checkpoint, dtype, done_here, rank, ranks))
        head.append(pack_head(checkpoint, dtype, rank, ranks))
    ropes = np.stack([np.concatenate(rope_tables(rope, config.head_dim, positions), 1) for rope in config.ropes])
    done(total)
    return Weights(_put(layers, 0, group), _put(head, 0, group), _put([ropes] * len(here), None, group))


def make_cache(config: ModelConfig, pages: int, page_size: int, dtype: str) -> KVCache:
    """Make zeroed pools in the layout of the kernels, one array for all layers.

    Keys are [L K, pages, H / PAIR, B, PAIR], values [L K, pages, B / PAIR, H', PAIR].
    """
    return _make_cache(config, pages, page_size, dtype, ALONE)


def embed(config: ModelConfig, weights: Weights, step: Array, last_tokens: Array, tokens: int) -> Array:
    """float32[T, D]: the residual stream before the first layer, of a packed step of `tokens` tokens."""
    return _call("embed", _shape((tokens, config.hidden_size)), step, weights.head, last_tokens)


def layers(weights: Weights, step: Array, cache: KVCache, x_TD: Array) -> tuple[KVCache, Array]:
    """All layers in one operator: the pages and the residual stream as they are afterwards."""
    (k,), (v,) = cache
    k, v, x_TD = _call("layers", (k, v, x_TD), step, weights.layers, weights.ropes, k, v, x_TD, aliases={3: 0, 4: 1, 5: 2})
    return KVCache((k,), (v,)), x_TD


def project(
    config: ModelConfig, weights: Weights, layer: int, step: Array, cache: KVCache, x_TD: Array
) -> tuple[KVCache, Array]:
    """A layer's pages with the keys and values of these tokens, and their queries [T, N, H]."""
    (k,), (v,) = cache
    q = _shape((x_TD.shape[0], config.num_heads, config.head_dim), jnp.bfloat16 if k.dtype == jnp.uint16 else k.dtype)
    arguments = (step, weights.layers, weights.ropes, x_TD, k, v)
    q_TNH, k, v = _call("project", (q, k, v), *arguments, aliases={4: 1, 5: 2}, layer=layer)
    return KVCache((k,), (v,)), q_TNH


def attend(weights: Weights, layer: int, step: Array, cache: KVCache, q_TNH: Array) -> Array:
    """What the queries see in a layer's pages: [T, N, H], in their place."""
    (k,), (v,) = cache
    return _call("attend", q_TNH, step, weights.layers, k, v, q_TNH, aliases={4: 0}, layer=layer)


def combine(weights: Weights, layer: int, step: Array, out_TNH: Array, x_TD: Array) -> Array:
    """The residual stream after a layer, of what it attended to and of the stream before, in whose place it is."""
    return _call("combine", x_TD, step, weights.layers, out_TNH, x_TD, aliases={3: 0}, layer=layer)


def layers_in_parts(
    config: ModelConfig, weights: Weights, step: Array, cache: KVCache, x_TD: Array, keep: Keep = ignore
) -> tuple[KVCache, Array]:
    """Compute the same bits as `layers`, in three operators per layer.

    Use it to change or to observe what lies between the operators. Later operators may overwrite what `keep` receives.
    """
    for layer in range(config.num_layers):
        cache, q_TNH = project(config, weights, layer, step, cache, x_TD)
        keep(layer, q=q_TNH)
        out_TNH = attend(weights, layer, step, cache, q_TNH)
        keep(layer, attention=out_TNH)
        x_TD = combine(weights, layer, step, out_TNH, x_TD)
        keep(layer, residual=x_TD)
    return cache, x_TD


def layers_in_terms(
    config: ModelConfig, weights: Weights, step: Array, cache: KVCache, x_TD: Array, group: Group
) -> tuple[KVCache, Array]:
    """Do what `layers` does, where the ranks of a `group` share each layer.

    The outputs of attention and of the MLP are sums of the terms of all ranks. Each complete sum is added to the stream.
    """
    (k,), (v,) = cache
    for layer in range(config.num_layers):
        arguments = (step, weights.layers, weights.ropes, x_TD, k, v)
        term_TD, k, v = _call("attention_term", (x_TD, k, v), *arguments, aliases={4: 1, 5: 2}, layer=layer)
        x_TD = _add("add_attention", weights, step, group.all_reduce(term_TD), x_TD, layer)
        term_TD = _call("mlp_term", x_TD, step, weights.layers, x_TD, layer=layer)
        x_TD = _add("add_mlp", weights, step, group.all_reduce(term_TD), x_TD, layer)
    return KVCache((k,), (v,)), x_TD


def head(weights: Weights, step: Array, x_TD: Array, logits_RV: Array) -> Array:
    """Logits of the residual stream after the last layer, in the place of `logits_RV`, which may have more rows."""
    return _call("head", logits_RV, step, weights.head, x_TD, logits_RV, aliases={3: 0})


def forward(
    config: ModelConfig,
    weights: Weights,
    state: State,
    step: Array,
    tokens: int,
    keep: Keep | None = None,
    before_TD: Array | None = None,
) -> tuple[State, Array]:
    """Run a packed step of `tokens` tokens: return the new state, and the residual stream behind the layers.

    The state has the tokens' keys and values in its pages and the requested rows in `logits`. Only the last stage has logits.
    Every stage but the first takes the stream `before_TD`. With `keep` the step goes layer by layer, in parts.
    """
    x_TD = embed(config, weights, step, state.last_tokens, tokens) if before_TD is None else before_TD
    if keep is None:
        cache, x_TD = layers(weights, step, state.cache, x_TD)
    else:
        keep(embedding=x_TD)
        cache, x_TD = layers_in_parts(config, weights, step, state.cache, x_TD, keep)
    state = state._replace(cache=cache)
    if config.predicts:
        state = state._replace(logits=head(weights, step, x_TD, state.logits))
        if keep is not None:
            keep(logits=state.logits)
    return state, x_TD


def adjust(step: Array, changes: Array, logits_RV: Array) -> Array:
    """Logits float32[R, V] with packed changes: masks, then edits."""
    return _call("adjust", logits_RV, step, changes, logits_RV)


def sample(state: State, step: Array, changed_RV: Array | None = None) -> tuple[Array, State]:
    """int32[R, SAMPLED]: tokens, from changed logits if there are any, and what was asked about them, from the state's; it
    remembers each row's token."""
    logits_RV = state.logits
    changed_RV = logits_RV if changed_RV is None else changed_RV
    results = (_shape((logits_RV.shape[0], SAMPLED), jnp.int32), state.last_tokens)
    sampled, last_tokens = _call("sample", results, step, logits_RV, changed_RV, state.last_tokens, aliases={3: 1})
    return sampled, state._replace(last_tokens=last_tokens)


class Native(Part):
    """What the steps below have in common: weights that are packed for the kernels, and pages as those keep them."""

    kernels = "native"
    config: EngineConfig

    def load(self, checkpoint: Checkpoint, positions: int, progress: Progress | None = None) -> None:
        """Pack the weights, with room for `positions` rotary positions."""
        checkpoint = self.take(checkpoint, positions)
        self.weights = load_weights(checkpoint, self.config.dtype, positions, progress, self.group)

    def page_bytes(self, model: ModelConfig) -> int:
        """Bytes of one page of all ranks, over all layers of the model."""
        return self.group.ranks * page_bytes(local_config(model, self.group.ranks), self.config)

    def read_pages(self, state: State, pages_: Sequence[int]) -> dict[str, np.ndarray]:
        """Copies `k` and `v`: [L, pages, B, K, H]."""
        (k,), (v,) = state.cache
        K, H = self._local.num_kv_heads, self._local.head_dim
        every = lambda pool: map(_typed, _take_pages(pool, np.array(pages_, np.int32), self.group.ranks))  # noqa: E731
        whole = {"k": [keys_out(pool, K) for pool in every(k)], "v": [values_out(pool, K, H) for pool in every(v)]}
        return {name: join_heads(np.concatenate(x, 3), self.model_config, self.group.ranks) for name, x in whole.items()}

    def write_pages(self, state: State, pages_: Sequence[int], arrays: dict[str, np.ndarray]) -> State:
        """The inverse of `read_pages`."""
        (k,), (v,) = state.cache
        parts = lambda x: np.split(split_heads(x, self.model_config, self.group.ranks), self.group.ranks, 3)  # noqa: E731
        every = lambda pack, x, pool: np.concatenate([pack(part, pool.shape[-1]) for part in parts(x)])  # noqa: E731
        put = lambda pool, x: _put_pages(pool, np.array(pages_, np.int32), x.view(pool.dtype))  # noqa: E731
        k, v = put(k, every(keys_in, arrays["k"], k)), put(v, every(values_in, arrays["v"], v))
        return state._replace(cache=KVCache((k,), (v,)))


class Step(Native):
    """A model in native operators. `load` first; then `run` takes a state and a batch, and gives the next state."""

    token_buckets: tuple[int, ...] = ()
    decode_buckets: tuple[int, ...] = ()

    def __init__(self, config: EngineConfig, device: jax.Device, group: Group = ALONE) -> None:
        self.config, self.device, self.group = config, device, group
        self._told = 0  # bytes of the stage before to this
        self._sizes = sorted({config.max_num_seqs, config.max_num_batched_tokens})
        self._compiled: dict[tuple[int, int, Names], Any] = {}
        self._choosers: dict[int, Any] = {}
        self._threads = config.threads or cores()
        open_library().tandem_threads(self._threads)

    def make_state(self, num_pages: int) -> State:
        """Empty pages and rows."""
        config, (device,) = self.config, self.group._devices(self.device)
        cache = _make_cache(self.model_config, num_pages, config.block_size, config.dtype, self.group)
        shape = self.max_logits, self.model_config.vocab_size
        logits_RV = _zeros(shape, jnp.float32, device) if self.model_config.predicts else None
        return State(cache, jnp.zeros((config.max_num_seqs,), jnp.int32, device=device), logits_RV)

    def held(self, state: State) -> int:
        """Bytes of one rank's weights and pages."""
        return nbytes((self.weights, state.cache))

    def warmup(self, state: State, progress: Progress | None = None) -> State:
        """Compile what later steps need."""
        for done, tokens in enumerate(self._sizes):
            # No tokens: the program runs through its operators and changes nothing.
            state, *_ = self._run(tokens, state, None, self._shown, before=self._before(tokens))
            if progress:
                progress(done + 1, len(self._sizes), f"compiled steps of up to {tokens} tokens")
        return self.write_pages(state, [0], _null_page(self.model_config, self.config))

    def run(self, state: State, batch: Batch, mask: Mask = None) -> tuple[State, Callable[[], tuple[Any, ...]]]:
        """One step, and what brings its results to the host: the arguments of `interface.make_result`."""
        return self._advance(state, batch, mask)

    def observe(self, state: State, batch: Batch, names: Names) -> tuple[State, dict[str, Array]]:
        """One step, and what it computes on the way, padded and on the device: those of `names`, or all."""
        tokens = self._tokens(batch)
        if not len(batch.logit_rows):
            state, _, taps = self._run(tokens, state, batch, names)
            return state, taps
        shape = tokens, self.model_config.vocab_size  # every token may ask for logits
        wide = state._replace(logits=jnp.zeros(shape, jnp.float32, device=self.device))
        wide, _, taps = self._run(tokens, wide, batch, names)
        return wide._replace(logits=state.logits), taps

    def _advance(self, state: State, batch: Batch, mask: Mask, *before: Array) -> tuple[State, Any]:
        """Do what `run` does for one stage of several.

        A stage that is not the last returns its residual stream. One that is not the first takes the stream of the stage
        before.
        """
        state, out, _ = self._run(self._tokens(batch), state, batch, self._shown, mask, before)
        self._told += sum(x.nbytes for x in before)
        if not self.model_config.predicts:
            return state, out
        return state, lambda: unpack_sampled(np.asarray(out)[: len(batch.logit_rows)], batch)

    def _before(self, tokens: int) -> tuple[Array, ...]:
        """What a stage that is not the first takes of the one before it, of zeros."""
        (device,), shape = self.group._devices(self.device), (tokens, self.model_config.hidden_size)
        return () if self.model_config.embeds else (jnp.zeros(shape, jnp.float32, device=device),)

    def _copy_pages(self, state: State, pairs: np.ndarray) -> State:
        return state._replace(cache=copy_all_pages(state.cache, pairs))

    def _tokens(self, batch: Batch) -> int:
        return next(size for size in self._sizes if size >= batch.num_tokens)

    def _run(
        self,
        tokens: int,
        state: State,
        batch: Batch | None,
        names: Names,
        mask: Mask = None,
        before: Sequence[Array] = (),
    ) -> Any:
        """A step in `tokens` as they are compiled, and in the rows of the state's logits; without a batch one that has none."""
        rows = self.max_logits if state.logits is None else len(state.logits)
        program = tokens, rows, names
        open_library().tandem_threads(self._threads)  # another engine of this process may have another number
        pages = -(-self._positions // self.config.block_size)
        size = max_step_size(self.config.max_num_batched_tokens, self.config.max_num_seqs, pages, rows)
        step = np.zeros(size, np.int32) if batch is None else _filled(size, pack_step(batch))
        first = without_modes(step) if batch is not None and batch.adjusts else step  # what it chooses is chosen anew
        if program not in self._compiled:
            run = jax.jit(partial(self._step, tokens, names), donate_argnums=1)
            self._compiled[program] = run.lower(self.weights, state, step, *before).compile()
        state, out, taps = self._compiled[program](self.weights, state, first, *before)
        if (batch is None or batch.adjusts) and self.model_config.predicts:
            state, out = self._choose_changed(state, batch and masked(batch, mask), step)
            taps |= {"tokens": out[:, 0]} if "tokens" in taps else {}
        return state, out, taps

    def _choose_changed(self, state: State, batch: Batch | None, step: np.ndarray) -> tuple[State, Array]:
        """Choose the step's tokens anew, from changed logits: so a step that changes none stays one program."""
        logits_RV = state.logits
        rows, vocab = logits_RV.shape
        size = HEADER + 5 * MAX_EDITS + min(rows, self.config.max_num_seqs) * (1 + -(-vocab // 32))  # only samples have masks
        if rows not in self._choosers:
            words = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (len(step), size))
            held = state.last_tokens, logits_RV
            last, logits = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in held)
            run = jax.jit(_choose, donate_argnums=0)
            self._choosers[rows] = run.lower(last, *words, logits, logits).compile()
        changed_RV, last_tokens = logits_RV, state.last_tokens
        count = 0 if batch is None or batch.edit_rows is None else len(batch.edit_rows)
        for at in range(0, max(count, 1), MAX_EDITS):
            changes = np.zeros(size, np.int32) if batch is None else _filled(size, pack_changes(batch, at, MAX_EDITS))
            last_tokens, changed_RV, sampled = self._choosers[rows](last_tokens, step, changes, logits_RV, changed_RV)
        return state._replace(last_tokens=last_tokens), sampled

    def _step(
        self, tokens: int, names: Names, weights: Weights, state: State, step: Array, *before: Array
    ) -> tuple[State, Array, dict[str, Array]]:
        """The pure function that is compiled."""
        taps, keep = keeper(names)
        whole = names == self._shown
        state, x_TD = forward(self.model_config, weights, state, step, tokens, None if whole else keep, *before)
        if whole:
            keep(self.model_config.num_layers - 1, residual=x_TD)
        if not self.model_config.predicts:
            return state, x_TD, taps
        sampled, state = sample(state, step)
        keep(tokens=sampled[:, 0])
        return state, sampled, taps


class _Packed(NamedTuple):
    """A step's inputs where ranks choose together. Also used for their shapes."""

    step: Any  # [n], as the kernels read it
    choice: Any  # of R logit rows


class SharedStep(Native, FrameworkStep):
    """As `Step`, of a model that the ranks of a group share out. Between the operators they add up their terms. Each has the
    logits of its tokens, from which they choose together in the framework's operations."""

    def __init__(self, config: EngineConfig, device: jax.Device, group: Group) -> None:
        super().__init__(config, device, group)
        self._threads = config.threads or cores()  # of all ranks, whose operators take turns

    def make_state(self, num_pages: int) -> State:
        """Empty pages and rows."""
        config = self.config
        cache = _make_cache(self._local, num_pages, config.block_size, config.dtype, self.group)
        whole = self.group._place(self.device, REPLICATED)
        return State(cache, jnp.zeros((config.max_num_seqs + 1,), jnp.int32, device=whole))

    def _warm_pages(self, state: State) -> State:
        return self.write_pages(state, [0], _null_page(self.model_config, self.config))

    def _run(self, *arguments: Any, **options: Any) -> Any:
        open_library().tandem_threads(self._threads)  # another engine of this process may have another number
        return super()._run(*arguments, **options)

    def _shapes(self, bucket: Any) -> _Packed:
        return _Packed((max_step_size(bucket.tokens, bucket.seqs, bucket.pages, bucket.seqs),), choice_shape(bucket.seqs))

    def _inputs(self, bucket: Any, batch: Batch) -> _Packed:
        return _Packed(pack_step(batch), self._first_choice(batch, bucket.seqs))

    @property
    def _stream_dtype(self) -> Any:
        return jnp.float32

    def _logits(
        self, bucket: Any, weights: Weights, state: State, x: _Packed, keep: Keep, *before: Array
    ) -> tuple[KVCache, Array]:
        config, group, step = self._local, self.group, x.step
        if before:
            (x_TD,) = before
        else:
            x_TD = group.all_reduce(embed(config, weights, step, state.last_tokens, bucket.tokens))
        cache, x_TD = layers_in_terms(config, weights, step, state.cache, x_TD, group)
        if not config.predicts:
            return cache, x_TD
        # No place is given for the logits: what stands where one is expected is not looked at.
        return cache, _call("head", _shape((bucket.seqs, config.vocab_size)), step, weights.head, x_TD, x_TD)


def make_step(config: EngineConfig, device: jax.Device, group: Group) -> Step | SharedStep:
    """The step of a model that the ranks of a `group` share out."""
    return Step(config, device, group) if group.ranks == 1 else SharedStep(config, device, group)


def _choose(last_tokens: Array, step: Array, changes: Array, logits_RV: Array, changed_RV: Array) -> tuple[Array, Array, Array]:
    """The pure function that is compiled: the last tokens, the logits changed further, and what is chosen from them."""
    changed_RV = adjust(step, changes, changed_RV)
    sampled, state = sample(State(None, last_tokens, logits_RV), step, changed_RV)  # type: ignore[arg-type]
    return state.last_tokens, changed_RV, sampled


def _filled(size: int, packed: np.ndarray) -> np.ndarray:
    """Return int32[size] that begins with `packed`. The rest is not read."""
    words = np.empty(size, np.int32)
    words[: len(packed)] = packed
    return words


def _call(name: str, results: Any, *arguments: Array, aliases: dict[int, int] | None = None, layer: int | None = None) -> Any:
    """One operator inside a compiled step. `aliases`: which argument becomes which result, in place."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), results)
    attributes = {} if layer is None else {"layer": np.int64(layer)}
    return jax.ffi.ffi_call(f"tandem_{name}", shapes, input_output_aliases=aliases)(*arguments, **attributes)


def _null_page(config: ModelConfig, engine: EngineConfig) -> dict[str, np.ndarray]:
    """As `read_pages` gives them."""
    shape = config.num_layers, 1, engine.block_size, config.num_kv_heads, config.head_dim
    return dict.fromkeys(("k", "v"), np.zeros(shape, jnp.dtype(engine.dtype)))


def _add(name: str, weights: Weights, step: Array, sum_TD: Array, x_TD: Array, layer: int) -> Array:
    return _call(name, x_TD, step, weights.layers, sum_TD, x_TD, aliases={3: 0}, layer=layer)


def _take_pages(pool: Array, pages: np.ndarray, ranks: int) -> list[np.ndarray]:
    """What the part of each rank of a pool holds at `pages`: [L K, pages, …]."""
    if pool.is_fully_addressable:
        # Rank by rank: an array keeps what it once gave of all of them together.
        return [np.asarray(own.data)[:, pages] for own in pool.addressable_shards]
    runs = [pages[at : at + _PAGES] for at in range(0, max(len(pages), 1), _PAGES)]
    read = [gather_to_host(_get_pages(pool, np.pad(run, (0, _PAGES - len(run))))) for run in runs]
    return np.split(np.concatenate(read, 1)[:, : len(pages)], ranks)


def _put_pages(pool: Array, pages: np.ndarray, x: np.ndarray) -> Array:
    """A pool whose `pages` hold x [L K, pages, …]. One program serves any number of them: `_PAGES` at a time, and the null page
    for what is missing."""
    for at in range(0, len(pages), _PAGES):
        some = x[:, at : at + _PAGES]
        missing = _PAGES - some.shape[1]
        some = np.pad(some, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])
        pool = _set_pages(pool, np.pad(pages[at : at + _PAGES], (0, missing)), some)
    return pool


@jax.jit
def _get_pages(pool: Array, pages: Array) -> Array:
    return pool[:, pages]


@partial(jax.jit, donate_argnums=0)
def _set_pages(pool: Array, pages: Array, x: Array) -> Array:
    return pool.at[:, pages].set(x)


def _shape(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _typed(pages: np.ndarray) -> np.ndarray:
    return pages.view(jnp.bfloat16) if pages.dtype == np.uint16 else pages


def _put(parts: Sequence[np.ndarray], axis: int | None, group: Group) -> Array:
    """Return the arrays' own memory in large pages, as `group._whole` does. It is aligned and is not written again."""
    for part in parts:
        _huge(part.ctypes.data, part.nbytes)
    return group._whole(
        [jax.device_put(part, device) for part, device in zip(parts, group._devices(_cpu()), strict=True)], axis
    )


def _make_cache(config: ModelConfig, pages: int, page_size: int, dtype: str, group: Group) -> KVCache:
    """Such pools of each rank, of whose part of a model `config` is, as `group._whole` has them."""
    element = jnp.dtype(jnp.uint16 if dtype == "bfloat16" else dtype)
    shapes = pool_shapes(config, pages, page_size, element.itemsize)
    k, v = (group._whole([_zeros(shape, element, device) for device in group._devices(_cpu())], 0) for shape in shapes)
    return KVCache((k,), (v,))


def _zeros(shape: tuple[int, ...], dtype: Any, device: jax.Device) -> Array:
    """In large pages."""
    zeros = jnp.zeros(shape, dtype, device=device)
    _huge(zeros.unsafe_buffer_pointer(), zeros.nbytes)
    return zeros


def _huge(pointer: int, size: int) -> None:
    open_library().tandem_huge(ctypes.c_void_p(pointer), ctypes.c_size_t(size))


def _cpu() -> jax.Device:
    return jax.local_devices(backend="cpu")[0]
