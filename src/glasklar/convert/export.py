"""Any model out: a Hugging Face folder for transformers and vLLM, a GGUF file for llama.cpp and what stands on it."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from glasklar.convert.gguf_metadata import DType, architecture, metadata
from glasklar.convert.gguf_tensors import entries
from glasklar.convert.gguf_vocab import read_vocabulary
from glasklar.errors import CheckpointError
from glasklar.model.checkpoint import WEIGHTS, hf_tensors, load_model, open_checkpoint
from glasklar.model.hf_config import config_to_hf, read_json
from glasklar.model.tensor_file import write_file
from glasklar.model.transformer import Transformer
from glasklar.ops.select import REFERENCE
from glasklar.provenance.files import new_folder, sync, write_atomic, writing

Format = Literal["hf", "gguf"]
_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What makes a folder a model beside its weights and configuration, which are written anew.
_COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json",
    "merges.txt", "generation_config.json", "recipe.json", "LICENSE", "README.md",
)  # fmt: skip

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was written. `notes`: what the copy lacks or has otherwise, in whole sentences."""

    path: Path
    format: Format
    dtype: DType
    bytes: int
    notes: list[str] = field(default_factory=list)


def convert(
    folder: Path,
    out: Path,
    *,
    to: str,
    dtype: str,
    name: str,
    progress: Progress = lambda done, total: None,
) -> Converted:
    """Writes the model of a Hugging Face folder as `to` ("hf": a folder, "gguf": a file) at `out`, whole or not at all.

    dtype      "fp32", "bf16", "fp16"; "q8_0" (8 bits and a scale for 32 values) for GGUF alone
    name       what the model calls itself in a GGUF file
    progress   is told bytes written and bytes in all

    Raises CheckpointError: `out` exists, the format cannot carry the model, or an unknown format or dtype.
    """
    if to not in get_args(Format):
        raise CheckpointError(f"--to {to}: use one of {', '.join(get_args(Format))}")
    if dtype not in get_args(DType):
        raise CheckpointError(f"--dtype {dtype}: use one of {', '.join(get_args(DType))}")
    if os.path.lexists(out):
        raise CheckpointError(f"{out}: exists already; choose another --out or remove it first")
    kind, stored = cast(DType, dtype), stored_type(folder)
    made = _to_hf(folder, out, kind, progress) if to == "hf" else _to_gguf(folder, out, kind, stored, name, progress)
    if kind not in ("q8_0", "fp32", stored):
        made.notes.append(
            f"rounded: the model is stored in {stored}, written is {kind}; --dtype {stored} keeps every bit"
        )
    return made


def _to_hf(folder: Path, out: Path, dtype: DType, progress: Progress) -> Converted:
    """Tensor by tensor, under the names and in the shapes that they have; quantised ones become numbers."""
    if dtype == "q8_0":
        raise CheckpointError("--dtype q8_0: Hugging Face folders know no such type; use fp32, bf16, fp16 or --to gguf")
    opened, wanted = open_checkpoint(folder), _TORCH[dtype]
    # What decides who answers keeps the type that it came in.
    types = {name: weight.dtype if _decides(name) else wanted for name, weight in opened.weights.items()}

    def content(name: str) -> Iterator[torch.Tensor]:
        for piece in opened.weights[name].in_order():
            if types[name] == torch.float16 and not torch.isfinite(piece.to(torch.float16)).all():
                raise CheckpointError(f"{name}: has values beyond fp16; use --dtype bf16")
            yield piece

    ids = {f"{role}_token_id" for role in ("bos", "eos", "pad")}
    special = {key: value for key, value in read_json(folder / "config.json").items() if key in ids}
    config = config_to_hf(opened.config) | {"torch_dtype": str(wanted).removeprefix("torch.")} | special
    out.parent.mkdir(parents=True, exist_ok=True)
    opened.check_copies()
    with new_folder(out) as temporary:
        with writing(out):
            shapes = {name: (types[name], weight.shape) for name, weight in sorted(opened.weights.items())}
            write_file(temporary / WEIGHTS, shapes, content, progress)
            sync(temporary / WEIGHTS)
        for companion in _COMPANIONS:
            if (folder / companion).is_file():
                write_atomic(temporary / companion, (folder / companion).read_bytes())
        write_atomic(temporary / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    return Converted(path=out, format="hf", dtype=dtype, bytes=sum(path.stat().st_size for path in out.iterdir()))


def _decides(name: str) -> bool:
    return ".mlp.gate." in name or ".mlp.router." in name


def _to_gguf(folder: Path, out: Path, dtype: DType, stored: str, name: str, progress: Progress) -> Converted:
    try:
        from glasklar.convert.gguf_file import write_gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise CheckpointError(f"--to gguf needs the package gguf: {sys.executable} -m pip install gguf") from None
    # Quantising starts from the numbers as they are stored; other types are reached in one rounding.
    model = _load(folder, _TORCH[dtype if dtype in _TORCH else stored])
    config = model.config
    keys = metadata(config)
    vocabulary = read_vocabulary(folder, config.vocab_size) if (folder / "tokenizer.json").is_file() else None
    halves = write_gguf(
        out,
        list(entries(hf_tensors(model), config)),
        keys if vocabulary else {**keys, "tokenizer.ggml.model": "none"},
        vocabulary,
        name=name,
        architecture=architecture(config),
        dtype=dtype,
        progress=progress,
    )
    notes = (
        list(vocabulary.notes) if vocabulary else [f"{folder} has no tokenizer.json: the file speaks token ids only"]
    )
    if config.num_nextn_predict_layers:
        notes.append(
            f"left out: {config.num_nextn_predict_layers} layer(s) for multi-token prediction, which "
            "llama.cpp does not use in this architecture; the answers do not depend on them (--to hf keeps them)"
        )
    if halves:
        notes.append(f"in fp16 because their rows are no multiple of 32: {len(halves)} tensors, e.g. {halves[0]}")
    return Converted(path=out, format="gguf", dtype=dtype, bytes=out.stat().st_size, notes=notes)


def stored_type(folder: Path) -> str:
    """The type of most numbers of a model, as `convert` calls it; of a quantised one bf16."""
    sizes: Counter[str] = Counter()
    for weight in open_checkpoint(folder).weights.values():
        sizes[next((name for name, kind in _TORCH.items() if kind == weight.dtype), "bf16")] += prod(weight.shape)
    return sizes.most_common(1)[0][0]


def _load(folder: Path, dtype: torch.dtype) -> Transformer:
    return load_model(folder, dtype=dtype, ops=REFERENCE, device="cpu").requires_grad_(False)
