"""Structured output: what is asked for is what comes, on both engines; and whose grammar fails fails alone."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest
from pydantic import BaseModel

from common.batch import Batch, Mask
from common.config import EngineConfig
from common.engine import Engine
from common.errors import RequestError
from common.interface import StepHandle
from common.llm import LLM
from common.request import (
    CANNOT_GO_ON,
    MAX_GRAMMAR,
    STUCK,
    Request,
    SamplingParams,
    Status,
    StructuredOutputsParams,
    TokenEvent,
    fan_out,
)
from common.schedule.trace import Recorder
from common.serve.errors import ApiError
from common.serve.protocol import ChatRequest, parse
from common.text.grammar import Grammar, Grammars, Matcher
from common.text.output import OutputText
from common.text.tokenizer import Tokenizer, open_tokenizer
from common.text.tool_calls import ToolCalls
from common.weights.zoo import resolve
from tests.backends import checkpoint, engine_config, make_engine
from tests.history_runner import HistoryRunner
from tests.http_server import SMALL, Served, serving
from tests.replays import replay

MODEL = "tiny-llama"
VOCAB = checkpoint(MODEL).config.vocab_size
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["new", "old"]}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "home"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["zip"],
            "additionalProperties": False,
        }
    },
}
WANTED: list[dict[str, Any]] = [
    {"json": PERSON},
    {"json": json.dumps({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5})},
    {"regex": r"(ab|c){2,5}-[0-9]{3}"},
    {"choice": ["red", "redder", 'a "quoted" ü\n', "blue"]},
    {"grammar": 'start: "<" item ("," item)~1..3 ">"\nitem: /[a-c]+[xyz]/'},
    {"grammar": 'root ::= "sum" (" " [0-9] [0-9])+ "."'},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return open_tokenizer(resolve(MODEL))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    with Grammars(tokenizer, tokenizer.eos_token_ids, VOCAB) as grammars:
        yield grammars


def request(
    grammars: Grammars, name: str, wanted: dict[str, Any] | None, prompt: Sequence[int] = (5, 6), **params: Any
) -> Request:
    structured = None if wanted is None else StructuredOutputsParams(**wanted)
    return Request(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**({"max_tokens": 160, "seed": 1} | params), structured_outputs=structured),
        eos_token_ids=grammars._eos,
        grammar=grammars.compile(structured),
    )


def text_of(tokenizer: Tokenizer, asked: Request, events: Sequence[TokenEvent]) -> str:
    output = OutputText(tokenizer, asked)
    return "".join(output.push(event).text for event in events)


def tokens_of(events: dict[str, list[TokenEvent]]) -> dict[str, list[int | None]]:
    return {name: [event.token_id for event in mine] for name, mine in events.items()}


def is_what_was_wanted(wanted: dict[str, Any], text: str) -> bool:
    match wanted:
        case {"json": schema}:
            jsonschema.validate(json.loads(text), json.loads(schema) if isinstance(schema, str) else schema)
            return True
        case {"regex": pattern}:
            return re.fullmatch(pattern, text) is not None
        case {"choice": choices}:
            return text in choices
        case {"grammar": grammar}:
            pattern = r"<[a-c]+[xyz](,[a-c]+[xyz]){1,3}>" if "start" in grammar else r"sum( [0-9]{2})+\."
            return re.fullmatch(pattern, text) is not None
    return False


# ── on the engines ───────────────────────────────────────────────────────────────────────────────────────────────────────


def everything(grammars: Grammars, **params: Any) -> list[Request]:
    """Each format with several seeds, and requests without one among them."""
    asked = [
        request(grammars, f"{i}-{seed}", wanted, prompt=range(3, 9 + i + seed), seed=seed, **params)
        for i, wanted in enumerate(WANTED)
        for seed in range(4)
    ]
    return asked + [request(grammars, f"free-{i}", None, prompt=range(4, 20 + i), max_tokens=30) for i in range(3)]


@pytest.mark.parametrize("kernels", ["framework", "native"])
def test_every_output_is_what_was_asked_for(grammars: Grammars, tokenizer: Tokenizer, kernels: str) -> None:
    """And the same on both engines."""
    config = engine_config(kernels=kernels)
    asked = everything(grammars)
    jax, torch = (make_engine(backend, MODEL, config).run(asked) for backend in ("jax", "torch"))
    assert tokens_of(jax) == tokens_of(torch)
    for one in asked[:-3]:
        events = torch[one.request_id]
        assert events[-1].finish is Status.FINISHED_STOP, (one.request_id, text_of(tokenizer, one, events))
        text = text_of(tokenizer, one, events)
        assert is_what_was_wanted(WANTED[int(one.request_id[0])], text), text
    assert len({text_of(tokenizer, one, torch[one.request_id]) for one in asked[:4]}) > 1


def test_a_grammar_holds_beside_other_demands_on_the_logits(grammars: Grammars, tokenizer: Tokenizer, backend: str) -> None:
    digits = [tokenizer.encode(digit, add_special_tokens=False)[0] for digit in "12345"]
    params: dict[str, Any] = {
        "allowed_token_ids": [*digits, *tokenizer.eos_token_ids],
        "repetition_penalty": 1.5,
        "logit_bias": {digits[0]: -100.0},
        "logprobs": 2,
        "top_k": 40,
        "min_tokens": 4,
    }
    asked = request(grammars, "a", {"regex": "[0-9]{2,6}"}, **params)
    greedy = request(grammars, "b", {"regex": "[a-z]{3}"}, temperature=0.0)
    events = make_engine(backend, MODEL, engine_config()).run([asked, greedy])
    assert re.fullmatch("[2-5]{4,6}", text_of(tokenizer, asked, events["a"]))
    assert re.fullmatch("[a-z]{3}", text_of(tokenizer, greedy, events["b"]))
    assert all(event.logprobs is not None for event in events["a"])


def test_a_step_without_a_grammar_brings_no_mask_and_one_with_it_asks_once(
    grammars: Grammars, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(backend, MODEL, engine_config())
    submit, seen = engine.runner.submit, []

    def spy(batch: Batch, mask: Mask = None) -> StepHandle:
        calls: list[str] = []

        def counted() -> np.ndarray:
            calls.append(threading.current_thread().name)
            assert mask is not None
            return mask()

        pending = submit(batch, None if mask is None else counted)
        seen.append((batch.mask_rows is not None, batch.masks is not None, len(calls)))
        return pending

    monkeypatch.setattr(engine.runner, "submit", spy)
    engine.run([request(grammars, "a", None, max_tokens=5)])
    assert set(seen) == {(False, False, 0)}
    seen.clear()
    engine.run([request(grammars, "a", None, max_tokens=5), request(grammars, "b", {"choice": ["red"]})])
    assert set(seen) == {(False, False, 0), (True, False, 1)}


def test_a_mask_that_comes_late_does_what_one_in_the_batch_does(grammars: Grammars, backend: str, tmp_path: Path) -> None:
    """A trace holds the masks that came: it is replayed without a grammar."""
    config = engine_config()
    engine = make_engine(backend, MODEL, config)
    inner, engine.runner = engine.runner, Recorder(engine.runner, tmp_path / "trace")
    engine.run(everything(grammars)[::5])
    engine.runner.stop()
    steps = list(replay(tmp_path / "trace", inner))
    assert len(steps) > 10 and any(batch.masks is not None for _, batch, _, _ in steps)
    assert all(old.tokens.tolist() == new.tokens.tolist() for _, _, old, new in steps)


# ── in the scheduler, with a runner that obeys masks ─────────────────────────────────────────────────────────────────────


def history_engine(kind: type[HistoryRunner] = HistoryRunner, *, pages: int = 200, depth: int = 0, **options: Any) -> Engine:
    runner = kind(num_pages=pages, block_size=4, vocab_size=VOCAB, max_seqs=8, depth=depth)
    config = EngineConfig(
        **({"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 256} | options)
    )
    return Engine(runner, config, num_pages=pages)


@pytest.mark.parametrize("options", [{"pages": 50}, {"depth": 2}, {"pages": 50, "depth": 1}, {"max_num_batched_tokens": 9}])
def test_preemption_and_steps_in_flight_leave_the_output_as_it_is(grammars: Grammars, options: dict[str, Any]) -> None:
    asked = everything(grammars)
    right = history_engine().run(asked)
    engine = history_engine(**options)
    assert tokens_of(engine.run(asked)) == tokens_of(right)
    assert (engine.stats()["num_preemptions"] > 0) == ("pages" in options)
    assert not engine.runner.violations and engine.stats()["kv_cache_usage"] == 0  # type: ignore[attr-defined]


def test_a_step_that_raises_loses_no_place_in_a_grammar(grammars: Grammars) -> None:
    asked = everything(grammars)
    right = history_engine().run(asked)
    engine = history_engine()
    for one in asked:
        engine.add(one)
    events: dict[str, list[TokenEvent]] = {one.request_id: [] for one in asked}
    steps = 0
    while engine.has_work:
        steps += 1
        if steps % 7 == 0:
            setattr(engine.runner, "fail_result" if steps % 2 else "fail_submit", RuntimeError("a fault"))
        for event in engine.step():
            events[event.request_id].append(event)
    assert tokens_of(events) == tokens_of(right)
    assert engine.stats()["num_resets"] > 3


def test_forks_go_their_own_ways(grammars: Grammars, tokenizer: Tokenizer, backend: str) -> None:
    wanted = {"regex": "[a-z]{6}"}
    fan = fan_out(request(grammars, "a", wanted, prompt=range(3, 40), n=4, seed=3))
    engine = make_engine(backend, MODEL, engine_config())
    events = engine.run(fan)
    texts = [text_of(tokenizer, one, events[one.request_id]) for one in fan]
    assert engine.scheduler.num_forks == 3 and len(set(texts)) > 1
    assert all(is_what_was_wanted(wanted, text) for text in texts)


def test_it_waits_for_its_grammar_and_holds_up_nobody(grammars: Grammars) -> None:
    compiled = grammars.compile(StructuredOutputsParams(choice=["red"]))
    assert compiled is not None
    late: Future[Grammar] = Future()
    engine = history_engine()
    waiting = replace(request(grammars, "late", {"choice": ["red"]}), grammar=late)
    for one in (waiting, request(grammars, "other", None, max_tokens=4)):
        engine.add(one)
    events = [event for _ in range(8) for event in engine.step()]
    assert [event.request_id for event in events] == ["other"] * 4 and events[-1].finish
    late.set_result(compiled.result())
    while engine.has_work:
        events += engine.step()
    assert events[-1].request_id == "late" and events[-1].finish is Status.FINISHED_STOP


def test_it_can_be_aborted_while_its_grammar_compiles(grammars: Grammars) -> None:
    late: Future[Grammar] = Future()
    engine = history_engine()
    engine.add(replace(request(grammars, "late", {"choice": ["red"]}), grammar=late))
    assert engine.step() == [] and engine.has_work
    assert engine.abort("late")
    assert [event.finish for event in engine.step()] == [Status.FINISHED_ABORT] and not engine.has_work
    late.set_exception(RequestError("nobody is told"))
    engine.add(request(grammars, "next", None, max_tokens=1))
    assert [event.request_id for event in engine.step()] == ["next"]


def test_a_grammar_that_cannot_be_compiled_ends_only_its_request(grammars: Grammars) -> None:
    good = [request(grammars, "a", None, max_tokens=6), request(grammars, "b", {"choice": ["red"]})]
    right = history_engine().run(good)
    engine = history_engine()
    events = engine.run([good[0], request(grammars, "bad", {"regex": "(?=a)b"}), good[1]])
    (end,) = events.pop("bad")
    assert end.finish is Status.FINISHED_ERROR and end.error is not None and "look-around" in end.error
    assert tokens_of(events) == tokens_of(right)


def test_a_grammar_for_another_vocabulary_ends_only_its_request(tokenizer: Tokenizer) -> None:
    with Grammars(tokenizer, tokenizer.eos_token_ids, VOCAB + 40) as other:
        (end,) = history_engine().run([request(other, "a", {"choice": ["red"]})])["a"]
    assert end.finish is Status.FINISHED_ERROR and end.error is not None and str(VOCAB + 40) in end.error


class Heedless(HistoryRunner):
    """It heeds no mask, as a model whose every allowed token is masked by something else."""

    def _allowed(self, batch: Batch) -> np.ndarray:
        return np.ones((len(batch.want), VOCAB), bool)


def test_a_grammar_that_cannot_go_on_ends_only_its_request(grammars: Grammars) -> None:
    free = request(grammars, "free", None, max_tokens=12)
    right = history_engine(Heedless).run([free])
    engine = history_engine(Heedless)
    events = engine.run([request(grammars, "bad", {"regex": "[0-9]{200}"}), free])
    (*_, end) = events.pop("bad")
    assert end.finish is Status.FINISHED_ERROR and end.token_id is None
    assert end.error is not None and "cannot go on" in end.error
    assert tokens_of(events) == tokens_of(right)
    assert engine.stats()["kv_cache_usage"] == 0 and not engine.has_work


@pytest.mark.parametrize("kernels", ["framework", "native"])
@pytest.mark.parametrize(
    "how", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "logprobs": 2}]
)
def test_where_nothing_is_left_it_ends_with_an_error_though_the_token_of_an_empty_row_fits(
    grammars: Grammars, tokenizer: Tokenizer, backend: str, kernels: str, how: dict[str, Any]
) -> None:
    """That token is 0, "!" here."""
    (a,), (b,), (zero,) = (tokenizer.encode(text, add_special_tokens=False) for text in "ab!")
    assert zero == 0
    free = request(grammars, "free", None, max_tokens=6, **how)
    held = replace(request(grammars, "held", {"regex": "a!"}, **how), bad_words=((a, zero),))
    masked = replace(request(grammars, "masked", None, allowed_token_ids=[a], **how), bad_words=((a, a),))
    # Each of the three leaves a token, and any two of them leave one.
    joint = request(grammars, "joint", {"regex": "a[bc!]"}, allowed_token_ids=[a, b, zero], **how)
    joint = replace(joint, bad_words=((a, b), (a, zero)))
    zero_is_allowed = request(grammars, "zero is allowed", {"regex": "ab"}, allowed_token_ids=[a, zero], **how)
    early = replace(request(grammars, "early", {"regex": "a!?"}, min_tokens=2, **how), bad_words=((a, zero),))
    stuck = [held, masked, joint, zero_is_allowed, early]
    engine = make_engine(backend, MODEL, engine_config(kernels=kernels))
    right = engine.run([free])
    events = engine.run([*stuck[:3], free, *stuck[3:]])
    for name in (each.request_id for each in stuck):
        assert tokens_of(events)[name] == [a, None]
        assert events[name][-1].finish is Status.FINISHED_ERROR and events[name][-1].error == STUCK
    assert tokens_of(events)["free"] == tokens_of(right)["free"]


# ── where an output ends ─────────────────────────────────────────────────────────────────────────────────────────────────


def started(grammars: Grammars, **wanted: Any) -> Matcher:
    compiled = grammars.compile(StructuredOutputsParams(**wanted))
    assert compiled is not None
    return compiled.result().start(VOCAB)


def allowed(matcher: Matcher) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[:VOCAB]).tolist())


def test_it_may_end_only_where_the_grammar_may(grammars: Grammars, tokenizer: Tokenizer) -> None:
    matcher, eos = started(grammars, regex="ab?"), set(tokenizer.eos_token_ids)
    a, b = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ab")
    assert not allowed(matcher) & eos and not allowed(matcher) & (tokenizer.special_ids - eos)
    assert matcher.accept(a) is None and eos < allowed(matcher) and not matcher.done
    assert matcher.accept(b) is None and matcher.done


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_last_token_shows_its_text_where_nothing_can_follow(
    grammars: Grammars, tokenizer: Tokenizer, backend: str, ignore_eos: bool
) -> None:
    asked = request(grammars, "a", {"choice": ["red"]}, ignore_eos=ignore_eos)
    events = make_engine(backend, MODEL, engine_config()).run([asked])["a"]
    assert text_of(tokenizer, asked, events) == "red"
    assert events[-1].finish is Status.FINISHED_STOP and events[-1].stop_reason is None
    assert events[-1].token_id not in tokenizer.eos_token_ids


def test_it_ends_with_eos_though_that_is_ignored(grammars: Grammars, tokenizer: Tokenizer) -> None:
    asked = request(grammars, "a", {"regex": "a*"}, ignore_eos=True, max_tokens=200)
    events = history_engine().run([asked])["a"]
    assert events[-1].finish is Status.FINISHED_STOP and events[-1].token_id in tokenizer.eos_token_ids


def test_it_is_cut_at_its_cap(grammars: Grammars, tokenizer: Tokenizer) -> None:
    asked = request(grammars, "a", {"regex": "a{90,}"}, max_tokens=3)
    events = history_engine().run([asked])["a"]
    assert events[-1].finish is Status.FINISHED_LENGTH and set(text_of(tokenizer, asked, events)) == {"a"}


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "one of"),
        ({"json": {}, "regex": "a"}, "one of"),
        *(
            ({"json": x}, "json must be a JSON Schema")
            for x in ("{", "[]", "5", 5, True, [], {"a": {1, 2}}, {"a": float("nan")})
        ),
        ({"json": "[" * 100_000}, "json must be a JSON Schema"),
        *(({"regex": x}, "regex must hold") for x in ("", 5, b"a")),
        *(({"grammar": x}, "grammar must hold") for x in ("", 5)),
        *(({"choice": x}, "choice must be a list") for x in ((), [], "ab", 5)),
        *(({"choice": x}, "choice must hold") for x in ([""], ["a", 5], [None])),
        *(({"json_object": x}, "json_object must be true") for x in (False, "yes")),
        *(({name: "a" * (MAX_GRAMMAR + 1)}, "characters") for name in ("regex", "grammar")),
        ({"choice": ["a" * 1000] * (MAX_GRAMMAR // 1000 + 1)}, "characters"),
        ({"json": {"enum": ["a" * MAX_GRAMMAR]}}, "characters"),
    ],
)
def test_what_is_no_format_is_refused_as_it_is_built(given: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        StructuredOutputsParams(**given)


@pytest.mark.parametrize(
    "wanted",
    [
        *({"regex": x} for x in ("(", "(?=a)b", r"(a)\1", "(" * 16_000, "[z-a]", "a{2,1}", "(" * 16_000 + "a" + ")" * 16_000)),
        *({"json": x} for x in ({"type": "nothing"}, {"$ref": "#"}, {"$ref": "http://x/y"}, {"not": {}, "type": "string"})),
        *({"json": x} for x in ({"enum": []}, {"type": "string", "pattern": "(?=a)b"}, {"type": "integer", "minimum": "a"})),
        {"json": {"type": "object", "properties": {f"p{i}": {} for i in range(2000)}, "additionalProperties": False}},
        *(
            {"grammar": x}
            for x in ("foo", "start: ((", "start: a", "start: a\na: a", 'root ::= "a" b', "root ::= " + "(" * 9000)
        ),
    ],
    ids=lambda wanted: f"{[*wanted]}{str([*wanted.values()])[:40]}",
)
def test_what_cannot_be_compiled_is_refused(grammars: Grammars, wanted: dict[str, Any]) -> None:
    compiled = grammars.compile(StructuredOutputsParams(**wanted))
    assert compiled is not None
    with pytest.raises(RequestError, match="structured_outputs cannot be compiled: ") as caught:
        compiled.result()
    assert not re.search(r"NoExtensionBias|non-verbose|\| start|\({9}", str(caught.value))


CYCLE: dict[str, Any] = {}
CYCLE["items"] = CYCLE
DEEP = "[" * 2000 + "]" * 2000


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"json": {"a": {1, 2}}}, "it holds a value that is no string, number, boolean, null, array or object"),
        ({"json": {"const": float("inf")}}, "it holds NaN or an infinite number"),
        ({"json": {"const": 10**5000}}, "a number in it has too many digits"),
        ({"json": CYCLE}, "it contains itself"),
        ({"json": f'{{"const": {DEEP}}}'}, "it is nested too deeply"),
        ({"json": "{"}, "Expecting property name enclosed in double quotes at line 1, column 2"),
        ({"json": {"minimum": "a"}}, "Expected number for 'minimum', got \"a\""),
        ({"json": {"type": "string", "minLength": -1}}, "Expected integer of at least 0 for 'minLength', got -1"),
        ({"json": {"uniqueItems": True}}, 'these keywords are not supported: ["uniqueItems"]'),
        ({"json": {"type": "number", "multipleOf": 0}}, "multipleOf must be greater than 0"),
        ({"json": {"$ref": "http://x/y"}}, "http://x/y is not in the schema, and nothing is fetched"),
        ({"json": {"properties": {"a": None}}}, "each schema in it must be an object, true or false"),
        ({"json": {"enum": []}}, "type, enum or anyOf must not be an empty array"),
        ({"json": {"required": None}}, "Expected array for 'required', got null"),
        ({"regex": "("}, "cannot be compiled: invalid regex: unclosed group."),
        ({"regex": r"\b"}, r"cannot be compiled: invalid regex: \b is not supported."),
        ({"grammar": 'start: %json {"minimum": "a"}'}, "at 1(8): failed to compile JSON schema: Expected number for 'minimum'"),
        ({"grammar": "root ::= [z-a]"}, "cannot be compiled: invalid regex: invalid character class range"),
        ({"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}, "as GBNF, it is nested too deeply"),
    ],
    ids=lambda part: part[:40] if isinstance(part, str) else "".join(part),
)
def test_a_refusal_is_in_the_words_of_json_and_not_of_python(grammars: Grammars, wanted: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError) as caught:
        compiled = grammars.compile(StructuredOutputsParams(**wanted))
        assert compiled is not None
        compiled.result()
    assert told in str(caught.value)
    assert not re.search(r"NoneType|\b(dict|list|None|f64)\b|serializ|compliant|recursion|sys\.|registry", str(caught.value))


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a{1,1000}){1,1000}", ".*a.{1,400}b.*", "(a|aa)+" * 200])
def test_patterns_that_ruin_other_engines_do_not_ruin_this_one(grammars: Grammars, pattern: str) -> None:
    assert allowed(started(grammars, regex=pattern))


@pytest.mark.parametrize("wanted", [{"regex": "a{1000000}"}, {"json": {"type": "string", "pattern": "^(ab){500000}$"}}])
def test_what_begins_with_more_than_can_be_followed_is_refused(grammars: Grammars, wanted: dict[str, Any]) -> None:
    compiled = grammars.compile(StructuredOutputsParams(**wanted))
    assert compiled is not None
    with pytest.raises(RequestError, match="cannot be compiled: an output may begin with 32768 bytes"):
        compiled.result()


def test_what_is_forced_later_ends_the_output_where_it_is_more_than_can_be_followed(grammars: Grammars) -> None:
    matcher, error = started(grammars, regex="x?a{1000000}"), None
    for _ in range(8):
        error = error or matcher.accept(max(allowed(matcher), default=0))
    assert error is not None and error.startswith(CANNOT_GO_ON + "lexer error")


def test_of_a_long_text_that_is_forced_little_is_cut_into_tokens_each_time(
    grammars: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, encode = list[int](), Tokenizer.encode

    def measured(self: Tokenizer, text: str, **how: Any) -> list[int]:
        lengths.append(len(text))
        return encode(self, text, **how)

    monkeypatch.setattr(Tokenizer, "encode", measured)
    matcher = started(grammars, regex="(red){9000}")
    text = b""
    while len(text) < 3000:
        (token,) = allowed(matcher)
        assert matcher.accept(token) is None
        text += tokenizer.token_bytes(token)
    assert (b"red" * 9000).startswith(text)
    assert lengths and max(lengths) <= 1024


def test_the_same_wish_is_compiled_once_and_few_are_kept(
    grammars: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.text.grammar.MAX_KEPT", 2)
    with Grammars(tokenizer, tokenizer.eos_token_ids, VOCAB) as fresh:
        one, again, *_ = (fresh.compile(StructuredOutputsParams(choice=[x])) for x in ("a", "a", "b", "c"))
        assert one is again
        assert fresh.compile(StructuredOutputsParams(choice=["a"])) is not one
        assert len(fresh._kept) == 2


def test_a_model_that_cannot_end_takes_no_grammar(tokenizer: Tokenizer) -> None:
    with Grammars(tokenizer, (), VOCAB) as endless, pytest.raises(RequestError, match="EOS"):
        endless.compile(StructuredOutputsParams(json_object=True))


def test_a_request_brings_the_grammar_of_what_its_parameters_ask() -> None:
    asked = SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True))
    with pytest.raises(RequestError, match="brings no grammar"):
        Request(request_id="a", prompt_token_ids=(1,), params=asked)
    with pytest.raises(RequestError, match="must be StructuredOutputsParams"):
        SamplingParams(structured_outputs={"json_object": True})


# ── for people: the library and the server ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def llm(backend: str) -> Iterator[LLM]:
    config = {"dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 256, "num_blocks": 80}
    with LLM(MODEL, backend=backend, threads=1, **config) as llm:
        yield llm


def wish(wanted: dict[str, Any], **params: Any) -> SamplingParams:
    return SamplingParams(max_tokens=160, seed=3, structured_outputs=StructuredOutputsParams(**wanted), **params)


def test_the_library_keeps_to_what_was_asked(llm: LLM) -> None:
    params = [wish({"json": PERSON}), wish({"choice": ["red", "blue"]})]
    person, colour = (output.outputs[0] for output in llm.generate(["the", "and"], params))
    jsonschema.validate(json.loads(person.text), PERSON)
    assert colour.text in ("red", "blue")


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (wish({"regex": "("}), "cannot be compiled"),
        (wish({"choice": ["a"]}, bad_words=["a"]), "bad_words must leave a token that the output may begin with"),
        (wish({"regex": "[a-z]{3}"}, allowed_token_ids=[0]), "allowed_token_ids must leave"),
    ],
)
def test_the_library_refuses_what_cannot_begin_before_anything_runs(llm: LLM, bad: SamplingParams, match: str) -> None:
    steps = llm.engine.stats()["steps"]
    with pytest.raises(RequestError, match=match):
        llm.generate(["the", "and"], [wish({"choice": ["red"]}), bad])
    with pytest.raises(RequestError, match=match):
        llm.stream("the", bad)
    assert llm.engine.stats()["steps"] == steps and not llm.engine.has_work


@pytest.fixture(scope="module")
def served(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("serve"), "--backend", backend, *SMALL) as server:
        yield server


class Place(BaseModel):
    zip: int
    open: bool


CHAT: Any = [{"role": "user", "content": "Say it"}]


def test_the_openai_client_parses_what_it_asked_for(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.parse(
            model=MODEL, messages=CHAT, response_format=Place, max_tokens=300, seed=1, logit_bias={"13": -100}
        )
        assert answer.choices[0].finish_reason == "stop" and isinstance(answer.choices[0].message.parsed, Place)
        with pytest.raises(openai.BadRequestError, match="cannot be compiled"):
            wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
            client.chat.completions.create(model=MODEL, messages=CHAT, response_format=wrong)


@pytest.mark.parametrize("name", ["structured_outputs", "guided"])
@pytest.mark.parametrize("wanted", WANTED, ids=lambda wanted: next(iter(wanted)))
def test_the_server_takes_the_formats_of_vllm(served: Served, name: str, wanted: dict[str, Any]) -> None:
    kind, value = next(iter(wanted.items()))
    field = {"structured_outputs": {kind: value, "whitespace_pattern": None}} if name != "guided" else {f"guided_{kind}": value}
    answer = served.complete(prompt="the", max_tokens=200, temperature=1.0, seed=2, **field)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert is_what_was_wanted(wanted, answer["choices"][0]["text"])


def test_a_json_object_is_one_and_streams(served: Served) -> None:
    chunks = served.events(
        "/v1/chat/completions", messages=CHAT, max_tokens=8, response_format={"type": "json_object"}, temperature=1.0, seed=1
    )
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text.startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
def test_a_call_of_a_tool_can_be_demanded(grammars: Grammars, tokenizer: Tokenizer, backend: str, choice: Any) -> None:
    schema = {"type": "object", "properties": {"word": {"enum": ["tea"]}}, "required": ["word"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": schema}}]
    body = parse(ChatRequest, json.dumps({"messages": CHAT, "tools": tools, "tool_choice": choice, "seed": 1}).encode())
    params = body.params(200, None)
    asked = replace(request(grammars, "a", None), params=params, grammar=grammars.compile(params.structured_outputs))
    events = make_engine(backend, MODEL, engine_config()).run([asked])["a"]
    plain, calls = ToolCalls().push(text_of(tokenizer, asked, events), last=True)
    assert plain == "" and [call["function"]["name"] for call in calls] == ["look_up"]
    assert json.loads(calls[0]["function"]["arguments"]) == {"word": "tea"}


def test_a_tool_may_refer_to_its_own_definitions(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """As pydantic's schemas do: beside another tool they are no longer at the root."""
    word = {"type": "object", "properties": {"word": {"const": "tea"}, "$ref": {"const": 1}}, "required": ["word", "$ref"]}
    schema = {
        "type": "object",
        "properties": {"inner": {"$ref": "#/$defs/Word"}},
        "required": ["inner"],
        "additionalProperties": False,
        "$defs": {"Word": word | {"additionalProperties": False}},
    }
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("look_up", "order")]
    asked = {"messages": CHAT, "tools": tools, "tool_choice": {"type": "function", "function": {"name": "order"}}}
    for each in (asked, asked | {"tool_choice": "required"}):
        params = parse(ChatRequest, json.dumps(each | {"seed": 1}).encode()).params(200, None)
        wanted = replace(request(grammars, "a", None), params=params, grammar=grammars.compile(params.structured_outputs))
        events = make_engine("torch", MODEL, engine_config()).run([wanted])["a"]
        _, (call,) = ToolCalls().push(text_of(tokenizer, wanted, events), last=True)
        assert json.loads(call["function"]["arguments"]) == {"inner": {"word": "tea", "$ref": 1}}


