"""What a pass of the engine over pages of its cache is made of, in plain PyTorch: any device, any float type. The
oracle for the kernels in `cuda/`, which share these signatures.

Every token of a pass is a row: of a prompt, of an answer, of a guess. Its numbers in the cache [pages, PAGE, width] lie
where the table of its sequence says. The residual stream and sums are fp32; what products take is in the weights' type.

    cache   [pages, PAGE, width]: rows of a layer, each with room behind its numbers if that is wanted
    where   positions [T] (-1: the row fills up a pass, nothing more), sequences [T], tables [sequences, pages]: int32
    angles  cos and sin of the rotary positions [positions, R/2], fp32
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glasklar.ops import reference

Where = tuple[Tensor, Tensor, Tensor]
Angles = tuple[Tensor, Tensor]


class Parts(NamedTuple):
    """What experts give [T, A, D], their weights [T, A], and what the shared ones give [T, D]: not added up yet."""

    parts_TAD: Tensor
    weights_TA: Tensor
    shared_TD: Tensor | None

    def rows(self, places: Tensor) -> Parts:
        shared = None if self.shared_TD is None else self.shared_TD[places]
        return Parts(self.parts_TAD[places], self.weights_TA[places], shared)


def add_norm(
    x_TD: Tensor, added: Tensor | Parts | None, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + added in fp32, and its norm in `dtype`. Parts are added in their order, the shared one first."""
    total = x_TD
    if isinstance(added, Parts):
        total = total if added.shared_TD is None else total + added.shared_TD
        for slot in range(added.weights_TA.shape[1]):
            total = total + added.weights_TA[:, slot, None] * added.parts_TAD[:, slot]
    elif added is not None:
        total = total + added
    return total, reference.rms_norm(total, weight_D, eps).to(dtype)


