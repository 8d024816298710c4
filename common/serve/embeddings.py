"""`POST /v1/embeddings`: OpenAI's embeddings."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from common.errors import RequestError
from common.serve.errors import ApiError
from common.serve.protocol import EmbeddingRequest
from common.serve.serving import Serving, json_response, read, unless_left
from common.serve.spans import named

router = APIRouter()


@router.post("/v1/embeddings")
async def embeddings(http: HttpRequest) -> Response:
    arrival, serving, body = time.perf_counter(), Serving.of(http), await read(http, EmbeddingRequest)
    model = serving.model
    size = len(model.pooler.weight)
    if body.dimensions not in (None, size):
        raise ApiError(400, f"This model has {size} dimensions, and fewer of them mean nothing; leave it out.", "dimensions")
    prompts = await asyncio.to_thread(
        model.prompts, body.input, body.add_special_tokens, body.truncate_prompt_tokens, "input", room=0
    )
    tokens = [prompt.token_ids for prompt in prompts]
    ended: str | None = "error"
    try:
        pooled = await unless_left(http.receive, embed(serving, tokens, body.pooling))
        ended = "stop"
    except ApiError:  # the client has disconnected, or the engine has ended
        ended = "abort"
        raise
    except RequestError:
        ended = None
        raise
    finally:
        if ended is not None:
            note(serving, http, body, tokens, arrival, ended)
    return await asyncio.to_thread(lambda: json_response(answer(body, model.names[0], tokens, pooled)))


def note(
    serving: Serving, http: HttpRequest, body: EmbeddingRequest, tokens: Sequence[Sequence[int]], arrival: float, ended: str
) -> None:
    """Count a request that was not refused."""
    serving.metrics.embedded(map(len, tokens), arrival, ended)
    if serving.spans is not None:
        facts = named("embeddings", serving.model, body.model) | {"gen_ai.usage.input_tokens": sum(map(len, tokens))}
        serving.spans.end(facts, arrival, http.headers, {"stop": None, "abort": "cancelled"}.get(ended, ended))


async def embed(serving: Serving, tokens: Sequence[Sequence[int]], pooling: Any) -> list[np.ndarray]:
    """Return float32[D] of each prompt. The engine computes as many at once as one step takes, in pieces between its steps."""
    pooler, pooled = serving.model.pooler, list[np.ndarray]()
    while len(pooled) < len(tokens):
        rest = tokens[len(pooled) :]
        coming = await serving.worker.ask(lambda engine, rest=rest: engine.hidden_states(rest))  # type: ignore[misc]
        states = await asyncio.wrap_future(coming)  # which is cancelled with this task
        pooled += await asyncio.to_thread(lambda states=states: [pooler.pool(x_TD, pooling) for x_TD in states])  # type: ignore[misc]
    return pooled


def answer(body: EmbeddingRequest, name: str, tokens: Sequence[Sequence[int]], pooled: Sequence[np.ndarray]) -> dict[str, Any]:
    """base64 is of little-endian float32."""
    as_text = body.encoding_format == "base64"
    shown = [base64.b64encode(x_D.astype("<f4").tobytes()).decode() if as_text else x_D.tolist() for x_D in pooled]
    data = [{"object": "embedding", "index": i, "embedding": x} for i, x in enumerate(shown)]
    count = sum(map(len, tokens))
    return {"object": "list", "data": data, "model": name, "usage": {"prompt_tokens": count, "total_tokens": count}}
