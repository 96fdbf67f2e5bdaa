"""One RL step: sample, judge, learn. The same model, engine and training step as everywhere else."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Literal

from pydantic import Field, model_validator

from glasklar.config import Section
from glasklar.data.procedural import Mixture
from glasklar.data.tokenizer import Tokenizer
from glasklar.engine.engine import Engine
from glasklar.learn.loop import StepResult, train_step
from glasklar.learn.objectives import LanguageConfig, Loss, language_loss
from glasklar.learn.optim import Optimizer
from glasklar.model.transformer import Transformer
from glasklar.rl.objective import PolicyBatch, PolicyConfig, policy_loss, token_logprobs
from glasklar.rl.rollout import Groups, pack, sample_groups


class RolloutConfig(Section):
    """How a step gathers experience and learns from it.

    method          "grpo", or "rejection": likelihood of the right answers only (a baseline, RAFT)
    prompts         problems a step; samples: answers to each
    rounds          most rounds of sampling to replace groups whose rewards are all equal
    updates         optimiser steps on a step's answers
    length          tokens of a packed row; rows_multiple: rows are rounded up to it (fixed shapes are fast)
    format_weight   reward of a well-formed reply
    """

    method: Literal["grpo", "rejection"] = "grpo"
    prompts: int = Field(default=32, ge=1)
    samples: int = Field(default=16, ge=2)
    rounds: int = Field(default=2, ge=1)
    updates: int = Field(default=1, ge=1)
    max_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    format_weight: float = Field(default=0.0, ge=0)
    length: int = Field(default=256, ge=16)
    rows_multiple: int = Field(default=8, ge=1)
    policy: PolicyConfig = PolicyConfig()

    @model_validator(mode="after")
    def _fits(self) -> RolloutConfig:
        if self.max_tokens >= self.length:
            raise ValueError(
                f"max_tokens = {self.max_tokens} leave no room for a question in rows of length = {self.length}"
            )
        return self


def rl_step(
    model: Transformer,
    optimizer: Optimizer,
    engine: Engine,
    tokenizer: Tokenizer,
    mixture: Mixture,
    *,
    config: RolloutConfig,
    balance: LanguageConfig,
    reference: Transformer | None,
    seed: int,
    step: int,
    rate: float,
) -> tuple[list[StepResult], dict[str, float | int]]:
    """Step number `step` (from 0): everything in it follows from the weights, `seed` and `step`.

    Returns the optimiser steps' results (none if no group had variance) and what the doctor looks at.
    """
    engine.refresh()
    groups = sample_groups(
        engine,
        tokenizer,
        mixture,
        seed=seed,
        first=step * config.rounds * config.prompts,
        prompts=config.prompts,
        samples=config.samples,
        rounds=config.rounds,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        format_weight=config.format_weight,
    )
    vitals = describe(groups)
    results: list[StepResult] = []
    parts = _parts(groups, config, tokenizer)
    vitals["tokens"] = sum(int((part.batch.segments_BT >= 0).sum()) for part in parts)
    for part in parts:
        if reference is not None:
            part = replace(part, reference_BT=token_logprobs(reference, part.batch))
        results.append(
            train_step(
                model,
                optimizer,
                [part],
                partial(_loss, config=config, balance=balance),
                rate=rate,
                balance_speed=balance.balance_speed,
            )
        )
    return results, vitals


def _parts(groups: Groups, config: RolloutConfig, tokenizer: Tokenizer) -> list[PolicyBatch]:
    """The kept answers in `updates` packed batches, whole groups in each; right answers only for "rejection"."""
    samples = config.samples
    count = len(groups.kept) // samples
    parts = []
    for u in range(config.updates):
        chosen = [i for g in range(u, count, config.updates) for i in range(g * samples, (g + 1) * samples)]
        if config.method == "rejection":
            chosen = [i for i in chosen if groups.kept[i].correct]
        if chosen:
            answers = [groups.kept[i] for i in chosen]
            parts.append(
                pack(
                    answers,
                    groups.advantages[chosen],
                    tokenizer,
                    length=config.length,
                    rows_multiple=config.rows_multiple,
                )
            )
    return parts


def _loss(model: Transformer, part: PolicyBatch, *, config: RolloutConfig, balance: LanguageConfig) -> Loss:
    if config.method == "rejection":
        return language_loss(model, part.batch, balance)
    return policy_loss(model, part, config.policy, balance)


def describe(groups: Groups) -> dict[str, float | int]:
    """The vital signs of a step's sampling."""
    answers = groups.sampled
    return {
        "reward": groups.rewards.mean().item(),
        "correct": fmean(a.correct for a in answers),
        "thinking_share": fmean(a.thought for a in answers),
        "length": fmean(len(a.completion.ids) for a in answers),
        "zero_variance": groups.zero_variance,
        "truncated": fmean(a.truncated for a in answers),
        "unformed": fmean(not a.formed for a in answers),
        "sampled_tokens": sum(len(a.completion.ids) for a in answers),
    }
