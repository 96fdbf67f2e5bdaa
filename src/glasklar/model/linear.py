"""A projection computed by the table of operations."""

from __future__ import annotations

from torch import Tensor, nn

from glasklar.ops.select import Ops


class Linear(nn.Linear):
    """[..., inputs] -> [..., outputs]."""

    def __init__(self, inputs: int, outputs: int, ops: Ops, *, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight, self.bias)
