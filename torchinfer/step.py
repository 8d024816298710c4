"""One step in PyTorch's own operations: what `kernels=framework` runs.

With `compile=true` torch.compile compiles the same model code, block by block. Attention runs between the compiled pieces,
because it depends on how the sequences of a step group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.batch import Batch, Mask, Want, masked, null_batch
from common.config import EngineConfig, ModelConfig
from common.errors import BackendError
from common.interface import Progress, max_logits, page_bytes
from common.model.partition import join_heads, local_config, pool_config, split_heads, stage_layers
from common.system.hardware import cxx_compiler
from common.weights.checkpoint import Checkpoint
from common.weights.shard import stage_of
from torchinfer import cache as pages
from torchinfer import sampling
from torchinfer.arrays import nbytes, to_device, to_host
from torchinfer.attention import Plan, make_plan, paged_attention
from torchinfer.cache import KVCache
from torchinfer.layers import Linear
from torchinfer.model import Decoder, forward, logits
from torchinfer.observe import Keep, Names, ignore, keeper
from torchinfer.parallel import ALONE, Group
from torchinfer.weights import load_model


class State(NamedTuple):
    """What a step takes, changes and gives back."""

    cache: KVCache
    last_tokens: Tensor
    """int64[rows + 1]: the last token sampled for each permanent row; the spare one takes what is not sampled."""
    logits: Any = None
    """float32[rows, V]: where native kernels leave a step's logits, so that no step asks the system for that much memory."""


class Inputs(NamedTuple):
    """One step's inputs: T tokens and R logit rows."""

    token_ids: Any  # [T]
    positions: Any  # [T]
    fill_at: Any  # [F], tokens the host does not know ...
    fill_row: Any  # [F], ... and the row whose last token goes there
    logit_rows: Any  # [R]
    rows: Any  # [R], permanent row of each logit row that samples
    score_ids: Any  # [R], the token to report on, or -1 for the chosen one; None where nothing is scored
    seeds: Any  # [R, 2], None when every row is greedy, like the following
    temperature: Any  # [R], float32
    top_k: Any  # [R]
    top_p: Any  # [R], float32
    min_p: Any  # [R], float32
    edits: Any  # [E], [E], [E, 3]: rows, ids and their edits, or None
    modes: tuple[bool, bool, bool]  # any row samples, any row filters, any row wants logprobs


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
        self.max_logits = max_logits(checkpoint.config, self.config)
        return checkpoint


