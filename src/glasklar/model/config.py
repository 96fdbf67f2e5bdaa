"""The shape of a network. One set of fields for MLA with experts (DeepSeek) and for dense grouped-query models.

Shape suffixes used throughout the project:

    B sequences   T tokens of a sequence (queries)   S cached tokens (keys)   D model width   H heads
    G key/value heads   Q query latent   C key/value latent   N no-position part of a head   R rotary part of a head
    K = N + R   V value head   E experts   A active (chosen) experts of a token   F hidden width of a feed-forward
    W vocabulary   L layers

Field names are those of the Hugging Face configurations of the families.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from glasklar.config import Section

# Refused before anything is allocated: a hostile or mistyped configuration must not ask for the whole memory.
Dim = Annotated[int, Field(ge=1, le=1 << 20)]
Count = Annotated[int, Field(ge=1, le=1 << 16)]
LayerType = Literal["full_attention", "sliding_attention"]


class RopeScaling(Section):
    """How a model reaches beyond the context that it learned with.

    yarn     arXiv 2309.00071 as DeepSeek-V2/V3 use it: blended frequencies and a temperature on the softmax
    llama3   as Llama 3.1: slow frequencies divided by `factor`, fast ones kept, `low_freq_factor` and
             `high_freq_factor` (turns within the original context) say where one becomes the other

    truncate           yarn: whether the ramp between kept and slowed frequencies begins and ends at whole ones
    attention_factor   yarn: the factor on cos and sin, where it does not follow from the mscales
    """

    type: Literal["yarn", "llama3"] = "yarn"
    factor: float = Field(gt=0)
    original_max_position_embeddings: Dim
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    attention_factor: float | None = Field(default=None, gt=0)
    low_freq_factor: float | None = Field(default=None, gt=0)
    high_freq_factor: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _complete(self) -> RopeScaling:
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.type == "yarn":
            if low is not None or high is not None:
                raise ValueError("low_freq_factor and high_freq_factor have no meaning in yarn; remove them")
        elif low is None or high is None or low >= high:
            raise ValueError(f"llama3 needs low_freq_factor ({low}) below high_freq_factor ({high})")
        elif self.mscale != 1.0 or self.mscale_all_dim or not self.truncate or self.attention_factor is not None:
            raise ValueError("mscale, mscale_all_dim, truncate, attention_factor mean nothing in llama3; remove them")
        return self


class ModelConfig(Section):
    """Shape of a decoder. `kv_lora_rank` set: multi-head latent attention; absent: grouped-query attention.

    `n_routed_experts` set: mixture of experts in every layer from `first_k_dense_replace` on; absent: dense.
    `swiglu_limit` set: the experts of gpt-oss, with biases and a clamped gate (`ops/reference.py`, `clamped_swiglu`).
    """

    vocab_size: Dim
    hidden_size: Dim
    num_hidden_layers: Count
    num_attention_heads: Count
    max_position_embeddings: Dim = 4096
    # Multi-head latent attention (DeepSeek-V3 eq. 1-11)
    q_lora_rank: Dim | None = None
    kv_lora_rank: Dim | None = None
    qk_nope_head_dim: Dim | None = None
    qk_rope_head_dim: Dim | None = None
    v_head_dim: Dim | None = None
    # Grouped-query attention
    num_key_value_heads: Count | None = None
    head_dim: Dim | None = None
    qk_norm: bool = False
    attention_sinks: bool = False  # a learned score in each head's softmax that brings no value (arXiv 2309.17453)
    # A token sees the last `sliding_window` tokens, itself included, in the layers that `layer_types` names so.
    sliding_window: Dim | None = None
    layer_types: tuple[LayerType, ...] | None = None
    # Biases: of the projections into attention (latent attention: and out of it), and out of grouped-query attention
    attention_bias: bool = False
    output_bias: bool = False
    # Feed-forward (eq. 12-16)
    intermediate_size: Dim
    n_routed_experts: Count | None = None
    n_shared_experts: Annotated[int, Field(ge=0, le=64)] = 0
    num_experts_per_tok: Count | None = None
    moe_intermediate_size: Dim | None = None
    first_k_dense_replace: Annotated[int, Field(ge=0)] = 0
    n_group: Count = 1
    topk_group: Count = 1
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    swiglu_limit: float | None = Field(default=None, gt=0)
    swiglu_alpha: float = Field(default=1.702, gt=0)
    # Multi-token prediction (eq. 21-25)
    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=8)] = 0
    # Rotary positions, norms, head
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    rope_interleave: bool = True
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    tie_word_embeddings: bool = False
    initializer_range: float = Field(default=0.006, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        mla = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        gqa = ("num_key_value_heads", "head_dim")
        if self.is_mla and self.qk_norm:
            raise ValueError("latent attention has norms of its own; remove qk_norm")
        wanted, foreign = (mla, gqa) if self.is_mla else (gqa, (*mla, "q_lora_rank"))
        kind = "latent (kv_lora_rank is set)" if self.is_mla else "grouped-query (kv_lora_rank is absent)"
        for name in wanted:
            if getattr(self, name) is None:
                raise ValueError(f"attention is {kind} and needs {name}")
        for name in foreign:
            if getattr(self, name) is not None:
                raise ValueError(f"attention is {kind}; {name} has no meaning there, remove it")
        if self.rope_dim % 2:
            raise ValueError(f"the rotary part of a head has {self.rope_dim} values; it must be even")
        if not self.is_mla and self.num_attention_heads % self.kv_heads:
            raise ValueError(f"{self.num_attention_heads} heads cannot share {self.kv_heads} key/value heads evenly")
        self._check_windows()
        self._check_experts()
        return self

    def _check_windows(self) -> None:
        kinds, layers = self.layer_types, self.num_hidden_layers
        if (kinds is None) != (self.sliding_window is None):
            raise ValueError("sliding_window and layer_types go together; give both or neither")
        if kinds is not None and len(kinds) != layers:
            raise ValueError(f"layer_types names {len(kinds)} layers and num_hidden_layers is {layers}")
        if self.is_mla and (kinds is not None or self.attention_sinks or self.output_bias):
            raise ValueError("latent attention knows no sliding_window, attention_sinks and output_bias; remove them")
        if kinds is not None and self.num_nextn_predict_layers:
            raise ValueError("multi-token prediction goes with full attention; remove sliding_window")

    def _check_experts(self) -> None:
        experts, chosen = self.n_routed_experts, self.num_experts_per_tok
        if experts is None:
            others = (chosen, self.moe_intermediate_size, self.swiglu_limit)
            if any(value is not None for value in others) or self.n_shared_experts:
                raise ValueError("the model is dense (n_routed_experts is absent); remove the other expert fields")
            return
        if chosen is None or self.moe_intermediate_size is None:
            raise ValueError("a mixture of experts needs num_experts_per_tok and moe_intermediate_size")
        if self.swiglu_limit is not None and (self.n_shared_experts or self.first_k_dense_replace):
            raise ValueError("swiglu_limit goes with experts in every layer and no shared ones")
        if chosen > experts:
            raise ValueError(f"num_experts_per_tok = {chosen} exceeds n_routed_experts = {experts}")
        if experts % self.n_group or self.topk_group > self.n_group:
            raise ValueError(f"{experts} experts, n_group = {self.n_group}, topk_group = {self.topk_group} do not fit")
        if chosen > experts // self.n_group * self.topk_group:
            raise ValueError(f"{self.topk_group} groups of {experts // self.n_group} hold fewer than {chosen} experts")
        if self.scoring_func == "sigmoid" and self.n_group > 1 and experts // self.n_group < 2:
            raise ValueError("a group needs at least two experts: its score is the sum of its best two")

    @property
    def is_mla(self) -> bool:
        return self.kv_lora_rank is not None

    @property
    def is_moe(self) -> bool:
        return self.n_routed_experts is not None

    def is_moe_layer(self, layer: int) -> bool:
        return self.is_moe and layer >= self.first_k_dense_replace

    def window(self, layer: int) -> int | None:
        """Tokens that a layer's attention sees; None: all."""
        kinds = self.layer_types
        # Modules for multi-token prediction stand behind the layers.
        sliding = kinds is not None and layer < len(kinds) and kinds[layer] == "sliding_attention"
        return self.sliding_window if sliding else None

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def rope_dim(self) -> int:
        """R: values of a head that are rotated."""
        return self.qk_rope_head_dim or self.head_dim or 0

    @property
    def qk_head_dim(self) -> int:
        """K: values of a head in the product of queries and keys."""
        return (self.qk_nope_head_dim or 0) + self.rope_dim

    @property
    def value_head_dim(self) -> int:
        """V."""
        return self.v_head_dim or self.head_dim or 0

    @property
    def cache_width(self) -> int:
        """Values that one layer keeps for one token: the latent and the shared rotary key, or keys and values."""
        if self.kv_lora_rank is not None:
            return self.kv_lora_rank + self.rope_dim
        return self.kv_heads * (self.qk_head_dim + self.value_head_dim)

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(K), times YaRN's squared temperature where `mscale_all_dim` is set."""
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is not None and self.rope_scaling.mscale_all_dim:
            scale *= yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature 0.1 m ln(s) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
