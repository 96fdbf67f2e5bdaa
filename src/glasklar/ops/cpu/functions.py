"""The compiled kernels as differentiable operations with the signatures of `ops/reference.py`."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from glasklar.ops import reference
from glasklar.ops.cpu.library import Library

# Parts in which gradients of norm weights are summed (`CHUNKS` in pointwise.hpp).
CHUNKS = 32
# int32 numbers of a `Span` in attention.hpp.
SPAN = 3
# Numbers in a matrix that Newton-Schulz keeps in one core's cache; larger ones are left to torch and all cores.
MOST_ORTHOGONALISED = 1 << 16

Grads = tuple[Tensor | None, ...]


def _numbers(*values: int) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _rows(x: Tensor) -> Tensor:
    """[rows, last axis], contiguous within a row; a copy only where strides do not allow a view."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _strides(*tensors: Tensor) -> Any:
    """Strides of [B, heads, positions, width] tensors, without the last one."""
    return _numbers(*(stride for tensor in tensors for stride in tensor.stride()[:3]))


def _by_position(B: int, H: int, T: int, width: int, *, like: Tensor) -> Tensor:
    """[B, H, T, width] that lies in memory as [B, T, H, width], as the projections around attention want it."""
    return like.new_empty(B, T, H, width).transpose(1, 2)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, library: Library) -> Tensor:
        y, inverse = _normalised(x, None, None, weight, eps, library)
        ctx.save_for_backward(x, weight, inverse)
        ctx.library = library
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        x, weight, inverse = ctx.saved_tensors
        return *_normalised_backward(x, weight, inverse, grads[0], None, ctx.library), None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor, weight: Tensor, eps: float, library: Library
    ) -> tuple[Tensor, Tensor]:
        total = x.new_empty(x.shape)
        y, inverse = _normalised(x, added.contiguous(), total, weight, eps, library)
        ctx.save_for_backward(total, weight, inverse)
        ctx.library = library
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        grad_total, grad = grads
        if grad is None:
            return grad_total, grad_total, None, None, None
        total, weight, inverse = ctx.saved_tensors
        grad_x, grad_weight = _normalised_backward(total, weight, inverse, grad, grad_total, ctx.library)
        return grad_x, grad_x, grad_weight, None, None


def _normalised(
    x: Tensor, added: Tensor | None, total: Tensor | None, weight: Tensor, eps: float, library: Library
) -> tuple[Tensor, Tensor]:
    """Normalised rows of x (of x + added, which is written to `total`), and 1 / rms of each row."""
    rows = _rows(x)
    n, D = rows.shape
    y, inverse = x.new_empty(x.shape), x.new_empty(n, dtype=torch.float32)
    library("rms_norm_forward", x.dtype)(
        rows.data_ptr(), rows.stride(0), _pointer(added), _pointer(total), weight.data_ptr(), eps, y.data_ptr(),
        inverse.data_ptr(), n, D, torch.get_num_threads(),
    )  # fmt: skip
    return y, inverse


