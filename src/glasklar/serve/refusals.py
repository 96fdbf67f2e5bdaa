"""Errors on their way out: one shape for all, whoever raised them. Only here HTTP's numbers for them are known."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from glasklar.errors import BusyError, CapacityError, GlasklarError
from glasklar.serve.guard import error_body

# Parts of a place that are names of fields; the others are of our own forms.
_NAME = re.compile(r"(?!(?:str|int|float|bool|list|dict)$)[a-z_][a-z0-9_]*|[0-9]+")
_UNREAD = {"image_url", "image", "input_image", "input_audio", "audio", "file", "input_file", "document", "video_url"}
_UNREADABLE = "the body is no JSON text in UTF-8, or its brackets are nested too deep"
# Our own checks begin their messages with the parameter's name.
_NAMED = re.compile(r"(?:Value error, )?([a-z_]+(?:\.[a-z_]+)*): ")


def described(error: GlasklarError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of an error; clients may try again only where that can help."""
    if isinstance(error, BusyError):
        headers = {"retry-after": str(error.retry_after)}
        return 429, error_body(str(error), "rate_limit_error", code="rate_limit_exceeded"), headers
    if isinstance(error, CapacityError):
        headers = {"retry-after": "5"}
        return 503, error_body(str(error), "server_error", code="unavailable"), headers
    return 400, error_body(str(error), "invalid_request_error", _param(str(error))), {}


def add_error_handlers(app: FastAPI) -> None:
    """FastAPI's own errors too get the one shape."""

    @app.exception_handler(GlasklarError)
    async def ours(_: Request, error: GlasklarError) -> JSONResponse:
        status, body, headers = described(error)
        return JSONResponse(body, status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # Of the forms that a value may have, the one that it comes closest to has the deepest fault.
        first = max(error.errors(), key=lambda each: len(each["loc"]))
        if first["type"] == "json_invalid":
            what = f"the body is no JSON ({first['ctx']['error']} at character {first['loc'][-1]})"
            return JSONResponse(error_body(_safe(what), "invalid_request_error"), 400)
        if isinstance(first.get("input"), bytes):  # FastAPI reads JSON only where the header says that it is
            what = "the body is JSON; say so in a header: content-type: application/json"
            return JSONResponse(error_body(what, "invalid_request_error"), 400)
        names = [str(part) for part in first["loc"] if part != "body" and _NAME.fullmatch(str(part))]
        place = ".".join(names) or None
        if names and names[-1] == "type" and str(first.get("input")) in _UNREAD:
            what, place = f"{first['input']} cannot be read here, only text", ".".join(names[:-1])
            return JSONResponse(error_body(_safe(f"{place}: {what}"), "invalid_request_error", _safe(place)), 400)
        what = "is not known here" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        param = place or _param(what)
        message = what if what.startswith(f"{param}: ") else f"{place}: {what}" if place else what
        return JSONResponse(error_body(_safe(message), "invalid_request_error", param and _safe(param)), 400)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        said = _UNREADABLE if error.detail == "There was an error parsing the body" else str(error.detail)
        body = error_body(_safe(said), "invalid_request_error", code=code)
        return JSONResponse(body, error.status_code, headers=getattr(error, "headers", None))

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> JSONResponse:
        body = error_body(f"a fault of the server ({type(error).__name__}); its log has the details", "server_error")
        return JSONResponse(body, 500, headers={"x-should-retry": "false"})


def _param(message: str) -> str | None:
    found = _NAMED.match(message)
    return found[1] if found else None


def _safe(text: str) -> str:
    """What a client sent may hold halves of characters, which no reply can carry."""
    return text.encode(errors="replace").decode()[:2000]
