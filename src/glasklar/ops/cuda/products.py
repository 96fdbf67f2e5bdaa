"""Products of rows and weights in Triton.

A result is the sum over k in ascending order in one fp32 accumulator, whatever the tile: the tensor cores take sixteen
values of k at a time in every shape that they have, fp32 is summed one by one. So tiles are chosen by the number of
rows for speed alone, and a row's bits do not depend on its company (`tests/engine/test_cuda_network.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from glasklar.ops.paged import Parts

PIECE = 256  # of a gate's sums


class Tile(NamedTuple):
    """What one program computes: `outputs` x `rows`, `depth` values of k at a time."""

    outputs: int
    rows: int
    depth: int
    warps: int
    stages: int


def tile_for(
    rows: int, outputs: int, depth: int, dtype: torch.dtype, *, split: bool = False, turned: bool = False
) -> Tile:
    """Few rows: narrow tiles, so that all of the chip reads weights. Many: large ones, for arithmetic.

    split    weights wider than the rows (`_product`)
    turned   the outputs' weights for one k lie side by side
    """
    if split:
        tile = Tile(16, 16, 256, 4, 2) if rows <= 16 else Tile(16, 32 if rows <= 512 else 64, 128, 4, 3)
    elif dtype == torch.float32:
        tile = Tile(16, 16, 256, 4, 2) if rows <= 16 else Tile(64, 64, 32, 8, 2)
    elif turned and rows <= 64:
        tile = Tile(64, max(16, triton.next_power_of_2(rows)), 128, 4, 2)
    elif rows <= 16:
        tile = Tile(16, 16, 256, 2, 4) if outputs < 1 << 14 else Tile(64, 16, 128, 4, 4)
    elif rows <= 64:
        tile = Tile(16 if outputs < 1 << 13 else 64, 32 if rows <= 32 else 64, 128, 4, 4)
    else:
        tile = Tile(128, 128, 64, 8, 3)
    return tile._replace(depth=min(tile.depth, max(16, triton.next_power_of_2(depth))))


@triton.jit
def _product(
    x, w, bias, out, T, K, N, N1, N2, w1, w2, bias1, bias2, blocks, blocks1, x_t, x_h, w_h, w_n, w_k, out_t, out_h,
    SEVERAL: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Of up to three matrices, whose outputs lie side by side. w1, w2, bias1, bias2: distances from the first one.

    SPLIT: fp32 weights and bf16 rows; a weight is the sum of three numbers in bf16 exactly."""
    block = tl.program_id(0)
    n = block * BN + tl.arange(0, BN)
    column = n
    if SEVERAL:
        later = block >= blocks
        last = block >= blocks + blocks1
        begin = tl.where(last, blocks + blocks1, tl.where(later, blocks, 0))
        n = (block - begin) * BN + tl.arange(0, BN)
        column = n + tl.where(last, N + N1, tl.where(later, N, 0))
        w += tl.where(last, w2, tl.where(later, w1, 0))
        if HAS_BIAS:
            bias += tl.where(last, bias2, tl.where(later, bias1, 0))
        N = tl.where(last, N2, tl.where(later, N1, N))
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    h = tl.program_id(2).to(tl.int64)
    w_rows = w + h * w_h + n.to(tl.int64)[:, None] * w_n
    x_rows = x + h * x_h + t.to(tl.int64)[None, :] * x_t
    acc = tl.zeros([BN, BT], tl.float32)
    if SPLIT:
        middle = tl.zeros([BN, BT], tl.float32)
        low = tl.zeros([BN, BT], tl.float32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        w_tile = tl.load(w_rows + k[None, :] * w_k, mask=(n[:, None] < N) & (k[None, :] < K), other=0)
        x_tile = tl.load(x_rows + k[:, None], mask=(t[None, :] < T) & (k[:, None] < K), other=0)
        if SPLIT:
            high_part = w_tile.to(tl.bfloat16)
            rest = w_tile - high_part.to(tl.float32)
            middle_part = rest.to(tl.bfloat16)
            acc = tl.dot(high_part, x_tile, acc)
            middle = tl.dot(middle_part, x_tile, middle)
            low = tl.dot((rest - middle_part.to(tl.float32)).to(tl.bfloat16), x_tile, low)
        else:
            acc = tl.dot(w_tile, x_tile.to(w_tile.dtype), acc, input_precision="ieee")
    if SPLIT:
        acc += middle + low
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[:, None]
    place = out + h * out_h + t.to(tl.int64)[None, :] * out_t + column[:, None]
    tl.store(place, acc, mask=(t[None, :] < T) & (n[:, None] < N))


def product(x: Tensor, w: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """As `paged.product`."""
    return _launch(x, [w], [bias], dtype)


def products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """As `paged.products`; the results lie side by side."""
    if len(weights) > 3 or len({bias is None for bias in biases}) > 1:
        return [product(x, w, bias) for w, bias in zip(weights, biases, strict=True)]
    return list(_launch(x, weights, biases, torch.float32).split([len(w) for w in weights], -1))


def gate(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """As `paged.gate`. Its sums are small: pieces of them are taken side by side, the same for any number of rows."""
    (T, D), E = x_TD.shape, len(weight_ED)
    pieces = D // PIECE if D % PIECE == 0 else 1
    return product(x_TD.view(T, pieces, -1), weight_ED.view(E, pieces, -1).transpose(0, 1))


def _launch(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    w, bias, rows = weights[0], biases[0], len(x)
    heads, K = (w.shape[0] if w.ndim == 3 else 1), w.shape[-1]
    counts = [each.shape[-2] for each in weights] + [0] * (3 - len(weights))
    out = torch.empty(rows, *(() if w.ndim == 2 else (heads,)), sum(counts), dtype=dtype, device=x.device)
    assert x.stride(-1) == 1
    assert all(each.stride() == w.stride() and each.dtype == w.dtype for each in weights)
    split = w.dtype == torch.float32 and x.dtype == torch.bfloat16
    tile = tile_for(rows, sum(counts), K, w.dtype, split=split, turned=w.stride(-1) != 1)
    blocks = [triton.cdiv(count, tile.outputs) for count in counts]
    strides = (x.stride(1), w.stride(0), out.stride(1)) if w.ndim == 3 else (0, 0, 0)
    _product[(sum(blocks), triton.cdiv(rows, tile.rows), heads)](
        x, w, bias, out, rows, K, *counts, *_distances(weights), *_distances(biases), blocks[0], blocks[1],
        x.stride(0), strides[0], strides[1], w.stride(-2), w.stride(-1), out.stride(0), strides[2], len(weights) > 1,
        bias is not None, split, tile.outputs, tile.rows, tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _distances(tensors: Sequence[Tensor | None]) -> list[int]:
    """Of the second and third tensor from the first, in values."""
    first = tensors[0]
    found = [0 if first is None or t is None else (t.data_ptr() - first.data_ptr()) // t.itemsize for t in tensors[1:]]
    return found + [0] * (2 - len(found))


@triton.jit
def _gated(
    x, ids, members, counts, w, bias, out, T, F, K, E, active, x_t, w_e, w_n, w_k, out_t,
    GROUPED: tl.constexpr, ONE: tl.constexpr, CLAMPED: tl.constexpr, alpha, limit,
    EXPERTS: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up. GROUPED: of the tokens of one expert, each by its place t * active + slot. ONE: of one token."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    count = T
    e = 0
    if ONE:
        e = tl.load(ids + tl.program_id(2))
    elif GROUPED:
        e, count = _nth_expert(counts, tl.program_id(2), E, EXPERTS)
    expert = e.to(tl.int64) if GROUPED else 0  # type: ignore[attr-defined]
    if CLAMPED:
        gate_row, up_row = 2 * n, 2 * n + 1
    else:
        gate_row, up_row = n, F + n
    w_gate = w + expert * w_e + gate_row.to(tl.int64)[:, None] * w_n
    w_up = w + expert * w_e + up_row.to(tl.int64)[:, None] * w_n
    for begin in range(tl.program_id(1) * BT, count, BT * tl.num_programs(1)):
        i = begin + tl.arange(0, BT)
        if ONE:
            place = i + tl.program_id(2)
            token = i
        elif GROUPED:
            place = tl.load(members + expert * T * active + i, mask=i < count, other=0)
            token = place // active
        else:
            place = i
            token = i
        x_rows = x + token.to(tl.int64)[None, :] * x_t
        gate = tl.zeros([BN, BT], tl.float32)
        up = tl.zeros([BN, BT], tl.float32)
        for first in range(0, K, BK):
            k = first + tl.arange(0, BK)
            inside = (n[:, None] < F) & (k[None, :] < K)
            x_tile = tl.load(x_rows + k[:, None], mask=(i[None, :] < count) & (k[:, None] < K), other=0)
            gate_tile = tl.load(w_gate + k[None, :] * w_k, mask=inside, other=0)
            up_tile = tl.load(w_up + k[None, :] * w_k, mask=inside, other=0)
            gate = tl.dot(gate_tile, x_tile.to(gate_tile.dtype), gate, input_precision="ieee")
            up = tl.dot(up_tile, x_tile.to(up_tile.dtype), up, input_precision="ieee")
        if CLAMPED:
            gate += tl.load(bias + expert * 2 * F + gate_row, mask=n < F, other=0).to(tl.float32)[:, None]
            up += tl.load(bias + expert * 2 * F + up_row, mask=n < F, other=0).to(tl.float32)[:, None]
            gate = tl.where(gate > limit, limit, gate)  # NaN stays
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
            hidden = gate * tl.sigmoid(alpha * gate) * (up + 1)
        else:
            hidden = gate * tl.sigmoid(gate) * up
        to = out + place.to(tl.int64)[None, :] * out_t + n[:, None]
        tl.store(to, hidden, mask=(i[None, :] < count) & (n[:, None] < F))


@triton.jit
def _down(
    x, ids, members, counts, w, bias, out, P, N, K, E, x_t, w_e, w_n, w_k, out_t,
    ONE: tl.constexpr, HAS_BIAS: tl.constexpr, EXPERTS: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    if ONE:
        e, count = tl.load(ids + tl.program_id(2)), 1
    else:
        e, count = _nth_expert(counts, tl.program_id(2), E, EXPERTS)
    expert = e.to(tl.int64)
    w_rows = w + expert * w_e + n.to(tl.int64)[:, None] * w_n
    for begin in range(tl.program_id(1) * BT, count, BT * tl.num_programs(1)):
        i = begin + tl.arange(0, BT)
        place = i + tl.program_id(2) if ONE else tl.load(members + expert * P + i, mask=i < count, other=0)
        x_rows = x + place.to(tl.int64)[None, :] * x_t
        acc = tl.zeros([BN, BT], tl.float32)
        for first in range(0, K, BK):
            k = first + tl.arange(0, BK)
            w_tile = tl.load(w_rows + k[None, :] * w_k, mask=(n[:, None] < N) & (k[None, :] < K), other=0)
            x_tile = tl.load(x_rows + k[:, None], mask=(i[None, :] < count) & (k[:, None] < K), other=0)
            acc = tl.dot(w_tile, x_tile.to(w_tile.dtype), acc, input_precision="ieee")
        if HAS_BIAS:
            acc += tl.load(bias + expert * N + n, mask=n < N, other=0).to(tl.float32)[:, None]
        to = out + place.to(tl.int64)[None, :] * out_t + n[:, None]
        tl.store(to, acc, mask=(i[None, :] < count) & (n[:, None] < N))


@triton.jit
def _nth_expert(counts, nth, E, EXPERTS: tl.constexpr):
    """The n-th expert that any token has chosen, and how many have; 0 tokens where there are not so many experts."""
    every = tl.arange(0, EXPERTS)
    count = tl.load(counts + every, mask=every < E, other=0)
    busy = (count > 0).to(tl.int32)
    mine = (busy > 0) & (tl.cumsum(busy, 0) - 1 == nth)
    return tl.sum(tl.where(mine, every, 0), 0), tl.sum(tl.where(mine, count, 0), 0)


@triton.jit
def _group(ids, members, counts, P, BLOCK: tl.constexpr):
    """The places of one expert in the order of the tokens."""
    e = tl.program_id(0)
    count = 0
    for first in range(0, P, BLOCK):
        p = first + tl.arange(0, BLOCK)
        mine = (tl.load(ids + p, mask=p < P, other=-1) == e).to(tl.int32)
        rank = count + tl.cumsum(mine, 0) - 1
        tl.store(members + e.to(tl.int64) * P + rank, p, mask=mine > 0)
        count += tl.sum(mine, 0)
    tl.store(counts + e, count)


def gated_product(x_TD: Tensor, gate_up_FD: Tensor) -> Tensor:
    """As `paged.gated_product`."""
    T, F = len(x_TD), gate_up_FD.shape[0] // 2
    out = torch.empty(T, F, dtype=gate_up_FD.dtype, device=x_TD.device)
    tile = _gated_tile(T, F, gate_up_FD)
    grid = (triton.cdiv(F, tile.outputs), triton.cdiv(T, tile.rows), 1)
    _gated[grid](
        x_TD, None, None, None, gate_up_FD, None, out, T, F, gate_up_FD.shape[1], 1, 1, x_TD.stride(0), 0,
        gate_up_FD.stride(0), gate_up_FD.stride(1), out.stride(0), False, False, False, 0.0, 0.0, 1,
        tile.outputs, tile.rows, tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _gated_tile(rows: int, outputs: int, w: Tensor) -> Tile:
    tile = tile_for(rows, outputs, w.shape[-1], w.dtype)
    if tile.rows > 64:  # two sums at once
        return tile._replace(outputs=64)
    return tile if w.dtype == torch.float32 else tile._replace(stages=3)


def _expert_tiles(rows: int, width: int, hidden: int, dtype: torch.dtype) -> tuple[Tile, Tile]:
    """For gate and up, and down, of experts that `rows` tokens each choose on average; some choose more."""
    if dtype == torch.float32:
        many = 2 * rows if rows > 8 else rows
        return tile_for(many, hidden, width, dtype), tile_for(many, width, hidden, dtype)
    if rows <= 8:
        tiles = Tile(64, 16, 128, 4, 3), Tile(64, 16, 128, 4, 4)
    elif rows <= 16:
        tiles = Tile(64, 32, 128, 4, 3), Tile(64, 32, 128, 4, 3)
    elif rows <= 64:
        tiles = Tile(64, 64, 64, 4, 4), Tile(128, 64, 64, 4, 4)
    else:
        tiles = Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 4)
    return tiles


def experts(
    x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor, gate_up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None], shared_TD: Tensor | None, clamp: tuple[float, float] | None,
) -> Parts:  # fmt: skip
    """As `paged.experts`."""
    (T, A), (E, D, F) = ids_TA.shape, down[0].shape
    device, P = x_TD.device, T * A
    members = torch.empty(E, P, dtype=torch.int32, device=device)
    counts = torch.empty(E, dtype=torch.int32, device=device)
    if T > 1:
        _group[(E,)](ids_TA, members, counts, P, min(1024, max(16, triton.next_power_of_2(P))), num_warps=1)
    many = triton.cdiv(P, E)  # tokens of an expert, if all are chosen alike
    busy, EXPERTS = min(P, E), triton.next_power_of_2(E)
    hidden = torch.empty(P, F, dtype=gate_up[0].dtype, device=device)
    alpha, limit = clamp or (0.0, 0.0)
    tile, down_tile = _expert_tiles(many, D, F, down[0].dtype)
    spread = max(1, min(4, triton.cdiv(many, tile.rows)))
    _gated[(triton.cdiv(F, tile.outputs), spread, busy)](
        x_TD, ids_TA, members, counts, gate_up[0], gate_up[1], hidden, T, F, D, E, A, x_TD.stride(0),
        gate_up[0].stride(0), gate_up[0].stride(1), gate_up[0].stride(2), hidden.stride(0), True, T == 1,
        clamp is not None, alpha, limit, EXPERTS,
        tile.outputs, tile.rows, tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    parts = torch.empty(P, D, dtype=torch.float32, device=device)
    tile = down_tile
    spread = max(1, min(4, triton.cdiv(many, tile.rows)))
    _down[(triton.cdiv(D, tile.outputs), spread, busy)](
        hidden, ids_TA, members, counts, down[0], down[1], parts, P, D, F, E, hidden.stride(0), down[0].stride(0),
        down[0].stride(1), down[0].stride(2), parts.stride(0), T == 1, down[1] is not None, EXPERTS,
        tile.outputs, tile.rows, tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return Parts(parts.view(T, A, D), weights_TA, shared_TD)
