"""What loading costs: seconds and the peak of memory, in a fresh process each, beside the bound that is promised.

    python bench/loading.py                       # a random dense checkpoint of 2 GB, as bf16, fp32, int8 and int4
    python bench/loading.py --shape deepseek-v2-lite --folder DIR --as int4,int8      # a published shape (31 GB)
    python bench/loading.py --json

The checkpoint is written shard by shard into --folder (default: a temporary folder, removed at the end) unless one is
there. The bound: what the loaded model takes, the largest tensor of the files, and 300 MB over the process before it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from glasklar.runtime import peak_bytes, prepare, start

ALLOWED = 300e6  # bytes beyond the loaded model and the largest tensor
SHARD = 1 << 30
DENSE = {  # 1.0e9 parameters, 2 GB in bf16: half of them in the embedding and the head, as in small Llamas
    "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192, "rope_interleave": False,
    "rope_theta": 500000.0,
}  # fmt: skip
KINDS = {"bf16": ("bfloat16", None), "fp32": ("float32", None), "int8": (None, "int8"), "int4": (None, "int4")}


def write_checkpoint(folder: Path, shape: str | None) -> None:
    """Random bf16 weights in the published names, one shard in memory at a time."""
    import torch
    from safetensors.torch import save_file

    from glasklar.model.checkpoint import INDEX, config_to_hf, hf_tensors
    from glasklar.model.config import ModelConfig
    from glasklar.model.shapes import load_shape
    from glasklar.model.transformer import Transformer

    config = load_shape(shape).config if shape else ModelConfig.read(DENSE, "bench")
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in hf_tensors(Transformer(config)).items()}
    # One sheet of random numbers, read from another place for each tensor: drawing 16e9 of them takes minutes.
    sheet = torch.empty(1 << 26).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0)).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    placed: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(placed.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        placed.update(dict.fromkeys(shard, name))
        shard.clear()

    for number, (name, size) in enumerate(wanted.items()):
        count = 1
        for length in size:
            count *= length
        begin = number * 7919 % 4096
        tensor = (
            sheet[begin:].repeat(-(-count // (len(sheet) - begin)))[:count]
            if count > len(sheet) - begin
            else (sheet[begin : begin + count].clone())
        )
        shard[name] = torch.ones(size, dtype=torch.bfloat16) if "norm" in name else tensor.view(size)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            flush()
    flush()
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))


def measure(folder: Path, kind: str) -> dict[str, Any]:
    """In this process: loads, and generates a few tokens where it is packed."""
    runtime = start(prepare())
    import numpy as np

    from glasklar.engine.engine import Engine
    from glasklar.engine.packed import PackedModel
    from glasklar.engine.request import SamplingParams
    from glasklar.loading import load
    from glasklar.model.checkpoint import open_checkpoint

    dtype, quantize = KINDS[kind]
    largest = max(weight.nbytes for weight in open_checkpoint(folder).weights.values())
    largest = max(largest, 2 * largest if kind == "fp32" else 0)
    before = peak_bytes()
    began = time.perf_counter()
    model = load(folder, runtime, dtype, quantize=quantize)
    seconds, highest = time.perf_counter() - began, peak_bytes()
    network = model.network
    packed = isinstance(network, PackedModel)
    size = network.nbytes if packed else sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    found: dict[str, Any] = {
        "kind": kind, "seconds": seconds, "loaded_bytes": size, "peak_bytes": highest, "before_bytes": before,
        "largest_tensor_bytes": largest, "bound_bytes": before + size + largest + ALLOWED,
    }  # fmt: skip
    found["holds"] = found["peak_bytes"] <= found["bound_bytes"]
    if packed:
        began = time.perf_counter()
        prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, 32).tolist()
        engine = Engine(network, max_slots=1, max_tokens=1024)
        [answer] = engine.generate([prompt], SamplingParams(max_tokens=16, temperature=0.0))
        found |= {"tokens": len(answer.ids), "tokens_per_second": len(answer.ids) / engine.stats.decode_seconds}
        found |= {"generate_seconds": time.perf_counter() - began, "peak_with_engine_bytes": peak_bytes()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="a published shape in place of the dense model of 2 GB")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is written and left")
    parser.add_argument("--as", dest="kinds", default=",".join(KINDS), help="which of: " + ", ".join(KINDS))
    parser.add_argument("--write", action="store_true", help="only write the checkpoint")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.folder, arguments.one)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "model"
        if not (folder / "config.json").is_file():
            write_checkpoint(folder, arguments.shape)
        if arguments.write:
            return
        found = []
        for kind in arguments.kinds.split(","):
            command = [sys.executable, __file__, "--folder", str(folder), "--one", kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout))
    if arguments.json:
        print(json.dumps(found))
        return
    print("as     seconds   loaded GB   peak GB   bound GB   holds   tokens/s")
    for row in found:
        gigabytes = (f"{row[key] / 1e9:9.2f}" for key in ("loaded_bytes", "peak_bytes", "bound_bytes"))
        speed = f"{row['tokens_per_second']:8.2f}" if "tokens_per_second" in row else ""
        print(f"{row['kind']:5} {row['seconds']:8.1f} {'  '.join(gigabytes)}   {row['holds']!s:5} {speed}")


if __name__ == "__main__":
    main()
