"""Speed of the engine on a GPU beside transformers, on random bf16 weights in a published shape.

    python bench/gpu.py                                      # DeepSeek-V2-Lite: 31 GB of weights for each side
    python bench/gpu.py --shape r1-distill-qwen-1.5b --json
    python bench/gpu.py --layers 6 --no-peer                 # only that many layers, ours alone

Tokens a second are those of whole passes, the host's part included; beside them those of the recorded graph alone. What
the cache holds before the measured tokens is random. Figures are medians.

Beside decoding stands the share of the card's bandwidth: bytes that a pass must read (weights, of experts as many as
are met at random, and the cache) a second over those that a large copy reads and writes. Beside prefill, the share of
the rate of an 8192^3 product: the products that a prompt needs (attention expanded and causal; ours does more,
absorbed). transformers decodes eagerly over a growing cache and, where it can be recorded, as a graph over a static
one: the better one counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from glasklar.engine.cuda_network import CudaNetwork, kernels
from glasklar.model.checkpoint import config_to_hf
from glasklar.model.config import ModelConfig
from glasklar.model.cost import decode_bytes, prefill_flops_per_token
from glasklar.model.init import build, kept_wide
from glasklar.model.shapes import load_shape
from glasklar.model.transformer import Transformer

PAGE, BATCH_CONTEXT = 16, 512
SHAPES = {"v2-lite": "deepseek-v2-lite", "r1-distill-qwen-1.5b": "r1-distill-qwen-1.5b"}


@dataclass(frozen=True)
class Figure:
    """`rows` sequences go on by `tokens` each after `context` known ones."""

    name: str
    rows: int
    context: int
    tokens: int = 1


FIGURES = [
    *(Figure(f"decode, context {context}", 1, context) for context in (0, 1024, 4096, 16384)),
    *(Figure(f"batch {rows}, context {BATCH_CONTEXT}", rows, BATCH_CONTEXT) for rows in (4, 8, 16, 32, 64)),
    *(Figure(f"prefill {tokens}", 1, 0, tokens) for tokens in (512, 4096)),
]
PEER_FIGURES = {"decode, context 0", "batch 8, context 512", "prefill 512", "prefill 4096"}


@dataclass
class Row:
    """A line of the table. ours, graph, peer: tokens a second; `share` of what the card gives."""

    card: str
    shape: str
    layers: int
    figure: str
    ours: float
    graph: float | None
    share: float
    peer: float | None = None
    ratio: float | None = None


# --- measuring --------------------------------------------------------------------------------------------------------


def on_device(call: Callable[[], object], times: int) -> float:
    """Median seconds of a call, by the device's clock."""
    call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3


