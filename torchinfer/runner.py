"""One model on a PyTorch device, a step at a time.

Everything runs in inference mode and updates the KV pages in place. With `compile=true` the same model code runs under
torch.compile, block by block, with attention between the compiled pieces: it depends on how the step's sequences group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from common import interface
from common.config import EngineConfig, ModelConfig
from common.errors import BackendError
from common.interface import Caps, KVGroup, Progress
from common.platform import has_cxx_compiler
from common.schedule.batch import Batch
from common.weights.checkpoint import Checkpoint
from torchinfer import cache as pages
from torchinfer import sampling
from torchinfer.arrays import to_device, to_host
from torchinfer.attention import Plan, make_plan, paged_attention
from torchinfer.cache import KVCache
from torchinfer.device import describe, open_device
from torchinfer.layers import Linear
from torchinfer.model import Decoder, forward, logits
from torchinfer.weights import load_model


class State(NamedTuple):
    """What a step takes, changes and gives back."""

    cache: KVCache
    last_tokens: Tensor
    """int64[rows]: the last token sampled for each permanent row."""


class Inputs(NamedTuple):
    """One step's inputs: T tokens and R logit rows."""

    token_ids: Any  # [T]
    positions: Any  # [T]
    fill_at: Any  # [F], tokens the host does not know ...
    fill_row: Any  # [F], ... and the row whose last token goes there
    logit_rows: Any  # [R]
    rows: Any  # [R], permanent row of each logit row
    seeds: Any  # [R, 2], None when every row is greedy, like the following
    temperature: Any  # [R], float32
    top_k: Any  # [R]
    top_p: Any  # [R], float32
    min_p: Any  # [R], float32
    modes: tuple[bool, bool, bool]  # any row samples, any row filters, any row wants logprobs
    plan: Plan


