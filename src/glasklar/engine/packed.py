"""Weights as the C++ pass wants them: tiles of 16 rows, in float, bf16, int8 or int4 (`cpu/matrix.hpp`).

They are made once from a network, or tensor by tensor from a checkpoint's files, and can be kept in a safetensors file
that the next start maps into memory without reading it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from glasklar.engine.cpu import library
from glasklar.engine.cpu.library import Matrix
from glasklar.errors import CapacityError, CheckpointError
from glasklar.model.checkpoint import Source, open_checkpoint
from glasklar.model.config import ModelConfig

Quantisation = Literal["int8", "int4"]
FLOAT, BF16, INT8, INT4 = range(4)
KINDS = {"float32": FLOAT, "bfloat16": BF16, "int8": INT8, "int4": INT4}
GROUP, TILE = 32, 16
RUN = 64  # tiles packed at once
PIECE = 1 << 22  # values looked at at once


class Entries(Protocol):
    """A parameter with an entry for each expert: a tensor, or what reads one entry at a time."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, expert: int, /) -> Tensor: ...


# Name of a parameter of `model.transformer.Transformer` -> its numbers; `_EFD` and `_EDF` give entries.
Get = Callable[[str], Any]


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
    window: int = 0  # 0: every token is seen

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


class NotFinite(CheckpointError):
    """NaN or infinity among weights that are to be rounded."""


