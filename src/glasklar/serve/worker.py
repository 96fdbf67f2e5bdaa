"""The engine's process: started by `link.py`, which holds the other end of the socket.

    python -m glasklar.serve.worker FD

It has the weights, and nothing else: no port, no key, no text of a conversation but as ids. It ends when the other end
closes, however that happened; what goes wrong inside ends it too, and the server starts another one: a state that an
unforeseen error has left behind is not gone on with.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasklar.engine.guide import Guide
from glasklar.errors import GlasklarError, RequestError
from glasklar.runtime import prepare, resident_bytes, start
from glasklar.serve.grammar import GuideMaker
from glasklar.serve.messages import (
    CLOSING_SECONDS,
    Call,
    Cancel,
    Failed,
    Frames,
    Loading,
    Message,
    Ready,
    Refused,
    Reply,
    Start,
    Submit,
    Tokens,
    frame,
)

if TYPE_CHECKING:
    from glasklar.engine.engine import Engine
    from glasklar.loading import Model

log = logging.getLogger(__name__)

Task = Callable[[], None]

LOADING_SECONDS = 0.2  # between two messages about loading
SIGN_OF_LIFE = 1.0  # seconds of work without a token after which an empty message goes out


class Inbox:
    """Messages as they arrive, read by a thread so that a step never waits for them, nor for what must be done before
    they can be handled (`prepare`). When the other end closes, the process ends at once, or, where it has something to
    put in order (`closing`), `ended` is set."""

    def __init__(
        self, channel: socket.socket, frames: Frames, prepare: Callable[[Message], Task], closing: bool
    ) -> None:
        self._channel, self._frames, self._prepare, self._closing = channel, frames, prepare, closing
        self._tasks: deque[Task] = deque()
        self.ended = False
        self._wake = threading.Event()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def _read(self) -> None:
        content = b""
        try:
            while True:
                for message in self._frames.feed(content):
                    self._tasks.append(self._prepare(message))
                    self._wake.set()
                if not (content := self._channel.recv(1 << 16)):
                    break
        except OSError as error:
            log.debug("the server is gone without a farewell: %s", error)
        except ValueError as error:
            log.error("the server: %s", error)
        finally:
            self.ended = True  # the server is gone; what is being computed is of use to nobody
            self._wake.set()
            if self._closing:
                time.sleep(CLOSING_SECONDS)  # in which the other thread ends the process, unless it hangs
            os._exit(0)

    def wait(self) -> None:
        """Returns when there is something to do, or the other end has closed."""
        while not self._tasks and not self.ended:
            self._wake.wait()
            self._wake.clear()

    def take(self) -> list[Task]:
        """All that there is to do, in the order in which it came."""
        return [self._tasks.popleft() for _ in range(len(self._tasks))]


class Worker:
    """One engine and whose requests it runs: the server's number of each is its own, beside the engine's."""

    def __init__(self, model: Model, engine: Engine, send: Callable[[Message], None]) -> None:
        self.model, self.engine, self.send = model, engine, send
        self.guides = None if model.tokenizer is None else GuideMaker(model.tokenizer, model.config.vocab_size)
        self._ours: dict[int, int] = {}  # server's number -> engine's
        self._theirs: dict[int, int] = {}
        self._last_sign = 0.0
        self._aside = ThreadPoolExecutor(1, "aside")

    def prepare(self, message: Message) -> Task:
        """What is to be done between two steps. Called from the inbox's thread: a grammar takes its time to compile."""
        match message:
            case Submit():
                try:
                    guide = self._guide(message)
                except GlasklarError as error:
                    return partial(self.send, Refused(id=message.id, error=error))
                return partial(self._submit, message, guide)
            case Cancel(id=number):
                return partial(self._cancel, number)
            case Call():
                return partial(self._call, message)
        raise ValueError(f"{type(message).__name__} is no message to an engine")

    def _guide(self, message: Submit) -> Guide | None:
        if message.guide is None:
            return None
        if self.guides is None:
            raise RequestError("a model without a tokenizer cannot be guided; leave the guide out")
        return self.guides.make(message.guide)

    def _submit(self, message: Submit, guide: Guide | None) -> None:
        try:
            ours = self.engine.add(message.prompt, message.params, message.priority, guide)
        except GlasklarError as error:
            self.send(Refused(id=message.id, error=error))
        else:
            self._ours[message.id], self._theirs[ours] = ours, message.id

    def _cancel(self, number: int) -> None:
        ours = self._ours.pop(number, None)
        if ours is not None:
            del self._theirs[ours]
            self.engine.cancel(ours)

    def step(self) -> None:
        """One step of the engine; its events go out under the server's numbers."""
        events = []
        for event in self.engine.step():
            number = self._theirs.get(event.request)
            if number is None:
                continue
            if event.finish is not None:
                del self._theirs[event.request], self._ours[number]
            events.append((number, event))
        now = time.monotonic()
        if events or now > self._last_sign + SIGN_OF_LIFE:
            self._last_sign = now
            self.send(Tokens(events=events))

    def _call(self, message: Call) -> None:
        if message.name in ASIDE:
            self._aside.submit(self._answer, message, ASIDE)
        else:
            self._answer(message, CALLS)

    def _answer(self, message: Call, calls: Calls) -> None:
        try:
            if message.name not in calls:
                raise RequestError(f"no call {message.name!r}; there are {', '.join([*CALLS, *ASIDE])}")
            self.send(Reply(id=message.id, result=calls[message.name](self, **message.arguments)))
        except GlasklarError as error:
            self.send(Reply(id=message.id, error=error))
        except Exception as error:  # it only looks: running requests need not suffer from its faults
            log.exception("call %s failed", message.name)
            self.send(Reply(id=message.id, error=GlasklarError(f"{message.name} failed: {error}")))


