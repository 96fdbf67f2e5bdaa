"""What passes over pages are made of. Oracle: the same sums in float64, written another way. GLASKLAR_TEST_DEVICE=cuda
tests the kernels beside their reference, TRITON_INTERPRET=1 does on a CPU, slowly."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glasklar.ops.paged import REFERENCE, PagedOps

DEVICE = os.environ.get("GLASKLAR_TEST_DEVICE", "cpu")
KERNELS = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
TYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
ROWS = (1, 3, 17, 64, 130)
PAGE = 16
PLAIN_GATE = {"active": 3, "groups": 1, "groups_kept": 1, "scaling": 1.0}
BLANK = 7.0  # what the cache holds where nothing may be written


@pytest.fixture(params=["reference", *(["triton"] if KERNELS else [])])
def ops(request: pytest.FixtureRequest) -> PagedOps:
    if request.param == "reference":
        return REFERENCE
    from glasklar.ops.cuda.table import TRITON

    return TRITON


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def same(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Up to roundings of numbers of a type."""
    assert found.shape == wanted.shape
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error < TOLERANCE[dtype], f"off by {error:.1e}"


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Pass:
    """Rows of a pass: sequences of the given lengths, of which the last few tokens are run; one row means nothing."""

    def __init__(self, *pieces: tuple[int, int], fill: bool = True) -> None:
        own = [(s, p) for s, (length, count) in enumerate(pieces) for p in range(length - count, length)]
        own += [(0, -1)] * fill
        self.pages = 40
        order = torch.randperm(len(pieces) * self.pages, generator=torch.Generator().manual_seed(9))
        self.tables = order.view(len(pieces), self.pages).int().to(DEVICE)
        self.positions, self.sequences = (numbers(*column) for column in ([p for _, p in own], [s for s, _ in own]))
        self.where = (self.positions, self.sequences, self.tables)
        self.rows, self.real = len(own), len(own) - fill
        self.longest = max(length for length, _ in pieces)
        self.counts = [count for _, count in pieces]

    def cache(self, width: int, dtype: torch.dtype, fill: float | None = None) -> Tensor:
        shape = (self.tables.numel(), PAGE, width)
        return normal(*shape, seed=3, dtype=dtype) if fill is None else torch.full(shape, fill, device=DEVICE).to(dtype)

    def sequence(self, cache: Tensor, row: int) -> Tensor:
        """Rows of the cache up to a row of the pass, in float64."""
        whole = cache[self.tables[int(self.sequences[row])].long()].flatten(0, 1)
        return whole[: int(self.positions[row]) + 1].double()

    def tiles(self, most: int) -> tuple[Tensor, Tensor, int]:
        starts = list(itertools.accumulate(self.counts, initial=0))
        cut = [(b, min(most, e - b)) for start, e in itertools.pairwise(starts) for b in range(start, e, most)]
        cut += [(row, 1) for row in range(self.real, self.rows)]
        firsts, counts = zip(*cut, strict=True)
        return numbers(*firsts), numbers(*counts), most


