"""The server's bounds, in one place. Those of single parameters (`n`, stop texts, …) stand in `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Counts, bytes and seconds.

    running         requests that the engine runs at once
    queued          requests that may wait beside them; a further one is told to come again (429)
    cache_tokens    tokens that the engine's cache holds
    disk_bytes      for beginnings of texts that the cache has no room for, also for the next start; 0: none are kept
    queue_seconds   longest wait for a place in the engine
    request_seconds longest time of a request from its arrival to its last token
    ready_seconds   in which a healthy engine makes a token; `/ready` asks for one
    hang_seconds    without a sign of life after which a working engine is held for hung, and started anew
    start_seconds   in which the engine must have loaded its model
    head_seconds    in which a connection must have sent a request's head, and be it byte by byte
    body_seconds    in which a body must have come
    stall_seconds   for which a client may take nothing of what it asked for
    body_bytes      of a request
    connections     open at once
    """

    running: int = 64
    queued: int = 256
    cache_tokens: int = 1 << 17
    disk_bytes: int = 0
    queue_seconds: float = 120.0
    request_seconds: float = 900.0
    ready_seconds: float = 5.0
    hang_seconds: float = 120.0
    start_seconds: float = 1800.0
    head_seconds: float = 15.0
    body_seconds: float = 60.0
    stall_seconds: float = 60.0
    body_bytes: int = 4 << 20
    connections: int = 8192

    @property
    def requests(self) -> int:
        """Requests that may be in the house at once."""
        return self.running + self.queued
