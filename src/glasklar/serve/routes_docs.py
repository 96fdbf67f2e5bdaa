"""The API's own description: the OpenAPI document with the one shape of errors in it, and a page of it that loads
nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import FastAPI
from starlette.responses import HTMLResponse

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def add_docs_routes(app: FastAPI) -> None:
    """Adds the page at /docs and mends the document at /openapi.json."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        """FastAPI's document, but errors as they are: never its own 422."""
        document = made()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        if "Error" in schemas:
            return document
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        schemas["Error"] = ERROR
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        for operation in _operations(document):
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = {"description": "Refused or failed", "content": content}
        return document

    app.openapi = openapi  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()))


def page(document: dict[str, Any]) -> str:
    """The document as plain HTML: every route with what it takes."""
    schemas = document["components"]["schemas"]
    parts = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            schema = schemas.get(body.get("$ref", "").rpartition("/")[2])
            described = (schema or {}).get("description") or operation.get("description", "")
            parts += [f"<p>{escape(paragraph)}</p>" for paragraph in described.split("\n\n") if paragraph]
            if schema is not None:
                parts.append(_fields(schema))
    title = escape(f"{document['info']['title']} {document['info']['version']}: API")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{title}</title><link rel="stylesheet" href="/page/style.css">'
        f'<main><h1>{title}</h1><p>The whole document: <a href="/openapi.json">openapi.json</a></p>'
        f"{''.join(parts)}</main></html>"
    )


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for methods in document["paths"].values():
        yield from methods.values()


def _fields(schema: dict[str, Any]) -> str:
    needed = set(schema.get("required", ()))
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(_kind(field))}</td>"
        f"<td>{'needed' if name in needed else ''}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    )
    return f"<table>{rows}</table>"


def _kind(field: dict[str, Any]) -> str:
    """What a field takes, in a few words."""
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(_kind(one) for one in field["anyOf"] if one.get("type") != "null")
    if "enum" in field or "const" in field:
        return ", ".join(repr(one) for one in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    bounds = [f"{sign} {field[name]}" for name, sign in _BOUNDS.items() if name in field]
    return " ".join([str(field.get("type", "anything")), ", ".join(bounds)]).strip()


_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "maxLength": "length ≤"}
