"""`config.json` of a Hugging Face folder <-> `ModelConfig`.

A key that could change what the network computes is either understood or refused; nothing is guessed and no code named
by a configuration (`auto_map`) is ever run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasklar.errors import CheckpointError, RecipeError
from glasklar.model.config import ModelConfig, RopeScaling

MAX_LAYERS = 1 << 16
_FULL, _SLIDING = "full_attention", "sliding_attention"
_WITH_EXPERTS = ("qwen3_moe", "gpt_oss")

MAX_JSON_BYTES = 64 << 20  # the index of DeepSeek-V3 has 9 MB

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_COMMON = (*_SIZES, "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range")
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "attention_bias")
_GATE = ("n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob", "first_k_dense_replace")
_EXPERTS = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", *_GATE)
_DEEPSEEK = (*_COMMON, *_LATENT, *_EXPERTS, "scoring_func", "num_nextn_predict_layers", "rope_interleave")
_GROUPED = (*_COMMON, "num_key_value_heads", "head_dim")


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a `model_type` stands for.

    fields      keys that are fields of ModelConfig
    implied     fields that the type itself decides
    only        keys that are accepted with these values alone
    """

    architecture: str
    fields: tuple[str, ...]
    implied: dict[str, Any]
    only: dict[str, tuple[Any, ...]]


FAMILIES = {
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        fields=_DEEPSEEK,
        implied={"scoring_func": "sigmoid"},
        only={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)},
    ),
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM",
        fields=_DEEPSEEK,
        implied={"scoring_func": "softmax"},
        only={
            "scoring_func": ("softmax",),
            "topk_method": ("greedy", "group_limited_greedy"),
            "norm_topk_prob": (False,),
            "rope_interleave": (True,),
            "moe_layer_freq": (1,),
            "mlp_bias": (False,),
        },
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        fields=(*_GROUPED, "attention_bias"),
        implied={"rope_interleave": False},
        only={"mlp_bias": (False,)},
    ),
    # Llama with biases on queries, keys and values.
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        fields=_GROUPED,
        implied={"rope_interleave": False, "attention_bias": True},
        only={"use_mrope": (False,)},
    ),
    # Llama with norms on queries and keys.
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        fields=(*_GROUPED, "attention_bias"),
        implied={"rope_interleave": False, "qk_norm": True},
        only={},
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        fields=(*_GROUPED, "attention_bias", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
        implied={"rope_interleave": False, "qk_norm": True, "scoring_func": "softmax"},
        only={"decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
    ),
    # All layers have experts, with biases; the gate's softmax is over the chosen ones, which is normalising.
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        fields=(*_GROUPED, "attention_bias", "num_experts_per_tok", "swiglu_limit", "swiglu_alpha"),
        implied={
            **{"rope_interleave": False, "attention_bias": True, "attention_sinks": True, "scoring_func": "softmax"},
            **{"norm_topk_prob": True, "swiglu_limit": 7.0},
        },
        only={},
    ),
}

_ONLY = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1, 1.0),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
# No influence on the logits of a finished model, or derived from other keys.
_IGNORED = frozenset(
    {
        *("_name_or_path", "architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version"),
        *(
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "use_cache",
            "attention_dropout",
            "aux_loss_alpha",
            "seq_aux",
        ),
        *("router_aux_loss_coef", "ep_size", "pretraining_tp", "output_router_logits", "output_attentions"),
        *("output_hidden_states", "return_dict", "chunk_size_feed_forward", "id2label", "label2id", "problem_type"),
        *("qk_head_dim", "head_dim", "num_key_value_heads", "experts_per_token", "initial_context_length"),
    }
)
# Understood elsewhere: `_windows`, and how the weights are stored (`quantised.py`).
_WINDOWS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
_STORAGE = "quantization_config"
_ROPE = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
_SCALINGS = {
    "default": (),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        *("truncate", "attention_factor"),
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file of limited size. Raises CheckpointError; keys that occur twice are refused."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path}: larger than {MAX_JSON_BYTES >> 20} MB; not a file of a model, fetch it again"
            )
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); fetch the model again") from None


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise ValueError(f"the key {twice[:80]!r} occurs twice")
        return table

    try:
        table = json.loads(content, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); fetch the file again") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: holds no JSON object; fetch the file again")
    return table


