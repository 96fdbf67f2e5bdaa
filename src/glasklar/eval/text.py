"""Bits per byte on held-out documents: comparable across tokenizers, and with a compressor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from glasklar.data.documents import Document
from glasklar.data.tokenizer import Tokenizer
from glasklar.model.attention import document_mask
from glasklar.model.transformer import Transformer


@torch.inference_mode()
def bits_per_byte(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    length: int,
    rows: int = 8,
    max_bytes: int | None = None,
) -> float:
    """-log2 p(document) over its UTF-8 bytes, summed over whole documents (the end token is not counted).

    Windows of `length` tokens overlap by half: a token is scored with at least length/2 tokens before it, except at a
    document's beginning. `max_bytes` stops after the first documents that reach it.
    """
    windows: list[tuple[list[int], int]] = []
    total_bytes = 0
    for document in documents:
        if max_bytes is not None and total_bytes >= max_bytes:
            break
        total_bytes += len(document.text.encode())
        windows += _windows([tokenizer.bos_id, *tokenizer.encode(document.text)], length)
    nats = 0.0
    for i in range(0, len(windows), rows):
        nats += _score(model, windows[i : i + rows], length, tokenizer.pad_id)
    return nats / math.log(2) / total_bytes


def _windows(ids: list[int], length: int) -> list[tuple[list[int], int]]:
    """Pieces of a document with the index of the first token to score in each; every token but the first once."""
    pieces = [(ids[:length], 1)]
    for scored in range(length, len(ids), length // 2):
        start = scored - length // 2
        pieces.append((ids[start : start + length], length // 2))
    return pieces


def _score(model: Transformer, windows: list[tuple[list[int], int]], length: int, pad: int) -> float:
    ids_BT = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in windows], device=model.head_WD.device)
    position_BT = torch.arange(length, device=ids_BT.device).expand_as(ids_BT)
    at = model.at(position_BT, document_mask(torch.zeros_like(ids_BT), model.dtype))
    hidden_BTD = model(ids_BT, at).hidden_BTD
    logprob_BT = model.ops.token_logprobs(hidden_BTD[:, :-1].flatten(0, 1), model.head_WD, ids_BT[:, 1:].flatten())[0]
    logprob_BT = logprob_BT.view(len(windows), length - 1)
    return -sum(
        logprob_BT[row, first - 1 : len(ids) - 1].double().sum().item() for row, (ids, first) in enumerate(windows)
    )
