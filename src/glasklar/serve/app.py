"""The HTTP surface: OpenAI's chat API with DeepSeek's extensions, the page, and the news of a run in the making."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from glasklar.errors import BusyError, CapacityError, GlasklarError
from glasklar.loading import ModelFolder
from glasklar.serve.backend import Backend
from glasklar.serve.chat import collect, stream
from glasklar.serve.gate import Door
from glasklar.serve.guard import error_body
from glasklar.serve.routes_audit import add_audit_routes
from glasklar.serve.routes_engine import add_engine_routes
from glasklar.serve.routes_page import add_page_routes
from glasklar.serve.schema import ChatRequest
from glasklar.serve.service import ModelService

HEARTBEAT = 15.0  # seconds of silence after which a stream says that it is alive

T = TypeVar("T")


def create_app(backend: Backend, door: Door | None = None) -> FastAPI:
    """The application. `door`: how it may be reached; by default from this machine, without a key."""
    app = FastAPI(title="glasklar", version=version("glasklar"), docs_url=None, redoc_url=None)
    (door or Door()).keep(app)
    _errors(app)
    add_page_routes(app, backend)
    _api(app, backend)
    add_audit_routes(app, backend)
    add_engine_routes(app, backend)
    return app


def _api(app: FastAPI, backend: Backend) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        service = backend.service
        return {"object": "list", "data": [] if service is None else [_model(service.model)]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        return _model(_named(backend, name).model)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        service = _named(backend, body.model)
        ids = service.prompt([message.message() for message in body.messages], body.thinks)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}
        if body.stream:
            chunks = with_heartbeats(stream(service, body, ids, head))
            return StreamingResponse(chunks, media_type="text/event-stream", headers={"cache-control": "no-store"})
        reply = await _unless_gone(request, collect(service, body, ids, head))
        return JSONResponse(reply) if reply is not None else Response(status_code=499)


def _named(backend: Backend, name: str) -> ModelService:
    """The service of a model. Raises HTTPException 404 for another name, so that nobody talks to the wrong model."""
    service = backend.ready()
    if name != service.name:
        raise HTTPException(404, f"no model {name!r} here; this server has {service.name!r}")
    return service


def _model(model: ModelFolder) -> dict[str, Any]:
    created = int((model.folder / "config.json").stat().st_mtime)
    context = model.config.max_position_embeddings
    return {"id": model.name, "object": "model", "created": created, "owned_by": "glasklar", "context_length": context}


async def with_heartbeats(events: AsyncGenerator[dict[str, Any], None]) -> AsyncIterator[str]:
    """Server-sent events; comments in long silences; an error ends the stream as an event of its own."""
    pending: asyncio.Task[dict[str, Any]] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({pending}, timeout=HEARTBEAT)
            if not done:
                yield ": keep-alive\n\n"
                continue
            finished, pending = pending, None
            try:
                yield f"data: {json.dumps(finished.result(), ensure_ascii=False)}\n\n"
            except StopAsyncIteration:
                break
            except GlasklarError as error:
                yield f"data: {json.dumps(_described(error)[1], ensure_ascii=False)}\n\n"
                break
        yield "data: [DONE]\n\n"
    finally:
        if pending is not None:
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, GlasklarError):
                await pending
        await events.aclose()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None if the caller hung up first: then the work is cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- errors ------------------------------------------------------------------------------------------------------


def _described(error: GlasklarError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of an error; clients may try again only where that can help."""
    if isinstance(error, BusyError):
        headers = {"retry-after": str(error.retry_after)}
        return 429, error_body(str(error), "rate_limit_error", code="rate_limit_exceeded"), headers
    if isinstance(error, CapacityError):
        headers = {"retry-after": "5"}
        return 503, error_body(str(error), "server_error", code="unavailable"), headers
    return 400, error_body(str(error), "invalid_request_error"), {}


def _errors(app: FastAPI) -> None:
    @app.exception_handler(GlasklarError)
    async def ours(_: Request, error: GlasklarError) -> JSONResponse:
        status, body, headers = _described(error)
        return JSONResponse(body, status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or None
        what = "is not known here" if first["type"] == "extra_forbidden" else first["msg"]
        message = f"{place}: {what}" if place else what
        return JSONResponse(error_body(message, "invalid_request_error", place), 400)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        body = error_body(str(error.detail), "invalid_request_error", code=code)
        return JSONResponse(body, error.status_code, headers=getattr(error, "headers", None))

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> JSONResponse:
        body = error_body(f"a fault of the server ({type(error).__name__}); its log has the details", "server_error")
        return JSONResponse(body, 500, headers={"x-should-retry": "false"})
