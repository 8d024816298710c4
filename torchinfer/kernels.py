"""Native kernels as PyTorch operators, and the step that is made of them: what `kernels=native` runs.

The operators are registered in C++ (`common/kernels/cpu/torch.cc`) and write what they are given: none allocates. Between them
PyTorch computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import cpp_extension

from common.batch import Batch, Mask, masked, null_batch
from common.config import EngineConfig, ModelConfig
from common.interface import Progress
from common.kernels.cpu import usable as cpu
from common.kernels.cpu.build import build
from common.kernels.cpu.pack import pack_head, pack_layers
from common.kernels.cpu.pages import keys_in, keys_out, page_bytes, pool_shapes, values_in, values_out
from common.kernels.cpu.step import SAMPLED, pack_changes, pack_step, unpack_sampled
from common.model.partition import join_heads, local_config, split_heads
from common.model.rope import rope_tables
from common.system.hardware import cores
from common.weights.checkpoint import Checkpoint
from torchinfer.arrays import nbytes, to_device, to_host
from torchinfer.cache import KVCache
from torchinfer.observe import Keep, Names, ignore, keeper
from torchinfer.parallel import ALONE, Group
from torchinfer.sampling import Sampled
from torchinfer.step import Inputs, Part, State
from torchinfer.step import Step as FrameworkStep


class Weights(NamedTuple):
    """The model, packed for the kernels."""

    layers: Tensor
    """uint8[L, n]: of each a header, norms, biases and matrices."""
    head: Tensor
    """uint8[n]: embedding, final norm, LM head."""
    ropes: Tensor
    """float32[tables, positions, H]: cos, then sin."""


@cache
def built_library() -> Path:
    """Compile the operators if needed, and return their path. Its name identifies the sources. Raises `BackendError`."""
    folders = cpp_extension.include_paths()
    library = f"{torch.__path__[0]}/lib"
    linked = (f"-L{library}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{library}")
    return build("torch", folders, ("-std=c++20",), linked, torch.__version__)


@cache
def open_library() -> None:
    """Compile and load the operators. Raises `BackendError` if that fails."""
    torch.ops.load_library(str(built_library()))


def unusable(config: EngineConfig, model: ModelConfig, device: torch.device) -> str | None:
    """Why `kernels` does not mean native here, or None. Raises `ConfigError` or `BackendError` if it must and cannot."""
    return cpu.unusable(config, model, device.type, open_library)


def load_weights(
    checkpoint: Checkpoint, dtype: Any, positions: int, progress: Progress | None = None, group: Group = ALONE
) -> Weights:
    """Pack a checkpoint, one layer at a time. In a `group` it is this rank's part."""
    config = checkpoint.config
    done = lambda count: progress and progress(count, config.num_layers + 1, "weights")  # noqa: E731
    layers = _put(pack_layers(checkpoint, dtype, done, group.rank, group.ranks))
    head = _put(pack_head(checkpoint, dtype, group.rank, group.ranks))
    ropes = _put(np.stack([np.concatenate(rope_tables(rope, config.head_dim, positions), 1) for rope in config.ropes]))
    done(config.num_layers + 1)
    return Weights(layers, head, ropes)


def make_cache(config: ModelConfig, pages: int, page_size: int, dtype: str) -> KVCache:
    """Make zeroed pools in the layout of the kernels, one array for all layers.

    Keys are [L K, pages, H / PAIR, B, PAIR], values [L K, pages, B / PAIR, H', PAIR].
    """
    element = getattr(torch, dtype)
    shapes = pool_shapes(config, pages, page_size, element.itemsize)
    k, v = (torch.zeros(shape, dtype=element, device="cpu") for shape in shapes)
    for pool in (k, v):
        torch.ops.tandem.huge(pool)
    return KVCache((k,), (v,))