class Packer:
    """Packs with a given library. `kind` for the projections; the up-projections of MLA and the head keep 8 bits at
    least: they are few, and every token passes them."""

    def __init__(self, library: ctypes.CDLL, kind: int, threads: int) -> None:
        self.library, self.kind, self.threads = library, kind, threads

    @property
    def precision(self) -> str:
        """The name of `kind`."""
        return next(name for name, kind in KINDS.items() if kind == self.kind)

    @property
    def fine(self) -> int:
        return INT8 if self.kind == INT4 else self.kind

    def matrix(
        self, weight: Tensor, kind: int | None = None, bias: Tensor | None = None, parts: int = 1
    ) -> PackedMatrix:
        """Packs [outputs, inputs] or [copies, outputs, inputs]. With `parts` > 1 the outputs are that many equal parts,
        each padded to whole groups (gate and up)."""
        return self.stack(weight if weight.ndim == 3 else weight[None], kind, bias, parts)

    def stack(
        self,
        weights: Entries,
        kind: int | None = None,
        bias: Tensor | None = None,
        parts: int = 1,
        *,
        alternate: bool = False,
    ) -> PackedMatrix:
        """As `matrix`, entry by entry. `alternate`: the rows of the parts take turns."""
        kind = self.kind if kind is None else kind
        copies, outputs, inputs = weights.shape
        part = outputs // parts
        padded = part if parts == 1 else -(-part // GROUP) * GROUP
        tiles = -(-padded // TILE)
        size = self.library.glasklar_tile_bytes(kind, inputs)
        data = torch.empty(copies * parts * tiles * size, dtype=torch.uint8)

        def rows(source: Tensor, n: int) -> Tensor:
            return source[n::parts] if alternate else source[n * part : (n + 1) * part]

        def pack(source: Tensor, copy: int, n: int, first: int) -> None:
            last, place = min(first + RUN, tiles), ((copy * parts + n) * tiles + first) * size
            source = source if source.stride(-1) == 1 else source.contiguous()
            narrow = source.dtype == torch.bfloat16
            source = source if narrow else source.float()
            self.library.glasklar_pack(
                kind, narrow, source.data_ptr(), source.stride(0), part, inputs, first, last, data.data_ptr() + place
            )

        def entry(copy: int) -> Tensor:
            source = weights[copy]
            if kind >= INT8 and not is_finite(source):
                # Rounding would turn them into ordinary numbers.
                raise NotFinite(
                    f"a weight matrix [{outputs}, {inputs}] holds values that are not finite: the model is damaged; "
                    "fetch it again, or train it from an earlier checkpoint"
                )
            return source

        def pack_copy(copy: int) -> None:
            source = entry(copy)
            for n in range(parts):
                for first in range(0, tiles, RUN):
                    pack(rows(source, n), copy, n, first)

        if copies > 1:
            self._all(pack_copy, range(copies))
        else:
            source = entry(0)
            jobs = [(n, first) for n in range(parts) for first in range(0, tiles, RUN)]
            self._all(lambda job: pack(rows(source, job[0]), 0, *job), jobs)
        if bias is not None:
            wide = bias.detach().float().reshape(copies, outputs).T
            by_part = torch.stack([rows(wide, n).T for n in range(parts)], 1)
            bias = torch.nn.functional.pad(by_part, (0, padded - part)).contiguous()
        return PackedMatrix(kind, padded * parts, inputs, copies, data, bias)

    def _all(self, job: Callable[[Any], None], arguments: Sequence[Any]) -> None:
        """Shared among threads: ctypes and torch let go of Python's lock."""
        if self.threads == 1 or len(arguments) == 1:
            for argument in arguments:
                job(argument)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(job, arguments))

    def layer(self, config: ModelConfig, index: int, get: Get, prefix: str | None = None) -> PackedLayer:
        """One block of the network; `prefix` of its names, if it is not one of the layers."""
        prefix = prefix or f"layers.{index}."
        try:
            return self._block(config, index, get, prefix)
        except NotFinite as error:
            raise CheckpointError(f"{prefix.rstrip('.')}: {error}") from None

    def _block(self, config: ModelConfig, index: int, get: Get, prefix: str) -> PackedLayer:
        packed = PackedLayer(window=config.window(index) or 0)
        self._attention(packed, config, lambda name: get(f"{prefix}self_attn.{name}"))
        packed.vectors["attention_norm"] = vector(get(prefix + "input_layernorm.weight"))
        packed.vectors["feed_norm"] = vector(get(prefix + "post_attention_layernorm.weight"))
        if config.is_moe_layer(index):
            self._experts(packed, config, lambda name: get(f"{prefix}mlp.{name}"))
        else:
            self._feed_forward(packed, get(prefix + "mlp.gate_up_proj.weight"), get(prefix + "mlp.down_proj.weight"))
        return packed

    def draft(self, config: ModelConfig, get: Get) -> PackedDraft:
        """The first module of multi-token prediction."""
        vectors = {"embedding_norm": "enorm", "state_norm": "hnorm", "final_norm": "norm"}
        return PackedDraft(
            self.layer(config, config.num_hidden_layers, get, prefix="mtp.0.block."),
            self.matrix(get("mtp.0.eh_proj.weight")),
            {name: vector(get(f"mtp.0.{theirs}.weight")) for name, theirs in vectors.items()},
        )

    def _attention(self, packed: PackedLayer, config: ModelConfig, get: Get) -> None:
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
            m["out"] = self.matrix(get("o_proj.weight"), bias=get("o_proj.bias") if config.output_bias else None)
            if config.qk_norm:
                v["q_norm"], v["k_norm"] = vector(get("q_norm.weight")), vector(get("k_norm.weight"))
            if config.attention_sinks:
                v["sinks"] = vector(get("sinks"))
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

    def _experts(self, packed: PackedLayer, config: ModelConfig, get: Get) -> None:
        clamped = config.swiglu_limit is not None

        def bias(name: str) -> Tensor | None:
            return get(name) if clamped else None

        packed.matrices["router"] = self.matrix(get("gate.weight"), FLOAT, bias("gate.bias"))
        if config.scoring_func == "sigmoid":
            packed.vectors["router_bias"] = vector(get("gate.e_score_correction_bias"))
        packed.matrices["experts_gate_up"] = self.stack(
            get("gate_up_EFD"), bias=bias("gate_up_bias_EF"), parts=2, alternate=clamped
        )
        down = get("down_EDF")
        packed.matrices["experts_down"] = self.stack(down, bias=bias("down_bias_ED"))
        packed.expert_hidden = -(-down.shape[-1] // GROUP) * GROUP
        if config.n_shared_experts:
            self._feed_forward(
                packed, get("shared_experts.gate_up_proj.weight"), get("shared_experts.down_proj.weight")
            )


def is_finite(weight: Tensor) -> bool:
    """By pieces: what torch makes to answer takes twice the memory of what it looks at."""
    rows = max(1, PIECE // weight.shape[-1])
    return all(bool(torch.isfinite(piece).all()) for piece in weight.split(rows))


def vector(weight: Tensor) -> Tensor:
    """As the pass takes norms and biases: fp32, a copy of its own."""
    return weight.detach().float().contiguous().clone()


@dataclass
class PackedModel:
    """All weights of a network, packed. `embedding` [W, D] stays as it is: only single rows of it are read.

    draft       the module that guesses ahead, where the model has one and it is wanted
    precision   of the projections: a name in KINDS
    held        keeps a mapped file in memory while it lives (`packed_file.lock`)
    """

    config: ModelConfig
    embedding: Tensor
    final_norm: Tensor
    head: PackedMatrix
    layers: list[PackedLayer]
    draft: PackedDraft | None = None
    precision: str = "bfloat16"
    held: object = None

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
    get: Get,
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
        packer.precision,
    )  # fmt: skip


def packer_of(precision: str, threads: int) -> Packer:
    """With the fastest build; `precision` is a name in KINDS. Raises CapacityError where none is compiled."""
    compiled = library.best()
    if compiled is None:
        raise CapacityError(
            f"weights as {precision} need the compiled pass, which this installation lacks: install glasklar again "
            "where a C++ compiler is present, or load the model as float32 or bfloat16"
        )
    return Packer(compiled, KINDS[precision], threads)


def load_packed(
    folder: Path,
    precision: str,
    *,
    threads: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackedModel:
    """Packs a Hugging Face folder while it is read, its draft module too: needs the memory of the packed model, of its
    largest tensor and of two experts.

    precision   a name in KINDS
    progress    is told bytes read and bytes in all

    Raises CheckpointError as `open_checkpoint`; CapacityError where the C++ pass is not compiled.
    """
    opened = open_checkpoint(folder)
    source = Source(opened, progress)
    packed = pack(opened.config, source, packer_of(precision, threads), draft=True)
    opened.check_copies()
    progress(opened.nbytes, opened.nbytes)
    return packed
