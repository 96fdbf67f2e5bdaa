"""What is minimised. An objective takes the model and a batch and returns a scalar with the parts worth logging.

Targets are read off the batch itself: the token at i predicts the token at i+1 where both belong to one document.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor

from glasklar.config import Section
from glasklar.data.batches import Batch
from glasklar.model.attention import Positions, document_mask
from glasklar.model.moe import Routing, balance_loss
from glasklar.model.transformer import Output, Transformer


class LanguageConfig(Section):
    """Next-token prediction with its companions.

    mtp_weight       lambda of multi-token prediction (V3: 0.3, later 0.1); 0 leaves the modules untrained
    balance_weight   alpha of the sequence-wise balance loss (V3: 1e-4)
    balance_speed    gamma of the gate bias (V3: 1e-3)
    """

    mtp_weight: float = Field(default=0.3, ge=0)
    balance_weight: float = Field(default=1e-4, ge=0)
    balance_speed: float = Field(default=1e-3, ge=0)


@dataclass(frozen=True)
class Loss:
    """The scalar to differentiate, the parts to log, and the tokens that each expert of each MoE layer saw [E]."""

    total: Tensor
    parts: dict[str, float]
    load: list[Tensor] = field(default_factory=list)


def forward(model: Transformer, batch: Batch) -> tuple[Output, Positions]:
    """Hidden states of a packed batch; attention stays inside documents."""
    at = model.at(batch.position_BT, document_mask(batch.segments_BT, model.dtype))
    return model(batch.ids_BT, at), at


def targets(batch: Batch, ahead: int) -> tuple[Tensor, Tensor]:
    """For each position the token `ahead` further on, and its weight (0 where it lies outside the document)."""
    ids_BT = batch.ids_BT.roll(-ahead, dims=1)
    same_BT = batch.segments_BT == batch.segments_BT.roll(-ahead, dims=1)
    same_BT[:, -ahead:] = False
    return ids_BT, batch.weight_BT.roll(-ahead, dims=1) * same_BT


def logprobs(model: Transformer, hidden_BTD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets and entropies, both [B, T], fp32, nats."""
    logprob_T, entropy_T = model.ops.token_logprobs(hidden_BTD.flatten(0, 1), model.head_WD, targets_BT.flatten())
    return logprob_T.view_as(targets_BT), entropy_T.view_as(targets_BT)


def weighted_mean(values_BT: Tensor, weight_BT: Tensor) -> Tensor:
    return (values_BT * weight_BT).sum() / weight_BT.sum().clamp_min(1e-9)


def language_loss(model: Transformer, batch: Batch, config: LanguageConfig) -> Loss:
    """Mean negative log-likelihood of the weighted tokens, plus MTP (eq. 24-25) and balance losses (eq. 17)."""
    output, at = forward(model, batch)
    targets_BT, weight_BT = targets(batch, 1)
    nll_BT = -logprobs(model, output.hidden_BTD, targets_BT)[0]
    loss = weighted_mean(nll_BT, weight_BT)
    parts = {"loss": loss.item()}
    routings = list(output.routings)
    if config.mtp_weight and len(model.mtp):
        mtp, more = prediction_loss(model, output, at, batch)
        routings += more
        parts["mtp_loss"] = mtp.item()
        loss = loss + config.mtp_weight * mtp
    total, load = add_balance(model, loss, routings, batch, config)
    return Loss(total, parts, load)


def prediction_loss(
    model: Transformer, output: Output, at: Positions, batch: Batch
) -> tuple[Tensor, list[Routing | None]]:
    """Mean loss over the depths of multi-token prediction: depth k joins state i with token i+k, predicts i+k+1."""
    hidden_BTD, losses, routings = output.hidden_BTD, [], []
    for depth, module in enumerate(model.mtp, start=1):
        known_BT, _ = targets(batch, depth)
        wanted_BT, weight_BT = targets(batch, depth + 1)
        hidden_BTD, routing = module(hidden_BTD, model.embed_tokens(known_BT), at)
        nll_BT = -logprobs(model, hidden_BTD, wanted_BT)[0]
        losses.append(weighted_mean(nll_BT, weight_BT))
        routings.append(routing)
    return torch.stack(losses).mean(), routings


def add_balance(
    model: Transformer, loss: Tensor, routings: list[Routing | None], batch: Batch, config: LanguageConfig
) -> tuple[Tensor, list[Tensor]]:
    """Adds the balance loss of every MoE layer; returns the loss and the layers' loads over real tokens."""
    chosen = [routing for routing in routings if routing is not None]
    if not chosen:
        return loss, []
    if config.balance_weight:
        active = model.config.num_experts_per_tok
        assert active is not None
        loss = loss + config.balance_weight * sum(balance_loss(r, batch.segments_BT, active) for r in chosen)
    real_T = (batch.segments_BT >= 0).flatten()
    with torch.no_grad():
        return loss, [routing.load(real_T) for routing in chosen]
