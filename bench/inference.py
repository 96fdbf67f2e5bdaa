"""Speed of the engine on this CPU beside llama.cpp, on the same random weights at equal bits.

    python bench/inference.py                                 # every row, whole networks: 30 minutes, 20 GB of disk
    python bench/inference.py --layers 9                      # of the large shapes only that many layers
    python bench/inference.py --shape v2-lite --figure decode --json

llama.cpp comes from the package llama-cpp-python (compiled by pip, once); --peer DIR names a folder that it was
installed into. Both sides have all threads and take turns within each round, so that a busy machine slows both;
figures are medians, ratios medians of ratios within a round. All layers of a kind hold the same random values, each a
copy of its own: the traffic of a real model. A file has the bits that we use: 4 (Q4_0) or 8 (Q8_0) with a scale for 32
values, 8 in the head and the absorbed projections.

Beside decoding stands the share of the read bandwidth, measured in the same minute: bytes of the weights that a token
passes over what the memory gives to a plain sum. Beside prefill: its rate of products over that of a large bf16 one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder, in which a file called gguf hides the package of that name

from glasklar import runtime

THREADS = runtime.prepare()

import gguf  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402

from glasklar.convert.gguf_metadata import architecture, metadata  # noqa: E402
from glasklar.convert.gguf_tensors import Entry, entries  # noqa: E402
from glasklar.engine.cpu import library  # noqa: E402
from glasklar.engine.native import NativeNetwork  # noqa: E402
from glasklar.engine.packed import KINDS, PackedMatrix, PackedModel, Packer, pack  # noqa: E402
from glasklar.model.checkpoint import hf_tensors  # noqa: E402
from glasklar.model.config import ModelConfig  # noqa: E402
from glasklar.model.init import build, initialise  # noqa: E402
from glasklar.model.shapes import load_shape  # noqa: E402
from glasklar.recipe import load_recipe  # noqa: E402

PAGE, PASS_TOKENS = 16, 512
SAME_BITS = {"int4": gguf.GGMLQuantizationType.Q4_0, "int8": gguf.GGMLQuantizationType.Q8_0,
             "bfloat16": gguf.GGMLQuantizationType.BF16}  # fmt: skip
FINE = ("output.weight", "token_embd.weight", "attn_k_b.weight", "attn_v_b.weight")


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


def decode(context: int, floor: float, goal: float) -> Figure:
    return Figure(f"decode, context {context}", 1, context, 1, floor, goal)


def batch(rows: int, floor: float, goal: float) -> Figure:
    return Figure(f"batch {rows}", rows, 0, 1, floor, goal)


def prefill(tokens: int, floor: float, goal: float) -> Figure:
    return Figure(f"prefill {tokens}", 1, 0, tokens, floor, goal)


CASES: dict[tuple[str, str], list[Figure]] = {
    ("v2-lite", "int4"): [
        *(decode(0, 1.5, 2), decode(1024, 1.7, 2.3), decode(4096, 2.2, 3.5), decode(16384, 3, 5)),
        *(batch(4, 2.5, 3.5), batch(8, 3, 4.5), batch(16, 2.5, 4), prefill(512, 3, 5), prefill(4096, 3, 6)),
    ],
    ("v2-lite", "int8"): [decode(0, 1.3, 1.8), prefill(512, 3, 5)],
    ("r1-distill-qwen-1.5b", "int4"): [decode(0, 1.1, 1.5), prefill(512, 1.5, 2.5), batch(8, 1.5, 2.5)],
    ("spark", "bfloat16"): [batch(1, 1, 2), batch(32, 2, 5)],
}


@dataclass
class Row:
    """A line of the table: tokens a second of both sides; `limit`: our share of what the machine gives."""

    shape: str
    bits: str
    figure: str
    ours: float
    peer: float
    ratio: float
    floor: float
    goal: float
    limit: float | None


# --- weights ----------------------------------------------------------------------------------------------------------


class RandomWeights:
    """One dense and one expert layer of random weights, which stand for all layers of their kind."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.kinds = sorted({config.is_moe_layer(i) for i in range(config.num_hidden_layers)})
        dense = 1 if config.is_moe and len(self.kinds) == 2 else 0
        small = config.replace(num_hidden_layers=len(self.kinds), num_nextn_predict_layers=0)
        small = small.replace(first_k_dense_replace=dense) if config.is_moe else small
        self.small = initialise(build(small, dtype=torch.bfloat16), 1).requires_grad_(False)
        self.own = {**dict(self.small.named_parameters()), **dict(self.small.named_buffers())}

    def get(self, name: str) -> Tensor:
        """A tensor by our name."""
        room, _, rest = name.partition(".")
        if room != "layers":
            return self.own[name]
        index, _, inner = rest.partition(".")
        return self.own[f"layers.{self._stand_in(int(index))}.{inner}"]

    def _stand_in(self, layer: int) -> int:
        return self.kinds.index(self.config.is_moe_layer(layer))

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Tensors of the GGUF file, each with the name of the one that holds its values."""
        stands_for: dict[int, list[int]] = {}
        for layer in range(self.config.num_hidden_layers):
            stands_for.setdefault(self._stand_in(layer), []).append(layer)
        for entry in entries(hf_tensors(self.small), self.small.config):
            if not entry.name.startswith("blk."):
                yield entry.name, entry
                continue
            _, index, inner = entry.name.split(".", 2)
            for layer in stands_for[int(index)]:
                name = f"blk.{layer}.{inner}"
                yield entry.name, Entry(name=name, shape=entry.shape, make=entry.make, exact=entry.exact)


def write_file(path: Path, weights: RandomWeights, bits: str) -> None:
    """The peer's file."""
    config = weights.config.replace(num_nextn_predict_layers=0)
    writer = gguf.GGUFWriter(path, architecture(config))
    writer.add_type(gguf.GGUFType.MODEL)
    for key, value in {**metadata(config), "tokenizer.ggml.model": "none"}.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    encoded: dict[str, tuple[np.ndarray, Any]] = {}
    all_entries = sorted(weights.entries(), key=lambda pair: pair[0])
    for source, entry in all_entries:
        if source not in encoded:
            encoded[source] = _encoded(entry, bits)
        data, kind = encoded[source]
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), data.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for source, _ in all_entries:
        writer.write_tensor_data(encoded[source][0])
    writer.close()


