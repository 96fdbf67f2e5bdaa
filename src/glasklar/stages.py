"""The stages of a recipe as runners: `step(k)` follows from the weights, the seed and k alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from glasklar.data.batches import Batch, Packer
from glasklar.data.procedural import Mixture
from glasklar.data.tokenizer import Tokenizer
from glasklar.engine.engine import Engine
from glasklar.learn.loop import StepResult, train_step
from glasklar.learn.objectives import language_loss
from glasklar.learn.optim import Optimizer
from glasklar.model.transformer import Transformer
from glasklar.recipe import LanguageStage, RLStage
from glasklar.rl.doctor import examine
from glasklar.rl.loop import rl_step


class Runner(Protocol):
    """One stage on one model. `step` returns the figures of a step, "tokens" (trained in it) among them."""

    def step(self, k: int) -> dict[str, Any]: ...


class LanguageRunner:
    """`pretrain`, `sft` and `distil`: likelihood of packed documents."""

    def __init__(
        self,
        stage: LanguageStage,
        model: Transformer,
        optimizer: Optimizer,
        packer: Packer,
        device: str,
    ) -> None:
        self.stage, self.model, self.optimizer, self.packer, self.device = stage, model, optimizer, packer, device

    def step(self, k: int) -> dict[str, Any]:
        stage = self.stage
        batch = self.packer.batch(k)
        result = train_step(
            self.model,
            self.optimizer,
            [part.to(self.device) for part in split_rows(batch, stage.micro or stage.rows)],
            partial(language_loss, config=stage.language),
            rate=stage.schedule.factor(k, stage.steps),
            balance_speed=stage.language.balance_speed,
        )
        return {**figures([result]), "tokens": int((batch.segments_BT >= 0).sum())}


class PolicyRunner:
    """`rl`: answers sampled by the engine, judged by the checkers."""

    def __init__(
        self,
        stage: RLStage,
        model: Transformer,
        optimizer: Optimizer,
        engine: Engine,
        tokenizer: Tokenizer,
        mixture: Mixture,
        seed: int,
        reference: Transformer | None,
    ) -> None:
        self.stage, self.model, self.optimizer = stage, model, optimizer
        self.engine, self.tokenizer, self.mixture, self.seed = engine, tokenizer, mixture, seed
        self.reference = reference

    def step(self, k: int) -> dict[str, Any]:
        stage = self.stage
        results, vitals = rl_step(
            self.model,
            self.optimizer,
            self.engine,
            self.tokenizer,
            self.mixture,
            config=stage.rollout,
            balance=stage.language,
            reference=self.reference,
            seed=self.seed,
            step=k,
            rate=stage.schedule.factor(k, stage.steps),
        )
        line = {**figures(results), **vitals}
        warnings = examine(line)
        return {**line, "warnings": warnings} if warnings else line


def split_rows(batch: Batch, micro: int) -> list[Batch]:
    """A batch in parts of `micro` rows, whose gradients are summed."""
    return [
        Batch(**{name: tensor[i : i + micro] for name, tensor in vars(batch).items()})
        for i in range(0, batch.ids_BT.shape[0], micro)
    ]


def figures(results: Sequence[StepResult]) -> dict[str, Any]:
    """Means over the optimiser steps of one stage step; empty where there was none."""
    if not results:
        return {}
    parts = {name: sum(r.parts[name] for r in results) / len(results) for name in results[0].parts}
    return {
        **parts,
        "gradient_norm": sum(r.gradient_norm for r in results) / len(results),
        "load_max_mean": [round(value, 4) for value in results[-1].load_max_mean],
    }
