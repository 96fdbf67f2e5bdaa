"""AdamW and Muon over fp32 masters: the model computes in bf16, the optimiser keeps the weights that count.

Muon (Jordan 2024; arXiv 2502.16982; DeepSeek-V4) replaces a matrix's momentum by its nearest semi-orthogonal matrix.
`torch.optim.Muon` takes two-dimensional weights only and one at a time; here all matrices of one shape, stacked experts
included, go through Newton-Schulz as one batch. Embedding, head, gates, norms and biases stay on AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from glasklar.config import Section
from glasklar.errors import CheckpointError, GlasklarError
from glasklar.model.transformer import Transformer
from glasklar.ops.select import REFERENCE, Ops

# Looked up or compared, not multiplied as maps between vectors: orthogonal updates make no sense for them.
NOT_FOR_MUON = ("embed_tokens.weight", "lm_head.weight", "gate.weight")


class OptimizerConfig(Section):
    """Which rule moves the weights.

    kind            "adamw" (arXiv 1711.05101), or "muon" for the matrices inside blocks and AdamW for the rest
    lr              peak learning rate; Muon's updates are scaled to AdamW's size, so that one rate serves both
    adam_lr_ratio   AdamW's rate over `lr` where kind is "muon"
    weight_decay    decoupled decay, on matrices only
    betas, eps      AdamW's moments and denominator
    momentum        Muon's Nesterov momentum
    update_rms      root mean square of a Muon update before `lr` (arXiv 2502.16982: 0.2; DeepSeek-V4: 0.18)
    clip_norm       gradients are scaled down to this norm; absent: never
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=3e-4, gt=0)
    adam_lr_ratio: float = Field(default=1.0, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    update_rms: float = Field(default=0.18, gt=0)
    clip_norm: float | None = Field(default=1.0, gt=0)


@dataclass(frozen=True)
class Weight:
    """A parameter of the model with its master copy; they are one tensor where the parameter is fp32 already."""

    name: str
    parameter: nn.Parameter
    master: Tensor


class Optimizer:
    """Consumes `.grad` of a model's parameters and writes the parameters. A parameter without gradient stays as it is.

    Build it after the weights are initialised or loaded: the masters are copies. Muon takes `orthogonalise` from `ops`.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, ops: Ops = REFERENCE) -> None:
        self.config = config
        self.weights = [
            Weight(name, parameter, parameter.detach().float()) for name, parameter in model.named_parameters()
        ]
        by_muon = [weight for weight in self.weights if config.kind == "muon" and takes_muon(weight)]
        names = {weight.name for weight in by_muon}
        self.muon = Muon(by_muon, config, ops.orthogonalise) if by_muon else None
        self.adamw = adamw([weight for weight in self.weights if weight.name not in names], config)

    @torch.no_grad()
    def step(self, lr_scale: float) -> float:
        """One update at `lr_scale` times the peak rate; frees the gradients. Returns their norm before clipping.

        Raises GlasklarError where the norm is not finite; the weights are then as before.
        """
        with_grad = [weight for weight in self.weights if weight.parameter.grad is not None]
        for weight in with_grad:
            assert weight.parameter.grad is not None
            weight.master.grad = weight.parameter.grad.float()
            weight.parameter.grad = None
        norm = self._clip([weight.master.grad for weight in with_grad if weight.master.grad is not None])
        rate = self.config.lr * lr_scale
        ratio = 1.0 if self.muon is None else self.config.adam_lr_ratio
        for group in self.adamw.param_groups:
            group["lr"] = rate * ratio
        self.adamw.step()
        if self.muon is not None:
            self.muon.step(rate)
        for weight in with_grad:
            weight.master.grad = None
        self._publish(with_grad)
        return norm

    def _clip(self, grads: list[Tensor]) -> float:
        norm = torch.stack(torch._foreach_norm(grads)).norm().item()
        if not math.isfinite(norm):
            raise GlasklarError(f"the gradient norm is {norm}; lower the learning rate or lengthen the warm-up")
        limit = self.config.clip_norm
        if limit is not None and norm > limit:
            torch._foreach_mul_(grads, limit / norm)
        return norm

    def _publish(self, weights: list[Weight]) -> None:
        copies = [weight for weight in weights if weight.parameter.dtype != torch.float32]
        if copies:
            torch._foreach_copy_([w.parameter.data for w in copies], [w.master for w in copies])

    def state_tensors(self) -> dict[str, Tensor]:
        """All that a bit-exact resume needs, by flat names ("master.layers.0…", "exp_avg.…"); not copies."""
        return dict(self._state())

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for weight in self.weights:
            yield f"master.{weight.name}", weight.master
            kept = self.adamw.state.get(weight.master)
            if kept is None:
                assert self.muon is not None
                kept = {"momentum": self.muon.momentum[weight.name]}
            for key, tensor in kept.items():
                yield f"{key}.{weight.name}", tensor

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `state_tensors` gave, and writes the model's parameters from the masters.

        Raises CheckpointError where names, shapes or types differ; nothing is changed then.
        """
        mine = self.state_tensors()
        if odd := sorted(mine.keys() ^ tensors.keys()):
            side = "lacks" if odd[0] in mine else "has an unknown"
            raise CheckpointError(
                f"optimiser state {side} {odd[0]!r} ({len(odd)} names differ); resume with its recipe"
            )
        for name, tensor in mine.items():
            given = tensors[name]
            if given.shape != tensor.shape or given.dtype != tensor.dtype:
                raise CheckpointError(
                    f"optimiser state {name!r} is {given.dtype} {list(given.shape)}, "
                    f"expected {tensor.dtype} {list(tensor.shape)}; resume with its recipe"
                )
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])
        self._publish(self.weights)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """An optimiser for all parameters of `model`, with the operations that it computes with; see `Optimizer`."""
    return Optimizer(model, config, model.ops if isinstance(model, Transformer) else REFERENCE)


