"""A process of its own that loads a model and makes one token; prints seconds to there, and the peak memory after a
prompt of 512 tokens (see inference.py)."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from glasklar import runtime

THREADS = runtime.prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from random_model import Files, config_of  # noqa: E402
from sides import Figure, Ours, Peer, PeerWeights, open_llama  # noqa: E402

FIRST = Figure("first token", rows=1, context=0, tokens=1, floor=0, goal=0)
PROMPT = Figure("prompt", rows=1, context=0, tokens=512, floor=0, goal=0)  # reaches every expert: nothing stays unread
CACHE_TOKENS = 4096


def start(side: str, files: Files, peer: Path | None) -> dict[str, float]:
    llama = open_llama(peer) if side == "peer" else None
    begin = time.perf_counter()
    if side == "ours":
        runner: Ours | Peer = (ours := Ours(files, CACHE_TOKENS, THREADS))
        weights = ours.model.nbytes
    else:
        runner = Peer(PeerWeights(llama, files, mapped=True), CACHE_TOKENS, 1, 0, THREADS)
        weights = files.gguf.stat().st_size
    runner.run(FIRST, 0)
    seconds, clock = time.perf_counter() - begin, time.time()
    runner.run(PROMPT, 0)
    return {"start": seconds, "clock": clock, "peak": runtime.peak_bytes() / 1e9, "weights": weights / 1e9}


@torch.inference_mode()
def transformers_speeds(shape: str, layers: int | None) -> dict[str, float]:
    """Decoding, batches and prefill in bf16; tokens a second by the names of our figures."""
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    from glasklar.model.checkpoint import config_to_hf

    config = config_of(shape, layers)
    fields: dict[str, Any] = config_to_hf(config)
    theirs = AutoConfig.for_model(**fields)
    torch.set_num_threads(THREADS)
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(theirs).eval()

    def speed(rows: int, tokens: int, rounds: int) -> float:
        ids = torch.from_numpy(np.random.default_rng(0).integers(0, config.vocab_size, (rows, tokens)))
        cache, seconds = DynamicCache(), []
        for _ in range(rounds + 1):
            cache = cache if tokens == 1 else DynamicCache()
            begin = time.perf_counter()
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            seconds.append(time.perf_counter() - begin)
        return rows * tokens / sorted(seconds[1:])[rounds // 2]

    return {
        "decode, context 0": speed(1, 1, 5), "prefill 512": speed(1, 512, 1), "batch 1": speed(1, 1, 5),
        "batch 8": speed(8, 1, 3), "batch 32": speed(32, 1, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["ours", "peer", "transformers"])
    parser.add_argument("--shape", required=True)
    parser.add_argument("--bits", default="int4")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--peer", type=Path)
    arguments = parser.parse_args()
    runtime.start(THREADS)
    if arguments.side == "transformers":
        print(json.dumps(transformers_speeds(arguments.shape, arguments.layers)))
        return
    files = Files(arguments.folder, arguments.shape, arguments.bits, arguments.layers)
    print(json.dumps(start(arguments.side, files, arguments.peer)))


if __name__ == "__main__":
    main()
