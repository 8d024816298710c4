"""What a caller asks for, what becomes of it, and what comes back token by token."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from math import inf
from numbers import Integral, Real
from typing import Any, Self

from common.batch import KV
from common.errors import ContextLengthError, RequestError, json_reason, nearest_hint, quoted

MAX_LOGPROBS = 20
MAX_BIAS = 100.0
MAX_N = 64
MAX_INT = 2**31 - 1
MAX_GRAMMAR = 1 << 15
"""Characters of what an output is held to."""
CANNOT_GO_ON = "The output cannot go on: "
"""How the error of a request begins that asked for what cannot be: it is the request's fault, not the engine's."""
ENGINE_GONE = "No replica of this engine is left"
"""How the error of a request begins whose engine is no more: it is not the request's fault, and another engine may serve it."""
STUCK = CANNOT_GO_ON + "allowed_token_ids, bad_words, min_tokens and structured_outputs leave no token to choose."
GREEDY_EPSILON = 1e-5
"""Temperatures below this are greedy."""
_INTEGERS = {
    "n": (1, MAX_N),
    "max_tokens": (1, MAX_INT),
    "min_tokens": (0, MAX_INT),
    "top_k": (-1, MAX_INT),
    "seed": (0, 2**64 - 1),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
_NUMBERS = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (1e-6, 1e6),
}
_FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize")
_OPTIONAL = ("max_tokens", "seed", "logprobs", "prompt_logprobs")
"""Sampling parameters by kind: their least and their greatest value, both allowed, and which may be None."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def expect(condition: bool, message: str, param: str | None = None) -> None:
    """Raise `RequestError(message, param)` unless `condition` holds."""
    if not condition:
        raise RequestError(message, param)


def expect_context(condition: bool, message: str, param: str | None = None) -> None:
    """Raise `ContextLengthError(message, param)` unless `condition` holds."""
    if not condition:
        raise ContextLengthError(message, param)


def _must(condition: bool, name: str, be: str, value: Any) -> None:
    """What the value of a field must be, and is not unless `condition` holds."""
    if not condition:
        raise RequestError(f"{name} must {be}, got {quoted(value)}.", name)


def _whole(value: Any, low: int, high: int) -> bool:
    """NumPy's integers are integers too, and True is none."""
    return isinstance(value, (int, Integral)) and not isinstance(value, bool) and low <= int(value) <= high


def _real(value: Any, low: float, high: float) -> bool:
    # The range first: an integer may be too large for isfinite. NaN lies in no range.
    return isinstance(value, (float, int, Real)) and not isinstance(value, bool) and bool(low <= value <= high)  # type: ignore[operator]


def _unicode(value: Any) -> bool:
    """Whether the value is a string that UTF-8 can encode: no lone surrogates."""
    return isinstance(value, str) and not _SURROGATE.search(value)


def _text(value: Any) -> bool:
    """Whether the value is a string that is not empty and that UTF-8 can encode."""
    return _unicode(value) and value != ""


def _token_ids(name: str, given: Sequence[Any]) -> tuple[int, ...]:
    if given and set(map(type, given)) == {int} and min(given) >= 0 and max(given) <= MAX_INT:
        return tuple(given)  # no Python code per token
    for token in given:
        _must(_whole(token, 0, MAX_INT), name, "hold token ids ≥ 0", token)
    return tuple(map(int, given))