# --- reading ----------------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a Hugging Face folder. Raises CheckpointError naming the key and what to do."""
    path = folder / "config.json"
    table = read_json(path)
    kind = table.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(f"{path}: model_type = {kind!r} is unknown; known are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    experts = table.pop("num_experts", table.pop("num_local_experts", None)) if kind in _WITH_EXPERTS else None
    if "num_mtp_layers" in table:  # how transformers writes it
        table.setdefault("num_nextn_predict_layers", table.pop("num_mtp_layers"))
    _check_keys(table, family, path)
    given = {name: table[name] for name in family.fields if table.get(name) is not None}
    fields = {**family.implied, **given, **_rope(table, path)}
    if kind.startswith("deepseek"):
        fields = _experts(fields, table, path)
    else:
        fields = _grouped(fields) | _windows(kind, table, path)
        fields["output_bias"] = kind != "qwen2" and bool(fields.get("attention_bias"))
    if kind in _WITH_EXPERTS:
        if experts is None or "norm_topk_prob" not in fields:
            raise CheckpointError(f"{path}: the number of experts or norm_topk_prob is missing; add it")
        fields["n_routed_experts"] = experts
    if kind == "gpt_oss":
        if table.get("rope_parameters") is None and table.get("rope_scaling") is None:
            raise CheckpointError(f"{path}: rope_scaling is missing, and nothing said means YaRN here; add it")
        fields["moe_intermediate_size"] = fields.get("intermediate_size")
    if fields.get("max_position_embeddings") is None or fields.get("rms_norm_eps") is None:
        raise CheckpointError(f"{path}: max_position_embeddings or rms_norm_eps is missing; add it")
    try:
        return ModelConfig.read(fields, str(path))
    except RecipeError as error:
        raise CheckpointError(str(error)) from None


def _check_keys(table: dict[str, Any], family: Family, path: Path) -> None:
    only = {**_ONLY, **family.only}
    for key, value in table.items():
        if key in only:
            if value is not None and value not in only[key]:
                wanted = " or ".join(map(repr, only[key])) or "nothing"
                raise CheckpointError(f"{path}: {key} = {str(value)[:80]!r} is not supported, only {wanted}")
        elif key not in {*family.fields, *_IGNORED, *_ROPE, *_WINDOWS, _STORAGE}:
            raise CheckpointError(
                f"{path}: {key[:80]!r} is unknown and may change what the model computes; remove it if it does not"
            )


def _windows(kind: str, table: dict[str, Any], path: Path) -> dict[str, Any]:
    """Which layers see how much. Qwen's files name a window that counts only where `use_sliding_window` says so, from
    layer `max_window_layers` on (with experts: everywhere); Llama has none."""
    layers, window, kinds = table.get("num_hidden_layers"), table.get("sliding_window"), table.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(one, str) for one in kinds)):
        raise CheckpointError(f"{path}: layer_types = {str(kinds)[:80]!r} is no list of names; mend it")
    if not isinstance(layers, int) or not 0 < layers <= MAX_LAYERS:
        return {}  # refused for itself
    used = window is not None and (kind == "gpt_oss" or (kind != "llama" and bool(table.get("use_sliding_window"))))
    if not used:
        if kinds is not None and set(kinds) - {_FULL}:
            raise CheckpointError(f"{path}: layer_types names {max(kinds)[:80]!r} and no window is in use; mend one")
        return {}
    if kind == "qwen3_moe":
        kinds = [_SLIDING] * layers
    elif kinds is None and kind == "gpt_oss":
        kinds = [_FULL if layer % 2 else _SLIDING for layer in range(layers)]
    elif kinds is None:
        first = table.get("max_window_layers")
        if not isinstance(first, int):
            raise CheckpointError(f"{path}: layer_types or max_window_layers is missing beside sliding_window; add it")
        kinds = [_SLIDING if layer >= first else _FULL for layer in range(layers)]
    return {} if set(kinds) == {_FULL} else {"sliding_window": window, "layer_types": kinds}


