"""Weights as the C++ pass wants them: tiles of 16 rows, in float, bf16, int8 or int4 (`cpu/matrix.hpp`).

They are made once from a network, or tensor by tensor from a checkpoint's files, and can be kept in a safetensors file
that the next start maps into memory without reading it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from glasklar.engine.cpu.library import Matrix
from glasklar.errors import CheckpointError
from glasklar.model.config import ModelConfig

Quantisation = Literal["int8", "int4"]
FLOAT, BF16, INT8, INT4 = range(4)
KINDS = {"float32": FLOAT, "bfloat16": BF16, "int8": INT8, "int4": INT4}
GROUP, TILE = 32, 16

# Name of a parameter of `model.transformer.Transformer` -> its tensor.
Source = Callable[[str], Tensor]


@dataclass
class PackedMatrix:
    """`copies` matrices [outputs, inputs] in tiles; `data` is uint8."""

    kind: int
    outputs: int
    inputs: int
    copies: int
    data: Tensor
    bias: Tensor | None = None

    def struct(self) -> Matrix:
        """For C; the caller keeps `self` alive."""
        bias = None if self.bias is None else self.bias.data_ptr()
        return Matrix(
            data=self.data.data_ptr(), bias=bias, kind=self.kind, outputs=self.outputs, inputs=self.inputs,
            copies=self.copies,
        )  # fmt: skip


@dataclass
class PackedLayer:
    """One block: matrices and fp32 vectors by the names of `Layer` in cpu/network.hpp."""

    matrices: dict[str, PackedMatrix] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    hidden: int = 0
    expert_hidden: int = 0

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name."""
        for name, matrix in self.matrices.items():
            yield prefix + name, matrix.data
            if matrix.bias is not None:
                yield f"{prefix}{name}.bias", matrix.bias
        for name, vector in self.vectors.items():
            yield prefix + name, vector


