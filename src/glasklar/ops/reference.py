"""Plain PyTorch for every operation of the network: any device, any float type. The oracle for the faster twins.

Sums that decide (norms, softmax, gate) are taken in fp32 whatever the type of the inputs. Shape suffixes: see
`model/config.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis (arXiv 1910.07467); result in the type of `x`."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A residual connection and the norm behind it: x + added, and `rms_norm` of that."""
    total = x + added
    return total, rms_norm(total, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
    """Rotary positions (arXiv 2104.09864) on the last R values of `x` [..., K]; what stands before them stays.

    cos, sin     broadcast to [..., R/2]
    interleave   pairs are neighbours (DeepSeek), otherwise first and second half (Llama)
    """
    if x.shape[-1] > 2 * cos.shape[-1]:
        rest, tail = x.split((x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
        return torch.cat((rest, rotate(tail, cos, sin, interleave)), dim=-1)
    wide = x.float()
    if interleave:
        even, odd = wide[..., 0::2], wide[..., 1::2]
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    else:
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, mask_BTS: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale + mask) v, H/G query heads to each key/value head. Returns [B, H, T, V].

    mask   added to the scores: 0 where a query may look, -inf where not; every query may look somewhere
    """
    B, H, T, K = q_BHTK.shape
    G = k_BGSK.shape[1]
    q = q_BHTK.reshape(B, G, H // G * T, K)
    scores = (q @ k_BGSK.transpose(-1, -2)).float().view(B, H, T, -1) * scale + mask_BTS[:, None].float()
    weights = scores.softmax(-1).to(v_BGSV.dtype)
    return (weights.view(B, G, H // G * T, -1) @ v_BGSV).view(B, H, T, -1)


def latent_keys(kv_BTHX: Tensor, key_BTR: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Keys [B, T, H, K] and values [B, T, H, V] of expanded MLA (DeepSeek-V2 eq. 12-18).

    kv, key   each head's own K - R numbers of the key, then its value; the turned part that all heads share
    width     K
    """
    own, v_BTHV = kv_BTHX.tensor_split((width - key_BTR.shape[-1],), dim=-1)
    shared = key_BTR[:, :, None].expand(-1, -1, own.shape[2], -1)
    return torch.cat((own, shared), dim=-1), v_BTHV


def latent_attention(q_BTHK: Tensor, kv_BTHX: Tensor, key_BTR: Tensor, mask_BTS: Tensor, scale: float) -> Tensor:
    """`attention` of MLA with keys and values as `latent_keys` takes them, heads behind positions. [B, H, T, V]."""
    k, v = latent_keys(kv_BTHX, key_BTR, q_BTHK.shape[-1])
    return attention(q_BTHK.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask_BTS, scale)


def linear(x: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + b over the last axis; sums in fp32 at least."""
    return F.linear(x, weight_ND, bias_N)


def sink_attention(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, mask_BTS: Tensor, scale: float, sinks_H: Tensor
) -> Tensor:
    """`attention` with one score more in each head's softmax, which brings no value (gpt-oss, arXiv 2309.17453)."""
    B, H, T, K = q_BHTK.shape
    G = k_BGSK.shape[1]
    q = q_BHTK.reshape(B, G, H // G * T, K)
    scores = (q @ k_BGSK.transpose(-1, -2)).float().view(B, H, T, -1) * scale + mask_BTS[:, None].float()
    sinks = sinks_H.float().view(1, H, 1, 1).expand(B, H, T, 1)
    weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1].to(v_BGSV.dtype)
    return (weights.reshape(B, G, H // G * T, -1) @ v_BGSV).view(B, H, T, -1)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for `gate_up` [..., 2F] holding gate, then up (arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def feed_forward(x: Tensor, gate_up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """down(silu(gate x) * up x) for `x` [..., D]; gate and up lie in one matrix [2F, D]."""
    return F.linear(swiglu(F.linear(x, gate_up_FD)), down_DF)


def gate(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Logits [T, E] of the gate, in fp32 whatever the type of `x`."""
    return F.linear(x_TD.float(), weight_ED.float())


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    *,
    active: int,
    groups: int,
    groups_kept: int,
    scoring: str,
    normalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gate: which experts see a token and with what weight (DeepSeek-V3 eq. 12-16; V2 with scoring "softmax").

    The bias steers the choice only; weights come from the unbiased scores. Ties go to the lower index.
    Returns ids [T, A] (int64), weights [T, A] (fp32, differentiable), scores [T, E] (fp32).
    """
    wide = logits_TE.float()
    scores_TE = wide.sigmoid() if scoring == "sigmoid" else wide.softmax(-1)
    with torch.no_grad():
        choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E.float()
        if groups > 1:
            by_group = choice_TE.unflatten(-1, (groups, -1))
            # V3 ranks groups by their best two experts, V2 (softmax) by the best one.
            group_scores = by_group.topk(2, -1).values.sum(-1) if scoring == "sigmoid" else by_group.amax(-1)
            kept = _top(group_scores, groups_kept)
            allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, kept, True)
            choice_TE = by_group.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
        ids_TA = _top(choice_TE, active)
    weights_TA = scores_TE.gather(-1, ids_TA)
    if normalise:
        weights_TA = weights_TA / (weights_TA.sum(-1, keepdim=True) + 1e-20)
    return ids_TA, weights_TA * scaling, scores_TE


def _top(scores: Tensor, count: int) -> Tensor:
    """Indices of the largest values, ties by index on every device: routing must not depend on the sorting kernel."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def experts(x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """Sum over a token's chosen experts of weight * SwiGLU feed-forward. gate_up [E, 2F, D], down [E, D, F]."""
    y_TD = torch.zeros_like(x_TD)
    for expert in range(gate_up_EFD.shape[0]):
        rows, slots = (ids_TA == expert).nonzero(as_tuple=True)
        if rows.numel() == 0:
            continue
        out = F.linear(swiglu(F.linear(x_TD[rows], gate_up_EFD[expert])), down_EDF[expert])
        y_TD = y_TD.index_add(0, rows, out * weights_TA[rows, slots, None].to(out.dtype))
    return y_TD


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """gate * sigmoid(alpha gate) * (up + 1), the gate cut off above `limit`, up beyond both sides of it (gpt-oss).
    `gate_up` [..., 2F] holds gate and up of the first hidden value, then of the second, and so on."""
    gate, up = gate_up[..., 0::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def clamped_experts(
    x_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    gate_up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    alpha: float,
    limit: float,
) -> Tensor:
    """As `experts`, with biases and `clamped_swiglu`. gate_up: [E, 2F, D] in its order and [E, 2F]; down: [E, D, F] and
    [E, D]."""
    y_TD = torch.zeros_like(x_TD)
    for expert in range(gate_up[0].shape[0]):
        rows, slots = (ids_TA == expert).nonzero(as_tuple=True)
        if rows.numel() == 0:
            continue
        hidden = clamped_swiglu(F.linear(x_TD[rows], gate_up[0][expert], gate_up[1][expert]), alpha, limit)
        out = F.linear(hidden, down[0][expert], down[1][expert])
        y_TD = y_TD.index_add(0, rows, out * weights_TA[rows, slots, None].to(out.dtype))
    return y_TD


def token_logprobs(hidden_TD: Tensor, head_WD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(head · hidden), and the entropy of that distribution, in nats.

    Returns logprobs [T] (differentiable) and entropy [T] (not), both fp32.
    """
    logprobs_TW = F.linear(hidden_TD, head_WD).float().log_softmax(-1)
    with torch.no_grad():
        entropy_T = -(logprobs_TW.exp() * logprobs_TW).sum(-1)
    return logprobs_TW.gather(-1, targets_T[:, None])[:, 0], entropy_T


# Jordan's quintic: steepest at zero, ends in singular values of about 0.7 to 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrices_nRC: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Newton-Schulz: every matrix U S V^T of the stack becomes about U V^T (Jordan 2024). `dtype`: of the products;
    their rounding is far below the spread that the quintic leaves."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices_nRC.shape[1] > matrices_nRC.shape[2]
    x = matrices_nRC.mT if tall else matrices_nRC
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)).to(dtype).contiguous()
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
