"""Drafts: tokens guessed from the text so far, or by the model's own module of multi-token prediction, checked by the
model several at once. A wrong guess costs time, never an answer: each token is the one that the model would have chosen
after those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from glasklar.engine.batch import Rows
from glasklar.engine.paged_runner import PagedRunner
from glasklar.engine.request import Request

# Text repeats itself over at least so many tokens before a guess is made.
SHORTEST, LONGEST = 2, 4
# Steps in which a way to draft, and the plain one, are measured; steps for which the fastest way is kept then.
TRIAL, PLAIN_TRIAL, KEEP = 24, 8, 256
# Most rows for which drafts are made: with more, a pass is full without them.
DRAFT_ROWS = 8
# Tokens that the module guesses, each from its own guess before; it was trained for the first.
MODULE_DEPTHS = (1, 3)


@dataclass(frozen=True)
class Way:
    """Who guesses, and how many tokens at most."""

    source: Literal["none", "look-up", "module"]
    depth: int


@dataclass(kw_only=True)
class Tally:
    """What a way has brought: tokens guessed, those of them that stood, tokens a second and row as last measured."""

    drafted: int = 0
    accepted: int = 0
    speed: float | None = None


PLAIN = Way("none", 0)


class Lookup:
    """Guesses that a text goes on as it did when its last tokens stood in it before (prompt look-up; Saxena 2023)."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on. The last gram of all is not entered before something follows it."""
        for token in tokens:
            end = len(self.tokens)
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._after[tuple(self.tokens[end - size :])] = end
            self.tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens; none where the text's end is new."""
        for size in range(min(LONGEST, len(self.tokens)), SHORTEST - 1, -1):
            start = self._after.get(tuple(self.tokens[-size:]))
            if start is not None:
                return self.tokens[start : start + most]
        return []


class Gain:
    """Measures tokens a second of every way, while running, and says which one to go.

    Every now and then each goes a few steps; the fastest is kept for a while.
    """

    def __init__(self, ways: Sequence[Way]) -> None:
        self.tallies = {way: Tally() for way in (*ways, PLAIN)}
        self._trial = [way for way in self.tallies for _ in range(PLAIN_TRIAL if way == PLAIN else TRIAL)]
        self._step = 0
        self._best = PLAIN
        self._sums = dict.fromkeys(self.tallies, (0.0, 0.0))

    @property
    def way(self) -> Way:
        """How the next step should go."""
        return self._trial[self._step] if self._step < len(self._trial) else self._best

    @property
    def ratio(self) -> float | None:
        """Speed of the fastest way to draft over that without drafts, as last measured."""
        speeds = {way: tally.speed for way, tally in self.tallies.items()}
        plain = speeds.pop(PLAIN)
        drafted = max((speed for speed in speeds.values() if speed is not None), default=None)
        return None if plain is None or drafted is None else drafted / plain

    def note(self, way: Way, tokens: float, seconds: float) -> None:
        """A step that went `way` is done, which made `tokens` a row."""
        made, took = self._sums[way]
        self._sums[way] = (made + tokens, took + seconds)
        self._step += 1
        if self._step == len(self._trial):
            for tried, (made, took) in self._sums.items():
                self.tallies[tried].speed = made / max(took, 1e-9)
            self._best = max(self.tallies, key=lambda tried: self.tallies[tried].speed or 0.0)
        elif self._step == len(self._trial) + KEEP:
            self._step = 0
            self._sums = dict.fromkeys(self.tallies, (0.0, 0.0))


class Drafter:
    """Makes the guesses of a step. `most` tokens a request at a time; 0: never any."""

    def __init__(self, runner: PagedRunner, most: int) -> None:
        self.runner, self.most = runner, most
        ways = [Way("look-up", most)]
        if runner.has_module:
            ways += [Way("module", depth) for depth in dict.fromkeys(min(depth, most) for depth in MODULE_DEPTHS)]
        self.gain = Gain(ways if most else [])
        self._lookups: dict[int, Lookup] = {}

    def way(self, count: int) -> Way:
        """How a step of so many requests should go."""
        return self.gain.way if self.most and count <= DRAFT_ROWS else PLAIN

    def guesses(self, way: Way, rows: Rows, requests: Sequence[Request]) -> list[list[int]]:
        """Tokens that may come next, for each row."""
        left = [request.limit - int(rows.made[row]) - 1 for row, request in enumerate(requests)]
        match way.source:
            case "look-up":
                return [
                    self._look_up(rows, row, request, min(way.depth, left[row])) for row, request in enumerate(requests)
                ]
            case "module":
                return self.runner.draft(rows, [min(way.depth, most) for most in left])
            case "none":
                return []

    def note(self, way: Way, drafted: int, accepted: int) -> None:
        tally = self.gain.tallies[way]
        tally.drafted += drafted
        tally.accepted += accepted

    def drop(self, request_id: int) -> None:
        """The request has ended."""
        self._lookups.pop(request_id, None)

    def _look_up(self, rows: Rows, row: int, request: Request, most: int) -> list[int]:
        if most < 1:
            return []
        lookup = self._lookups.setdefault(request.id, Lookup())
        if not lookup.tokens:
            lookup.extend(request.prompt)
        lookup.extend(rows.answer(row)[len(lookup.tokens) - len(request.prompt) :])
        return lookup.guess(most)
