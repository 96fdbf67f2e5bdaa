"""Feed-forward layers: dense SwiGLU, and DeepSeekMoE balanced without a loss (arXiv 2401.06066, 2408.15664)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glasklar.model.config import ModelConfig
from glasklar.ops.select import Ops


@dataclass(frozen=True)
class Routing:
    """What one MoE layer did with the tokens of a pass.

    ids_TA      chosen experts
    scores_TE   gate scores, fp32, differentiable (for the balance loss)
    """

    ids_TA: Tensor
    scores_TE: Tensor

    def load(self, weight_T: Tensor | None = None) -> Tensor:
        """Tokens that each expert saw [E]; `weight_T` (0/1) leaves padding out."""
        E = self.scores_TE.shape[-1]
        weights = None if weight_T is None else weight_T.float().repeat_interleave(self.ids_TA.shape[-1])
        return torch.bincount(self.ids_TA.flatten(), weights=weights, minlength=E).float()


class FeedForward(nn.Module):
    """down(silu(gate x) * up x); gate and up lie in one matrix [2F, D]."""

    def __init__(self, width: int, hidden: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.gate_up_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.ops.feed_forward(x, self.gate_up_proj.weight, self.down_proj.weight), None


class Gate(nn.Module):
    """Router weights (kept in fp32) and the bias that balances the experts' load without a loss."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        # Part of the model (it decides who answers), yet moved by a rule and not by a gradient.
        bias = torch.zeros(config.n_routed_experts) if config.scoring_func == "sigmoid" else None
        self.register_buffer("e_score_correction_bias", bias)
        self.e_score_correction_bias: Tensor | None
        # Of the scores themselves, and learned, unlike the one above (gpt-oss).
        self.bias = nn.Parameter(torch.empty(config.n_routed_experts)) if config.swiglu_limit is not None else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """Logits [T, E] in fp32."""
        logits_TE = self.ops.gate(x_TD, self.weight)
        return logits_TE if self.bias is None else logits_TE + self.bias.float()

    @torch.no_grad()
    def balance(self, load_E: Tensor, speed: float) -> None:
        """One step of the bias update: overloaded experts down, underloaded up by `speed` (V3 section 2.1.2).

        The update is centred, so that the bias as a whole does not drift (only differences matter).
        """
        if self.e_score_correction_bias is None:
            return
        step = torch.sign(load_E.mean() - load_E)
        self.e_score_correction_bias += speed * (step - step.mean())


class MixtureOfExperts(nn.Module):
    """Routed experts chosen by the gate, plus shared experts that see every token (eq. 12).

    Those of gpt-oss have biases and a clamped SwiGLU; in their `gate_up_EFD` rows of gate and up alternate.
    """

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        assert config.n_routed_experts is not None
        assert config.moe_intermediate_size is not None
        E, D, F_ = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate = Gate(config, ops)
        self.gate_up_EFD = nn.Parameter(torch.empty(E, 2 * F_, D))
        self.down_EDF = nn.Parameter(torch.empty(E, D, F_))
        clamped = config.swiglu_limit is not None
        self.gate_up_bias_EF = nn.Parameter(torch.empty(E, 2 * F_)) if clamped else None
        self.down_bias_ED = nn.Parameter(torch.empty(E, D)) if clamped else None
        self.shared_experts = FeedForward(D, F_ * config.n_shared_experts, ops) if config.n_shared_experts else None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        c = self.config
        x_TD = x_BTD.flatten(0, -2)
        ids_TA, weights_TA, scores_TE = self.ops.route(
            self.gate(x_TD),
            self.gate.e_score_correction_bias,
            active=c.num_experts_per_tok,
            groups=c.n_group,
            groups_kept=c.topk_group,
            scoring=c.scoring_func,
            normalise=c.norm_topk_prob,
            scaling=c.routed_scaling_factor,
        )
        if c.swiglu_limit is None:
            y_TD = self.ops.experts(x_TD, ids_TA, weights_TA, self.gate_up_EFD, self.down_EDF)
        else:
            gate_up, down = (self.gate_up_EFD, self.gate_up_bias_EF), (self.down_EDF, self.down_bias_ED)
            y_TD = self.ops.clamped_experts(x_TD, ids_TA, weights_TA, gate_up, down, c.swiglu_alpha, c.swiglu_limit)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)[0]
        return y_TD.view_as(x_BTD), Routing(ids_TA, scores_TE)


def balance_loss(routing: Routing, segments_BT: Tensor, active: int) -> Tensor:
    """Sequence-wise balance loss without its factor: sum_i f_i P_i per sequence, averaged (eq. 17-20).

    `segments_BT` gives the shape of the batch; a row of packed documents counts as one sequence.
    """
    B, T = segments_BT.shape
    E = routing.scores_TE.shape[-1]
    row_T1 = torch.arange(B, device=routing.ids_TA.device).repeat_interleave(T)[:, None]
    chosen_BE = torch.bincount((row_T1 * E + routing.ids_TA).flatten(), minlength=B * E).view(B, E)
    f_BE = chosen_BE / T * (E / active)
    scores = routing.scores_TE.view(B, T, E)
    p_BE = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return (f_BE * p_BE).sum(-1).mean()
