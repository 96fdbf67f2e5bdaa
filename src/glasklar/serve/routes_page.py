"""Routes of the page: its files and the news of a run; those of conversations stand in `routes_chat.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

from glasklar.errors import RequestError
from glasklar.serve.backend import Backend
from glasklar.serve.routes_chat import add_chat_routes

PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def add_page_routes(app: FastAPI, backend: Backend) -> None:
    """Adds everything that the page asks for."""
    _pages(app)
    _news(app, backend)
    add_chat_routes(app, backend)


def _news(app: FastAPI, backend: Backend) -> None:
    @app.get("/run/status")
    def status() -> dict[str, Any]:
        service, news = backend.service, backend.news
        return {
            "state": backend.state,
            "model": None if service is None else service.name,
            "run": None if news is None else news.name,
            "error": backend.failure,
            "single_turn": service is not None and service.model.single_turn,
            "tracing": backend.tracing is not None,
        }

    @app.get("/run/metrics")
    def metrics(since: int = 0) -> dict[str, Any]:
        if since < 0:
            raise RequestError(f"since = {since}: a line number is wanted, 0 or more")
        return {"lines": [], "next": 0} if backend.news is None else backend.news.after(since)

    @app.get("/run/progress")
    def progress() -> dict[str, Any] | None:
        """Stages, time, energy and cost of the run; None where there is no run to show."""
        return None if backend.news is None else backend.news.progress()


def _pages(app: FastAPI) -> None:
    files = {path.name: path for path in sorted(PAGE.iterdir()) if path.suffix in TYPES}

    @app.get("/", include_in_schema=False)
    def index() -> FileResponse:
        return _file(files["index.html"])

    @app.get("/page/{name}", include_in_schema=False)
    def page(name: str) -> FileResponse:
        if name not in files:
            raise HTTPException(404, f"there is no file {name!r} of the page")
        return _file(files[name])

    @app.get("/favicon.ico", include_in_schema=False)
    def icon() -> FileResponse:
        return _file(files["icon.svg"])


def _file(path: Path) -> FileResponse:
    return FileResponse(path, media_type=TYPES[path.suffix], headers={"cache-control": "no-cache"})
