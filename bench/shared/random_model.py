"""A model of random weights in a published shape, for our engine and, at the same bits, as a file for llama.cpp."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from glasklar.convert.gguf_metadata import architecture, metadata
from glasklar.convert.gguf_tensors import Entry, entries
from glasklar.engine.cpu import library
from glasklar.engine.packed import KINDS, PackedModel, Packer
from glasklar.engine.packed_file import VERSION, Damaged, open_file, write_file
from glasklar.model.checkpoint import hf_tensors
from glasklar.model.config import ModelConfig
from glasklar.model.init import build, initialise
from glasklar.model.shapes import load_shape
from glasklar.recipe import load_recipe

SAME_BITS = {"int4": gguf.GGMLQuantizationType.Q4_0, "int8": gguf.GGMLQuantizationType.Q8_0,
             "bfloat16": gguf.GGMLQuantizationType.BF16}  # fmt: skip
KEY = f"bench {VERSION}"
FINE = ("output.weight", "token_embd.weight", "attn_k_b.weight", "attn_v_b.weight")


def config_of(shape: str, layers: int | None) -> ModelConfig:
    if shape == "spark":
        return load_recipe("spark").model.replace(max_position_embeddings=1024, num_nextn_predict_layers=0)
    name = {"v2-lite": "deepseek-v2-lite"}.get(shape, shape)
    config = load_shape(name).config
    config = config.replace(num_hidden_layers=min(layers or config.num_hidden_layers, config.num_hidden_layers))
    return config.replace(num_nextn_predict_layers=0, initializer_range=0.02)


class RandomWeights:
    """One dense and one expert layer of random weights, which stand for all layers of their kind."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.kinds = sorted({config.is_moe_layer(i) for i in range(config.num_hidden_layers)})
        dense = 1 if config.is_moe and len(self.kinds) == 2 else 0
        small = config.replace(num_hidden_layers=len(self.kinds), num_nextn_predict_layers=0)
        small = small.replace(first_k_dense_replace=dense) if config.is_moe else small
        self.small = initialise(build(small, dtype=torch.bfloat16), 1).requires_grad_(False)
        self.own = {**dict(self.small.named_parameters()), **dict(self.small.named_buffers())}

    def get(self, name: str) -> Tensor:
        """A tensor by our name."""
        room, _, rest = name.partition(".")
        if room != "layers":
            return self.own[name]
        index, _, inner = rest.partition(".")
        return self.own[f"layers.{self._stand_in(int(index))}.{inner}"]

    def _stand_in(self, layer: int) -> int:
        return self.kinds.index(self.config.is_moe_layer(layer))

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Tensors of the GGUF file, each with the name of the one that holds its values."""
        stands_for: dict[int, list[int]] = {}
        for layer in range(self.config.num_hidden_layers):
            stands_for.setdefault(self._stand_in(layer), []).append(layer)
        for entry in entries(hf_tensors(self.small), self.small.config):
            if not entry.name.startswith("blk."):
                yield entry.name, entry
                continue
            _, index, inner = entry.name.split(".", 2)
            for layer in stands_for[int(index)]:
                name = f"blk.{layer}.{inner}"
                yield entry.name, Entry(name=name, shape=entry.shape, make=entry.make, exact=entry.exact)


def write_gguf(path: Path, weights: RandomWeights, bits: str) -> None:
    """The peer's file."""
    config = weights.config.replace(num_nextn_predict_layers=0)
    writer = gguf.GGUFWriter(path, architecture(config))
    writer.add_type(gguf.GGUFType.MODEL)
    for key, value in {**metadata(config), "tokenizer.ggml.model": "none"}.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    encoded: dict[str, tuple[np.ndarray, Any]] = {}
    all_entries = sorted(weights.entries(), key=lambda pair: pair[0])
    for source, entry in all_entries:
        if source not in encoded:
            encoded[source] = _encoded(entry, bits)
        data, kind = encoded[source]
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), data.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for source, _ in all_entries:
        writer.write_tensor_data(encoded[source][0])
    writer.close()


def _encoded(entry: Entry, bits: str) -> tuple[np.ndarray, Any]:
    tensor = entry.make().float().contiguous()
    kind = SAME_BITS[bits]
    if bits == "int4" and any(name in entry.name for name in FINE):
        kind = gguf.GGMLQuantizationType.Q8_0
    if entry.exact:
        return tensor.numpy(), gguf.GGMLQuantizationType.F32
    if kind == gguf.GGMLQuantizationType.BF16:
        return tensor.bfloat16().view(torch.int16).numpy(), kind
    return gguf.quants.quantize(tensor.numpy(), kind), kind


@dataclass(frozen=True)
class Files:
    """Where a shape's weights lie for both sides: packed for us, GGUF for llama.cpp."""

    folder: Path
    shape: str
    bits: str
    layers: int | None

    @property
    def config(self) -> ModelConfig:
        return config_of(self.shape, self.layers)

    @property
    def probe(self) -> Path:
        return Path(__file__).with_name("probe.py")

    def _path(self, ending: str) -> Path:
        layers = f"-{self.layers}" if self.layers else ""
        return self.folder / f"{self.shape}-{self.bits}{layers}.{ending}"

    @property
    def gguf(self) -> Path:
        return self._path("gguf")

    @property
    def packed(self) -> Path:
        return self._path("safetensors")

    def make(self, threads: int) -> None:
        """What is not there yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        weights = functools.cache(lambda: RandomWeights(self.config))
        if not self.gguf.exists():
            whole = self.gguf.with_suffix(".part")  # half a file must not be taken for one
            write_gguf(whole, weights(), self.bits)
            whole.rename(self.gguf)
        try:
            self.open_packed(threads)
        except Damaged:  # or not there, or of another version
            packer = Packer(compiled(), KINDS[self.bits], threads)
            write_file(self.packed, KEY, self.config, weights().get, packer)

    def open_packed(self, threads: int) -> tuple[ctypes.CDLL, PackedModel]:
        return compiled(), open_file(self.packed, KEY, self.config, compiled(), threads)


def compiled() -> ctypes.CDLL:
    found = library.best()
    if found is None:
        sys.exit("the C++ pass is not compiled here: install a compiler and the package again")
    return found
