"""The cache of the engine's own passes: pages of a few tokens, shared between requests that begin alike.

A row (a running request) has a table of pages. Full pages are known by a hash of all tokens up to their end, so that a
prompt that begins like an earlier one, or goes on from its answer, finds them again: the index is a radix tree whose
edges are pages. Pages that only the index holds are idle, and given up when room is needed: the longest unused first,
of one text its end first, so that whatever is kept can be reached. They may go to disk (`spill.py`). What is found is
bit for bit what would be computed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from glasklar.engine.spill import Spill
from glasklar.errors import CapacityError
from glasklar.model.config import ModelConfig

PAGE = 16
# Room that is set aside for what a request will make: it must not be admitted to give way at once.
AHEAD = 256
CPU = torch.device("cpu")
# Memory for pages that no running request uses, kept for prompts to come.
KEPT_BYTES = 1 << 29


@dataclass(frozen=True, kw_only=True)
class PageRoom:
    """Room of a cache of pages, of which every request takes what it needs. Room for all that it may come to need is
    not set aside: where the pages are used up, the weakest request gives way for a while."""

    max_slots: int
    max_tokens: int

    def share(self, length: int, most: int) -> int:
        return min(most, length + AHEAD)

    def fits(self, count: int, longest: int, total: int) -> bool:
        # Each request may leave a page half empty.
        return count <= self.max_slots and -(-total // PAGE) + count - 1 <= self.max_tokens // PAGE


def new_pages(
    layers: int, pages: int, page: int, width: int, dtype: torch.dtype, device: torch.device = CPU
) -> torch.Tensor:
    """Zeros [layers, pages, page, width]. A CPU's system gives the memory bit by bit when it is first met (numpy's
    zeros; those of torch would be written now). It begins at a line of the CPU's caches: reads across two cost twice.

    Raises MemoryError, or torch.OutOfMemoryError on a GPU.
    """
    if device.type != "cpu":
        return torch.zeros(layers, pages, page, width, dtype=dtype, device=device)
    size = layers * pages * page * width * dtype.itemsize
    memory = np.zeros(size + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(layers, pages, page, width)


class PageCache:
    """[L, pages, PAGE, width]; memory is taken by the system page by page as it is written.

    width   values of a token in a layer, if the config does not say it
    spill   where idle pages go that are given up
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        max_tokens: int,
        dtype: torch.dtype,
        width: int | None = None,
        spill: Spill | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.max_tokens, self.spill = max_tokens, spill
        count = max_tokens // PAGE
        width = width or config.cache_width
        try:
            self.data = new_pages(config.num_hidden_layers, count, PAGE, width, dtype, device)
        except (MemoryError, torch.OutOfMemoryError):
            gigabytes = config.num_hidden_layers * max_tokens * width * dtype.itemsize / 1e9
            raise CapacityError(f"the cache needs {gigabytes:.1f} GB; lower max_tokens = {max_tokens}") from None
        self._bytes = self.data.view(torch.uint8)
        self.tables = np.zeros((0, 8), np.int32)
        self._held = np.zeros(0, np.int64)  # pages of each row
        self._users = np.zeros(count, np.int32)  # rows and the index
        self._free = list(range(count - 1, -1, -1))
        self._index: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # the longest unused first

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all layers."""
        return self.data.shape[0] * self.data.shape[3] * self.data.element_size()

    @property
    def pages_used(self) -> int:
        """Pages that rows or the index hold."""
        return len(self._users) - len(self._free)

    @property
    def pages_of_rows(self) -> int:
        """Places for pages in the rows' tables; a page that two rows share counts twice."""
        return int(self._held.sum())

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
                page = self._restore(key)
            if page is None:
                break
            self._take(row, page)
            known += PAGE
        return known

    def reach(self, row: int, length: int) -> None:
        """Gives the row pages for `length` tokens. Raises CapacityError where none are left; it may go on later."""
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
                continue
            page = int(self.tables[row, i])
            if page in self._keys:  # known under another key: cannot be, a page is written once
                raise AssertionError(f"page {page} was published twice")
            self._index[key], self._keys[page] = page, key
            self._users[page] += 1

    def release(self, row: int) -> None:
        """Closes a row, if it is open. Its last page becomes idle first: a text without its end can still be found."""
        if row >= len(self._held):
            return
        for page in reversed(self.tables[row, : self._held[row]].tolist()):
            self._drop(page)
        self._held[row] = 0
        while len(self._idle) * PAGE * self.bytes_per_token > KEPT_BYTES:
            self._give_up()

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Renames rows (from, to); `to` is closed, `from` will be."""
        for source, target in moves:
            self._rows(target + 1)
            self.tables[target], self._held[target] = self.tables[source], self._held[source]
            self._held[source] = 0

    def forget(self) -> None:
        """Empties the index: the weights have changed."""
        pages = list(self._index.values())
        self._index.clear()
        self._keys.clear()
        self._idle.clear()
        for page in pages:
            self._drop(page)

    def keep(self) -> None:
        """Writes the idle pages to disk, for the next start; they stay here, too."""
        if self.spill is not None:
            for page in self._idle:
                self._write(page)

    def check(self) -> None:
        """Raises AssertionError unless pages are held as often as counted, and idle where only the index does."""
        counted = np.zeros_like(self._users)
        for row, held in enumerate(self._held):
            np.add.at(counted, self.tables[row, :held], 1)
        np.add.at(counted, list(self._index.values()), 1)
        assert np.array_equal(counted, self._users), "pages are held and counted differently"
        assert sorted(self._free) == np.flatnonzero(counted == 0).tolist(), "free pages are in use, or lost"
        idle = sorted(page for page in self._keys if counted[page] == 1)
        assert sorted(self._idle) == idle, "idle pages are in use, or lost"
        assert {key: page for page, key in self._keys.items()} == self._index, "pages and keys do not match"

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
        self._idle.pop(page, None)

    def _drop(self, page: int) -> None:
        self._users[page] -= 1
        if self._users[page] == 0:
            self._free.append(page)
        elif self._users[page] == 1 and page in self._keys:
            self._idle[page] = None

    def _new_page(self) -> int:
        if not self._free:
            if not self._idle:
                raise CapacityError(f"all {self.max_tokens} tokens of the cache are in use; raise max_tokens")
            self._give_up()
        return self._free.pop()

    def _give_up(self) -> None:
        """Frees the page that is idle for the longest time."""
        page, _ = self._idle.popitem(last=False)
        self._write(page)
        del self._index[self._keys.pop(page)]
        self._drop(page)

    def _write(self, page: int) -> None:
        if self.spill is not None:
            self.spill.write(self._keys[page], self._bytes[:, page].contiguous().cpu().numpy().tobytes())

    def _restore(self, key: bytes) -> int | None:
        """A page from disk; None where it is not there, or no room is."""
        if self.spill is None or not (self._free or self._idle):
            return None
        data = self.spill.read(key, self._bytes[:, 0].nbytes)
        if data is None:
            return None
        page = self._new_page()
        self._bytes[:, page] = torch.frombuffer(bytearray(data), dtype=torch.uint8).view_as(self._bytes[:, page])
        self._index[key], self._keys[page] = page, key
        self._users[page] = 1
        return page


def _keys(tokens: Sequence[int]) -> list[bytes]:
    """One key for each full page: the hash of all tokens up to its end."""
    ids = np.asarray(tokens, np.int32)
    keys, state = [], hashlib.blake2b(digest_size=16)
    for end in range(PAGE, len(ids) + 1, PAGE):
        state.update(ids[end - PAGE : end].tobytes())
        keys.append(state.copy().digest())
    return keys