def _encoded(entry: Entry, bits: str) -> tuple[np.ndarray, Any]:
    tensor = entry.make().float().contiguous()
    kind = SAME_BITS[bits]
    if bits == "int4" and any(name in entry.name for name in FINE):
        kind = gguf.GGMLQuantizationType.Q8_0
    if entry.exact:
        return tensor.numpy(), gguf.GGMLQuantizationType.F32
    if kind == gguf.GGMLQuantizationType.BF16:
        return tensor.bfloat16().view(torch.int16).numpy(), kind
    return gguf.quants.quantize(tensor.numpy(), kind), kind


# --- the two sides ----------------------------------------------------------------------------------------------------


class Ours:
    """The pass of our engine over packed weights."""

    def __init__(self, weights: RandomWeights, bits: str, tokens: int) -> None:
        compiled = library.best()
        if compiled is None:
            sys.exit("the C++ pass is not compiled here: install a compiler and the package again")
        self.config = weights.config
        self.model: PackedModel = pack(self.config, weights.get, Packer(compiled, KINDS[bits], THREADS))
        self.network = NativeNetwork(compiled, self.model, threads=THREADS, page=PAGE, max_tokens=PASS_TOKENS)
        self.cache = self.network.new_cache(-(-tokens // PAGE) + 1)
        self.cache.normal_()
        self.rng = np.random.default_rng(0)

    def run(self, figure: Figure, turn: int) -> float:
        """Seconds of one pass of the figure (or more, of 512 tokens each)."""
        pages = self.cache.shape[1] // figure.rows
        tables = np.arange(pages * figure.rows, dtype=np.int32).reshape(figure.rows, pages)
        ids = self.rng.integers(0, self.config.vocab_size, figure.total).astype(np.int32)
        begin = time.perf_counter()
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

    @property
    def bytes_per_token(self) -> int:
        """Weights that one token passes."""
        c = self.config

        def passed(name: str, matrix: PackedMatrix) -> int:
            share = (c.num_experts_per_tok or 0) / matrix.copies if name.startswith("experts") else 1
            return int(matrix.data.nbytes * share)

        layers = sum(passed(name, matrix) for layer in self.model.layers for name, matrix in layer.matrices.items())
        return layers + self.model.head.data.nbytes

    @property
    def products_per_token(self) -> int:
        """Multiplications and additions of one token outside attention and head."""
        per_value = {"int4": 18 / 32, "int8": 34 / 32, "bfloat16": 2.0}
        head = self.model.head.data.nbytes
        kind = next(k for k, v in KINDS.items() if v == self.model.layers[-1].matrices["out"].kind)
        return int(2 * (self.bytes_per_token - head) / per_value[kind])


class Peer:
    """llama.cpp through its C interface."""

    def __init__(self, llama: Any, path: Path, config: ModelConfig, tokens: int, rows: int, flash: int) -> None:
        self.llama, self.config = llama, config
        settings = llama.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(str(path).encode(), settings)
        context = llama.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = tokens, PASS_TOKENS, PASS_TOKENS
        context.n_seq_max, context.n_threads, context.n_threads_batch = rows, THREADS, THREADS
        context.flash_attn_type, context.kv_unified, context.no_perf = flash, False, True
        self.context = llama.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context")
        self.memory = llama.llama_get_memory(self.context)
        self.batch = llama.llama_batch_init(PASS_TOKENS, 0, rows)
        self.rng = np.random.default_rng(0)
        self.filled: tuple[int, int] = (0, 0)  # rows, context

    def run(self, figure: Figure, turn: int) -> float:
        """Seconds of one pass of the figure; the cache is filled up to its context before."""
        self._fill(figure)
        begin = time.perf_counter()
        if figure.rows > 1 or figure.tokens == 1:
            self._decode([(row, figure.context + turn) for row in range(figure.rows)], outputs=True)
        else:
            for first in range(0, figure.tokens, PASS_TOKENS):
                last = min(first + PASS_TOKENS, figure.tokens)
                self._decode([(0, position) for position in range(first, last)])
        seconds = time.perf_counter() - begin
        if figure.tokens > 1:
            self.filled = (0, 0)
        return seconds

    def _fill(self, figure: Figure) -> None:
        wanted = (figure.rows, figure.context)
        if self.filled == wanted and figure.tokens == 1:
            return
        if figure.context < self.filled[1] or figure.rows != 1 or self.filled[0] != 1:
            self.llama.llama_memory_clear(self.memory, True)
            self.filled = (1, 0)
        else:  # later tokens of the figure before
            self.llama.llama_memory_seq_rm(self.memory, 0, self.filled[1], -1)
        for first in range(self.filled[1], figure.context, PASS_TOKENS):
            last = min(first + PASS_TOKENS, figure.context)
            self._decode([(0, position) for position in range(first, last)])
        self.filled = wanted

    def _decode(self, tokens: list[tuple[int, int]], outputs: bool = False) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (row, position) in enumerate(tokens):
            batch.token[i] = int(self.rng.integers(0, self.config.vocab_size))
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = position, 1, row
            batch.logits[i] = outputs or i == len(tokens) - 1
        if self.llama.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp could not decode")

    def close(self) -> None:
        self.llama.llama_batch_free(self.batch)
        self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)


# --- measuring --------------------------------------------------------------------------------------------------------


def read_bandwidth() -> float:
    """Bytes a second that a plain sum over 1 GB reads with all threads."""
    data = torch.ones(1 << 28)
    return data.nbytes / min(_timed(data.sum) for _ in range(4))


def product_rate() -> float:
    """Operations a second of a large bf16 product."""
    a, b = torch.ones(1024, 2048).bfloat16(), torch.ones(2048, 4096).bfloat16()
    return 2 * 1024 * 2048 * 4096 / min(_timed(lambda: a @ b.T.contiguous().T) for _ in range(6))


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(ours: Ours, peers: Mapping[str, Peer], figure: Figure, rounds: int) -> tuple[float, float, float, float]:
    """Median tokens a second of both sides, of their ratio, and our share of the machine's limit. The peer is the
    better one of its variants, found in the first round."""
    rounds = rounds if figure.tokens == 1 else max(2, rounds // 4)
    tried = {name: [peer.run(figure, turn) for turn in range(2)][-1] for name, peer in peers.items()}
    peer = peers[min(tried, key=tried.__getitem__)]
    ours.run(figure, 0)
    pairs, shares = [], []
    for turn in range(2, rounds + 2):
        mine, theirs = ours.run(figure, turn), peer.run(figure, turn)
        pairs.append((mine, theirs))
        if turn % 4 == 2:
            if figure.tokens == 1:
                shares.append(ours.bytes_per_token / mine / read_bandwidth())
            else:
                shares.append(figure.total * ours.products_per_token / mine / product_rate())
    median = statistics.median
    speeds = (figure.total / median(m for m, _ in pairs), figure.total / median(t for _, t in pairs))
    return *speeds, median(t / m for m, t in pairs), median(shares)


def config_of(shape: str, layers: int | None) -> ModelConfig:
    if shape == "spark":
        return load_recipe("spark").model.replace(max_position_embeddings=1024)
    name = {"v2-lite": "deepseek-v2-lite"}.get(shape, shape)
    config = load_shape(name).config
    config = config.replace(num_hidden_layers=min(layers or config.num_hidden_layers, config.num_hidden_layers))
    return config.replace(num_nextn_predict_layers=0, initializer_range=0.02)


def rows_of(llama: Any, shape: str, bits: str, figures: list[Figure], layers: int | None, rounds: int) -> Iterator[Row]:
    config = config_of(shape, layers)
    weights = RandomWeights(config)
    tokens = max(f.rows * (f.context + f.tokens + rounds + 80) for f in figures)
    tokens = -(-tokens // 256) * 256
    with tempfile.TemporaryDirectory(prefix="glasklar-bench-") as folder:
        path = Path(folder) / "model.gguf"
        write_file(path, weights, bits)
        ours = Ours(weights, bits, tokens)
        del weights
        for rows in sorted({f.rows for f in figures}):
            peers = {f"flash {flash}": Peer(llama, path, config, tokens, rows, flash) for flash in (0, 1)}
            for figure in (f for f in figures if f.rows == rows):
                mine, theirs, ratio, share = measure(ours, peers, figure, rounds)
                limit = share if figure.rows == 1 and shape != "spark" else None
                yield Row(shape, bits, figure.name, mine, theirs, ratio, figure.floor, figure.goal, limit)
            for peer in peers.values():
                peer.close()


def show(rows: list[Row]) -> None:
    table = Table("shape", "bits", "figure", "ours tok/s", "llama.cpp", "ratio", "asked", "goal", "share of limit")
    for r in rows:
        colour = "green" if r.ratio >= r.goal else "yellow" if r.ratio >= r.floor else "red"
        numbers = (f"{r.ours:.1f}", f"{r.peer:.1f}", f"[{colour}]{r.ratio:.2f}x", f"{r.floor:g}x", f"{r.goal:g}x")
        table.add_row(r.shape, r.bits, r.figure, *numbers, "" if r.limit is None else f"{r.limit:.0%}")
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="rows whose shape contains this")
    parser.add_argument("--bits", choices=list(KINDS))
    parser.add_argument("--figure", help="rows whose figure contains this")
    parser.add_argument("--layers", type=int, help="take only so many layers of large shapes")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--peer", type=Path, help="folder that llama-cpp-python was installed into")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.peer:
        sys.path.append(str(arguments.peer))
    try:
        from llama_cpp import llama_cpp as llama
    except ImportError:
        sys.exit("needs llama.cpp: pip install llama-cpp-python (it is compiled, some ten minutes on two cores)")
    runtime.start(THREADS)
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    rows = []
    for (shape, bits), figures in CASES.items():
        wanted = [f for f in figures if (arguments.figure or "") in f.name]
        if not wanted or (arguments.shape or "") not in shape or arguments.bits not in (None, bits):
            continue
        for row in rows_of(llama, shape, bits, wanted, arguments.layers, arguments.rounds):
            rows.append(row)
            print(json.dumps(asdict(row)) if arguments.json else row, file=sys.stdout if arguments.json else sys.stderr)
            sys.stdout.flush()
    if not arguments.json:
        show(rows)


if __name__ == "__main__":
    main()
