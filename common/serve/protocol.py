"""The bodies of requests, with the field names of OpenAI and vLLM. Unknown fields are ignored, and logged once."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails

from common.errors import RequestError
from common.request import MAX_LOGPROBS, MAX_N, Request, SamplingParams, StructuredOutputsParams, expect
from common.schedule.embeddings import Pooling
from common.serve.errors import ApiError
from common.serve.tools import call_grammar
from common.text.chat import ROLES
from common.text.json_cost import expect_parsable

log = logging.getLogger(__name__)

MAX_PROMPTS = 1024
MAX_INPUTS = 2048


def whole(given: Any) -> Any:
    """An integer that is written as `5.0`, as an integer: JSON makes no difference between the two."""
    return int(given) if isinstance(given, float) and given.is_integer() else given


def wholes(given: Any) -> Any:
    """The same for the items of a list, or of each of several lists."""
    if not isinstance(given, list) or not {float, list}.intersection(map(type, given)):
        return given
    return [wholes(each) if isinstance(each, list) else whole(each) for each in given]


WHOLE, WHOLES = BeforeValidator(whole), BeforeValidator(wholes)
Whole = Annotated[int, WHOLE]
MAX_STOP = 1024
"""Characters of a stop string or bad word."""
MAX_STOPS = 64
StopText = Annotated[str, Field(max_length=MAX_STOP)]
STOP_TEXT = {"type": "string", "maxLength": MAX_STOP}
StopTexts = Annotated[
    list[StopText],
    Field(max_length=MAX_STOPS),
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
    WithJsonSchema({"anyOf": [STOP_TEXT, {"type": "array", "maxItems": MAX_STOPS, "items": STOP_TEXT}]}),
]
"""A single text becomes a list of one, so that an error names an item and no union of types."""
TOKENS: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
TEXTS: dict[str, Any] = {"type": "array", "minItems": 1, "items": TEXT}
Prompts = Annotated[
    Any,
    WHOLES,
    WithJsonSchema({"anyOf": [TEXT, TEXTS, TOKENS, {"type": "array", "minItems": 1, "items": TOKENS}]}),
]
"""A text, token ids, or a list of these."""
MESSAGE = WithJsonSchema(
    {
        "type": "object",
        "required": ["role"],
        "properties": {"role": {"enum": list(ROLES)}},
    }
)
Messages = Annotated[list[Annotated[dict[str, Any], MESSAGE]], Field(min_length=1, max_length=10_000)]
Refused = Annotated[Any, WithJsonSchema({"type": "null"})]
"""A field that is known and not served: `check` raises for any value."""
TokenKey = Annotated[str, Field(max_length=10)]
NEUTRAL: dict[str, Any] = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "bad_words": [],
    "priority": 0,
    "use_beam_search": False,
    "length_penalty": 1,
    "suffix": "",
    "tool_choice": "auto",
    "parallel_tool_calls": True,
}
"""Values that change nothing. Clients also send them to servers that do not know the field."""
SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "seed", "min_tokens", "stop", "stop_token_ids", "ignore_eos",
    "include_stop_str_in_output", "skip_special_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "allowed_token_ids", "bad_words", "use_beam_search", "length_penalty",
)  # fmt: skip
"""Fields that are sampling parameters of the same name."""
REQUEST = ("cache_salt", "priority", "deadline")
"""Fields of `Request` that a client may set."""
MAX_IGNORED = 100
"""Names of unknown fields that are logged. A request may bring thousands."""
_ignored: set[str] = set()


class Body(BaseModel):
    """A body. It is strict: texts and numbers are not converted to each other."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None

    def check(self) -> None:
        """Raise for combinations that can never be served."""

    def settle(self) -> None:
        """Do the part of validation that takes time; called once, on a thread. Log each unknown field once."""
        for name in self.model_extra or {}:
            shown = name[:80]  # names may be as long as a body, and stay in memory
            if shown not in _ignored and len(_ignored) < MAX_IGNORED:
                _ignored.add(shown)
                log.warning("Requests bring a field %r, which is ignored.", shown)


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sampled(Body):
    """The fields that completions and chats share."""

    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N), WHOLE] | None = None
    max_tokens: Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    seed: Whole | None = None
    min_tokens: Whole | None = None
    stop: StopTexts | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=1024), WHOLES] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[TokenKey, float], Field(max_length=1 << 14)] | None = None
    allowed_token_ids: Annotated[list[int], Field(max_length=1 << 18), WHOLES] | None = None
    bad_words: Annotated[list[StopText], Field(max_length=1024)] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]})] = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    priority: Whole | None = None
    deadline: float | None = None
    """Seconds from the arrival of the HTTP request."""
    truncate_prompt_tokens: Annotated[int, Field(ge=-1), WHOLE] | None = None
    """Keep so many tokens at the end of the prompt; -1 as many as fit."""
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    _structured: StructuredOutputsParams | None = PrivateAttr(None)
    _format: str | None = PrivateAttr(None)

    def settle(self) -> None:
        super().settle()
        asked = {name: wanted for name, wanted in self.formats().items() if wanted is not None}
        if len(asked) > 1:
            raise ApiError(400, f"A request has one format, got {' and '.join(asked)}.", [*asked][-1])
        for name, wanted in asked.items():
            for field in set(wanted) - STRUCTURED:
                raise ApiError(400, f"{name}.{field:.80} is not supported by this server; leave it out.", name)
            self._format = name
            try:
                self._structured = StructuredOutputsParams(**wanted)
            except RequestError as error:
                raise ApiError(400, str(error), name) from None

    @property
    def names(self) -> Mapping[str, str]:
        """Return field of the engine's request → field of this body, where they differ."""
        return {"prompt_token_ids": "prompt"}

    def rename(self, error: RequestError) -> None:
        """Replace names of the engine's fields in an error by the names of this body."""
        error.param = self.names.get(error.param or "", error.param)
        error.args = (reworded(str(error), self.names),)

    @property
    def format(self) -> str | None:
        """The field that sets the format of the output, or None."""
        return self._format

    def formats(self) -> dict[str, dict[str, Any] | None]:
        """Return field → the format that it sets."""
        guided = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}
        given = {name: value for name, value in (self.structured_outputs or {}).items() if value is not None}
        return {
            "response_format": response_format(self.response_format),
            "structured_outputs": None if self.structured_outputs is None else given,
            **{name: None if getattr(self, name) is None else {kind: getattr(self, name)} for name, kind in guided.items()},
        }

    def params(
        self,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> SamplingParams:
        """Return the parameters for the engine. `defaults` fill in fields that the request leaves out.

        Raises `ApiError` for a field that the engine does not have, unless its value changes nothing."""
        asked = {name: getattr(self, name) for name in SAMPLING}
        if self.logit_bias:
            decimal = all(key.isdecimal() for key in self.logit_bias)
            expect(decimal, 'logit_bias must be a map of token ids to numbers, as {"42": -100}.', "logit_bias")
            asked["logit_bias"] = {int(key): value for key, value in self.logit_bias.items()}
        options = {**defaults, **supported(asked, SamplingParams)}
        return SamplingParams(
            n=self.n or 1,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            structured_outputs=self._structured,
            **options,
        )

    def request_fields(self, arrival: float) -> dict[str, Any]:
        """Return the fields of `Request` that this body sets."""
        asked = {name: getattr(self, name) for name in REQUEST}
        if self.deadline is not None:
            asked["deadline"] = arrival + self.deadline
        return supported(asked, Request)

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options are for streams: set stream=true.", "stream_options")
        expect(self.truncate_prompt_tokens != 0, "truncate_prompt_tokens must be -1 or at least 1.", "truncate_prompt_tokens")


STRUCTURED = {field.name for field in fields(StructuredOutputsParams)}


def response_format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    """OpenAI's way to ask for a format, as a field of `StructuredOutputsParams`."""
    match given:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"json_object": True}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return {"json": schema}
    expected = 'text, json_object, or json_schema with {"json_schema": {"name": …, "schema": {…}}}'
    raise ApiError(400, f"response_format must have the type {expected}.", "response_format")