def by_clock(call: Callable[[], object], times: int) -> float:
    """Median seconds of a call until the device has done."""
    seconds = []
    for _ in range(times):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def copy_bandwidth() -> float:
    """Bytes read and written a second."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / on_device(lambda: target.copy_(source), 10)


def product_rate() -> float:
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / on_device(lambda: left @ right, 20)


def random_model(config: ModelConfig) -> Transformer:
    model = build(config, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    fill(model)
    assert all(p.dtype == (torch.float32 if kept_wide(n) else torch.bfloat16) for n, p in model.named_parameters())
    return model


def fill(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0) if name.endswith("norm.weight") else parameter.data.normal_(0.0, 0.02)


# --- the two sides ----------------------------------------------------------------------------------------------------


class Ours:
    def __init__(self, config: ModelConfig) -> None:
        ops = kernels()
        if ops is None:
            sys.exit("no Triton here: install torch's build for GPUs")
        self.config = config
        self.network = CudaNetwork(random_model(config), ops, page=PAGE)
        # For each sequence of a batch, and for one long one.
        self.most = max(f.rows * -(-(f.context + f.tokens) // PAGE) for f in FIGURES)
        self.cache = self.network.new_cache(self.most)
        self.cache.normal_()

    def step(self, figure: Figure) -> Callable[[], object]:
        """The passes of a figure, each drawing a token for every sequence."""
        pages = -(-(figure.context + figure.tokens) // PAGE)
        order = np.random.default_rng(0).permutation(self.most)[: figure.rows * pages].astype(np.int32)
        tables = order.reshape(figure.rows, pages)
        rows = np.arange(figure.rows, dtype=np.int32)
        passes = []
        for begin in range(0, figure.tokens, self.network.max_tokens):
            places = np.arange(begin, min(begin + self.network.max_tokens, figure.tokens), dtype=np.int32)
            ids = np.random.default_rng(begin).integers(0, self.config.vocab_size, figure.rows * len(places))
            outputs = (rows + 1) * len(places) - 1
            zeros = np.zeros(len(outputs))
            passes.append((
                self.cache, ids.astype(np.int32), np.tile(figure.context + places, figure.rows),
                np.repeat(rows, len(places)), tables, outputs, zeros.astype(np.float32), zeros,
            ))  # fmt: skip
        return lambda: [self.network.run(*arguments) for arguments in passes]

    def measure(self, figure: Figure) -> tuple[float, float | None]:
        """Seconds, and those of the graph alone."""
        step = self.step(figure)
        step()
        step()
        if figure.tokens > 1:
            return by_clock(step, 5), None
        graph = list(self.network._graphs.values())[-1].graph
        seconds = []
        alone = []
        for _ in range(3):
            seconds.append(by_clock(step, 10))
            alone.append(on_device(graph.replay, 10))
        return statistics.median(seconds), statistics.median(alone)


class Peer:
    """transformers, with the same shape."""

    def __init__(self, config: ModelConfig) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        fields: dict[str, Any] = config_to_hf(config)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).eval()
        torch.set_default_dtype(torch.float32)
        fill(self.model)
        self.config = config

    @torch.inference_mode()
    def measure(self, figure: Figure) -> float:
        """Seconds."""
        eager = self._eager(figure)
        if figure.tokens > 1:
            return eager
        try:
            return min(eager, self._recorded(figure))
        except Exception as error:  # whatever a version of it does that a graph cannot hold
            print(f"{figure.name}: transformers could not be recorded: {error}"[:300], file=sys.stderr)
            torch.cuda.synchronize()
            return eager

    def _ids(self, figure: Figure, tokens: int) -> torch.Tensor:
        return torch.randint(0, self.config.vocab_size, (figure.rows, tokens), device="cuda")

    def _eager(self, figure: Figure) -> float:
        from transformers import DynamicCache

        ids, caches = self._ids(figure, figure.tokens), []
        for _ in range(7 if figure.tokens == 1 else 4):
            caches.append(DynamicCache())
            if figure.context:
                self.model(self._ids(figure, figure.context), past_key_values=caches[-1], logits_to_keep=1)
            if figure.tokens == 1:  # one cache grows
                break

        def step() -> None:
            cache = caches[0] if figure.tokens == 1 else caches.pop()
            self.model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1).cpu()

        step()
        return by_clock(step, 7 if figure.tokens == 1 else 3)

    def _recorded(self, figure: Figure) -> float:
        from transformers import StaticCache

        ids = self._ids(figure, 1)
        cache = StaticCache(config=self.model.config, max_cache_len=figure.context + 32)
        at = torch.full((1,), figure.context, device="cuda")
        if figure.context:
            self.model(self._ids(figure, figure.context), past_key_values=cache, logits_to_keep=1)

        def step() -> torch.Tensor:
            return self.model(
                ids, past_key_values=cache, cache_position=at, position_ids=at[None].expand(figure.rows, 1)
            ).logits.argmax(-1)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tokens = step()

        def play() -> None:
            graph.replay()
            tokens.cpu()

        return by_clock(play, 10)


# --- the table --------------------------------------------------------------------------------------------------------


def share_of(config: ModelConfig, figure: Figure, seconds: float, bandwidth: float, rate: float) -> float:
    if figure.tokens > 1:
        return figure.tokens * prefill_flops_per_token(config, figure.tokens) / seconds / rate
    return decode_bytes(config, context=figure.context, sequences=figure.rows) / seconds / bandwidth


def show(rows: list[Row]) -> None:
    table = Table("card", "shape", "layers", "figure", "ours", "graph alone", "share", "transformers", "ratio")
    for r in rows:
        table.add_row(
            r.card, r.shape, str(r.layers), r.figure, f"{r.ours:.5g}", "" if r.graph is None else f"{r.graph:.5g}",
            f"{r.share:.0%}", *("" if v is None else f"{v:.4g}" for v in (r.peer, r.ratio)),
        )  # fmt: skip
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="v2-lite")
    parser.add_argument("--layers", type=int, help="take only so many layers")
    parser.add_argument("--figure", default="", help="rows whose figure contains this, or one of these: a,b")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="without transformers")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here")
    config = load_shape(SHAPES[arguments.shape]).config.replace(num_nextn_predict_layers=0)
    layers = min(arguments.layers or config.num_hidden_layers, config.num_hidden_layers)
    config = config.replace(num_hidden_layers=layers)
    card = torch.cuda.get_device_name()
    bandwidth, rate = copy_bandwidth(), product_rate()
    torch.cuda.empty_cache()
    print(f"{card}: a copy moves {bandwidth / 1e12:.2f} TB/s, products {rate / 1e12:.0f} TFLOP/s", file=sys.stderr)
    figures = [f for f in FIGURES if any(part in f.name for part in arguments.figure.split(","))]
    begin = time.perf_counter()
    ours, rows = Ours(config), []
    ours.step(Figure("first token", 1, 0))()
    first = time.perf_counter() - begin
    print(f"random weights and a first token, kernels compiled or found: {first:.1f} s", file=sys.stderr)
    for figure in figures:
        seconds, graph = ours.measure(figure)
        total = figure.rows * figure.tokens
        share = share_of(config, figure, graph or seconds, bandwidth, rate)
        rows.append(Row(card, arguments.shape, layers, figure.name, total / seconds, graph and total / graph, share))
    del ours
    torch.cuda.empty_cache()
    if arguments.peer:
        peer = Peer(config)
        for figure, row in zip(figures, rows, strict=True):
            if figure.name in PEER_FIGURES:
                row.peer = figure.rows * figure.tokens / peer.measure(figure)
                row.ratio = row.ours / row.peer
    if arguments.json:
        ceilings = {"card": card, "copy_bytes_per_s": bandwidth, "product_flops_per_s": rate, "first_token_s": first}
        print(json.dumps(ceilings))
        for row in rows:
            print(json.dumps(asdict(row)))
    else:
        show(rows)


if __name__ == "__main__":
    main()
