"""Who runs: a queue by priority, admission while there is room, who gives way where there is none, rows of the batch
kept dense. No tensors.

A request that gives way goes back to its place in the queue with what it has made. Whoever is first, by priority and
arrival, never gives way, so that there is always somebody who gets on.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from glasklar.engine.request import Request
from glasklar.engine.shapes import rounded_length, rounded_rows


class Room(Protocol):
    """What a cache can hold: `max_tokens` in all."""

    @property
    def max_tokens(self) -> int: ...

    def share(self, length: int, most: int) -> int:
        """Tokens to set aside for a request that has `length` and may come to `most`."""
        ...

    def fits(self, count: int, longest: int, total: int) -> bool:
        """Whether `count` requests fit together; their shares are `longest` tokens at most and `total` in sum."""
        ...


@dataclass(frozen=True, kw_only=True)
class SlotRoom:
    """Room of a cache of equal slots: every request takes as much as the longest."""

    max_slots: int
    max_tokens: int

    def share(self, length: int, most: int) -> int:
        return most

    def fits(self, count: int, longest: int, total: int) -> bool:
        return count <= self.max_slots and rounded_rows(count) * rounded_length(longest) <= self.max_tokens


class Scheduler:
    """Keeps running requests in rows 0 .. n-1 of the batch.

    room             what the cache can hold
    prefill_tokens   prompt tokens admitted at once (though one prompt always is)
    chunk            a prompt of more tokens is read piece by piece, one such prompt at a time, while others run
    """

    def __init__(self, room: Room, *, prefill_tokens: int, chunk: int | None = None) -> None:
        self.room, self.prefill_tokens, self.chunk = room, prefill_tokens, chunk
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.filling: Request | None = None

    def add(self, request: Request) -> None:
        """Queues a request behind those of its priority."""
        insort(self.waiting, request, key=_strength)

    def admit(self, lengths: Sequence[int] | None = None, budget: int | None = None) -> list[Request]:
        """Moves requests from the queue's head to the next rows while they fit, in the order of their texts' lengths; a
        long one becomes `filling`, and joins the rows by `start`.

        lengths   of the running requests' texts by now
        budget    tokens to be read in this step, if less than `prefill_tokens`

        Nobody overtakes the head, which would starve a long request, unless the head waits for another long prompt to
        be read: that ends soon, and whoever is short need not wait for it.
        """
        if not self.waiting:
            return []
        shares = self._shares(lengths)
        longest, total, count = max(shares, default=0), sum(shares), len(shares)
        most = self.prefill_tokens if budget is None else min(budget, self.prefill_tokens)
        admitted: list[Request] = []
        left: list[Request] = []
        tokens = 0
        for place, request in enumerate(self.waiting):
            length = len(request.text)
            long = self.chunk is not None and length > self.chunk
            if long and self.filling is not None:
                left.append(request)
                continue
            share = self.room.share(length, request.reserve)
            longest, total, count = max(longest, share), total + share, count + 1
            tokens += 0 if long else length
            crowded = tokens > most and bool(admitted)
            if crowded or not self.room.fits(count, longest, total):
                left += self.waiting[place:]
                break
            request.state = "running"
            if long:
                self.filling = request
            else:
                admitted.append(request)
        self.waiting = left
        admitted.sort(key=lambda request: len(request.text))
        self.running += admitted
        return admitted

    def outranked(self, lengths: Sequence[int] | None = None) -> list[Request]:
        """Requests of lower priority that must give way for the queue's head to run: as few as possible, the weakest
        first. None where it fits, or would not fit even so."""
        if not self.waiting:
            return []
        head = self.waiting[0]
        shares = dict(zip((r.id for r in self.present), self._shares(lengths), strict=True))
        shares[head.id] = self.room.share(len(head.text), head.reserve)
        weaker = sorted((r for r in self.present if r.priority < head.priority), key=_strength, reverse=True)
        yielding: list[Request] = []
        reading = self.filling
        if reading is not None and self.chunk is not None and len(head.text) > self.chunk:
            if reading not in weaker:
                return []  # it waits for its better to be read
            weaker.remove(reading)
            yielding.append(reading)
            del shares[reading.id]
        while not self.room.fits(len(shares), max(shares.values()), sum(shares.values())):
            if not weaker:
                return []
            yielding.append(weaker.pop(0))
            del shares[yielding[-1].id]
        return yielding

    def weakest(self) -> Request | None:
        """Who gives way when the cache is full: the latest of the lowest priority. None where only one is present."""
        present = self.present
        return max(present, key=_strength) if len(present) > 1 else None

    def requeue(self, request: Request) -> None:
        """A request that gave way, and was released, waits at its place again."""
        if self.filling is request:
            self.filling = None
        request.state = "waiting"
        self.add(request)

    def _shares(self, lengths: Sequence[int] | None) -> list[int]:
        """What is set aside for the present requests."""
        known = [len(request.text) for request in self.running] if lengths is None else list(lengths)
        if self.filling is not None:
            known.append(len(self.filling.text))
        return [self.room.share(n, request.reserve) for n, request in zip(known, self.present, strict=True)]

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


def _strength(request: Request) -> tuple[int, int]:
    """What sorts requests: the strongest first."""
    return -request.priority, request.id
