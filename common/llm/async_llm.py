"""`AsyncLLM`: a model for asyncio programs. Requests of one event loop run in the same steps of one engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, Self

from common.errors import BackendError, RequestError
from common.llm.outputs import RequestOutput, request_output
from common.llm.prompts import Prompt, RequestBuilder, check_grammar, is_one
from common.replicas.factory import open_engine
from common.request import Request, SamplingParams, expect, fan_out
from common.schedule.prepare import prepare
from common.serve.errors import ApiError
from common.serve.worker import Call, Worker
from common.text.opened import defaults_of, tokenizer_of
from common.text.output import Delta, OutputText
from common.text.tokenizer import Tokenizer
from common.weights.checkpoint import open_checkpoint
from common.weights.zoo import resolve


class AsyncLLM:
    """A model with its tokenizer and its engine, which steps on a thread of its own.

    All calls belong to one event loop. `shutdown` ends the engine, and so does an `async with` block.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "smollm2-135m",
        *,
        backend: str = "jax",
        tokenizer: str | None = None,
        generation_config: str = "auto",
        **options: Any,
    ) -> None:
        """Load `model` and warm the engine up; this blocks. The parameters are those of `LLM`."""
        checkpoint = open_checkpoint(resolve(os.fspath(model) if isinstance(model, os.PathLike) else model))
        config = checkpoint.engine_config(**options)
        self.tokenizer: Tokenizer = tokenizer_of(checkpoint, tokenizer)
        self._defaults = SamplingParams(**defaults_of(checkpoint, generation_config))
        self._builder = RequestBuilder(checkpoint.config, self.tokenizer)
        self._worker = Worker(lambda: open_engine(backend, checkpoint, config))
        self.caps = self._worker.wait_ready().caps
        self._calls: dict[str, Call] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continue one prompt. Each step of the engine that adds to it yields the output so far, the last one `finished`.

        Leaving the iteration early aborts the request. Raises `RequestError` for a prompt or parameters that cannot be served,
        and `BackendError` if the engine is gone.
        """
        params = self._defaults if sampling_params is None else sampling_params
        expect(isinstance(params, SamplingParams), f"sampling_params must be SamplingParams, got {type(params).__name__}.")
        expect(is_one(prompt), f"generate continues one prompt, got {type(prompt).__name__}; call it once for each prompt.")
        self._bind()
        text, token_ids = await asyncio.to_thread(self._builder.tokens, 0, prompt)
        request = self._builder.request(token_ids, params, request_id)
        await asyncio.to_thread(check_grammar, request)
        call = await asyncio.to_thread(self._call, request)
        expect(request.request_id not in self._calls, f"A request with the id {request.request_id!r} is running.")
        self._calls[request.request_id] = call
        choices: list[list[Delta]] = [[] for _ in call.requests]
        try:
            await self._worker.run(call)
            async for pieces in call:
                for piece in pieces:
                    choices[piece.number].append(piece.delta)
                yield request_output(self.tokenizer, text, request, choices, finished=not call.left)
        except ApiError as error:
            raise BackendError(str(error)) from error
        finally:
            del self._calls[request.request_id]
            if call.left:
                self._worker.abort(call)

    def _call(self, request: Request) -> Call:
        """Return the requests of all continuations, prepared. It takes time: a thread calls it."""
        fan = fan_out(replace(request, prepared=prepare(request, self.caps.vocab_size)))
        return Call(fan, [OutputText(self.tokenizer, each) for each in fan])

    async def abort(self, request_id: str) -> bool:
        """End a request with the finish_reason `abort`. Returns whether there was one to end."""
        call = self._calls.get(request_id)
        if call is None:
            return False
        names = [request.request_id for request in call.requests]
        return any(await self._worker.ask(lambda engine: [engine.abort(name) for name in names]))

    def get_tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the model."""
        return self.tokenizer

    def shutdown(self) -> None:
        """End the engine; a request that runs raises `BackendError`. Idempotent; waits for the step in progress."""
        self._builder.close()
        self._worker.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.shutdown)

    def _bind(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            self._worker.start()
        if self._loop is not loop:
            raise RequestError("This AsyncLLM belongs to another event loop; make one for each loop.")
