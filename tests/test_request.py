"""Sampling values that cannot be served are refused as they are built."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.errors import RequestError
from common.request import Request, SamplingParams, fan_out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", x) for x in (-0.1, math.nan, math.inf, 10**400, "hot", True, None)),
        *(("top_p", x) for x in (0.0, -0.5, 1.0001, math.nan, "all")),
        *(("min_p", x) for x in (-0.1, 1.1, math.nan)),
        *(("n", x) for x in (0, 65, 10**9, 2.0, True)),
        *(("top_k", x) for x in (-2, 1.5, 2**40, True)),
        *(("max_tokens", x) for x in (0, -1, 2**31, 1.5, "10", True)),
        *(("min_tokens", x) for x in (-1, 17, 0.5)),  # 17 exceeds the default cap
        *(("seed", x) for x in (-1, 2**64, 1.0, "a")),
        *((name, x) for name in ("logprobs", "prompt_logprobs") for x in (-1, 21, True, 1.0)),
        *((name, x) for name in ("presence_penalty", "frequency_penalty") for x in (-2.1, 2.1, math.nan, "a", True, None)),
        *(("repetition_penalty", x) for x in (0.0, -1.0, 1e-9, math.inf, math.nan, True)),
        *(("logit_bias", x) for x in ({-1: 1.0}, {"5": 1.0}, {1.0: 1.0}, {1: "a"}, {1: math.nan}, {1: None}, 5, [(1, 2, 3)])),
        ("logit_bias", [(1, 2.0), (1, 3.0)]),
        *(("allowed_token_ids", x) for x in ([], 5, [-1], [2**31], [1.0], "ab")),
        *(("bad_words", x) for x in (5, [""], [" "], [b"a"], [None], ["\ud800"])),
        *(("stop", x) for x in (5, [""], [b"a"], ["a", None], ["\ud800"])),
        *(("stop_token_ids", x) for x in (5, [-1], [1.0], [2**31])),
        *((flag, "no") for flag in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize")),
    ],
)
def test_a_sampling_value_that_cannot_be_served_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize("name", ["n", "max_tokens", "top_k", "seed", "temperature", "stop", "stop_token_ids", "logit_bias"])
def test_a_number_that_python_does_not_print_is_refused_like_others(name: str) -> None:
    huge = 10**5000
    value = {"stop": [huge], "stop_token_ids": [huge], "logit_bias": {huge: 1.0}}.get(name, huge)
    with pytest.raises(RequestError, match=f"{name} must .* too large to print"):
        SamplingParams(**{name: value})


def test_numbers_of_numpy_are_numbers_and_its_truth_values_are_none() -> None:
    whole, real = np.int64(3), np.float32(0.5)
    params = SamplingParams(
        n=whole, max_tokens=whole, top_k=np.uint8(3), seed=np.uint64(2**64 - 1), logprobs=whole, temperature=real, top_p=real,
        stop_token_ids=[whole], allowed_token_ids=[whole], logit_bias={whole: real},
    )  # fmt: skip
    assert params == SamplingParams(
        n=3, max_tokens=3, top_k=3, seed=2**64 - 1, logprobs=3, temperature=0.5, top_p=0.5,
        stop_token_ids=[3], allowed_token_ids=[3], logit_bias={3: 0.5},
    )  # fmt: skip
    kinds = {type(value) for value in vars(params).values()}
    assert kinds <= {int, float, bool, tuple, type(None)}
    assert {type(x) for x in (*params.stop_token_ids, *(params.allowed_token_ids or ()))} == {int}
    for name in ("top_k", "temperature"):
        with pytest.raises(RequestError, match=name):
            SamplingParams(**{name: np.bool_(True)})


def test_several_continuations_that_would_be_the_same_are_refused() -> None:
    with pytest.raises(RequestError, match="n must be 1 where temperature is 0"):
        SamplingParams(n=2, temperature=0.0)


@pytest.mark.parametrize(("seed", "seeds"), [(7, [7, 8, 9]), (2**64 - 1, [2**64 - 1, 0, 1]), (None, [None] * 3)])
def test_n_continuations_are_n_requests_with_a_seed_each_and_the_first_as_parent(
    seed: int | None, seeds: list[int | None]
) -> None:
    asked = Request(request_id="a", prompt_token_ids=(1, 2), params=SamplingParams(n=3, seed=seed), cache_salt="s", priority=4)
    fan = fan_out(asked)
    assert [r.request_id for r in fan] == ["a-0", "a-1", "a-2"] and [r.parent for r in fan] == [None, "a-0", "a-0"]
    assert [r.own_seed for r in fan] == seeds and all(r.params is asked.params for r in fan)
    assert {(r.prompt_token_ids, r.cache_salt, r.priority) for r in fan} == {((1, 2), "s", 4)}
    assert fan_out(fan[0]) == [fan[0]]


def test_stop_takes_one_string_a_list_or_nothing() -> None:
    nothing: Any = None
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=nothing, stop_token_ids=nothing) == SamplingParams()


def test_biases_are_clamped_and_kept_in_the_order_of_ids() -> None:
    params = SamplingParams(logit_bias={9: 1000, 3: -0.5, 4: -(10**400)})
    assert params.logit_bias == ((3, -0.5), (4, -100.0), (9, 100.0))
    assert replace(params, top_k=3).logit_bias == params.logit_bias


def test_bad_words_need_their_tokens() -> None:
    with pytest.raises(RequestError, match="brings no tokens"):
        Request(request_id="a", prompt_token_ids=(1,), params=SamplingParams(bad_words=["x"]))
    with pytest.raises(RequestError, match="has no tokens"):
        Request(request_id="a", prompt_token_ids=(1,), bad_words=((1,), ()))


def test_a_misspelt_parameter_is_told_the_nearest() -> None:
    with pytest.raises(RequestError, match="Did you mean 'temperature'"):
        SamplingParams(temprature=1)  # type: ignore[call-arg]


def test_an_empty_prompt_or_name_is_refused() -> None:
    with pytest.raises(RequestError, match="prompt is empty"):
        Request(request_id="a", prompt_token_ids=())
    with pytest.raises(RequestError, match="request_id"):
        Request(request_id="", prompt_token_ids=(1,))


@pytest.mark.parametrize("name", ["request_id", "cache_salt", "parent"])
@pytest.mark.parametrize("value", ["\ud800", "a\udfff", 5, b"a"])
def test_a_string_of_a_request_that_utf_8_cannot_encode_is_refused(name: str, value: Any) -> None:
    """The engine encodes these strings within a step, where an error would be that of all requests."""
    with pytest.raises(RequestError, match=f"{name} must be") as caught:
        Request(**{"request_id": "a", "prompt_token_ids": (1,), name: value})
    assert caught.value.param == name
