"""The policy objective: GRPO (DeepSeekMath eq. 3, DeepSeek-R1 eq. 1-3) with the repairs found since.

- No division by the group's standard deviation: it favours questions that are too easy or too hard (Dr. GRPO).
- The sum runs over all tokens of the batch and is divided by their number, so long answers are not favoured (DAPO).
- The upper clip is wider than the lower: unlikely tokens may rise (DAPO "clip higher").
- KL to the reference with the k3 estimator times the ratio pi/pi_old, which makes its gradient unbiased (V3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from glasklar.config import Section
from glasklar.data.batches import Batch
from glasklar.learn.objectives import LanguageConfig, Loss, add_balance, forward, logprobs, targets, weighted_mean
from glasklar.model.transformer import Transformer


class PolicyConfig(Section):
    """clip_low, clip_high   the ratio pi/pi_old counts within [1 - low, 1 + high]
    kl_weight             beta of the KL penalty to the model that RL started from; 0 needs no reference
    """

    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.28, gt=0)
    kl_weight: float = Field(default=0.0, ge=0)


@dataclass(frozen=True, kw_only=True)
class PolicyBatch:
    """A packed batch of rollouts. All [B, T], aligned with the token that they speak of, like `Batch.weight_BT`.

    batch          weight 1 on sampled tokens that count; 0 on prompts, padding and truncated answers
    advantage_BT   reward above the group's mean
    sampled_BT     log-probability under the model that sampled
    reference_BT   log-probability under the reference model; None without a KL penalty
    """

    batch: Batch
    advantage_BT: Tensor
    sampled_BT: Tensor
    reference_BT: Tensor | None = None


def group_advantages(rewards: Tensor, samples: int) -> Tensor:
    """Rewards [P * G] -> reward minus the mean of its group of `samples` answers to one prompt."""
    groups = rewards.view(-1, samples)
    return (groups - groups.mean(dim=1, keepdim=True)).flatten()


def policy_loss(model: Transformer, rollouts: PolicyBatch, config: PolicyConfig, balance: LanguageConfig) -> Loss:
    """Negative clipped surrogate, averaged over tokens. Near 0 by construction: advantages of a group sum to 0."""
    batch = rollouts.batch
    output, _ = forward(model, batch)
    targets_BT, weight_BT = targets(batch, 1)
    logprob_BT, entropy_BT = logprobs(model, output.hidden_BTD, targets_BT)
    sampled_BT, advantage_BT = rollouts.sampled_BT.roll(-1, 1), rollouts.advantage_BT.roll(-1, 1)
    ratio_BT = ((logprob_BT - sampled_BT) * (weight_BT > 0)).exp()
    clipped_BT = ratio_BT.clamp(1 - config.clip_low, 1 + config.clip_high)
    surrogate_BT = torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)
    loss = -weighted_mean(surrogate_BT, weight_BT)
    with torch.no_grad():
        gap_BT = (sampled_BT - logprob_BT) * (weight_BT > 0)
        parts = {
            "loss": loss.item(),
            "entropy": weighted_mean(entropy_BT, weight_BT).item(),
            "sampler_kl": weighted_mean(k3(gap_BT), weight_BT).item(),
            "clipped": weighted_mean((ratio_BT != clipped_BT).float(), weight_BT).item(),
        }
    if config.kl_weight:
        assert rollouts.reference_BT is not None
        toward_BT = (rollouts.reference_BT.roll(-1, 1) - logprob_BT) * (weight_BT > 0)
        kl = weighted_mean(ratio_BT * k3(toward_BT), weight_BT)
        parts["kl"] = kl.item()
        loss = loss + config.kl_weight * kl
    total, load = add_balance(model, loss, output.routings, batch, balance)
    return Loss(total, parts, load)


def k3(log_ratio: Tensor) -> Tensor:
    """Schulman's non-negative estimator of KL(pi || other) from log(other/pi): r - log r - 1."""
    return log_ratio.exp() - log_ratio - 1


def token_logprobs(model: Transformer, batch: Batch) -> Tensor:
    """Log-probability of every token of a batch under `model`, aligned with the token itself; 0 where there is none."""
    with torch.no_grad():
        output, _ = forward(model, batch)
        targets_BT, weight_BT = targets(batch, 1)
        return (logprobs(model, output.hidden_BTD, targets_BT)[0] * (weight_BT > 0)).roll(1, 1)
