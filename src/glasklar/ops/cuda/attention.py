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
PARTIAL_BYTES = 1 << 30  # of what spans bring before they are joined
PROGRAMS = 512  # about as many as the chip is given at once
MOST_ROWS = 64  # queries times heads of one program


@triton.jit
def _attend(
    main, tail, cache, tables, positions, sequences, firsts, counts, values, maxima, sums,
    tile_begin, most, H, group, blocks, spans, each, width, row_width, scale, window,
    MAIN_W: tl.constexpr, TAIL_W: tl.constexpr, VALUE_W: tl.constexpr, SHARED: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    PAGE: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those that see most come first
    if ROWS == HEADS:  # each token is a tile
        first, count = tile_begin + tile, 1
    else:
        first = tl.load(firsts + tile_begin + tile)
        count = tl.load(counts + tile_begin + tile)
    last = tl.load(positions + first + count - 1)
    first_span = tl.program_id(2) * each
    if first_span * SPAN > last:
        return
    kv = tl.program_id(1) // blocks
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
    ones = tl.full([64, KEYS], 1.0, q.dtype)
    lowest = 0
    if window > 0:
        lowest = tl.maximum(tl.min(tl.where(valid, position, last), 0) - window + 1, 0) // KEYS * KEYS
    for span in range(first_span, tl.minimum(first_span + each, last // SPAN + 1)):
        top = tl.full([ROWS], float("-inf"), tl.float32)
        mixed = tl.zeros([VALUE, ROWS], tl.float32)
        total = tl.zeros([64, ROWS], tl.float32)  # the same sum in each: the tensor cores add in a fixed order
        end = tl.minimum((span + 1) * SPAN, last + 1)
        for k0 in range(tl.maximum(span * SPAN, lowest), end, KEYS):
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
        place = ((tile.to(tl.int64) * most + token) * H + head) * spans + span
        tl.store(values + place[None, :] * VALUE_W + v[:, None], mixed, mask=valid[None, :] & (v[:, None] < VALUE_W))
        tl.store(maxima + place, top, mask=valid)
        tl.store(sums + place, tl.max(total, 0), mask=valid)


@triton.jit
def _join(
    values, maxima, sums, sinks, positions, firsts, counts, out, tile_begin, most, H, spans, window,
    HAS_SINKS: tl.constexpr, SPAN: tl.constexpr, VALUE_W: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """AHEAD: spans whose loads are on their way at once."""
    tile = tile_begin + tl.program_id(0) // most
    i = tl.program_id(0) % most
    if i >= tl.load(counts + tile):
        return
    h = tl.program_id(1)
    v = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    t = (tl.load(firsts + tile) + i).to(tl.int64)
    position = tl.load(positions + t)
    begin = 0
    if window > 0:
        begin = tl.maximum(position - window + 1, 0) // SPAN
    end = (position + SPAN) // SPAN
    top = float("-inf")
    total = 0.0
    if HAS_SINKS:
        top = tl.load(sinks + h).to(tl.float32) * 1.4426950408889634
        total = 1.0
    mixed = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, AHEAD):
        for ahead in tl.static_range(AHEAD):
            span = first + ahead
            place = (tl.program_id(0).to(tl.int64) * H + h) * spans + span
            new = tl.load(maxima + place, mask=span < end, other=float("-inf"))
            new_top = tl.maximum(top, new)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            faded = tl.exp2(top - base)
            share = tl.exp2(new - base)
            value = tl.load(values + place * VALUE_W + v, mask=(v < VALUE_W) & (span < end), other=0)
            mixed = mixed * faded + share * value
            total = total * faded + share * tl.load(sums + place, mask=span < end, other=0)
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
    assert rows <= MOST_ROWS, f"{most} tokens in a tile are too many for {heads} heads"
    spans = triton.cdiv(longest, SPAN)
    out = torch.empty(T, H, value, dtype=main_THX.dtype, device=device)
    step = max(1, PARTIAL_BYTES // (most * H * spans * value * 4))  # tiles at once
    room = min(step, len(firsts)) * most * H * spans
    values = torch.empty(room, value, dtype=torch.float32, device=device)
    maxima, sums = torch.empty(2, room, dtype=torch.float32, device=device)
    wide, block = _padded(value), min(256, _padded(value))
    for tile in range(0, len(firsts), step):
        count = min(step, len(firsts) - tile)
        # Many tiles fill the chip: then one program takes all spans of its queries.
        each = max(1, min(spans, count * kv_heads * blocks * spans // PROGRAMS))
        _attend[(count, kv_heads * blocks, triton.cdiv(spans, each))](
            main_THX, tail_THR, cache, tables, positions, sequences, firsts, counts, values, maxima, sums, tile, most,
            H, group, blocks, spans, each, tables.shape[1], cache.shape[-1], scale * math.log2(math.e), window, X, R,
            value, shared, _padded(X), _padded(R), wide, heads, rows, cache.shape[1], SPAN, KEYS,
            num_warps=_warps(rows, wide), num_stages=2,
        )  # fmt: skip
        _join[(count * most, H, triton.cdiv(value, block))](
            values, maxima, sums, sinks_H, positions, firsts, counts, out, tile, most, H, spans, window,
            sinks_H is not None, SPAN, value, block, 4, num_warps=2,
        )  # fmt: skip
    return out


def _warps(rows: int, value: int) -> int:
    return 8 if value >= 256 and rows > 16 else 4


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))
