"""Writing a GGUF file: metadata, then the tensors one after the other, each in its own type."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from glasklar.convert.gguf_metadata import DType, Value
from glasklar.convert.gguf_tensors import Entry
from glasklar.convert.gguf_vocab import Vocabulary
from glasklar.errors import CheckpointError
from glasklar.provenance.files import TEMPORARY, sync, writing

TYPES: dict[DType, Type] = {"fp32": Type.F32, "bf16": Type.BF16, "fp16": Type.F16, "q8_0": Type.Q8_0}
# llama.cpp's numbers of file types ("ftype"): shown to people, not needed to load.
_FILE_TYPES: dict[DType, int] = {"fp32": 0, "fp16": 1, "q8_0": 7, "bf16": 32}
_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding"}
_BLOCK = 32  # values that share a scale in Q8_0

Progress = Callable[[int, int], None]


def write_gguf(
    path: Path,
    entries: Sequence[Entry],
    keys: dict[str, Value],
    vocabulary: Vocabulary | None,
    *,
    name: str,
    architecture: str,
    dtype: DType,
    progress: Progress = lambda done, total: None,
) -> list[str]:
    """Writes the file as a whole or not at all; returns the names of tensors that are in fp16 because their rows do not
    divide into blocks of Q8_0. `progress` is told bytes done and bytes in all.

    Raises CapacityError (disk full), CheckpointError (not writable, values beyond fp16).
    """
    types = [_type_of(entry, dtype) for entry in entries]
    sizes = [_size(entry, kind) for entry, kind in zip(entries, types, strict=True)]
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            _add_keys(writer, keys, name, dtype)
            if vocabulary is not None:
                _add_vocabulary(writer, vocabulary)
            for entry, kind, size in zip(entries, types, sizes, strict=True):
                writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done = 0
            for entry, kind, size in zip(entries, types, sizes, strict=True):
                writer.write_tensor_data(_encoded(entry, kind))
                done += size
                progress(done, sum(sizes))
            writer.close()
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            writer.close()
            temporary.unlink(missing_ok=True)
            raise
    return [entry.name for entry, kind in zip(entries, types, strict=True) if dtype == "q8_0" and kind == Type.F16]


def _add_keys(writer: gguf.GGUFWriter, keys: dict[str, Value], name: str, dtype: DType) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in keys.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for role, token in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{_ROLES[role]}_token_id", token)
    writer.add_add_bos_token(vocabulary.add_bos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _type_of(entry: Entry, dtype: DType) -> Type:
    if entry.exact:
        return Type.F32
    if dtype == "q8_0" and entry.shape[-1] % _BLOCK:
        return Type.F16
    return TYPES[dtype]


def _size(entry: Entry, kind: Type) -> int:
    """Bytes of a tensor in the file."""
    per_block, bytes_of_block = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(entry.shape) // per_block * bytes_of_block


def _encoded(entry: Entry, kind: Type) -> np.ndarray:
    tensor = entry.make().detach().cpu()
    match kind:
        case Type.BF16:
            return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
        case Type.F16:
            return _half(entry.name, tensor).contiguous().numpy()
    values = tensor.to(torch.float32).contiguous().numpy()
    return values if kind == Type.F32 else gguf.quants.quantize(values, kind)


def _half(name: str, tensor: Tensor) -> Tensor:
    half = tensor.to(torch.float16)
    if not torch.isfinite(half).all():
        raise CheckpointError(f"{name}: has values beyond fp16 (largest {tensor.abs().max():.3g}); use --dtype bf16")
    return half
