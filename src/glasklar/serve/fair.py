"""Who is next: plain logic over keys and numbers, no clock, no network."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


def may_take(held: int, free: int, alone: bool) -> bool:
    """Whether a key that holds `held` places may have another one while `free` are left.

    A key may hold twice as many as it leaves free, so that however much one asks for, a third is left for others, and
    a third of that (dynamic thresholds; Choudhury and Hahne 1998). `alone`: there is nobody else to think of.
    """
    return free > 0 and (alone or held < 2 * free)


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """A request that wants a place. `key`: whose; higher priorities first, among equals the lower number."""

    number: int
    key: str
    priority: int = 0


class FairQueue:
    """Gives `places` to those that wait: to the key that holds the fewest, of its requests the first in line.

    alone   whether there is one key only at the moment, which may then hold all places
    """

    def __init__(self, places: int, *, alone: Callable[[], bool] = lambda: True) -> None:
        self.places, self.alone = places, alone
        self._waiting: dict[str, list[Ticket]] = {}
        self._held: Counter[str] = Counter()

    @property
    def waiting(self) -> int:
        return sum(len(line) for line in self._waiting.values())

    @property
    def running(self) -> int:
        return self._held.total()

    def add(self, ticket: Ticket) -> None:
        insort(self._waiting.setdefault(ticket.key, []), ticket, key=lambda t: (-t.priority, t.number))

    def take(self) -> Ticket | None:
        """The next one to run, which now holds a place; None if nobody may."""
        free = self.places - self.running
        if not self._waiting or free <= 0:
            return None
        alone = self.alone()
        able = [key for key in self._waiting if may_take(self._held[key], free, alone)]
        if not able:
            return None
        key = min(able, key=lambda k: (self._held[k], self._waiting[k][0].number))
        ticket = self._waiting[key][0]
        self._leave(ticket)
        self._held[key] += 1
        return ticket

    def remove(self, ticket: Ticket) -> None:
        """Takes out one that waits."""
        self._leave(ticket)

    def give_back(self, ticket: Ticket) -> None:
        """One that ran has ended."""
        self._held[ticket.key] -= 1
        if not self._held[ticket.key]:
            del self._held[ticket.key]

    def _leave(self, ticket: Ticket) -> None:
        line = self._waiting[ticket.key]
        line.remove(ticket)
        if not line:
            del self._waiting[ticket.key]