def takes_muon(weight: Weight) -> bool:
    return weight.master.ndim >= 2 and not weight.name.endswith(NOT_FOR_MUON)


def adamw(weights: list[Weight], config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's fused AdamW over the masters; decay on matrices only. Its state exists from the start, for saving."""
    groups = [
        {"params": [w.master for w in weights if w.master.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [w.master for w in weights if w.master.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    for weight in weights:
        optimizer.state[weight.master] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(weight.master),
            "exp_avg_sq": torch.zeros_like(weight.master),
        }
    return optimizer


class Muon:
    """Momentum, orthogonalised. Agrees with `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` at update_rms 0.2."""

    def __init__(self, weights: list[Weight], config: OptimizerConfig, orthogonalise: Callable[..., Tensor]) -> None:
        self.config, self.orthogonalise = config, orthogonalise
        self.momentum = {weight.name: torch.zeros_like(weight.master) for weight in weights}
        self.by_shape: dict[tuple[int, int], list[Weight]] = {}
        for weight in weights:
            rows, columns = as_matrices(weight.name, weight.master).shape[1:]
            self.by_shape.setdefault((rows, columns), []).append(weight)

    def step(self, rate: float) -> None:
        for shape, members in self.by_shape.items():
            moving = [(weight, weight.master.grad) for weight in members if weight.master.grad is not None]
            if not moving:
                continue
            weights, grads = [weight for weight, _ in moving], [grad for _, grad in moving]
            momentum = [self.momentum[weight.name] for weight in weights]
            torch._foreach_lerp_(momentum, grads, 1 - self.config.momentum)
            torch._foreach_lerp_(grads, momentum, self.config.momentum)  # Nesterov: look ahead along the momentum
            stacks = [as_matrices(w.name, grad) for w, grad in zip(weights, grads, strict=True)]
            updates = self.orthogonalise(torch.cat(stacks)).split([len(stack) for stack in stacks])
            scale = self.config.update_rms * math.sqrt(max(shape))
            for weight, update in zip(weights, updates, strict=True):
                weight.master.mul_(1 - rate * self.config.weight_decay)
                weight.master.add_(update.reshape(weight.master.shape), alpha=-rate * scale)


def as_matrices(name: str, tensor: Tensor) -> Tensor:
    """[n, rows, columns]: experts one by one; gate and up, which share a tensor for speed, as the two maps they are."""
    halves = 2 if "gate_up" in name else 1
    rows, columns = tensor.shape[-2:]
    return tensor.reshape(-1, rows // halves, columns)
