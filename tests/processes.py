"""Engines in processes of their own: how tests start them, what they ask of them, and the judge of what comes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from common.config import EngineConfig
from common.interface import ServingEngine
from common.replicas.factory import open_engine
from common.request import Request, SamplingParams, TokenEvent
from common.sampling.seeds import mix64
from tests.backends import checkpoint
from tests.history_runner import Expected, expected
from tests.http_server import known_history
from tests.replica_mains import MODEL

E = TypeVar("E", bound=ServingEngine)
VOCAB = 320
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1},
    {"seed": 4},
    {},  # whose seed the engine draws
    {"temperature": 0.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "logprobs": 0},
    {"top_p": 0.8, "min_tokens": 5, "stop_token_ids": [*range(0, VOCAB, 3)]},
)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Makes `history`, which needs no framework, known to processes; the folder whose files say what goes wrong in them."""
    with known_history(tmp_path_factory.mktemp("history")) as control:
        yield control


@contextmanager
def running(kind: type[E], config: EngineConfig, backend: str = "history") -> Iterator[E]:
    """The engine of this kind that a configuration asks for."""
    engine = open_engine(backend, checkpoint(MODEL), config)
    try:
        assert isinstance(engine, kind)
        yield engine
    finally:
        engine.close()


def requests(count: int = 24, output: int = 40, name: str = "r") -> list[Request]:
    rng = random.Random(1)
    return [
        Request(
            request_id=f"{name}{i}",
            prompt_token_ids=[rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 90))],
            params=SamplingParams(**{"max_tokens": output} | KINDS[i % len(KINDS)]),
        )
        for i in range(count)
    ]


def told(events: Sequence[TokenEvent]) -> list[TokenEvent]:
    """What one engine and another must agree on."""
    return [replace(event, time=0.0, num_cached_tokens=None) for event in events]


def right(request: Request, number: int) -> Expected:
    return expected(request, vocab_size=VOCAB, max_tokens=512, seed=mix64(0, number))


def judge(asked: Sequence[Request], events: dict[str, list[TokenEvent]]) -> None:
    """Each has the tokens of the oracle and one end."""
    for number, request in enumerate(asked):
        mine, oracle = events[request.request_id], right(request, number)
        assert [event.token_id for event in mine if event.token_id is not None] == oracle.tokens
        assert [event.finish for event in mine] == [None] * (len(mine) - 1) + [oracle.finish]
        assert mine[0].prompt_logprobs == oracle.prompt_logprobs
        if (k := request.params.logprobs) is not None:
            found = [
                (x.logprob, x.rank, list(x.top_ids), list(x.top_logprobs)) for x in (event.logprobs for event in mine) if x
            ]
            judged = [oracle.logprobs(i, k, VOCAB) for i in range(len(mine))]
            assert found == [(x.logprob, x.rank, x.top_ids, x.top_logprobs) for x in judged]
