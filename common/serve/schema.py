"""`/openapi.json`: the schema of the HTTP API, made from the models that parse the bodies; and `/docs`, a page that shows it.

FastAPI cannot derive it: routes read bodies themselves, bounded while they come (`common.serve.serving.read`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import APIRouter
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from common.serve.items import ResponsesRequest
from common.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from common.serve.serving import json_response

DOCS = Path(__file__).with_name("docs.html")
ERRORS = {
    "400": "The request cannot be served; the message names the field.",
    "401": "The API key is missing or wrong.",
    "404": "The path or the model does not exist.",
    "405": "The path does not take this method.",
    "408": "The body did not come in time.",
    "409": "Pages are in use.",
    "413": "The body is too large.",
    "415": "The body is not JSON, or is compressed.",
    "429": "The queue is full (--max-waiting).",
    "500": "The request failed.",
    "503": "No engine serves now; Retry-After says when to ask again.",
    "504": "The deadline of the request has passed.",
}
"""Status → its meaning. Every path may answer with each."""


class Operation(NamedTuple):
    """One method of one path."""

    method: str
    summary: str
    body: type[BaseModel] | None = None
    media: str = "application/json"
    """Of the answer; empty for an answer without a body."""


OPERATIONS: dict[str, Operation] = {
    "/v1/chat/completions": Operation("post", "Answer a conversation. A stream has the type text/event-stream.", ChatRequest),
    "/v1/completions": Operation("post", "Continue a prompt. A stream has the type text/event-stream.", CompletionRequest),
    "/v1/responses": Operation("post", "Answer items. A stream has the type text/event-stream.", ResponsesRequest),
    "/v1/embeddings": Operation("post", "Embed texts.", EmbeddingRequest),
    "/v1/models": Operation("get", "List the models."),
    "/v1/models/{name}": Operation("get", "Describe one model."),
    "/tokenize": Operation("post", "Return the tokens of a text or of a conversation.", TokenizeRequest),
    "/detokenize": Operation("post", "Return the text of tokens.", DetokenizeRequest),
    "/tokenizer_info": Operation("get", "Describe the tokenizer."),
    "/health": Operation("get", "Report whether the engine works.", media=""),
    "/metrics": Operation("get", "Return statistics for Prometheus.", media="text/plain"),
    "/version": Operation("get", "Return the version of the server."),
    "/reset_prefix_cache": Operation("post", "Forget cached prefixes (--admin)."),
    "/start_profile": Operation("post", "Start a profile (--admin, --profile-dir)."),
    "/stop_profile": Operation("post", "Stop the profile and return its file (--admin, --profile-dir)."),
}
"""Path → operation. `tests/test_serve.py` holds it against the routes of the application."""


def schema_routes(routers: Sequence[APIRouter], version: str) -> APIRouter:
    """Return the routes of the schema of an application that has `routers`."""
    router = APIRouter()
    api = schema({path: each for path, each in OPERATIONS.items() if path in paths_of(routers)}, version)

    @router.get("/openapi.json")
    async def openapi() -> Response:
        return json_response(api)

    @router.get("/docs")
    async def docs() -> Response:
        return HTMLResponse(DOCS.read_text(encoding="utf-8"))

    return router


def paths_of(routers: Sequence[APIRouter]) -> set[str]:
    """Return the paths of all routes as OpenAPI writes them."""
    routes = [route for each in routers for route in each.routes if isinstance(route, Route)]
    return {route.path.replace("{name:path}", "{name}") for route in routes}


def schema(operations: dict[str, Operation], version: str) -> dict[str, Any]:
    """Return the OpenAPI 3.1 schema of these operations."""
    bodies = [each.body for each in operations.values() if each.body is not None]
    _, definitions = models_json_schema([(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}")
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tandem", "version": version},
        "paths": {path: {each.method: described(path, each)} for path, each in operations.items()},
        "components": {
            "schemas": {**definitions.get("$defs", {}), "Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["integer", "string", "null"]},
            },
        }
    },
}
"""The body of an answer other than 200, as OpenAI has it."""


def described(path: str, operation: Operation) -> dict[str, Any]:
    """Return the OpenAPI operation object."""
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    content: dict[str, Any] = {operation.media: {}} if operation.media else {}
    if operation.body in (ChatRequest, CompletionRequest, ResponsesRequest):
        content["text/event-stream"] = {}
    answer: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "The answer.", "content": content},
            **{status: {"description": text, "content": error} for status, text in ERRORS.items()},
        },
    }
    if operation.body is not None:
        ref = {"$ref": f"#/components/schemas/{operation.body.__name__}"}
        answer["requestBody"] = {"required": True, "content": {"application/json": {"schema": ref}}}
    if "{name}" in path:
        answer["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    return answer