def _biases(given: Any) -> tuple[tuple[int, float], ...] | None:
    """A logit_bias as pairs in the order of ids, clamped."""
    if given is None:
        return None
    name, be = "logit_bias", "map token ids ≥ 0 to numbers"
    _must(isinstance(given, (Mapping, tuple, list)), name, be, given)
    pairs = list(given.items()) if isinstance(given, Mapping) else list(given)
    for pair in pairs:
        sound = isinstance(pair, tuple) and len(pair) == 2 and _whole(pair[0], 0, MAX_INT) and _real(pair[1], -inf, inf)
        _must(sound, name, be, pair)
    expect(len({token for token, _ in pairs}) == len(pairs), "logit_bias must name every token id once.", name)
    return tuple(sorted((int(token), float(min(max(bias, -MAX_BIAS), MAX_BIAS))) for token, bias in pairs))


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """The form of the output, as exactly one of these. Names as in vLLM. `common.text.grammar` states what each may hold."""

    json: str | Mapping[str, Any] | None = None
    """A JSON Schema, of which the output is an instance. Kept as text."""
    regex: str | None = None
    """A regular expression, which the whole output matches."""
    choice: tuple[str, ...] | list[str] | None = None
    """The output is one of these."""
    grammar: str | None = None
    """A context-free grammar, in the syntax of Lark (from `start`) or of llama.cpp's GBNF (from `root`)."""
    json_object: bool | None = None
    """True: any JSON object."""

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        expect(
            len(given) == 1,
            f"structured_outputs must hold one of json, regex, choice, grammar and json_object, got {quoted(given)}.",
        )
        if self.json is not None:
            object.__setattr__(self, "json", _schema(self.json))
        if self.choice is not None:
            expect(
                isinstance(self.choice, (tuple, list)) and len(self.choice) > 0,
                f"choice must be a list of texts, got {quoted(self.choice)}.",
            )
            object.__setattr__(self, "choice", tuple(self.choice))
        texts: Sequence[Any] = self.choice or [text for text in (self.json, self.regex, self.grammar) if text is not None]
        for text in texts:
            expect(_text(text), f"{given[0]} must hold Unicode texts that are not empty, got {quoted(text)}.")
        size = sum(map(len, texts))
        expect(size <= MAX_GRAMMAR, f"{given[0]} may have {MAX_GRAMMAR} characters, got {size}.")
        expect(self.json_object in (None, True), f"json_object must be true, or be left out, got {quoted(self.json_object)}.")


