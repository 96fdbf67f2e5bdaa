"""Streams to clients: server-sent events, the errors in them, and what becomes of a caller who hangs up."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, Generic, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from glasklar.errors import GlasklarError

HEARTBEAT = 15.0  # seconds of silence after which a stream says that it is alive
ALIVE = ": keep-alive\n\n"
PATIENCE = 0.2  # seconds that a stream waits for its first token, so that a refusal can still become a status

T = TypeVar("T")
Event = dict[str, Any]


class Begun(Generic[T]):
    """An iteration whose first item is under way already. `close` ends it, however far it is."""

    def __init__(self, source: AsyncGenerator[T, None]) -> None:
        self._source = source
        self._first: asyncio.Future[T] | None = asyncio.ensure_future(anext(source))

    async def look(self) -> None:
        """Waits a moment for the first item. Raises its error if it has one."""
        first = self._first
        assert first is not None
        await asyncio.wait({first}, timeout=PATIENCE)
        if first.done() and first.exception() is not None:
            await first

    def __aiter__(self) -> Begun[T]:
        return self

    async def __anext__(self) -> T:
        if self._first is None:
            return await anext(self._source)
        first, self._first = self._first, None
        try:
            return await first
        except asyncio.CancelledError:
            first.cancel()
            raise

    async def close(self) -> None:
        if self._first is not None:
            self._first.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, GlasklarError):
                await self._first
        await self._source.aclose()


class EventStream(StreamingResponse):
    """Events as they come. `source` is closed with the response, however that ends."""

    def __init__(self, content: AsyncIterator[str], source: Begun[Any]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.close()


def plain(event: Event) -> str:
    """OpenAI's chat and completions: nameless events."""
    return f"data: {_json(event)}\n\n"


def by_type(event: Event) -> str:
    """Responses and Messages: events named by their type."""
    return f"event: {event['type']}\ndata: {_json(event)}\n\n"


async def with_silences(events: AsyncGenerator[T, None]) -> AsyncGenerator[T | None, None]:
    """The events, and None after every HEARTBEAT seconds without one. `events` is closed at the end."""
    pending: asyncio.Task[T] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({pending}, timeout=HEARTBEAT)
            if not done:
                yield None
                continue
            finished, pending = pending, None
            try:
                event = finished.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        if pending is not None:
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, GlasklarError):
                await pending
        await events.aclose()


async def with_heartbeats(
    events: AsyncGenerator[Event, None],
    write: Callable[[Event], str],
    failed: Callable[[GlasklarError], Event],
    last: str = "",
) -> AsyncIterator[str]:
    """Server-sent events; comments in long silences; an error ends the stream as an event of its own.

    failed   the event of an error
    last     what ends the stream
    """
    heard = with_silences(events)
    try:
        try:
            async for event in heard:
                yield ALIVE if event is None else write(event)
        except GlasklarError as error:
            yield write(failed(error))
        if last:
            yield last
    finally:
        await heard.aclose()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None if the caller hung up first: then the work is cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()
        # What is cancelled ends before its source is closed. (Its error, if it has one, was raised above.)
        await asyncio.wait({task, gone})


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(event: Event) -> str:
    return json.dumps(event, ensure_ascii=False)