def _experts(fields: dict[str, Any], table: dict[str, Any], path: Path) -> dict[str, Any]:
    if "kv_lora_rank" not in fields:
        raise CheckpointError(f"{path}: kv_lora_rank is missing; add it")
    if "n_routed_experts" not in fields:
        return {name: value for name, value in fields.items() if name not in _EXPERTS}
    if table.get("topk_method") == "greedy":
        fields |= {"n_group": 1, "topk_group": 1}
    if "norm_topk_prob" not in fields and fields["scoring_func"] == "softmax":
        fields["norm_topk_prob"] = False
    for name in _GATE:
        if name not in fields:
            raise CheckpointError(f"{path}: {name} is missing; add it, for implementations differ in its default")
    return fields


def _grouped(fields: dict[str, Any]) -> dict[str, Any]:
    """Early Llamas leave out what follows from the other keys."""
    heads, width = fields.get("num_attention_heads"), fields.get("hidden_size")
    if isinstance(heads, int) and isinstance(width, int) and heads > 0:
        fields.setdefault("num_key_value_heads", heads)
        fields.setdefault("head_dim", width // heads)
    return fields


def _rope(table: dict[str, Any], path: Path) -> dict[str, Any]:
    """From `rope_theta` and `rope_scaling`, or from the `rope_parameters` of newer files."""
    scaling = table.get("rope_parameters") or table.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise CheckpointError(f"{path}: rope_scaling = {str(scaling)[:80]!r} is no object; mend it")
    theta = scaling.get("rope_theta", table.get("rope_theta"))
    if theta is None:
        raise CheckpointError(f"{path}: rope_theta is missing; add it")
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    if kind not in _SCALINGS:
        raise CheckpointError(
            f"{path}: rope scaling of type {kind[:80]!r} is not supported, only {', '.join(_SCALINGS)}"
        )
    allowed = {"rope_theta", "rope_type", "type", *_SCALINGS[kind]}
    for key, value in scaling.items():
        if key not in allowed and value is not None:
            raise CheckpointError(f"{path}: rope scaling with {str(key)[:80]!r} is not supported; remove it")
    if kind == "default":
        return {"rope_theta": theta}
    given = {key: scaling[key] for key in _SCALINGS[kind] if scaling.get(key) is not None}
    return {"rope_theta": theta, "rope_scaling": {"type": kind, **given}}


# --- writing ----------------------------------------------------------------------------------------------------------


def family_of(config: ModelConfig) -> str:
    """The `model_type` that means this network. Raises CheckpointError where no published type does."""
    if config.is_mla:
        if config.scoring_func == "sigmoid" or not config.is_moe:
            return "deepseek_v3"
        if config.norm_topk_prob or not config.rope_interleave:
            raise _inexpressible("a softmax gate goes with norm_topk_prob = false and rope_interleave = true")
        return "deepseek_v2"
    if config.num_nextn_predict_layers:
        raise _inexpressible("multi-token prediction goes with latent attention (kv_lora_rank)")
    if config.rope_interleave:
        raise _inexpressible("grouped-query attention goes with rope_interleave = false")
    scaling = config.rope_scaling
    if scaling is not None and (scaling.mscale != 1.0 or scaling.mscale_all_dim):
        raise _inexpressible("grouped-query attention with YaRN goes with mscale = 1 and mscale_all_dim = 0")
    kind = _grouped_kind(config)
    if config.output_bias != (config.attention_bias and kind != "qwen2"):
        raise _inexpressible("output_bias goes with attention_bias, except in qwen2")
    if config.sliding_window is not None and kind == "llama":
        raise _inexpressible("sliding_window goes with qk_norm, or with attention_bias without output_bias")
    return kind


def _grouped_kind(config: ModelConfig) -> str:
    if config.attention_sinks or config.swiglu_limit is not None:
        whole = config.attention_sinks and config.swiglu_limit is not None and not config.qk_norm
        if not (whole and _plain_gate(config) and config.norm_topk_prob):
            raise _inexpressible(
                "attention_sinks and swiglu_limit go together, without qk_norm, with experts in every layer, chosen by "
                "a normalised softmax gate without groups, scaling and shared experts"
            )
        if config.intermediate_size != config.moe_intermediate_size:
            raise _inexpressible("with attention_sinks intermediate_size is moe_intermediate_size")
        return "gpt_oss"
    if config.is_moe:
        if not (config.qk_norm and _plain_gate(config)):
            raise _inexpressible(
                "experts with grouped-query attention go with qk_norm, in every layer, chosen by a softmax gate "
                "without groups, scaling and shared experts"
            )
        kinds = config.layer_types
        if kinds is not None and _FULL in kinds:
            raise _inexpressible("experts with qk_norm have a sliding window in every layer or in none")
        return "qwen3_moe"
    if config.qk_norm:
        return "qwen3"
    return "qwen2" if config.attention_bias and not config.output_bias else "llama"


def _plain_gate(config: ModelConfig) -> bool:
    plain = config.scoring_func == "softmax" and config.n_group == 1 and config.routed_scaling_factor == 1.0
    return plain and config.is_moe and not config.n_shared_experts and not config.first_k_dense_replace


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json`, without `torch_dtype`. Raises CheckpointError as `family_of`."""
    kind = family_of(config)
    family = FAMILIES[kind]
    table: dict[str, Any] = {"architectures": [family.architecture], "model_type": kind}
    table |= {name: getattr(config, name) for name in family.fields}
    scaling = config.rope_scaling
    table |= {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else _scaling_to_hf(scaling),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    match kind:
        case "deepseek_v3":
            table |= {"num_key_value_heads": config.num_attention_heads, "topk_method": "noaux_tc", "moe_layer_freq": 1}
        case "deepseek_v2":
            method = "greedy" if config.n_group == 1 else "group_limited_greedy"
            table |= {"num_key_value_heads": config.num_attention_heads, "topk_method": method, "moe_layer_freq": 1}
        case "llama":
            table |= {"mlp_bias": False}
        case "gpt_oss":
            # transformers wants a window even where no layer has one.
            table |= {"num_local_experts": config.n_routed_experts, "sliding_window": config.sliding_window or 128}
            table |= {"layer_types": list(config.layer_types or [_FULL] * config.num_hidden_layers)}
            # Nothing said means YaRN there.
            table["rope_scaling"] = table["rope_scaling"] or {"type": "default", "rope_type": "default"}
        case "qwen3_moe":
            table |= {"num_experts": config.n_routed_experts, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if kind.startswith("qwen"):
        table |= _windows_to_hf(config)
    return table


def _windows_to_hf(config: ModelConfig) -> dict[str, Any]:
    if config.layer_types is None:
        return {"use_sliding_window": False}
    kinds: list[str] = list(config.layer_types)
    first = kinds.index(_SLIDING)
    uniform = kinds == [_FULL] * first + [_SLIDING] * (len(kinds) - first)
    table = {"use_sliding_window": True, "sliding_window": config.sliding_window, "layer_types": kinds}
    return table | {"max_window_layers": first if uniform else len(kinds)}


def _scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    """Under both names of the type: older readers know one, newer ones the other."""
    kind = scaling.type
    given = {key: getattr(scaling, key) for key in _SCALINGS[kind]}
    if scaling.truncate:
        given.pop("truncate", None)  # as everywhere before gpt-oss
    return {"type": kind, "rope_type": kind, **{key: value for key, value in given.items() if value is not None}}


def _inexpressible(rule: str) -> CheckpointError:
    return CheckpointError(f"no published model type means this network: {rule}; change the recipe's [model]")
