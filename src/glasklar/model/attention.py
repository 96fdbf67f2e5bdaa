"""Attention: multi-head latent attention in both faces, and grouped-query attention as the dense baseline.

MLA (DeepSeek-V2/V3 eq. 1-11) keeps for each token one latent c (C values) and one rotary key (R values) shared by all
heads. *Expanded*: keys and values of all heads are computed from the latents; best when many queries meet many keys
(training, prefill). *Absorbed*: the up-projections are moved to the query and the output, and attention runs over the
latents as they lie in the cache; best when few queries meet many keys (decoding). Both give the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glasklar.model.config import ModelConfig, RopeScaling, yarn_mscale
from glasklar.model.linear import Linear
from glasklar.ops.select import Ops

LATENT_EPS = 1e-6  # the norms within MLA have one of their own


@dataclass(frozen=True)
class Positions:
    """What attention needs to know of where tokens stand; made once for a forward pass, shared by all layers.

    cos_BTR, sin_BTR   [B, T, R/2] fp32
    mask_BTS           [B, T, S] added to the scores, in the compute type
    window_BTS         the same for layers with a sliding window; None where the network has none
    """

    cos_BTR: Tensor
    sin_BTR: Tensor
    mask_BTS: Tensor
    window_BTS: Tensor | None = None


@dataclass(frozen=True)
class LayerCache:
    """One layer's cache during a pass: `rows` [B, S, width] is written at `slots` [B, T] and then attended to."""

    rows_BSX: Tensor
    slots_BT: Tensor

    def write(self, new_BTX: Tensor) -> Tensor:
        row_B1 = torch.arange(len(new_BTX), device=new_BTX.device)[:, None]
        # Not `scatter_`: in bf16 on CPUs it takes a hundred times as long.
        self.rows_BSX[row_B1, self.slots_BT] = new_BTX.to(self.rows_BSX.dtype)
        return self.rows_BSX


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Rotary frequencies [R/2] in fp32 and the factor on cos and sin (YaRN: arXiv 2309.00071 eq. 17-22)."""
    half = torch.arange(0, config.rope_dim, 2, dtype=torch.int64).float() / config.rope_dim
    plain = 1.0 / (config.rope_theta**half)
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    if scaling.type == "llama3":
        return _llama3_frequencies(plain, scaling), 1.0

    def turns_at(rotations: float) -> float:
        length = scaling.original_max_position_embeddings
        return config.rope_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = turns_at(scaling.beta_fast), turns_at(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rope_dim - 1)
    ramp = ((torch.arange(len(plain)).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    inverse = plain / scaling.factor * ramp + plain * (1 - ramp)
    return inverse, scaling.attention_factor or _yarn_temperature(scaling)


def _yarn_temperature(scaling: RopeScaling) -> float:
    factor = yarn_mscale(scaling.factor, scaling.mscale)
    if scaling.mscale_all_dim:
        factor /= yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return factor


def _llama3_frequencies(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """By turns within the original context: few are slowed by the factor, many are kept, blended in between."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert low is not None
    assert high is not None
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * (1 - kept) + plain * kept


def positions(
    position_BT: Tensor,
    mask_BTS: Tensor,
    frequencies: tuple[Tensor, float],
    window: int | None = None,
    key_position_BS: Tensor | None = None,
) -> Positions:
    """Angles and masks of a pass; `frequencies` come from `inverse_frequencies`.

    key_position_BS   where the keys stand, [B, S] or [S]; None: they are the tokens of this pass
    """
    inverse, factor = frequencies
    angles = position_BT[..., None].float() * inverse.to(position_BT.device)
    window_BTS = None
    if window is not None:
        keys = position_BT if key_position_BS is None else key_position_BS
        gone = position_BT[..., None] - keys.expand(len(position_BT), -1)[:, None] >= window
        window_BTS = mask_BTS.masked_fill(gone, float("-inf"))
    return Positions(angles.cos() * factor, angles.sin() * factor, mask_BTS, window_BTS)


