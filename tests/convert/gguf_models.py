"""Small random models of each architecture that llama.cpp must continue as we do, and a way to let it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from glasklar.data.tokenizer import Tokenizer
from glasklar.model.checkpoint import save_model
from glasklar.model.config import ModelConfig
from glasklar.model.init import build
from glasklar.model.transformer import Transformer
from glasklar.ops.select import REFERENCE

FLOAT = 0  # llama.cpp's number of fp32
VOCAB = 288
_LATENT = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24, "max_position_embeddings": 256,
}  # fmt: skip
_EXPERTS = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
_GROUPED = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 256, "rope_interleave": False,
}  # fmt: skip
_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}

CASES: dict[str, dict[str, Any]] = {
    "deepseek2, V3 with a predicting layer": {**_LATENT, **_EXPERTS, "q_lora_rank": 48, "num_nextn_predict_layers": 1},
    "deepseek2, groups and scale": {
        **_LATENT, **_EXPERTS, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "n_shared_experts": 2,
    },
    "deepseek2, V2": {**_LATENT, **_EXPERTS, "scoring_func": "softmax", "norm_topk_prob": False},
    "deepseek2, dense": {**_LATENT, "q_lora_rank": 48, "tie_word_embeddings": True},
    "deepseek2, halves rotated": {**_LATENT, **_EXPERTS, "q_lora_rank": 48, "rope_interleave": False},
    "deepseek2, yarn": {
        **_LATENT, **_EXPERTS, "q_lora_rank": 48, "rope_scaling": {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
    },
    "llama": _GROUPED,
    "llama, tied, wide heads": {**_GROUPED, "tie_word_embeddings": True, "head_dim": 32},
    "llama, yarn": {**_GROUPED, "rope_scaling": _YARN},
    "llama, llama3's rope": {
        **_GROUPED, "rope_scaling": {
            "type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    },
    "qwen2": {**_GROUPED, "attention_bias": True},
    "qwen2, yarn": {**_GROUPED, "attention_bias": True, "rope_scaling": _YARN},
    "qwen3": {**_GROUPED, "qk_norm": True, "head_dim": 32},
    "qwen3moe": {
        **_GROUPED, "qk_norm": True, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
        "scoring_func": "softmax",
    },
}  # fmt: skip


def tokenizer() -> Tokenizer:
    texts = [
        f"What is {a} + {b}? It's {a + b}; don't\n\tsay: größer, schöner ({a}) #{b} def what"
        for a in range(20)
        for b in range(20)
    ]
    return Tokenizer.train(texts, vocab_size=VOCAB)


def random_model(fields: dict[str, Any], seed: int) -> Transformer:
    """Weights large enough that continuations differ; biases and norms away from their first values."""
    model = build(ModelConfig.read(fields, "case"), REFERENCE, device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.1 * noise if name.endswith("norm.weight") else 0.15 * noise)
    return model.requires_grad_(False)


def save(folder: Path, fields: dict[str, Any], seed: int, *, files: bool = True) -> Transformer:
    model = random_model(fields, seed)
    save_model(model, folder, extra=tokenizer().files() if files else None)
    return model


def llama_tokens(path: Path, prompt: list[int], count: int) -> list[int]:
    """What llama.cpp goes on with, the most probable token each time. Its cache is set to fp32 (by default fp16)."""
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=256, n_threads=1, verbose=False, type_k=FLOAT, type_v=FLOAT)
    llama.eval(prompt)
    made = []
    for _ in range(count):
        made.append(int(llama.sample(temp=0.0, top_k=1)))
        llama.eval(made[-1:])
    llama.close()
    return made
