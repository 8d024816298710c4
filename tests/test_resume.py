"""A request that brings output of its own goes on behind it as if it had never stopped."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors import RequestError
from common.request import Request, SamplingParams, Status, StructuredOutputsParams, TokenEvent
from common.text.grammar import Grammars
from common.text.tokenizer import open_tokenizer
from common.weights.zoo import resolve
from tests.history_runner import expected
from tests.test_engine import VOCAB, make_engine, request, right, tokens
from tests.test_grammar import history_engine

KINDS = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "top_p": 0.9, "seed": 5},
    "penalties": {"frequency_penalty": 0.5, "presence_penalty": 0.3, "repetition_penalty": 1.2},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": [*range(0, VOCAB, 2)]},
    "stops": {"stop_token_ids": [*range(0, VOCAB, 9)]},
    "biases": {"logit_bias": {3: 1.0}, "allowed_token_ids": [*range(0, VOCAB, 3)], "temperature": 0.7, "seed": 3},
    "logprobs": {"logprobs": 3, "prompt_logprobs": 2},
}


def rest(asked: Request, events: list[TokenEvent], at: int) -> list[TokenEvent]:
    """What is left of a whole output behind its first `at` tokens, as far as it does not tell of the prompt."""
    return [replace(event, time=0.0, prompt_logprobs=None, num_cached_tokens=None) for event in events[at:]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0, 2])
def test_at_every_place_the_rest_is_what_it_would_have_been(kind: str, depth: int) -> None:
    asked = request("r", range(13), max_tokens=20, **KINDS[kind])
    whole = make_engine(depth=depth)[0].run([asked])["r"]
    assert tokens(whole) == right(asked).tokens
    for at in range(1, len(tokens(whole))):
        engine, _ = make_engine(depth=depth, num_pages=12)
        crowd = [request(f"c{i}", range(i, 12), max_tokens=9) for i in range(3)]
        got = engine.run([*crowd, replace(asked, output_token_ids=tokens(whole)[:at])])["r"]
        assert rest(asked, got, 0) == rest(asked, whole, at)
        assert got[0].prompt_logprobs is None and got[0].num_cached_tokens is None  # told with the first token of all


def test_bad_words_across_the_place_where_it_goes_on_do_not_come_up() -> None:
    plain = right(request("r", max_tokens=12)).tokens
    word = tuple(plain[4:6])
    asked = Request(
        request_id="r",
        prompt_token_ids=tuple(range(10)),
        params=SamplingParams(max_tokens=12, temperature=0.0, bad_words=["w"]),
        bad_words=(word,),
    )
    whole = expected(asked, vocab_size=VOCAB, max_tokens=90).tokens
    assert whole[:5] == plain[:5] and whole[5] != plain[5]
    got = make_engine()[0].run([replace(asked, output_token_ids=tuple(whole[:5]))])["r"]
    assert tokens(got) == whole[5:]


def test_a_grammar_goes_on_where_the_output_stands() -> None:
    tokenizer = open_tokenizer(resolve("tiny-llama"))
    with Grammars(tokenizer, tokenizer.eos_token_ids, tokenizer.vocab_size) as grammars:
        params = SamplingParams(
            max_tokens=40, temperature=0.0, structured_outputs=StructuredOutputsParams(regex="[a-z]{3}-[0-9]{4}")
        )
        asked = Request(
            request_id="r",
            prompt_token_ids=(5, 6, 7),
            params=params,
            eos_token_ids=tokenizer.eos_token_ids,
            grammar=grammars.compile(params.structured_outputs),
        )
        whole = history_engine().run([asked])["r"]
        for at in range(1, len(tokens(whole))):
            got = history_engine().run([replace(asked, output_token_ids=tuple(tokens(whole)[:at]))])["r"]
            assert tokens(got) == tokens(whole)[at:] and got[-1].finish is whole[-1].finish


def test_output_that_the_grammar_does_not_allow_ends_the_request_with_an_error() -> None:
    tokenizer = open_tokenizer(resolve("tiny-llama"))
    with Grammars(tokenizer, tokenizer.eos_token_ids, tokenizer.vocab_size) as grammars:
        params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="[0-9]+"))
        wrong = tuple(tokenizer.encode("word", add_special_tokens=False))
        asked = Request(
            request_id="r", prompt_token_ids=(5,), params=params, grammar=grammars.compile(params.structured_outputs)
        )
        (end,) = history_engine().run([replace(asked, output_token_ids=wrong)])["r"]
        assert end.finish is Status.FINISHED_ERROR and end.token_id is None


def test_no_more_output_may_be_brought_than_is_asked_for() -> None:
    engine, _ = make_engine()
    with pytest.raises(RequestError, match=r"8 of 8 output tokens already"):
        engine.add(replace(request("r"), output_token_ids=tuple(range(8))))
    with pytest.raises(RequestError, match=r"output_token_ids\[1\]"):
        engine.add(replace(request("r"), output_token_ids=(1, VOCAB)))
    assert not engine.has_work


def test_it_counts_as_no_new_request_to_the_prefix_cache_nor_to_who_measures_the_queue() -> None:
    engine, _ = make_engine()
    engine.step_log = []
    engine.run([request("first"), replace(request("second"), output_token_ids=(1, 2, 3))])
    assert engine.stats()["prefix_cache_queries"] == 10
    assert [name for record in engine.step_log for name in record.started] == ["first"]