def embed(config: ModelConfig, weights: Weights, step: Tensor, last_tokens: Tensor, tokens: int) -> Tensor:
    """float32[T, D]: the residual stream before the first layer, of a packed step of `tokens` tokens."""
    x_TD = torch.empty((tokens, config.hidden_size), dtype=torch.float32, device="cpu")
    torch.ops.tandem.embed.default(step, weights.head, last_tokens, x_TD)
    return x_TD


def layers(weights: Weights, step: Tensor, cache: KVCache, x_TD: Tensor) -> tuple[KVCache, Tensor]:
    """All layers in one operator: the pages and the residual stream as they are afterwards."""
    (k,), (v,) = cache
    torch.ops.tandem.layers.default(step, weights.layers, weights.ropes, k, v, x_TD)
    return cache, x_TD


def project(
    config: ModelConfig, weights: Weights, layer: int, step: Tensor, cache: KVCache, x_TD: Tensor
) -> tuple[KVCache, Tensor]:
    """A layer's pages with the keys and values of these tokens, and their queries [T, N, H]."""
    (k,), (v,) = cache
    q_TNH = torch.empty((x_TD.shape[0], config.num_heads, config.head_dim), dtype=k.dtype, device="cpu")
    torch.ops.tandem.project.default(step, weights.layers, weights.ropes, x_TD, k, v, q_TNH, layer)
    return cache, q_TNH


def attend(weights: Weights, layer: int, step: Tensor, cache: KVCache, q_TNH: Tensor) -> Tensor:
    """What the queries see in a layer's pages: [T, N, H], in their place."""
    (k,), (v,) = cache
    torch.ops.tandem.attend.default(step, weights.layers, k, v, q_TNH, layer)
    return q_TNH


def combine(weights: Weights, layer: int, step: Tensor, out_TNH: Tensor, x_TD: Tensor) -> Tensor:
    """The residual stream after a layer, of what it attended to and of the stream before, in whose place it is."""
    torch.ops.tandem.combine.default(step, weights.layers, out_TNH, x_TD, layer)
    return x_TD


def layers_in_parts(
    config: ModelConfig, weights: Weights, step: Tensor, cache: KVCache, x_TD: Tensor, keep: Keep = ignore
) -> tuple[KVCache, Tensor]:
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
    config: ModelConfig, weights: Weights, step: Tensor, cache: KVCache, x_TD: Tensor, group: Group
) -> tuple[KVCache, Tensor]:
    """Do what `layers` does, where the ranks of a `group` share each layer.

    The outputs of attention and of the MLP are sums of the terms of all ranks. Each complete sum is added to the stream.
    """
    (k,), (v,) = cache
    kernel = torch.ops.tandem.layers_in_terms.default
    group._exchange_in(lambda *memory: kernel(step, weights.layers, weights.ropes, k, v, x_TD, *memory))
    return cache, x_TD


def head(weights: Weights, step: Tensor, x_TD: Tensor, logits_RV: Tensor) -> Tensor:
    """Logits of the residual stream after the last layer, in the place of `logits_RV`, which may have more rows."""
    torch.ops.tandem.head.default(step, weights.head, x_TD, logits_RV)
    return logits_RV


def forward(
    config: ModelConfig,
    weights: Weights,
    state: State,
    step: Tensor,
    tokens: int,
    keep: Keep | None = None,
    before_TD: Tensor | None = None,
) -> tuple[State, Tensor]:
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


def adjust(step: Tensor, changes: Tensor, logits_RV: Tensor) -> Tensor:
    """Logits float32[R, V] with packed changes: masks, then edits."""
    changed_RV = torch.empty_like(logits_RV)
    torch.ops.tandem.adjust.default(step, changes, logits_RV, changed_RV)
    return changed_RV


