"""`engine=hf`: Hugging Face transformers as the outside baseline, run as it is used without an engine.

Static batches in order of arrival, left-padded, sdpa attention, one forward pass a step; each batch runs to its longest
output, and only tokens that were asked for are reported. Weights come through transformers' own loader, from the same files.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, GgufConfig, PreTrainedModel
from transformers.utils import logging

from common.config import EngineConfig
from common.errors import CheckpointError
from common.interface import Caps, Progress
from common.request import Logprobs, Request, Status, TokenEvent
from common.system.hardware import choose, cores
from experiments.baselines.greedy import GreedyEngine, check_request

if TYPE_CHECKING:
    from common.weights.checkpoint import Checkpoint


def build_engine(checkpoint: Checkpoint, config: EngineConfig, progress: Progress | None = None) -> HuggingFaceEngine:
    """Load the model in `config.dtype`; `config.max_num_seqs` is the batch size."""
    torch.set_num_threads(config.threads or cores())
    device = choose(config.device, {"cuda": probe_cuda, "cpu": lambda: None}).platform
    if progress:
        progress(0, 1, "load")
    model = load_model(checkpoint.path, getattr(torch, config.dtype))
    torch.nn.Module.to(model, device)
    if progress:
        progress(1, 1, "load")
    positions = model.config.get_text_config().max_position_embeddings
    limit = min(config.max_model_len or positions, positions)
    return HuggingFaceEngine(model, batch_size=config.max_num_seqs, max_model_len=limit)


def probe_cuda() -> str | None:
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def load_model(source: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model in eval mode, from a GGUF file (decoded while loading) or a Hugging Face directory."""
    logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa", "local_files_only": True}
    folder = source
    if source.suffix == ".gguf":
        folder = source.parent
        options |= {"gguf_file": source.name, "quantization_config": GgufConfig(dequantize=True)}
    try:
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load {source}: {error}") from error


@dataclass(eq=False)
class _Slot:
    """One request, which waits or has a place in the running batch."""

    request: Request
    emitted: int = 0
    open: bool = True


class _StaticBatch:
    """Requests that start together and are computed until the longest has ended."""

    def __init__(self, model: PreTrainedModel, slots: Sequence[_Slot]) -> None:
        self.slots = slots
        requests = [slot.request for slot in slots]
        self._model = model
        self._cache = DynamicCache(config=model.config)
        longest = max(len(request.prompt_token_ids) for request in requests)
        pads = [longest - len(request.prompt_token_ids) for request in requests]
        device = model.device
        padded = [[0] * pad + [*request.prompt_token_ids] for pad, request in zip(pads, requests, strict=True)]
        self._ids_ST = torch.tensor(padded).to(device)
        self._mask_ST = (torch.arange(longest) >= torch.tensor(pads)[:, None]).long().to(device)
        self._positions_ST = (self._mask_ST.cumsum(1) - 1).clamp(min=0)
        self._top = max((request.params.logprobs or 0) for request in requests)
        self._want_logprobs = any(request.params.logprobs is not None for request in requests)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """One forward pass: of the prompts first, then of one token of each request."""
        output = self._model(
            input_ids=self._ids_ST,
            attention_mask=self._mask_ST,
            position_ids=self._positions_ST,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_SV = output.logits[:, -1].float()
        next_S1 = logits_SV.argmax(-1, keepdim=True)
        logprobs = self._logprobs(logits_SV, next_S1) if self._want_logprobs else [None] * len(self.slots)
        tokens = next_S1[:, 0].tolist()  # waits for the device: from here the host has seen the tokens
        now = time.perf_counter()
        self._ids_ST = next_S1
        self._positions_ST = self._positions_ST[:, -1:] + 1
        self._mask_ST = torch.cat([self._mask_ST, torch.ones_like(next_S1)], 1)
        return [
            self._emit(slot, token, now, info)
            for slot, token, info in zip(self.slots, tokens, logprobs, strict=True)
            if slot.open
        ]

    def _logprobs(self, logits_SV: torch.Tensor, next_S1: torch.Tensor) -> list[Logprobs | None]:
        logprobs_SV = logits_SV.log_softmax(-1)
        chosen_S1 = logprobs_SV.gather(1, next_S1)
        ranks = (1 + (logprobs_SV > chosen_S1).sum(1)).tolist()
        top = logprobs_SV.topk(self._top)
        rows = zip(chosen_S1[:, 0].tolist(), ranks, top.indices.tolist(), top.values.tolist(), strict=True)
        return [Logprobs(logprob, rank, ids, values) for logprob, rank, ids, values in rows]

    @staticmethod
    def _emit(slot: _Slot, token: int, now: float, info: Logprobs | None) -> TokenEvent:
        slot.emitted += 1
        slot.open = slot.emitted < (slot.request.params.max_tokens or 1)
        finish = None if slot.open else Status.FINISHED_LENGTH
        wanted = info if slot.request.params.logprobs is not None else None
        return TokenEvent(slot.request.request_id, token, now, wanted, finish)


class HuggingFaceEngine(GreedyEngine[_Slot]):
    """Greedy requests of a fixed length; anything else is refused."""

    def __init__(self, model: PreTrainedModel, batch_size: int, max_model_len: int) -> None:
        caps = Caps(
            backend="hf",
            device=str(model.device),
            dtypes=("float32", "bfloat16"),
            kernels=("framework",),
            max_seqs=batch_size,
            max_model_len=max_model_len,
            vocab_size=model.config.get_text_config().vocab_size,
        )
        super().__init__(caps)
        self._model = model
        self._waiting: deque[_Slot] = deque()
        self._batch: _StaticBatch | None = None
        self._num_steps = 0

    def add(self, request: Request) -> None:
        check_request(request, self._caps, self._live)
        self._live[request.request_id] = slot = _Slot(request)
        self._waiting.append(slot)

    def step(self, timeout: float | None = None) -> list[TokenEvent]:
        ended, self._ended = self._ended, []
        if self._batch is None and self._waiting:
            count = min(self._caps.max_seqs, len(self._waiting))
            self._batch = _StaticBatch(self._model, [self._waiting.popleft() for _ in range(count)])
        if self._batch is None:
            return ended
        self._num_steps += 1
        events = self._batch.step()
        for event in events:
            if event.finish:
                self._drop(event.request_id)
        return ended + events

    def _drop(self, request_id: str) -> None:
        slot = self._live.pop(request_id)
        slot.open = False
        if slot in self._waiting:
            self._waiting.remove(slot)
        elif self._batch and not any(other.open for other in self._batch.slots):
            self._batch = None

    def stats(self) -> dict[str, Any]:
        return {"steps": self._num_steps, "compilations": 0}

    def close(self) -> None:
        self._live.clear()
        self._waiting.clear()
        self._batch = None
