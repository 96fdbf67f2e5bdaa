"""Guides: what may come next in an answer, decided token by token beside the model (grammars, budgets)."""

from __future__ import annotations

import logging
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)


class Guide(Protocol):
    """One answer's guide, made anew for each request. Where a method raises, the request ends with an error."""

    def allowed(self) -> NDArray[np.bool_] | None:
        """Tokens that may come next [W]; None: all. Where none may, the request ends with an error."""
        ...

    def accept(self, token: int) -> None:
        """The answer has gone on with `token`, which was allowed."""
        ...


class Guarded:
    """A guide as the engine asks it: one that fails allows nothing from then on, and others' answers go on.

    error   what it raised, or what is wrong with its mask
    """

    def __init__(self, guide: Guide, vocabulary: int) -> None:
        self.guide, self.vocabulary = guide, vocabulary
        self.error: Exception | None = None

    def allowed(self) -> NDArray[np.bool_] | None:
        if self.error is None:
            try:
                mask = self.guide.allowed()
                if mask is None or (mask.shape == (self.vocabulary,) and mask.dtype == np.bool_):
                    return mask
                raise ValueError(f"a mask {mask.dtype}{list(mask.shape)}, where bool[{self.vocabulary}] is due")
            except Exception as error:
                self._failed(error)
        return np.zeros(self.vocabulary, np.bool_)

    def accept(self, token: int) -> None:
        try:
            self.guide.accept(token)
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        log.error("the guide of an answer failed; the answer ends", exc_info=error)
        self.error = error


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
