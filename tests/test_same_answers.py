"""The same answers from both engines, whatever a request asks for: 200 requests drawn over all parameters.

Under native kernels logits are equal in every bit, and so is all that follows. Under a framework's they are rounded
differently, and now and then a number lies so near to the edge between two tokens that either may be chosen: whether it does is
judged by what was measured there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from common.llm import LLM
from common.llm.outputs import RequestOutput
from common.request import Request, SamplingParams, TokenEvent
from common.system.hardware import cxx_compiler
from experiments.correctness.judge import common_prefix
from experiments.correctness.reference import NumpyModel
from tests.backends import BACKENDS, checkpoint, engine_config
from tests.judged import MODEL, Judged, drawn, filters_of, judged_run, pairwise, uniform_of
from tests.numpy_sampler import Filters, adjusted, choices

REQUESTS = 200
ROUNDING = 1e-4
"""What rounding explains of a float32 logit."""
native = pytest.mark.skipif(cxx_compiler() is None, reason="there is no C++ compiler")


class Parting(NamedTuple):
    """Where two engines first chose differently."""

    request_id: str
    place: int
    tokens: tuple[int, int]
    justified: bool


def justified(
    exact: np.ndarray, rounded: Sequence[np.ndarray], tokens: Sequence[int], filters: Filters, u: float, tolerance: float
) -> bool:
    """Whether both choices are open to whoever knows the float64 logits only up to twice the error that was measured, and that
    error is one of rounding. `rounded` are the engines' own logits of the same place, after the same masks and penalties."""
    finite = np.isfinite(exact)
    error = max(float(np.abs(own[finite] - exact[finite]).max()) for own in rounded)
    if not error <= tolerance or any(np.isfinite(own[~finite]).any() for own in rounded):
        return False
    if filters.temperature == 0:
        return all(exact[token] >= exact.max() - 2 * error for token in tokens)
    return set(tokens) <= choices(exact, filters, u, slack=2 * error / filters.temperature)


def compared(
    requests: Sequence[Request], spies: Sequence[Judged], events: Sequence[dict[str, list[TokenEvent]]], engine_seed: int
) -> list[Parting]:
    """Every request whose outputs part, and whether rounding explains it."""
    model, parted = NumpyModel(checkpoint(MODEL)), []
    for number, request in enumerate(requests):
        name = request.request_id
        outputs = [[event.token_id for event in each[name] if event.token_id is not None] for each in events]
        place = common_prefix(*outputs)
        if all(len(output) == place for output in outputs):
            assert events[0][name][-1].finish == events[1][name][-1].finish, name
            continue
        history = outputs[0][:place]
        tokens = (outputs[0][place], outputs[1][place])
        logits = [model.logits([*request.prompt_token_ids, *history])[-1], *(spy.sampled[name, place] for spy in spies)]
        exact, *rounded = (adjusted(each, request, history) for each in logits)
        u = uniform_of(request, number, place, engine_seed)
        explained = justified(exact, rounded, tokens, filters_of(request.params), u, ROUNDING)
        parted.append(Parting(name, place, tokens, explained))
    return parted


@pytest.mark.parametrize("kernels", ["framework", pytest.param("native", marks=native)])
def test_200_requests_drawn_over_all_parameters_get_the_same_answers(kernels: str) -> None:
    """And each engine's are what the NumPy sampler makes of its own logits."""
    config = engine_config(kernels=kernels, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128)
    requests = drawn(REQUESTS, seed=1)
    runs = [judged_run(backend, config, requests) for backend in BACKENDS]
    for spy, events, _ in runs:
        assert spy.changed > 50 and all(each[-1].finish for each in events.values())
        tokens = {token.token_id for each in events.values() for token in each}
        assert {11, 12} <= tokens and len(tokens) > 40
    parted = compared(requests, [spy for spy, *_ in runs], [events for _, events, _ in runs], config.seed)
    assert all(each.justified for each in parted), parted
    if kernels == "native":
        assert not parted
        places = [spy.sampled for spy, *_ in runs]
        assert places[0].keys() == places[1].keys()
        assert all(np.array_equal(logits, places[1][at]) for at, logits in places[0].items())


