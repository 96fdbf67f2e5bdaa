"""What a network costs, from its shape alone: parameters, FLOPs, cache, memory. `plan.py` makes hours and money of it.

One table of matrices (`Part`) gives both the parameters and the FLOPs, so that the two cannot disagree. Conventions:

- Totals leave the modules for multi-token prediction (MTP) out, as the papers do; they are counted apart.
- *Active* parameters are those that one token is multiplied with: the chosen experts, the head, not the embedding table
  (a lookup). A head tied to the table counts once. So counted DeepSeek-V3 has 36.6e9, V2 20.9e9, V2-Lite 2.45e9.
- A sliding window is counted as if its layers saw everything: an upper bound for attention and cache beyond it.
- FLOPs are 2 m n k for each product and nothing else: no norms, softmax, rotation or biases. The backward pass costs
  twice the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from glasklar.model.config import ModelConfig

BF16, FP32 = 2, 4  # bytes of a value
# Longer sequences are taken to use an attention kernel that does not keep the scores for the backward pass.
LONGEST_KEPT_SCORES = 512

OptimizerKind = Literal["adamw", "muon"]


class Matrix(NamedTuple):
    """`copies` matrices [rows, columns], of which one token is multiplied with `active`."""

    rows: int
    columns: int
    bias: bool = False
    copies: int = 1
    active: int = 1

    @property
    def size(self) -> int:
        return self.rows * (self.columns + self.bias)


@dataclass(frozen=True)
class Part:
    """Matrices that belong together, and the number of values in their norms."""

    matrices: tuple[Matrix, ...]
    norms: int = 0

    @property
    def matrix_parameters(self) -> int:
        return sum(m.copies * m.rows * m.columns for m in self.matrices)

    @property
    def parameters(self) -> int:
        return sum(m.copies * m.size for m in self.matrices) + self.norms

    @property
    def active(self) -> int:
        return sum(m.active * m.size for m in self.matrices) + self.norms

    @property
    def flops(self) -> int:
        """FLOPs of the products for one token, forward."""
        return 2 * sum(m.active * m.rows * m.columns for m in self.matrices)


def attention_part(config: ModelConfig) -> Part:
    """Projections of one layer's attention (eq. 1-11)."""
    D, H, K, V = config.hidden_size, config.num_attention_heads, config.qk_head_dim, config.value_head_dim
    C, Q, bias = config.kv_lora_rank, config.q_lora_rank, config.attention_bias
    if C is None:
        G = config.kv_heads
        out = Matrix(D, H * V, config.output_bias)
        matrices = (Matrix(H * K, D, bias), Matrix(G * K, D, bias), Matrix(G * V, D, bias), out)
        return Part(matrices, norms=(2 * K if config.qk_norm else 0) + (H if config.attention_sinks else 0))
    query = (Matrix(H * K, D),) if Q is None else (Matrix(Q, D, bias), Matrix(H * K, Q))
    R = config.rope_dim
    keys_values = (Matrix(C + R, D, bias), Matrix(H * (K - R + V), C))
    return Part((*query, *keys_values, Matrix(D, H * V, bias)), norms=(Q or 0) + C)


def feed_forward_part(config: ModelConfig, layer: int) -> Part:
    """SwiGLU of one layer: dense, or gate, routed and shared experts (eq. 12-16)."""
    D = config.hidden_size
    if not config.is_moe_layer(layer):
        return Part((Matrix(2 * config.intermediate_size, D), Matrix(D, config.intermediate_size)))
    E, A, F = _experts(config)
    biases = config.swiglu_limit is not None
    routed = (Matrix(2 * F, D, biases, copies=E, active=A), Matrix(D, F, biases, copies=E, active=A))
    S = F * config.n_shared_experts
    shared = (Matrix(2 * S, D), Matrix(D, S)) if S else ()
    return Part((Matrix(E, D, biases), *routed, *shared))


def _experts(config: ModelConfig) -> tuple[int, int, int]:
    """Routed experts, chosen ones, hidden width of one; for shapes with experts."""
    E, A, F = config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size
    assert E is not None
    assert A is not None
    assert F is not None
    return E, A, F


def block_part(config: ModelConfig, layer: int) -> Part:
    """One block: attention, feed-forward and their two norms."""
    return _joined((attention_part(config), feed_forward_part(config, layer)), 2 * config.hidden_size)


