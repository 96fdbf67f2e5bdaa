"""Packed batches in an order fixed by the seed: any batch can be made again from its number alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor

from glasklar.errors import CheckpointError, DataError
from glasklar.provenance.files import write_atomic

Sequences = Sequence[tuple[Sequence[int], Sequence[float] | None]]


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

    def to(self, device: str) -> Batch:
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True)
class PackedDocuments:
    """Token ids of many documents in one array.

    ids       [tokens]
    starts    [documents + 1]: document d is ids[starts[d]:starts[d+1]]
    weights   [tokens] fp32: how much predicting each token counts
    """

    ids: np.ndarray
    starts: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, sequences: Sequences) -> PackedDocuments:
        """From (ids, weights) pairs; weights None: all but the first token count."""
        if not sequences:
            raise DataError("no documents to pack; check the sources")
        lengths = np.array([len(ids) for ids, _ in sequences])
        ids = np.concatenate([np.asarray(ids, dtype=np.int32) for ids, _ in sequences])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        weights = np.ones(len(ids), dtype=np.float32)
        for (_, given), start in zip(sequences, starts[:-1], strict=True):
            if given is not None:
                weights[start : start + len(given)] = given
        weights[starts[:-1]] = 0.0
        return cls(ids, starts, weights)

    @classmethod
    def open(cls, path: Path) -> PackedDocuments:
        """From a file written by `save`. Raises CheckpointError where it is damaged."""
        try:
            return cls(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            raise CheckpointError(
                f"{path}: not a packed token file ({error}); remove its folder to have it made again"
            ) from None

    def save(self, path: Path) -> None:
        """Writes the arrays as one safetensors file, whole or not at all."""
        write_atomic(path, save({"ids": self.ids, "starts": self.starts, "weights": self.weights}))

    def __len__(self) -> int:
        return len(self.starts) - 1


class Packer:
    """Endless batches of `rows` packed rows of `length` tokens. Each epoch is a fresh permutation under (seed, epoch).

    Whole documents go into the first row with room, among a window of open rows; only documents longer than a row are
    cut, into pieces that are segments of their own.
    """

    WINDOW = 32

    def __init__(self, documents: PackedDocuments, *, rows: int, length: int, seed: int) -> None:
        self.documents, self.rows, self.length, self.seed = documents, rows, length, seed
        self.pieces = _pieces(documents.starts, length)
        self._plans: dict[int, list[list[int]]] = {}
        self._first_row = [0]  # row number at which each epoch begins

    def batch(self, k: int) -> Batch:
        """Batch number `k`, from 0."""
        return self._fill([self._row(k * self.rows + row) for row in range(self.rows)])

    def shown(self, k: int) -> np.ndarray:
        """Where the pieces that batch number `k` shows begin in the flat ids."""
        return self.pieces[[piece for row in range(self.rows) for piece in self._row(k * self.rows + row)], 0]

    def _row(self, number: int) -> list[int]:
        """Pieces in row `number`, counted over all epochs."""
        epoch = 0
        while True:
            if epoch + 1 >= len(self._first_row):
                self._first_row.append(self._first_row[epoch] + len(self._plan(epoch)))
            if number < self._first_row[epoch + 1]:
                return self._plan(epoch)[number - self._first_row[epoch]]
            epoch += 1

    def _plan(self, epoch: int) -> list[list[int]]:
        if epoch not in self._plans:
            order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(len(self.pieces))
            lengths = (self.pieces[:, 1] - self.pieces[:, 0]).tolist()
            plan = pack(order.tolist(), lengths, self.length, self.WINDOW)
            self._plans = {e: p for e, p in self._plans.items() if e >= epoch - 1} | {epoch: plan}
        return self._plans[epoch]

    def _fill(self, rows: list[list[int]]) -> Batch:
        shape = (len(rows), self.length)
        ids, position = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        segments, weight = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        for row, members in enumerate(rows):
            at = 0
            for segment, piece in enumerate(members):
                begin, end = self.pieces[piece]
                span = slice(at, at + end - begin)
                ids[row, span] = self.documents.ids[begin:end]
                weight[row, span] = self.documents.weights[begin:end]
                weight[row, at] = 0.0  # nothing stands before it
                position[row, span] = np.arange(end - begin)
                segments[row, span] = segment
                at += end - begin
        return Batch(
            ids_BT=torch.from_numpy(ids),
            segments_BT=torch.from_numpy(segments),
            position_BT=torch.from_numpy(position),
            weight_BT=torch.from_numpy(weight),
        )


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """A packed batch and where each sequence lies in it: row and first column."""

    batch: Batch
    rows: list[int]
    starts: list[int]


def pack_rows(sequences: Sequences, *, length: int, rows_multiple: int, pad_id: int) -> PackedRows:
    """Packs sequences that are all no longer than `length` into rows, in their order, best fit; the number of rows is
    rounded up to a multiple, since every new shape costs a compilation in oneDNN."""
    lengths = [len(ids) for ids, _ in sequences]
    if max(lengths) > length:
        raise DataError(f"a sequence of {max(lengths)} tokens does not fit into rows of {length}; raise the row length")
    plan = pack(sorted(range(len(lengths)), key=lambda i: -lengths[i]), lengths, length, len(lengths))
    count = -(-len(plan) // rows_multiple) * rows_multiple
    ids_BT = torch.full((count, length), pad_id)
    segments_BT, position_BT = torch.full((count, length), -1), torch.zeros(count, length, dtype=torch.long)
    weight_BT = torch.zeros(count, length)
    rows, starts = [0] * len(lengths), [0] * len(lengths)
    for row, members in enumerate(plan):
        at = 0
        for segment, member in enumerate(members):
            ids, weights = sequences[member]
            end = at + len(ids)
            ids_BT[row, at:end] = torch.tensor(ids)
            segments_BT[row, at:end] = segment
            position_BT[row, at:end] = torch.arange(len(ids))
            weight_BT[row, at:end] = 1.0 if weights is None else torch.tensor(weights)
            weight_BT[row, at] = 0.0
            rows[member], starts[member] = row, at
            at = end
    batch = Batch(ids_BT=ids_BT, segments_BT=segments_BT, position_BT=position_BT, weight_BT=weight_BT)
    return PackedRows(batch=batch, rows=rows, starts=starts)


def pack(order: Sequence[int], lengths: Sequence[int], room: int, window: int) -> list[list[int]]:
    """Rows of members, best fit among at most `window` open rows; the fullest row is closed when there are more."""
    closed: list[list[int]] = []
    open_rows: list[tuple[int, list[int]]] = []  # (room left, members), fullest first
    for member in order:
        need = lengths[member]
        for i, (left, members) in enumerate(open_rows):
            if left >= need:
                members.append(member)
                del open_rows[i]
                break
        else:
            left, members = room, [member]
        if left == need:
            closed.append(members)
            continue
        _insert(open_rows, (left - need, members))
        if len(open_rows) > window:
            closed.append(open_rows.pop(0)[1])
    return closed + [members for _, members in open_rows]


def _insert(open_rows: list[tuple[int, list[int]]], row: tuple[int, list[int]]) -> None:
    for i, (left, _) in enumerate(open_rows):
        if row[0] <= left:
            open_rows.insert(i, row)
            return
    open_rows.append(row)


def _pieces(starts: np.ndarray, length: int) -> np.ndarray:
    """[pieces, 2] begin and end in the flat ids: whole documents, or cut into pieces of `length`; no lone tokens."""
    spans = [
        (begin, min(begin + length, end))
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
        for begin in range(start, end, length)
    ]
    return np.array([span for span in spans if span[1] - span[0] > 1])
