"""What low bits cost: our int8 and int4 and llama.cpp's Q8_0 and Q4_0 beside the same weights in full.

    python bench/quality.py --model spark             # a released model on problems of its own tasks (the test split)
    python bench/quality.py --shape v2-lite           # random weights in a published shape, random tokens
    python bench/quality.py --model spark --json      # one object a row

Reference: the bf16 weights, all arithmetic in fp32. For every token of the text the distribution of the next one is
compared: the KL divergence from the reference in nats (mean, and the value that 99 % of tokens stay below), and how
often both name the same most probable token. `bits` are those of the blocks' matrices; head, embedding and the absorbed
projections have 8 at least on both sides. llama.cpp comes from the package llama-cpp-python (--peer DIR: where it was
installed into), and rounds plainly (gguf's own quantiser).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# In place of this folder, in which a file called gguf hides the package of that name.
sys.path[0] = str(Path(__file__).parent / "shared")

from glasklar import runtime  # noqa: E402

THREADS = runtime.prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from random_model import Entry, RandomWeights, compiled, config_of, write_gguf  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from sides import choose, open_llama  # noqa: E402
from torch import Tensor  # noqa: E402

from glasklar.convert.gguf_tensors import entries  # noqa: E402
from glasklar.data.procedural import Mixture, as_exchange  # noqa: E402
from glasklar.engine.cpu.library import CacheKind  # noqa: E402
from glasklar.engine.native import NativeNetwork  # noqa: E402
from glasklar.engine.packed import KINDS, Packer, pack  # noqa: E402
from glasklar.loading import find_model, load  # noqa: E402
from glasklar.model.checkpoint import hf_tensors  # noqa: E402
from glasklar.model.config import ModelConfig  # noqa: E402
from glasklar.model.transformer import Transformer  # noqa: E402
from glasklar.provenance.rundir import home  # noqa: E402
from glasklar.recipe import Recipe  # noqa: E402

PAGE, LONGEST = 16, 512
PEERS = {"bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
Logits = Callable[[list[int]], NDArray[np.float32]]  # of every token of a text [T, W]


@dataclass
class Row:
    """A line of the table."""

    model: str
    side: str
    bits: str
    tokens: int
    kl_mean: float
    kl_99: float
    top1_agreement: float


class RealWeights:
    """A loaded network in the form of `RandomWeights`."""

    def __init__(self, model: Transformer) -> None:
        self.config, self.model = model.config.replace(num_nextn_predict_layers=0), model
        self._own = dict(model.state_dict())

    def get(self, name: str) -> Tensor:
        return self._own[name]

    def entries(self) -> Iterator[tuple[str, Entry]]:
        tensors = hf_tensors(self.model)
        last = f"model.layers.{self.config.num_hidden_layers}."  # the prediction module, which llama.cpp leaves out
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(last)}
        # Its formats have no groups smaller than 32 values: narrower rows stay whole there.
        return (
            (entry.name, replace(entry, exact=entry.exact or entry.shape[-1] % 32 > 0))
            for entry in entries(kept, self.config)
        )


Weights = RandomWeights | RealWeights


def ours(weights: Weights, kind: str, cache_kind: CacheKind = "int16") -> Logits:
    """Our pass; float32: the reference."""
    packed = pack(weights.config, weights.get, Packer(compiled(), KINDS[kind], THREADS))
    net = NativeNetwork(
        compiled(),
        packed,
        threads=THREADS,
        page=PAGE,
        max_tokens=LONGEST,
        cache="float32" if kind == "float32" else cache_kind,
    )
    cache = net.new_cache(LONGEST // PAGE)
    tables = np.arange(LONGEST // PAGE, dtype=np.int32)[None]

    def logits(ids: list[int]) -> NDArray[np.float32]:
        every, zeros = np.arange(len(ids), dtype=np.int32), np.zeros(len(ids))
        found, _, _ = net.run(
            cache, np.array(ids, np.int32), every, np.zeros_like(every), tables, every, zeros.astype(np.float32), zeros
        )
        return found

    return logits


def theirs(llama: Any, weights: RandomWeights, bits: str, folder: Path) -> Logits:
    """llama.cpp over a file of the same weights."""
    path = folder / f"{bits}.gguf"
    write_gguf(path, weights, bits)
    settings = llama.llama_model_default_params()
    choose(settings, n_gpu_layers=0)
    model = llama.llama_model_load_from_file(str(path).encode(), settings)
    path.unlink()  # mapped; gone when the process ends
    context = llama.llama_context_default_params()
    choose(
        context, n_ctx=LONGEST, n_batch=LONGEST, n_ubatch=LONGEST, n_threads=THREADS, n_threads_batch=THREADS,
        no_perf=True,
    )  # fmt: skip
    state = llama.llama_init_from_model(model, context)
    if not state:
        raise RuntimeError("llama.cpp could not make a context")
    batch = llama.llama_batch_init(LONGEST, 0, 1)

    def logits(ids: list[int]) -> NDArray[np.float32]:
        llama.llama_memory_clear(llama.llama_get_memory(state), True)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, True
        if llama.llama_decode(state, batch):
            raise RuntimeError("llama.cpp could not decode")
        width = weights.config.vocab_size
        rows = [np.ctypeslib.as_array(llama.llama_get_logits_ith(state, i), (width,)).copy() for i in range(len(ids))]
        return np.stack(rows)

    return logits


def compare(name: str, side: str, bits: str, logits: Logits, wanted: list[Tensor], texts: list[list[int]]) -> Row:
    """Distributions of one side against the reference's."""
    kls, same = [], []
    for ids, exact in zip(texts, wanted, strict=True):
        found = torch.from_numpy(logits(ids)).double().log_softmax(-1)
        kls.append((exact.exp() * (exact - found)).sum(-1))
        same.append(exact.argmax(-1) == found.argmax(-1))
    kl, agree = torch.cat(kls), torch.cat(same)
    return Row(name, side, bits, len(kl), float(kl.mean()), float(kl.quantile(0.99)), float(agree.double().mean()))


