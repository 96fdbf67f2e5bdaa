"""The pass that GPUs run, on plain PyTorch ops: against the network itself and, where there is a GPU, with its kernels
against those. GLASKLAR_TEST_DEVICE=cuda takes the kernels on a GPU, TRITON_INTERPRET=1 on a CPU, slowly (pip install
triton)."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from glasklar.engine.cuda_network import CudaNetwork
from glasklar.engine.paged import PAGE
from glasklar.model.attention import document_mask
from glasklar.model.config import ModelConfig
from glasklar.model.init import initialise
from glasklar.model.transformer import Transformer
from glasklar.ops.paged import REFERENCE, PagedOps

DEVICE = os.environ.get("GLASKLAR_TEST_DEVICE", "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}  # the network itself in bf16: 3e-2 with Qwen's widths

COMMON = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 2048}
LATENT = COMMON | {
    "num_attention_heads": 3, "kv_lora_rank": 24, "qk_nope_head_dim": 20, "qk_rope_head_dim": 12, "v_head_dim": 28,
    "intermediate_size": 72,
}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 12, "n_shared_experts": 2, "num_experts_per_tok": 4, "moe_intermediate_size": 40,
    "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
}  # fmt: skip
GROUPED = COMMON | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20, "intermediate_size": 72}
SHAPES = {
    "V3": LATENT | EXPERTS | {"q_lora_rank": 40, "n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 1},
    "V2": LATENT | EXPERTS | {"n_group": 3, "topk_group": 2, "scoring_func": "softmax", "norm_topk_prob": False},
    "latent, biases, many heads": LATENT | {"num_attention_heads": 20, "q_lora_rank": 40, "attention_bias": True},
    "Qwen": GROUPED | {"attention_bias": True, "tie_word_embeddings": True, "rope_interleave": False},
    "Qwen3": GROUPED | {"qk_norm": True, "rope_interleave": False},
    "gpt-oss": GROUPED | {
        "n_routed_experts": 12, "num_experts_per_tok": 4, "moe_intermediate_size": 40, "scoring_func": "softmax",
        "swiglu_limit": 7.0, "attention_bias": True, "output_bias": True, "attention_sinks": True,
        "sliding_window": 19, "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
    },
}  # fmt: skip
WIDE = {"vocab_size": 97, "hidden_size": 2048, "num_hidden_layers": 2, "max_position_embeddings": 2048}
PUBLISHED = {
    "V2-Lite": WIDE | {
        "num_attention_heads": 16, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "intermediate_size": 10944, "n_routed_experts": 16, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "scoring_func": "softmax",
        "norm_topk_prob": False,
    },
    "Qwen 1.5B": WIDE | {
        "hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128,
        "intermediate_size": 8960, "attention_bias": True, "rope_interleave": False,
    },
}  # fmt: skip
SHAPES = SHAPES | (PUBLISHED if DEVICE == "cuda" else {})


def ops() -> PagedOps:
    if DEVICE != "cuda" and not INTERPRETED:
        return REFERENCE
    from glasklar.ops.cuda.table import TRITON

    return TRITON


def network(name: str, dtype: torch.dtype) -> Transformer:
    model = Transformer(ModelConfig(**SHAPES[name]))
    initialise(model, seed=1)
    torch.manual_seed(2)
    for parameter in model.parameters():  # biases, norms and sinks must show
        parameter.data += 0.1 * torch.randn_like(parameter)
    gates = {id(layer.gate.weight) for layer in model.moe_layers()}
    for parameter in model.parameters():
        if id(parameter) not in gates:
            parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False).to(DEVICE)


def expected(model: Transformer, ids: list[int]) -> torch.Tensor:
    """Logits [T, W] of the network in float64, from the same weights."""
    exact = Transformer(model.config)
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()}, assign=True)
    ids_BT = torch.tensor([ids], device=DEVICE)
    position_BT = torch.arange(len(ids), device=DEVICE)[None]
    at = exact.at(position_BT, document_mask(torch.zeros_like(ids_BT), torch.float64))
    return exact.logits(exact(ids_BT, at).hidden_BTD)[0]


class Session:
    """Sequences of a network, run piece by piece in any company."""

    def __init__(self, model: Transformer, sequences: int, pages: int = 80) -> None:
        self.network = CudaNetwork(model, ops(), page=PAGE)
        self.cache = self.network.new_cache(sequences * pages)
        order = np.random.default_rng(0).permutation(sequences * pages).astype(np.int32)
        self.tables = order.reshape(sequences, pages)
        self.done = [0] * sequences

    def run(self, pieces: list[tuple[int, list[int]]], wanted: list[int] | None = None) -> torch.Tensor:
        """Takes each sequence on by some ids; logits at the places `wanted` (None: all)."""
        ids, positions, owners = [], [], []
        for sequence, piece in pieces:
            ids += piece
            positions += range(self.done[sequence], self.done[sequence] + len(piece))
            owners += [sequence] * len(piece)
            self.done[sequence] += len(piece)
        outputs = np.array(range(len(ids)) if wanted is None else wanted, np.int32)
        columns = (np.array(column, np.int32) for column in (ids, positions, owners))
        none = np.zeros(len(outputs))
        logits, tokens, logprobs = self.network.run(
            self.cache, *columns, self.tables, outputs, none.astype(np.float32), none
        )
        assert tokens.tolist() == logits.argmax(-1).tolist()
        best = logits.log_softmax(-1).max(-1).values.cpu().numpy()
        assert np.allclose(logprobs, best, atol=1e-4)
        return logits


def text(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(97, size=length).tolist()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_pass_against_network(name: str, dtype: torch.dtype) -> None:
    """Two prompts at once, one of them in two pieces, then single tokens: logits as those of the network in float64."""
    model = network(name, dtype)
    a, b = text(45, 1), text(300, 2)
    session = Session(model, 2)
    parts_a = [session.run([(0, a[:30]), (1, b[:270])])[:30]]
    parts_b = []
    for i in range(15):
        both = session.run([(0, [a[30 + i]]), (1, b[270 + 2 * i : 272 + 2 * i])])
        parts_a.append(both[:1])
        parts_b.append(both[1:])
    for found, wanted in ((torch.cat(parts_a), expected(model, a)), (torch.cat(parts_b), expected(model, b)[270:])):
        # Of most tokens: where bf16 brings a gate to choose another expert, the difference is real.
        error = ((found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).quantile(0.75).item()
        assert error < TOLERANCE[dtype], f"off by {error:.1e}"


@pytest.mark.skipif(DEVICE == "cpu", reason="PyTorch's own products have no fixed order of sums")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_bits_do_not_depend_on_company(name: str, dtype: torch.dtype) -> None:
    """A text alone token by token, in one piece, in pieces, and among others, in passes of all sizes."""
    model = network(name, dtype)
    ids = text(330, 3)
    whole = Session(model, 1).run([(0, ids)])
    for pieces in ([1] * 330, [7] * 47 + [1], [300, 30], [17, 200, 100, 13]):
        session, parts, first = Session(model, 1), [], 0
        for size in pieces:
            parts.append(session.run([(0, ids[first : first + size])]))
            first += size
        assert torch.equal(torch.cat(parts), whole), pieces
    for company in (3, 40):
        session = Session(model, 1 + company)
        others = [(i, text(9 * i % 70 + 1, i)) for i in range(1, 1 + company)]
        first = sum(len(piece) for _, piece in others)
        parts = [session.run([*others, (0, ids[:200])], list(range(first, first + 200)))]
        for i in range(200, 330):
            some = [(n, [n]) for n in range(1, 1 + company) if (i + n) % 3]
            parts.append(session.run([*some[:5], (0, [ids[i]]), *some[5:]])[min(5, len(some))][None])
        assert torch.equal(torch.cat(parts), whole), company
