"""The application: routes over one worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from common.errors import TandemError
from common.serve import chat, completions, embeddings, responses, tokens
from common.serve.errors import ApiError, api_error
from common.serve.guard import Guard
from common.serve.model import ServedModel
from common.serve.profiler import Profiler
from common.serve.schema import schema_routes
from common.serve.serving import Serving, error_response, json_response

STATS_PATIENCE_S = 2.0
"""For the engine's current statistics, before the last known ones are served."""
PAGE = Path(__file__).with_name("page.html")
VERSION = version("tandem-infer")
UNKNOWN = {404: "There is nothing at this path; a client's base URL ends in v1.", 405: "This path does not take this method."}
"""Status → message in place of Starlette's."""
OFFERED_WITH = {
    "/reset_prefix_cache": "--admin",
    "/start_profile": "--admin and --profile-dir",
    "/stop_profile": "--admin and --profile-dir",
}
"""Path → the options that enable it."""
STARTED = int(time.time())

router = APIRouter()


@router.get("/v1/models")
async def models(http: HttpRequest) -> Response:
    model = Serving.of(http).model
    return json_response({"object": "list", "data": [card(model, name) for name in model.names]})


@router.get("/v1/models/{name:path}")
async def one_model(http: HttpRequest, name: str) -> Response:
    model = Serving.of(http).model
    model.check_name(name)
    return json_response(card(model, name))


def card(model: ServedModel, name: str) -> dict[str, Any]:
    entry = {"id": name, "object": "model", "created": STARTED, "owned_by": "tandem", "root": model.root.name}
    return {**entry, "parent": None, "max_model_len": model.max_model_len}


@router.get("/health")
async def health(http: HttpRequest) -> Response:
    """Return 200 while the step loop makes progress; with replicas, that of one replica of each kind, and list all replicas.

    A failure that can end by itself, because a replica loads, has a `Retry-After` header. Other failures have none."""
    serving = Serving.of(http)
    if serving.worker.hopeless:
        raise ApiError(503, "No engine is left.")
    if serving.worker.stalled > serving.stall_s:
        raise ApiError(503, "The step loop hangs.")
    parts = serving.worker.parts
    for part in parts:
        if not any(each.serves and each.step_seconds <= serving.stall_s for each in part):
            loads = any(not each.serves and not each.given_up for each in part)
            told = "No replica serves, or each of them hangs."
            raise ApiError(503, told, headers={"Retry-After": "30"} if loads else None)
    return json_response({"replicas": [each._asdict() for each in chain(*parts)]}) if parts else Response()


@router.get("/version")
async def tell_version() -> Response:
    return json_response({"version": VERSION})


@router.get("/metrics")
async def metrics(http: HttpRequest) -> Response:
    """Return the statistics of the engine, which reports them between two steps; during a long step, the last known ones."""
    serving = Serving.of(http)
    stats, age_s = await serving.worker.stats(STATS_PATIENCE_S)
    return Response(serving.metrics.text(stats, age_s), media_type="text/plain; version=0.0.4")


@router.get("/")
async def page() -> Response:
    return HTMLResponse(PAGE.read_text(encoding="utf-8"))


admin = APIRouter()


@admin.post("/reset_prefix_cache")
async def reset_prefix_cache(http: HttpRequest) -> Response:
    if not await Serving.of(http).worker.ask(lambda engine: engine.reset_prefix_cache()):
        raise ApiError(409, "Pages are in use; try again when no request is running.")
    return Response()


def profile_routes(serving: Serving, profiler: Profiler) -> APIRouter:
    """Return the routes of a server with a folder for profiles."""
    router = APIRouter()

    @router.post("/start_profile")
    async def start_profile() -> Response:
        profiler.start(serving.worker)
        return Response()

    @router.post("/stop_profile")
    async def stop_profile() -> Response:
        return json_response({"file": await profiler.stop(serving.worker)})

    return router


def create_app(
    serving: Serving, *, api_key: str | None = None, with_admin: bool = False, profiler: Profiler | None = None
) -> FastAPI:
    """The application. It closes worker and model when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        serving.worker.start(serving.metrics.observe)
        yield
        await asyncio.to_thread(serving.worker.close)
        serving.model.close()
        if serving.spans is not None:
            await asyncio.to_thread(serving.spans.close)

    app = new_app(lifespan)
    app.state.serving = serving
    routers = [router, completions.router, chat.router, responses.router, embeddings.router, tokens.router]
    routers += [admin] if with_admin else []
    if profiler is not None:
        routers.append(profile_routes(serving, profiler))
    for part in (*routers, schema_routes(routers, VERSION)):
        app.include_router(part)
    app.add_middleware(Guard, api_key=api_key)
    return app


def new_app(lifespan: Callable[[FastAPI], Any]) -> FastAPI:
    """An application without routes that answers errors as OpenAI does."""
    app = FastAPI(title="Tandem", version=VERSION, docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    async def refuse(http: HttpRequest, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            told = UNKNOWN.get(error.status_code, str(error.detail))
            if error.status_code == 404 and (options := OFFERED_WITH.get(http.url.path)):
                told = f"This path is offered by a server that was started with {options}."
            error = ApiError(error.status_code, told, headers=error.headers)
        return error_response(api_error(error))

    for kind in (ApiError, TandemError, HTTPException):
        app.add_exception_handler(kind, refuse)
    return app
