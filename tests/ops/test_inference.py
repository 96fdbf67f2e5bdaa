"""Twins for passes without gradients against the plain reference: values, fp32 and bf16, odd shapes and strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glasklar.ops import inference, reference
from glasklar.ops.select import TORCH_CPU

TYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
    assert error < TOLERANCE[found.dtype], f"off by {error:.2e}"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(2, 5, 48), (7, 33), (1, 1, 192)])
def test_rms_norm_against_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = normal(*shape, seed=1, dtype=dtype), normal(shape[-1], seed=2, dtype=dtype)
    same(inference.rms_norm(x, weight, 1e-6), reference.rms_norm(x.float(), weight.float(), 1e-6).to(dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("offset", [0, 3])
def test_rotate_against_reference(offset: int, interleave: bool, dtype: torch.dtype) -> None:
    """`offset`: the rotary part as it lies behind an odd number of other values."""
    x = normal(2, 5, 3, 12 + offset, seed=4, dtype=dtype)[..., offset:]
    angles = normal(2, 5, 1, 6, seed=3, dtype=torch.float32) * 9
    found = inference.rotate(x, angles.cos(), angles.sin(), interleave)
    same(found, reference.rotate(x, angles.cos(), angles.sin(), interleave))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("B", "H", "G", "T", "S"), [(3, 4, 1, 1, 33), (2, 6, 2, 5, 17), (1, 2, 2, 9, 9), (5, 3, 3, 1, 1)]
)
def test_attention_against_reference(
    B: int, H: int, G: int, T: int, S: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = normal(B, T, H, 12, seed=5, dtype=dtype).transpose(1, 2)
    kv = normal(B, G, S, 20, seed=6, dtype=dtype)
    seen = torch.arange(S) <= torch.arange(T)[None, :, None] + torch.arange(B)[:, None, None]
    mask = torch.zeros(B, T, S, dtype=dtype).masked_fill_(~seen, float("-inf"))
    wanted = reference.attention(*(x.float() for x in (q, kv[..., :12], kv[..., 12:], mask)), 0.3).to(dtype)
    same(inference.attention(q, kv[..., :12], kv[..., 12:], mask, 0.3), wanted)
    monkeypatch.setattr(inference, "MOST_SCORES", 2 * B * H * S)  # two queries at a time
    same(inference.attention(q, kv[..., :12], kv[..., 12:], mask, 0.3), wanted)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("T", [1, 7, 64])
@pytest.mark.parametrize("cheap", [True, False])
def test_experts_against_reference(cheap: bool, T: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cheap:
        monkeypatch.setattr(inference, "CHEAP_EXPERT", 0)
    x = normal(T, 24, seed=7, dtype=dtype)
    gate_up, down = normal(6, 20, 24, seed=8, dtype=dtype), normal(6, 24, 10, seed=9, dtype=dtype)
    ids = torch.randn(T, 6, generator=torch.Generator().manual_seed(1)).topk(2).indices
    weights = torch.rand(T, 2, generator=torch.Generator().manual_seed(2))
    wanted = reference.experts(x.float(), ids, weights, gate_up.float(), down.float()).to(dtype)
    same(inference.experts(x, ids, weights, gate_up, down), wanted)


def test_swiglu_against_reference() -> None:
    x = normal(5, 26, seed=10, dtype=torch.float32)
    before = x.clone()
    same(inference.swiglu(x), reference.swiglu(x))
    assert x.equal(before)


def test_table_takes_them_only_where_no_gradient_is_recorded() -> None:
    x = normal(3, 8, seed=11, dtype=torch.float32).requires_grad_()
    weight = torch.ones(8)
    assert TORCH_CPU.rms_norm(x, weight, 1e-6).grad_fn is not None
    with torch.inference_mode():
        assert TORCH_CPU.rms_norm(x, weight, 1e-6).equal(inference.rms_norm(x, weight, 1e-6))
