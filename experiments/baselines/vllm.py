"""`engine=vllm`: vLLM on a CPU as an outside engine, its own step loop called in this process.

In its usual form the engine and its worker are processes of their own, and on a machine of few cores one of these is kept from
computing; here scheduler and model share one process, as in our engines, so that all threads compute and all time and memory is
seen. vLLM compiles by default, and so does `configs/engine/vllm.yaml`.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import EngineConfig, expect
from common.engine import pool_size
from common.interface import Caps, Progress, page_bytes
from common.request import Logprobs, Request, Status, TokenEvent
from common.system.hardware import choose
from experiments.baselines.greedy import GreedyEngine, check_request

if TYPE_CHECKING:
    from common.weights.checkpoint import Checkpoint

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # OMP_NUM_THREADS is set already, and engines that take turns share the cores
    "VLLM_NO_USAGE_STATS": "1",
    "KMP_BLOCKTIME": "5",  # milliseconds that Intel's OpenMP spins for more work: vLLM's own choice
}


def build_engine(checkpoint: Checkpoint, config: EngineConfig, progress: Progress | None = None) -> VllmEngine:
    """Load a Hugging Face directory. The memory for keys and values is what our engines take; `compile` is torch.compile. vLLM
    loads, compiles and warms up in one call, so that all of it counts as loading and nothing is told in between."""
    choose(config.device, {"cpu": lambda: None})
    os.environ.update(_ENVIRONMENT)
    _prefer_intel_openmp()
    from torch._dynamo.utils import counters
    from vllm import EngineArgs, LLMEngine, SamplingParams  # type: ignore[import-not-found]
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend  # type: ignore[import-not-found]

    head_dim, served = checkpoint.config.head_dim, CPUAttentionBackend.get_supported_head_sizes()
    expect(head_dim in served, f"engine=vllm has attention on a CPU for heads of {served} only; this model's have {head_dim}.")
    max_model_len = config.model_len(checkpoint.config)
    page = page_bytes(checkpoint.config, config)
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=str(checkpoint.path),
            skip_tokenizer_init=True,
            dtype=config.dtype,
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            block_size=config.block_size,
            kv_cache_memory_bytes=page * pool_size(config, max_model_len, page),
            enable_prefix_caching=config.enable_prefix_caching,
            enable_chunked_prefill=config.enable_chunked_prefill,
            enforce_eager=not config.compile,
            disable_log_stats=True,
        )
    )
    caps = Caps(
        backend="vllm",
        device="cpu",
        dtypes=("float32", "bfloat16"),
        kernels=("framework",),
        max_tokens=config.max_num_batched_tokens,
        max_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        vocab_size=checkpoint.config.vocab_size,
    )

    params = partial(SamplingParams, temperature=0.0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA)
    return VllmEngine(engine, caps, params, lambda: int(counters["stats"]["unique_graphs"]))


def _prefer_intel_openmp() -> None:
    """Load the OpenMP that vLLM's manual wants preloaded, before torch brings its own; nothing where it is not installed."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    if library.exists():
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class VllmEngine(GreedyEngine[int | None]):
    """Greedy requests of a fixed length, served by vLLM's own scheduler. Of each, how many log-probabilities it wants."""

    def __init__(self, engine: Any, caps: Caps, params: Callable[..., Any], compilations: Callable[[], int]) -> None:
        """`engine` is an `LLMEngine`; `params` makes its `SamplingParams` from max_tokens and logprobs; `compilations` counts
        the graphs compiled so far."""
        super().__init__(caps)
        self._engine, self._params, self._compilations = engine, params, compilations
        self._counters = {"steps": 0, "prefix_cache_queries": 0, "prefix_cache_hits": 0}

    def add(self, request: Request) -> None:
        output_len = check_request(request, self._caps, self._live)
        prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
        self._engine.add_request(
            request.request_id, prompt, self._params(max_tokens=output_len, logprobs=request.params.logprobs)
        )
        self._live[request.request_id] = request.params.logprobs

    def step(self, timeout: float | None = None) -> list[TokenEvent]:
        events, self._ended = self._ended, []
        if not self._live:
            return events
        outputs = self._engine.step()
        now = time.perf_counter()
        self._counters["steps"] += 1
        for output in outputs:
            events += self._events(output, now)
        return events

    def _events(self, output: Any, now: float) -> list[TokenEvent]:
        """Of one request, its new tokens: one, unless vLLM held some back."""
        (completion,) = output.outputs
        count = self._live[output.request_id]
        finish = Status(completion.finish_reason) if completion.finish_reason else None
        if finish:
            del self._live[output.request_id]
            self._counters["prefix_cache_queries"] += len(output.prompt_token_ids)
            self._counters["prefix_cache_hits"] += output.num_cached_tokens or 0
        infos = completion.logprobs or [None] * len(completion.token_ids)
        events = [
            TokenEvent(output.request_id, token, now, _logprobs(info, token, count))
            for token, info in zip(completion.token_ids, infos, strict=True)
        ]
        if finish:
            last = events.pop() if events else TokenEvent(output.request_id, None, now)
            events.append(replace(last, finish=finish))
        return events

    def _drop(self, request_id: str) -> None:
        self._engine.abort_request([request_id])
        del self._live[request_id]

    def stats(self) -> dict[str, Any]:
        return self._counters | {"compilations": self._compilations()}

    def reset_prefix_cache(self) -> bool:
        return not self._live and bool(self._engine.reset_prefix_cache())

    def close(self) -> None:
        self._engine.engine_core.shutdown()


def _logprobs(info: Mapping[int, Any] | None, token: int, count: int | None) -> Logprobs | None:
    """vLLM gives the `count` likeliest tokens, and the chosen one if it is not among them, by id and with ranks from 1."""
    if info is None:
        return None
    top = sorted(info, key=lambda other: (info[other].rank, other))[:count]
    return Logprobs(info[token].logprob, info[token].rank, top, [info[other].logprob for other in top])
