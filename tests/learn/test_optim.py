"""The optimiser against torch's own AdamW and Muon, and its exact resumption."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from glasklar.errors import CheckpointError, GlasklarError
from glasklar.learn.optim import Optimizer, OptimizerConfig, make_optimizer


class Net(nn.Module):
    """Every kind of weight that the network has, tiny."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.norm = nn.Parameter(torch.ones(8))
        self.wide = nn.Linear(12, 8, bias=False)
        self.tall = nn.Linear(8, 12, bias=False)
        self.gate_up_proj = nn.Linear(8, 20, bias=False)
        self.gate_up_EFD = nn.Parameter(torch.empty(3, 20, 8))
        self.down_EDF = nn.Parameter(torch.empty(3, 8, 10))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.3).to(dtype)


def set_gradients(model: nn.Module, step: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in model.parameters():
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)
    return {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]


def test_adamw_against_torch() -> None:
    ours, theirs = Net(), Net()
    optimizer = make_optimizer(ours, OptimizerConfig(lr=1e-2, weight_decay=0.1, clip_norm=3.0))
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    oracle = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": [theirs.norm], "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), fused=False, foreach=False,
    )  # fmt: skip
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        wanted = nn.utils.clip_grad_norm_(theirs.parameters(), 3.0)
        oracle.step()
        assert optimizer.step(1.0) == pytest.approx(wanted.item(), rel=1e-5)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=name)


def test_muon_against_torch() -> None:
    """torch's Muon takes matrices only: experts are given to it one by one, gate and up apart."""
    model = Net()
    parts = {}
    for name, tensor in model.named_parameters():
        if name in ("wide.weight", "tall.weight", "gate_up_proj.weight", "gate_up_EFD", "down_EDF"):
            pieces = (
                tensor.detach().clone().reshape(-1, 10 if "gate_up" in name else tensor.shape[-2], tensor.shape[-1])
            )
            parts[name] = [nn.Parameter(piece.clone()) for piece in pieces]
    oracle = torch.optim.Muon(
        [piece for pieces in parts.values() for piece in pieces],
        lr=2e-2, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    config = OptimizerConfig(kind="muon", lr=2e-2, weight_decay=0.1, update_rms=0.2, clip_norm=None)
    optimizer = make_optimizer(model, config)
    for step in range(3):
        grads = set_gradients(model, step)
        for name, pieces in parts.items():
            for piece, grad in zip(pieces, grads[name].reshape(len(pieces), *pieces[0].shape), strict=True):
                piece.grad = grad.clone()
        oracle.step()
        optimizer.step(1.0)
    moved = 2e-2 * 0.2 * math.sqrt(20)
    for name, pieces in parts.items():
        mine = dict(model.named_parameters())[name].detach().reshape(len(pieces), *pieces[0].shape)
        # Both iterate in bf16; they normalise in different precision.
        torch.testing.assert_close(mine, torch.stack(list(pieces)).detach(), rtol=0, atol=0.03 * moved, msg=name)


def test_muon_leaves_embedding_norm_and_gate_to_adamw() -> None:
    model = Net()
    optimizer = make_optimizer(model, OptimizerConfig(kind="muon"))
    by_adamw = {name.removeprefix("exp_avg.") for name in optimizer.state_tensors() if name.startswith("exp_avg.")}
    assert by_adamw == {"embed_tokens.weight", "norm"}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_small_steps_survive_in_the_masters(kind: str) -> None:
    """A step below bf16's resolution must add up over steps, not vanish."""
    model = Net(torch.bfloat16)
    optimizer = make_optimizer(model, OptimizerConfig(kind=kind, lr=1e-5, weight_decay=0.0))
    before = model.tall.weight.detach().clone()
    masters = optimizer.state_tensors()["master.tall.weight"].clone()
    set_gradients(model, 0)
    optimizer.step(1.0)
    assert (model.tall.weight == before).float().mean() > 0.9
    assert (optimizer.state_tensors()["master.tall.weight"] != masters).float().mean() > 0.9
    assert model.tall.weight.dtype == torch.bfloat16
    assert model.tall.weight.grad is None


def run(optimizer: Optimizer, model: nn.Module, steps: range) -> None:
    for step in steps:
        set_gradients(model, step)
        optimizer.step(1 / (step + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_resumed_run_is_bit_equal(kind: str, dtype: torch.dtype) -> None:
    config = OptimizerConfig(kind=kind, lr=1e-2)
    whole, first, second = Net(dtype), Net(dtype), Net(dtype)
    run(make_optimizer(whole, config), whole, range(6))
    optimizer = make_optimizer(first, config)
    run(optimizer, first, range(3))
    saved = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    resumed = make_optimizer(second, config)
    resumed.load_state_tensors(saved)
    run(resumed, second, range(3, 6))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_parameter_without_gradient_stays(kind: str) -> None:
    model = Net()
    optimizer = make_optimizer(model, OptimizerConfig(kind=kind, lr=1e-2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_gradients(model, 0)
    model.tall.weight.grad = model.norm.grad = None
    optimizer.step(1.0)
    after = dict(model.named_parameters())
    assert {name for name in before if torch.equal(before[name], after[name])} == {"tall.weight", "norm"}


def test_gradient_that_is_not_finite_changes_nothing() -> None:
    model = Net()
    optimizer = make_optimizer(model, OptimizerConfig())
    before = model.wide.weight.detach().clone()
    set_gradients(model, 0)
    model.tall.weight.grad[0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(GlasklarError, match="nan"):
        optimizer.step(1.0)
    assert torch.equal(model.wide.weight, before)


def test_foreign_state_is_refused() -> None:
    optimizer = make_optimizer(Net(), OptimizerConfig(kind="muon"))
    with pytest.raises(CheckpointError, match=r"exp_avg\.|momentum\."):
        optimizer.load_state_tensors(make_optimizer(Net(), OptimizerConfig(kind="adamw")).state_tensors())
    damaged = dict(optimizer.state_tensors())
    damaged["master.norm"] = torch.ones(9)
    with pytest.raises(CheckpointError, match=r"master\.norm"):
        optimizer.load_state_tensors(damaged)
