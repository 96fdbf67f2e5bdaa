"""Who runs: a queue by priority, admission while there is room, rows of the batch kept dense. No tensors."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from glasklar.engine.request import Request
from glasklar.engine.shapes import rounded_length, rounded_rows


class Room(Protocol):
    """What a cache can hold: `max_tokens` in all."""

    @property
    def max_tokens(self) -> int: ...

    def fits(self, count: int, longest: int, total: int) -> bool:
        """Whether `count` requests fit together; they reserve `longest` tokens at most and `total` in sum."""
        ...


@dataclass(frozen=True, kw_only=True)
class SlotRoom:
    """Room of a cache of equal slots: every request takes as much as the longest."""

    max_slots: int
    max_tokens: int

    def fits(self, count: int, longest: int, total: int) -> bool:
        return count <= self.max_slots and rounded_rows(count) * rounded_length(longest) <= self.max_tokens


class Scheduler:
    """Keeps running requests in rows 0 .. n-1 of the batch.

    room             what the cache can hold
    prefill_tokens   prompt tokens admitted at once (though one prompt always is): running answers must not stall
    chunk            a prompt of more tokens is read piece by piece, one such prompt at a time, while others run
    """

    def __init__(self, room: Room, *, prefill_tokens: int, chunk: int | None = None) -> None:
        self.room, self.prefill_tokens, self.chunk = room, prefill_tokens, chunk
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.filling: Request | None = None

    def add(self, request: Request) -> None:
        """Queues a request behind those of its priority."""
        insort(self.waiting, request, key=lambda r: (-r.priority, r.id))

    def admit(self) -> list[Request]:
        """Moves requests from the queue's head to the next rows while they fit, in the order of their prompts' lengths;
        a long prompt becomes `filling`, and joins the rows by `start`.

        Nobody overtakes the head, which would starve a long request, unless the head waits for another long prompt to
        be read: that ends soon, and whoever is short need not wait for it.
        """
        if not self.waiting:
            return []
        reserves = [request.reserve for request in self.present]
        longest, total, count = max(reserves, default=0), sum(reserves), len(reserves)
        admitted: list[Request] = []
        left: list[Request] = []
        prompt_tokens = 0
        for place, request in enumerate(self.waiting):
            long = self.chunk is not None and len(request.prompt) > self.chunk
            if long and self.filling is not None:
                left.append(request)
                continue
            longest, total, count = max(longest, request.reserve), total + request.reserve, count + 1
            prompt_tokens += 0 if long else len(request.prompt)
            crowded = prompt_tokens > self.prefill_tokens and bool(admitted)
            if crowded or not self.room.fits(count, longest, total):
                left += self.waiting[place:]
                break
            request.state = "running"
            if long:
                self.filling = request
            else:
                admitted.append(request)
        self.waiting = left
        admitted.sort(key=lambda request: len(request.prompt))
        self.running += admitted
        return admitted

    @property
    def present(self) -> list[Request]:
        """Requests that have room in the cache."""
        return [*self.running, self.filling] if self.filling is not None else self.running

    def start(self) -> Request:
        """The long prompt has been read: its request takes the next row."""
        assert self.filling is not None
        request, self.filling = self.filling, None
        self.running.append(request)
        return request

    def cancel(self, request_id: int) -> int | None:
        """Takes a request out of the queue, or returns the row where it runs, to be released; else None. (One whose
        prompt is being read is let go: whoever reads it must look.)"""
        if self.filling is not None and self.filling.id == request_id:
            self.filling.state, self.filling = "finished", None
            return None
        for place, request in enumerate(self.waiting):
            if request.id == request_id:
                request.state = "finished"
                del self.waiting[place]
                return None
        return next((row for row, request in enumerate(self.running) if request.id == request_id), None)

    def release(self, rows: Iterable[int]) -> list[tuple[int, int]]:
        """Ends the requests in `rows`. Returns the moves (from, to) that close the gaps; none of them overlap."""
        gone = set(rows)
        left = len(self.running) - len(gone)
        for row in gone:
            self.running[row].state = "finished"
        gaps = sorted(row for row in gone if row < left)
        movers = [row for row in range(left, len(self.running)) if row not in gone]
        moves = list(zip(movers, gaps, strict=True))
        for source, target in moves:
            self.running[target] = self.running[source]
        del self.running[left:]
        return moves
