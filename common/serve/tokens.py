"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from common.request import expect
from common.schedule.admission import check_tokens
from common.serve.encoding import JsonList
from common.serve.model import ServedModel
from common.serve.protocol import DetokenizeRequest, TokenizeRequest
from common.serve.serving import Serving, json_response, read

router = APIRouter()


@router.post("/tokenize")
async def tokenize(http: HttpRequest) -> Response:
    model, body = Serving.of(http).model, await read(http, TokenizeRequest)
    return await asyncio.to_thread(lambda: json_response(tokens_of(model, body)))


def tokens_of(model: ServedModel, body: TokenizeRequest) -> dict[str, Any]:
    """Count tokens also of a prompt that is longer than the context: clients ask this to shorten it."""
    expect((body.prompt is None) != (body.messages is None), "Give either prompt, a text, or messages, a conversation.")
    if body.prompt is not None:
        tokens = list(model.encode(body.prompt, body.add_special_tokens, checked=False))
    else:
        options = {"add_generation_prompt": body.add_generation_prompt, "checked": False}
        tokens = list(model.render(body.messages or [], body.tools, **options).token_ids)
    lists = {"tokens": JsonList.of(tokens)}
    if body.return_token_strs:
        lists["token_strs"] = JsonList.of([model.tokenizer.id_to_token(token) for token in tokens])
    return {"count": len(tokens), "max_model_len": model.max_model_len, **lists}


@router.post("/detokenize")
async def detokenize(http: HttpRequest) -> Response:
    model, body = Serving.of(http).model, await read(http, DetokenizeRequest)

    def text() -> Response:
        check_tokens("tokens", body.tokens, model.vocab_size, "tokens")
        return json_response({"prompt": model.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    return await asyncio.to_thread(text)


@router.get("/tokenizer_info")
async def tokenizer_info(http: HttpRequest) -> Response:
    model = Serving.of(http).model
    model.check_name(http.query_params.get("model"))
    tokenizer = model.tokenizer
    named = {
        "bos_token": tokenizer.bos_token_id,
        "eos_token": next(iter(tokenizer.eos_token_ids), None),
        "pad_token": tokenizer.pad_token_id,
    }
    return json_response(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: None if token is None else tokenizer.id_to_token(token) for name, token in named.items()},
            "chat_template": tokenizer.chat_template,
            "model_max_length": model.max_model_len,
        }
    )
