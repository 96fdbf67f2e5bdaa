"""Twins for training on a CPU, in PyTorch alone: backward passes by hand, few passes over memory, repeating shapes.

Three properties of torch on CPUs are behind them: the backward pass of its fused attention is several times slower than
plain products in bf16; oneDNN compiles a kernel for every new shape of a bf16 product, so row counts that depend on the
data are rounded up; sums by index (`index_add`) are slow and in no fixed order, so experts are joined by gathers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glasklar.ops import reference

# Rows of one expert are rounded up to a multiple: few enough shapes for oneDNN's cache, little waste.
ROWS, ROWS_IF_FEW = 64, 16


class _Attention(torch.autograd.Function):
    """Scores and weights kept in the compute type; torch's softmax sums in fp32 within."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        weights = torch.baddbmm(mask, q, k.mT, alpha=scale).softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return torch.bmm(weights, v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        (grad,) = grads
        grad_v = torch.bmm(weights.mT, grad)
        grad_weights = torch.bmm(grad, v.mT)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(ctx.scale)
        return torch.bmm(grad_scores, k), torch.bmm(grad_scores.mT, q), grad_v, None, None


def attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, mask_BTS: Tensor, scale: float) -> Tensor:
    """As `reference.attention`, for short sequences: memory grows with T * S."""
    B, H, T, K = q_BHTK.shape
    G, S = k_BGSK.shape[1:3]
    mask = mask_BTS[:, None].expand(B, H, T, S).reshape(B * G, H // G * T, S).to(q_BHTK.dtype)
    q = q_BHTK.reshape(B * G, H // G * T, K)
    out = _Attention.apply(q, k_BGSK.flatten(0, 1), v_BGSV.flatten(0, 1), mask, scale)
    return out.view(B, H, T, -1)


def latent_attention(q_BTHK: Tensor, kv_BTHX: Tensor, key_BTR: Tensor, mask_BTS: Tensor, scale: float) -> Tensor:
    """As `reference.latent_attention`."""
    k, v = reference.latent_keys(kv_BTHX, key_BTR, q_BTHK.shape[-1])
    return attention(q_BTHK.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask_BTS, scale)


class _Experts(torch.autograd.Function):
    """Rows sorted by expert, one product an expert. The gate's weight is applied before the down-projection: its
    gradient then needs no second copy of the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        place, source, bounds = expert_rows(ids, gate_up.shape[0])
        rows = x[source]
        up = rows.new_empty(len(rows), gate_up.shape[1])
        out = rows.new_empty(len(rows), x.shape[1])
        row_weights = weights.new_zeros(len(rows)).index_copy_(0, place.flatten(), weights.flatten())[:, None]
        row_weights = row_weights.to(x.dtype)
        for e, (start, stop) in enumerate(bounds):
            torch.mm(rows[start:stop], gate_up[e].t(), out=up[start:stop])
        hidden = reference.swiglu(up).mul_(row_weights)
        for e, (start, stop) in enumerate(bounds):
            torch.mm(hidden[start:stop], down[e].t(), out=out[start:stop])
        ctx.save_for_backward(rows, up, hidden, row_weights, place, source, gate_up, down)
        ctx.bounds = bounds
        return out[place].sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, up, hidden, row_weights, place, source, gate_up, down = ctx.saved_tensors
        # Rounding rows repeat some token; whatever they carry must not reach the weights.
        grad_rows = grads[0][source].masked_fill_(padding(place, len(rows)), 0)
        grad_hidden = torch.empty_like(hidden)
        grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        for e, (start, stop) in enumerate(ctx.bounds):
            if stop > start:
                torch.mm(grad_rows[start:stop], down[e], out=grad_hidden[start:stop])
                torch.mm(grad_rows[start:stop].t(), hidden[start:stop], out=grad_down[e])
        grad_up, plain = swiglu_backward(up, grad_hidden * row_weights)
        grad_weights = torch.linalg.vecdot(grad_hidden.float(), plain.float())
        for e, (start, stop) in enumerate(ctx.bounds):
            if stop > start:
                torch.mm(grad_up[start:stop].t(), rows[start:stop], out=grad_gate_up[e])
                torch.mm(grad_up[start:stop], gate_up[e], out=grad_rows[start:stop])
        return grad_rows[place].sum(1), None, grad_weights[place], grad_gate_up, grad_down


def experts(x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """As `reference.experts`; sums in a fixed order."""
    return _Experts.apply(x_TD, ids_TA, weights_TA, gate_up_EFD, down_EDF)


def expert_rows(ids_TA: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Where each choice goes when rows are sorted by expert and each expert's share is rounded up.

    Returns place [T, A] (row of each choice), source [rows] (token of each row; 0 in rounding rows), and each expert's
    first and last-plus-one row.
    """
    flat = ids_TA.flatten()
    counts = torch.bincount(flat, minlength=num_experts)
    multiple = ROWS if len(flat) >= ROWS * num_experts else ROWS_IF_FEW
    rounded = (counts + multiple - 1) // multiple * multiple
    ends = rounded.cumsum(0)
    order = flat.argsort(stable=True)
    rank = torch.empty_like(order).index_copy_(0, order, torch.arange(len(flat)))
    place = rank + (ends - rounded - counts.cumsum(0) + counts)[flat]
    stops = ends.tolist()
    source = flat.new_zeros(stops[-1]).index_copy_(0, place, torch.arange(len(flat)) // ids_TA.shape[1])
    return place.view_as(ids_TA), source, list(zip([0, *stops[:-1]], stops, strict=True))


def padding(place: Tensor, rows: int) -> Tensor:
    """[rows, 1] True for rows that hold no choice."""
    return place.new_ones(rows, dtype=torch.bool).index_fill_(0, place.flatten(), False)[:, None]


def swiglu_backward(gate_up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of `swiglu` for `gate_up`, and its value again."""
    gate, up = gate_up.chunk(2, dim=-1)
    silu = F.silu(gate)
    return torch.cat((torch.ops.aten.silu_backward(grad * up, gate), grad * silu), dim=-1), silu * up


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return reference.swiglu(gate_up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return swiglu_backward(gate_up, grads[0])[0]


def swiglu(gate_up: Tensor) -> Tensor:
    """As `reference.swiglu`; keeps only its input."""
    return _Swiglu.apply(gate_up)


def feed_forward(x: Tensor, gate_up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """As `reference.feed_forward`."""
    return F.linear(swiglu(F.linear(x, gate_up_FD)), down_DF)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        unit = x * inverse
        grad = grads[0].float()
        grad_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight
        grad_x = (grad - unit * (grad * unit).mean(-1, keepdim=True)).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`."""
    return _RmsNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `reference.add_rms_norm`."""
    total = x + added
    return total, rms_norm(total, weight, eps)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back: nothing is kept but the angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleave = interleave
        return reference.rotate(x, cos, sin, interleave)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return reference.rotate(grads[0], cos, -sin, ctx.interleave), None, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
    """As `reference.rotate`."""
    return _Rotate.apply(x, cos, sin, interleave)


class _TokenLogprobs(torch.autograd.Function):
    """Keeps the probabilities in the compute type: one [T, W] tensor instead of four."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = F.linear(hidden, head).float().log_softmax(-1)
        chosen = logprobs.gather(-1, targets[:, None])[:, 0]
        probs = logprobs.exp()
        entropy = -torch.linalg.vecdot(probs, logprobs)
        ctx.save_for_backward(hidden, head, targets, probs.to(hidden.dtype))
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, targets, probs = ctx.saved_tensors
        grad = grads[0][:, None].to(hidden.dtype)
        grad_logits = (probs * -grad).scatter_add_(-1, targets[:, None], grad)
        return grad_logits @ head, grad_logits.t() @ hidden, None


def token_logprobs(hidden_TD: Tensor, head_WD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.token_logprobs`."""
    return _TokenLogprobs.apply(hidden_TD, head_WD, targets_T)
