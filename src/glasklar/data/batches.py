"""Packed batches in an order fixed by the seed: any batch can be made again from its number alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed rows. A row holds whole documents one after another; attention stays inside a document.

    ids_BT         token ids; padding has segment -1
    segments_BT    number of the document inside its row, -1 for padding
    position_BT    position inside the document, from 0
    weight_BT      fp32: how much predicting *this* token counts (0 for a document's first token and for padding)
    """

    ids_BT: Tensor
    segments_BT: Tensor
    position_BT: Tensor
    weight_BT: Tensor