def sample(state: State, step: Tensor, changed_RV: Tensor | None = None) -> tuple[Tensor, State]:
    """int32[R, SAMPLED]: tokens, from changed logits if there are any, and what was asked about them, from the state's; it
    remembers each row's token."""
    logits_RV = state.logits
    changed_RV = logits_RV if changed_RV is None else changed_RV
    sampled = torch.empty((logits_RV.shape[0], SAMPLED), dtype=torch.int32, device="cpu")
    torch.ops.tandem.sample.default(step, logits_RV, changed_RV, state.last_tokens, sampled)
    return sampled, state


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
        every = lambda pool: to_host(list(self.group.gather(pool[:, list(pages_)])))  # noqa: E731
        K, H = self._local.num_kv_heads, self._local.head_dim
        whole = {"k": [keys_out(pool, K) for pool in every(k)], "v": [values_out(pool, K, H) for pool in every(v)]}
        mine = {name: join_heads(np.concatenate(x, 3), self.model_config, self.group.ranks) for name, x in whole.items()}
        return {name: self.group._stack(x, self._layers.start) for name, x in mine.items()}

    def write_pages(self, state: State, pages_: Sequence[int], arrays: dict[str, np.ndarray]) -> State:
        """The inverse of `read_pages`."""
        (k,), (v,) = state.cache
        rank, ranks, own = self.group.rank, self.group.ranks, slice(self._layers.start, self._layers.stop)
        mine = {name: np.split(split_heads(x[own], self.model_config, ranks), ranks, 3)[rank] for name, x in arrays.items()}
        _put_pages(k, pages_, keys_in(mine["k"], k.shape[-1]))
        _put_pages(v, pages_, values_in(mine["v"], v.shape[-1]))
        return state


