"""Routes for whoever does not take an answer on trust."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from glasklar.errors import RequestError
from glasklar.serve.backend import Backend
from glasklar.serve.trace import TraceRequest, traced


def add_audit_routes(app: FastAPI, backend: Backend) -> None:
    @app.post("/v1/trace")
    def trace(body: TraceRequest) -> dict[str, Any]:
        backend.ready()
        return traced(backend.tracing, body)

    @app.get("/v1/receipts/{reply}")
    def receipt(reply: str, choice: int = 0) -> dict[str, Any]:
        service = backend.ready()
        if backend.receipts is None:
            raise RequestError("this server was started without a key to sign receipts with")
        return backend.receipts.receipt(
            reply, choice, folder=service.model.folder, stamps=service.stamps, engine=service.engine
        )