def _normalised_backward(
    x: Tensor, weight: Tensor, inverse: Tensor, grad: Tensor, other: Tensor | None, library: Library
) -> tuple[Tensor, Tensor]:
    """Gradients of x, `other` added, and of the weight."""
    rows, grad = _rows(x), grad.contiguous()
    other = None if other is None else other.contiguous()
    n, D = rows.shape
    grad_x, grad_weight = x.new_empty(x.shape), torch.empty_like(weight)
    partial = x.new_empty(CHUNKS, D, dtype=torch.float32)
    library("rms_norm_backward", x.dtype)(
        rows.data_ptr(), rows.stride(0), weight.data_ptr(), inverse.data_ptr(), grad.data_ptr(), _pointer(other),
        grad_x.data_ptr(), partial.data_ptr(), grad_weight.data_ptr(), n, D, torch.get_num_threads(),
    )  # fmt: skip
    return grad_x, grad_weight


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back: nothing is kept but the angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleave: bool, library: Library) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleave, ctx.library = interleave, library
        return _turn(x, cos, sin, 1.0, interleave, library)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1.0, ctx.interleave, ctx.library), None, None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: float, interleave: bool, library: Library) -> Tensor:
    y = x.new_empty(x.shape)
    x = _dense(x)
    wide = x if x.ndim == 4 else x[:, :, None]
    B, T, H, K = wide.shape
    half = cos.shape[-1]
    cos, sin = (_dense(a.reshape(B, T, half)) for a in (cos, sin))
    library("rotate", x.dtype)(
        wide.data_ptr(), _strides(wide), cos.data_ptr(), sin.data_ptr(), _numbers(*cos.stride()[:2]), direction,
        int(interleave), y.data_ptr(), _numbers(B, T, H, K, 2 * half), torch.get_num_threads(),
    )  # fmt: skip
    return y


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, library: Library) -> Tensor:
        q, k, v, mask = _dense(q), _dense(k), _dense(v), mask.to(q.dtype).contiguous()
        out, log_sums, spans = _attend(q, k, v, mask, scale, library)
        ctx.save_for_backward(q, k, v, mask, out, log_sums, spans)
        ctx.scale, ctx.library = scale, library
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        q, k, v = ctx.saved_tensors[:3]
        into = tuple(_by_position(*x.shape, like=q) for x in (q, k, v))
        _attend_backward(ctx.saved_tensors, grads[0], into, ctx.scale, ctx.library)
        return *into, None, None, None


class _LatentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, key: Tensor, mask: Tensor, scale: float, library: Library) -> Tensor:
        q, kv, key, mask = _dense(q), kv.contiguous(), key.contiguous(), mask.to(q.dtype).contiguous()
        (B, T, H, X), R, K = kv.shape, key.shape[-1], q.shape[-1]
        k = kv.new_empty(B, T, H, K)
        ctx.shape = _numbers(B * T, H, X, K - R, R)
        library("join_keys", q.dtype)(kv.data_ptr(), key.data_ptr(), k.data_ptr(), ctx.shape, torch.get_num_threads())
        k, v = k.transpose(1, 2), kv[..., K - R :].transpose(1, 2)
        out, log_sums, spans = _attend(q.transpose(1, 2), k, v, mask, scale, library)
        ctx.save_for_backward(q.transpose(1, 2), k, v, mask, out, log_sums, spans)
        ctx.scale, ctx.library = scale, library
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        q, k = ctx.saved_tensors[:2]
        B, H, T, _ = q.shape
        _, _, X, N, R = ctx.shape
        grad_q, grad_k = _by_position(*q.shape, like=q), _by_position(*k.shape, like=q)
        grad_kv, grad_key = q.new_empty(B, T, H, X), q.new_empty(B, T, R)
        into = (grad_q, grad_k, grad_kv[..., N:].transpose(1, 2))
        _attend_backward(ctx.saved_tensors, grads[0], into, ctx.scale, ctx.library)
        ctx.library("split_keys", q.dtype)(
            grad_k.data_ptr(), grad_kv.data_ptr(), grad_key.data_ptr(), ctx.shape, torch.get_num_threads()
        )
        return grad_q.transpose(1, 2), grad_kv, grad_key, None, None, None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, library: Library
) -> tuple[Tensor, Tensor, Tensor]:
    """Result [B, H, T, V] by position, logarithms of the rows' sums [B, H, T], and what each position sees."""
    (B, H, T, K), (G, S), V = q.shape, k.shape[1:3], v.shape[-1]
    out = _by_position(B, H, T, V, like=q)
    log_sums = q.new_empty(B, H, T, dtype=torch.float32)
    spans = q.new_empty(B, T, SPAN, dtype=torch.int32)
    library("attention_forward", q.dtype)(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), mask.data_ptr(), scale, out.data_ptr(), log_sums.data_ptr(),
        spans.data_ptr(), _numbers(B, H, G, T, S, K, V), _strides(q, k, v, out), torch.get_num_threads(),
    )  # fmt: skip
    return out, log_sums, spans