LIKELY = np.array([1.0, 0.5, -2.0, -np.inf])
"""Of which the first is drawn below 0.603, the second below 0.970."""
EDGE = float(np.exp(1.0) / np.exp(LIKELY).sum())


def moved(logits: np.ndarray, token: int, by: float) -> np.ndarray:
    return logits + by * (np.arange(len(logits)) == token)


@pytest.mark.parametrize(
    ("filters", "u", "off", "expected"),
    [
        (Filters(), EDGE - 1e-6, 1e-5, True),
        (Filters(), EDGE - 1e-3, 1e-5, False),
        (Filters(), EDGE - 1e-3, 1e-3, False),
        (Filters(temperature=0.0), 0.5, 1e-5, False),
        (Filters(temperature=0.5, top_p=0.9, min_p=0.1), 0.2, 1e-5, False),
    ],
    ids=["at the edge", "off it", "an error that is none of rounding", "greedy and clear", "far inside"],
)
def test_a_parting_is_justified_at_the_edge_between_two_tokens_alone(
    filters: Filters, u: float, off: float, expected: bool
) -> None:
    rounded = [moved(LIKELY, 0, off), moved(LIKELY, 0, -off)]
    assert justified(LIKELY, rounded, (0, 1), filters, u, ROUNDING) is expected


def test_a_greedy_tie_is_justified_and_a_token_that_only_one_engine_masks_is_not() -> None:
    tied = moved(LIKELY, 1, 0.5 - 1e-6)
    greedy = Filters(temperature=0.0)
    assert justified(tied, [tied, moved(tied, 1, 1e-6)], (0, 1), greedy, 0.5, ROUNDING)
    unmasked = np.where(np.isfinite(tied), tied, 2.0)
    assert not justified(tied, [tied, unmasked], (0, 3), greedy, 0.5, ROUNDING)


def test_a_planted_defect_is_no_rounding() -> None:
    """One engine's logits of one request, off by a little more than rounding, and the token that follows from them."""
    config = engine_config(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128)
    requests = drawn(REQUESTS, seed=1)[:8]
    spy, events, _ = judged_run("torch", config, requests)
    name = next(r.request_id for r in requests if len(events[r.request_id]) > 3)
    wrong = {**events, name: [*events[name][:2], replace(events[name][2], token_id=1)]}
    assert [each.justified for each in compared(requests, [spy, spy], [events, wrong], config.seed)] == [False]


TEXTS: dict[str, tuple[Any, ...]] = {
    "temperature": (0.0, 1.5),
    "n": (1, 3),
    "stop": ((), ("e",), ("he", "an")),
    "include_stop_str_in_output": (False, True),
    "min_tokens": (0, 6),
    "max_tokens": (8, 20),
    "bad_words": ((), ("the",)),
    "logprobs": (None, 2),
    "prompt_logprobs": (None, 1),
    "skip_special_tokens": (True, False),
    "ignore_eos": (True, False),
    "top_p": (1.0, 0.7),
    "repetition_penalty": (1.0, 1.3),
}
SOME = ["the rest", "Once upon a time", "in", "and more than can run at once", "x" * 40]


def answers(backend: str, params: Sequence[SamplingParams]) -> list[RequestOutput]:
    options: dict[str, Any] = {"dtype": "float32", "kernels": "native", "threads": 1, "max_num_seqs": 4}
    options |= {"max_num_batched_tokens": 32, "max_model_len": 256, "num_blocks": 80, "use_tqdm": False}
    with LLM(MODEL, backend=backend, **options) as llm:
        return llm.generate([SOME[i % len(SOME)] for i in range(len(params))], params, use_tqdm=False)


@native
def test_texts_scores_and_reasons_are_the_same_whatever_is_asked_of_them() -> None:
    drawn = [params for params in pairwise(TEXTS, 40, 2) if params["temperature"] > 0 or params["n"] == 1]
    params = [SamplingParams(**(each | {"seed": i})) for i, each in enumerate(drawn)]
    ours, theirs = (answers(backend, params) for backend in BACKENDS)
    assert ours == theirs
    reasons = {(each.finish_reason, type(each.stop_reason)) for output in ours for each in output.outputs}
    assert reasons >= {("length", type(None)), ("stop", str)}
    assert len({each.text for output in ours for each in output.outputs}) > len(ours) // 2
