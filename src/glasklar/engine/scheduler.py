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
    """

    def __init__(self, room: Room, *, prefill_tokens: int) -> None:
        self.room, self.prefill_tokens = room, prefill_tokens
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Queues a request behind those of its priority."""
        insort(self.waiting, request, key=lambda r: (-r.priority, r.id))

    def admit(self) -> list[Request]:
        """Moves requests from the queue's head to the next rows while they fit, in the order of their prompts' lengths.
        Nobody overtakes the head: that would starve a long request."""
        if not self.waiting:
            return []
        reserves = [request.reserve for request in self.running]
        longest, total = max(reserves, default=0), sum(reserves)
        first, prompt_tokens = len(self.running), 0
        for request in self.waiting:
            longest, total = max(longest, request.reserve), total + request.reserve
            prompt_tokens += len(request.prompt)
            crowded = prompt_tokens > self.prefill_tokens and len(self.running) > first
            if crowded or not self.room.fits(len(self.running) + 1, longest, total):
                break
            request.state = "running"
            self.running.append(request)
        admitted = sorted(self.running[first:], key=lambda request: len(request.prompt))
        self.running[first:] = admitted
        del self.waiting[: len(admitted)]
        return admitted

    def cancel(self, request_id: int) -> int | None:
        """Takes a request out of the queue, or returns the row where it runs, to be released; else None."""
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
