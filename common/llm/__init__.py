"""Text in, text out, for people: `LLM("smollm2-135m", backend="jax").generate(prompts, SamplingParams(...))`.

The names are those of vLLM. `common.llm.__main__` is the command, `common.llm.async_llm` the class for asyncio.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from common.errors import BackendError
from common.interface import Progress
from common.llm.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
    completion_output,
    request_output,
)
from common.llm.prompts import Prompt, RequestBuilder, check_grammar, is_one, params_of_each
from common.process.interrupt import defer_sigint
from common.replicas.factory import open_engine
from common.request import Request, SamplingParams, Status, TokenEvent, expect, fan_out
from common.sampling.beam_search import Beam, BeamSearchParams, beam_search
from common.schedule.embeddings import Pooler, Pooling, check_pooling
from common.schedule.prepare import prepare
from common.text.chat import ChatTemplate, Message
from common.text.opened import defaults_of, tokenizer_of
from common.text.output import Delta, OutputText
from common.text.tokenizer import Tokenizer
from common.weights.checkpoint import open_checkpoint
from common.weights.zoo import resolve


class LLM:
    """A model with its tokenizer on one engine. Threads may share it: their requests run in the same steps. `close` gives its
    memory back; so does a `with` block."""

    def __init__(
        self,
        model: str | os.PathLike[str] = "smollm2-135m",
        *,
        backend: str = "jax",
        tokenizer: str | None = None,
        chat_template: str | None = None,
        generation_config: str = "auto",
        use_tqdm: bool = True,
        **options: Any,
    ) -> None:
        """Load `model`, a name, a path or a hub id (`common.weights.zoo`). `options` are those of `Checkpoint.engine_config`.

        `tokenizer`, `chat_template` and `generation_config` replace those of the model (`common.text.opened`).
        `use_tqdm` allows progress bars; they show on terminals only. Raises a `TandemError` for whatever cannot work.
        """
        checkpoint = open_checkpoint(resolve(os.fspath(model) if isinstance(model, os.PathLike) else model))
        config = checkpoint.engine_config(**options)
        self.tokenizer: Tokenizer = tokenizer_of(checkpoint, tokenizer, chat_template)
        self._defaults = SamplingParams(**defaults_of(checkpoint, generation_config))
        self._pooler = Pooler.of(checkpoint)
        self._builder = RequestBuilder(checkpoint.config, self.tokenizer)
        with _progress(use_tqdm) as progress:
            self.engine = open_engine(backend, checkpoint, config, progress)
        self._chat: ChatTemplate | None = None
        self._lock = threading.RLock()  # over the engine and the two tables of requests
        self._live: dict[str, OutputText] = {}
        self._deltas: dict[str, list[Delta]] = {}
        self._closed = False
        # Threads hold on to an engine of several processes: a cell of a notebook that is run again would leave it behind.
        self._end = weakref.finalize(self, self.engine.close)
        self._end.atexit = False

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue every prompt; the outputs are in the order of the prompts. `sampling_params` is one for all, or one each.

        Where a text spells special tokens, it means them. If a prompt is refused (`RequestError`), none is run. A request that
        fails on the way ends with the finish_reason `error`, and the others go on.
        """
        many = [prompts] if is_one(prompts) else list(prompts)
        texts, requests = self._requests(many, sampling_params)
        vocab_size = self.engine.caps.vocab_size
        fans = [
            fan_out(request if request.params.n == 1 else replace(request, prepared=prepare(request, vocab_size)))
            for request in requests
        ]
        found = self._run([each for fan in fans for each in fan], use_tqdm)
        deltas = [[found[each.request_id] for each in fan] for fan in fans]
        return [
            request_output(self.tokenizer, text, request, mine)
            for text, request, mine in zip(texts, requests, deltas, strict=True)
        ]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        use_tqdm: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several. Special tokens that a message spells are plain text.

        `options` are those of `ChatTemplate.encode`, such as `continue_final_message` and `chat_template_kwargs`."""
        many = isinstance(messages, Sequence) and len(messages) > 0 and isinstance(messages[0], list | tuple)
        conversations: Any = messages if many else [messages]
        prompts = [self.chat_prompt(c, tools=tools, **options) for c in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Return the prompt that the chat template makes of a conversation, for `generate` and `stream`."""
        self._expect_open()
        self._chat = self._chat or ChatTemplate(self.tokenizer)
        text, token_ids = self._chat.encode(messages, tools=tools, **options)
        return {"prompt": text, "prompt_token_ids": token_ids}

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters of requests that give none: those that the model recommends, in its generation_config.json."""
        return self._defaults

    def get_tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the model."""
        return self.tokenizer

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[RequestOutput]:
        """The continuations of every prompt that a beam search finds, best first; see `common.sampling.beam_search`.

        If a prompt is refused (`RequestError`), none is run. Raises `BackendError` where the model gives no logprobs.
        """
        expect(isinstance(params, BeamSearchParams), f"params must be BeamSearchParams, got {type(params).__name__}.")
        many = [prompts] if is_one(prompts) else list(prompts)
        texts, requests = self._requests(many, SamplingParams(max_tokens=params.max_tokens, ignore_eos=params.ignore_eos))
        with self._admitted(requests):  # refuses here what could not be followed to its end
            pass
        token_ids = [request.prompt_token_ids for request in requests]
        found = beam_search(token_ids, params, self._builder.eos_token_ids, self._likeliest)
        return [
            RequestOutput(
                request.request_id,
                text,
                list(request.prompt_token_ids),
                [self._beam(i, request, beam) for i, beam in enumerate(beams)],
                finished=True,
            )
            for text, request, beams in zip(texts, requests, found, strict=True)
        ]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Generator[Delta, None, None]:
        """Continue one prompt token by token. Several streams may be read in turn; leaving one early aborts its request."""
        expect(is_one(prompt), f"A stream continues one prompt, got {type(prompt).__name__}; use generate, or a stream each.")
        _, (request,) = self._requests([prompt], sampling_params)
        expect(request.params.n == 1, f"A stream has one continuation, got n={request.params.n}; use generate, or n streams.")
        return self._stream(request)

    def embed(self, prompts: Prompt | Sequence[Prompt], *, pooling: Pooling = "last") -> list[EmbeddingRequestOutput]:
        """Where every prompt lies: the final normed state of its last token, or the mean of all tokens', made length 1.

        Streams that are open go on afterwards. Raises `RequestError` for a prompt that cannot be computed.
        """
        self._expect_open()
        check_pooling(pooling)
        many = [prompts] if is_one(prompts) else list(prompts)
        tokens = [list(self._builder.tokens(i, prompt)[1]) for i, prompt in enumerate(many)]
        pooled: list[np.ndarray] = []
        while len(pooled) < len(tokens):
            pooled += [self._pooler.pool(x_TD, pooling) for x_TD in self._states(tokens[len(pooled) :])]
        return [
            EmbeddingRequestOutput(self._builder.next_id(), ids, EmbeddingOutput(x_D.tolist()))
            for ids, x_D in zip(tokens, pooled, strict=True)
        ]

    def close(self) -> None:
        """Idempotent."""
        if not self._closed:
            self._closed = True  # before the lock: another thread that steps stops
            with self._lock:
                self._builder.close()
                self._end()
                if self._chat is not None:
                    self._chat.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _expect_open(self) -> None:
        expect(not self._closed, "This LLM is closed; make a new one.")

    def _requests(
        self, prompts: Sequence[Any], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> tuple[list[str | None], list[Request]]:
        self._expect_open()
        each = params_of_each(prompts, sampling_params, self._defaults)
        pairs = [self._builder.tokens(i, prompt) for i, prompt in enumerate(prompts)]
        with self._lock:  # `close` ends the grammars' threads
            self._expect_open()
            requests = [self._builder.request(ids, params) for (_, ids), params in zip(pairs, each, strict=True)]
        for request in requests:
            try:
                check_grammar(request)
            except CancelledError:
                self._expect_open()  # `close` was called meanwhile
                raise
        return [text for text, _ in pairs], requests

    @contextmanager
    def _admitted(self, requests: Iterable[Request]) -> Iterator[None]:
        """All requests are in the engine, or none; at the end those that are unfinished are aborted, and all forgotten."""
        added: list[str] = []
        try:
            with self._lock, defer_sigint():
                for request in requests:
                    self.engine.add(request)
                    added.append(request.request_id)
                    self._live[request.request_id] = OutputText(self.tokenizer, request)
                    self._deltas[request.request_id] = []
            yield
        finally:
            with self._lock, defer_sigint():
                for name in added:
                    self._deltas.pop(name, None)
                    if self._live.pop(name, None) is not None:
                        self.engine.abort(name)

    def _step(self) -> list[tuple[str, Delta]]:
        """One step of the engine. What became visible, by request, is appended to `_deltas` and returned."""
        fresh: list[tuple[str, Delta]] = []
        for event in self.engine.step():
            name = event.request_id
            if name not in self._live:
                continue  # ended here before, by a stop string or by its reader
            delta = self._live[name].push(event)
            if delta.finish is not None:
                del self._live[name]
                if event.finish is None:
                    self.engine.finish(name, str(delta.stop_reason))
            self._deltas[name].append(delta)
            fresh.append((name, delta))
        return fresh

    def _run(self, requests: Sequence[Request], use_tqdm: bool) -> dict[str, list[Delta]]:
        """What became visible of each, by its id."""
        mine = {request.request_id for request in requests}
        unfinished = set(mine)
        with _progress(use_tqdm and len(requests) > 1) as progress, self._admitted(requests), defer_sigint() as let_in:
            begin, tokens = time.perf_counter(), 0
            while unfinished:
                with self._lock:
                    self._expect_open()
                    fresh = [] if unfinished.isdisjoint(self._live) else self._step()  # or another thread took their last one
                    unfinished &= self._live.keys()
                tokens += sum(len(delta.token_ids) for name, delta in fresh if name in mine)
                speed = tokens / (time.perf_counter() - begin)
                progress(len(requests) - len(unfinished), len(requests), f"{speed:.0f} tokens/s")
                let_in()
            return {name: self._deltas[name] for name in mine}

    def _states(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The states of as many prompts as the engine takes at once. Others' requests go on meanwhile."""
        with self._lock, defer_sigint():
            self._expect_open()
            states = self.engine.hidden_states(prompts)
        try:
            while not states.done():
                with self._lock, defer_sigint():
                    if not states.done():  # another thread may have stepped
                        self._expect_open()
                        self._step()
            return states.result()
        finally:
            states.cancel()

    def _stream(self, request: Request) -> Generator[Delta, None, None]:
        name = request.request_id
        with self._admitted([request]):
            while name in self._live or self._deltas[name]:
                with self._lock, defer_sigint():
                    if not self._deltas[name]:
                        self._expect_open()
                        if name in self._live:  # another thread may have taken its last step
                            self._step()
                    ready, self._deltas[name] = self._deltas[name], []
                yield from ready

    def _likeliest(self, sequences: Sequence[tuple[int, ...]], k: int) -> list[list[tuple[int, float]]]:
        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=k, detokenize=False)
        requests = [Request(request_id=self._builder.next_id(), prompt_token_ids=ids, params=params) for ids in sequences]
        found = self._run(requests, use_tqdm=False)
        answers = []
        for (delta,) in [found[request.request_id] for request in requests]:
            if delta.logprobs is None:
                raise BackendError(f"A beam search cannot go on: {delta.error}")
            answers.append(list(zip(delta.logprobs.top_ids, delta.logprobs.top_logprobs, strict=True)))
        return answers

    def _beam(self, index: int, request: Request, beam: Beam) -> CompletionOutput:
        *before, last = [TokenEvent(request.request_id, token, 0.0) for token in beam.token_ids]
        text = OutputText(self.tokenizer, request)
        last = replace(last, finish=Status.FINISHED_STOP if beam.ended else Status.FINISHED_LENGTH)
        output = completion_output(self.tokenizer, index, request, [text.push(event) for event in (*before, last)])
        return replace(output, cumulative_logprob=beam.logprob)


@contextmanager
def _progress(enabled: bool) -> Iterator[Progress]:
    """A progress bar on standard error, if people are watching."""
    # One that was closed before Python started is None.
    if not (enabled and all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))):
        yield lambda done, total, what: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with ProgressBar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
