"""Twins for passes that record no gradient (sampling, serving, evaluation): in place, and few calls.

When single tokens are decoded a pass costs its number of calls more than its arithmetic, so experts that are cheap all
see all tokens, in two products without sorting.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glasklar.ops import reference, torch_cpu

# All experts see all tokens up to these sizes: D * F of an expert (its weights are read in vain), and T * D * F.
CHEAP_EXPERT, CHEAP_TOKENS = 1 << 17, 1 << 22
# Scores held at once, of all sequences and heads: long prompts are done a stretch of queries after the other.
MOST_SCORES = 1 << 25


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`."""
    wide = x.float()
    inverse = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * inverse[..., None]).mul_(weight).to(x.dtype)


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `reference.add_rms_norm`."""
    total = x + added
    return total, rms_norm(total, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
    """As `reference.rotate`; neighbours are one complex number."""
    if x.shape[-1] > 2 * cos.shape[-1]:
        rest, tail = x.split((x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
        return torch.cat((rest, rotate(tail, cos, sin, interleave)), dim=-1)
    if not interleave:
        return reference.rotate(x, cos, sin, interleave)
    pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, mask_BTS: Tensor, scale: float) -> Tensor:
    """As `reference.attention`; scores in the compute type."""
    B, H, _, K = q_BHTK.shape
    G, S = k_BGSK.shape[1:3]
    k, v = k_BGSK.flatten(0, 1), v_BGSV.flatten(0, 1)
    stretch = max(1, MOST_SCORES // (B * H * S))
    parts = []
    for q_BHtK, mask_BtS in zip(q_BHTK.split(stretch, 2), mask_BTS.split(stretch, 1), strict=True):
        t = q_BHtK.shape[2]
        mask = mask_BtS[:, None].expand(B, H, t, S).reshape(B * G, H // G * t, S).to(q_BHTK.dtype)
        scores = torch.baddbmm(mask, q_BHtK.reshape(B * G, H // G * t, K), k.mT, alpha=scale)
        parts.append(torch.bmm(scores.softmax(-1), v).view(B, H, t, -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def latent_attention(q_BTHK: Tensor, kv_BTHX: Tensor, key_BTR: Tensor, mask_BTS: Tensor, scale: float) -> Tensor:
    """As `reference.latent_attention`."""
    k, v = reference.latent_keys(kv_BTHX, key_BTR, q_BTHK.shape[-1])
    return attention(q_BTHK.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask_BTS, scale)


def swiglu(gate_up: Tensor) -> Tensor:
    """As `reference.swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def feed_forward(x: Tensor, gate_up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """As `reference.feed_forward`."""
    return F.linear(swiglu(F.linear(x, gate_up_FD)), down_DF)


def experts(x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """As `reference.experts`. A token's weight is 0 for the experts that it did not choose."""
    T = len(x_TD)
    E, D, hidden = down_EDF.shape
    if D * hidden > CHEAP_EXPERT or T * D * hidden > CHEAP_TOKENS:
        return torch_cpu.experts(x_TD, ids_TA, weights_TA, gate_up_EFD, down_EDF)
    weights_TE = weights_TA.new_zeros(T, E).scatter_(1, ids_TA, weights_TA).to(x_TD.dtype)
    up_TEF = F.linear(x_TD, gate_up_EFD.flatten(0, 1)).view(T, E, -1)
    hidden_TEF = swiglu(up_TEF).mul_(weights_TE[..., None])
    # One product over experts and hidden values sums over both; joining the weights costs less than a sum afterwards.
    return F.linear(hidden_TEF.flatten(1), down_EDF.transpose(0, 1).flatten(1))