class Step(Native):
    """A model in native operators. `load` first; then `run` takes a state and a batch, and gives the next state."""

    token_buckets: tuple[int, ...] = ()
    decode_buckets: tuple[int, ...] = ()

    def __init__(self, config: EngineConfig, device: torch.device, group: Group = ALONE) -> None:
        self.config, self.device, self.group = config, device, group
        self._threads = max(1, (config.threads or cores()) // config.ranks)
        torch.ops.tandem.threads(self._threads)

    def make_state(self, num_pages: int) -> State:
        """Empty pages and rows."""
        config = self.config
        cache = make_cache(self.model_config, num_pages, config.block_size, config.dtype)
        vocab = self.model_config.vocab_size if self.model_config.predicts else 0
        logits_RV = torch.empty((self.max_logits, vocab), dtype=torch.float32, device="cpu")
        torch.ops.tandem.huge(logits_RV)
        return State(cache, torch.zeros(config.max_num_seqs, dtype=torch.int32, device="cpu"), logits_RV)

    def held(self, state: State) -> int:
        """Bytes of one rank's weights and pages."""
        return nbytes((self.weights, state.cache))

    def warmup(self, state: State, progress: Progress | None = None) -> State:
        """Nothing is compiled: one step wakes the threads and brings the weights to memory."""
        state, fetch = self.run(state, null_batch(1, 1, self.config.block_size))
        fetch()
        if progress:
            progress(1, 1, "ran a step")
        return state

    def run(self, state: State, batch: Batch, mask: Mask = None) -> tuple[State, Callable[[], tuple[Any, ...]]]:
        """One step, and what brings its results to the host, of the last stage: the arguments of `interface.make_result`."""
        state, sampled = self._step(state, batch, mask=mask)
        return state, lambda: () if sampled is None else unpack_sampled(sampled.numpy(), batch)

    def observe(self, state: State, batch: Batch, names: Names) -> tuple[State, dict[str, Tensor]]:
        """One step, and what it computes on the way, on the device: those of `names`, or all."""
        taps, keep = keeper(names)
        shape = len(batch.logit_rows), self.model_config.vocab_size  # any token may ask
        wide = state._replace(logits=torch.zeros(shape, dtype=torch.float32, device="cpu"))
        self._step(wide, batch, keep)
        return state, taps

    @torch.inference_mode()
    def _step(self, state: State, batch: Batch, keep: Keep | None = None, mask: Mask = None) -> tuple[State, Tensor | None]:
        config = self.model_config
        torch.ops.tandem.threads(self._threads)  # another engine of this process may have another number
        step, logits_RV = torch.from_numpy(pack_step(batch)), state.logits[: len(batch.logit_rows)]
        now, T = state._replace(logits=logits_RV), batch.num_tokens
        x_TD = self.group._enter(
            lambda: embed(config, self.weights, step, state.last_tokens, T), (T, config.hidden_size), torch.float32
        )
        now, x_TD = forward(config, self.weights, now, step, T, keep, x_TD)
        if not config.predicts:
            self.group._pass_on(x_TD)
            return state, None
        changed_RV = adjust(step, torch.from_numpy(pack_changes(masked(batch, mask))), logits_RV) if batch.adjusts else None
        sampled, _ = sample(now, step, changed_RV)
        if keep:
            keep(tokens=sampled[:, 0])
        return state, sampled


class SharedStep(Native, FrameworkStep):
    """As `Step`, of a model that the ranks of a group share out. Between the operators they add up their terms. Each has the
    logits of its tokens, from which they choose together in the framework's operations."""

    def __init__(self, config: EngineConfig, device: torch.device, group: Group) -> None:
        super().__init__(config, device, group)
        self._threads = max(1, (config.threads or cores()) // config.ranks)

    def make_state(self, num_pages: int) -> State:
        """Empty pages and rows."""
        config = self.config
        cache = make_cache(self._local, num_pages, config.block_size, config.dtype)
        vocab = self._local.vocab_size if self._local.predicts else 0
        logits_RV = torch.empty((self.max_logits, vocab), dtype=torch.float32, device="cpu")
        torch.ops.tandem.huge(logits_RV)
        return State(cache, torch.zeros(config.max_num_seqs + 1, dtype=torch.int32, device="cpu"), logits_RV)

    def _tensors(self) -> Any:
        return self.weights

    def _logits(self, state: State, batch: Batch, x: Inputs, keep: Keep) -> tuple[KVCache, Tensor | None]:
        torch.ops.tandem.threads(self._threads)  # another engine of this process may have another number
        step, config, group = torch.from_numpy(pack_step(batch)), self._local, self.group
        T = batch.num_tokens
        embedded = lambda: group.all_reduce(embed(config, self.weights, step, state.last_tokens, T))  # noqa: E731
        x_TD = group._enter(embedded, (T, config.hidden_size), torch.float32)
        cache, x_TD = layers_in_terms(config, self.weights, step, state.cache, x_TD, group)
        if not config.predicts:
            group._pass_on(x_TD)
            return cache, None
        return cache, head(self.weights, step, x_TD, state.logits[: len(batch.logit_rows)])

    def _sample(self, logits_RV: Tensor, x: Inputs, batch: Batch) -> Sampled:
        if any(x.modes) or x.edits is not None or batch.masks is not None:
            return super()._sample(logits_RV, x, batch)
        # Greedy, as most steps are: one look at the logits.
        (R, n), rank = logits_RV.shape, self.group.rank
        best = torch.empty((R, 3), dtype=torch.int32, device="cpu")
        torch.ops.tandem.best.default(logits_RV, min(n, max(0, self.model_config.vocab_size - rank * n)), best)
        best[:, 1] += rank * n
        highest, tokens, finite = self.group.gather(best).unbind(-1)
        first = highest.view(torch.float32).argmax(0, keepdim=True)
        return Sampled(tokens.gather(0, first)[0].long(), finite.all(0), None, None, None, None)


def make_step(config: EngineConfig, device: torch.device, group: Group) -> Step | SharedStep:
    """The step of a model that the ranks of a `group` share out."""
    return Step(config, device, group) if group.ranks == 1 else SharedStep(config, device, group)


def _put_pages(pool: Tensor, pages: Sequence[int], x: np.ndarray) -> None:
    """Have the `pages` of a pool hold x [L K, pages, …]."""
    pool[:, list(pages)] = to_device(np.ascontiguousarray(x), pool.device)


def _put(array: np.ndarray) -> Tensor:
    """Return the array's own memory in large pages. It is not written again."""
    tensor = torch.from_numpy(array)
    torch.ops.tandem.huge(tensor)
    return tensor