@pytest.mark.parametrize("choice", ["required", "any", {"type": "function", "function": {"name": "other"}}, {"type": "x"}])
def test_a_call_that_no_tool_answers_cannot_be_demanded(choice: Any) -> None:
    tools = [] if choice == "required" else [{"type": "function", "function": {"name": "look_up"}}]
    with pytest.raises(ApiError, match="tool_choice"):
        parse(ChatRequest, json.dumps({"messages": CHAT, "tools": tools, "tool_choice": choice}).encode())


@pytest.mark.parametrize(
    "field",
    [
        *(
            {"response_format": x}
            for x in ({}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"schema": "x"}})
        ),
        *({"structured_outputs": x} for x in ({}, {"json": {}, "regex": "a"}, {"regex": "a", "whitespace_pattern": " "})),
        *({"guided_regex": x} for x in ("(", "", 5, "(" * 30_000, "a" * (MAX_GRAMMAR + 1))),
        {"guided_choice": []},
        {"guided_grammar": "nothing"},
        {"guided_json": "{"},
        {"guided_json": {"$ref": "#"}},
        {"guided_regex": "a", "response_format": {"type": "json_object"}},
    ],
    ids=lambda field: str(field)[:50],
)
def test_the_server_refuses_what_is_no_format(served: Served, field: dict[str, Any]) -> None:
    response = served.post(prompt="the", max_tokens=2, **field)
    assert response.status_code == 400 and set(response.json()["error"]) == {"message", "type", "param", "code"}


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("stream", [False, True])
def test_a_format_that_nothing_may_begin_is_refused_by_the_field_that_masks_it(
    served: Served, tokenizer: Tokenizer, stream: bool
) -> None:
    seven, a = ids_of(tokenizer, "7"), ids_of(tokenizer, "a")
    for name, field in {
        "allowed_token_ids": {"guided_regex": "[a-z]{3}", "allowed_token_ids": seven},
        "bad_words": {"guided_choice": ["a"], "bad_words": ["a"]},
        "min_tokens": {"guided_regex": "a", "min_tokens": 1, "stop_token_ids": a},
    }.items():
        response = served.post(prompt="the", max_tokens=4, stream=stream, **field)
        assert response.status_code == 400, name
        assert response.json()["error"]["param"] == name and "may begin with" in response.json()["error"]["message"]


