"""The network: embedding, blocks, head, multi-token prediction. The same for training and serving."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glasklar.model.attention import (
    GroupedQueryAttention,
    LatentAttention,
    LayerCache,
    Positions,
    inverse_frequencies,
    positions,
)
from glasklar.model.config import ModelConfig
from glasklar.model.linear import Linear
from glasklar.model.moe import FeedForward, MixtureOfExperts, Routing
from glasklar.ops.select import REFERENCE, Ops


@dataclass(frozen=True)
class Output:
    """Result of a pass: normalised hidden states [B, T, D], and what each MoE layer did (None for dense layers)."""

    hidden_BTD: Tensor
    routings: list[Routing | None]


class Norm(nn.Module):
    def __init__(self, width: int, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.ops = config.rms_norm_eps, ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """x + added, and its norm."""
        return self.ops.add_rms_norm(x, added, self.weight, self.eps)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config, ops)
        self.self_attn = (LatentAttention if config.is_mla else GroupedQueryAttention)(config, ops, layer)
        self.post_attention_layernorm = Norm(config.hidden_size, config, ops)
        self.mlp = (
            MixtureOfExperts(config, ops)
            if config.is_moe_layer(layer)
            else FeedForward(config.hidden_size, config.intermediate_size, ops)
        )

    def forward(
        self, x_BTD: Tensor, at: Positions, cache: LayerCache | None = None, absorbed: bool = False
    ) -> tuple[Tensor, Routing | None]:
        attended = self.self_attn(self.input_layernorm(x_BTD), at, cache, absorbed)
        x_BTD, normed = self.post_attention_layernorm.add(x_BTD, attended)
        y_BTD, routing = self.mlp(normed)
        return x_BTD + y_BTD, routing


class PredictionModule(nn.Module):
    """One depth of multi-token prediction (eq. 21-23): joins the state at i with the embedding of token i+k+1."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        D = config.hidden_size
        self.enorm, self.hnorm = Norm(D, config, ops), Norm(D, config, ops)
        self.eh_proj = Linear(2 * D, D, ops)
        self.block = Block(config, layer, ops)
        self.norm = Norm(D, config, ops)

    def forward(
        self,
        hidden_BTD: Tensor,
        embedded_BTD: Tensor,
        at: Positions,
        cache: LayerCache | None = None,
        absorbed: bool = False,
    ) -> tuple[Tensor, Routing | None]:
        """Hidden states one depth further (normalised, ready for the shared head), and the block's routing."""
        joined = self.eh_proj(torch.cat((self.enorm(embedded_BTD), self.hnorm(hidden_BTD)), dim=-1))
        x_BTD, routing = self.block(joined, at, cache, absorbed)
        return self.norm(x_BTD), routing


class Transformer(nn.Module):
    """A decoder with its head. Build it on the meta device, then initialise (`init.py`) or load (`checkpoint.py`)."""

    def __init__(self, config: ModelConfig, ops: Ops = REFERENCE) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer, ops) for layer in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config, ops)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        depth = config.num_nextn_predict_layers
        self.mtp = nn.ModuleList(PredictionModule(config, config.num_hidden_layers + k, ops) for k in range(depth))
        self.frequencies = inverse_frequencies(config)

    @property
    def head_WD(self) -> Tensor:
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def at(self, position_BT: Tensor, mask_BTS: Tensor, key_position_BS: Tensor | None = None) -> Positions:
        """Rotary angles and masks for tokens at the given positions; see `attention.positions`."""
        return positions(position_BT, mask_BTS, self.frequencies, self.config.sliding_window, key_position_BS)

    def forward(
        self,
        ids_BT: Tensor,
        at: Positions,
        caches: list[LayerCache] | None = None,
        absorbed: bool = False,
    ) -> Output:
        """Hidden states of the tokens. With `caches` (one a layer) their latents are stored; see `attention.py`."""
        x_BTD = self.embed_tokens(ids_BT)
        routings: list[Routing | None] = []
        for layer, block in enumerate(self.layers):
            x_BTD, routing = block(x_BTD, at, None if caches is None else caches[layer], absorbed)
            routings.append(routing)
        return Output(self.norm(x_BTD), routings)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., W] in the compute type."""
        return F.linear(hidden, self.head_WD)

    def moe_layers(self) -> list[MixtureOfExperts]:
        """All MoE layers in order, those of the prediction modules last."""
        return [module for module in self.modules() if isinstance(module, MixtureOfExperts)]