class CompletionRequest(Sampled):
    model_config = ConfigDict(json_schema_extra={"required": ["prompt"]})

    prompt: Prompts = None
    echo: bool | None = None
    logprobs: Whole | None = None
    prompt_logprobs: Whole | None = None
    best_of: Whole | None = None
    suffix: str | None = None
    add_special_tokens: bool = True

    @property
    def prompt_only(self) -> bool:
        """Whether the answer is the prompt only (`echo` with max_tokens=0). The engine computes one token, which is dropped."""
        return bool(self.echo) and self.max_tokens == 0

    def check(self) -> None:
        super().check()
        if self.prompt is None:
            raise ApiError(400, "prompt is missing: a text, token ids, or a list of these.", "prompt")
        if several(self.prompt) and len(self.prompt) * (self.n or 1) > MAX_PROMPTS:
            raise ApiError(
                400, f"A request may ask for {MAX_PROMPTS} choices in all, got {len(self.prompt)} prompts.", "prompt"
            )
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, "best_of must be n, or be left out: every choice that is made is returned.", "best_of")
        if self.stream and self.prompt_logprobs is not None:
            raise ApiError(400, "prompt_logprobs come with a whole answer: set stream=false.", "prompt_logprobs")
        supported({"suffix": self.suffix}, SamplingParams)


