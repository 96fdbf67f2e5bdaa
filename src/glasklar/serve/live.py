"""The server of `glasklar up`: it shows how a model is being made, then serves it at the same address."""

from __future__ import annotations

import threading
from pathlib import Path

from glasklar.loading import Model
from glasklar.serve.app import listen, server_of, url_of
from glasklar.serve.backend import Backend
from glasklar.serve.conversations import conversations_in
from glasklar.serve.news import RunNews
from glasklar.serve.service import ModelService
from glasklar.serve.trace import Tracing


class LiveServer:
    """Serves from a thread of its own, on the loopback address. A context manager: leaving it stops the server.

    folder    the run that the page shows
    port      0 takes a free one; see `url`
    tracing   finds what the run's training documents hold, once the model is released
    home      where conversations are kept; None: they end with the server
    """

    def __init__(
        self,
        folder: Path,
        *,
        port: int = 8421,
        host: str = "127.0.0.1",
        tracing: Tracing | None = None,
        home: Path | None = None,
    ) -> None:
        self._socket = listen(host, port)
        self._backend = Backend(news=RunNews(folder), tracing=tracing, conversations=conversations_in(home))
        self._server = server_of(self._backend)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="http", daemon=True
        )

    @property
    def url(self) -> str:
        return url_of(self._socket)

    def release(self, model: Model) -> None:
        """From now on the page and the API answer with `model`."""
        self._backend.service = ModelService(model)

    def wait(self) -> None:
        """Serves until Ctrl-C."""
        try:
            while self._thread.is_alive():
                self._thread.join(timeout=1)
        except KeyboardInterrupt:
            print("stopped")

    def __enter__(self) -> LiveServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=30)
        if self._backend.service is not None:
            self._backend.service.close()
        self._backend.conversations.close()
        self._socket.close()
