"""What an output has to be, compiled for a vocabulary and followed token by token. The library llguidance does the work.

A grammar is compiled on a thread of its own, and copied for each of its requests. Limits are in the library's units of work and
not in seconds, so that a refusal does not depend on the machine. They allow some seconds of one core at most.

A grammar is one of three. JSON Schema has the keywords of llguidance, and none of them is ignored. Regular expressions are
those of Rust's `regex`, without look-around and back-references. Grammars have Lark's syntax with llguidance's additions, or
llama.cpp's GBNF.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from common.errors import RequestError
from common.request import CANNOT_GO_ON, STUCK, Request, StructuredOutputsParams, expect
from common.text.library import library_errors
from common.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_KEPT = 64
"""Number of compiled grammars that are kept for later requests."""
SPACES = r" |\n {0,64}"
"""Between the tokens of JSON, or nothing: what printers of JSON write, and bounded, so that no output is spaces for ever."""
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 10_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 10_000,
}
"""Symbols of a grammar: an object of 1,000 properties fits. A token may take about 15 ms of the lexer, its states 100 MB."""
MAX_FORCED = 1 << 15
"""Bytes that may follow without a choice where an output begins; the library bounds by `LIMITS` only what follows later."""
SIGHT = 1024
"""Characters of what is forced that are cut into tokens for the sake of the next: the library shows all of it at each."""

_QUOTED = re.compile(r'(invalid regex ".*" \(in regex\): )?regex parse error:.*\nerror: ', re.DOTALL)
_LISTING = re.compile(r"\n +\d+ \| ")
_WORDS = (
    (re.compile("Expected f64 for "), "Expected number for "),
    (re.compile("Expected positive integer for "), "Expected integer of at least 0 for "),
    (re.compile("Unimplemented keys: "), "these keywords are not supported: "),
    (re.compile("invalid multiple of$"), "multipleOf must be greater than 0"),
    (re.compile("Resource '(.*)' is not present in a registry.*"), r"\1 is not in the schema, and nothing is fetched"),
    (re.compile("schema must be an object or boolean"), "each schema in it must be an object, true or false"),
    (re.compile("Unsatisfiable schema: anyOf is empty"), "type, enum or anyOf must not be an empty array"),
    (
        re.compile(r'^invalid regex ".*" \(in regex\): lookarounds not supported yet; .*'),
        "invalid regex: \\\\b is not supported",
    ),
)
"""Messages of the library → the words of JSON Schema."""
_PLACE = re.compile(r"^at \d+\(\d+\): ")
"""A place in the source that the library makes of a regular expression or of GBNF."""
NOTHING = "there is no output that it allows"


class Matcher:
    """How far one output has come in its grammar."""

    def __init__(self, inner: LLMatcher, vocab_size: int) -> None:
        self._inner, self._words = inner, -(-vocab_size // 32)

    def mask(self) -> np.ndarray:
        """Return uint32[ceil(V / 32)]: bit v % 32 of word v // 32 states whether token v may come next.

        EOS is among them where the output may end. The library does not hold Python's lock meanwhile.
        """
        mask = np.empty(self._words, np.uint32)
        self._inner.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return mask

    def accept(self, token: int) -> str | None:
        """Go on by a token; or what is wrong, if the grammar cannot. It never can again then."""
        if self._inner.consume_token(token):
            return None
        error = self._inner.get_error()
        if "satisfy the grammar" in error:  # it was not allowed, so nothing was: the runner follows masks
            return STUCK
        return CANNOT_GO_ON + _in_short(error)

    @property
    def done(self) -> bool:
        """Whether nothing can follow."""
        return self._inner.is_stopped()


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar."""

    inner: LLMatcher
    vocab_size: int

    def start(self, vocab_size: int) -> Matcher:
        """A matcher at the beginning, for a model of so many tokens."""
        expect(
            vocab_size == self.vocab_size,
            f"The grammar was compiled for a vocabulary of {self.vocab_size} tokens, and the model has {vocab_size}.",
        )
        return Matcher(self.inner.deep_copy(), vocab_size)

    def check_begin(self, request: Request) -> None:
        """Raise `RequestError` if the request masks every token that its output may begin with."""
        params = request.params
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else request.eos_token_ids)} if params.min_tokens else set()
        masked = {*ends, *(word[0] for word in request.bad_words if len(word) == 1)}
        if not masked and params.allowed_token_ids is None:
            return
        left = np.unpackbits(self.start(self.vocab_size).mask().view(np.uint8), bitorder="little")
        left[[token for token in masked if token < len(left)]] = 0
        if params.allowed_token_ids is not None:
            left = left[[token for token in params.allowed_token_ids if token < len(left)]]
        name = "allowed_token_ids" if params.allowed_token_ids else "bad_words" if request.bad_words else "min_tokens"
        expect(bool(left.any()), f"{name} must leave a token that the output may begin with as its grammar demands.", name)


