"""Bits per byte on held-out documents: comparable across tokenizers, and with a compressor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from glasklar.data.documents import Document
from glasklar.data.tokenizer import Tokenizer
from glasklar.model.attention import document_mask
from glasklar.model.transformer import Transformer


def bits_per_byte(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    length: int,
    rows: int = 8,
    max_bytes: int | None = None,
) -> float:
    """Of a model of ours; see `bits_per_byte_of`."""

    @torch.inference_mode()
    def score(ids_BT: Tensor) -> Tensor:
        ids_BT = ids_BT.to(model.head_WD.device)
        position_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        at = model.at(position_BT, document_mask(torch.zeros_like(ids_BT), model.dtype))
        hidden_TD = model(ids_BT, at).hidden_BTD[:, :-1].flatten(0, 1)
        logprob_T, _ = model.ops.token_logprobs(hidden_TD, model.head_WD, ids_BT[:, 1:].flatten())
        return logprob_T.view(len(ids_BT), -1)

    return bits_per_byte_of(score, tokenizer, documents, length=length, rows=rows, max_bytes=max_bytes)


def bits_per_byte_of(
    score: Callable[[Tensor], Tensor],
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    length: int,
    rows: int = 8,
    max_bytes: int | None = None,
) -> float:
    """-log2 p(document) over its UTF-8 bytes, summed over whole documents (the end token is not counted).

    score   ids [B, T] -> log-probability of each token but the first [B, T - 1], nats

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
        nats += _nats(score, windows[i : i + rows], length, tokenizer.pad_id)
    return nats / math.log(2) / total_bytes


def _windows(ids: list[int], length: int) -> list[tuple[list[int], int]]:
    """Pieces of a document with the index of the first token to score in each; every token but the first once."""
    pieces = [(ids[:length], 1)]
    for scored in range(length, len(ids), length // 2):
        start = scored - length // 2
        pieces.append((ids[start : start + length], length // 2))
    return pieces


def _nats(score: Callable[[Tensor], Tensor], windows: list[tuple[list[int], int]], length: int, pad: int) -> float:
    logprob_BT = score(torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in windows]))
    return -sum(
        logprob_BT[row, first - 1 : len(ids) - 1].double().sum().item() for row, (ids, first) in enumerate(windows)
    )
