"""Answers for many callers from one engine: a thread owns the engine, callers hold mailboxes. Messages are plain data,
so that the engine can move into a process of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from glasklar.data.chat import Message, render
from glasklar.engine.engine import Engine
from glasklar.engine.request import SamplingParams, TokenEvent
from glasklar.errors import CapacityError, CheckpointError, GlasklarError, RequestError
from glasklar.loading import Model
from glasklar.serve.grammar import GuideMaker, GuideSpec

log = logging.getLogger(__name__)

MAX_WAITING = 256
IDLE_WAIT = 0.25  # seconds between looks at the stop flag while there is nothing to do


@dataclass(frozen=True, kw_only=True)
class Submit:
    """A request on its way to the engine; its tokens come back through `mailbox`, which belongs to `loop`."""

    prompt: list[int]
    params: SamplingParams
    guide: GuideSpec | None
    priority: int
    mailbox: Mailbox


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for this answer any more."""

    mailbox: Mailbox


@dataclass(eq=False)
class Mailbox:
    """Where one caller's tokens arrive. `put` may be called from any thread."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[TokenEvent | GlasklarError] = field(default_factory=asyncio.Queue)
    request: int | None = None

    def put(self, item: TokenEvent | GlasklarError) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)


class ModelService:
    """One model behind one engine. `close` ends the thread; requests still running get an error."""

    def __init__(self, model: Model) -> None:
        if model.tokenizer is None:
            raise CheckpointError(f"{model.folder}: has no tokenizer.json; use `glasklar generate --prompt-ids`")
        self.model, self.tokenizer, self.name = model, model.tokenizer, model.name
        self.engine = Engine(model.network)
        self.guides = GuideMaker(model.tokenizer, model.config.vocab_size)
        self._inbox: deque[Submit | Cancel] = deque()
        self._open: dict[int, Mailbox] = {}
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def context(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def waiting(self) -> int:
        """Requests that are queued or running."""
        return len(self._inbox) + len(self._open)

    def prompt(self, messages: list[Message], thinking: bool | None) -> list[int]:
        """Prompt ids. Raises RequestError where no room for an answer is left, naming both numbers."""
        ids = render(self.tokenizer, messages, thinking)
        if len(ids) >= self.context:
            raise RequestError(f"the prompt has {len(ids)} tokens, the model's context is {self.context}; shorten it")
        return ids

    async def stream(
        self, prompt: list[int], params: SamplingParams, *, guide: GuideSpec | None = None, priority: int = 0
    ) -> AsyncGenerator[TokenEvent, None]:
        """Tokens as they are made. Leaving the iteration early cancels the request within one engine step.

        guide      what may come next
        priority   higher runs first

        Raises CapacityError when too many requests wait, GlasklarError when the request fails.
        """
        if self.waiting >= MAX_WAITING:
            raise CapacityError(f"{self.waiting} requests are waiting already; try again in a moment")
        mailbox = Mailbox(asyncio.get_running_loop())
        self._send(Submit(prompt=prompt, params=params, guide=guide, priority=priority, mailbox=mailbox))
        finished = False
        try:
            while not finished:
                item = await mailbox.queue.get()
                if isinstance(item, GlasklarError):
                    finished = True
                    raise item
                finished = item.finish is not None
                if item.error is not None:
                    raise item.error
                yield item
        finally:
            if not finished:
                self._send(Cancel(mailbox))

    async def inspect(self, ids: list[int], first: int) -> dict[str, Any]:
        """See `inspect.look`."""
        from glasklar.serve.inspect import look

        return await asyncio.to_thread(look, self.model, ids, first)

    def close(self) -> None:
        """Stops the engine's thread; what is still running ends with an error."""
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=30)

    def _send(self, message: Submit | Cancel) -> None:
        self._inbox.append(message)
        self._wake.set()

    def _work(self) -> None:
        while not self._stop.is_set():
            self._read_inbox()
            if not self.engine.has_work:
                self._wake.wait(IDLE_WAIT)
                self._wake.clear()
                continue
            for event in self._step():
                mailbox = self._open.get(event.request)
                if mailbox is None:
                    continue
                if event.finish is not None:
                    del self._open[event.request]
                mailbox.put(event)
        self._fail_all(CapacityError("the server is shutting down; try again when it is back"))

    def _read_inbox(self) -> None:
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Submit):
                try:
                    guide = None if message.guide is None else self.guides.make(message.guide)
                    request = self.engine.add(message.prompt, message.params, message.priority, guide)
                except GlasklarError as error:
                    message.mailbox.put(error)
                else:
                    message.mailbox.request = request
                    self._open[request] = message.mailbox
            elif message.mailbox.request in self._open:
                del self._open[message.mailbox.request]
                self.engine.cancel(message.mailbox.request)

    def _step(self) -> list[TokenEvent]:
        try:
            return self.engine.step()
        except Exception as error:  # whatever broke, callers must hear of it and the next request must find an engine
            log.exception("the engine failed; it is made anew")
            self._fail_all(CapacityError(f"the engine failed ({error}); it was restarted, send the request again"))
            self.engine = Engine(self.model.network)
            return []

    def _fail_all(self, error: GlasklarError) -> None:
        for mailbox in self._open.values():
            mailbox.put(error)
        self._open.clear()
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Submit):
                message.mailbox.put(error)
