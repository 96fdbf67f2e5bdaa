"""A long context for llama.cpp without computing it: what it saved of a short one, again and again.

Its speed does not depend on the values, and filling 16,384 tokens takes it more than a quarter of an hour on two cores.
The layout is that of `llama_state_seq_get_data`:

    magic number, sequence, streams, cells                        4 bytes each
    of each cell: position, count of sequences (1), sequence      4 bytes each
    transposed, layers                  4 bytes each
    of each layer: type (4), bytes of a row (8), the keys' rows
    of each layer with values: the same for them; where they are transposed: type, bytes of a value, width (4 each), and
    for each place of a row the values of all cells
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
MAGIC = 0xAF143CD8


class Reader:
    def __init__(self, data: Bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> Bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"llama.cpp's saved state ends at {len(self.data)}: of another layout than known")
        self.at += size
        return self.data[self.at - size : self.at]


def repeated(state: Bytes, cells: int) -> Bytes:
    """The saved state of a sequence of `cells` tokens that holds again and again what `state` holds.

    Raises ValueError for a state that is laid out in another way."""
    reader = Reader(state)
    head = reader.take(16).view(np.uint32)
    magic, _, streams, had = (int(n) for n in head)
    meta = reader.take(12 * had).view(np.int32).reshape(-1, 3)
    if magic != MAGIC or streams != 1 or (meta != [[i, 1, meta[0, 2]] for i in range(had)]).any():
        raise ValueError(f"llama.cpp's saved state begins with {head}: of another layout than known")
    new = np.tile(meta[:1], (cells, 1))
    new[:, 0] = np.arange(cells)
    parts = [head[:3].view(np.uint8), np.array([cells], np.uint32).view(np.uint8), new.view(np.uint8).ravel()]
    parts.append(reader.take(8))
    transposed, layers = parts[-1].view(np.uint32)
    again = np.arange(cells) % had
    for _ in range(layers):
        parts.append(reader.take(12))
        parts.append(reader.take(had * _row(parts[-1])).reshape(had, -1)[again].ravel())
    while reader.at < len(state):
        parts.append(reader.take(12))
        if transposed:
            _, size, width = (int(n) for n in parts[-1].view(np.uint32))
            parts.append(reader.take(had * size * width).reshape(width, had, size)[:, again].ravel())
        else:
            parts.append(reader.take(had * _row(parts[-1])).reshape(had, -1)[again].ravel())
    return np.concatenate(parts)


def _row(head: Bytes) -> int:
    return int.from_bytes(head[4:].tobytes(), "little")