def _attend_backward(
    saved: tuple[Tensor, ...], grad: Tensor, into: tuple[Tensor, ...], scale: float, library: Library
) -> None:
    """Writes the gradients of q, k and v into the three given tensors."""
    q, k, v, mask, out, log_sums, spans = saved
    (B, H, T, K), (G, S), V = q.shape, k.shape[1:3], v.shape[-1]
    grad = _dense(grad)
    library("attention_backward", q.dtype)(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), mask.data_ptr(), scale, out.data_ptr(), grad.data_ptr(),
        log_sums.data_ptr(), spans.data_ptr(), *(x.data_ptr() for x in into), _numbers(B, H, G, T, S, K, V),
        _strides(q, k, v, out, grad, *into), torch.get_num_threads(),
    )  # fmt: skip


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, library: Library) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        (T, D), E = x.shape, len(weight)
        logits = x.new_empty(T, E, dtype=torch.float32)
        library("gate_forward", x.dtype)(
            x.data_ptr(), weight.data_ptr(), logits.data_ptr(), T, D, E, torch.get_num_threads()
        )
        ctx.save_for_backward(x, weight)
        ctx.library = library
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        x, weight = ctx.saved_tensors
        grad, grad_x, grad_weight = grads[0].contiguous(), torch.empty_like(x), torch.empty_like(weight)
        (T, D), E = x.shape, len(weight)
        partial = weight.new_empty(CHUNKS, E, D)
        ctx.library("gate_backward", x.dtype)(
            x.data_ptr(), weight.data_ptr(), grad.data_ptr(), grad_x.data_ptr(), partial.data_ptr(),
            grad_weight.data_ptr(), T, D, E, torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, grad_weight, None


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor | None, shape: tuple[int, ...], scaling: float, library: Library
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = logits.float().contiguous()
        bias = None if bias is None else bias.float().contiguous()
        T, active = len(logits), shape[1]
        ids, weights = logits.new_empty(T, active, dtype=torch.int64), logits.new_empty(T, active)
        scores = torch.empty_like(logits)
        library("route_forward", torch.float32)(
            logits.data_ptr(), _pointer(bias), ids.data_ptr(), weights.data_ptr(),
            scores.data_ptr(), T, _numbers(*shape), scaling, torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(ids, scores)
        ctx.shape, ctx.scaling, ctx.library = shape, scaling, library
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)
        return ids, weights, scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        ids, scores = ctx.saved_tensors
        grad_weights, grad_scores = grads[1], grads[2]
        grad_weights = torch.zeros(ids.shape) if grad_weights is None else grad_weights.contiguous()
        grad_scores = None if grad_scores is None else grad_scores.contiguous()
        grad_logits = torch.empty_like(scores)
        ctx.library("route_backward", torch.float32)(
            ids.data_ptr(), scores.data_ptr(), grad_weights.data_ptr(),
            _pointer(grad_scores), grad_logits.data_ptr(),
            len(ids), _numbers(*ctx.shape), ctx.scaling, torch.get_num_threads(),
        )  # fmt: skip
        return grad_logits, None, None, None, None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, library: Library
    ) -> Tensor:
        x, ids, weights = x.contiguous(), ids.contiguous(), weights.float().contiguous()
        (T, A), (E, D, F_) = ids.shape, down.shape
        rows = T * A
        y, hidden = torch.empty_like(x), x.new_empty(rows, 2 * F_)
        choice, place = (ids.new_empty(rows, dtype=torch.int32) for _ in range(2))
        start = ids.new_empty(E + 1, dtype=torch.int32)
        library("experts_forward", x.dtype)(
            x.data_ptr(), ids.data_ptr(), weights.data_ptr(), gate_up.data_ptr(), down.data_ptr(), y.data_ptr(),
            hidden.data_ptr(), choice.data_ptr(), place.data_ptr(), start.data_ptr(),
            _numbers(T, A, E, D, F_), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(x, weights, gate_up, down, hidden, choice, place, start)
        ctx.library = library
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        x, weights, gate_up, down, hidden, choice, place, start = ctx.saved_tensors
        grad = grads[0].contiguous()
        (T, A), (E, D, F_) = weights.shape, down.shape
        grad_x, grad_weights = torch.empty_like(x), torch.empty_like(weights)
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        ctx.library("experts_backward", x.dtype)(
            x.data_ptr(), weights.data_ptr(), gate_up.data_ptr(), down.data_ptr(), hidden.data_ptr(), grad.data_ptr(),
            grad_x.data_ptr(), grad_weights.data_ptr(), grad_gate_up.data_ptr(), grad_down.data_ptr(),
            choice.data_ptr(), place.data_ptr(), start.data_ptr(), _numbers(T, A, E, D, F_), torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, None, grad_weights, grad_gate_up, grad_down, None


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, library: Library) -> Tensor:
        x = x.contiguous()
        D, F_ = down.shape
        T = x.numel() // D
        y, hidden = torch.empty_like(x), x.new_empty(T, 2 * F_)
        library("feed_forward_forward", x.dtype)(
            x.data_ptr(), gate_up.data_ptr(), down.data_ptr(), y.data_ptr(), hidden.data_ptr(),
            _numbers(T, D, F_), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(x, gate_up, down, hidden)
        ctx.library = library
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        x, gate_up, down, hidden = ctx.saved_tensors
        grad = grads[0].contiguous()
        (D, F_), T = down.shape, len(hidden)
        grad_x, grad_gate_up, grad_down = (torch.empty_like(tensor) for tensor in (x, gate_up, down))
        ctx.library("feed_forward_backward", x.dtype)(
            x.data_ptr(), gate_up.data_ptr(), down.data_ptr(), hidden.data_ptr(), grad.data_ptr(), grad_x.data_ptr(),
            grad_gate_up.data_ptr(), grad_down.data_ptr(),
            _numbers(T, D, F_), torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, grad_gate_up, grad_down, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, library: Library) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.library = library
        return _product(library, x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        x, weight = ctx.saved_tensors
        return *_product_backward(ctx.library, x, weight, grads[0].contiguous()), None


def _product(library: Library, x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] weight [N, K]^T -> [..., N]"""
    N, K = weight.shape
    y = x.new_empty(*x.shape[:-1], N)
    library("linear_forward", x.dtype)(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), _numbers(x.numel() // K, K, N), torch.get_num_threads()
    )
    return y


def _product_backward(library: Library, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    N, K = weight.shape
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    library("linear_backward", x.dtype)(
        x.data_ptr(), weight.data_ptr(), grad.data_ptr(), grad_x.data_ptr(), grad_weight.data_ptr(),
        _numbers(x.numel() // K, K, N), torch.get_num_threads(),
    )  # fmt: skip
    return grad_x, grad_weight


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, library: Library, by_torch: bool
    ) -> tuple[Tensor, Tensor]:
        hidden, head, targets = hidden.contiguous(), head.contiguous(), targets.contiguous()
        logits = F.linear(hidden, head) if by_torch else _product(library, hidden, head)
        T, W = logits.shape
        logprobs, entropy, log_sums = (logits.new_empty(T, dtype=torch.float32) for _ in range(3))
        library("logprobs_forward", logits.dtype)(
            logits.data_ptr(), targets.data_ptr(), logprobs.data_ptr(), entropy.data_ptr(), log_sums.data_ptr(),
            T, W, torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(hidden, head, targets, logits, log_sums)
        ctx.library, ctx.by_torch = library, by_torch
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        hidden, head, targets, logits, log_sums = ctx.saved_tensors
        grad, grad_logits = grads[0].contiguous(), torch.empty_like(logits)
        T, W = logits.shape
        ctx.library("logprobs_backward", logits.dtype)(
            logits.data_ptr(), targets.data_ptr(), log_sums.data_ptr(), grad.data_ptr(), grad_logits.data_ptr(),
            T, W, torch.get_num_threads(),
        )  # fmt: skip
        if ctx.by_torch:
            return grad_logits @ head, grad_logits.t() @ hidden, None, None, None
        return *_product_backward(ctx.library, hidden, head, grad_logits), None, None, None


class CpuKernels:
    """The operations on one compiled library; each as its namesake in `ops/reference.py`.

    bf16_by_torch   whether torch's own products of bf16 numbers are fast on this CPU; in fp32 they always are
    """

    def __init__(self, library: Library, bf16_by_torch: bool) -> None:
        self.library, self.bf16_by_torch = library, bf16_by_torch

    def _by_torch(self, x: Tensor) -> bool:
        return self.bf16_by_torch or x.dtype != torch.bfloat16

    def linear(self, x: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
        if self._by_torch(x):
            return F.linear(x, weight_ND, bias_N)
        y = _Linear.apply(x, weight_ND, self.library)
        return y if bias_N is None else y + bias_N

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _RmsNorm.apply(x, weight.to(x.dtype), eps, self.library)

    def add_rms_norm(self, x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return _AddRmsNorm.apply(x, added, weight.to(x.dtype), eps, self.library)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleave: bool) -> Tensor:
        return _Rotate.apply(x, cos, sin, interleave, self.library)

    def attention(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, mask_BTS: Tensor, scale: float) -> Tensor:
        return _Attention.apply(q_BHTK, k_BGSK, v_BGSV, mask_BTS, scale, self.library)

    def latent_attention(
        self, q_BTHK: Tensor, kv_BTHX: Tensor, key_BTR: Tensor, mask_BTS: Tensor, scale: float
    ) -> Tensor:
        return _LatentAttention.apply(q_BTHK, kv_BTHX, key_BTR, mask_BTS, scale, self.library)

    def feed_forward(self, x: Tensor, gate_up_FD: Tensor, down_DF: Tensor) -> Tensor:
        return _FeedForward.apply(x, gate_up_FD, down_DF, self.library)

    def gate(self, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        return _Gate.apply(x_TD, weight_ED.float(), self.library)

    def route(
        self,
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
        shape = (logits_TE.shape[1], active, groups, groups_kept, int(scoring == "sigmoid"), int(normalise))
        return _Route.apply(logits_TE, bias_E, shape, scaling, self.library)

    def experts(
        self, x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        return _Experts.apply(x_TD, ids_TA, weights_TA, gate_up_EFD, down_EDF, self.library)

    def token_logprobs(self, hidden_TD: Tensor, head_WD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        return _TokenLogprobs.apply(hidden_TD, head_WD, targets_T, self.library, self._by_torch(hidden_TD))

    def orthogonalise(self, matrices_nRC: Tensor) -> Tensor:
        n, R, C = matrices_nRC.shape
        if self.bf16_by_torch or R * C > MOST_ORTHOGONALISED:
            return reference.orthogonalise(matrices_nRC, torch.bfloat16 if self.bf16_by_torch else torch.float32)
        x = (matrices_nRC.mT if R > C else matrices_nRC).to(
            torch.float32, memory_format=torch.contiguous_format, copy=True
        )
        self.library("orthogonalise", torch.float32)(
            x.data_ptr(), n, min(R, C), max(R, C), (ctypes.c_float * 3)(*reference.NEWTON_SCHULZ),
            reference.NEWTON_SCHULZ_STEPS, torch.get_num_threads(),
        )  # fmt: skip
        return x.mT if R > C else x