@dataclass
class PackedDraft:
    """The module of multi-token prediction: its block, the matrix that joins token and state, and its norms."""

    block: PackedLayer
    join: PackedMatrix
    vectors: dict[str, Tensor]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name."""
        yield from self.block.tensors("draft.block.")
        yield "draft.join", self.join.data
        yield from ((f"draft.{name}", vector) for name, vector in self.vectors.items())


class Packer:
    """Packs with a given library. `kind` for the projections; the up-projections of MLA and the head keep 8 bits at
    least: they are few, and every token passes them."""

    def __init__(self, library: ctypes.CDLL, kind: int, threads: int) -> None:
        self.library, self.kind, self.threads = library, kind, threads

    @property
    def fine(self) -> int:
        return INT8 if self.kind == INT4 else self.kind

    def matrix(
        self, weight: Tensor, kind: int | None = None, bias: Tensor | None = None, parts: int = 1
    ) -> PackedMatrix:
        """Packs [outputs, inputs] or [copies, outputs, inputs]. With `parts` > 1 the outputs are that many equal parts,
        each padded to whole groups (gate and up)."""
        kind = self.kind if kind is None else kind
        weight = weight if weight.ndim == 3 else weight[None]
        copies, outputs, inputs = weight.shape
        part = outputs // parts
        padded = part if parts == 1 else -(-part // GROUP) * GROUP
        tiles = -(-padded // TILE)
        size = self.library.glasklar_tile_bytes(kind, inputs)
        data = torch.empty(copies * parts * tiles * size, dtype=torch.uint8)
        jobs = [
            (weight[copy, n * part : (n + 1) * part], first, ((copy * parts + n) * tiles + first) * size)
            for copy in range(copies)
            for n in range(parts)
            for first in range(0, tiles, 64)
        ]

        def pack(job: tuple[Tensor, int, int]) -> None:
            source, first, place = job
            last = min(first + 64, tiles)
            source = source if source.stride(-1) == 1 else source.contiguous()
            narrow = source.dtype == torch.bfloat16
            source = source if narrow else source.float()
            self.library.glasklar_pack(
                kind, narrow, source.data_ptr(), source.stride(0), part, inputs, first, last, data.data_ptr() + place
            )

        if self.threads == 1 or len(jobs) == 1:
            for job in jobs:
                pack(job)
        else:
            with ThreadPoolExecutor(self.threads) as pool:  # ctypes lets go of Python's lock
                list(pool.map(pack, jobs))
        if bias is not None:
            bias = bias.detach().float().contiguous()
        return PackedMatrix(kind, padded * parts, inputs, copies, data, bias)

    def layer(self, config: ModelConfig, index: int, get: Source, prefix: str | None = None) -> PackedLayer:
        """One block of the network; `prefix` of its names, if it is not one of the layers."""
        packed = PackedLayer()
        prefix = prefix or f"layers.{index}."
        self._attention(packed, config, lambda name: get(f"{prefix}self_attn.{name}"))
        packed.vectors["attention_norm"] = vector(get(prefix + "input_layernorm.weight"))
        packed.vectors["feed_norm"] = vector(get(prefix + "post_attention_layernorm.weight"))
        if config.is_moe_layer(index):
            self._experts(packed, config, lambda name: get(f"{prefix}mlp.{name}"))
        else:
            self._feed_forward(packed, get(prefix + "mlp.gate_up_proj.weight"), get(prefix + "mlp.down_proj.weight"))
        return packed

    def draft(self, config: ModelConfig, get: Source) -> PackedDraft:
        """The first module of multi-token prediction."""
        vectors = {"embedding_norm": "enorm", "state_norm": "hnorm", "final_norm": "norm"}
        return PackedDraft(
            self.layer(config, config.num_hidden_layers, get, prefix="mtp.0.block."),
            self.matrix(get("mtp.0.eh_proj.weight")),
            {name: vector(get(f"mtp.0.{theirs}.weight")) for name, theirs in vectors.items()},
        )

    def _attention(self, packed: PackedLayer, config: ModelConfig, get: Source) -> None:
        m, v = packed.matrices, packed.vectors

        def bias(name: str) -> Tensor | None:
            return get(name + ".bias") if config.attention_bias else None

        if not config.is_mla:
            m["q"] = self.matrix(get("q_proj.weight"), bias=bias("q_proj"))
            both = bias("k_proj")
            m["kv"] = self.matrix(
                torch.cat((get("k_proj.weight"), get("v_proj.weight"))),
                bias=None if both is None else torch.cat((both, get("v_proj.bias"))),
            )
            m["out"] = self.matrix(get("o_proj.weight"))
            return
        if config.q_lora_rank is None:
            m["q"] = self.matrix(get("q_proj.weight"))
        else:
            m["q"] = self.matrix(get("q_a_proj.weight"), bias=bias("q_a_proj"))
            v["q_latent_norm"] = vector(get("q_a_layernorm.weight"))
            m["q_up"] = self.matrix(get("q_b_proj.weight"))
        m["kv"] = self.matrix(get("kv_a_proj_with_mqa.weight"), bias=bias("kv_a_proj_with_mqa"))
        v["latent_norm"] = vector(get("kv_a_layernorm.weight"))
        up_HXC = get("kv_b_proj.weight").unflatten(0, (config.num_attention_heads, -1))
        N = config.qk_nope_head_dim
        m["k_up"] = self.matrix(up_HXC[:, :N].mT.contiguous(), self.fine)
        m["v_up"] = self.matrix(up_HXC[:, N:], self.fine)
        m["out"] = self.matrix(get("o_proj.weight"), bias=bias("o_proj"))

    def _feed_forward(self, packed: PackedLayer, gate_up: Tensor, down: Tensor) -> None:
        packed.matrices["gate_up"] = self.matrix(gate_up, parts=2)
        packed.matrices["down"] = self.matrix(down)
        packed.hidden = -(-down.shape[-1] // GROUP) * GROUP

    def _experts(self, packed: PackedLayer, config: ModelConfig, get: Source) -> None:
        packed.matrices["router"] = self.matrix(get("gate.weight"), FLOAT)
        if config.scoring_func == "sigmoid":
            packed.vectors["router_bias"] = vector(get("gate.e_score_correction_bias"))
        down = get("down_EDF")
        packed.matrices["experts_gate_up"] = self.matrix(get("gate_up_EFD"), parts=2)
        packed.matrices["experts_down"] = self.matrix(down)
        packed.expert_hidden = -(-down.shape[-1] // GROUP) * GROUP
        if config.n_shared_experts:
            self._feed_forward(
                packed, get("shared_experts.gate_up_proj.weight"), get("shared_experts.down_proj.weight")
            )


def vector(weight: Tensor) -> Tensor:
    """As the pass takes norms and biases: fp32, a copy of its own."""
    return weight.detach().float().contiguous().clone()


@dataclass
class PackedModel:
    """All weights of a network, packed. `embedding` [W, D] stays as it is: only single rows of it are read. `draft`:
    the module that guesses ahead, where the model has one and it is wanted."""

    config: ModelConfig
    embedding: Tensor
    final_norm: Tensor
    head: PackedMatrix
    layers: list[PackedLayer]
    draft: PackedDraft | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name."""
        yield "embedding", self.embedding
        yield "final_norm", self.final_norm
        yield "head", self.head.data
        for i, layer in enumerate(self.layers):
            yield from layer.tensors(f"layers.{i}.")
        if self.draft is not None:
            yield from self.draft.tensors()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.tensors())


def pack(
    config: ModelConfig,
    get: Source,
    packer: Packer,
    progress: Callable[[int, int], None] | None = None,
    draft: bool = False,
) -> PackedModel:
    """Packs a whole network. `progress(layers done, of)`; `draft`: with its module of multi-token prediction, if it has
    one."""
    embedding = get("embed_tokens.weight").detach()
    if embedding.dtype not in (torch.float32, torch.bfloat16):
        raise CheckpointError(f"embed_tokens.weight is {embedding.dtype}; the engine takes float32 or bfloat16")
    layers = []
    for i in range(config.num_hidden_layers):
        layers.append(packer.layer(config, i, get))
        if progress is not None:
            progress(i + 1, config.num_hidden_layers)
    head = embedding if config.tie_word_embeddings else get("lm_head.weight")
    return PackedModel(
        config, embedding.contiguous(), vector(get("norm.weight")), packer.matrix(head, packer.fine), layers,
        packer.draft(config, get) if draft and config.num_nextn_predict_layers else None,
    )  # fmt: skip