def test_a_format_that_nothing_may_go_on_with_ends_its_request_alone(served: Served, tokenizer: Tokenizer) -> None:
    body: dict[str, Any] = {"prompt": "the", "max_tokens": 30, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    right = served.complete(**body)["choices"]
    stuck = {"guided_choice": ["a7"], "allowed_token_ids": ids_of(tokenizer, "a"), "max_tokens": 9, "prompt": "the"}
    with ThreadPoolExecutor(2) as users:
        other = users.submit(served.complete, **body)
        refused = users.submit(served.post, **stuck).result()
        assert other.result()["choices"] == right
    error = refused.json()["error"]
    assert refused.status_code == 400 and "cannot go on: allowed_token_ids" in error["message"]
    assert [part.get("error") for part in served.events(**stuck)] == [None, error]
    served.wait_idle()


def test_a_format_too_large_to_follow_is_the_mistake_of_who_asked_for_it(served: Served) -> None:
    for regex, told in {"a{1000000}": "cannot be compiled", "(x|b)?a{1000000}": "cannot go on"}.items():
        response = served.post(prompt="the", max_tokens=9, temperature=0.0, guided_regex=regex)
        assert response.status_code == 400 and told in response.json()["error"]["message"]
    served.wait_idle()


@pytest.mark.parametrize(
    ("field", "value"),
    [("guided_regex", "("), ("guided_regex", ""), ("guided_json", {"type": "nothing"}), ("structured_outputs", {}),
     ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}})],
)  # fmt: skip
def test_a_format_that_is_refused_is_told_by_its_field(served: Served, field: str, value: Any) -> None:
    assert served.post(prompt="the", **{field: value}).json()["error"]["param"] == field


def test_many_at_once_with_formats_of_their_own_are_not_mixed_up(served: Served) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            answers = [
                client.completions.create(
                    model=MODEL, prompt="the", max_tokens=20, seed=i, extra_body={"guided_regex": f"n{i}(a|b)+\\."}
                )
                for i in range(24)
            ]
            return [answer.choices[0].text for answer in await asyncio.gather(*answers)]

    assert all(text.startswith(f"n{i}") for i, text in enumerate(asyncio.run(ask())))
