"""The server of `glasklar up`: it shows how a model is being made, then serves it at the same address."""

from __future__ import annotations

import threading
from contextlib import ExitStack, closing
from pathlib import Path

from glasklar.loading import ModelFolder, pages_under
from glasklar.serve.backend import Backend
from glasklar.serve.conversations import conversations_in
from glasklar.serve.news import RunNews
from glasklar.serve.receipts import Receipts
from glasklar.serve.server import BACKLOG, Site, opened, server_of, terminable, url_of
from glasklar.serve.service import ModelService
from glasklar.serve.trace import Tracing


class LiveServer:
    """Serves from a thread of its own. A context manager: leaving it stops the server.

    folder    the run that the page shows
    site      where; port 0 takes a free one, see `url`
    tracing   finds what the run's training documents hold, once the model is released
    """

    def __init__(self, folder: Path, site: Site, *, tracing: Tracing | None = None) -> None:
        self.site = site
        self._stack = ExitStack()
        self._socket, self._door = self._stack.enter_context(opened(site))
        conversations = self._stack.enter_context(closing(conversations_in(site.home)))
        self._backend = Backend(
            news=RunNews(folder), tracing=tracing, conversations=conversations, receipts=Receipts(site.home)
        )
        self._server = server_of(self._backend, self._door, site)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="http", daemon=True
        )

    @property
    def url(self) -> str:
        return url_of(self._socket, self.site)

    def release(self, model: ModelFolder) -> None:
        """From now on the page and the API answer with `model`."""
        self._backend.service = ModelService(
            model, self.site.limits, alone=self._door.alone, pages=pages_under(self.site.home)
        )

    def wait(self) -> None:
        """Serves until Ctrl-C."""
        with terminable():
            try:
                while self._thread.is_alive():
                    self._thread.join(timeout=1)
            except KeyboardInterrupt:
                print("stopped")

    def __enter__(self) -> LiveServer:
        self._socket.listen(BACKLOG)  # whoever gets the address may call at once
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        try:
            self._thread.join(timeout=self.site.limits.request_seconds + 5)
        except KeyboardInterrupt:  # a second one: what is still streamed is cut off
            self._server.force_exit = True
            self._thread.join(timeout=5)
        if self._backend.service is not None:
            self._backend.service.close()
        self._stack.close()
