"""Passes of the C++ network for the engine: the counterpart of `runner.py`, over pages instead of slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from glasklar.engine.batch import Rows, distinct
from glasklar.engine.cpu import library
from glasklar.engine.native import NativeNetwork
from glasklar.engine.packed import KINDS, PackedModel, Packer, Quantisation, pack
from glasklar.engine.paged import PAGE, PageCache
from glasklar.engine.runner import Result
from glasklar.model.config import ModelConfig
from glasklar.model.transformer import Transformer

# Tokens of one pass: bounds the buffers of the pass.
PASS_TOKENS = 512


def runs_native(model: Transformer | PackedModel) -> bool:
    """Whether the C++ pass can run this network here: compiled, on the CPU, in fp32 or bf16, and without norms on
    queries and keys, which it does not have."""
    if isinstance(model, PackedModel):
        return True
    weight = model.embed_tokens.weight
    known = weight.dtype in (torch.float32, torch.bfloat16) and weight.device.type == "cpu"
    return known and not model.config.qk_norm and library.best() is not None


def computed_by(network: Transformer) -> dict[str, str]:
    """What computes a network here, for the record: the ops of PyTorch's passes, and whose passes the engine runs."""
    return {"ops": network.ops.name, "passes": "C++" if runs_native(network) else "torch"}