def angles(width: int) -> tuple[Tensor, Tensor]:
    turns = torch.arange(700, device=DEVICE)[:, None] * 0.7 ** torch.arange(width // 2, device=DEVICE)
    return turns.cos().contiguous(), turns.sin().contiguous()


def turned(x: Tensor, position: int, table: tuple[Tensor, Tensor], interleave: bool) -> Tensor:
    """`x` [..., R] as complex numbers, turned."""
    x = x.double()
    pairs = x.unflatten(-1, (-1, 2)) if interleave else torch.stack(x.chunk(2, -1), -1)
    phase = torch.complex(table[0][position].double(), table[1][position].double())
    out = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * phase)
    return out.flatten(-2) if interleave else torch.cat(out.unbind(-1), -1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_add_norm_against_float64(rows: int, dtype: torch.dtype, ops: PagedOps) -> None:
    x, added, weight = normal(rows, 75, seed=1), normal(rows, 75, seed=2), normal(75, seed=3, dtype=dtype)
    for more in (added, None):
        total, normed = ops.add_norm(x, more, weight, 1e-3, dtype)
        wanted = x.double() + (0 if more is None else more.double())
        same(total, wanted, torch.float32)
        same(normed, F.rms_norm(wanted, (75,), weight.double(), 1e-3), dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_product_against_float64(rows: int, dtype: torch.dtype, ops: PagedOps) -> None:
    x, w, bias = (normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(rows, 83), (131, 83), (131,)]))
    same(ops.product(x, w), x.double() @ w.double().T, torch.float32)
    same(ops.product(x, w, bias, dtype), x.double() @ w.double().T + bias.double(), dtype)
    heads, wide = normal(rows, 3, 20, seed=4, dtype=dtype), normal(3, 60, 20, seed=5, dtype=dtype)
    for w_HNK in (wide[:, 7:40], wide.view(3, 20, 60).mT):
        same(ops.product(heads, w_HNK), torch.einsum("thk,hnk->thn", heads.double(), w_HNK.double()), torch.float32)
    gate = normal(12, 83, seed=6)  # wider than the rows
    same(ops.product(x, gate), x.double() @ gate.double().T, torch.float32)
    several = [normal(n, 83, seed=n, dtype=dtype) for n in (40, 131, 7)]
    for count, more in ((2, None), (3, None), (3, bias)):
        biases = [None if more is None else more[: len(w)] for w in several[:count]]
        for found, w, b in zip(ops.products(x, several[:count], biases), several, biases, strict=False):
            same(found, x.double() @ w.double().T + (0 if b is None else b.double()), torch.float32)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_gated_product_against_float64(rows: int, dtype: torch.dtype, ops: PagedOps) -> None:
    x, w = normal(rows, 83, seed=1, dtype=dtype), normal(2 * 41, 83, seed=2, dtype=dtype)
    gate, up = (x.double() @ w.double().T).split(41, -1)
    same(ops.gated_product(x, w), F.silu(gate) * up, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("interleave", [True, False])
def test_turn_latent_against_complex_numbers(interleave: bool, dtype: torch.dtype, ops: PagedOps) -> None:
    """What the cache holds elsewhere stays, a row that means nothing writes nothing."""
    p, (H, N, R, C) = Pass((45, 30), (1, 1), (300, 3)), (3, 20, 12, 24)
    q, kv, norm = normal(p.rows, H, N + R, seed=1), normal(p.rows, C + R, seed=2), normal(C, seed=3, dtype=dtype)
    cache, table = p.cache(40, dtype, BLANK), angles(R)
    nope, tail = ops.turn_latent(q, kv, norm, 1e-3, table, interleave, p.where, cache, dtype)
    same(nope, q[..., :N].double(), dtype)
    for row in range(p.real):
        at = int(p.positions[row])
        same(tail[row], turned(q[row, :, N:], at, table, interleave), dtype)
        latent = F.rms_norm(kv[row, :C].double(), (C,), norm.double(), 1e-3)
        key = turned(kv[row, C:], at, table, interleave)
        same(p.sequence(cache, row)[-1, : C + R], torch.cat((latent, key)), dtype)
    assert ((cache != BLANK).sum(-1) > 0).sum() == p.real
    assert (cache[..., C + R :] == BLANK).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("interleave", "normed"), [(True, False), (False, True)])
def test_turn_heads_against_complex_numbers(interleave: bool, normed: bool, dtype: torch.dtype, ops: PagedOps) -> None:
    p, (H, G, K, V) = Pass((45, 30), (1, 1), (300, 3)), (6, 2, 20, 12)
    q, k, v = (normal(p.rows, *shape, seed=i) for i, shape in enumerate([(H, K), (G, K), (G, V)]))
    norms = (normal(K, seed=4, dtype=dtype), normal(K, seed=5, dtype=dtype)) if normed else None
    cache, table = p.cache(70, dtype, BLANK), angles(K)
    out = ops.turn_heads(q, k, v, norms, 1e-3, table, interleave, p.where, cache, dtype)
    for row in range(p.real):
        both = [x[row].double() for x in (q, k)]
        if norms is not None:
            both = [F.rms_norm(x, (K,), norm.double(), 1e-3) for x, norm in zip(both, norms, strict=True)]
        query, key = (turned(x, int(p.positions[row]), table, interleave) for x in both)
        same(out[row], query, dtype)
        same(p.sequence(cache, row)[-1, : G * (K + V)], torch.cat((key, v[row].double()), -1).flatten(), dtype)
    assert ((cache != BLANK).sum(-1) > 0).sum() == p.real
    assert (cache[..., G * (K + V) :] == BLANK).all()


