"""Attention over the pages of the cache in Triton: latent (absorbed MLA) and grouped-query in one kernel.

With few queries, scores and sums lie the other way round, keys or values by queries: what comes from the cache is then
the operand of which the tensor cores take 64 rows at a time, and few queries do not fill up to that.

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
def _tile(
    positions, firsts, counts, tile_begin, H, group, blocks, HEADS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """What a program's rows are: heads of one token, or of several. Those that see most come first."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if ROWS == HEADS:  # each token is a tile
        first, count = tile_begin + tile, 1
    else:
        first = tl.load(firsts + tile_begin + tile)
        count = tl.load(counts + tile_begin + tile)
    last = tl.load(positions + first + count - 1)
    kv = tl.program_id(1) // blocks
    r = tl.arange(0, ROWS)
    token = r // HEADS
    own = tl.program_id(1) % blocks * HEADS + r % HEADS
    valid = (token < count) & (own < group)
    t = (first + token).to(tl.int64)
    position = tl.load(positions + t, mask=valid, other=-1)
    return tile, first, last, token, kv * group + own, t, valid, position, kv


@triton.jit
def _lowest(position, valid, last, window):
    """The first key that any row sees."""
    lowest = 0
    if window > 0:
        lowest = tl.maximum(tl.min(tl.where(valid, position, last), 0) - window + 1, 0)
    return lowest


@triton.jit
def _places(table, key, inside, PAGE: tl.constexpr):
    """Rows of the cache."""
    return tl.load(table + key // PAGE, mask=inside, other=0).to(tl.int64) * PAGE + key % PAGE


@triton.jit
def _seen(key, position, inside, window):
    seen = inside & (key <= position)
    if window > 0:
        seen = seen & (key > position - window)
    return seen


@triton.jit
def _soften(scores, seen, scale, top, AXIS: tl.constexpr, dtype: tl.constexpr):
    """Chances relative to the largest score so far, by what earlier sums fade, and that score."""
    scores = tl.where(seen, scores * scale, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, AXIS))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    return tl.exp2(scores - tl.expand_dims(base, AXIS)).to(dtype), tl.exp2(top - base), new_top


