"""Every faster twin of an operation against the plain reference: values and gradients, fp32 and bf16, odd shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from glasklar.errors import RecipeError
from glasklar.model.attention import document_mask
from glasklar.ops.select import REFERENCE, Ops, select, tables
from glasklar.runtime import Runtime

TWINS = [table for table in tables().values() if table is not REFERENCE]
TYPES = [torch.float32, torch.bfloat16]
# Relative to the largest entry; a bf16 value holds 8 bits, and twins may round in other places.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=TWINS, ids=lambda table: table.name)
def twin(request: pytest.FixtureRequest) -> Ops:
    return request.param


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(reference: Callable[..., Any], twin: Callable[..., Any], inputs: list[Any], dtype: torch.dtype) -> None:
    """The twin in `dtype` against the reference in fp32 on the same numbers: results, then all gradients."""

    def run(function: Callable[..., Any], kind: torch.dtype) -> list[Tensor]:
        leaves = [
            x.detach().to(kind).requires_grad_() if isinstance(x, Tensor) and x.requires_grad else x for x in inputs
        ]
        found = function(*leaves)
        results = found if isinstance(found, tuple) else (found,)
        loss = sum((r.float() * normal(*r.shape, seed=90 + i)).sum() for i, r in enumerate(results) if r.requires_grad)
        loss.backward()
        return [*results, *(x.grad for x in leaves if isinstance(x, Tensor) and x.requires_grad)]

    for place, (a, b) in enumerate(zip(run(reference, torch.float32), run(twin, dtype), strict=True)):
        error = (a.float() - b.float()).abs().max() / a.float().abs().max().clamp_min(1e-2)
        assert error < TOLERANCE[dtype], f"result or gradient {place} off by {error:.2e}"


def leaf(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Values that both types hold exactly, so that only the operation differs."""
    return normal(*shape, seed=seed, dtype=dtype).float().requires_grad_()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(2, 5, 48), (7, 33), (1, 1, 192)])
def test_rms_norm_against_reference(twin: Ops, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(
        REFERENCE.rms_norm,
        twin.rms_norm,
        [leaf(*shape, seed=1, dtype=dtype), leaf(shape[-1], seed=2, dtype=dtype), 1e-6],
        dtype,
    )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(2, 5, 48), (7, 33), (90, 192)])
