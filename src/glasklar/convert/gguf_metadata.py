"""What llama.cpp must know of a network: the keys of a GGUF file; and what llama.cpp would compute otherwise.

Keys: the GGUF specification (ggml, docs/gguf.md) and the loaders of llama.cpp. A network is either carried over exactly
or refused with the reason.
"""

from __future__ import annotations

from typing import Literal

from glasklar.errors import CheckpointError
from glasklar.model.config import ModelConfig

Architecture = Literal["deepseek2", "llama", "qwen2", "qwen3", "qwen3moe"]
DType = Literal["fp32", "bf16", "fp16", "q8_0"]
Value = int | float | bool | str
SOFTMAX, SIGMOID = 1, 2  # llama.cpp's numbers of gating functions

# llama.cpp takes models of these depths for DeepSeek-V2-Lite and its kin and looks for a plain q_proj.
_LITE_DEPTHS = (26, 27)
_LITE_DEEP = (48, 128256)  # layers, vocabulary


# Everything about a network that this module carries over. Whatever else a configuration may come to say is refused.
_CARRIED = frozenset(
    {
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
        *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
        *("num_key_value_heads", "head_dim", "attention_bias", "qk_norm", "intermediate_size", "n_routed_experts"),
        *("n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace", "n_group"),
        *("topk_group", "scoring_func", "norm_topk_prob", "routed_scaling_factor", "num_nextn_predict_layers"),
        *("rope_theta", "rope_scaling", "rope_interleave", "rms_norm_eps", "tie_word_embeddings", "initializer_range"),
    }
)


def architecture(config: ModelConfig) -> Architecture:
    """llama.cpp's name of the network. Raises CheckpointError where llama.cpp would compute something else."""
    for name, field in type(config).model_fields.items():
        if name not in _CARRIED and getattr(config, name) != field.get_default(call_default_factory=True):
            raise _unknown_there(f"{name} = {str(getattr(config, name))[:60]}")
    name = _name(config)
    scaling = config.rope_scaling
    if scaling is not None and scaling.type != "yarn" and name != "llama":
        raise _unknown_there(f"rope scaling of type {scaling.type!r} in the architecture {name}")
    if scaling is not None and (not scaling.truncate or scaling.attention_factor is not None):
        raise _unknown_there("YaRN with truncate = false or with an attention_factor")
    return name


def _name(config: ModelConfig) -> Architecture:
    if config.is_mla:
        _check_latent(config)
        return "deepseek2"
    _check_grouped(config)
    if config.qk_norm:
        return "qwen3moe" if config.is_moe else "qwen3"
    return "qwen2" if config.attention_bias else "llama"


def _check_latent(config: ModelConfig) -> None:
    scaling = config.rope_scaling
    if config.attention_bias:
        raise _unknown_there("biases in latent attention (attention_bias = true)")
    if config.is_moe and config.scoring_func == "softmax" and config.n_group > 1:
        raise _unknown_there(f"groups of experts ranked by their best one (softmax gate, n_group = {config.n_group})")
    if config.is_moe and not config.n_shared_experts and config.first_k_dense_replace < config.num_hidden_layers:
        raise _unknown_there("experts without a shared one (n_shared_experts = 0)")
    if scaling is not None and scaling.mscale != scaling.mscale_all_dim:
        raise _unknown_there(f"YaRN with mscale = {scaling.mscale:g} and mscale_all_dim = {scaling.mscale_all_dim:g}")
    depth = config.num_hidden_layers
    if config.q_lora_rank and (depth in _LITE_DEPTHS or (depth, config.vocab_size) == _LITE_DEEP):
        raise _unknown_there(f"a query latent in a network of {depth} layers, which it takes for DeepSeek-V2-Lite")


def _check_grouped(config: ModelConfig) -> None:
    if config.qk_norm and config.attention_bias:
        raise _unknown_there("biases beside norms on queries and keys (attention_bias and qk_norm)")
    if config.is_moe:
        _check_grouped_experts(config)
    width = config.num_attention_heads * config.qk_head_dim
    if config.attention_bias and width != config.hidden_size:
        raise _unknown_there(f"biases with heads of {width} values together in a model {config.hidden_size} wide")


def _check_grouped_experts(config: ModelConfig) -> None:
    if not config.qk_norm:
        raise _unknown_there("experts with grouped-query attention without norms on queries and keys (qk_norm)")
    if config.first_k_dense_replace or config.n_shared_experts:
        raise _unknown_there("dense layers or shared experts with grouped-query attention")
    softmax = config.scoring_func == "softmax" and config.n_group == 1
    if not softmax or not config.norm_topk_prob or config.routed_scaling_factor != 1.0:
        raise _unknown_there("a gate other than softmax, normalised, without groups or scaling beside grouped queries")


def metadata(config: ModelConfig) -> dict[str, Value]:
    """Keys of the network's own part, without the tokenizer's. Integers are uint32, floats float32."""
    name = architecture(config)
    keys: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.rope_dim,
        "rope.freq_base": config.rope_theta,
    }
    keys |= _latent(config) if config.is_mla else _grouped(config)
    keys |= _rope_scaling(config)
    return {f"{name}.{key}": value for key, value in keys.items()}


def _grouped(config: ModelConfig) -> dict[str, Value]:
    return {
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.qk_head_dim,
        "attention.value_length": config.value_head_dim,
        **(_experts(config) if config.is_moe else {}),
    }


def _latent(config: ModelConfig) -> dict[str, Value]:
    """Absorbed, latent attention is multi-query attention: one head of keys C + R wide, of values C wide."""
    latent = config.kv_lora_rank or 0
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": latent + config.rope_dim,
        "attention.value_length": latent,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.value_head_dim,
        "attention.kv_lora_rank": latent,
        "attention.q_lora_rank": config.q_lora_rank or 0,
        **_experts(config),
    }


def _experts(config: ModelConfig) -> dict[str, Value]:
    if not config.is_moe:
        return {
            "leading_dense_block_count": config.num_hidden_layers,
            "expert_feed_forward_length": config.intermediate_size,
            "expert_shared_count": 0,
        }
    keys: dict[str, Value] = {
        "leading_dense_block_count": min(config.first_k_dense_replace, config.num_hidden_layers),
        "expert_feed_forward_length": config.moe_intermediate_size or 0,
        "expert_count": config.n_routed_experts or 0,
        "expert_used_count": config.num_experts_per_tok or 0,
        "expert_shared_count": config.n_shared_experts,
        "expert_gating_func": SIGMOID if config.scoring_func == "sigmoid" else SOFTMAX,
        "expert_weights_norm": config.norm_topk_prob,
        "expert_weights_scale": config.routed_scaling_factor,
    }
    if config.n_group > 1:
        keys |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    return keys


def _rope_scaling(config: ModelConfig) -> dict[str, Value]:
    scaling = config.rope_scaling
    if scaling is None or scaling.type == "llama3":  # that one is a tensor: `gguf_tensors.entries`
        return {}
    keys: dict[str, Value] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": scaling.factor,
        "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
        "rope.scaling.yarn_beta_fast": scaling.beta_fast,
        "rope.scaling.yarn_beta_slow": scaling.beta_slow,
    }
    if config.is_mla:
        # llama.cpp multiplies by ten what it reads here.
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * scaling.mscale_all_dim
    return keys


def _unknown_there(what: str) -> CheckpointError:
    return CheckpointError(f"no GGUF is written with {what}; write a Hugging Face folder instead: --to hf")
