"""The two sides of the race: passes of our engine, and llama.cpp through its C interface."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_state import repeated
from random_model import Files

from glasklar.engine.cpu.library import CacheKind
from glasklar.engine.native import NativeNetwork
from glasklar.engine.packed import PackedMatrix
from glasklar.engine.packed_file import lock
from glasklar.errors import CapacityError
from glasklar.runtime import cores

PAGE, PASS_TOKENS, Q8_0 = 16, 512, 8


@dataclass(frozen=True)
class Figure:
    """What is measured: `tokens` of `rows` sequences after `context` tokens each; asked for and aimed at."""

    name: str
    rows: int
    context: int
    tokens: int  # of a sequence in one pass
    floor: float
    goal: float

    @property
    def total(self) -> int:
        return self.rows * self.tokens


def open_llama(folder: Path | None) -> Any:
    """The C interface of llama.cpp; `folder`: where llama-cpp-python was installed into, if not beside us."""
    if folder:
        sys.path.append(str(folder))
    try:
        from llama_cpp import llama_cpp
    except ImportError:
        sys.exit("needs llama.cpp: pip install llama-cpp-python (it is compiled, some ten minutes on two cores)")
    return llama_cpp


class Ours:
    """The pass of our engine over packed weights."""

    def __init__(self, files: Files, tokens: int, threads: int, cache: CacheKind = "int16") -> None:
        self.config, self.packed = files.config, files.packed
        library, self.model = files.open_packed(threads)
        self.network = NativeNetwork(
            library, self.model, threads=threads, page=PAGE, max_tokens=PASS_TOKENS, cache=cache, cores=cores(threads)
        )
        self.cache = self.network.new_cache(-(-tokens // PAGE) + 1)
        self.rng = np.random.default_rng(0)

    def fill(self) -> None:
        """Something to attend to, for figures after a context."""
        self._fill_int8() if self.network.cache_kind == "int8" else self._fill_int16()

    def lock(self) -> None:
        """Keeps our weights in memory, and maps them, as the peer's are: its copy is no file. Else the system puts some
        of ours aside while the peer works, and where whole networks of both just fit, most tokens wait for the disk."""
        try:
            self.model.held = lock(self.packed)
        except CapacityError as error:
            print(f"{error}; figures may include reading from the disk", file=sys.stderr)
        for _, weights in self.model.tensors():
            weights.view(-1).view(torch.uint8)[::4096].sum()

    def _fill_int16(self) -> None:
        """The same as integers, in whose lowest bits the scale lies."""
        rows = self.cache.view(-1, self.cache.shape[-1])
        deviation = 28000 / self._parts[0] ** 0.5
        scale = int(np.float32(1 / deviation).view(np.uint32))
        bits = torch.tensor([scale >> i & 1 for i in range(32)], dtype=torch.int16)
        for some in rows.split(1 << 16):
            some.copy_((torch.randn(some.shape) * deviation).clamp(-32000, 32000))
            begin = 0
            for width in self._parts:
                some[:, begin : begin + 32] = some[:, begin : begin + 32] & -2 | bits
                begin += (width + 31) // 32 * 32
            assert begin == some.shape[-1]

    @property
    def _parts(self) -> list[int]:
        """Values of the parts of a row."""
        c = self.config
        return [c.kv_lora_rank + c.rope_dim] if c.kv_lora_rank else [c.qk_head_dim, c.value_head_dim] * c.kv_heads

    def _fill_int8(self) -> None:
        """Values of the size of normal ones in rows as `store_part` lays them out: values, a scale, shifts."""
        rows = self.cache.view(-1, self.cache.shape[-1])
        rows.random_(0, 256)
        begin = 0
        for width in self._parts:
            values = (width + 3) // 4 * 4
            scale = torch.tensor([width**0.5 / 31000]).view(torch.uint8)
            rows[:, begin + values : begin + values + 4] = scale
            end = begin + values + 4 + (width + 127) // 128 * 4
            rows[:, begin + values + 4 : end] = 3
            begin = end
        assert begin == rows.shape[-1]

    def run(self, figure: Figure, turn: int) -> float:
        """Seconds of one pass of the figure (or more, of 512 tokens each)."""
        pages = self.cache.shape[1] // figure.rows
        tables = np.arange(pages * figure.rows, dtype=np.int32).reshape(figure.rows, pages)
        ids = self.rng.integers(0, self.config.vocab_size, figure.total).astype(np.int32)
        begin = time.perf_counter()  # the draw of each next token is part of the pass, as it is not of the peer's
        if figure.rows > 1 or figure.tokens == 1:
            position = np.full(figure.rows, figure.context + turn, np.int32)
            self._pass(ids, position, np.arange(figure.rows, dtype=np.int32), tables, figure.rows)
        else:
            for first in range(0, figure.tokens, PASS_TOKENS):
                part = np.arange(first, min(first + PASS_TOKENS, figure.tokens), dtype=np.int32)
                self._pass(ids[part], part, np.zeros_like(part), tables, 1)
        return time.perf_counter() - begin

    def _pass(self, ids: Any, positions: Any, sequences: Any, tables: Any, outputs: int) -> None:
        wanted = np.arange(len(ids) - outputs, len(ids), dtype=np.int32)
        none = np.zeros(outputs)
        self.network.run(self.cache, ids, positions, sequences, tables, wanted, none.astype(np.float32), none)

    def bytes_of(self, rows: int = 1, context: int = 0) -> float:
        """What a pass of one token for each of `rows` sequences reads: weights, those of as many experts as rows meet
        that choose theirs at random, and what the cache holds of the tokens before."""
        c = self.config

        def read(name: str, matrix: PackedMatrix) -> float:
            missed = 1 - (c.num_experts_per_tok or 0) / matrix.copies if name.startswith("experts") else 0
            return matrix.data.nbytes * (1 - missed**rows)

        layers = sum(read(name, matrix) for layer in self.model.layers for name, matrix in layer.matrices.items())
        cache = rows * context * self.cache.shape[0] * self.cache.shape[3] * self.cache.element_size()
        return layers + self.model.head.data.nbytes + cache

    @property
    def products_per_token(self) -> int:
        """Multiplications and additions of one token outside attention and head."""
        c = self.config
        each = (
            matrix.outputs * matrix.inputs * (c.num_experts_per_tok if name.startswith("experts") else matrix.copies)
            for layer in self.model.layers
            for name, matrix in layer.matrices.items()
        )
        return 2 * sum(each)


def choose(settings: ctypes.Structure, **values: Any) -> None:
    """Sets fields of a struct. ctypes would take any name, and do nothing with those of another version."""
    known = {field[0] for field in settings._fields_}
    for name, value in values.items():
        if name not in known:
            sys.exit(
                f"llama.cpp has no setting {name!r} in this version; the bench was written for llama-cpp-python 0.3.36"
            )
        setattr(settings, name, value)


class PeerWeights:
    """A model of llama.cpp: the weights that several contexts share.

    mapped   its own way on a CPU; else the file is read, and what was copied need not lie in memory twice, where whole
             networks of both sides just fit. Either way it rearranges int4 while it loads, its default: it computes
             faster then, and starts later
    """

    def __init__(self, llama: Any, files: Files, mapped: bool) -> None:
        self.llama, self.config = llama, files.config
        settings = llama.llama_model_default_params()
        way = llama.LLAMA_LOAD_MODE_MMAP if mapped else llama.LLAMA_LOAD_MODE_NONE
        choose(settings, n_gpu_layers=0, load_mode=way)
        self.model = llama.llama_model_load_from_file(str(files.gguf).encode(), settings)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {files.gguf}")
        if not mapped and hasattr(os, "posix_fadvise"):
            with files.gguf.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        self.llama.llama_model_free(self.model)


class Peer:
    """llama.cpp through its C interface: a context."""

    def __init__(
        self, weights: PeerWeights, tokens: int, rows: int, flash: int, threads: int, cache: CacheKind = "int16"
    ) -> None:
        llama = self.llama = weights.llama
        self.config, self.model = weights.config, weights.model
        context = llama.llama_context_default_params()
        choose(
            context, n_ctx=tokens, n_batch=PASS_TOKENS, n_ubatch=PASS_TOKENS, n_seq_max=rows, n_threads=threads,
            n_threads_batch=threads, flash_attn_type=flash, kv_unified=False, no_perf=True,
        )  # fmt: skip
        if cache == "int8":
            choose(context, type_k=Q8_0, type_v=Q8_0)
        self.context = llama.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context")
        self.memory = llama.llama_get_memory(self.context)
        self.batch = llama.llama_batch_init(PASS_TOKENS, 0, rows)
        self.rng = np.random.default_rng(0)
        self.filled: tuple[int, int] = (0, 0)  # rows, context

    def run(self, figure: Figure, turn: int) -> float:
        """Seconds of one pass of the figure; the cache is filled up to its context before."""
        self._fill(figure, turn)
        if figure.rows > 1 or figure.tokens == 1:
            seconds = self._decode([(row, figure.context + turn) for row in range(figure.rows)], outputs=True)
        else:
            seconds = 0.0
            for first in range(0, figure.tokens, PASS_TOKENS):
                last = min(first + PASS_TOKENS, figure.tokens)
                seconds += self._decode([(0, position) for position in range(first, last)])
        if figure.tokens > 1:
            self.filled = (0, 0)
        return seconds

    def _fill(self, figure: Figure, turn: int) -> None:
        wanted = (figure.rows, figure.context)
        if self.filled == wanted and figure.tokens == 1:
            for row in range(figure.rows):  # turns begin again where a figure is measured a second time
                self.llama.llama_memory_seq_rm(self.memory, row, figure.context + turn, -1)
            return
        if figure.context < self.filled[1] or figure.rows != 1 or self.filled[0] != 1:
            self.llama.llama_memory_clear(self.memory, True)
            self.filled = (1, 0)
        else:  # later tokens of the figure before
            self.llama.llama_memory_seq_rm(self.memory, 0, self.filled[1], -1)
        done = min(max(self.filled[1], PASS_TOKENS), figure.context)
        if done > self.filled[1]:
            self._decode([(0, position) for position in range(self.filled[1], done)])
        if done < figure.context:
            self._repeat(figure.context)
        self.filled = wanted

    def _repeat(self, tokens: int) -> None:
        """What the cache holds, again and again up to so many tokens."""
        llama = self.llama
        state = np.empty(llama.llama_state_seq_get_size(self.context, 0), np.uint8)
        pointer = ctypes.POINTER(ctypes.c_uint8)
        if llama.llama_state_seq_get_data(self.context, state.ctypes.data_as(pointer), state.size, 0) != state.size:
            raise RuntimeError("llama.cpp did not give its state")
        state = repeated(state, tokens)
        if llama.llama_state_seq_set_data(self.context, state.ctypes.data_as(pointer), state.size, 0) != state.size:
            raise RuntimeError(f"llama.cpp did not take a state of {tokens} tokens")

    def _decode(self, tokens: list[tuple[int, int]], outputs: bool = False) -> float:
        """Seconds of the pass alone, without filling in what it is asked (a Python loop)."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (row, position) in enumerate(tokens):
            batch.token[i] = int(self.rng.integers(0, self.config.vocab_size))
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = position, 1, row
            batch.logits[i] = outputs or i == len(tokens) - 1
        begin = time.perf_counter()
        if self.llama.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp could not decode")
        return time.perf_counter() - begin

    def close(self) -> None:
        self.llama.llama_batch_free(self.batch)
        self.llama.llama_free(self.context)