def test_add_rms_norm_against_reference(twin: Ops, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Both results are used, so that two gradients meet."""
    inputs = [leaf(*size, seed=30 + i, dtype=dtype) for i, size in enumerate([shape, shape, shape[-1:]])]
    check(REFERENCE.add_rms_norm, twin.add_rms_norm, [*inputs, 1e-6], dtype)


@pytest.mark.parametrize("used", [0, 1])
def test_add_rms_norm_with_one_result_unused(twin: Ops, used: int) -> None:
    inputs = [leaf(*size, seed=30 + i, dtype=torch.float32) for i, size in enumerate([(7, 33), (7, 33), (33,)])]

    def gradients(ops: Ops) -> list[Tensor | None]:
        result = ops.add_rms_norm(*inputs, 1e-6)[used]
        loss = (result * normal(7, 33, seed=34)).sum()
        return list(torch.autograd.grad(loss, inputs, allow_unused=True))

    for wanted, found in zip(gradients(REFERENCE), gradients(twin), strict=True):
        if wanted is None or found is None:
            assert wanted is None
            assert found is None or not found.any()
        else:
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize(("K", "R"), [(12, 12), (28, 12), (48, 32)])
def test_rotate_against_reference(
    twin: Ops, heads: int | None, interleave: bool, K: int, R: int, dtype: torch.dtype
) -> None:
    angles = normal(2, 5, R // 2, seed=3) * 9
    shape = (2, 5, K) if heads is None else (2, 5, heads, K)
    cos, sin = (angles.cos(), angles.sin()) if heads is None else (angles.cos()[:, :, None], angles.sin()[:, :, None])
    check(REFERENCE.rotate, twin.rotate, [leaf(*shape, seed=4, dtype=dtype), cos, sin, interleave], dtype)


def packed_segments(B: int, T: int) -> Tensor:
    """Documents of changing length, the last row ending in padding."""
    lengths = torch.arange(3, 3 + T)
    segments = torch.repeat_interleave(torch.arange(T), lengths)[:T].repeat(B, 1)
    segments[-1, -2:] = -1
    return segments


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("B", "H", "G", "T", "K", "V"),
    [
        (2, 3, 3, 7, 24, 16),
        (1, 4, 2, 33, 16, 16),
        (2, 6, 6, 64, 48, 32),
        (1, 2, 2, 150, 32, 64),
        (1, 4, 2, 300, 20, 8),
        (1, 1, 1, 1, 8, 8),
    ],
)
def test_attention_against_reference(
    twin: Ops, B: int, H: int, G: int, T: int, K: int, V: int, dtype: torch.dtype
) -> None:
    mask = document_mask(packed_segments(B, T), dtype)
    q, k, v = (
        leaf(B, T, heads, width, seed=seed, dtype=dtype)
        for seed, heads, width in [(5, H, K), (6, G, K), (7, G, V)]
    )  # fmt: skip

    # Strided, as the network hands them over: heads behind positions.
    def strided(attention: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda q, k, v: attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, K**-0.5)

    check(strided(REFERENCE.attention), strided(twin.attention), [q, k, v], dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("B", "H", "T", "N", "R", "V"), [(2, 3, 7, 16, 8, 16), (1, 4, 33, 9, 10, 5), (2, 2, 70, 32, 16, 48)]
)
def test_latent_attention_against_reference(
    twin: Ops, B: int, H: int, T: int, N: int, R: int, V: int, dtype: torch.dtype
) -> None:
    mask = document_mask(packed_segments(B, T), dtype)
    q = leaf(B, T, H, N + R, seed=35, dtype=dtype)
    kv, key = leaf(B, T, H, N + V, seed=36, dtype=dtype), leaf(B, T, R, seed=37, dtype=dtype)
    check(REFERENCE.latent_attention, twin.latent_attention, [q, kv, key, mask, (N + R) ** -0.5], dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("T", "D", "E"), [(1, 24, 8), (37, 33, 5), (300, 64, 19), (90, 128, 1)])
def test_gate_against_reference(twin: Ops, T: int, D: int, E: int, dtype: torch.dtype) -> None:
    """Weights and logits are fp32 in any case: logits decide, and keep all their digits."""
    x, weight = leaf(T, D, seed=38, dtype=dtype), leaf(E, D, seed=39, dtype=torch.float32)
    check(REFERENCE.gate, lambda x, w: twin.gate(x, w.float()), [x, weight], dtype)
    logits = twin.gate(x.to(dtype), weight)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, REFERENCE.gate(x, weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("T", "S"), [(1, 40), (3, 17)])
def test_attention_over_a_cache(twin: Ops, T: int, S: int, dtype: torch.dtype) -> None:
    """Decoding: few queries, one shared key/value head (absorbed MLA), no gradients."""
    q, k = normal(2, 4, T, 40, seed=8, dtype=dtype), normal(2, 1, S, 40, seed=9, dtype=dtype)
    mask = torch.zeros(2, T, S, dtype=dtype)
    mask[0, :, S // 2 :] = float("-inf")
    with torch.no_grad():
        wanted = REFERENCE.attention(q.float(), k.float(), k[..., :32].float(), mask.float(), 0.2)
        given = twin.attention(q, k, k[..., :32], mask, 0.2)
    assert (wanted - given.float()).abs().max() < TOLERANCE[dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("shape", "F"), [((5, 24), 16), ((2, 3, 64), 40), ((300, 17), 11), ((2, 50, 32), 200)])
def test_feed_forward_against_reference(twin: Ops, shape: tuple[int, ...], F: int, dtype: torch.dtype) -> None:
    D = shape[-1]
    inputs = [leaf(*size, seed=10 + i, dtype=dtype) for i, size in enumerate([shape, (2 * F, D), (D, F)])]
    check(REFERENCE.feed_forward, twin.feed_forward, inputs, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "N"), [((5, 24), 16), ((2, 3, 64), 40), ((300, 17), 11), ((2, 70, 130), 210)])
def test_linear_against_reference(twin: Ops, shape: tuple[int, ...], N: int, bias: bool, dtype: torch.dtype) -> None:
    inputs = [leaf(*shape, seed=23, dtype=dtype), leaf(N, shape[-1], seed=24, dtype=dtype)]
    check(REFERENCE.linear, twin.linear, [*inputs, leaf(N, seed=25, dtype=dtype)] if bias else inputs, dtype)


@pytest.mark.parametrize(("n", "R", "C"), [(3, 16, 40), (2, 40, 16), (1, 7, 7), (2, 100, 130), (1, 300, 400)])
def test_orthogonalise_against_reference(twin: Ops, n: int, R: int, C: int) -> None:
    """Against the same steps in fp32; twins may take the products in bf16, as the reference does by default."""
    given = normal(n, R, C, seed=26)
    kept = given.clone()
    wanted, found = REFERENCE.orthogonalise(given, torch.float32), twin.orthogonalise(given)
    assert torch.equal(given, kept)
    assert found.shape == given.shape
    assert (wanted - found.float()).norm() < 5e-2 * wanted.norm()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("T", "E", "A"), [(1, 4, 2), (37, 5, 3), (300, 4, 2), (20, 8, 1)])
def test_experts_against_reference(twin: Ops, T: int, E: int, A: int, dtype: torch.dtype) -> None:
    D, F = 24, 16
    ids = normal(T, E, seed=11).topk(A, -1).indices
    ids[ids == E - 1] = 0 if A == 1 else ids[ids == E - 1]  # one expert without tokens where that is possible
    weights = normal(T, A, seed=12).sigmoid().requires_grad_()
    inputs = [
        leaf(T, D, seed=13, dtype=dtype), ids, weights,
        leaf(E, 2 * F, D, seed=14, dtype=dtype), leaf(E, D, F, seed=15, dtype=dtype),
    ]  # fmt: skip
    check(REFERENCE.experts, twin.experts, inputs, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_experts_are_deterministic(twin: Ops, dtype: torch.dtype) -> None:
    x = normal(300, 24, seed=16, dtype=dtype).requires_grad_()
    gate_up, down = normal(6, 32, 24, seed=17, dtype=dtype), normal(6, 24, 16, seed=18, dtype=dtype)
    ids, weights = normal(300, 6, seed=19).topk(3, -1).indices, normal(300, 3, seed=20).sigmoid()
    runs = []
    for _ in range(2):
        y = twin.experts(x, ids, weights, gate_up, down)
        runs.append((y, *torch.autograd.grad(y.float().square().sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("T", "W"), [(5, 17), (70, 512)])
def test_token_logprobs_against_reference(twin: Ops, T: int, W: int, dtype: torch.dtype) -> None:
    targets = torch.arange(T) * 7 % W
    inputs = [leaf(T, 24, seed=21, dtype=dtype), leaf(W, 24, seed=22, dtype=dtype), targets]
    check(REFERENCE.token_logprobs, twin.token_logprobs, inputs, dtype)


def test_select_names_the_known_tables() -> None:
    assert select(Runtime(device="cpu", compute="bf16")).name != "reference"
    assert select(Runtime(device="cpu"), "reference") is REFERENCE
    with pytest.raises(RecipeError, match="torch_cpu"):
        select(Runtime(), "fastest")
