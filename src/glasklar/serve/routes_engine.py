"""Routes about the engine's process: whether it makes tokens, what it holds and has done."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from glasklar.serve.backend import Backend


def add_engine_routes(app: FastAPI, backend: Backend) -> None:
    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether a token comes within its deadline; 503 where none does."""
        service = backend.ready()
        await service.ready()
        return {"status": "ok", "model": service.name}

    @app.get("/engine")
    async def engine() -> dict[str, Any]:
        """The process, the line before it, and what it holds; 503 while it is being started."""
        service = backend.ready()
        return service.status | {"limits": vars(service.limits), "counters": await service.call("counters")}
