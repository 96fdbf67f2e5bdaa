"""Routes for whoever does not take an answer on trust."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from glasklar.serve.backend import Backend
from glasklar.serve.trace import TraceRequest, traced


def add_audit_routes(app: FastAPI, backend: Backend) -> None:
    @app.post("/v1/trace")
    def trace(body: TraceRequest) -> dict[str, Any]:
        backend.ready()
        return traced(backend.tracing, body)
