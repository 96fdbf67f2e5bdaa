"""The server's end of the engine's process: starts it, talks with it, notices when it ends or falls silent, starts it
anew."""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Protocol

from glasklar.errors import CapacityError, GlasklarError
from glasklar.runtime import prepare
from glasklar.serve.limits import Limits
from glasklar.serve.messages import CLOSING_SECONDS, Failed, Frames, Loading, Message, Ready, Start, frame

log = logging.getLogger(__name__)

TICK = 1.0  # seconds between looks at the clock
LONGEST_PAUSE = 30.0  # seconds between attempts to start an engine that does not start
PIECE = 1 << 18  # bytes read at once


class Listener(Protocol):
    """Who uses the engine. All of this is called from the link's thread and must not wait."""

    @property
    def busy(self) -> bool:
        """Whether the engine owes an answer."""
        ...

    def engine_loads(self, message: Loading) -> None: ...

    def engine_ready(self, message: Ready) -> None: ...

    def engine_says(self, message: Message) -> None: ...

    def engine_lost(self, reason: str) -> None:
        """The process has ended; another one is being started. What it was asked it will not answer."""
        ...

    def engine_fails(self, error: GlasklarError) -> None:
        """It does not start; it will be tried again."""
        ...


class Link:
    """One engine process, always: `send` reaches the one that is `ready`, `close` ends it."""

    def __init__(self, start: Start, limits: Limits, listener: Listener) -> None:
        self.start, self.limits, self.listener = start, limits, listener
        self.pid: int | None = None
        self.restarts = 0
        self._lock = threading.Lock()
        self._outgoing = bytearray()
        self._closing = threading.Event()
        self._bell, self._ring = socket.socketpair()
        for end in (self._bell, self._ring):
            end.setblocking(False)
        self._thread = threading.Thread(target=self._keep, name="engine", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Never waits: what the process has not read yet is kept here."""
        content = frame(message)
        with self._lock:
            self._outgoing += content
        self._wake()

    def close(self) -> None:
        """Ends the process and the thread."""
        self._closing.set()
        self._wake()
        self._thread.join(timeout=2 * CLOSING_SECONDS)
        self._bell.close()
        self._ring.close()

    def _wake(self) -> None:
        try:
            self._ring.send(b".")
        except BlockingIOError:
            return  # it has been rung already
        except OSError:
            assert self._closing.is_set()

    def _keep(self) -> None:
        """Starts one process after the other until closed."""
        failures = 0
        while not self._closing.is_set():
            process, channel = self._spawn()
            with channel:
                was_ready = self._talk(process, channel)
            reason = _ending(process, CLOSING_SECONDS if self.start.pages and self._closing.is_set() else 2.0)
            self.pid = None
            if self._closing.is_set():
                break
            self.restarts += 1
            failures = 0 if was_ready else failures + 1
            log.error("the engine's process %s; starting another one", reason)
            self.listener.engine_lost(reason)
            if failures:
                self._closing.wait(min(LONGEST_PAUSE, 0.5 * 2**failures))

    def _spawn(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        environ = dict(os.environ)
        prepare(self.start.threads, environ)
        with theirs:
            # -P: nothing is imported from the current folder. A session of its own: Ctrl-C is the server's to handle.
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "glasklar.serve.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                env=environ,
            )
        with self._lock:
            self._outgoing[:] = frame(self.start)
        self.pid = process.pid
        return process, ours

    def _talk(self, process: subprocess.Popen[bytes], channel: socket.socket) -> bool:
        """Until the process ends. Returns whether it was ever ready. It is ended if it keeps silent too long, says what
        is no message, or when the link closes."""
        frames, ready, last = Frames(), False, time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(channel, selectors.EVENT_READ)
            selector.register(self._bell, selectors.EVENT_READ)
            while not self._closing.is_set():
                with self._lock:
                    wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)
                selector.modify(channel, wanted)
                for key, mask in selector.select(TICK):
                    if key.fileobj is self._bell:
                        self._bell.recv(1 << 12)
                        continue
                    if mask & selectors.EVENT_WRITE and not self._write(channel):
                        return ready
                    if mask & selectors.EVENT_READ:
                        content = _read(channel)
                        if not content:
                            return ready
                        last = time.monotonic()
                        try:
                            for message in frames.feed(content):
                                ready = self._hand_on(message) or ready
                        except ValueError as error:
                            log.error("the engine's process: %s", error)
                            process.kill()
                now = time.monotonic()
                if ready and not self.listener.busy:
                    last = now
                if now - last > (self.limits.hang_seconds if ready else self.limits.start_seconds):
                    log.error("the engine's process has been silent for %.0f seconds", now - last)
                    process.kill()
                    return ready
        return ready

    def _hand_on(self, message: Message) -> bool:
        if isinstance(message, Ready):
            self.listener.engine_ready(message)
            return True
        if isinstance(message, Loading):
            self.listener.engine_loads(message)
        elif isinstance(message, Failed):
            self.listener.engine_fails(message.error)
        else:
            self.listener.engine_says(message)
        return False

    def _write(self, channel: socket.socket) -> bool:
        """Whether the other end still reads."""
        with self._lock:
            try:
                sent = channel.send(memoryview(self._outgoing)[:PIECE])
            except BlockingIOError:
                return True
            except OSError:
                return False
            del self._outgoing[:sent]
            return True


def _read(channel: socket.socket) -> bytes:
    """What has come; nothing means the end."""
    try:
        return channel.recv(PIECE)
    except ConnectionError:
        return b""


def _ending(process: subprocess.Popen[bytes], seconds: float) -> str:
    """How it ended. Its socket is closed, so that it does end; if not, it is made to."""
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def lost_error(reason: str) -> CapacityError:
    """What requests hear that the process took with it."""
    return CapacityError(
        f"the engine's process {reason} in the middle of it; it is started anew, send the request again"
    )
