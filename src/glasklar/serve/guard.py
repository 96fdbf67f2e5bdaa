"""What every request passes before any route sees it, decided on the raw request: host, origin, size; and the headers
that every reply carries."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 4 << 20
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

# The page loads its own files and talks to its own server, nothing else.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The one shape of all errors (OpenAI's)."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """ASGI middleware. A page of another site that resolves its own name to this address (DNS rebinding) is refused by
    its Host, one that posts here by its Origin; bodies are counted while they come."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str] = LOOPBACK, max_body: int = MAX_BODY) -> None:
        self.app, self.hosts, self.max_body = app, frozenset(hosts), max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = _with_headers(send)
        headers = list(scope["headers"])
        refusal = self._refusal(headers)
        if refusal is not None:
            await _reply(send, *refusal)
            return
        await self.app(scope, self._counted(receive), send)

    def _refusal(self, headers: list[tuple[bytes, bytes]]) -> tuple[int, dict[str, Any]] | None:
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        if len(hosts) != 1 or host_name(hosts[0]) not in self.hosts:
            shown = ", ".join(hosts) or "none"
            allowed = ", ".join(sorted(self.hosts))
            return 403, error_body(
                f"Host {shown!r} is not this server; use one of {allowed}", "permission_error", code="host_not_allowed"
            )
        origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
        if any(origin.partition("://")[2] != hosts[0] for origin in origins):
            return 403, error_body(
                f"Origin {', '.join(origins)!r} may not call this server", "permission_error", code="origin_not_allowed"
            )
        lengths = [value for name, value in headers if name == b"content-length"]
        if any(not value.isdigit() or int(value) > self.max_body for value in lengths):
            return 413, self._too_large()
        return None

    def _too_large(self) -> dict[str, Any]:
        return error_body(f"the body is larger than {self.max_body} bytes", "invalid_request_error", code="too_large")

    def _counted(self, receive: Receive) -> Receive:
        """A chunked body has no length to check first; one that grows too large is cut off, which no parser accepts."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_body:
                return {"type": "http.request", "body": b"", "more_body": False}
            return message

        return counted


def host_name(host: str) -> str:
    """The name in a Host header, without the port: "[::1]:8421" -> "::1"."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
        await send(message)

    return sending


async def _reply(send: Send, status: int, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
