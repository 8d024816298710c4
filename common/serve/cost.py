"""The cost of one HTTP request in host work. Limits on single fields do not bound it, because fields multiply.

A unit of work is about 0.1 µs of one core. Two sums are bounded, each by `MAX_UNITS`, which is about 0.1 s:

- `common.text.json_cost`, before the body is parsed
- `sampling_units`, before the engine gets the request:
  choices × (CHOICE + Σ EACH[field] × length of the field) + n × Σ over prompts of tokens × units of a token
  where choices = prompts × n, and a token takes 1 / TOKENS_A_UNIT, EDIT more if repetition_penalty is set, and SCORE × (1 + k)
  more if the prompt is scored with its k likeliest alternatives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.errors import RequestError
from common.request import SamplingParams
from common.text.json_cost import MAX_UNITS

CHOICE = 512
"""Of a choice by itself: its request, its row, its part of the answer."""
EDIT = 4
"""Of a token whose logit is changed: every step of every choice carries it."""
SCORE = 4
"""Of a log-probability in the answer."""
TOKENS_A_UNIT = 16
EACH = {
    "allowed_token_ids": 1,
    "stop_token_ids": 1,
    "logit_bias": EDIT,
    "bad_words": EDIT,
    "stop": 4,
    "structured_outputs": 1,
}
"""Field → units of one entry, or of one character where the entries are texts."""
STOP_STRING = 128
"""Of a stop string beside its characters: each is searched for in every new character of every choice."""


def lengths_of(params: SamplingParams) -> dict[str, int]:
    """The lengths of the fields that each choice takes time for, by the names in `EACH`."""
    wanted = params.structured_outputs
    texts = () if wanted is None else wanted.choice or (wanted.json, wanted.regex, wanted.grammar)
    return {
        "allowed_token_ids": len(params.allowed_token_ids or ()),
        "stop_token_ids": len(params.stop_token_ids),
        "logit_bias": len(params.logit_bias or ()),
        "bad_words": sum(map(len, params.bad_words)),
        "stop": sum(len(text) + STOP_STRING // EACH["stop"] for text in params.stop),
        "structured_outputs": sum(len(str(text)) for text in texts if text),
    }


def sampling_units(params: SamplingParams, prompts: Sequence[int]) -> dict[str, int]:
    """The units of a request with prompts of so many tokens, by the field that causes them; `n` stands for the choices."""
    choices, tokens = params.n * len(prompts), params.n * sum(prompts)
    a_token = EDIT * (params.repetition_penalty != 1)
    a_token += 0 if params.prompt_logprobs is None else SCORE * (1 + params.prompt_logprobs)
    fields = {name: choices * EACH[name] * length for name, length in lengths_of(params).items()}
    return {"n": choices * CHOICE, "prompt_token_ids": tokens // TOKENS_A_UNIT + tokens * a_token, **fields}


def expect_affordable(params: SamplingParams, prompts: Sequence[int]) -> None:
    """Raise `RequestError`, with the numbers, for a request that costs more than `MAX_UNITS`."""
    units = sampling_units(params, prompts)
    total, most = sum(units.values()), max(units, key=units.__getitem__)
    if total > MAX_UNITS:
        choices = params.n * len(prompts)
        raise RequestError(
            f"The fields of this request come to {total} units of work, and a request may have {MAX_UNITS}: "
            f"{_listed(units)}, for {len(prompts)} prompts with n={params.n}, {choices} choices in all. "
            f"Ask for at most {max(choices * MAX_UNITS // total, 1)} choices, or shorten {most}.",
            most,
        )


def _listed(units: Mapping[str, int]) -> str:
    """The largest three."""
    named = {"n": "choices", "prompt_token_ids": "prompts"}
    largest = sorted(units, key=units.__getitem__, reverse=True)[:3]
    return ", ".join(f"{units[name]} for {named.get(name, name)}" for name in largest if units[name])
