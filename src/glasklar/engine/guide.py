"""Guides: what may come next in an answer, decided token by token beside the model (grammars, budgets)."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Guide(Protocol):
    """One answer's guide, made anew for each request. Neither method may raise."""

    def allowed(self) -> NDArray[np.bool_] | None:
        """Tokens that may come next [W]; None: all. Where none may, the request ends with an error."""
        ...

    def accept(self, token: int) -> None:
        """The answer has gone on with `token`, which was allowed."""
        ...


class ThinkingBudget:
    """Ends the thinking after `tokens` tokens, unless the model does before: then only `close_id` is allowed, once.

    within   whether the prompt has opened the thinking already; if not, `open_id` opens it
    """

    def __init__(self, tokens: int, *, open_id: int, close_id: int, vocabulary: int, within: bool) -> None:
        self.left, self.open_id, self.close_id, self.within = tokens, open_id, close_id, within
        self._close = np.arange(vocabulary) == close_id

    def allowed(self) -> NDArray[np.bool_] | None:
        return self._close if self.within and self.left <= 0 else None

    def accept(self, token: int) -> None:
        if self.within:
            self.left -= 1
            self.within = token != self.close_id
        else:
            self.within = token == self.open_id
