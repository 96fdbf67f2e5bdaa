"""The stretch between two checkpoints: its time, work and energy, for terminal, metrics and ledger."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from glasklar.model.config import ModelConfig
from glasklar.model.cost import decode_flops_per_token, mtp_flops_per_token, training_flops_per_token
from glasklar.provenance.energy import EnergyMeter
from glasklar.provenance.ledger import checkpoint_data
from glasklar.recipe import AnyStage, Recipe, RLStage

SMOOTHING = 0.9


class Segment:
    """Counts tokens, FLOPs, seconds and energy of the steps done since it was opened."""

    def __init__(self, stage: AnyStage, recipe: Recipe, meter: EnergyMeter) -> None:
        self.stage, self.recipe, self.meter = stage, recipe, meter
        self.began = self.before = time.monotonic()
        self.steps, self.flops = 0, 0.0
        self.step_seconds: float | None = None
        self.last: dict[str, Any] = {}

    def line(self, step: int, tokens: int, figures: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The metrics line of a step just done; `tokens` and `seconds` count from the beginning of the run."""
        now = time.monotonic()
        took, self.before = now - self.before, now
        old = self.step_seconds
        self.step_seconds = took if old is None else SMOOTHING * old + (1 - SMOOTHING) * took
        sampled = figures.get("sampled_tokens", 0)
        self.flops += flops_of(self.stage, self.recipe.model, figures["tokens"], sampled)
        self.steps, self.last = self.steps + 1, figures or self.last
        return {
            "stage": self.stage.kind,
            "step": step,
            "of": self.stage.steps,
            **figures,
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "tokens_per_second": round((figures["tokens"] + sampled) / took, 1),
            "seconds_left": round((self.stage.steps - step) * self.step_seconds, 1),
            "lr": self.stage.optimizer.lr * self.stage.schedule.factor(step - 1, self.stage.steps),
        }

    def close(self, step: int, state_hash: str, mark: Any) -> dict[str, Any]:
        """Data of the checkpoint event that ends the segment."""
        energy = self.meter.stop()
        return checkpoint_data(
            stage=self.stage.kind,
            step=step,
            state_hash=state_hash,
            loss=self.last.get("loss", 0.0),
            gradient_norm=self.last.get("gradient_norm", 0.0),
            flops=self.flops,
            seconds=time.monotonic() - self.began,
            energy=energy.record(),
            cost=energy.cost(),
            metrics=mark,
        )

    def lost(self) -> dict[str, Any]:
        """What was done in a segment that ends without a checkpoint, for the ledger."""
        energy = self.meter.stop()
        return {
            "steps": self.steps,
            "flops": self.flops,
            "seconds": time.monotonic() - self.began,
            "energy": energy.record(),
            "cost": energy.cost(),
        }


def flops_of(stage: AnyStage, model: ModelConfig, tokens: int, sampled: int) -> float:
    """FLOPs of a step that trained on `tokens` and sampled so many."""
    length = stage.rollout.length if isinstance(stage, RLStage) else stage.length
    training = training_flops_per_token(model, context=length)
    if stage.language.mtp_weight:
        training += mtp_flops_per_token(model, context=length)
    return training * tokens + decode_flops_per_token(model, context=length // 2) * sampled


def work_after(recorded: dict[str, Any] | None, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Steps done after a recorded checkpoint (None: since the beginning), as the metrics show them, and seconds."""
    done, before = (0, 0.0) if recorded is None else (recorded["metrics"]["lines"], recorded["seconds_total"])
    later = lines[done:]
    seconds = later[-1]["seconds"] - before if later else 0.0
    return {"steps": sum("stage" in line for line in later), "seconds": round(seconds, 3)}
