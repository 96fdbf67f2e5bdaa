"""Attention over the pages of the cache in Triton: latent (absorbed MLA) and grouped-query in one kernel.

Scores and sums lie the other way round, keys or values by queries: what comes from the cache is then the operand of
which the tensor cores take 64 rows at a time, and few queries do not fill up to that.

The keys of a query lie in spans of a fixed length from position 0 on. A program takes one span for some heads of one
token, or of several that follow each other (flash-decoding, arXiv 2311.01282); what the spans brought is joined in
their order. Where a span begins depends on positions alone, so a token's bits do not depend on its company.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

SPAN = 256
KEYS = 64  # read at a time, a divisor of SPAN
PARTIAL_BYTES = 1 << 28  # of what spans bring before they are joined


@triton.jit
def _attend(
    main, tail, cache, tables, positions, sequences, firsts, counts, values, maxima, sums,
    tile_begin, most, H, group, blocks, spans, width, row_width, scale, window,
    MAIN_W: tl.constexpr, TAIL_W: tl.constexpr, VALUE_W: tl.constexpr, SHARED: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    PAGE: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile = tile_begin + tl.program_id(0)
    span = tl.program_id(2)
    kv = tl.program_id(1) // blocks
    first = tl.load(firsts + tile)
    count = tl.load(counts + tile)
    last = tl.load(positions + first + count - 1)
    begin = span * SPAN
    if begin > last:
        return
    r = tl.arange(0, ROWS)
    token = r // HEADS
    own = tl.program_id(1) % blocks * HEADS + r % HEADS
    valid = (token < count) & (own < group)
    head = kv * group + own
    t = (first + token).to(tl.int64)
    position = tl.load(positions + t, mask=valid, other=-1)
    m = tl.arange(0, MAIN)
    v = tl.arange(0, VALUE)
    at = t * H + head
    q = tl.load(main + at[None, :] * MAIN_W + m[:, None], mask=valid[None, :] & (m[:, None] < MAIN_W), other=0)
    if TAIL_W > 0:
        r_dims = tl.arange(0, TAIL)
        q_tail = tl.load(
            tail + at[None, :] * TAIL_W + r_dims[:, None], mask=valid[None, :] & (r_dims[:, None] < TAIL_W), other=0
        )
    table = tables + tl.load(sequences + first).to(tl.int64) * width
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mixed = tl.zeros([VALUE, ROWS], tl.float32)
    ones = tl.full([64, KEYS], 1.0, q.dtype)
    total = tl.zeros([64, ROWS], tl.float32)  # the same sum in each: the tensor cores add in a fixed order
    end = tl.minimum(begin + SPAN, last + 1)
    if window > 0:
        lowest = tl.min(tl.where(valid, position, last), 0) - window + 1
        begin = tl.maximum(begin, lowest // KEYS * KEYS)
    for k0 in range(begin, end, KEYS):
        key = k0 + tl.arange(0, KEYS)
        inside = key < end
        page = tl.load(table + key // PAGE, mask=inside, other=0).to(tl.int64)
        row = cache + (page * PAGE + key % PAGE) * row_width + kv * (0 if SHARED else MAIN_W + VALUE_W)
        k_main = tl.load(row[:, None] + m[None, :], mask=inside[:, None] & (m[None, :] < MAIN_W), other=0)
        scores = tl.dot(k_main, q, input_precision="ieee")
        if TAIL_W > 0:
            k_tail = tl.load(
                row[:, None] + MAIN_W + r_dims[None, :], mask=inside[:, None] & (r_dims[None, :] < TAIL_W), other=0
            )
            scores = tl.dot(k_tail, q_tail, scores, input_precision="ieee")
        seen = inside[:, None] & (key[:, None] <= position[None, :])
        if window > 0:
            seen = seen & (key[:, None] > position[None, :] - window)
        scores = tl.where(seen, scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        faded = tl.exp2(top - base)
        chances = tl.exp2(scores - base[None, :]).to(q.dtype)
        if SHARED:
            k_value = k_main
        else:
            k_value = tl.load(
                row[:, None] + MAIN_W + v[None, :], mask=inside[:, None] & (v[None, :] < VALUE_W), other=0
            )
        mixed = tl.dot(tl.trans(k_value), chances, mixed * faded[None, :], input_precision="ieee")
        total = tl.dot(ones, chances, total * faded[None, :], input_precision="ieee")
        top = new_top
    place = ((tl.program_id(0).to(tl.int64) * most + token) * H + head) * spans + span
    tl.store(values + place[None, :] * VALUE_W + v[:, None], mixed, mask=valid[None, :] & (v[:, None] < VALUE_W))
    tl.store(maxima + place, top, mask=valid)
    tl.store(sums + place, tl.max(total, 0), mask=valid)


@triton.jit
def _join(
    values, maxima, sums, sinks, positions, firsts, counts, out, tile_begin, most, H, spans, window,
    HAS_SINKS: tl.constexpr, SPAN: tl.constexpr, VALUE_W: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    tile = tile_begin + tl.program_id(0) // most
    i = tl.program_id(0) % most
    if i >= tl.load(counts + tile):
        return
    h = tl.program_id(1)
    v = tl.arange(0, VALUE)
    t = (tl.load(firsts + tile) + i).to(tl.int64)
    position = tl.load(positions + t)
    begin = 0
    if window > 0:
        begin = tl.maximum(position - window + 1, 0) // SPAN
    top = float("-inf")
    total = 0.0
    if HAS_SINKS:
        top = tl.load(sinks + h).to(tl.float32) * 1.4426950408889634
        total = 1.0
    mixed = tl.zeros([VALUE], tl.float32)
    for span in range(begin, (position + SPAN) // SPAN):
        place = (tl.program_id(0).to(tl.int64) * H + h) * spans + span
        new = tl.load(maxima + place)
        new_top = tl.maximum(top, new)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        faded = tl.exp2(top - base)
        share = tl.exp2(new - base)
        mixed = mixed * faded + share * tl.load(values + place * VALUE_W + v, mask=v < VALUE_W, other=0)
        total = total * faded + share * tl.load(sums + place)
        top = new_top
    # A row that only fills up a pass has no keys.
    tl.store(out + (t * H + h) * VALUE_W + v, mixed / tl.where(total == 0, 1.0, total), mask=v < VALUE_W)


def attend(
    main_THX: Tensor, tail_THR: Tensor | None, cache: Tensor, where: tuple[Tensor, Tensor, Tensor],
    tiles: tuple[Tensor, Tensor, int], *, kv_heads: int, value: int, scale: float, longest: int, window: int = 0,
    sinks_H: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `paged.attend`."""
    T, H, X = main_THX.shape
    positions, sequences, tables = where
    firsts, counts, most = tiles
    device, shared = main_THX.device, tail_THR is not None
    R = 0 if tail_THR is None else tail_THR.shape[-1]
    group = H // kv_heads
    heads = min(16, triton.next_power_of_2(group))
    blocks = triton.cdiv(group, heads)
    rows = max(16, heads * triton.next_power_of_2(most))
    spans = triton.cdiv(longest, SPAN)
    out = torch.empty(T, H, value, dtype=main_THX.dtype, device=device)
    step = max(1, PARTIAL_BYTES // (most * H * spans * value * 4))  # tiles at once
    room = min(step, len(firsts)) * most * H * spans
    values = torch.empty(room, value, dtype=torch.float32, device=device)
    maxima, sums = torch.empty(2, room, dtype=torch.float32, device=device)
    wide = _padded(value)
    for tile in range(0, len(firsts), step):
        count = min(step, len(firsts) - tile)
        _attend[(count, kv_heads * blocks, spans)](
            main_THX, tail_THR, cache, tables, positions, sequences, firsts, counts, values, maxima, sums, tile, most,
            H, group, blocks, spans, tables.shape[1], cache.shape[-1], scale * math.log2(math.e), window, X, R, value,
            shared, _padded(X), _padded(R), wide, heads, rows, cache.shape[1], SPAN, KEYS,
            num_warps=8 if rows >= 32 and wide >= 256 else 4, num_stages=2,
        )  # fmt: skip
        _join[(count * most, H)](
            values, maxima, sums, sinks_H, positions, firsts, counts, out, tile, most, H, spans, window,
            sinks_H is not None, SPAN, value, wide, num_warps=2,
        )  # fmt: skip
    return out


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))