def product(x: Tensor, w: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """x W^T + b: `x` [T, K] and `w` [N, K], or [T, H, K] and [H, N, K]; `x` is rounded to the type of `w`."""
    x = x.to(w.dtype).float()
    out = torch.einsum("thk,hnk->thn", x, w.float()) if w.ndim == 3 else x @ w.float().T
    return (out if bias is None else out + bias.float()).to(dtype)


def products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """`product` of the same rows with several matrices [N, K]."""
    return [product(x, w, bias) for w, bias in zip(weights, biases, strict=True)]


def gated_product(x_TD: Tensor, gate_up_FD: Tensor) -> Tensor:
    """silu(gate x) * up x [T, F] in the type of the weights."""
    return reference.swiglu(product(x_TD, gate_up_FD)).to(gate_up_FD.dtype)


def turn_latent(
    q_THK: Tensor, kv_TX: Tensor, norm_C: Tensor, eps: float, angles: Angles, interleave: bool, where: Where,
    cache: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Queries [T, H, N] and their turned parts [T, H, R] of MLA; latent and turned key go to the cache (V3 eq. 1-9)."""
    C = len(norm_C)
    cos, sin = _at(angles, where[0])
    q = reference.rotate(q_THK, cos[:, None], sin[:, None], interleave)
    key = reference.rotate(kv_TX[:, C:], cos, sin, interleave)
    _keep(torch.cat((reference.rms_norm(kv_TX[:, :C], norm_C, eps), key), -1), where, cache)
    R = 2 * cos.shape[-1]
    nope, tail = q.to(dtype).split((q.shape[-1] - R, R), -1)
    return nope, tail


def turn_heads(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float, angles: Angles,
    interleave: bool, where: Where, cache: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Turned queries [T, H, K] of grouped-query attention; keys and values go to the cache, head by head."""
    if norms is not None:
        q_THK, k_TGK = (reference.rms_norm(x, norm, eps) for x, norm in zip((q_THK, k_TGK), norms, strict=True))
    cos, sin = (x[:, None] for x in _at(angles, where[0]))
    _keep(torch.cat((reference.rotate(k_TGK, cos, sin, interleave), v_TGV), -1).flatten(1), where, cache)
    return reference.rotate(q_THK, cos, sin, interleave).to(dtype)


def _at(angles: Angles, positions_T: Tensor) -> Angles:
    known = positions_T.clamp(min=0)
    return angles[0][known], angles[1][known]


def _keep(rows_TX: Tensor, where: Where, cache: Tensor) -> None:
    positions, sequences, tables = where
    real = positions >= 0
    place, page = positions[real], cache.shape[1]
    pages = tables[sequences[real], place // page]
    cache[pages, place % page, : rows_TX.shape[1]] = rows_TX[real].to(cache.dtype)


def attend(
    main_THX: Tensor, tail_THR: Tensor | None, cache: Tensor, where: Where, tiles: tuple[Tensor, Tensor, int], *,
    kv_heads: int, value: int, scale: float, longest: int, window: int = 0, sinks_H: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Each token's mix of values [T, H, V] over its sequence up to itself.

    main, tail   queries [T, H, C] and [T, H, R] over latents, whose first V = C values are the values; or [T, H, K]
                 and None over keys and values of `kv_heads` heads
    tiles        tokens that follow each other in a sequence: first ones, how many [tiles], and how many at most
    longest      tokens of the longest sequence, or more
    window       how many tokens a query sees, itself included; 0: all
    sinks        a score for each head that takes part in its softmax and brings no value
    """
    positions, sequences, tables = where
    H, X = main_THX.shape[1:]
    q_THX = main_THX if tail_THR is None else torch.cat((main_THX, tail_THR), -1)
    out = torch.zeros(len(positions), H, value, dtype=main_THX.dtype, device=main_THX.device)
    for t, position in enumerate(positions.tolist()):
        begin = max(0, position + 1 - window) if window else 0
        place = torch.arange(begin, position + 1, device=cache.device)
        if not len(place):
            continue
        rows_SX = cache[tables[sequences[t], place // cache.shape[1]], place % cache.shape[1]].float()
        width = X + value if tail_THR is None else X + tail_THR.shape[-1]
        keys_SGX = rows_SX[:, : kv_heads * width].unflatten(-1, (kv_heads, width))
        values_SGV = keys_SGX[..., X:] if tail_THR is None else keys_SGX[..., :value]
        keys_SGX = keys_SGX[..., :X] if tail_THR is None else keys_SGX
        q_GhX = q_THX[t].float().unflatten(0, (kv_heads, -1))
        scores = torch.einsum("ghx,sgx->ghs", q_GhX, keys_SGX) * scale
        if sinks_H is not None:
            scores = torch.cat((scores, sinks_H.float().view(kv_heads, -1, 1)), -1)
        weights = scores.softmax(-1)[..., : len(place)]
        out[t] = torch.einsum("ghs,sgv->ghv", weights, values_SGV).flatten(0, 1).to(out.dtype)
    return out


def gate(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Logits with fp32 weights, in pieces [T, P, E] that are still to be added up."""
    return product(x_TD, weight_ED)[:, None]


def route(
    logits_TPE: Tensor, bias_E: Tensor | None, choice_bias_E: Tensor | None, *, active: int, groups: int,
    groups_kept: int, scoring: str, normalise: bool, scaling: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `reference.route`, of the sum of the pieces and `bias`: ids [T, A] (int32) and weights [T, A] (fp32)."""
    logits_TE = logits_TPE.sum(1) if bias_E is None else logits_TPE.sum(1) + bias_E
    ids, weights, _ = reference.route(
        logits_TE, choice_bias_E, active=active, groups=groups, groups_kept=groups_kept, scoring=scoring,
        normalise=normalise, scaling=scaling,
    )  # fmt: skip
    return ids.int(), weights


def experts(
    x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor, gate_up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None], shared_TD: Tensor | None, clamp: tuple[float, float] | None,
) -> Parts:  # fmt: skip
    """What each chosen expert gives, beside what is known already: weights and the shared experts' part.

    gate_up, down   weights [E, 2F, D] and [E, D, F] with their biases [E, 2F] and [E, D], or None
    clamp           alpha and limit of gpt-oss (`reference.clamped_swiglu`); None: plain SwiGLU
    """
    parts_TAD = torch.empty(*ids_TA.shape, x_TD.shape[1], device=x_TD.device)
    for expert in ids_TA.unique().tolist():
        rows, slots = (ids_TA == expert).nonzero(as_tuple=True)
        bias = [None if b is None else b[expert] for _, b in (gate_up, down)]
        both = product(x_TD[rows], gate_up[0][expert], bias[0])
        hidden = reference.swiglu(both) if clamp is None else reference.clamped_swiglu(both, *clamp)
        parts_TAD[rows, slots] = product(hidden, down[0][expert], bias[1])
    return Parts(parts_TAD, weights_TA, shared_TD)


def draw(logits_OW: Tensor, temperature_O: Tensor, uniform_O: Tensor, coldest: float) -> tuple[Tensor, Tensor]:
    """Tokens [O] (int32), and their log-probabilities at temperature 1 (fp32; NaN where the logits are not finite): the
    first token whose cumulative probability exceeds the number; below `coldest` the most probable one."""
    greedy = temperature_O < coldest
    heat = torch.where(greedy, 1.0, temperature_O)[:, None]
    cumulative = (logits_OW / heat).softmax(-1).cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(cumulative, (uniform_O * cumulative[:, -1])[:, None], right=True)[:, 0]
    tokens = torch.where(greedy, logits_OW.argmax(-1), drawn.clamp(max=logits_OW.shape[-1] - 1))
    logprobs = F.log_softmax(logits_OW, -1).gather(-1, tokens[:, None])[:, 0]
    return tokens.int(), logprobs


@dataclass(frozen=True, kw_only=True)
class PagedOps:
    """One implementation of the functions above."""

    name: str
    add_norm: Callable[..., Any] = add_norm
    product: Callable[..., Any] = product
    products: Callable[..., Any] = products
    gated_product: Callable[..., Any] = gated_product
    turn_latent: Callable[..., Any] = turn_latent
    turn_heads: Callable[..., Any] = turn_heads
    attend: Callable[..., Any] = attend
    gate: Callable[..., Any] = gate
    route: Callable[..., Any] = route
    experts: Callable[..., Any] = experts
    draw: Callable[..., Any] = draw


REFERENCE = PagedOps(name="reference")