class Step(Part):
    """A model in the framework's operations. `load` first; then `run` takes a state and a batch, and gives the next state."""

    kernels = "framework"
    token_buckets: tuple[int, ...] = ()
    decode_buckets: tuple[int, ...] = ()

    def __init__(self, config: EngineConfig, device: torch.device, group: Group = ALONE) -> None:
        self.config, self.device, self.group = config, device, group
        if config.compile and device.type == "cpu" and len(command := cxx_compiler()) > 1:
            raise BackendError(
                f"compile=true needs a CXX without arguments, for torch.compile does not split it; got {command}."
            )

    def load(self, checkpoint: Checkpoint, positions: int, progress: Progress | None = None) -> None:
        """Bring the weights to the device, with room for `positions` rotary positions."""
        checkpoint = self.take(checkpoint, positions)
        self.weights: Any = load_model(checkpoint, self.config.dtype, positions, self.device, progress, self.group)
        if self.device.type == "cpu" and not self.config.compile:
            _pack(self.weights)
        if self.config.compile:
            # One program serves all layers: weights are its inputs, and the number of tokens is symbolic.
            for block in self.weights.layers:
                block.project = _sealed(torch.compile(block.project, dynamic=True))
                block.combine = _sealed(torch.compile(block.combine, dynamic=True))

    def model(self, weights: Any) -> Decoder:
        """The decoder of the `weights` of a loaded step, which are the decoder itself here."""
        return weights

    def make_state(self, num_pages: int) -> State:
        """Empty pages and rows."""
        config = self.config
        cache = pages.make_cache(self._local, num_pages, config.block_size, config.dtype, self.device)
        return State(cache, torch.zeros(config.max_num_seqs + 1, dtype=torch.int64, device=self.device))

    def page_bytes(self, model: ModelConfig) -> int:
        """Bytes of one page of all ranks, over all layers of the model."""
        return page_bytes(pool_config(model, self.group.ranks), self.config)

    def held(self, state: State) -> int:
        """Bytes of one rank's weights and pages."""
        return nbytes((self._tensors(), state.cache))

    def warmup(self, state: State, progress: Progress | None = None) -> State:
        """Compile what later steps need."""
        # Nothing is padded here: one small step and one full one leave no lazy set-up for later.
        seqs = self.config.max_num_seqs
        # The last sequence takes what the others leave of the budget, within its context.
        most = min(self.config.max_num_batched_tokens, seqs - 1 + self._positions)
        # A compiled step is specialised once more for a single token, and for two before it takes any number.
        shapes = (*((n, n) for n in (1, 2, 3) if n <= seqs), (most, seqs))
        for done, (tokens, seqs) in enumerate(shapes):
            state, fetch = self.run(state, null_batch(tokens, seqs, self.config.block_size))
            fetch()
            if progress:
                progress(done + 1, len(shapes), f"ran a step of {tokens} tokens")
        return state

    def run(self, state: State, batch: Batch, mask: Mask = None) -> tuple[State, Callable[[], tuple[Any, ...]]]:
        """One step, and what brings its results to the host, of the last stage: the arguments of `interface.make_result`."""
        state, sampled = self._step(state, batch, mask=mask)
        return state, lambda: to_host(sampled)

    def observe(self, state: State, batch: Batch, names: Names) -> tuple[State, dict[str, Tensor]]:
        """One step, and what it computes on the way, on the device: those of `names`, or all."""
        taps, keep = keeper(names)
        state, _ = self._step(state, batch, keep)
        return state, taps

    def read_pages(self, state: State, pages_: Sequence[int]) -> dict[str, np.ndarray]:
        """Copies `k` and `v`: [L, pages, B, K, H]."""
        read = pages.read_pages(state.cache, pages_)
        every = {name: np.concatenate(to_host(self.group.gather(to_device(x, self.device))), 3) for name, x in read.items()}
        mine = {name: join_heads(x, self.model_config, self.group.ranks) for name, x in every.items()}
        return {name: self.group._stack(x, self._layers.start) for name, x in mine.items()}

    def write_pages(self, state: State, pages_: Sequence[int], arrays: dict[str, np.ndarray]) -> State:
        """The inverse of `read_pages`."""
        rank, ranks, own = self.group.rank, self.group.ranks, slice(self._layers.start, self._layers.stop)
        mine = {name: np.split(split_heads(x[own], self.model_config, ranks), ranks, 3)[rank] for name, x in arrays.items()}
        return state._replace(cache=pages.write_pages(state.cache, pages_, mine))

    def _tensors(self) -> Any:
        return [*self.weights.parameters(), *self.weights.buffers()]

    def _inputs(self, batch: Batch) -> Inputs:
        owner = batch.logit_owner
        wide = lambda array: None if array is None else array.astype(np.int64)  # noqa: E731
        sampled = (batch.want & Want.SAMPLE) > 0
        by_owner = lambda array: None if array is None else array[owner]  # noqa: E731
        return Inputs(
            wide(batch.token_ids),
            wide(batch.positions),
            wide(batch.fill_at),
            wide(batch.fill_row),
            wide(batch.logit_rows),
            wide(np.where(sampled, batch.rows[owner], self.config.max_num_seqs)),
            wide(batch.score_ids),
            wide(by_owner(batch.seeds)),
            by_owner(batch.temperature),
            by_owner(batch.top_k),
            by_owner(batch.top_p),
            by_owner(batch.min_p),
            None if batch.edit_rows is None else (wide(batch.edit_rows), wide(batch.edit_ids), batch.edits),
            (batch.seeds is not None, batch.top_k is not None, batch.num_top is not None),
        )

    @torch.inference_mode()
    def _step(
        self, state: State, batch: Batch, keep: Keep = ignore, mask: Mask = None
    ) -> tuple[State, sampling.Sampled | None]:
        x: Inputs = to_device(self._inputs(batch), self.device)
        cache, logits_RV = self._logits(state, batch, x, keep)
        if logits_RV is None:
            return state._replace(cache=cache), None
        sampled = self._sample(logits_RV, x, masked(batch, mask))
        keep(logits=logits_RV, tokens=sampled.tokens)
        state.last_tokens.index_copy_(0, x.rows, sampled.tokens.to(state.last_tokens.dtype))
        return state._replace(cache=cache), sampled

    def _logits(self, state: State, batch: Batch, x: Inputs, keep: Keep) -> tuple[KVCache, Tensor | None]:
        """The pages as they are afterwards, and of each logit row the logits of this rank's tokens. A stage that is not the
        last has none, and passes on its residual stream."""
        x.token_ids.index_copy_(0, x.fill_at, state.last_tokens[x.fill_row])
        plan: Plan = to_device(make_plan(batch, self.model_config, self.config.block_size), self.device)
        attend = paged_attention(self._local, plan)
        shape, dtype = (batch.num_tokens, self._local.hidden_size), getattr(torch, self.config.dtype)
        entered = self.group._enter(lambda: x.token_ids, shape, dtype)
        hidden_TD, cache = forward(self.weights, entered, x.positions, attend, state.cache, keep)
        if not self._local.predicts:
            self.group._pass_on(hidden_TD)
            return cache, None
        return cache, logits(self.weights, hidden_TD[x.logit_rows])

    def _sample(self, logits_RV: Tensor, x: Inputs, batch: Batch) -> sampling.Sampled:
        sampled, filtered, logprobs = x.modes
        group = self.group
        finite = group.fold(torch.sum, logits_RV.sum(dim=-1)).isfinite()
        changed_RV = logits_RV = group.real(logits_RV, self.model_config.vocab_size)
        if batch.mask_rows is not None and batch.masks is not None:
            rows, masks = to_device((batch.mask_rows.astype(np.int64), batch.masks.astype(np.int64)), self.device)
            changed_RV = sampling.mask(logits_RV, rows, masks, group)
        if x.edits is not None:
            rows, ids, edits = x.edits
            changed_RV = sampling.edit(changed_RV, rows, ids, edits, group)
        if sampled:
            u = sampling.uniform(x.seeds, x.positions[x.logit_rows] + 1)
            tokens = sampling.sample(changed_RV, x.temperature, x.top_k, x.top_p, x.min_p, u, filtered, group)
        else:
            tokens = sampling.greedy(changed_RV, group)
        reported = tokens if x.score_ids is None else torch.where(x.score_ids < 0, tokens, x.score_ids)
        extra = sampling.logprobs_of(logits_RV, reported, group) if logprobs else (None, None, None, None)
        return sampling.Sampled(tokens, finite, *extra)


