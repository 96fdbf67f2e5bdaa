"""Starting to serve: the address and who may reach it, the pace of connections, and the end that finishes what runs."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from glasklar.errors import CapacityError, RequestError
from glasklar.loading import ModelFolder, pages_under
from glasklar.serve.access import FILE, Access
from glasklar.serve.app import create_app
from glasklar.serve.backend import Backend
from glasklar.serve.conversations import conversations_in
from glasklar.serve.gate import AccessLog, Door
from glasklar.serve.guard import LOOPBACK, error_body
from glasklar.serve.limits import Limits
from glasklar.serve.news import RunNews
from glasklar.serve.receipts import Receipts
from glasklar.serve.service import ModelService
from glasklar.serve.trace import Tracing

Progress = Callable[[int, int], None]

BACKLOG = 4096  # connections that the system keeps until they are taken
IDLE_SECONDS = 30  # after which a connection without a request is closed
EVERYWHERE = frozenset({"0.0.0.0", "::"})


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where and how to serve, as the command line gives it.

    names            names under which others may call it, beside its address
    origins          pages of other sites that may call it ("https://chat.example")
    certificate, private_key   PEM files; both or none
    key_required     also on the loopback address; on any other it is in any case
    log              a file for a line of JSON a request, "-" for stderr; log_bodies: with what was sent
    """

    home: Path
    host: str = "127.0.0.1"
    port: int = 8421
    names: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    certificate: Path | None = None
    private_key: Path | None = None
    key_required: bool = False
    log: str | None = None
    log_bodies: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.private_key is None):
            raise RequestError("TLS needs both files: give --tls-cert and --tls-key, or none of them")
        for path in (self.certificate, self.private_key):
            if path is not None and not path.is_file():
                raise RequestError(f"{path}: no such file; give the certificate and its private key as PEM files")
        for origin in self.origins:
            scheme, _, rest = origin.partition("://")
            if scheme not in ("http", "https") or not rest or "/" in rest:
                raise RequestError(f"--allow-origin {origin}: write it as a browser does, https://chat.example")
        if self.log_bodies and self.log is None:
            raise RequestError("--log-prompts without --access-log: say where to")


@contextmanager
def opened(site: Site) -> Iterator[tuple[socket.socket, Door]]:
    """The site's socket, bound but not yet listening, and its door.

    Raises RequestError for an address that others can reach while there is no key, CapacityError for a taken port.
    """
    access = Access(site.home / FILE)
    try:
        with bound(site.host, site.port) as listening, _log(site) as log:
            address = listening.getsockname()[0]
            local = ipaddress.ip_address(address).is_loopback
            if not (local and not site.key_required) and not access.valid():
                where = f"--host {site.host}: others could reach it" if not local else "--require-key"
                raise RequestError(f"{where}, and there is no key yet; make one with: glasklar keys add NAME")
            door = Door(
                hosts=LOOPBACK | {site.host, address} | set(site.names),
                any_address=not local,
                origins=site.origins,
                access=access,
                key_required=site.key_required or not local,
                log=log,
                limits=site.limits,
            )
            yield listening, door
    finally:
        access.close()


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises CapacityError where that cannot be had."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise CapacityError(f"port {port} of {host}: {error.strerror}; choose another one with --port") from None
        raise CapacityError(
            f"--host {host}: {error.strerror}; give an address of this machine, 127.0.0.1 or 0.0.0.0 for all of them"
        ) from None
    return listening


