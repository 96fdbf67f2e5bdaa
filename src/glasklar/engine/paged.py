"""The cache of the C++ pass: pages of a few tokens, shared between requests that begin alike.

A row (a running request) has a table of pages. Full pages are known by a hash of all tokens up to their end, so that a
prompt that begins like an earlier one, or goes on from its answer, finds them again. Pages that only the index holds
are given up when room is needed, the longest unused first. What is found is bit for bit what would be computed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from glasklar.errors import CapacityError
from glasklar.model.config import ModelConfig

PAGE = 16
# Memory for pages that no running request uses, kept for prompts to come.
KEPT_BYTES = 1 << 29


@dataclass(frozen=True, kw_only=True)
class PageRoom:
    """Room of a cache of pages, of which every request takes what it needs."""

    max_slots: int
    max_tokens: int

    def fits(self, count: int, longest: int, total: int) -> bool:
        # Each request may leave a page half empty.
        return count <= self.max_slots and -(-total // PAGE) + count - 1 <= self.max_tokens // PAGE


class PageCache:
    """[L, pages, PAGE, width]; memory is taken by the system page by page as it is written."""

    def __init__(self, config: ModelConfig, *, max_tokens: int, dtype: torch.dtype) -> None:
        self.max_tokens = max_tokens
        count = max_tokens // PAGE
        size = torch.tensor([], dtype=dtype).element_size()
        try:
            memory = np.zeros((config.num_hidden_layers, count, PAGE, config.cache_width * size), np.uint8)
        except MemoryError:
            gigabytes = config.num_hidden_layers * max_tokens * config.cache_width * size / 1e9
            raise CapacityError(f"the cache needs {gigabytes:.1f} GB; lower max_tokens = {max_tokens}") from None
        self.data = torch.from_numpy(memory).view(dtype)
        self.tables = np.zeros((0, 8), np.int32)
        self._held = np.zeros(0, np.int64)  # pages of each row
        self._users = np.zeros(count, np.int32)  # rows and the index
        self._free = list(range(count - 1, -1, -1))
        self._index: OrderedDict[bytes, int] = OrderedDict()
        self._keys: dict[int, bytes] = {}

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all layers."""
        return self.data.shape[0] * self.data.shape[3] * self.data.element_size()

    @property
    def pages_used(self) -> int:
        """Pages that rows or the index hold."""
        return len(self._users) - len(self._free)

    @property
    def bytes_allocated(self) -> int:
        return self.pages_used * PAGE * self.bytes_per_token

    def begin(self, row: int, prompt: Sequence[int]) -> int:
        """Opens a row for a prompt. Returns how many of its tokens the cache has already; one is always left to do."""
        self._rows(row + 1)
        assert self._held[row] == 0, "the row is in use"
        known = 0
        for key in _keys(prompt[: len(prompt) - 1]):
            page = self._index.get(key)
            if page is None:
                break
            self._index.move_to_end(key)
            self._take(row, page)
            known += PAGE
        return known

    def reach(self, row: int, length: int) -> None:
        """Gives the row pages for `length` tokens."""
        while self._held[row] * PAGE < length:
            self._take(row, self._new_page())

    def fork(self, source: int, target: int, length: int) -> None:
        """Opens row `target` with the first `length` tokens of row `source`: full pages are shared, others copied."""
        self._rows(target + 1)
        for page in self.tables[source, : length // PAGE].tolist():
            self._take(target, page)
        if length % PAGE:
            page = self._new_page()
            self.data[:, page] = self.data[:, self.tables[source, length // PAGE]]
            self._take(target, page)

    def publish(self, row: int, tokens: Sequence[int]) -> None:
        """Makes the row's full pages, which hold `tokens`, known to later prompts."""
        for i, key in enumerate(_keys(tokens)):
            if key in self._index:
                self._index.move_to_end(key)
                continue
            page = int(self.tables[row, i])
            if page in self._keys:  # known under another key: cannot be, a page is written once
                raise AssertionError(f"page {page} was published twice")
            self._index[key], self._keys[page] = page, key
            self._users[page] += 1

    def release(self, row: int) -> None:
        """Closes a row, if it is open."""
        if row >= len(self._held):
            return
        for page in self.tables[row, : self._held[row]].tolist():
            self._drop(page)
        self._held[row] = 0
        while len(self._index) * PAGE * self.bytes_per_token > KEPT_BYTES and self._forget_one():
            pass

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Renames rows (from, to); `to` is closed, `from` will be."""
        for source, target in moves:
            self.tables[target], self._held[target] = self.tables[source], self._held[source]
            self._held[source] = 0

    def forget(self) -> None:
        """Empties the index: the weights have changed."""
        for page in self._index.values():
            self._drop(page)
        self._index.clear()
        self._keys.clear()

    def check(self) -> None:
        """Raises AssertionError unless every page is held as often as it is counted."""
        counted = np.zeros_like(self._users)
        for row, held in enumerate(self._held):
            np.add.at(counted, self.tables[row, :held], 1)
        np.add.at(counted, list(self._index.values()), 1)
        assert np.array_equal(counted, self._users), "pages are held and counted differently"
        assert sorted(self._free) == np.flatnonzero(counted == 0).tolist(), "free pages are in use, or lost"

    def _rows(self, count: int) -> None:
        if count > len(self._held):
            more = max(count, 2 * len(self._held)) - len(self._held)
            self._held = np.pad(self._held, (0, more))
            self.tables = np.pad(self.tables, ((0, more), (0, 0)))

    def _take(self, row: int, page: int) -> None:
        held = int(self._held[row])
        if held == self.tables.shape[1]:
            self.tables = np.pad(self.tables, ((0, 0), (0, held)))
        self.tables[row, held] = page
        self._held[row] += 1
        self._users[page] += 1

    def _drop(self, page: int) -> None:
        self._users[page] -= 1
        if self._users[page] == 0:
            self._free.append(page)

    def _new_page(self) -> int:
        if not self._free and not self._forget_one():
            raise CapacityError(f"all {self.max_tokens} tokens of the cache are in use; raise max_tokens")
        return self._free.pop()

    def _forget_one(self) -> bool:
        """Gives up the page that is unused for the longest time; False if all are in use."""
        for key, page in self._index.items():
            if self._users[page] == 1:
                del self._index[key], self._keys[page]
                self._drop(page)
                return True
        return False


def _keys(tokens: Sequence[int]) -> list[bytes]:
    """One key for each full page: the hash of all tokens up to its end."""
    ids = np.asarray(tokens, np.int32)
    keys, state = [], hashlib.blake2b(digest_size=16)
    for end in range(PAGE, len(ids) + 1, PAGE):
        state.update(ids[end - PAGE : end].tobytes())
        keys.append(state.copy().digest())
    return keys