class NativeRunner:
    """Runs a network (packed here, and again at `refresh`) or weights that are packed already."""

    def __init__(
        self,
        model: Transformer | PackedModel,
        *,
        max_slots: int,
        max_tokens: int,
        chunk_tokens: int = PASS_TOKENS,
        quantise: Quantisation | None = None,
    ) -> None:
        self.spare = max_slots  # where the cache keeps a prompt that is being read
        self.chunk_tokens = min(chunk_tokens, PASS_TOKENS)
        self._filled: int | None = None  # tokens of it that were read, and how many of them the cache had
        self._known = 0
        self.threads = torch.get_num_threads()
        self.model, self.quantise = model, quantise
        self.network = self._network()
        self.cache = PageCache(model.config, max_tokens=max_tokens, dtype=self.network.cache_dtype)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def _network(self) -> NativeNetwork:
        compiled = library.best()
        assert compiled is not None, "ask `runs_native` first"
        model = self.model
        whole = False
        if isinstance(model, Transformer):
            dtype = str(model.dtype).removeprefix("torch.")
            whole = dtype == "float32" and self.quantise is None
            parameters = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
            packer = Packer(compiled, KINDS[self.quantise or dtype], self.threads)
            model = pack(model.config, parameters.__getitem__, packer)
        return NativeNetwork(
            compiled, model, threads=self.threads, page=PAGE, max_tokens=PASS_TOKENS, float_cache=whole
        )

    def fill(self, prompt: Sequence[int], row: int) -> Result | None:
        """Reads the next piece of a long prompt; after the last one it stands in `row` and its logits are returned."""
        if self._filled is None:
            self._filled = self._known = self.cache.begin(self.spare, prompt)
        begin, self._filled = self._filled, min(self._filled + self.chunk_tokens, len(prompt))
        end = self._filled
        self.cache.reach(self.spare, end)
        positions = np.arange(begin, end, dtype=np.int32)
        outputs = np.array([end - 1 - begin] if end == len(prompt) else [], np.int32)
        none = np.zeros(len(outputs))
        ids = np.array(prompt[begin:end], np.int32)
        logits, _, _ = self._run(ids, positions, np.full_like(positions, self.spare), outputs, none, none)
        if end < len(prompt):
            return None
        self.cache.publish(self.spare, prompt)
        self.cache.move([(self.spare, row)])
        self._filled = None
        return Result(torch.from_numpy(logits), cached=[self._known])

    def abandon(self) -> None:
        """Drops the prompt that is being read."""
        if self._filled is not None:
            self.cache.release(self.spare)
            self._filled = None

    def fit(self, rows: int, length: int, keep: int) -> None:
        """Nothing to do: rows take pages as they grow."""

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Rows change their numbers (from, to)."""
        self.cache.move(moves)

    def release(self, row: int, tokens: Sequence[int]) -> None:
        """A request has ended; what the cache holds of it is `tokens`, for later prompts to find."""
        self.cache.publish(row, tokens)
        self.cache.release(row)

    def clear_from(self, row: int) -> None:
        """Nothing to do: a position is written before it is read."""

    def refresh(self) -> None:
        """Takes over weights that changed in place."""
        if isinstance(self.model, Transformer):
            self.network = self._network()
        self.cache.forget()

    def prefill(self, prompts: Sequence[Sequence[int]], start: int) -> Result:
        """Runs prompts into the rows from `start` on. Returns logits after each prompt [n, W]. Equal prompts (several
        samples of one problem) are computed once."""
        once, places = distinct(prompts)
        tokens: list[tuple[int, int, int]] = []  # id, position, row
        cached = [0] * len(once)
        first = {place: start + row for row, place in reversed(list(enumerate(places)))}
        for place, prompt in enumerate(once):
            row = first[place]
            had = self.cache.begin(row, prompt)
            cached[place] = had
            self.cache.reach(row, len(prompt))
            tokens += [(prompt[p], p, row) for p in range(had, len(prompt))]
        ends = {(len(prompt) - 1, first[place]): place for place, prompt in enumerate(once)}
        logits_BW = torch.empty(len(once), self.config.vocab_size)
        for begin in range(0, len(tokens), PASS_TOKENS):
            part = tokens[begin : begin + PASS_TOKENS]
            wanted = [(i, ends[p, row]) for i, (_, p, row) in enumerate(part) if (p, row) in ends]
            ids, positions, rows = (np.array(column, np.int32) for column in zip(*part, strict=True))
            outputs = np.array([i for i, _ in wanted], np.int32)
            logits, _, _ = self._run(ids, positions, rows, outputs, np.zeros(len(wanted)), np.zeros(len(wanted)))
            for found, (_, place) in zip(logits, wanted, strict=True):
                logits_BW[place] = torch.from_numpy(found)
        for place, prompt in enumerate(once):
            self.cache.publish(first[place], prompt)
        known = [cached[place] for place in places]
        for row, place in enumerate(places, start):
            if row != first[place]:
                self.cache.fork(first[place], row, len(once[place]))
                known[row - start] = len(once[place])
        return Result(logits_BW[places] if len(once) < len(prompts) else logits_BW, cached=known)

    def decode(
        self,
        rows: Rows,
        temperature: NDArray[np.float64],
        uniform: NDArray[np.float64],
        guesses: Sequence[Sequence[int]] = (),
    ) -> Result:
        """Runs the last token of every row, each followed by its guesses. Returns logits of the next ones, and tokens
        drawn from them: an output for every token that is run, row by row."""
        n = rows.n
        sequences, ids = np.arange(n, dtype=np.int32), rows.last[:n].astype(np.int32)
        positions = (rows.length[:n] - 1).astype(np.int32)
        if guesses:
            counts = [1 + len(guess) for guess in guesses]
            ids = np.array(
                [t for last, guess in zip(ids.tolist(), guesses, strict=True) for t in (last, *guess)], np.int32
            )
            places = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
            sequences, positions = np.repeat(sequences, counts), np.repeat(positions, counts) + places
            for row, count in enumerate(counts):
                self.cache.reach(row, int(rows.length[row]) - 1 + count)
        for row in np.flatnonzero((rows.length[:n] - 1) % PAGE == 0).tolist():
            self.cache.reach(row, int(rows.length[row]))
        parts = []
        for begin in range(0, len(ids), PASS_TOKENS):
            part = slice(begin, min(begin + PASS_TOKENS, len(ids)))
            outputs = np.arange(part.stop - begin, dtype=np.int32)
            parts.append(
                self._run(ids[part], positions[part], sequences[part], outputs, temperature[part], uniform[part])
            )
        logits, tokens, logprobs = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Result(torch.from_numpy(logits), tokens.astype(np.int64), logprobs)

    def _run(
        self,
        ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        rows: NDArray[np.int32],
        outputs: NDArray[np.int32],
        temperature: NDArray[np.float64],
        uniform: NDArray[np.float64],
    ) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
        return self.network.run(
            self.cache.data, ids, positions, rows, self.cache.tables, outputs, temperature.astype(np.float32), uniform
        )