@contextmanager
def _log(site: Site) -> Iterator[AccessLog | None]:
    if site.log is None:
        yield None
    elif site.log == "-":
        yield AccessLog(to=sys.stderr, bodies=site.log_bodies)
    else:
        try:
            descriptor = os.open(site.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise RequestError(f"--access-log {site.log}: {error.strerror}; name a file that can be written") from None
        with open(descriptor, "a", encoding="utf-8") as file:
            yield AccessLog(to=file, bodies=site.log_bodies)


def url_of(listening: socket.socket, site: Site) -> str:
    """Where a browser on this machine, or by the first of its names, finds the site."""
    host, port = listening.getsockname()[:2]
    if host in EVERYWHERE:
        host = site.names[0] if site.names else "127.0.0.1" if host == "0.0.0.0" else "::1"
    scheme = "http" if site.certificate is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class PacedProtocol(H11Protocol):
    """uvicorn's HTTP, with bounds on waiting: for a head that comes byte by byte (slow loris), for a client that takes
    nothing of its reply; and on the number of connections."""

    limits: Limits
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.abort()
            return
        self._await_head(self.limits.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_head_timer(None)
        self._set_stall_timer(None)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._set_head_timer(None)

    def on_response_complete(self) -> None:
        # Set first: the next request may be here already, and its head cancels the timer.
        self._await_head(self.limits.head_seconds + IDLE_SECONDS)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """In the one shape of all errors."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # a reply is under way; nothing can be said any more
            return
        content = json.dumps(error_body(msg, "invalid_request_error")).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(content))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_stall_timer(self.loop.call_later(self.limits.stall_seconds, self.transport.abort))

    def resume_writing(self) -> None:
        super().resume_writing()
        self._set_stall_timer(None)

    def _await_head(self, seconds: float) -> None:
        self._set_head_timer(self.loop.call_later(seconds, self.transport.abort))

    def _set_head_timer(self, timer: asyncio.TimerHandle | None) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = timer

    def _set_stall_timer(self, timer: asyncio.TimerHandle | None) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        self._stall_timer = timer


def server_of(backend: Backend, door: Door, site: Site) -> uvicorn.Server:
    """The HTTP server. It ends when what it streams is done, or what it streams has had its time, or at a
    second signal."""
    logging.getLogger("uvicorn.error").addFilter(_not_cut_off)
    config = uvicorn.Config(
        create_app(backend, door),
        http=type("Protocol", (PacedProtocol,), {"limits": door.limits}),
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=int(door.limits.request_seconds) + 1,
        ssl_certfile=site.certificate,
        ssl_keyfile=site.private_key,
    )
    return uvicorn.Server(config)


def _not_cut_off(record: logging.LogRecord) -> bool:
    """Who stops a server twice knows that what is streamed ends there: no traceback then."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def serve(
    model: ModelFolder,
    site: Site,
    *,
    run: Path | None = None,
    tracing: Tracing | None = None,
    loading: Callable[[], AbstractContextManager[Progress]] = lambda: nullcontext(lambda done, total: None),
) -> None:
    """Serves a model until Ctrl-C.

    run       the run that it came from, whose training the page shows
    tracing   finds what its training documents hold
    loading   open while the model is loaded; gives what is told bytes read and bytes in all
    """
    allow_many_connections()
    with opened(site) as (listening, door), terminable():
        with loading() as progress:
            service = ModelService(
                model, site.limits, alone=door.alone, pages=pages_under(site.home), progress=progress
            )
        news = None if run is None else RunNews(run)
        url = url_of(listening, site)
        listening.listen(BACKLOG)  # whoever reads the next line may call at once
        print(f"{service.name} at {url} · API: {url}/v1 · Ctrl-C stops", flush=True)
        backend = Backend(
            service=service,
            news=news,
            tracing=tracing,
            conversations=conversations_in(site.home),
            receipts=Receipts(site.home),
        )
        try:
            server_of(backend, door, site).run(sockets=[listening])
        except KeyboardInterrupt:
            print("stopped")
        finally:
            service.close()
            backend.conversations.close()


@contextmanager
def terminable() -> Iterator[None]:
    """A service manager's signal is a Ctrl-C here, so that what must be put in order at the end is."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def allow_many_connections() -> None:
    """Each connection is an open file; many systems allow 1,024 unless one asks for more."""
    try:
        import resource
    except ImportError:
        return  # Windows has no such limit
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
