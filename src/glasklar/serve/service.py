"""Answers for many callers from one engine, which runs in a process of its own. Callers hold mailboxes; whoever finds
no place in the engine waits here, so that its end takes only the running requests with it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glasklar.data.chat import Message as ChatMessage
from glasklar.data.chat import render
from glasklar.engine.request import SamplingParams, TokenEvent
from glasklar.errors import BusyError, CapacityError, CheckpointError, GlasklarError, RequestError
from glasklar.loading import ModelFolder
from glasklar.provenance.receipt import model_stamps
from glasklar.serve.access import visit
from glasklar.serve.fair import FairQueue, Ticket
from glasklar.serve.grammar import GuideMaker, GuideSpec
from glasklar.serve.limits import Limits
from glasklar.serve.link import Link, lost_error
from glasklar.serve.messages import Call, Cancel, Loading, Message, Ready, Refused, Reply, Start, Submit, Tokens
from glasklar.serve.receipts import given
from glasklar.serve.schema import MAX_CHOICES

log = logging.getLogger(__name__)

MAX_CALLS = 32  # looks inside that may wait at once
RECENT = 1.0  # seconds for which a token shows that the engine works
URGENT = 1 << 30  # priority of the question whether it works


@dataclass(eq=False)
class Waiter:
    """Someone who waits for what the engine says. Mailbox and timers belong to `loop`."""

    ticket: Ticket
    message: Submit
    loop: asyncio.AbstractEventLoop
    mailbox: asyncio.Queue[TokenEvent | GlasklarError] = field(default_factory=asyncio.Queue)
    timers: list[asyncio.TimerHandle] = field(default_factory=list)
    sent: bool = False


Delivery = tuple[Waiter, TokenEvent | GlasklarError]


class ModelService:
    """One model behind one engine. Made when the engine is ready, or an error is raised that says why it is not.

    alone      whether there is one key only at the moment, which need not leave anything to others
    pages      folder of cache pages on disk, if the limits grant them room
    progress   is told bytes loaded and bytes in all, now and then, from another thread
    """

    def __init__(
        self,
        model: ModelFolder,
        limits: Limits | None = None,
        *,
        alone: Callable[[], bool] = lambda: True,
        pages: Path | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        if model.tokenizer is None:
            raise CheckpointError(f"{model.folder}: has no tokenizer.json; use `glasklar generate --prompt-ids`")
        self.model, self.tokenizer, self.name = model, model.tokenizer, model.name
        self.limits, self._progress = limits or Limits(), progress
        self.guides = GuideMaker(model.tokenizer, model.config.vocab_size)  # to check grammars; the engine has its own
        self.engine: dict[str, Any] = {}
        self.stamps = model_stamps(model.folder)
        self._lock = threading.RLock()
        self._queue = FairQueue(self.limits.running, alone=alone)
        self._open: dict[int, Waiter] = {}
        self._calls: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Future[dict[str, Any]]]] = {}
        self._numbers = itertools.count()
        self._up, self._settled, self._last_token = threading.Event(), threading.Event(), -RECENT
        self._failure: GlasklarError | None = None
        self._probe: asyncio.Task[None] | None = None
        self._link = Link(_start(model, self.limits, pages), self.limits, self)
        try:
            self._settled.wait()
            if self._failure is not None:
                raise self._failure
        except BaseException:
            self.close()
            raise

    @property
    def context(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def waiting(self) -> int:
        """Requests that are queued or running."""
        return len(self._open)

    @property
    def status(self) -> dict[str, Any]:
        """What there is to know without asking the engine."""
        with self._lock:
            return {
                "state": "ready" if self._up.is_set() else "failed" if self._failure is not None else "starting",
                "pid": self._link.pid,
                "restarts": self._link.restarts,
                "running": self._queue.running,
                "queued": self._queue.waiting,
            }

    def prompt(self, messages: list[ChatMessage], thinking: bool | None) -> list[int]:
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

        Raises BusyError when too many requests wait, this one has waited too long or its key has used up its share,
        CapacityError when it takes too long or the engine is lost, GlasklarError when the request fails.
        """
        caller = visit()
        new = caller.begin(prompt)
        waiter = self._enter(caller.key, prompt, params, guide, priority)
        record, failed = given(prompt, params, guide), True
        try:
            while True:
                item = await waiter.mailbox.get()
                if isinstance(item, GlasklarError):
                    raise item
                if item.error is not None:
                    raise item.error
                if new:
                    caller.hit(item.cached)
                    new = False
                caller.made(item)
                record.take(item)
                yield item
                if item.finish is not None:
                    failed = False
                    return
        except (GeneratorExit, asyncio.CancelledError):
            failed = False
            raise
        finally:
            record.end(failed)
            caller.settle()
            self._leave(waiter)

    async def call(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Something else done by the engine's process; see `worker.CALLS`.

        Raises BusyError where too many wait, CapacityError where the engine is lost or takes too long.
        """
        loop = asyncio.get_running_loop()
        with self._lock:
            self._check_up()
            if len(self._calls) >= MAX_CALLS:
                raise BusyError(f"{MAX_CALLS} others wait for a look into the model; try again in a moment")
            number, future = next(self._numbers), loop.create_future()
            self._calls[number] = (loop, future)
            self._link.send(Call(id=number, name=name, arguments=arguments))
        try:
            return await asyncio.wait_for(future, self.limits.request_seconds)
        except TimeoutError:
            raise CapacityError(f"{name}: no result within {self.limits.request_seconds:g} seconds") from None
        finally:
            with self._lock:
                self._calls.pop(number, None)

    async def inspect(self, ids: list[int], first: int) -> dict[str, Any]:
        """See `inspect.look`. Raises RequestError for ids that are none of the model's."""
        vocabulary = self.model.config.vocab_size
        foreign = next((token for token in ids if not 0 <= token < vocabulary), None)
        if foreign is not None:
            raise RequestError(f"token id {foreign}: the vocabulary has ids 0 to {vocabulary - 1}")
        return await self.call("inspect", ids=ids, first=first)

    async def ready(self) -> None:
        """Returns if the engine makes tokens: one was made just now, or comes when asked for.

        Raises CapacityError where none comes within `ready_seconds`.
        """
        self._check_up()
        if time.monotonic() - self._last_token < RECENT:
            return
        if self._probe is None or self._probe.done():
            self._probe = asyncio.ensure_future(self._make_one())
            self._probe.add_done_callback(lambda task: task.cancelled() or task.exception())
        seconds = self.limits.ready_seconds
        try:
            await asyncio.wait_for(asyncio.shield(self._probe), seconds)
        except TimeoutError:
            raise CapacityError(
                f"the engine has made no token within {seconds:g} seconds; it is started anew soon"
            ) from None

    async def _make_one(self) -> None:
        waiter = self._enter("", [0], SamplingParams(max_tokens=1), None, URGENT)
        try:
            async with asyncio.timeout(2 * self.limits.ready_seconds):
                item = await waiter.mailbox.get()
        except TimeoutError:
            raise CapacityError("the engine makes no tokens") from None
        finally:
            self._leave(waiter)
        if isinstance(item, GlasklarError):
            raise item

    def close(self) -> None:
        """Ends the engine; what still runs ends with an error."""
        self._link.close()
        with self._lock:
            self._up.clear()
            self._fail(list(self._open.values()), "the server is shutting down; try again when it is back")
            self._fail_calls("the server is shutting down")

    # --- callers -------------------------------------------------------------------------------------------------

    def _check_up(self) -> None:
        if not self._up.is_set():
            reason = (
                "is starting; try again in a moment" if self._failure is None else f"does not start: {self._failure}"
            )
            raise CapacityError(f"the engine {reason}")

    def _enter(
        self, key: str, prompt: list[int], params: SamplingParams, guide: GuideSpec | None, priority: int
    ) -> Waiter:
        """Takes a place in the line."""
        loop, limits = asyncio.get_running_loop(), self.limits
        with self._lock:
            if self._failure is not None:
                self._check_up()
            if len(self._open) >= limits.requests * MAX_CHOICES:
                raise BusyError(f"{len(self._open)} answers are wanted already; try again in a moment")
            number = next(self._numbers)
            message = Submit(id=number, prompt=prompt, params=params, priority=priority, guide=guide)
            waiter = Waiter(Ticket(number=number, key=key, priority=priority), message, loop)
            self._open[number] = waiter
            self._queue.add(waiter.ticket)
            self._pump()
        if not waiter.sent:
            waiter.timers.append(loop.call_later(limits.queue_seconds, self._give_up_waiting, waiter))
        waiter.timers.append(loop.call_later(limits.request_seconds, self._give_up, waiter))
        return waiter

    def _leave(self, waiter: Waiter) -> None:
        """Gives the place back, whatever became of the request."""
        for timer in waiter.timers:
            timer.cancel()
        with self._lock:
            if self._close(waiter) and waiter.sent and self._up.is_set():
                self._link.send(Cancel(id=waiter.ticket.number))
            self._pump()

    def _give_up_waiting(self, waiter: Waiter) -> None:
        if not waiter.sent:
            seconds = self.limits.queue_seconds
            waiter.mailbox.put_nowait(BusyError(f"no place came free within {seconds:g} seconds; try again later"))

    def _give_up(self, waiter: Waiter) -> None:
        seconds = self.limits.request_seconds
        waiter.mailbox.put_nowait(CapacityError(f"not done within {seconds:g} seconds; ask for fewer tokens"))

    # --- the engine's side; the lock is held ----------------------------------------------------------------------

    def _pump(self) -> None:
        """Sends the engine whoever is next, while there are places."""
        while self._up.is_set() and (ticket := self._queue.take()) is not None:
            waiter = self._open[ticket.number]
            waiter.sent = True
            self._link.send(waiter.message)

    def _close(self, waiter: Waiter) -> bool:
        """Forgets a request; whether it was still known."""
        if self._open.pop(waiter.ticket.number, None) is None:
            return False
        (self._queue.give_back if waiter.sent else self._queue.remove)(waiter.ticket)
        return True

    def _fail(self, waiters: list[Waiter], message: str) -> None:
        for waiter in waiters:
            self._close(waiter)
        _deliver([(waiter, CapacityError(message)) for waiter in waiters])

    def _fail_calls(self, message: str) -> None:
        for loop, future in self._calls.values():
            _soon(loop, _settle, future, CapacityError(message))

    # --- what the link tells, from its thread ----------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return self._queue.running > 0 or bool(self._calls)

    def engine_loads(self, message: Loading) -> None:
        self._progress(message.done, message.total)

    def engine_ready(self, message: Ready) -> None:
        with self._lock:
            self.engine, self._failure = message.engine, None
            self._up.set()
            self._pump()
        self._settled.set()

    def engine_fails(self, error: GlasklarError) -> None:
        with self._lock:
            self._failure = error
            self._fail(list(self._open.values()), f"the engine does not start: {error}")
        self._settled.set()

    def engine_lost(self, reason: str) -> None:
        with self._lock:
            self._up.clear()
            if not self._settled.is_set():
                self._failure = CapacityError(f"the engine's process {reason} before it was ready")
            message = str(lost_error(reason))
            self._fail([waiter for waiter in self._open.values() if waiter.sent], message)
            self._fail_calls(message)
        self._settled.set()

    def engine_says(self, message: Message) -> None:
        match message:
            case Tokens(events=events):
                self._tokens(events)
            case Refused(id=number, error=error):
                with self._lock:
                    waiter = self._open.get(number)
                    if waiter is not None:
                        self._close(waiter)
                        self._pump()
                        _deliver([(waiter, error)])
            case Reply(id=number):
                with self._lock:
                    found = self._calls.get(number)
                if found is not None:
                    _soon(found[0], _settle, found[1], message.error or message.result)

    def _tokens(self, events: list[tuple[int, TokenEvent]]) -> None:
        deliveries: list[Delivery] = []
        with self._lock:
            for number, event in events:
                waiter = self._open.get(number)
                if waiter is None:
                    continue
                deliveries.append((waiter, event))
                if event.finish is not None:
                    self._close(waiter)
            if events:
                self._last_token = time.monotonic()
                self._pump()
        _deliver(deliveries)


def _start(model: ModelFolder, limits: Limits, pages: Path | None) -> Start:
    runtime = model.runtime
    if limits.disk_bytes and pages is None:
        raise RequestError(f"disk_bytes = {limits.disk_bytes} without a folder: say where the pages go")
    return Start(
        folder=str(model.folder.absolute()),
        device=runtime.device,
        compute=runtime.compute,
        threads=runtime.threads,
        max_slots=limits.running,
        max_tokens=limits.cache_tokens,
        quantize=model.quantize,
        cache=None if model.cache is None else str(model.cache),
        cache_kind=model.cache_kind,
        locked=model.locked,
        pages=str(pages) if limits.disk_bytes else None,
        disk_bytes=limits.disk_bytes,
    )


def _deliver(deliveries: list[Delivery]) -> None:
    """Puts items into mailboxes, all of one loop at once."""
    loops: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
    for delivery in deliveries:
        loops.setdefault(delivery[0].loop, []).append(delivery)
    for loop, part in loops.items():
        _soon(loop, _put, part)


def _put(deliveries: list[Delivery]) -> None:
    for waiter, item in deliveries:
        waiter.mailbox.put_nowait(item)


def _settle(future: asyncio.Future[dict[str, Any]], outcome: dict[str, Any] | GlasklarError) -> None:
    if future.done():
        return
    if isinstance(outcome, GlasklarError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _soon(loop: asyncio.AbstractEventLoop, function: Any, *arguments: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:  # the loop has ended, and with it whoever waited
        log.debug("nobody waits any more")