def mixed(
    q_GhX: Tensor, keys_SGX: Tensor, values_SGV: Tensor, scale: float, window: int, sinks: Tensor | None
) -> Tensor:
    """One token's attention in float64; a sink is one more key without a value."""
    if window:
        keys_SGX, values_SGV = keys_SGX[-window:], values_SGV[-window:]
    scores = torch.einsum("ghx,sgx->ghs", q_GhX.double(), keys_SGX) * scale
    weights = scores.exp()
    total = weights.sum(-1) + (0 if sinks is None else sinks.double().exp().view(scores.shape[:2]))
    return (torch.einsum("ghs,sgv->ghv", weights, values_SGV) / total[..., None]).flatten(0, 1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("pieces", [[(1, 1)], [(300, 3), (16, 1), (513, 1)], [(45, 30), (520, 100)]], ids=str)
@pytest.mark.parametrize("most", [1, 4, 16])
def test_attend_against_float64(most: int, pieces: list[tuple[int, int]], dtype: torch.dtype, ops: PagedOps) -> None:
    """Latents with 3 and 20 heads, grouped queries with and without window and sinks; a row that means nothing is 0."""
    p = Pass(*pieces)
    for H in (3, 20):
        main, tail = normal(p.rows, H, 24, seed=1, dtype=dtype), normal(p.rows, H, 12, seed=2, dtype=dtype)
        cache = p.cache(40, dtype)
        out = ops.attend(
            main,
            tail,
            cache,
            p.where,
            p.tiles(min(most, 4) if H > 16 else most),
            kv_heads=1,
            value=24,
            scale=0.2,
            longest=p.pages * PAGE,
        )
        both = torch.cat((main, tail), -1)
        wanted = [
            mixed(both[row, None], seen[:, None, :36], seen[:, None, :24], 0.2, 0, None)
            for row in range(p.real)
            for seen in [p.sequence(cache, row)]
        ]
        same(out[: p.real], torch.stack(wanted), dtype)
        assert not out[p.real :].any()
    H, G, K, V = 6, 2, 20, 12
    main, cache, sinks = normal(p.rows, H, K, seed=1, dtype=dtype), p.cache(72, dtype), normal(H, seed=4, dtype=dtype)
    for window, sink in ((0, None), (19, sinks), (300, None)):
        out = ops.attend(
            main, None, cache, p.where, p.tiles(most), kv_heads=G, value=V, scale=0.2, longest=p.longest,
            window=window, sinks_H=sink,
        )  # fmt: skip
        wanted = [
            mixed(main[row].unflatten(0, (G, -1)), seen[..., :K], seen[..., K:], 0.2, window, sink)
            for row in range(p.real)
            for seen in [p.sequence(cache, row)[:, : G * (K + V)].unflatten(-1, (G, K + V))]
        ]
        same(out[: p.real], torch.stack(wanted), dtype)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("rows", ROWS)
def test_route_against_sorting(rows: int, groups: int, scoring: str, ops: PagedOps) -> None:
    """Ties go to the lower expert."""
    E, active, kept = 20, 4, 2
    logits = (normal(rows, E, seed=1) * 4).round() / 4
    bias = normal(E, seed=2).round() / 8 if scoring == "sigmoid" else None
    ids, weights = ops.route(
        logits[:, None], None, bias, active=active, groups=groups, groups_kept=kept,
        scoring=scoring, normalise=scoring == "sigmoid", scaling=2.5,
    )  # fmt: skip
    scores_TE = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    for row, scores in enumerate(scores_TE.tolist()):
        choice = (scores_TE[row] if bias is None else scores_TE[row] + bias).tolist()
        parts = [range(g * E // groups, (g + 1) * E // groups) for g in range(groups)]
        best = 2 if scoring == "sigmoid" else 1
        parts.sort(key=lambda part: -sum(sorted((choice[e] for e in part), reverse=True)[:best]))
        allowed = sorted(e for part in parts[: kept if groups > 1 else 1] for e in part)
        wanted = sorted(allowed, key=lambda e: -choice[e])[:active]
        # Of equal choices one function's roundings may prefer another: then their scores are as good as equal.
        chosen = ids[row].tolist()
        assert len(set(chosen)) == active
        assert chosen == wanted or torch.allclose(*(torch.tensor([choice[e] for e in x]) for x in (chosen, wanted)))
        total = sum(scores[e] for e in chosen) if scoring == "sigmoid" else 1
        shares = torch.tensor([2.5 * scores[e] / total for e in chosen]).double()
        same(weights[row].cpu(), shares, torch.float32)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_gate_against_float64(rows: int, dtype: torch.dtype, ops: PagedOps) -> None:
    """Its sums are fp32 for rows of any type."""
    x, gate, bias = normal(rows, 512, seed=1, dtype=dtype), normal(20, 512, seed=2) / 20, normal(20, seed=3)
    every = {**PLAIN_GATE, "active": 20}
    ids, weights = ops.route(ops.gate(x, gate), bias, None, **every, scoring="sigmoid", normalise=False)
    found = torch.zeros(rows, 20, device=DEVICE).scatter(1, ids.long(), weights)
    same(found, (x.double() @ gate.double().T + bias.double()).sigmoid(), torch.float32)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_experts_against_float64(rows: int, clamped: bool, dtype: torch.dtype, ops: PagedOps) -> None:
    """Token by token; most of them choose the first expert."""
    E, A, D, hidden = 11, 3, 75, 41
    x = normal(rows, D, seed=1, dtype=dtype)
    up, down = (normal(*s, seed=i, dtype=dtype) / 8 for i, s in enumerate([(E, 2 * hidden, D), (E, D, hidden)], 2))
    biases = [normal(*s, seed=i, dtype=dtype) if clamped else None for i, s in enumerate([(E, 2 * hidden), (E, D)], 4)]
    shared = None if clamped else normal(rows, D, seed=6)
    weights, ids = normal(rows, A, seed=7).abs(), torch.stack([torch.randperm(E)[:A] for _ in range(rows)])
    ids[::2] = torch.tensor([0, 10, 5])
    ids = ids.int().to(DEVICE)
    parts = ops.experts(x, ids, weights, (up, biases[0]), (down, biases[1]), shared, (1.5, 0.9) if clamped else None)
    out, _ = ops.add_norm(torch.zeros(rows, D, device=DEVICE), parts, weights.new_ones(D), 1e-3, dtype)
    wanted = torch.zeros(rows, D, dtype=torch.float64, device=DEVICE) if shared is None else shared.double()
    for t, slot in itertools.product(range(rows), range(A)):
        e = int(ids[t, slot])
        both = up[e].double() @ x[t].double() + (0 if biases[0] is None else biases[0][e].double())
        gate, lift = (both[::2], both[1::2]) if clamped else both.chunk(2)
        if clamped:
            gate, lift = gate.clamp(max=0.9), lift.clamp(-0.9, 0.9) + 1
        made = down[e].double() @ (gate * torch.sigmoid(gate * (1.5 if clamped else 1)) * lift)
        wanted[t] += weights[t, slot].double() * (made + (0 if biases[1] is None else biases[1][e].double()))
    same(out, wanted, dtype)


@pytest.mark.parametrize("W", [97, 9001])
@pytest.mark.parametrize("rows", ROWS)
def test_draw_against_float64(rows: int, W: int, ops: PagedOps) -> None:
    logits = normal(rows, W, seed=1) * 3
    heat = torch.tensor([0.0, 0.7, 1.2], device=DEVICE).repeat(rows)[:rows]
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(DEVICE)
    uniform[:: max(1, rows - 1)] = 1 - 2.0**-53
    tokens, logprobs = ops.draw(logits, heat, uniform, 1e-3)
    wanted = logits.double().log_softmax(-1).gather(-1, tokens.long()[:, None])[:, 0]
    same(logprobs, wanted, torch.float32)
    for row, token in enumerate(tokens.tolist()):
        if heat[row] == 0:
            assert token == int(logits[row].argmax())
            continue
        chances = (logits[row].double() / heat[row].double()).softmax(-1)
        until = float(chances[: token + 1].sum())
        assert until - float(chances[token]) - 1e-6 <= float(uniform[row]) <= until + 1e-6


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_nan_stays_in_its_row(dtype: torch.dtype, ops: PagedOps) -> None:
    """The other rows have the bits that they have beside numbers."""
    rows, bad, D = 17, 5, 75
    good = torch.arange(rows, device=DEVICE) != bad
    clean = normal(rows, D, seed=1, dtype=dtype)
    spoiled = clean.clone()
    spoiled[bad] = float("nan")
    w, gated = normal(40, D, seed=2, dtype=dtype), normal(2 * 41, D, seed=3, dtype=dtype)
    up, down = normal(4, 2 * 41, D, seed=4, dtype=dtype), normal(4, D, 41, seed=5, dtype=dtype)
    ids = (torch.arange(rows)[:, None] + torch.arange(2)).remainder(4).int().to(DEVICE)
    weights = normal(rows, 2, seed=6)
    p = Pass((rows, rows), fill=False)
    cache, zeros = p.cache(40, dtype), torch.zeros(rows, device=DEVICE)

    def results(x: Tensor) -> list[Tensor]:
        heads = x[:, :72].unflatten(-1, (3, 24)).contiguous()
        tail, logits = heads[..., :12].contiguous(), x[:, None, :20].float().contiguous()
        mixed = ops.attend(heads, tail, cache, p.where, p.tiles(16), kv_heads=1, value=24, scale=0.2, longest=rows)
        return [
            *ops.add_norm(x.float(), x.float(), torch.ones(D, device=DEVICE), 1e-3, dtype), ops.product(x, w),
            ops.gated_product(x, gated), mixed, ops.experts(x, ids, weights, (up, None), (down, None), None, None)[0],
            *ops.route(logits, None, None, **PLAIN_GATE, scoring="softmax", normalise=True),
            *ops.draw(x.float(), zeros, zeros.double(), 1e-3),
        ]  # fmt: skip

    for found, wanted in zip(results(spoiled), results(clean), strict=True):
        assert torch.equal(found[good], wanted[good])
        assert not found.is_floating_point() or found[bad].isnan().all()