class ModelRunner(interface.ModelRunner):
    """`common.interface.ModelRunner` on PyTorch."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.device = open_device(config.device, config.threads)
        self.model: Any = None  # a Decoder once loaded
        self.state: Any = None  # a State once allocated
        if config.compile and self.device.type == "cpu" and has_cxx_compiler() is None:
            raise BackendError("compile=true needs a C++ compiler and found none: install g++, set CXX, or use compile=false.")

    @property
    def caps(self) -> Caps:
        return self._caps

    def load(self, checkpoint: Checkpoint, progress: Progress | None = None) -> None:
        self.model_config: ModelConfig = checkpoint.config
        self.max_model_len = self.config.model_len(checkpoint.config)
        self._caps = Caps(
            backend="torch",
            device=describe(self.device),
            dtypes=("float32", "bfloat16"),
            kernels=("framework",),
            max_tokens=self.config.max_num_batched_tokens,
            max_seqs=self.config.max_num_seqs,
            max_model_len=self.max_model_len,
            vocab_size=self.model_config.vocab_size,
        )
        self.model = load_model(checkpoint, self.config.dtype, self.max_model_len, self.device, progress)
        if self.device.type == "cpu" and not self.config.compile:
            _pack(self.model)
        if self.config.compile:
            # One program serves all layers: weights are its inputs, and the number of tokens is symbolic.
            for block in self.model.layers:
                block.project = torch.compile(block.project, dynamic=True)
                block.combine = torch.compile(block.combine, dynamic=True)

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
        self.state = State(cache, torch.zeros(config.max_num_seqs, dtype=torch.int64, device=self.device))

    def warmup(self, progress: Progress | None = None) -> None:
        # Nothing is padded here: one small step and one full one leave no lazy set-up for later.
        seqs = self.config.max_num_seqs
        # The last sequence takes what the others leave of the budget, within its context.
        most = min(self.config.max_num_batched_tokens, seqs - 1 + self.max_model_len)
        # A compiled step is specialised once more for a single token, and for two before it takes any number.
        shapes = (*((n, n) for n in (1, 2, 3) if n <= seqs), (most, seqs))
        for done, (tokens, seqs) in enumerate(shapes):
            self.submit(_null_batch(tokens, seqs, self.config.block_size)).result()
            if progress:
                progress(done + 1, len(shapes), f"ran a step of {tokens} tokens")

    @property
    def compilations(self) -> int:
        return int(counters["stats"]["unique_graphs"])

    def submit(self, batch: Batch) -> interface.Pending:
        self._expect_open()
        with torch.inference_mode():
            if batch.copies.shape[1]:
                pages.copy_pages(self.state.cache, to_device(batch.copies[0].astype(np.int64), self.device))
            self.state, sampled = self._step(self.state, to_device(self._inputs(batch), self.device))
        return interface.Fetched(batch, lambda: to_host(sampled))

    def read_pages(self, group: int, pages_: Sequence[int]) -> dict[str, np.ndarray]:
        return pages.read_pages(self.state.cache, pages_)

    def write_pages(self, group: int, pages_: Sequence[int], arrays: dict[str, np.ndarray]) -> None:
        self.state = self.state._replace(cache=pages.write_pages(self.state.cache, pages_, arrays))

    def close(self) -> None:
        self.model, self.state = None, None

    def _expect_open(self) -> None:
        if self.model is None:
            raise BackendError("This runner has no weights: load a checkpoint, or, if it is closed, make a new one.")

    def _inputs(self, batch: Batch) -> Inputs:
        owner = batch.logit_owner
        wide = lambda array: array.astype(np.int64)  # noqa: E731
        by_owner = lambda array: None if array is None else array[owner]  # noqa: E731
        return Inputs(
            wide(batch.token_ids),
            wide(batch.positions),
            wide(batch.fill_at),
            wide(batch.fill_row),
            wide(batch.logit_rows),
            wide(batch.rows[owner]),
            None if batch.seeds is None else wide(batch.seeds[owner]),
            by_owner(batch.temperature),
            by_owner(batch.top_k),
            by_owner(batch.top_p),
            by_owner(batch.min_p),
            (batch.seeds is not None, batch.top_k is not None, batch.num_top is not None),
            make_plan(batch, self.model_config, self.config.block_size),
        )

    def _step(self, state: State, x: Inputs) -> tuple[State, sampling.Sampled]:
        x.token_ids.index_copy_(0, x.fill_at, state.last_tokens[x.fill_row])
        attend = paged_attention(self.model_config, x.plan)
        hidden_TD, cache = forward(self.model, x.token_ids, x.positions, attend, state.cache)
        logits_RV = logits(self.model, hidden_TD[x.logit_rows])
        sampled = self._sample(logits_RV, x)
        state.last_tokens.index_copy_(0, x.rows, sampled.tokens)
        return State(cache, state.last_tokens), sampled

    def _sample(self, logits_RV: Tensor, x: Inputs) -> sampling.Sampled:
        sampled, filtered, logprobs = x.modes
        if sampled:
            u = sampling.uniform(x.seeds, x.positions[x.logit_rows] + 1)
            tokens = sampling.sample(logits_RV, x.temperature, x.top_k, x.top_p, x.min_p, u, filtered)
        else:
            tokens = sampling.greedy(logits_RV)
        extra = sampling.logprobs_of(logits_RV, tokens) if logprobs else (None, None, None, None)
        return sampling.Sampled(tokens, logits_RV.sum(dim=-1).isfinite(), *extra)


def _null_batch(tokens: int, seqs: int, page_size: int) -> Batch:
    """A step of `seqs` sequences on the null page: all decodes but the last, which takes the rest of `tokens`."""
    counts = np.array([1] * (seqs - 1) + [tokens - seqs + 1], np.int32)
    starts = np.concatenate(([0], np.cumsum(counts)))
    rows = np.arange(seqs)
    return Batch.pack(
        token_ids=np.zeros(tokens),
        positions=np.concatenate([np.arange(count) for count in counts]),
        query_starts=starts,
        kv_lengths=counts,
        num_decodes=[int((counts == 1).sum())],
        rows=rows,
        page_table=np.zeros((1, seqs, -(-int(counts.max()) // page_size))),
        slots=np.zeros((1, tokens)),
        copies=np.zeros((1, 0, 2)),
        fill_at=[],
        fill_row=[],
        logit_rows=starts[1:] - 1,
        logit_owner=rows,
        want=np.ones(seqs),
    )


def _pack(model: Decoder) -> None:
    """Put the matrices into the blocked layout of oneDNN, PyTorch's own CPU library, once instead of in every call. A tied LM
    head gets a packed copy of the embedding, whose rows are still looked up."""
    dtype = model.embed_tokens.weight.dtype
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or (dtype == torch.bfloat16 and not ops._is_mkldnn_bf16_supported()):
        return
    if model.lm_head is None:
        vocab, size = model.embed_tokens.weight.shape
        model.lm_head = Linear(size, vocab, bias=False, split=0, dtype=dtype)
        model.lm_head.weight = model.embed_tokens.weight
    for module in model.modules():
        if isinstance(module, Linear):
            packed = ops._reorder_linear_weight(module.weight.detach(), None)
            module.weight = torch.nn.Parameter(packed, requires_grad=False)
