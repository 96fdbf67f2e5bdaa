"""The learning rate over a stage: step -> factor on the peak rate."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from glasklar.config import Section


class ScheduleConfig(Section):
    """Linear warm-up, then the shape.

    warmup       steps from 0 to the peak
    shape        "constant"; "linear" or "cosine" from `decay_from` on, down to `final`
    decay_from   share of the stage after which the decay begins (0 = right after the warm-up; 0.6 = the last 40 %)
    final        factor reached with the last step
    """

    warmup: int = Field(default=0, ge=0)
    shape: Literal["constant", "linear", "cosine"] = "constant"
    decay_from: float = Field(default=0.0, ge=0, lt=1)
    final: float = Field(default=0.0, ge=0, le=1)

    def factor(self, step: int, steps: int) -> float:
        """Factor for step number `step` (from 0) of a stage of `steps` steps."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.shape == "constant":
            return rise
        begin = max(self.warmup, round(self.decay_from * steps))
        done = min(1.0, max(0.0, (step + 1 - begin) / max(steps - begin, 1)))
        curve = 1 - done if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return rise * (self.final + (1 - self.final) * curve)