# --- calls: what else the server may ask of the model ------------------------------------------------------------


def counters(worker: Worker) -> dict[str, Any]:
    """What the engine has done, and what it holds."""
    from glasklar.engine.paged import PageCache

    engine = worker.engine
    cache = engine.runner.cache
    pages = (
        {"pages": cache.pages_used, "pages_of_requests": cache.pages_of_rows} if isinstance(cache, PageCache) else {}
    )
    return {
        **vars(engine.stats),
        "pid": os.getpid(),
        "rss_bytes": resident_bytes(os.getpid()),
        "cache_bytes": cache.bytes_allocated,
        **pages,
        "running": len(engine.scheduler.present),
        "waiting": len(engine.scheduler.waiting),
    }


def inspect(worker: Worker, ids: list[int], first: int) -> dict[str, Any]:
    """See `inspect.look`."""
    from glasklar.serve.inspect import look

    return look(worker.model, ids, first)


Calls = dict[str, Callable[..., dict[str, Any]]]
# Between two steps of the engine; and beside them, by a thread of their own, where they take their time.
CALLS: Calls = {"counters": counters}
ASIDE: Calls = {"inspect": inspect}


# --- the process -------------------------------------------------------------------------------------------------


def open_model(message: Start, progress: Callable[[int, int], None]) -> tuple[Model, Engine]:
    """Loads what `message` names. torch is imported here, after its number of threads is settled."""
    threads = prepare(message.threads)
    runtime = start(threads, device=message.device, compute=message.compute)  # type: ignore[arg-type]
    from glasklar.engine.engine import Engine
    from glasklar.engine.packed_file import key_of
    from glasklar.engine.spill import SpillConfig
    from glasklar.loading import load

    cache = None if message.cache is None else Path(message.cache)
    model = load(
        message.folder, runtime, quantize=message.quantize, cache=cache, locked=message.locked, progress=progress
    )
    spill = None
    if message.pages is not None:
        form = message.quantize or str(runtime.dtype)
        name = f"{version('glasklar')} {key_of(Path(message.folder), form)}"
        spill = SpillConfig(folder=Path(message.pages), model=name, max_bytes=message.disk_bytes)
    engine = Engine(
        model.network, max_slots=message.max_slots, max_tokens=message.max_tokens, cache=message.cache_kind, spill=spill
    )
    return model, engine


def main() -> None:
    # Ctrl-C and a service manager's signal reach all processes; the server finishes what it streams, and needs us.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=os.environ.get("GLASKLAR_LOG", "WARNING").upper(), stream=sys.stderr)
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        channel.setblocking(True)
        run(channel)


def run(channel: socket.socket) -> None:
    """Answers until the other end closes."""

    sending = threading.Lock()

    def send(message: Message) -> None:
        try:
            with sending:
                channel.sendall(frame(message))
        except OSError:
            sys.exit(0)  # the server is gone; what is being computed is of use to nobody

    frames = Frames()
    first = _first(channel, frames)
    try:
        model, engine = open_model(first, Paced(send))
    except GlasklarError as error:
        send(Failed(error=error))
        return
    from glasklar.engine.paged_runner import computed_by

    send(Ready(engine={**model.runtime.describe(), **computed_by(model.network, first.cache_kind)}))
    worker = Worker(model, engine, send)
    inbox = Inbox(channel, frames, worker.prepare, closing=first.pages is not None)
    while not inbox.ended:
        if not engine.has_work:
            inbox.wait()
        for task in inbox.take():
            task()
        if engine.has_work:
            worker.step()
    engine.close()


class Paced:
    """Tells the server how far loading is, a few times a second."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        self._send, self._last = send, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last > LOADING_SECONDS:
            self._last = now
            self._send(Loading(done=done, total=total))


def _first(channel: socket.socket, frames: Frames) -> Start:
    """The message that says what to start."""
    while content := channel.recv(1 << 12):
        for message in frames.feed(content):
            assert isinstance(message, Start), f"{type(message).__name__} before Start"
            return message
    sys.exit("the server ended before it said which model to load")


if __name__ == "__main__":
    main()
