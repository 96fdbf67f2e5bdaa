"""Who comes in: keys, rates, quotas and places, checked on every request before any route, and the line in the log."""

from __future__ import annotations

import base64
import binascii
import json
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TextIO

from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glasklar.errors import BusyError, RecordError
from glasklar.serve.access import Access, Key, Rate, Visit, visiting
from glasklar.serve.fair import may_take
from glasklar.serve.guard import LOOPBACK, Guard, Headers, error_body, reply, values
from glasklar.serve.limits import Limits

VISIT = "glasklar.visit"  # where the gate leaves in the scope whose request it is
API = ("/v1/", "/anthropic/")
LOGGED_BODY = 1 << 16  # most bytes of a body that are logged where that is asked for


@dataclass(frozen=True, kw_only=True)
class AccessLog:
    """A line of JSON for every request. bodies: with what was sent, prompts included."""

    to: TextIO
    bodies: bool = False

    def write(self, line: dict[str, Any]) -> None:
        self.to.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.to.flush()


class Gate:
    """ASGI middleware, inside `Guard`. No path is exempt, so that none can be written in a way that is.

    access     keys and usage; None: nobody needs a key and nothing is counted
    required   whether a request without a valid key is refused; otherwise a key only says whose it is
    """

    def __init__(
        self, app: ASGIApp, access: Access | None = None, required: bool = False, limits: Limits | None = None
    ) -> None:
        assert access is not None or not required, "without keys none can be required"
        self.app, self.access, self.required = app, access, required
        self.limits = limits or Limits()
        self.rate = Rate()
        self.held: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            key = self._key(scope["headers"])
        except RecordError as error:
            await reply(send, 503, error_body(str(error), "server_error", code="unavailable"))
            return
        if key is None and self.required:
            await _unauthorised(send)
            return
        visit = Visit(access=self.access)
        if key is not None:
            visit = Visit(access=self.access, key=key.id, name=key.name, quota=key.tokens_per_day)
        scope[VISIT] = visit
        with visiting(visit):
            await self._let_in(scope, receive, send, key, visit)

    def _key(self, headers: Headers) -> Key | None:
        secret = secret_of(headers)
        return None if secret is None or self.access is None else self.access.find(secret)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send, key: Key | None, visit: Visit) -> None:
        work = scope["method"] == "POST"
        try:
            if work or scope["path"].startswith(API):  # the page looks often, and that costs nothing
                self._check_rate(key)
            if work:
                visit.check()
                self._take_place(visit.key)
        except BusyError as error:
            await _busy(send, error)
            return
        if not work:
            await self.app(scope, receive, send)
            return
        try:
            if self.access is not None:
                self.access.count(visit.key, requests=1)
            await self.app(scope, receive, send)
        finally:
            visit.settle()
            self.held[visit.key] -= 1
            if not self.held[visit.key]:
                del self.held[visit.key]

    def _check_rate(self, key: Key | None) -> None:
        if key is None or key.requests_per_minute is None:
            return
        wait = self.rate.take(key.id, key.requests_per_minute, time.monotonic())
        if wait:
            raise BusyError(
                f"the key {key.name!r} may send {key.requests_per_minute} requests a minute", math.ceil(wait)
            )

    def _take_place(self, key: str) -> None:
        free = self.limits.requests - self.held.total()
        if not may_take(self.held[key], free, not callers_compete(self.access, self.required)):
            whose = "" if free <= 0 else f", {self.held[key]} of them with the same key"
            raise BusyError(f"{self.held.total()} requests are being answered or wait{whose}; try again in a moment")
        self.held[key] += 1


def secret_of(headers: Headers) -> str | None:
    """The key that a request carries: as a bearer's (OpenAI), in x-api-key (Anthropic), or as the password that a
    browser asks for."""
    for value in values(headers, b"authorization"):
        kind, _, rest = value.decode("latin-1").partition(" ")
        if kind.lower() == "bearer":
            return rest.strip()
        if kind.lower() == "basic":
            try:
                return base64.b64decode(rest, validate=True).decode("latin-1").partition(":")[2]
            except (binascii.Error, ValueError):
                return None
    return next((value.decode("latin-1") for value in values(headers, b"x-api-key")), None)


class Logged:
    """ASGI middleware, the outermost: writes the line of each request, of those that are refused too."""

    def __init__(self, app: ASGIApp, log: AccessLog) -> None:
        self.app, self.log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status, sent, body = time.perf_counter(), None, 0, bytearray()

        async def receiving() -> Message:
            message = await receive()
            if self.log.bodies:
                body.extend(message.get("body", b"")[: LOGGED_BODY - len(body)])
            return message

        async def sending(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receiving, sending)
        finally:
            visit, client = scope.get(VISIT) or Visit(), scope.get("client")
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "client": client[0] if client else None,
                "key": visit.name or None,
                "method": scope["method"],
                "path": scope["path"][:256],
                "status": status,
                "ms": round((time.perf_counter() - begin) * 1000, 1),
                "bytes": sent,
                "prompt_tokens": visit.prompt_tokens,
                "completion_tokens": visit.completion_tokens,
            }
            self.log.write(line | ({"body": body.decode(errors="replace")} if self.log.bodies else {}))


async def _unauthorised(send: Send) -> None:
    """Browsers ask for a name, which does not matter, and a password: the key."""
    body = error_body(
        "a valid key is needed: Authorization: Bearer KEY", "authentication_error", code="invalid_api_key"
    )
    await reply(send, 401, body, [(b"www-authenticate", b'Basic realm="glasklar: key as password", charset="UTF-8"')])


async def _busy(send: Send, error: BusyError) -> None:
    body = error_body(str(error), "rate_limit_error", code="rate_limit_exceeded")
    await reply(send, 429, body, [(b"retry-after", str(error.retry_after).encode())])


@dataclass(frozen=True, kw_only=True)
class Door:
    """How a server may be reached: the settings of `Guard` and `Gate`."""

    hosts: frozenset[str] = LOOPBACK
    any_address: bool = False
    origins: tuple[str, ...] = ()
    access: Access | None = None
    key_required: bool = False
    log: AccessLog | None = None
    limits: Limits = field(default_factory=Limits)

    def alone(self) -> bool:
        """Whether there is one caller only at the moment, who need not leave anything to others."""
        return not callers_compete(self.access, self.key_required)

    def keep(self, app: Starlette) -> None:
        """Puts both before an application, and the log before them. The last one added is the first to be asked."""
        app.add_middleware(Gate, access=self.access, required=self.key_required, limits=self.limits)
        app.add_middleware(
            Guard, hosts=self.hosts, any_address=self.any_address, origins=self.origins, limits=self.limits
        )
        if self.log is not None:
            app.add_middleware(Logged, log=self.log)


def callers_compete(access: Access | None, key_required: bool) -> bool:
    """Whether there is more than one caller: each key, and whoever has none where none is needed."""
    return access is not None and len(access.valid()) + (not key_required) > 1