def _schema(given: Any) -> str:
    """A JSON Schema as text."""
    try:
        schema = json.loads(given) if isinstance(given, str) else given
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"json must be a JSON Schema, as an object or as text: {json_reason(error)}.") from error
    expect(isinstance(schema, Mapping), f"json must be a JSON Schema, which is an object, got {quoted(schema)}.")
    return text


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Names, units and defaults as in vLLM.

    Order of operations on the logits: allowed_token_ids and structured_outputs → bad_words → min_tokens → logit_bias →
    repetition, frequency and presence penalty → temperature → min_p → top_k → top_p → inverse CDF. What is masked has no
    probability. If nothing is left, the request ends with an error (`STUCK`).
    """

    n: int = 1
    """Continuations of the prompt; see `fan_out`."""
    max_tokens: int | None = 16
    """Output tokens at most; None fills the context."""
    min_tokens: int = 0
    """Until so many output tokens are there, EOS (unless ignored) and stop ids are masked, and stop strings do not count. The
    cap ends a request in any case."""
    temperature: float = 1.0
    """0 is greedy: the highest logit, ties to the lowest id."""
    top_k: int = 0
    """Keep the k likeliest tokens, ties at the k-th kept; 0 or -1 keeps all. At most 2**31 - 1."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probability reaches top_p, at least one."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the likeliest."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token in the output; in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token for each time that it is in the output; in [-2, 2]."""
    repetition_penalty: float = 1.0
    """For every token in prompt or output: a positive logit is divided by it, any other multiplied."""
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] | None = None
    """Added to the logits of these ids, clamped to [-100, 100]. Kept as pairs in the order of ids."""
    allowed_token_ids: tuple[int, ...] | list[int] | None = None
    """All others are masked; None allows all."""
    bad_words: tuple[str, ...] | list[str] = ()
    """Texts that the output must not contain, with or without a space before them.

    Where the output ends in all tokens of a text but the last, the last is masked. `Request.bad_words` has the tokens.
    """
    structured_outputs: StructuredOutputsParams | None = None
    """What the output has to be. It ends where nothing can follow, or with EOS where it may end, `ignore_eos` or not. What is
    cut short, by max_tokens or a stop string, is the beginning of such an output. It compiles to `Request.grammar`."""
    seed: int | None = None
    """None draws one from the engine's seed and the request's number."""
    logprobs: int | None = None
    """None: none. k: of the chosen token and of the k likeliest, from the raw logits."""
    prompt_logprobs: int | None = None
    """Log-probabilities of the prompt's tokens but the first, each given those before it; k as in `logprobs`.

    Such a prompt does not use the prefix cache: a score needs the hidden state of its position, and pages hold keys and values.
    Other requests find its pages.
    """
    stop: tuple[str, ...] | list[str] | str = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __new__(cls, **options: Any) -> Self:
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:  # to look for the nearest takes time
                raise RequestError(
                    f"Unknown sampling parameter {name!r}.{nearest_hint(name, known)} Known: {', '.join(known)}."
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        for name in _FLAGS:
            _must(isinstance(getattr(self, name), bool), name, "be true or false", getattr(self, name))
        for name, (least, most) in _INTEGERS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                or_out = ", or be left out" if name in _OPTIONAL else ""
                _must(_whole(value, least, most), name, f"be an integer in [{least}, {most}]{or_out}", value)
                put(name, int(value))
        _must(_real(self.top_p, 0.0, 1.0) and self.top_p > 0, "top_p", "be a number in (0, 1]", self.top_p)
        for name, (low, high) in _NUMBERS.items():
            value = getattr(self, name)
            _must(_real(value, low, high), name, f"be a number in [{low:g}, {high:g}]", value)
            put(name, float(value))
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids"):
            value = getattr(self, name)
            _must(value is None or isinstance(value, (str, tuple, list)), name, "be a list", value)
        put("stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        put("bad_words", (self.bad_words,) if isinstance(self.bad_words, str) else tuple(self.bad_words or ()))
        _must(all(_text(s) for s in self.stop), "stop", "hold Unicode strings that are not empty", self.stop)
        sound = all(_text(s) and s.strip() for s in self.bad_words)
        _must(sound, "bad_words", "hold Unicode strings that are not blank", self.bad_words)
        expect(not self.stop or self.detokenize, "stop strings need detokenize=True.", "stop")
        put("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids or ()))
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
        expect(
            self.allowed_token_ids != (),
            "allowed_token_ids must not be empty; leave it out to allow all.",
            "allowed_token_ids",
        )
        put("logit_bias", _biases(self.logit_bias))
        _must(
            self.structured_outputs is None or isinstance(self.structured_outputs, StructuredOutputsParams),
            "structured_outputs",
            "be StructuredOutputsParams",
            self.structured_outputs,
        )
        expect(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            f"min_tokens must not exceed max_tokens, got {self.min_tokens} and {self.max_tokens}.",
            "min_tokens",
        )
        put("top_k", 0 if self.top_k == -1 else self.top_k)
        same = f"n must be 1 where temperature is 0: all {self.n} continuations were the same."
        expect(self.n == 1 or not self.greedy, same, "n")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_EPSILON

    def clone(self, **changes: Any) -> Self:
        """Return a copy with these fields changed, checked like any other. The original is immutable."""
        return replace(self, **changes)


class Status(Enum):
    """`WAITING → RUNNING ⇄ PREEMPTED`, and from any of them to one terminal state (`leads_to`)."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED_STOP = "stop"
    FINISHED_LENGTH = "length"
    FINISHED_ABORT = "abort"
    FINISHED_TIMEOUT = "timeout"
    FINISHED_ERROR = "error"

    @property
    def finished(self) -> bool:
        return self not in _NEXT

    def leads_to(self, other: Status) -> bool:
        """Whether a request may go from this state to `other`. From an end there is no way on."""
        return not self.finished and (other.finished or other is _NEXT[self])


_NEXT = {Status.WAITING: Status.RUNNING, Status.RUNNING: Status.PREEMPTED, Status.PREEMPTED: Status.RUNNING}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how to continue it. Immutable; the scheduler keeps its own record of progress."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    """The choices of one prompt share this object."""
    choice: int | None = None
    """The index of this request among the `params.n` continuations of its prompt; None if there is one continuation."""
    seed: int | None = None
    """Replaces the seed of `params`. A router sets it."""
    max_tokens: int | None = None
    """Replaces `params.max_tokens`. A router sets it where another engine continues the request."""
    eos_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    """`params.bad_words` as token ids, computed by `Tokenizer.bad_words`."""
    grammar: Future[Any] | None = None
    """The `common.text.grammar.Grammar` that `params.structured_outputs` compiles to. Until then the request waits, and delays
    no other. If the compilation fails, the request ends with `FINISHED_ERROR`."""
    cache_salt: str = ""
    """Requests share cached pages only with requests of the same salt."""
    priority: int = 0
    """Urgency: a lower value runs first and is preempted last. Equal values run in order of arrival."""
    deadline: float | None = None
    """Time on the clock of `time.perf_counter` at which a request ends with `FINISHED_TIMEOUT`, running or waiting.

    Time that passes before `add` counts too.
    """
    parent: str | None = None
    """The id of a live request with the same prompt and salt. This request shares its pages once they are written.

    Without such a request, or if that one frees its pages first, this request computes the whole prompt.
    """
    output_token_ids: tuple[int, ...] = ()
    """What it has of its output already, from an engine that is gone: it goes on from there, as one does that was preempted."""
    kv: Future[KV] | None = None
    """Keys and values of its first tokens, from an engine that has computed them.

    The request waits for them and delays no other. If the transfer fails, the engine computes them. If the request ends first,
    the engine cancels the transfer.
    """
    prepared: Any = None
    """The prepared form of the fields above (`common.schedule.prepare.Prepared`), which choices share. The engine prepares a
    request that has none. It must be left out of a copy whose prompt, params or bad words differ."""
    keep_pages: bool = False
    """Whether the pages stay as they are when the output reaches `max_tokens`, unless the engine must start over.

    `Engine.read_kept` reads them, and `Engine.drop_kept` frees them.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_token_ids", tuple(self.prompt_token_ids))
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        object.__setattr__(self, "bad_words", tuple(map(tuple, self.bad_words)))
        object.__setattr__(self, "output_token_ids", tuple(self.output_token_ids))
        _must(_text(self.request_id), "request_id", "be Unicode text that is not empty", self.request_id)
        _must(_unicode(self.cache_salt), "cache_salt", "be Unicode text", self.cache_salt)
        _must(self.parent is None or _text(self.parent), "parent", "be the id of a request or None", self.parent)
        expect(len(self.prompt_token_ids) > 0, f"Request {self.request_id!r}: the prompt is empty; give at least one token.")
        expect(all(self.bad_words), f"Request {self.request_id!r}: a bad word has no tokens.")
        expect(
            bool(self.bad_words) or not self.params.bad_words,
            f"Request {self.request_id!r}: bad_words are texts, and this request brings no tokens for them.",
        )
        expect(
            self.grammar is not None or self.params.structured_outputs is None,
            f"Request {self.request_id!r}: structured_outputs are texts, and this request brings no grammar for them.",
        )
        expect(
            _whole(self.priority, -(2**63), 2**63 - 1),
            f"Request {self.request_id!r}: priority must be an integer of 64 bits, got {quoted(self.priority)}.",
            "priority",
        )
        expect(
            self.deadline is None or _real(self.deadline, -1e15, 1e15),
            f"Request {self.request_id!r}: deadline must be a finite number of seconds, or be left out, "
            f"got {quoted(self.deadline)}.",
            "deadline",
        )

    @property
    def own_seed(self) -> int | None:
        """The seed of this request: its own, or that of its params plus its index among the choices."""
        if self.seed is not None or self.params.seed is None:
            return self.seed
        return (self.params.seed + (self.choice or 0)) % 2**64

    @property
    def stops(self) -> dict[int, int | None]:
        """Tokens that end it → the reason to report: None for EOS."""
        eos = () if self.params.ignore_eos else self.eos_token_ids
        return {**{token: token for token in self.params.stop_token_ids}, **dict.fromkeys(eos)}


def fan_out(request: Request) -> list[Request]:
    """The requests for `n` continuations of one prompt: `<id>-<i>`. The first is the parent of the others, and only its prompt
    is scored. All share their params, which are validated once. An engine takes these requests."""
    name, params = request.request_id, request.params
    if params.n == 1 or request.choice is not None:
        return [request]
    others = params if params.prompt_logprobs is None else replace(params, prompt_logprobs=None)
    return [
        replace(
            request,
            request_id=f"{name}-{i}",
            params=others if i else params,
            choice=i,
            parent=f"{name}-0" if i else request.parent,
        )
        for i in range(params.n)
    ]


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities at one position, of the raw logits."""

    logprob: float
    """Of the token that is there."""
    rank: int
    """1 + how many tokens have a higher logit than it."""
    top_ids: Sequence[int] = ()
    top_logprobs: Sequence[float] = ()
    """The k likeliest, falling; empty where no others were wanted."""


@dataclass(frozen=True)
class TokenEvent:
    """One output token of one request as the host saw it, or its end. Exactly one event of a request has a `finish`."""

    request_id: str
    token_id: int | None
    """None on a terminal event that brings no token (abort, error)."""
    time: float
    """`time.perf_counter()` seconds, taken when the token reached the host."""
    logprobs: Logprobs | None = None
    finish: Status | None = None
    stop_reason: int | str | None = None
    """The stop id or stop string that ended it; None for EOS."""
    error: str | None = None
    prompt_logprobs: Sequence[Logprobs | None] | None = None
    """On the first token of a request that asked: one entry for each token of the prompt, None for the first."""
    num_cached_tokens: int | None = None
    """On the first token: how many of the prompt's were found in the prefix cache."""
