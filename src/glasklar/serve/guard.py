"""What every request passes before any route sees it, decided on the raw request: host, origin, size, pace; and the
headers that every reply carries."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glasklar.serve.limits import Limits

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

# The page loads its own files and talks to its own server, nothing else; it reads HTML in one place (page/dom.js).
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types glasklar"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-dns-prefetch-control", b"off"),  # a link's host name is looked up when it is followed, not when it is shown
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]
Headers = list[tuple[bytes, bytes]]
Refusal = tuple[int, dict[str, Any]]


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The one shape of all errors (OpenAI's)."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """ASGI middleware. A page of another site that resolves its own name to this address (DNS rebinding) is refused by
    its Host, one that posts here by its Origin; bodies are counted and timed while they come.

    hosts           names under which the server may be called
    any_address     whether it may also be called by any IP address: no page can be made to do that by its own name
    origins         pages of other sites that may call it ("https://chat.example"), none by default
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Iterable[str] = LOOPBACK,
        any_address: bool = False,
        origins: Iterable[str] = (),
        limits: Limits | None = None,
    ) -> None:
        self.app, self.hosts, self.any_address = app, frozenset(hosts), any_address
        self.origins = frozenset(origins)
        self.limits = limits or Limits()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = list(scope["headers"])
        open_to = self._open_to(headers)
        send = _with_headers(send, open_to)
        refusal = self._refusal(headers, open_to)
        if refusal is not None:
            # What is wrongly framed has no next request. Otherwise the rest of a body is passed over, so that its
            # sender gets to read this.
            close = [(b"connection", b"close")] if refusal[0] == 400 else []
            await reply(send, *refusal, headers=close)
        elif scope["method"] == "OPTIONS" and open_to is not None:
            await _preflight(headers, send)
        else:
            await self.app(scope, self._watched(receive), send)

    def _open_to(self, headers: Headers) -> bytes | None:
        """The origin of a request from another site, if it is one that may call."""
        origins = values(headers, b"origin")
        known = len(origins) == 1 and origins[0].decode("latin-1") in self.origins
        return origins[0] if known else None

    def _refusal(self, headers: Headers, open_to: bytes | None) -> Refusal | None:
        hosts = [value.decode("latin-1") for value in values(headers, b"host")]
        if len(hosts) != 1 or not self._knows(host_name(hosts[0])):
            shown = ", ".join(hosts) or "none"
            allowed = ", ".join(sorted(self.hosts))
            return 403, error_body(
                f"Host {shown!r} is not this server; use one of {allowed}", "permission_error", code="host_not_allowed"
            )
        origins = [value.decode("latin-1") for value in values(headers, b"origin")]
        if open_to is None and any(origin.partition("://")[2] != hosts[0] for origin in origins):
            return 403, error_body(
                f"Origin {', '.join(origins)!r} may not call this server", "permission_error", code="origin_not_allowed"
            )
        lengths = values(headers, b"content-length")
        if lengths and values(headers, b"transfer-encoding"):
            # Whoever stands between may believe the other one: two requests in one (smuggling).
            return 400, error_body("content-length beside transfer-encoding; send one of them", "invalid_request_error")
        if any(not value.isdigit() or int(value) > self.limits.body_bytes for value in lengths):
            return 413, self._too_large()
        return None

    def _knows(self, name: str) -> bool:
        return name in self.hosts or (self.any_address and _is_address(name))

    def _too_large(self) -> dict[str, Any]:
        most = self.limits.body_bytes
        return error_body(f"the body is larger than {most} bytes", "invalid_request_error", code="too_large")

    def _watched(self, receive: Receive) -> Receive:
        """A chunked body has no length to check first; one that grows too large, or comes too slowly, is cut off, which
        no parser accepts."""
        seen, complete, deadline = 0, False, asyncio.get_running_loop().time() + self.limits.body_seconds

        async def watched() -> Message:
            nonlocal seen, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                complete = True
                return {"type": "http.request", "body": b"", "more_body": False}
            seen += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if seen > self.limits.body_bytes:
                complete = True
                return {"type": "http.request", "body": b"", "more_body": False}
            return message

        return watched


def host_name(host: str) -> str:
    """The name in a Host header, without the port: "[::1]:8421" -> "::1"."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def values(headers: Headers, name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _with_headers(send: Send, open_to: bytes | None) -> Send:
    more = HEADERS
    if open_to is not None:
        more = [*HEADERS, (b"access-control-allow-origin", open_to), (b"vary", b"origin")]

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *more]}
        await send(message)

    return sending


async def _preflight(headers: Headers, send: Send) -> None:
    """A browser asks whether the page of an origin, which is one that may, may send what it is about to."""
    wanted = values(headers, b"access-control-request-headers")
    allowed = [
        (b"access-control-allow-methods", b"GET, POST, PUT, PATCH, DELETE"),
        (b"access-control-allow-headers", wanted[0] if wanted else b"authorization, content-type"),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": allowed})
    await send({"type": "http.response.body", "body": b""})


async def reply(send: Send, status: int, body: dict[str, Any], headers: Headers | None = None) -> None:
    """A whole JSON reply."""
    content = json.dumps(body).encode()
    length = (b"content-length", str(len(content)).encode())
    whole = [(b"content-type", b"application/json"), length, *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": whole})
    await send({"type": "http.response.body", "body": content})