@triton.jit
def _attend(
    main, tail, cache, tables, positions, sequences, firsts, counts, values, maxima, sums,
    tile_begin, most, H, group, blocks, spans, each, width, row_width, scale, window,
    MAIN_W: tl.constexpr, TAIL_W: tl.constexpr, VALUE_W: tl.constexpr, SHARED: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    PAGE: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile, first, last, token, head, t, valid, position, kv = _tile(
        positions, firsts, counts, tile_begin, H, group, blocks, HEADS, ROWS
    )
    first_span = tl.program_id(2) * each
    if first_span * SPAN > last:
        return
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
    lowest = _lowest(position, valid, last, window) // KEYS * KEYS
    for span in range(first_span, tl.minimum(first_span + each, last // SPAN + 1)):
        top = tl.full([ROWS], float("-inf"), tl.float32)
        mixed = tl.zeros([VALUE, ROWS], tl.float32)
        total = tl.zeros([64, ROWS], tl.float32)  # the same sum in each: the tensor cores add in a fixed order
        end = tl.minimum((span + 1) * SPAN, last + 1)
        for k0 in range(tl.maximum(span * SPAN, lowest), end, KEYS):
            key = k0 + tl.arange(0, KEYS)
            inside = key < end
            row = cache + _places(table, key, inside, PAGE) * row_width + kv * (0 if SHARED else MAIN_W + VALUE_W)
            k_main = tl.load(row[:, None] + m[None, :], mask=inside[:, None] & (m[None, :] < MAIN_W), other=0)
            scores = tl.dot(k_main, q, input_precision="ieee")
            if TAIL_W > 0:
                k_tail = tl.load(
                    row[:, None] + MAIN_W + r_dims[None, :], mask=inside[:, None] & (r_dims[None, :] < TAIL_W), other=0
                )
                scores = tl.dot(k_tail, q_tail, scores, input_precision="ieee")
            seen = _seen(key[:, None], position[None, :], inside[:, None], window)
            chances, faded, top = _soften(scores, seen, scale, top, 0, q.dtype)
            if SHARED:
                k_value = k_main
            else:
                k_value = tl.load(
                    row[:, None] + MAIN_W + v[None, :], mask=inside[:, None] & (v[None, :] < VALUE_W), other=0
                )
            mixed = tl.dot(tl.trans(k_value), chances, mixed * faded[None, :], input_precision="ieee")
            total = tl.dot(ones, chances, total * faded[None, :], input_precision="ieee")
        place = ((tile.to(tl.int64) * most + token) * H + head) * spans + span
        tl.store(values + place[None, :] * VALUE_W + v[:, None], mixed, mask=valid[None, :] & (v[:, None] < VALUE_W))
        tl.store(maxima + place, top, mask=valid)
        tl.store(sums + place, tl.max(total, 0), mask=valid)


@triton.jit
def _scores(
    qs, q_tail, row, inside, MAIN_W: tl.constexpr, TAIL_W: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    TAIL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Products of queries [ROWS, PART] and keys in parts, and these parts."""
    scores = tl.zeros([ROWS, KEYS], tl.float32)
    ks = ()
    for p in tl.static_range(PARTS):
        i = p * PART + tl.arange(0, PART)
        k_part = tl.load(row[None, :] + i[:, None], mask=inside[None, :] & (i[:, None] < MAIN_W), other=0)
        ks = ks + (k_part,)  # type: ignore[assignment]  # noqa: RUF005
        scores = tl.dot(qs[p], k_part, scores, input_precision="ieee")
    if TAIL_W > 0:
        i = tl.arange(0, TAIL)
        k_tail = tl.load(row[None, :] + MAIN_W + i[:, None], mask=inside[None, :] & (i[:, None] < TAIL_W), other=0)
        scores = tl.dot(q_tail, k_tail, scores, input_precision="ieee")
    return scores, ks


@triton.jit
def _attend_many(
    main, tail, cache, tables, positions, sequences, firsts, counts, values, maxima, sums,
    tile_begin, most, H, group, blocks, spans, each, width, row_width, scale, window,
    MAIN_W: tl.constexpr, TAIL_W: tl.constexpr, VALUE_W: tl.constexpr, SHARED: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    PAGE: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """For tiles of many queries: these are the rows, and what is mixed stands in parts, so that no thread reads of more
    rows of the cache than it must. The sums are those of `_attend`, to the bit."""
    tile, first, last, token, head, t, valid, position, kv = _tile(
        positions, firsts, counts, tile_begin, H, group, blocks, HEADS, ROWS
    )
    first_span = tl.program_id(2) * each
    if first_span * SPAN > last:
        return
    d = tl.arange(0, PART)
    at = t * H + head
    qs = ()
    for p in tl.static_range(PARTS):
        q = tl.load(
            main + at[:, None] * MAIN_W + (p * PART + d)[None, :], valid[:, None] & (p * PART + d[None, :] < MAIN_W), 0
        )
        qs = qs + (q,)  # type: ignore[assignment]  # noqa: RUF005 (so does Triton read it)
    q_tail = qs[0]  # type: ignore[misc]
    if TAIL_W > 0:
        r_dims = tl.arange(0, TAIL)
        q_tail = tl.load(tail + at[:, None] * TAIL_W + r_dims[None, :], valid[:, None] & (r_dims[None, :] < TAIL_W), 0)
    table = tables + tl.load(sequences + first).to(tl.int64) * width
    ones = tl.full([KEYS, 16], 1.0, main.dtype.element_ty)
    lowest = _lowest(position, valid, last, window) // KEYS * KEYS
    for span in range(first_span, tl.minimum(first_span + each, last // SPAN + 1)):
        top = tl.full([ROWS], float("-inf"), tl.float32)
        mixed = ()
        for _ in tl.static_range(VALUE // PART):
            mixed = mixed + (tl.zeros([ROWS, PART], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
        sixteen = tl.zeros([ROWS, 16], tl.float32)
        end = tl.minimum((span + 1) * SPAN, last + 1)
        for k0 in range(tl.maximum(span * SPAN, lowest), end, KEYS):
            key = k0 + tl.arange(0, KEYS)
            inside = key < end
            row = cache + _places(table, key, inside, PAGE) * row_width + kv * (0 if SHARED else MAIN_W + VALUE_W)
            scores, ks = _scores(qs, q_tail, row, inside, MAIN_W, TAIL_W, PART, PARTS, TAIL, ROWS, KEYS)
            seen = _seen(key[None, :], position[:, None], inside[None, :], window)
            chances, faded, top = _soften(scores, seen, scale, top, 1, main.dtype.element_ty)
            new_mixed = ()
            for p in tl.static_range(VALUE // PART):
                if SHARED:
                    k_value = tl.trans(ks[p])
                else:
                    i = p * PART + d
                    k_value = tl.load(
                        row[:, None] + MAIN_W + i[None, :], mask=inside[:, None] & (i[None, :] < VALUE_W), other=0
                    )
                sum_part = tl.dot(chances, k_value, mixed[p] * faded[:, None], input_precision="ieee")
                new_mixed = new_mixed + (sum_part,)  # type: ignore[assignment]  # noqa: RUF005
            mixed = new_mixed
            sixteen = tl.dot(chances, ones, sixteen * faded[:, None], input_precision="ieee")
        place = ((tile.to(tl.int64) * most + token) * H + head) * spans + span
        for p in tl.static_range(VALUE // PART):
            i = p * PART + d
            tl.store(
                values + place[:, None] * VALUE_W + i[None, :], mixed[p], mask=valid[:, None] & (i[None, :] < VALUE_W)
            )
        tl.store(maxima + place, top, mask=valid)
        tl.store(sums + place, tl.max(sixteen, 1), mask=valid)


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
    # Rows of many fp32 values leave shared memory no room for more.
    large = main_THX.dtype == torch.float32 and _padded(X) >= 256
    keys = 32 if large else KEYS
    for tile in range(0, len(firsts), step):
        count = min(step, len(firsts) - tile)
        # Many tiles fill the chip: then one program takes all spans of its queries.
        each = max(1, min(spans, count * kv_heads * blocks * spans // PROGRAMS))
        arguments = (
            main_THX, tail_THR, cache, tables, positions, sequences, firsts, counts, values, maxima, sums, tile, most,
            H, group, blocks, spans, each, tables.shape[1], cache.shape[-1], scale * math.log2(math.e), window, X, R,
            value, shared,
        )  # fmt: skip
        grid = (count, kv_heads * blocks, triton.cdiv(spans, each))
        sizes = (_padded(X), _padded(R), wide, heads, rows, cache.shape[1], SPAN, keys)
        if rows <= 16:
            # Triton divides stages between tables and rows: with five, rows come two steps ahead, where there is room.
            stages = 1 if large else 2 if wide >= 256 else 5
            _attend[grid](*arguments, *sizes, num_warps=4, num_stages=stages)
        else:
            part = min(256, wide, _padded(X))
            warps = 8 if wide >= 256 else 4
            _attend_many[grid](*arguments, part, _padded(X) // part, *sizes, num_warps=warps, num_stages=2)
        _join[(count * most, H, triton.cdiv(value, block))](
            values, maxima, sums, sinks_H, positions, firsts, counts, out, tile, most, H, spans, window,
            sinks_H is not None, SPAN, value, block, 4, num_warps=2,
        )  # fmt: skip
    return out


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))