def _sealed(method: Callable[..., Any]) -> Callable[..., Any]:
    """A block's method as one program, which shows what it returns and nothing of what is inside."""
    return lambda x_TD, other, keep=ignore: method(x_TD, other)


def _pack(model: Decoder) -> None:
    """Put the matrices into the blocked layout of oneDNN, PyTorch's own CPU library, once instead of in every call. A tied LM
    head gets a packed copy of the embedding, whose rows are still looked up."""
    dtype = model.layers[0].mlp.down_proj.weight.dtype
    ops = torch.ops.mkldnn
    fast = {torch.bfloat16: ops._is_mkldnn_bf16_supported, torch.float16: ops._is_mkldnn_fp16_supported}
    if not torch.backends.mkldnn.is_available() or (dtype in fast and not fast[dtype]()):
        return
    if model.config.predicts and model.lm_head is None:
        vocab, size = model.embed_tokens.weight.shape
        model.lm_head = Linear(size, vocab, bias=False, split=0, dtype=dtype)
        model.lm_head.weight = model.embed_tokens.weight
        if not model.config.embeds:
            model.embed_tokens = None
    for module in model.modules():
        if isinstance(module, Linear):
            packed = ops._reorder_linear_weight(module.weight.detach(), None)
            module.weight = torch.nn.Parameter(packed, requires_grad=False)
