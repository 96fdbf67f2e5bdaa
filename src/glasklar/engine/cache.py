"""The cache of running requests: for each layer what attention needs of earlier tokens.

MLA keeps a token as its latent and rotary key (`kv_lora_rank + qk_rope_head_dim` values a layer), grouped-query
attention as keys and values. Slots are rows of one tensor; running requests lie in the first rows, so that a decoding
step works on views and gathers nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glasklar.engine.shapes import rounded_length, rounded_rows
from glasklar.errors import CapacityError
from glasklar.model.attention import LayerCache
from glasklar.model.config import ModelConfig


class SlotCache:
    """[L, rows, length, width]: as long as the longest running request at the moment, never above `max_tokens` = rows *
    length. (Kept tight because products over a part of each slot are several times slower than over whole slots.)

    Every value is finite at all times (masked values are multiplied by zero, which does not silence NaN); `clear_from`
    restores that after a failure.
    """

    def __init__(self, config: ModelConfig, *, max_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.max_tokens = max_tokens
        self.data = torch.zeros(config.num_hidden_layers, 0, 0, config.cache_width, dtype=dtype, device=device)

    @property
    def rows(self) -> int:
        """Slots that are allocated."""
        return self.data.shape[1]

    @property
    def length(self) -> int:
        """Tokens that a slot holds."""
        return self.data.shape[2]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all layers."""
        return self.data.shape[0] * self.data.shape[3] * self.data.element_size()

    @property
    def bytes_allocated(self) -> int:
        return self.data.numel() * self.data.element_size()

    def fit(self, rows: int, length: int, keep: int) -> None:
        """Makes `rows` slots of `length` tokens, or somewhat more; the first `keep` slots keep what they hold.

        Raises CapacityError where the limit or the machine's memory does not allow it.
        """
        rows, length = rounded_rows(rows), rounded_length(length)
        L, old_rows, old_length, width = self.data.shape
        if rows <= old_rows and old_length // 2 < length <= old_length:
            return
        if max(rows, old_rows) * length <= self.max_tokens:
            rows = max(rows, old_rows)
        if rows * length > self.max_tokens:
            raise CapacityError(
                f"{rows} slots of {length} tokens exceed the cache's {self.max_tokens} tokens; raise max_tokens"
            )
        try:
            data = self.data.new_zeros(L, rows, length, width)
        except RuntimeError as error:  # torch has no own error for host memory
            size = L * rows * length * width * self.data.element_size()
            raise CapacityError(f"the cache needs {size / 1e9:.1f} GB; lower max_tokens ({error})") from None
        common = min(old_length, length)
        data[:, :keep, :common] = self.data[:, :keep, :common]
        self.data = data

    def layers(self, start: int, rows: int, length: int, slots_BT: Tensor) -> list[LayerCache]:
        """Views on slots `start .. start + rows` and their first `length` tokens, one a layer."""
        view = self.data[:, start : start + rows, :length]
        return [LayerCache(layer, slots_BT) for layer in view.unbind(0)]

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copies slots (from, to)."""
        if moves:
            source, target = (torch.tensor(rows, device=self.data.device) for rows in zip(*moves, strict=True))
            self.data.index_copy_(1, target, self.data.index_select(1, source))

    def spread(self, start: int, places: Sequence[int]) -> None:
        """Slot `start + i` becomes a copy of what was slot `start + places[i]`."""
        source = torch.tensor(places, device=self.data.device) + start
        self.data[:, start : start + len(places)] = self.data.index_select(1, source)

    def clear_from(self, row: int) -> None:
        """Zeroes the slots from `row` on."""
        self.data[:, row:].zero_()
