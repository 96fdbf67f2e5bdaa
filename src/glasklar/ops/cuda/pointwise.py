"""Norms, rotary positions, the gate's choice and the draw of tokens in Triton: one program for a row or a head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glasklar.ops.paged import Parts


@triton.jit
def _norm(
    x, added, parts, weights, weight, total, out, D, x_t, added_t, eps,
    ADD: tl.constexpr, ACTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    row = tl.load(x + t * x_t + d, mask=d < D, other=0)
    if ADD:
        row += tl.load(added + t * added_t + d, mask=d < D, other=0)
    if ACTIVE > 0:
        for slot in tl.static_range(ACTIVE):
            part = tl.load(parts + (t * ACTIVE + slot) * D + d, mask=d < D, other=0)
            row += tl.load(weights + t * ACTIVE + slot) * part
    if ADD or ACTIVE > 0:
        tl.store(total + t * D + d, row, mask=d < D)
    inverse = 1 / tl.sqrt(tl.sum(row * row, 0) / D + eps)
    normed = row * inverse * tl.load(weight + d, mask=d < D, other=0).to(tl.float32)
    tl.store(out + t * D + d, normed, mask=d < D)


def add_norm(
    x_TD: Tensor, added: Tensor | Parts | None, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `paged.add_norm`."""
    T, D = x_TD.shape
    total = x_TD if added is None else torch.empty(T, D, device=x_TD.device)
    out = torch.empty(T, D, dtype=dtype, device=x_TD.device)
    block = triton.next_power_of_2(D)
    parts, weights, plain = added if isinstance(added, Parts) else (None, None, added)
    _norm[(T,)](
        x_TD, plain, parts, weights, weight_D, total, out, D, x_TD.stride(0), 0 if plain is None else plain.stride(0),
        eps, plain is not None, 0 if weights is None else weights.shape[1], block,
        num_warps=max(1, min(16, block // 256)),
    )  # fmt: skip
    return total, out


@triton.jit
def _row_of(tables, sequences, t, position, width, PAGE: tl.constexpr):
    """Where the cache keeps a token."""
    page = tl.load(tables + tl.load(sequences + t).to(tl.int64) * width + position // PAGE)
    return page.to(tl.int64) * PAGE + position % PAGE


@triton.jit
def _turn_latent(
    q, kv, cosine, sine, weight, positions, sequences, tables, cache, nope, tail, H, width, row_width, q_t, kv_t, eps,
    INTERLEAVE: tl.constexpr, N: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One head's query is parted and turned; program H keeps the token's latent and key."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    position = tl.load(positions + t)
    i = tl.arange(0, HALF)
    inside = i < R // 2
    known = tl.maximum(position, 0)
    cos = tl.load(cosine + known.to(tl.int64) * (R // 2) + i, mask=inside, other=0)
    sin = tl.load(sine + known.to(tl.int64) * (R // 2) + i, mask=inside, other=0)
    first = 2 * i if INTERLEAVE else i
    second = 2 * i + 1 if INTERLEAVE else i + R // 2
    if h < H:
        row = q + t * q_t + h * (N + R)
        n = tl.arange(0, BLOCK_N)
        tl.store(nope + (t * H + h) * N + n, tl.load(row + n, mask=n < N, other=0), mask=n < N)
        a = tl.load(row + N + first, mask=inside, other=0)
        b = tl.load(row + N + second, mask=inside, other=0)
        tl.store(tail + (t * H + h) * R + first, a * cos - b * sin, mask=inside)
        tl.store(tail + (t * H + h) * R + second, b * cos + a * sin, mask=inside)
    elif position >= 0:
        row = kv + t * kv_t
        c = tl.arange(0, BLOCK_C)
        latent = tl.load(row + c, mask=c < C, other=0)
        inverse = 1 / tl.sqrt(tl.sum(latent * latent, 0) / C + eps)
        latent = latent * inverse * tl.load(weight + c, mask=c < C, other=0).to(tl.float32)
        to = cache + _row_of(tables, sequences, t, position, width, PAGE) * row_width
        tl.store(to + c, latent, mask=c < C)
        a = tl.load(row + C + first, mask=inside, other=0)
        b = tl.load(row + C + second, mask=inside, other=0)
        tl.store(to + C + first, a * cos - b * sin, mask=inside)
        tl.store(to + C + second, b * cos + a * sin, mask=inside)


def turn_latent(
    q_THK: Tensor, kv_TX: Tensor, norm_C: Tensor, eps: float, angles: tuple[Tensor, Tensor], interleave: bool,
    where: tuple[Tensor, Tensor, Tensor], cache: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `paged.turn_latent`."""
    T, H, K = q_THK.shape
    C, R = len(norm_C), 2 * angles[0].shape[1]
    positions, sequences, tables = where
    nope = torch.empty(T, H, K - R, dtype=dtype, device=q_THK.device)
    tail = torch.empty(T, H, R, dtype=dtype, device=q_THK.device)
    _turn_latent[(T, H + 1)](
        q_THK, kv_TX, *angles, norm_C, positions, sequences, tables, cache, nope, tail, H, tables.shape[1],
        cache.shape[-1], q_THK.stride(0), kv_TX.stride(0), eps, interleave, K - R, R, C,
        triton.next_power_of_2(K - R), triton.next_power_of_2(C),
        triton.next_power_of_2(R // 2), cache.shape[1], num_warps=1,
    )  # fmt: skip
    return nope, tail


@triton.jit
def _turn_heads(
    q, k, v, cosine, sine, q_weight, k_weight, positions, sequences, tables, cache, out, H, G, width, row_width,
    q_t, k_t, v_t, eps,
    NORM: tl.constexpr, INTERLEAVE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr,
    HALF: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One head's query is turned; the programs from H on keep keys and values."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    position = tl.load(positions + t)
    known = tl.maximum(position, 0).to(tl.int64)
    i = tl.arange(0, HALF)
    inside = i < K // 2
    cos = tl.load(cosine + known * (K // 2) + i, mask=inside, other=0)
    sin = tl.load(sine + known * (K // 2) + i, mask=inside, other=0)
    first = 2 * i if INTERLEAVE else i
    second = 2 * i + 1 if INTERLEAVE else i + K // 2
    is_query = h < H
    row = q + t * q_t + h * K
    if not is_query:
        row = k + t * k_t + (h - H) * K
    a = tl.load(row + first, mask=inside, other=0)
    b = tl.load(row + second, mask=inside, other=0)
    if NORM:
        inverse = 1 / tl.sqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / K + eps)
        weight = q_weight
        if not is_query:
            weight = k_weight
        a = a * inverse * tl.load(weight + first, mask=inside, other=0).to(tl.float32)
        b = b * inverse * tl.load(weight + second, mask=inside, other=0).to(tl.float32)
    x = a * cos - b * sin
    y = b * cos + a * sin
    if is_query:
        tl.store(out + (t * H + h) * K + first, x, mask=inside)
        tl.store(out + (t * H + h) * K + second, y, mask=inside)
    elif position >= 0:
        to = cache + _row_of(tables, sequences, t, position, width, PAGE) * row_width + (h - H) * (K + V)
        tl.store(to + first, x, mask=inside)
        tl.store(to + second, y, mask=inside)
        j = tl.arange(0, BLOCK_V)
        tl.store(to + K + j, tl.load(v + t * v_t + (h - H) * V + j, mask=j < V, other=0), mask=j < V)


def turn_heads(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float,
    angles: tuple[Tensor, Tensor], interleave: bool, where: tuple[Tensor, Tensor, Tensor], cache: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `paged.turn_heads`."""
    T, H, K = q_THK.shape
    G, V = v_TGV.shape[1:]
    positions, sequences, tables = where
    out = torch.empty(T, H, K, dtype=dtype, device=q_THK.device)
    q_norm, k_norm = norms or (None, None)
    _turn_heads[(T, H + G)](
        q_THK, k_TGK, v_TGV, *angles, q_norm, k_norm, positions, sequences, tables, cache, out, H, G, tables.shape[1],
        cache.shape[-1], q_THK.stride(0), k_TGK.stride(0), v_TGV.stride(0), eps, norms is not None, interleave, K, V,
        triton.next_power_of_2(V),
        triton.next_power_of_2(K // 2), cache.shape[1], num_warps=1,
    )  # fmt: skip
    return out


@triton.jit
def _best(values, every, SIZE: tl.constexpr):
    """Place of the largest; ties go to the lower one. NaN is never the largest."""
    values = tl.where(values == values, values, float("-inf"))
    top = tl.max(values, 0)
    return tl.minimum(tl.min(tl.where(values == top, every, SIZE), 0), SIZE - 1)


@triton.jit
def _route(
    logits, logit_bias, bias, ids, weights, E, pieces, active, groups, groups_kept, scaling,
    SIGMOID: tl.constexpr, LOGIT_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, NORMALISE: tl.constexpr,
    GROUPED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, SIZE)
    inside = every < E
    row = tl.load(logits + t * pieces * E + every, mask=inside, other=float("-inf"))
    for piece in range(1, pieces):
        row += tl.load(logits + (t * pieces + piece) * E + every, mask=inside, other=0)
    if LOGIT_BIAS:
        row += tl.load(logit_bias + every, mask=inside, other=0)
    if SIGMOID:
        scores = 1 / (1 + tl.exp(-row))
    else:
        scores = tl.exp(row - tl.max(row, 0))
        scores = scores / tl.sum(scores, 0)
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias + every, mask=inside, other=0)
    choice = tl.where(inside, choice, float("-inf"))
    if GROUPED:
        each = E // groups
        ranked = tl.full([SIZE], float("-inf"), tl.float32)
        for g in range(groups):
            own = tl.where(every // each == g, choice, float("-inf"))
            score = tl.max(own, 0)
            if SIGMOID:  # V3 ranks groups by their best two experts, V2 by the best one
                score += tl.max(tl.where(every == _best(own, every, SIZE), float("-inf"), own), 0)
            ranked = tl.where(every == g, score, ranked)
        allowed = tl.zeros([SIZE], tl.int32)
        for _ in range(groups_kept):
            best = _best(ranked, every, SIZE)
            allowed = tl.where(every // each == best, 1, allowed)
            ranked = tl.where(every == best, float("-inf"), ranked)
        choice = tl.where((allowed > 0) & inside, choice, float("-inf"))
    total = 0.0
    for slot in range(active):
        best = tl.minimum(_best(choice, every, SIZE), E - 1)
        weight = tl.sum(tl.where(every == best, scores, 0), 0)
        choice = tl.where(every == best, float("-inf"), choice)
        tl.store(ids + t * active + slot, best)
        tl.store(weights + t * active + slot, weight * scaling)
        total += weight
    if NORMALISE:
        tl.debug_barrier()
        for slot in range(active):
            weight = tl.load(weights + t * active + slot)
            tl.store(weights + t * active + slot, weight / (total + 1e-20))


def route(
    logits_TPE: Tensor, bias_E: Tensor | None, choice_bias_E: Tensor | None, *, active: int, groups: int,
    groups_kept: int, scoring: str, normalise: bool, scaling: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `paged.route`."""
    T, pieces, E = logits_TPE.shape
    ids = torch.empty(T, active, dtype=torch.int32, device=logits_TPE.device)
    weights = torch.empty(T, active, dtype=torch.float32, device=logits_TPE.device)
    _route[(T,)](
        logits_TPE, bias_E, choice_bias_E, ids, weights, E, pieces, active, groups, groups_kept, scaling,
        scoring == "sigmoid", bias_E is not None, choice_bias_E is not None, normalise, groups > 1,
        triton.next_power_of_2(E), num_warps=1,
    )  # fmt: skip
    return ids, weights


@triton.jit
def _weigh(logits, temperatures, tops, places, plain, heated, W, blocks, coldest, BLOCK: tl.constexpr):
    """Of one block of a row: the largest logit and where it stands, and sums of chances relative to it."""
    o = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits + o * W + w, mask=w < W, other=float("-inf"))
    top = tl.max(values, 0)
    temperature = tl.load(temperatures + o)
    values = values - tl.where(top == float("-inf"), 0.0, top)
    heat = 1 / tl.where(temperature < coldest, 1.0, temperature)
    at = o * blocks + tl.program_id(1)
    tl.store(tops + at, top)
    tl.store(places + at, tl.minimum(tl.min(tl.where(values == 0, w, W), 0), W - 1))
    tl.store(plain + at, tl.sum(tl.exp(values).to(tl.float64), 0))
    tl.store(heated + at, tl.sum(tl.exp(values * heat).to(tl.float64), 0))


@triton.jit
def _draw(
    logits, temperatures, numbers, tops, places, plain, heated, tokens, logprobs, W, blocks, coldest,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The first token whose sum of chances exceeds the number lies in the first block whose sum does."""
    o = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BLOCKS)
    inside = b < blocks
    top = tl.load(tops + o * blocks + b, mask=inside, other=float("-inf"))
    best_value = tl.max(top, 0)
    best = tl.minimum(tl.min(tl.where(inside & (top == best_value), b, BLOCKS), 0), blocks - 1)
    temperature = tl.load(temperatures + o)
    chosen = tl.load(places + o * blocks + best)
    if temperature >= coldest:
        heat = 1 / temperature
        sums = tl.load(heated + o * blocks + b, mask=inside, other=0) * tl.exp((top - best_value) * heat).to(tl.float64)
        until = tl.cumsum(sums, 0)
        threshold = tl.load(numbers + o) * tl.sum(sums, 0)
        filled = tl.max(tl.where(sums > 0, b, 0), 0)  # reached where the sum rounds otherwise
        block = tl.minimum(tl.min(tl.where((until > threshold) & (sums > 0), b, BLOCKS), 0), filled)
        before = tl.sum(tl.where(b == block, until - sums, 0), 0)
        w = block * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(logits + o * W + w, mask=w < W, other=float("-inf")) - best_value
        chances = tl.exp(values * heat).to(tl.float64)
        passed = (before + tl.cumsum(chances, 0) > threshold) & (chances > 0)
        last = tl.max(tl.where(chances > 0, w, 0), 0)
        chosen = tl.minimum(tl.min(tl.where(passed, w, W), 0), last)
    total = tl.load(plain + o * blocks + b, mask=inside, other=0) * tl.exp(top - best_value).to(tl.float64)
    norm = tl.log(tl.sum(total, 0)).to(tl.float32)
    tl.store(tokens + o, chosen)
    tl.store(logprobs + o, tl.load(logits + o * W + chosen) - best_value - norm)


def draw(logits_OW: Tensor, temperature_O: Tensor, uniform_O: Tensor, coldest: float) -> tuple[Tensor, Tensor]:
    """As `paged.draw`."""
    rows, W = logits_OW.shape
    device = logits_OW.device
    tokens = torch.empty(rows, dtype=torch.int32, device=device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    block = min(4096, triton.next_power_of_2(W))
    blocks = triton.cdiv(W, block)
    tops = torch.empty(rows, blocks, dtype=torch.float32, device=device)
    places = torch.empty(rows, blocks, dtype=torch.int32, device=device)
    plain, heated = torch.empty(2, rows, blocks, dtype=torch.float64, device=device)
    _weigh[(rows, blocks)](
        logits_OW, temperature_O, tops, places, plain, heated, W, blocks, coldest, block, num_warps=8
    )
    _draw[(rows,)](
        logits_OW, temperature_O, uniform_O, tops, places, plain, heated, tokens, logprobs, W, blocks, coldest, block,
        triton.next_power_of_2(blocks), num_warps=8,
    )  # fmt: skip
    return tokens, logprobs
