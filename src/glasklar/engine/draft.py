"""Drafts: tokens guessed from the text so far, checked by the model several at once. A wrong guess costs time, never an
answer: each token is the one that the model would have chosen after those before it.
"""

from __future__ import annotations

from collections.abc import Sequence

# Text repeats itself over at least so many tokens before a guess is made.
SHORTEST, LONGEST = 2, 4
# Steps in which both ways are measured, and steps for which the faster one is kept then.
TRIAL, KEEP = (24, 8), 256


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
    """Measures tokens a second with drafts and without, while running, and says which way to go.

    Every now and then a few steps go each way; the faster one is kept for a while.
    """

    def __init__(self) -> None:
        self.ratio: float | None = None  # speed with drafts over speed without, as last measured
        self._step = 0
        self._tokens, self._seconds = [0.0, 0.0], [0.0, 0.0]

    @property
    def drafting(self) -> bool:
        """Whether the next step should draft."""
        if self._step < TRIAL[0]:
            return True
        return self._step >= sum(TRIAL) and (self.ratio or 0) > 1

    def note(self, tokens: float, seconds: float) -> None:
        """A step is done, which made `tokens` a row."""
        if self._step < sum(TRIAL):
            way = int(self._step < TRIAL[0])
            self._tokens[way] += tokens
            self._seconds[way] += seconds
        self._step += 1
        if self._step == sum(TRIAL):
            plain, drafted = (self._tokens[way] / max(self._seconds[way], 1e-9) for way in (0, 1))
            self.ratio = drafted / plain
            self._tokens, self._seconds = [0.0, 0.0], [0.0, 0.0]
        elif self._step == sum(TRIAL) + KEEP:
            self._step = 0