class ChatRequest(Sampled):
    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    """Takes precedence over max_tokens. With neither, the output may fill the context."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    tools: Annotated[list[Tool], Field(max_length=1024)] | None = None
    tool_choice: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}]})] = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = True
    chat_template: Refused = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the template, such as `enable_thinking`."""
    continue_final_message: bool | None = None
    """The model continues the last message; with add_generation_prompt=false."""
    prompt_logprobs: Refused = None

    def check(self) -> None:
        super().check()
        if self.prompt_logprobs is not None:
            told = "prompt_logprobs are not for chats: send the token ids that /tokenize returns to /v1/completions."
            raise ApiError(400, told, "prompt_logprobs")
        if self.chat_template is not None:
            text = "chat_template is not taken from requests: the server's --chat-template sets it."
            raise ApiError(400, text, "chat_template")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true.", "top_logprobs")

    @property
    def uses_tools(self) -> bool:
        """Whether the answer may call tools."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def names(self) -> Mapping[str, str]:
        longer = {} if self.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
        return {"prompt_token_ids": "messages", **longer}

    def formats(self) -> dict[str, dict[str, Any] | None]:
        return super().formats() | {"tool_choice": self.enforced_call()}

    def enforced_call(self) -> dict[str, Any] | None:
        """Return the format of a tool call if `tool_choice` requires one, or None."""
        functions = {tool.function.name: tool.function.parameters for tool in self.tools or ()}
        match self.tool_choice:
            case None | "auto" | "none":
                return None
            case "required":
                names = list(functions)
            case {"type": "function", "function": {"name": str(name)}}:
                names = [name]
            case _:
                raise ApiError(400, "tool_choice must be auto, none, required, or name a function.", "tool_choice")
        if not names or not set(names) <= set(functions):
            raise ApiError(400, "tool_choice asks for a call, and tools do not hold what it names.", "tool_choice")
        return {"grammar": call_grammar({name: functions[name] for name in names})}


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[\w.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class EmbeddingRequest(Body):
    model_config = ConfigDict(json_schema_extra={"required": ["input"]})

    input: Prompts = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Whole | None = None
    pooling: Pooling = "last"
    """Of the final states: that of the last token, as in vLLM, or the mean of all tokens. OpenAI has no such field."""
    normalize: bool | None = None
    add_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=-1), WHOLE] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None

    def check(self) -> None:
        if self.normalize is False:
            raise ApiError(400, "normalize must be true, or be left out: embeddings have length 1.", "normalize")
        expect(self.truncate_prompt_tokens != 0, "truncate_prompt_tokens must be -1 or at least 1.", "truncate_prompt_tokens")
        if self.input is None:
            raise ApiError(400, "input is missing: a text, token ids, or a list of these.", "input")
        if several(self.input) and len(self.input) > MAX_INPUTS:
            raise ApiError(400, f"A request may have {MAX_INPUTS} inputs, got {len(self.input)}.", "input")


class TokenizeRequest(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}, "messages": {"type": "null"}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}, "prompt": {"type": "null"}}},
            ]
        }
    )

    prompt: str | None = None
    messages: Messages | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    tokens: Annotated[list[int], WHOLES, WithJsonSchema({**TOKENS, "minItems": 0})]


ChatRequest.model_rebuild()

WORDS = {
    "missing": "is missing",
    "model_type": "must be an object",
    "dict_type": "must be an object",
    "list_type": "must be a list",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "too_short": "must hold at least {min_length} item",
    "too_long": "may hold at most {max_length} items",
    "string_too_short": "must have at least {min_length} character",
    "string_too_long": "may have at most {max_length} characters",
    "string_pattern_mismatch": "must match the pattern {pattern}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
}
"""Messages by pydantic's types of errors."""

B = TypeVar("B", bound=Body)


def parse(kind: type[B], data: bytes) -> B:
    """Parse a body. Raises `ApiError` that names the first invalid field, and `RequestError` for a body with too many parts."""
    expect_parsable([data])
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        raise refusal(error.errors(include_url=False, include_input=False)[0]) from None
    body.settle()
    return body


def refusal(error: ErrorDetails) -> ApiError:
    """An error of pydantic in the words of JSON."""
    if not error["loc"]:
        why = str(error["ctx"]["error"]) if error["type"] == "json_invalid" else "it is another kind of value"
        return ApiError(400, f"The body must be a JSON object: {why}.")
    first, *rest = (part[:80] if isinstance(part, str) else part for part in error["loc"] if part != "[key]")
    where = f"{first}" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)
    told = WORDS.get(error["type"], "is not valid: {msg}").format(msg=error["msg"], **error.get("ctx", {}))
    return ApiError(400, f"{where} {told}.", str(first))


def reworded(message: str, names: Mapping[str, str]) -> str:
    """Replace names of fields in a message. JSON strings in the message, which quote the request, stay as they are."""
    field = "|".join(map(re.escape, names))
    return re.sub(rf'"(?:[^"\\]|\\.)*"|\b({field})\b', lambda found: names.get(found[0], found[0]), message)


def several(prompt: Any) -> bool:
    """Whether these are several prompts rather than one."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)


def supported(asked: Mapping[str, Any], kind: type[Any]) -> dict[str, Any]:
    """Return the fields of `asked` that `kind` has. Raises `ApiError` for another field, unless its value is neutral."""
    known = {field.name for field in fields(kind)}
    for name, value in asked.items():
        if name not in known and value is not None and value != NEUTRAL.get(name):
            raise ApiError(400, f"{name} is not supported yet by this server; leave it out.", name)
    return {name: value for name, value in asked.items() if name in known and value is not None}
