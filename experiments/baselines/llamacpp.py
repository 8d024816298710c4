"""`engine=llamacpp`: llama.cpp as an outside engine, batched the way its own server batches.

It is driven through its C API, not through llama-server: so no HTTP, JSON or sampler chain stands between a token and its time
stamp, as none does in the other engines, a step takes as many tokens as theirs, and log-probabilities can be had. What the
server adds to the library is the loop below. Of the binding, llama-cpp-python, only its declarations of the C API are used.

Settings are the fastest of those tried on a CPU: flash attention, keys and values in float16 (llama.cpp's default), and a cache
for each slot rather than one for all, in which every token would attend over the masked tokens of every other request.

Where float32 is asked for, llama.cpp still looks GELU up in a table of float16, and so leaves the tolerance with Gemma.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from gguf import GGMLQuantizationType

from common.config import EngineConfig, expect
from common.engine import pool_size
from common.errors import CheckpointError
from common.interface import Caps, Progress, page_bytes
from common.request import Logprobs, Request, Status, TokenEvent
from common.system.hardware import choose, cores
from experiments.baselines.greedy import GreedyEngine, check_request
from experiments.correctness.judge import log_softmax

if TYPE_CHECKING:
    from common.weights.checkpoint import Checkpoint

_ATTENTION = {
    "float32": (GGMLQuantizationType.F32, "LLAMA_FLASH_ATTN_TYPE_DISABLED"),  # flash attention rounds to float16 inside
    "bfloat16": (GGMLQuantizationType.F16, "LLAMA_FLASH_ATTN_TYPE_ENABLED"),
}
"""dtype → that of keys and values, and whether attention is fused."""


def build_engine(checkpoint: Checkpoint, config: EngineConfig, progress: Progress | None = None) -> LlamaCppEngine:
    """Load a GGUF file, which brings its dtype. The slots share as much memory for keys and values as our engines take."""
    choose(config.device, {"cpu": lambda: None})
    wanted = config.model_len(checkpoint.config)
    tokens = config.block_size * pool_size(config, wanted, page_bytes(checkpoint.config, config))
    slot_len = min(wanted, tokens // config.max_num_seqs)
    expect(slot_len >= 2, f"{config.max_num_seqs} slots cannot share {tokens} tokens; lower max_num_seqs or raise num_blocks.")
    caps = Caps(
        backend="llamacpp",
        device="cpu",
        dtypes=("float32", "bfloat16"),
        kernels=("framework",),
        max_tokens=config.max_num_batched_tokens,
        max_seqs=config.max_num_seqs,
        max_model_len=slot_len,
        vocab_size=checkpoint.config.vocab_size,
    )
    return LlamaCppEngine(LlamaContext(checkpoint.path, config, slot_len, progress), caps)


class Decoder(Protocol):
    """One model and its caches, as the loop sees them."""

    def decode(self, tokens: list[int], positions: list[int], slots: list[int], wanted: list[bool]) -> np.ndarray:
        """Run one batch, all four [T]: each token, its position, whose it is, and whether its logits are wanted.

        Returns the wanted logits, float32 [R, V], valid until the next call."""

    def forget(self, slot: int) -> None:
        """Drop the keys and values of one slot."""

    def close(self) -> None: ...


class LlamaContext:
    """`Decoder` over the C API of llama.cpp."""

    def __init__(self, path: Path, config: EngineConfig, slot_len: int, progress: Progress | None = None) -> None:
        """`config.max_num_seqs` slots of `slot_len` tokens."""
        import llama_cpp as api  # type: ignore[import-not-found]

        self._api = api
        logging.getLogger("llama-cpp-python").setLevel(logging.WARNING)
        api.llama_backend_init()
        print(f"llama-cpp-python {api.__version__}, {api.llama_print_system_info().decode()}", file=sys.stderr)
        self._model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        if not self._model:
            raise CheckpointError(f"llama.cpp cannot load {path}; its log says why.")
        if progress:
            progress(1, 1, "load")
        self._context = api.llama_init_from_model(self._model, self._options(config, slot_len))
        if not self._context:
            raise CheckpointError(
                f"llama.cpp cannot serve {path} with {config.max_num_seqs} slots of {slot_len} tokens; its log says why."
            )
        self._memory = api.llama_get_memory(self._context)
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        size = config.max_num_batched_tokens
        self._tokens, self._positions, self._slots = (np.zeros(size, np.int32) for _ in range(3))
        self._wanted = np.zeros(size, np.int8)
        # Every token belongs to one slot, so neither their number nor the pointers to them ever change.
        self._counts = np.ones(size, np.int32)
        self._lists = self._slots.ctypes.data + self._slots.itemsize * np.arange(size, dtype=np.uintp)
        self._batch = api.llama_batch(
            token=_pointer(self._tokens, ctypes.c_int32),
            pos=_pointer(self._positions, ctypes.c_int32),
            n_seq_id=_pointer(self._counts, ctypes.c_int32),
            seq_id=_pointer(self._lists, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(self._wanted, ctypes.c_int8),
        )
        self.decode([0], [0], [0], [True])  # touches every weight: the file is only mapped so far
        self.forget(0)

    def _options(self, config: EngineConfig, slot_len: int) -> Any:
        options = self._api.llama_context_default_params()
        options.n_ctx = config.max_num_seqs * slot_len
        options.n_batch = options.n_ubatch = config.max_num_batched_tokens
        options.n_seq_max = options.n_outputs_max = config.max_num_seqs
        options.n_threads = options.n_threads_batch = config.threads or cores()
        cache_type, flash = _ATTENTION[config.dtype]
        options.type_k = options.type_v = cache_type
        options.flash_attn_type = getattr(self._api, flash)
        options.kv_unified = False
        options.swa_full = False  # layers with a window keep that window, as in llama-server
        return options

    def decode(self, tokens: list[int], positions: list[int], slots: list[int], wanted: list[bool]) -> np.ndarray:
        size = len(tokens)
        self._tokens[:size], self._positions[:size] = tokens, positions
        self._slots[:size], self._wanted[:size] = slots, wanted
        self._batch.n_tokens = size
        code = self._api.llama_decode(self._context, self._batch)
        if code:
            raise RuntimeError(f"llama_decode gave {code} for a batch of {size} tokens.")
        return np.ctypeslib.as_array(self._api.llama_get_logits(self._context), (sum(wanted), self._vocab_size))

    def forget(self, slot: int) -> None:
        self._api.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def close(self) -> None:
        if self._context:
            self._api.llama_free(self._context)
            self._api.llama_model_free(self._model)
            self._context = None


def _pointer(array: np.ndarray, kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


@dataclass(eq=False)
class _Served:
    """One request, which waits or has a slot."""

    request: Request
    output_len: int
    slot: int = -1
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    emitted: int = 0
    last: int = -1
    """The newest output token."""

    @property
    def prompting(self) -> bool:
        return self.computed < len(self.request.prompt_token_ids)

    def take(self, room: int) -> tuple[int, ...]:
        """The tokens to run next, at most `room` of them."""
        if not self.prompting:
            return (self.last,)
        return self.request.prompt_token_ids[self.computed : self.computed + room]


class LlamaCppEngine(GreedyEngine[_Served]):
    """Greedy requests of a fixed length, continuously batched: a step has the next token of every request that decodes, and as
    much of the prompts, in order of arrival, as its budget of tokens leaves room for."""

    def __init__(self, decoder: Decoder, caps: Caps) -> None:
        """The decoder has `caps.max_seqs` slots of `caps.max_model_len` tokens, and takes `caps.max_tokens` at once."""
        super().__init__(caps)
        self._decoder = decoder
        self._free_slots = list(range(caps.max_seqs))
        self._waiting: deque[_Served] = deque()
        self._running: list[_Served] = []
        self._num_steps = 0

    def add(self, request: Request) -> None:
        advice = f" It has {self._caps.max_seqs} slots of equal size: lower max_num_seqs or raise num_blocks for longer ones."
        each = _Served(request, check_request(request, self._caps, self._live, advice))
        self._live[request.request_id] = each
        self._waiting.append(each)

    def step(self, timeout: float | None = None) -> list[TokenEvent]:
        while self._waiting and self._free_slots:
            each = self._waiting.popleft()
            each.slot = self._free_slots.pop(0)
            self._running.append(each)
        events, self._ended = self._ended, []
        if not self._running:
            return events
        tokens, positions, slots, wanted, sampled = self._batch()
        logits_RV = self._decoder.decode(tokens, positions, slots, wanted)
        chosen = logits_RV.argmax(1).tolist() if sampled else []  # the first of equals, so the lowest id
        infos = [_logprobs(*row) for row in zip(logits_RV, chosen, sampled, strict=True)]
        now = time.perf_counter()
        self._num_steps += 1
        return events + [self._emit(*each, now) for each in zip(sampled, chosen, infos, strict=True)]

    def _batch(self) -> tuple[list[int], list[int], list[int], list[bool], list[_Served]]:
        """What `Decoder.decode` takes, and whose logits it will give."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        wanted: list[bool] = []
        sampled: list[_Served] = []
        # llama.cpp runs neighbouring slots together, and starts another pass over the weights where it finds a gap.
        decoding = sorted((each for each in self._running if not each.prompting), key=lambda each: each.slot)
        for each in [*decoding, *(each for each in self._running if each.prompting)]:
            piece = each.take(self._caps.max_tokens - len(tokens))
            tokens += piece
            positions += range(each.computed, each.computed + len(piece))
            slots += [each.slot] * len(piece)
            wanted += [False] * len(piece)
            each.computed += len(piece)
            if not each.prompting:
                wanted[-1] = True
                sampled.append(each)
        return tokens, positions, slots, wanted, sampled

    def _emit(self, each: _Served, token: int, info: Logprobs | None, now: float) -> TokenEvent:
        each.last, each.emitted = token, each.emitted + 1
        done = each.emitted == each.output_len
        if done:
            self._drop(each.request.request_id)
        return TokenEvent(each.request.request_id, token, now, info, Status.FINISHED_LENGTH if done else None)

    def _drop(self, request_id: str) -> None:
        each = self._live.pop(request_id)
        if each in self._waiting:
            self._waiting.remove(each)
            return
        self._running.remove(each)
        self._decoder.forget(each.slot)
        self._free_slots = sorted([*self._free_slots, each.slot])

    def stats(self) -> dict[str, Any]:
        return {"steps": self._num_steps, "compilations": 0}

    def close(self) -> None:
        self._decoder.close()


def _logprobs(logits_V: np.ndarray, token: int, each: _Served) -> Logprobs | None:
    """Of the raw logits, if the request asked for them."""
    count = each.request.params.logprobs
    if count is None:
        return None
    logprobs_V = log_softmax(logits_V)
    top = np.argsort(-logprobs_V, kind="stable")[:count]
    rank = 1 + int((logprobs_V > logprobs_V[token]).sum())
    return Logprobs(float(logprobs_V[token]), rank, top.tolist(), logprobs_V[top].tolist())