def body_part(config: ModelConfig) -> Part:
    """All blocks and the last norm; neither embedding nor head."""
    return _joined((block_part(config, layer) for layer in range(config.num_hidden_layers)), config.hidden_size)


def mtp_part(config: ModelConfig) -> Part:
    """The MTP modules (eq. 21-23) without the embedding and the head that they share with the network."""
    D, L = config.hidden_size, config.num_hidden_layers
    depths = range(L, L + config.num_nextn_predict_layers)
    modules = (_joined((block_part(config, layer), Part((Matrix(D, 2 * D),))), 3 * D) for layer in depths)
    return _joined(modules)


def _joined(parts: Iterable[Part], norms: int = 0) -> Part:
    """All `parts` as one, and `norms` values more."""
    every = list(parts)
    return Part(tuple(m for part in every for m in part.matrices), norms + sum(part.norms for part in every))


@dataclass(frozen=True)
class Parameters:
    """Numbers of trained values. `total` has `embedding`, not `mtp`; the gate's balancing bias is not trained."""

    total: int
    active: int
    embedding: int
    mtp: int


def count_parameters(config: ModelConfig) -> Parameters:
    """Exact counts; conventions at the top of this file."""
    table, body = config.vocab_size * config.hidden_size, body_part(config)
    tables = 1 if config.tie_word_embeddings else 2
    return Parameters(
        total=body.parameters + tables * table,
        active=body.active + table,
        embedding=table,
        mtp=mtp_part(config).parameters,
    )


def attention_flops(config: ModelConfig, keys: int, *, absorbed: bool = False) -> int:
    """FLOPs of one layer's scores and weighted sum for one query over `keys` keys.

    expanded   H heads of K values against the keys, V values summed
    absorbed   H heads against the cached row of C + R values, C values summed (MLA only)
    """
    H = config.num_attention_heads
    if absorbed and config.kv_lora_rank is not None:
        return 2 * H * keys * (2 * config.kv_lora_rank + config.rope_dim)
    return 2 * H * keys * (config.qk_head_dim + config.value_head_dim)


def sequence_flops(config: ModelConfig, tokens: int, *, causal: bool = True) -> int:
    """FLOPs of one layer's expanded attention per token of a sequence of `tokens`.

    A token sees itself and those before it, (tokens + 1) / 2 keys on average. With `causal` off all are counted, as
    older papers do and as kernels without a causal shortcut compute.
    """
    return attention_flops(config, tokens + 1) // 2 if causal else attention_flops(config, tokens)


def head_flops(config: ModelConfig) -> int:
    return 2 * config.vocab_size * config.hidden_size


def training_flops_per_token(config: ModelConfig, context: int, *, causal: bool = True) -> int:
    """FLOPs per trained token in sequences of `context` tokens, forward and backward, without MTP.

    DeepSeek-V3 at 4096: 250.5e9, the 250 GFLOP of arXiv 2505.09343; non-causal 281.2e9.
    """
    attention = config.num_hidden_layers * sequence_flops(config, context, causal=causal)
    return 3 * (body_part(config).flops + attention + head_flops(config))


def mtp_flops_per_token(config: ModelConfig, context: int, *, causal: bool = True) -> int:
    """What training the MTP modules adds to `training_flops_per_token`; every depth uses the shared head again."""
    one = sequence_flops(config, context, causal=causal) + head_flops(config)
    return 3 * (mtp_part(config).flops + config.num_nextn_predict_layers * one)


def prefill_flops_per_token(config: ModelConfig, context: int) -> int:
    """FLOPs per token of a prompt of `context` tokens, attention expanded and causal.

    Without the head: only the prompt's last token needs it.
    """
    return body_part(config).flops + config.num_hidden_layers * sequence_flops(config, context)


def decode_flops_per_token(config: ModelConfig, context: int) -> int:
    """FLOPs of one generated token that sees `context` cached tokens, attention absorbed (MLA) or over the cache.

    Absorption moves the up-projections of keys and values to query and output: as many products as applying them once.
    """
    attention = config.num_hidden_layers * attention_flops(config, context, absorbed=True)
    return body_part(config).flops + attention + head_flops(config)