class Grammars:
    """Compiles for one vocabulary. `vocab_size` is the model's, which may have more ids than the tokenizer has tokens.

    Threads start with the first grammar; `close` ends them. Any thread may call `compile`.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...], vocab_size: int) -> None:
        self._tokenizer, self._eos, self._vocab_size = tokenizer, eos_token_ids, vocab_size
        self._pool = ThreadPoolExecutor(2, "grammars")
        self._lock = threading.Lock()
        self._vocabulary: Future[LLTokenizer] | None = None
        self._kept: OrderedDict[StructuredOutputsParams, Future[Grammar]] = OrderedDict()

    def compile(self, wanted: StructuredOutputsParams | None) -> Future[Grammar] | None:
        """Begin to compile; None where nothing is wanted. The future raises `RequestError` for what cannot be compiled, as this
        does where there is no llguidance, or no EOS to end with."""
        if wanted is None:
            return None
        expect(find_spec("llguidance") is not None, "structured_outputs need llguidance: pip install -e '.[grammar]'.")
        expect(bool(self._eos), "structured_outputs need a token that ends an output, and this model has none (EOS).")
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._pool.submit(_read, self._tokenizer, self._eos, self._vocab_size)
            if wanted not in self._kept:
                self._kept[wanted] = self._pool.submit(_compile, self._vocabulary, wanted)
            self._kept.move_to_end(wanted)
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
            return self._kept[wanted]

    def close(self) -> None:
        """Idempotent."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(tokenizer: Tokenizer, eos_token_ids: tuple[int, ...], vocab_size: int) -> LLTokenizer:
    """The vocabulary as the library wants it. Control tokens are no text; ids without a token are never allowed."""
    from llguidance import LLTokenizer, TokenizerWrapper

    class Described:
        eos_token_id = eos_token_ids[0]
        bos_token_id = tokenizer.bos_token_id
        tokens = tuple(tokenizer.token_bytes(i, skip_special_tokens=False) for i in range(vocab_size))
        special_token_ids = tuple(sorted(tokenizer.special_ids))

        def __call__(self, text: str) -> list[int]:
            return tokenizer.encode(text[:SIGHT], add_special_tokens=False, parse_special=False)

    return LLTokenizer(TokenizerWrapper(Described()), eos_token=list(eos_token_ids))


@library_errors(RequestError, "structured_outputs cannot be compiled")
def _compile(vocabulary: Future[LLTokenizer], wanted: StructuredOutputsParams) -> Grammar:
    """Raises `RequestError`."""
    from llguidance import LLMatcher, LLParserLimits

    inner = LLMatcher(vocabulary.result(), _source(wanted), log_level=0, limits=LLParserLimits(**LIMITS, verbose_errors=False))
    if not inner.is_error():
        inner.compute_bitmask()  # which finds that nothing can begin, and warms what the copies share
    if inner.is_error():
        reason = _in_short(inner.get_error()) or NOTHING
        if wanted.grammar is None or "::=" in wanted.grammar:
            reason = _PLACE.sub("", reason)
        raise RequestError(f"structured_outputs cannot be compiled: {_reworded(reason)}.")
    if (forced := len(inner.compute_ff_bytes())) > MAX_FORCED:
        told = f"an output may begin with {MAX_FORCED} bytes that have no alternative, got {forced} or more; ask for fewer"
        raise RequestError(f"structured_outputs cannot be compiled: {told}.")
    return Grammar(inner, vocabulary.result().vocab_size)


def _source(wanted: StructuredOutputsParams) -> str:
    """As the library reads grammars."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, wanted.choice)))
    if wanted.grammar is not None:
        try:
            return LLMatcher.grammar_from_lark(any_to_lark(wanted.grammar))
        except RecursionError as error:
            raise RequestError("structured_outputs cannot be compiled: as GBNF, it is nested too deeply.") from error
        except Exception as error:  # the library raises nothing narrower
            raise RequestError(f"structured_outputs cannot be compiled: as GBNF, {_in_short(str(error))}") from error
    schema: Any = {"type": "object"} if wanted.json is None else wanted.json
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": SPACES})
    except ValueError as error:
        raise RequestError(f"structured_outputs cannot be compiled: {_in_short(str(error))}") from error


def _reworded(text: str) -> str:
    for pattern, words in _WORDS:
        text = pattern.sub(words, text)
    return text


def _in_short(text: str) -> str:
    """A message of the library's without what it repeats of the source, which may be long and in several lines."""
    if text.startswith("NoExtensionBias"):
        return NOTHING
    text = _QUOTED.sub("invalid regex: ", _LISTING.split(text)[0])
    return " ".join(text[:1000].removesuffix("<non-verbose/>").split())[:300]
