"""Gradients of one training step against autograd on the network written out from the papers' equations: token by
token, head by head, expert by expert, in float64, with nothing of ours but the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from glasklar.data.batches import Batch
from glasklar.learn.objectives import LanguageConfig, language_loss
from glasklar.model.config import ModelConfig
from glasklar.model.init import build, initialise
from glasklar.ops.select import tables

CONFIG = ModelConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
    q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, intermediate_size=24,
    n_routed_experts=6, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=10, first_k_dense_replace=1,
    n_group=3, topk_group=2, routed_scaling_factor=1.5, num_nextn_predict_layers=1, initializer_range=0.3,
)  # fmt: skip
OBJECTIVE = LanguageConfig(mtp_weight=0.3, balance_weight=0.01)
LENGTHS = [[7, 4], [11]]  # documents packed into two rows
Weights = dict[str, Tensor]


def batch() -> Batch:
    generator = torch.Generator().manual_seed(4)
    segments = torch.tensor([[k for k, n in enumerate(row) for _ in range(n)] for row in LENGTHS])
    positions = torch.tensor([[i for n in row for i in range(n)] for row in LENGTHS])
    return Batch(
        ids_BT=torch.randint(0, CONFIG.vocab_size, segments.shape, generator=generator),
        segments_BT=segments,
        position_BT=positions,
        weight_BT=torch.randint(0, 2, segments.shape, generator=generator).float(),
    )


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / ((x * x).mean() + eps).sqrt() * weight


def turned(x: Tensor, position: int) -> Tensor:
    """Neighbouring values are the two parts of a complex number (arXiv 2104.09864)."""
    pairs = []
    for i in range(len(x) // 2):
        angle = position * CONFIG.rope_theta ** (-2 * i / len(x))
        a, b = x[2 * i], x[2 * i + 1]
        pairs += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    return torch.stack(pairs)


def attention(x: list[Tensor], at: list[int], w: Weights, name: str) -> list[Tensor]:
    """Multi-head latent attention of one document (arXiv 2412.19437, eq. 1-11)."""
    nope, rope, wide = CONFIG.qk_nope_head_dim, CONFIG.qk_rope_head_dim, CONFIG.v_head_dim
    queries, keys, values = [], [], []
    for h, p in zip(x, at, strict=True):
        compressed = norm(w[f"{name}.q_a_proj.weight"] @ h, w[f"{name}.q_a_layernorm.weight"], 1e-6)
        q = w[f"{name}.q_b_proj.weight"] @ compressed
        low = w[f"{name}.kv_a_proj_with_mqa.weight"] @ h
        shared = turned(low[CONFIG.kv_lora_rank :], p)
        latent = norm(low[: CONFIG.kv_lora_rank], w[f"{name}.kv_a_layernorm.weight"], 1e-6)
        up = (w[f"{name}.kv_b_proj.weight"] @ latent).view(CONFIG.num_attention_heads, nope + wide)
        queries.append([torch.cat((one[:nope], turned(one[nope:], p))) for one in q.view(-1, nope + rope)])
        keys.append([torch.cat((one[:nope], shared)) for one in up])
        values.append([one[nope:] for one in up])
    out = []
    for t in range(len(x)):
        heads = []
        for h in range(CONFIG.num_attention_heads):
            scores = torch.stack([queries[t][h] @ keys[s][h] for s in range(t + 1)]) / math.sqrt(nope + rope)
            shares = scores.exp() / scores.exp().sum()
            heads.append(sum(shares[s] * values[s][h] for s in range(t + 1)))
        out.append(w[f"{name}.o_proj.weight"] @ torch.cat(heads))
    return out


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (gate / (1 + (-gate).exp()) * up)


def experts(x: Tensor, w: Weights, name: str) -> tuple[Tensor, Tensor, list[int]]:
    """Fine-grained experts behind a sigmoid gate with groups (eq. 12-16); also the scores and who was chosen."""
    scores = 1 / (1 + (-(w[f"{name}.gate.weight"] @ x)).exp())
    biased = (scores + w[f"{name}.gate.e_score_correction_bias"]).detach()
    size = CONFIG.n_routed_experts // CONFIG.n_group
    worth = [biased[g * size : (g + 1) * size].topk(2).values.sum().item() for g in range(CONFIG.n_group)]
    groups = sorted(range(CONFIG.n_group), key=lambda g: -worth[g])[: CONFIG.topk_group]
    allowed = [e for e in range(CONFIG.n_routed_experts) if e // size in groups]
    chosen = sorted(allowed, key=lambda e: -biased[e].item())[: CONFIG.num_experts_per_tok]
    total = sum(scores[e] for e in chosen)
    y = swiglu(x, w[f"{name}.shared_experts.gate_up_proj.weight"], w[f"{name}.shared_experts.down_proj.weight"])
    for e in chosen:
        share = scores[e] / total * CONFIG.routed_scaling_factor
        y = y + share * swiglu(x, w[f"{name}.gate_up_EFD"][e], w[f"{name}.down_EDF"][e])
    return y, scores, chosen


def block(x: list[Tensor], at: list[int], w: Weights, name: str, routed: list | None) -> list[Tensor]:
    eps = CONFIG.rms_norm_eps
    mixed = attention([norm(h, w[f"{name}.input_layernorm.weight"], eps) for h in x], at, w, f"{name}.self_attn")
    x = [h + m for h, m in zip(x, mixed, strict=True)]
    out = []
    for h in x:
        inner = norm(h, w[f"{name}.post_attention_layernorm.weight"], eps)
        if routed is None:
            y = swiglu(inner, w[f"{name}.mlp.gate_up_proj.weight"], w[f"{name}.mlp.down_proj.weight"])
        else:
            y, scores, chosen = experts(inner, w, f"{name}.mlp")
            routed.append((scores, chosen))
        out.append(h + y)
    return out


def nll(hidden: Tensor, wanted: int, w: Weights) -> Tensor:
    logits = w["lm_head.weight"] @ hidden
    return logits.exp().sum().log() - logits[wanted]


def naive_loss(w: Weights, given: Batch) -> Tensor:
    eps = CONFIG.rms_norm_eps
    main, ahead = [], []  # (weight, loss) of next and second-next token
    balance = {"layers.1.mlp": [], "mtp.0.block.mlp": []}  # layer -> rows -> tokens
    for row, lengths in enumerate(LENGTHS):
        routed: dict[str, list] = {name: [] for name in balance}
        start = 0
        for length in lengths:
            ids = given.ids_BT[row, start : start + length].tolist()
            weight = given.weight_BT[row, start : start + length].tolist()
            at = list(range(length))
            x = [w["embed_tokens.weight"][i] for i in ids]
            x = block(x, at, w, "layers.0", None)
            x = block(x, at, w, "layers.1", routed["layers.1.mlp"])
            hidden = [norm(h, w["norm.weight"], eps) for h in x]
            main += [(weight[i + 1], nll(hidden[i], ids[i + 1], w)) for i in range(length - 1)]
            # Past a document's end the token that follows is read, as in the packed row; nothing is scored there.
            following = given.ids_BT[row].roll(-1)[start : start + length].tolist()
            joined = []
            for i in range(length):
                embedded = norm(w["embed_tokens.weight"][following[i]], w["mtp.0.enorm.weight"], eps)
                state = norm(hidden[i], w["mtp.0.hnorm.weight"], eps)
                joined.append(w["mtp.0.eh_proj.weight"] @ torch.cat((embedded, state)))
            deeper = block(joined, at, w, "mtp.0.block", routed["mtp.0.block.mlp"])
            deeper = [norm(h, w["mtp.0.norm.weight"], eps) for h in deeper]
            ahead += [(weight[i + 2], nll(deeper[i], ids[i + 2], w)) for i in range(length - 2)]
            start += length
        for name, tokens in routed.items():
            balance[name].append(tokens)

    def mean(pairs: list[tuple[float, Tensor]]) -> Tensor:
        return sum(a * b for a, b in pairs) / sum(a for a, _ in pairs)

    penalty = torch.zeros((), dtype=torch.float64)
    for rows in balance.values():
        for tokens in rows:  # eq. 17-20; a row counts as one sequence
            for e in range(CONFIG.n_routed_experts):
                often = sum(e in chosen for _, chosen in tokens) / len(tokens)
                f = often * CONFIG.n_routed_experts / CONFIG.num_experts_per_tok
                p = sum(scores[e] / scores.sum() for scores, _ in tokens) / len(tokens)
                penalty = penalty + f * p / len(rows)
    return mean(main) + OBJECTIVE.mtp_weight * mean(ahead) + OBJECTIVE.balance_weight * penalty


@pytest.mark.parametrize("ops", tables())
def test_gradients_against_the_equations_written_out(ops: str) -> None:
    model = initialise(build(CONFIG, tables()[ops]), 7)
    bias = torch.Generator().manual_seed(9)
    for layer in model.moe_layers():
        layer.gate.e_score_correction_bias.copy_(torch.rand(CONFIG.n_routed_experts, generator=bias) * 0.3)
    weights = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
    weights |= {name: value.double() for name, value in model.named_buffers() if value is not None}
    given = batch()
    expected = naive_loss(weights, given)
    expected.backward()
    found = language_loss(model, given, OBJECTIVE).total
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        wanted = weights[name].grad
        error = (parameter.grad.double() - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-4, f"{name}: off by {error:.1e}"
