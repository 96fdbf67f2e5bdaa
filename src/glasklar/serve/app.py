"""The HTTP surface: OpenAI's chat API with DeepSeek's extensions, the page, and the news of a run in the making."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from glasklar.errors import CapacityError, GlasklarError, RequestError
from glasklar.loading import Model
from glasklar.serve.backend import Backend
from glasklar.serve.chat import collect, stream
from glasklar.serve.conversations import conversations_in
from glasklar.serve.guard import LOOPBACK, Guard, error_body
from glasklar.serve.news import RunNews
from glasklar.serve.routes_audit import add_audit_routes
from glasklar.serve.routes_page import add_page_routes
from glasklar.serve.schema import ChatRequest
from glasklar.serve.service import ModelService
from glasklar.serve.trace import Tracing

HEARTBEAT = 15.0  # seconds of silence after which a stream says that it is alive

T = TypeVar("T")


def create_app(backend: Backend, hosts: frozenset[str] = LOOPBACK) -> FastAPI:
    """The application. `hosts`: names under which it may be called."""
    app = FastAPI(title="glasklar", version=version("glasklar"), docs_url=None, redoc_url=None)
    app.add_middleware(Guard, hosts=hosts)
    _errors(app)
    add_page_routes(app, backend)
    _api(app, backend)
    add_audit_routes(app, backend)
    return app


def _api(app: FastAPI, backend: Backend) -> None:
    @app.get("/health")
    def health() -> dict[str, str]:
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


def _model(model: Model) -> dict[str, Any]:
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


# --- starting ----------------------------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises RequestError for an address that others can reach, CapacityError for a taken port."""
    if host not in LOOPBACK:
        raise RequestError(
            f"--host {host}: others could reach it, and there is no access control yet; "
            "serve on 127.0.0.1 and let a reverse proxy with authentication stand before it"
        )
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise CapacityError(f"port {port} of {host}: {error.strerror}; choose another one with --port") from None
    return listening


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server_of(backend: Backend) -> uvicorn.Server:
    config = uvicorn.Config(
        create_app(backend), log_level="warning", access_log=False, timeout_graceful_shutdown=5, server_header=False
    )
    return uvicorn.Server(config)


def serve(
    model: Model,
    *,
    host: str = "127.0.0.1",
    port: int = 8421,
    run: Path | None = None,
    tracing: Tracing | None = None,
    home: Path | None = None,
) -> None:
    """Serves a model until Ctrl-C. If it came from a run: `run`, the folder whose training the page shows, and
    `tracing`, which finds what its training documents hold. `home`: where conversations are kept, None: they end with
    the server."""
    with listen(host, port) as listening:
        service = ModelService(model)
        news = None if run is None else RunNews(run)
        print(f"{service.name} at {url_of(listening)} · API: {url_of(listening)}/v1 · Ctrl-C stops", flush=True)
        backend = Backend(service=service, news=news, tracing=tracing, conversations=conversations_in(home))
        try:
            server_of(backend).run(sockets=[listening])
        except KeyboardInterrupt:
            print("stopped")
        finally:
            service.close()
            backend.conversations.close()
