"""The HTTP surface put together: who may come in, the routes, the one shape of errors."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI

from glasklar.serve.backend import Backend
from glasklar.serve.gate import Door
from glasklar.serve.metrics import Counted
from glasklar.serve.refusals import add_error_handlers
from glasklar.serve.routes_api import add_api_routes
from glasklar.serve.routes_audit import add_audit_routes
from glasklar.serve.routes_docs import add_docs_routes
from glasklar.serve.routes_engine import add_engine_routes
from glasklar.serve.routes_page import add_page_routes


def create_app(backend: Backend, door: Door | None = None) -> FastAPI:
    """The application. `door`: how it may be reached; by default from this machine, without a key."""
    app = FastAPI(title="glasklar", version=version("glasklar"), docs_url=None, redoc_url=None)
    (door or Door()).keep(app)
    app.add_middleware(Counted, metrics=backend.metrics)
    add_error_handlers(app)
    add_page_routes(app, backend)
    add_api_routes(app, backend)
    add_audit_routes(app, backend)
    add_engine_routes(app, backend)
    add_docs_routes(app)
    return app
