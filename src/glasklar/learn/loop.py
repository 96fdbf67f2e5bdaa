"""One optimisation step, the same for every stage, and what a stage's loop reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from glasklar.errors import GlasklarError
from glasklar.learn.objectives import Loss
from glasklar.learn.optim import Optimizer
from glasklar.model.transformer import Transformer

B = TypeVar("B")


@dataclass(frozen=True)
class StepResult:
    """What one step did. `load_max_mean`: busiest expert over mean expert, one figure a MoE layer."""

    parts: dict[str, float]
    gradient_norm: float
    load_max_mean: list[float] = field(default_factory=list)


def train_step(
    model: Transformer,
    optimizer: Optimizer,
    batches: Sequence[B],
    objective: Callable[[Transformer, B], Loss],
    *,
    rate: float,
    balance_speed: float,
) -> StepResult:
    """Gradients of the mean loss over `batches`, one optimiser step at `rate` times its peak, one bias update.

    Raises GlasklarError where loss or gradient is not finite; the weights are then as before the step.
    """
    parts: dict[str, float] = {}
    load: list[Tensor] = []
    for batch in batches:
        loss = objective(model, batch)
        (loss.total / len(batches)).backward()
        for name, value in loss.parts.items():
            parts[name] = parts.get(name, 0.0) + value / len(batches)
        load = [a + b for a, b in zip(load, loss.load, strict=True)] if load else loss.load
    if not all(math.isfinite(value) for value in parts.values()):
        raise GlasklarError(f"the loss is not finite ({parts}); lower the learning rate or lengthen the warm-up")
    norm = optimizer.step(rate)
    # A prediction module that was not trained in this step saw no tokens: its gate stays as it is.
    for layer, load_E in zip(model.moe_layers(), load, strict=False):
        if balance_speed:
            layer.gate.balance(load_E, balance_speed)
    return StepResult(parts, norm, [(load_E.max() / load_E.mean()).item() for load_E in load])