def rows_of(name: str, weights: Weights, texts: list[list[int]], llama: Any) -> Iterator[Row]:
    reference = ours(weights, "float32")
    wanted = [torch.from_numpy(reference(ids).copy()).double().log_softmax(-1) for ids in texts]
    del reference
    with tempfile.TemporaryDirectory(prefix="glasklar-bench-") as folder:
        for bits, peer in PEERS.items():
            yield compare(name, "glasklar", bits, ours(weights, bits), wanted, texts)
            if bits != "int8":
                small = ours(weights, bits, "int8")
                yield compare(name, "glasklar, cache int8", bits, small, wanted, texts)
            if llama is not None:
                yield compare(
                    name, f"llama.cpp {peer}", bits, theirs(llama, weights, bits, Path(folder)), wanted, texts
                )  # type: ignore[arg-type]


def real(name: str, tokens: int) -> tuple[RealWeights, list[list[int]]]:
    """A released model, and about so many tokens of problems that it never saw, with their worked thoughts."""
    machine = runtime.start(THREADS, device="cpu")
    folder = find_model(name, home(os.environ))
    model = load(folder, machine, "bfloat16")
    if model.tokenizer is None:
        sys.exit(f"{folder}: has no tokenizer")
    recipe = Recipe.model_validate_json((folder / "recipe.json").read_text())
    mixture, texts, count = Mixture.of(recipe.tasks), list[list[int]](), 0
    while count < tokens:
        _, problem = mixture.draw("test", 1, len(texts))
        [ids] = model.tokenizer.encode_many([as_exchange(problem, thought=True)], trusted=True)
        texts.append([model.tokenizer.bos_id, *ids][: min(LONGEST, model.config.max_position_embeddings)])
        count += len(texts[-1])
    return RealWeights(model.network), texts


def random(shape: str, layers: int, tokens: int) -> tuple[RandomWeights, list[list[int]]]:
    """Random weights in a published shape, and random tokens."""
    runtime.start(THREADS, device="cpu")
    config: ModelConfig = config_of(shape, layers)
    rng = np.random.default_rng(0)
    return RandomWeights(config), [rng.integers(0, config.vocab_size, 256).tolist() for _ in range(-(-tokens // 256))]


def show(rows: list[Row]) -> None:
    table = Table("model", "side", "bits", "tokens", "KL, nats", "99 % below", "same first token")
    for r in rows:
        figures = (f"{r.kl_mean:.2e}", f"{r.kl_99:.2e}", f"{r.top1_agreement:.2%}")
        table.add_row(r.model, r.side, r.bits, str(r.tokens), *figures)
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a run, a folder or a name, made from a recipe of tasks")
    what.add_argument("--shape", help="v2-lite, r1-distill-qwen-1.5b, …")
    parser.add_argument("--layers", type=int, default=2, help="of a shape, only so many")
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--peer", type=Path, help="folder that llama-cpp-python was installed into")
    parser.add_argument("--without-peer", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    llama = None
    if not arguments.without_peer:
        llama = open_llama(arguments.peer)
        silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        llama.llama_log_set(silent, ctypes.c_void_p(0))
        llama.llama_backend_init()
    name, tokens = arguments.model or arguments.shape, arguments.tokens
    weights, texts = real(name, tokens) if arguments.model else random(name, arguments.layers, tokens)
    rows = []
    for row in rows_of(Path(name).name, weights, texts, llama):
        rows.append(row)
        if arguments.json:
            print(json.dumps(asdict(row)), flush=True)
    if not arguments.json:
        show(rows)


if __name__ == "__main__":
    main()
