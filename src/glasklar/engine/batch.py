"""The running requests as columns of numbers, and their tensors for a pass of the model.

A step touches each column once, whatever the number of requests; Python handles single requests only when they come
and go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glasklar.engine.request import Request
from glasklar.engine.shapes import rounded_length, rounded_rows

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


class Rows:
    """Columns for rows 0 .. n-1 of the batch.

    last         token made last, not yet in the cache
    length       tokens of prompt and answer so far = position of the next token
    made, limit  tokens made, and most that may be
    stops        ids that end the answer, padded with -1
    special      the request wants more of the sampler than a temperature
    tokens, logprobs   what was made, [n, longest answer or more]
    """

    def __init__(self) -> None:
        self.n = 0
        self.last = np.zeros(0, np.int64)
        self.length = np.zeros(0, np.int64)
        self.made = np.zeros(0, np.int64)
        self.limit = np.zeros(0, np.int64)
        self.temperature = np.zeros(0, np.float64)
        self.seed = np.zeros(0, np.uint64)
        self.special = np.zeros(0, np.bool_)
        self.stops = np.zeros((0, 1), np.int64)
        self.tokens = np.zeros((0, 1), np.int64)
        self.logprobs = np.zeros((0, 1), np.float32)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return int(self.length[: self.n].max(initial=0))

    def answer(self, row: int) -> list[int]:
        """Tokens made so far."""
        return self.tokens[row, : self.made[row]].tolist()

    def append(self, requests: Sequence[Request]) -> None:
        """New rows at the end; those that gave way before have an answer already."""
        start, self.n = self.n, self.n + len(requests)
        self._grow(
            self.n,
            stops=max(len(request.params.stop_ids) for request in requests),
            tokens=max(len(request.answer) for request in requests),
        )
        self.stops[start : self.n] = -1
        for row, request in enumerate(requests, start):
            params, made = request.params, len(request.answer)
            self.length[row], self.limit[row] = len(request.prompt) + made, request.limit
            self.made[row], self.last[row] = made, request.answer[-1] if made else 0
            self.tokens[row, :made], self.logprobs[row, :made] = request.answer, request.logprobs
            self.temperature[row], self.seed[row] = params.temperature, params.seed % (1 << 64)
            self.special[row] = request.special
            self.stops[row, : len(params.stop_ids)] = params.stop_ids

    def _grow(self, rows: int, *, stops: int, tokens: int) -> None:
        rows = rounded_rows(rows)
        for name, column in vars(self).items():
            if name == "n":
                continue
            width = {"stops": stops, "tokens": tokens, "logprobs": tokens}.get(name, 0)
            shape = (max(rows, len(column)), *(max(width, old) for old in column.shape[1:]))
            if shape != column.shape:
                grown = np.full(shape, -1 if name == "stops" else 0, column.dtype)
                grown[tuple(slice(size) for size in column.shape)] = column
                setattr(self, name, grown)

    def move(self, moves: Sequence[tuple[int, int]], left: int) -> None:
        """Closes gaps as the scheduler says; `left` rows remain."""
        if moves:
            source, target = (list(rows) for rows in zip(*moves, strict=True))
            for name, column in vars(self).items():
                if name != "n":
                    column[target] = column[source]
        self.n = left

    def record(self, rows: IntArray, tokens: IntArray, logprobs: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Takes one new token for each of the rows. Returns which of them are stopped by it."""
        longest = int(self.made[rows].max(initial=0))
        if longest >= self.tokens.shape[1]:
            self._grow(self.n, stops=0, tokens=max(64, 2 * longest))
        self.tokens[rows, self.made[rows]] = tokens
        self.logprobs[rows, self.made[rows]] = logprobs
        self.last[rows] = tokens
        self.made[rows] += 1
        self.length[rows] += 1
        return (self.stops[rows] == tokens[:, None]).any(axis=1)


@dataclass(frozen=True)
class PrefillInputs:
    """Right-padded prompts: ids, positions [B, T], documents [B, T] (-1 padding), place of the last token [B]."""

    ids_BT: Tensor
    position_BT: Tensor
    segments_BT: Tensor
    last_B: Tensor


def distinct(prompts: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[int]]:
    """Each prompt once, in order, and for every prompt its place among them."""
    place: dict[tuple[int, ...], int] = {}
    places = [place.setdefault(tuple(prompt), len(place)) for prompt in prompts]
    return list(place), places


def prefill_groups(lengths: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Runs (start, stop) of prompts to be padded together: `budget` tokens with padding, but one prompt at least."""
    groups: list[tuple[int, int]] = []
    start = longest = 0
    for stop, length in enumerate(lengths):
        longest = max(longest, rounded_length(length))
        if stop > start and (stop + 1 - start) * longest > budget:
            groups.append((start, stop))
            start, longest = stop, rounded_length(length)
    return [*groups, (start, len(lengths))]


def prefill_inputs(prompts: Sequence[Sequence[int]], most_rows: int) -> PrefillInputs:
    """Tensors of a prefill pass in rounded shapes, `most_rows` rows at most. Padding repeats a prompt's last token and
    spare rows repeat the first prompt: padding cannot bring in a number that no request has."""
    lengths = np.array([len(prompt) for prompt in prompts])
    T = rounded_length(int(lengths.max()))
    ids = np.array([[*prompt, *[prompt[-1]] * (T - len(prompt))] for prompt in prompts], np.int64)
    spare = min(rounded_rows(len(prompts)), most_rows) - len(prompts)
    ids = np.concatenate((ids, ids[:1].repeat(spare, axis=0)))
    lengths = np.concatenate((lengths, lengths[:1].repeat(spare)))
    position = np.arange(T)[None].repeat(len(ids), axis=0)
    segments = np.where(position < lengths[:, None], 0, -1)
    return PrefillInputs(*(torch.from_numpy(array) for array in (ids, position, segments, lengths - 1)))


def decode_inputs(rows: Rows) -> tuple[Tensor, Tensor]:
    """Last tokens and their positions [B, 1] in rounded shapes. Spare rows stand at position 0 of an empty slot."""
    n = rows.n
    B = rounded_rows(n)
    ids, position = np.zeros((B, 1), np.int64), np.zeros((B, 1), np.int64)
    ids[:n, 0], position[:n, 0] = rows.last[:n], rows.length[:n] - 1
    return torch.from_numpy(ids), torch.from_numpy(position)