def document_mask(segments_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, T]: a token sees itself and earlier tokens of its own document (`segments` number them), nothing else."""
    T = segments_BT.shape[1]
    earlier = torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril()
    allowed = (segments_BT[:, :, None] == segments_BT[:, None, :]) & earlier
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def cache_mask(position_BT: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[B, T, S]: a query at position p sees the cache slots 0..p."""
    allowed = torch.arange(length, device=position_BT.device) <= position_BT[..., None]
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


class LatentAttention(nn.Module):
    """MLA, the same in every layer. Weight names are those of the checkpoints."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        assert config.kv_lora_rank is not None
        assert config.qk_nope_head_dim is not None
        self.C, self.N, self.R, self.V = (
            config.kv_lora_rank, config.qk_nope_head_dim, config.rope_dim, config.value_head_dim,
        )  # fmt: skip
        D, H = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = Linear(D, H * (self.N + self.R), ops)
        else:
            self.q_a_proj = Linear(D, config.q_lora_rank, ops, bias=config.attention_bias)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank)
            self.q_b_proj = Linear(config.q_lora_rank, H * (self.N + self.R), ops)
        self.kv_a_proj_with_mqa = Linear(D, self.C + self.R, ops, bias=config.attention_bias)
        self.kv_a_layernorm = nn.RMSNorm(self.C)
        self.kv_b_proj = Linear(self.C, H * (self.N + self.V), ops)
        self.o_proj = Linear(H * self.V, D, ops, bias=config.attention_bias)

    def forward(self, x_BTD: Tensor, at: Positions, cache: LayerCache | None, absorbed: bool) -> Tensor:
        """[B, T, D] -> [B, T, D]. With a cache the latents are written to it; `absorbed` attends over the cache,
        otherwise over the tokens of this pass alone."""
        q_BTHK = self._queries(x_BTD, at)
        latent_BTC, key_BTR = self._latents(x_BTD, at)
        if cache is not None:
            rows_BSX = cache.write(torch.cat((latent_BTC, key_BTR), dim=-1))
        if not absorbed:
            out_BHTV = self._expanded(q_BTHK, latent_BTC, key_BTR, at.mask_BTS)
        else:
            assert cache is not None, "absorbed attention runs over a cache"
            out_BHTV = self._absorbed(q_BTHK, rows_BSX.to(x_BTD.dtype), at.mask_BTS)
        return self.o_proj(out_BHTV.transpose(1, 2).flatten(-2))

    def _queries(self, x_BTD: Tensor, at: Positions) -> Tensor:
        """Queries [B, T, H, N+R], rotary part turned (eq. 6-9)."""
        if self.config.q_lora_rank is None:
            q = self.q_proj(x_BTD)
        else:
            q = self.q_b_proj(self._norm(self.q_a_proj(x_BTD), self.q_a_layernorm))
        q_BTHK = q.unflatten(-1, (-1, self.N + self.R))
        return self.ops.rotate(q_BTHK, at.cos_BTR[:, :, None], at.sin_BTR[:, :, None], self.config.rope_interleave)

    def _latents(self, x_BTD: Tensor, at: Positions) -> tuple[Tensor, Tensor]:
        """Normalised latent [B, T, C] and turned shared key [B, T, R] (eq. 1, 3)."""
        latent, key = self.kv_a_proj_with_mqa(x_BTD).split((self.C, self.R), dim=-1)
        key = self.ops.rotate(key, at.cos_BTR, at.sin_BTR, self.config.rope_interleave)
        return self._norm(latent, self.kv_a_layernorm), key

    def _expanded(self, q_BTHK: Tensor, latent_BTC: Tensor, key_BTR: Tensor, mask_BTS: Tensor) -> Tensor:
        kv_BTHX = self.kv_b_proj(latent_BTC).unflatten(-1, (-1, self.N + self.V))
        return self.ops.latent_attention(q_BTHK, kv_BTHX, key_BTR, mask_BTS, self.config.softmax_scale)

    def _absorbed(self, q_BTHK: Tensor, rows_BSX: Tensor, mask_BTS: Tensor) -> Tensor:
        up_HXC = self.kv_b_proj.weight.view(-1, self.N + self.V, self.C)
        up_k_HNC, up_v_HVC = up_HXC.split((self.N, self.V), dim=1)
        nope, rope = q_BTHK.split((self.N, self.R), dim=-1)
        q_BHTC = torch.einsum("bthn,hnc->bhtc", nope, up_k_HNC)
        q_BHTX = torch.cat((q_BHTC, rope.transpose(1, 2)), dim=-1)
        keys_B1SX = rows_BSX[:, None]
        mixed_BHTC = self.ops.attention(
            q_BHTX, keys_B1SX, keys_B1SX[..., : self.C], mask_BTS, self.config.softmax_scale
        )
        return torch.einsum("bhtc,hvc->bhtv", mixed_BHTC, up_v_HVC)

    def _norm(self, x: Tensor, norm: nn.RMSNorm) -> Tensor:
        return self.ops.rms_norm(x, norm.weight, LATENT_EPS)


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) as in Llama: the dense baseline beside MLA.

    qk_norm           Qwen3: queries and keys of each head are normalised before they are turned
    attention_sinks   gpt-oss: a score for each head that takes part in its softmax and brings no value
    """

    def __init__(self, config: ModelConfig, ops: Ops, layer: int) -> None:
        super().__init__()
        self.config, self.ops, self.window = config, ops, config.window(layer)
        D, H, G, K = config.hidden_size, config.num_attention_heads, config.kv_heads, config.qk_head_dim
        self.q_proj = Linear(D, H * K, ops, bias=config.attention_bias)
        self.k_proj = Linear(D, G * K, ops, bias=config.attention_bias)
        self.v_proj = Linear(D, G * K, ops, bias=config.attention_bias)
        self.o_proj = Linear(H * K, D, ops, bias=config.output_bias)
        self.sinks = nn.Parameter(torch.empty(H)) if config.attention_sinks else None
        self.q_norm = nn.RMSNorm(K) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(K) if config.qk_norm else None

    def forward(self, x_BTD: Tensor, at: Positions, cache: LayerCache | None, absorbed: bool) -> Tensor:
        """As `LatentAttention.forward`; here `absorbed` only means "over the cache"."""
        K = self.config.qk_head_dim
        q_BTHK = self._turn(self._norm(self.q_proj(x_BTD).unflatten(-1, (-1, K)), self.q_norm), at)
        k_BTGK = self._turn(self._norm(self.k_proj(x_BTD).unflatten(-1, (-1, K)), self.k_norm), at)
        v_BTGK = self.v_proj(x_BTD).unflatten(-1, (-1, K))
        if cache is not None:
            rows_BSX = cache.write(torch.cat((k_BTGK, v_BTGK), dim=-1).flatten(-2))
        if absorbed:
            assert cache is not None
            k_BTGK, v_BTGK = rows_BSX.to(x_BTD.dtype).unflatten(-1, (-1, 2 * K)).split((K, K), dim=-1)
        mask_BTS = at.mask_BTS if self.window is None else at.window_BTS
        assert mask_BTS is not None
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
        if self.sinks is None:
            out_BHTV = self.ops.attention(q, k, v, mask_BTS, self.config.softmax_scale)
        else:
            out_BHTV = self.ops.sink_attention(q, k, v, mask_BTS, self.config.softmax_scale, self.sinks)
        return self.o_proj(out_BHTV.transpose(1, 2).flatten(-2))

    def _norm(self, x_BTHK: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        return x_BTHK if norm is None else self.ops.rms_norm(x_BTHK, norm.weight, self.config.rms_norm_eps)

    def _turn(self, x_BTHK: Tensor, at: Positions) -> Tensor:
        return self.ops.rotate(x_BTHK, at.cos_BTR[:, :, None], at.sin_BTR[:, :, None], self.config.rope_interleave)
