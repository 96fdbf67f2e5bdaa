"""Weights under llama.cpp's names and in its layout.

    Hugging Face                                  GGUF, N the layer
    model.embed_tokens, model.norm, lm_head       token_embd, output_norm, output (absent when tied)
    self_attn.{q,k,v,o}_proj                      blk.N.attn_{q,k,v,output}
    self_attn.{q,k}_norm                          blk.N.attn_{q,k}_norm
    self_attn.q_a_proj, q_b_proj                  blk.N.attn_q_a, attn_q_b
    self_attn.kv_a_proj_with_mqa                  blk.N.attn_kv_a_mqa
    self_attn.kv_b_proj [H(N+V), C]               blk.N.attn_k_b [H, C, N] and attn_v_b [H, V, C]
    mlp.{gate,up,down}_proj                       blk.N.ffn_{gate,up,down}
    mlp.gate, its e_score_correction_bias         blk.N.ffn_gate_inp, exp_probs_b
    mlp.experts.e.{gate,up,down}_proj for each e  blk.N.ffn_{gate,up,down}_exps [E, …]
    mlp.shared_experts.{gate,up,down}_proj        blk.N.ffn_{gate,up,down}_shexp
    (Llama 3's rope scaling in config.json)       rope_freqs

llama.cpp rotates neighbours in the `llama` and `deepseek2` architectures and halves in those of Qwen; rows of queries
and keys are put in the order that it rotates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from glasklar.convert.gguf_metadata import architecture
from glasklar.errors import CheckpointError
from glasklar.model.attention import inverse_frequencies
from glasklar.model.config import ModelConfig

_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_ATTENTION = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_a_proj": "attn_q_a",
    "q_a_layernorm": "attn_q_a_norm",
    "q_b_proj": "attn_q_b",
    "kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "kv_a_layernorm": "attn_kv_a_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
}
_INNER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{theirs}": name for theirs, name in _ATTENTION.items()},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
    "mlp.gate": "ffn_gate_inp",
}
_ROTATES_NEIGHBOURS = {"llama": True, "deepseek2": True, "qwen2": False, "qwen3": False, "qwen3moe": False}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias|e_score_correction_bias)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor to write. `make` gives it when its turn comes, so that copies live one at a time.

    exact   kept in fp32 whatever type the file has: gates, norms, biases
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    exact: bool


def entries(tensors: Mapping[str, Tensor], config: ModelConfig) -> Iterator[Entry]:
    """Entries of a model from its tensors under their Hugging Face names (`checkpoint.hf_tensors`).

    Layers from `num_hidden_layers` on, which predict further tokens, are left out: llama.cpp's deepseek2 does not use
    them. Raises CheckpointError for a tensor without a place.
    """
    if config.rope_scaling is not None and config.rope_scaling.type == "llama3":
        yield _entry("rope_freqs.weight", _slowed(config))
    experts: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if name in _OUTER:
            yield _entry(_OUTER[name], tensor)
            continue
        match = _LAYER.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{name}: has no place in a GGUF file; write a Hugging Face folder: --to hf")
        layer, inner, leaf = int(match[1]), match[2], match[3]
        if layer >= config.num_hidden_layers:
            continue
        if expert := _EXPERT.fullmatch(inner):
            # hf_tensors names the experts of a layer in their order.
            experts.setdefault(f"blk.{layer}.ffn_{expert[2]}_exps.weight", []).append(tensor)
        else:
            yield from _of_layer(f"blk.{layer}", inner, leaf, tensor, config)
    for name, stack in experts.items():
        shape = (len(stack), *stack[0].shape)
        yield Entry(name=name, shape=shape, make=lambda stack=stack: torch.stack(stack), exact=False)  # type: ignore[misc]


def _slowed(config: ModelConfig) -> Tensor:
    """By what llama.cpp divides each rotary frequency [R/2]: Llama 3's scaling."""
    plain, _ = inverse_frequencies(config.replace(rope_scaling=None))
    return plain / inverse_frequencies(config)[0]


def _of_layer(block: str, inner: str, leaf: str, tensor: Tensor, config: ModelConfig) -> Iterator[Entry]:
    if leaf == "e_score_correction_bias":
        yield _entry(f"{block}.exp_probs_b.bias", tensor)
    elif inner == "self_attn.kv_b_proj":
        nope = config.qk_nope_head_dim or 0
        both_HxC = tensor.unflatten(0, (config.num_attention_heads, -1))
        yield _entry(f"{block}.attn_k_b.{leaf}", both_HxC[:, :nope].transpose(1, 2))
        yield _entry(f"{block}.attn_v_b.{leaf}", both_HxC[:, nope:])
    elif inner in _INNER:
        yield Entry(
            name=f"{block}.{_INNER[inner]}.{leaf}",
            shape=tuple(tensor.shape),
            make=lambda: _rotatable(inner, tensor, config),
            exact=inner == "mlp.gate" or tensor.ndim == 1,
        )
    else:
        raise CheckpointError(f"{inner}.{leaf}: has no place in a GGUF file; write a Hugging Face folder: --to hf")


def _entry(name: str, tensor: Tensor) -> Entry:
    return Entry(name=name, shape=tuple(tensor.shape), make=tensor.contiguous, exact=tensor.ndim == 1)


def _rotatable(inner: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Rows of queries or keys in the order in which llama.cpp rotates them; other tensors as they are."""
    neighbours = _ROTATES_NEIGHBOURS[architecture(config)]
    if config.rope_interleave == neighbours:
        return tensor
    rope, width = config.rope_dim, config.qk_head_dim
    match inner.removeprefix("self_attn."):
        case "q_proj" | "q_b_proj":
            return _reorder(tensor, heads=config.num_attention_heads, width=width, rope=rope, neighbours=neighbours)
        case "k_proj":
            return _reorder(tensor, heads=config.kv_heads, width=width, rope=rope, neighbours=neighbours)
        case "kv_a_proj_with_mqa":
            return _reorder(tensor, heads=1, width=tensor.shape[0], rope=rope, neighbours=neighbours)
    return tensor


def _reorder(tensor: Tensor, *, heads: int, width: int, rope: int, neighbours: bool) -> Tensor:
    """The last `rope` rows of each head: x0 x1 … y0 y1 … to x0 y0 x1 y1 … (`neighbours`), or the other way round."""
    per_head = tensor.unflatten(0, (heads, width))
    still, turning = per_head[:, : width - rope], per_head[:, width - rope :]
    halves = (2, rope // 2) if neighbours else (rope // 2, 2)
    turning = turning.unflatten(1, halves).transpose(1, 2).flatten(1, 2)
    return torch.cat([still, turning], dim=1).flatten(0, 1)
