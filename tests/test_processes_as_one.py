"""What holds of engines in processes of their own, be they replicas or those that compute prompts and go on with them: how many
requests they take at once, and which they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.config import EngineConfig
from common.engine import Engine
from common.errors import DrainingError, QueueFullError, RequestError
from common.interface import ServingEngine
from common.replicas.data_parallel import Replicas
from common.replicas.disaggregated import Disaggregated
from common.request import Request, SamplingParams
from tests.history_runner import HistoryRunner
from tests.http_server import Awake
from tests.processes import VOCAB, history, requests, running
from tests.replica_mains import PAIR, SMALL

__all__ = ["history"]

Kind = tuple[type[ServingEngine], EngineConfig, int]
KINDS: dict[str, Kind] = {"two replicas": (Replicas, SMALL, 2), "a prefill and a decode engine": (Disaggregated, PAIR, 1)}
"""Class, configuration, and how many there are that go on."""


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def several(kind: Kind, history: Path) -> Iterator[ServingEngine]:
    with running(*kind[:2]) as engine:
        yield engine


def ended(engine: ServingEngine) -> list[str]:
    """Which end, once nothing is left to do."""
    return sorted(event.request_id for events in engine.run([]).values() for event in events if event.finish)


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt_token_ids": (1, VOCAB)},
        {"prompt_token_ids": tuple(range(3, 300)) * 2},
        {"params": SamplingParams(max_tokens=600)},
        {"params": SamplingParams(n=2)},
        {"params": SamplingParams(allowed_token_ids=[3], min_tokens=1, stop_token_ids=[3])},
        {"params": SamplingParams(logit_bias={VOCAB: 1.0})},
        {"output_token_ids": (1,) * 16},
        {"request_id": "live"},
        {"parent": "live"},
    ],
)
def test_what_one_engine_refuses_is_refused_in_the_same_words(several: ServingEngine, bad: dict[str, Any]) -> None:
    runner = HistoryRunner(num_pages=200, vocab_size=VOCAB, max_seqs=8)
    one = Engine(runner, replace(SMALL, data_parallel_size=1), num_pages=200)
    live = Request(request_id="live", prompt_token_ids=(5, 6, 7))
    wrong = replace(Request(request_id="bad", prompt_token_ids=(5, 6)), **bad)
    messages = []
    for engine in (one, several):
        engine.add(live)
        with pytest.raises(RequestError) as refused:
            engine.add(wrong)
        messages.append((str(refused.value), refused.value.param))
        engine.run([])
    assert messages[0] == messages[1]
    one.close()


def test_of_requests_that_come_together_as_many_are_taken_as_run_at_once_and_may_wait(kind: Kind, history: Path) -> None:
    of, config, at_once = kind
    with running(of, replace(config, max_num_seqs=1, max_waiting=2)) as engine:
        (history / "hang").touch()
        taken = []
        for request in requests(9, output=30):
            with suppress(QueueFullError):
                engine.add(request)
                taken.append(request.request_id)
        (history / "hang").unlink()
        assert len(taken) == at_once + 2 and ended(engine) == sorted(taken)


def test_the_queue_has_one_bound_and_a_drain_stops_all(kind: Kind, history: Path) -> None:
    of, config, at_once = kind
    (history / "slow").touch()
    with running(of, replace(config, max_num_seqs=1, max_waiting=3)) as engine:
        asked = requests(9, output=30)
        for request in asked[:at_once]:
            engine.add(request)
        Awake().wait(lambda: not engine.step(0) and engine.stats()["num_running"] == at_once)
        for request in asked[at_once : at_once + 3]:
            engine.add(request)
        with pytest.raises(QueueFullError, match="3 requests wait already, and max_waiting=3"):
            engine.add(asked[at_once + 3])
        engine.drain()
        with pytest.raises(DrainingError):
            engine.add(asked[at_once + 3])
        assert ended(engine) == [request.request_id for request in asked[: at_once + 3]]
    (history / "slow").unlink()
