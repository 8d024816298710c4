"""What outside engines have in common: which requests they take, and how these end early."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Container
from typing import Generic, TypeVar

from common.interface import Caps, InferenceEngine
from common.request import Request, Status, TokenEvent, expect

Live = TypeVar("Live")


def check_request(request: Request, caps: Caps, live: Container[str], advice: str = "") -> int:
    """How many tokens `request` is to get. Raises `RequestError` for one that is not greedy and of a fixed length, that is
    longer than `caps` allow (with `advice` on that), that holds no tokens of the model, or whose id is among the `live`."""
    params, prompt = request.params, request.prompt_token_ids
    where, output_len = f"Request {request.request_id!r}", params.max_tokens or 0
    expect(
        params.greedy and params.ignore_eos and not params.stop and not params.stop_token_ids and output_len > 0,
        f"{where}: engine={caps.backend} takes greedy requests with ignore_eos=True, max_tokens and no stops.",
    )
    expect(all(0 <= token < caps.vocab_size for token in prompt), f"{where}: token ids must lie in [0, {caps.vocab_size}).")
    expect(
        len(prompt) + output_len <= caps.max_model_len,
        f"{where}: {len(prompt)} prompt and {output_len} output tokens exceed max_model_len={caps.max_model_len}.{advice}",
    )
    expect(request.request_id not in live, f"{where} is still live; give each request an id of its own.")
    return output_len


class GreedyEngine(InferenceEngine, Generic[Live]):
    """An engine of greedy requests of a fixed length."""

    def __init__(self, caps: Caps) -> None:
        self._caps = caps
        self._live: dict[str, Live] = {}
        """What the engine holds of each request that has not ended."""
        self._ended: list[TokenEvent] = []
        """What the next step is to tell of requests that have ended between steps."""

    @property
    def caps(self) -> Caps:
        return self._caps

    @abstractmethod
    def _drop(self, request_id: str) -> None:
        """Take a request out of the live ones, and compute it no further."""

    def abort(self, request_id: str) -> bool:
        if request_id not in self._live:
            return False
        self._drop(request_id)
        self._ended.append(TokenEvent(request_id, None, time.perf_counter(), finish=Status.FINISHED_ABORT))
        return True

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._ended)

    def reset_prefix_cache(self) -> bool:
        """For an engine that keeps nothing from one request to another."""
        return not self.has_work