def cache_bytes_per_token(config: ModelConfig, value_bytes: int = BF16) -> int:
    """Bytes that all layers keep for one token (MTP modules, where used for drafts, keep one layer's share each)."""
    return config.num_hidden_layers * config.cache_width * value_bytes


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes. Gradients are bf16 in the backward pass and fp32 in the optimiser, when the activations are gone."""

    weights: int
    masters: int
    moments: int
    gradients: int
    optimizer_gradients: int
    activations: int

    @property
    def peak(self) -> int:
        backward = self.gradients + self.activations
        return self.weights + self.masters + self.moments + max(backward, self.optimizer_gradients)


def training_memory(
    config: ModelConfig, *, batch_tokens: int, context: int, optimizer: OptimizerKind = "adamw"
) -> TrainingMemory:
    """Memory of one training step: bf16 weights, fp32 masters and moments, `batch_tokens` tokens at a time.

    AdamW keeps two moments of every value; Muon one of the matrices inside blocks, AdamW the rest. The gate's few fp32
    weights count like the others. The activations are an estimate, see `activation_bytes`.
    """
    counts = count_parameters(config)
    values = counts.total + counts.mtp
    moments = 2 * values
    if optimizer == "muon":
        blocks = _joined((body_part(config), mtp_part(config)))
        gates = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers + config.num_nextn_predict_layers))
        moments -= blocks.matrix_parameters - gates * (config.n_routed_experts or 0) * config.hidden_size
    return TrainingMemory(
        weights=BF16 * values,
        masters=FP32 * values,
        moments=FP32 * moments,
        gradients=BF16 * values,
        optimizer_gradients=FP32 * values,
        activations=batch_tokens * activation_bytes(config, context),
    )


def activation_bytes(config: ModelConfig, context: int) -> int:
    """Estimated bytes kept for the backward pass per token, in bf16, nothing recomputed.

    Inputs of all products, queries, keys, values and, up to LONGEST_KEPT_SCORES, the attention weights; probabilities
    over the vocabulary in bf16, and three fp32 copies of them while the loss is taken.
    """
    depths, W = config.num_nextn_predict_layers, config.vocab_size
    layers = range(config.num_hidden_layers + depths)
    values = sum(_block_activations(config, layer, context) for layer in layers)
    values += 2 * config.hidden_size * (1 + 2 * depths) + (1 + depths) * W
    return BF16 * values + 3 * FP32 * W


def _block_activations(config: ModelConfig, layer: int, context: int) -> int:
    D, H, K, V = config.hidden_size, config.num_attention_heads, config.qk_head_dim, config.value_head_dim
    attention = 2 * D + 2 * H * (K + V)  # norm's input and output; queries, keys, values, output
    if config.kv_lora_rank is not None:
        attention += 2 * ((config.q_lora_rank or 0) + config.kv_lora_rank) + config.rope_dim
    if context <= LONGEST_KEPT_SCORES:
        attention += H * context
    if not config.is_moe_layer(layer):
        return attention + 2 * D + 3 * config.intermediate_size
    E, A, F = _experts(config)
    gate = 2 * (D + E)  # fp32
    return attention + 2 * D + gate + A * (D + 3 * F) + 3 * F * config.n_shared_experts


def weight_bytes(config: ModelConfig, bits_per_weight: float = 16.0) -> int:
    """Bytes of the weights without MTP, at an average of `bits_per_weight` (a 4-bit format with scales: about 4.5)."""
    return math.ceil(count_parameters(config).total * bits_per_weight / 8)


def serving_memory(
    config: ModelConfig, *, context: int, sequences: int = 1, bits_per_weight: float = 16.0, value_bytes: int = BF16
) -> int:
    """Bytes of weights and of a cache that holds `sequences` of `context` tokens each."""
    return weight_bytes(config, bits_per_weight) + context * sequences * cache_bytes_per_token(config, value_bytes)


def decode_bytes(
    config: ModelConfig, *, context: int, sequences: int = 1, bits_per_weight: float = 16.0, value_bytes: int = BF16
) -> int:
    """Bytes read from memory by one decoding pass over `sequences` sequences: weights in use and the whole cache.

    With evenly loaded experts a pass over B sequences meets E (1 - (1 - A/E)^B) of the E experts of a layer.
    """
    met = body_part(config).active + config.vocab_size * config.hidden_size
    if config.is_moe:
        E, A, F = _experts(config)
        idle_again = E * (1 - (1 - A / E) ** sequences) - A
        layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
        met += math.ceil(layers * idle_again * 3 * config.hidden_size * F)
    cache = sequences * context * cache_bytes_per_token(config, value_bytes)
    return math.ceil(met * bits_per_weight / 8) + cache
