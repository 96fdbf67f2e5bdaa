"""Models on disk: Hugging Face folders of safetensors, as DeepSeek, Llama and Qwen publish them.

    ours                                       Hugging Face
    embed_tokens.weight                        model.embed_tokens.weight
    layers.N.…                                 model.layers.N.…
    norm.weight                                model.norm.weight
    lm_head.weight (absent when tied)          lm_head.weight
    mtp.K.{enorm,hnorm,eh_proj}.weight         model.layers.(L+K).{enorm,hnorm,eh_proj}.weight
    mtp.K.norm.weight                          model.layers.(L+K).shared_head.norm.weight
    mtp.K.block.…                              model.layers.(L+K).…

    ….gate_up_proj.weight [2F, D]              ….gate_proj.weight, ….up_proj.weight [F, D] each
    ….mlp.gate_up_EFD [E, 2F, D]               ….mlp.experts.e.gate_proj.weight, ….up_proj.weight [F, D] for each e
    ….mlp.down_EDF [E, D, F]                   ….mlp.experts.e.down_proj.weight [D, F] for each e

All other names are the same in both. Gate weights and correction biases are stored and kept in fp32.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glasklar.errors import CheckpointError
from glasklar.model.config import ModelConfig
from glasklar.model.hf_config import config_to_hf, read_config, read_json
from glasklar.model.init import build
from glasklar.model.tensor_file import Stored, read_header
from glasklar.model.transformer import Transformer
from glasklar.ops.select import REFERENCE, Ops
from glasklar.provenance.files import TEMPORARY, replace_folder, sync, write_atomic, write_tensors, writing

__all__ = ["config_to_hf", "hf_tensors", "load_model", "open_tensors", "read_config", "save_model"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OWN_FILES = ("config.json", "generation_config.json", WEIGHTS)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
# Buffers of rotary angles in old files; they follow from the configuration.
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")


# --- names ------------------------------------------------------------------------------------------------------------


def hf_tensors(model: Transformer) -> dict[str, Tensor]:
    """All tensors of a model under their Hugging Face names: views, so that writing to them fills the model."""
    ours = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: part
        for own, tensor in ours
        for name, part in _parts(_place(own, model.config.num_hidden_layers), tensor.detach())
    }


def _place(name: str, num_layers: int) -> str:
    """The name with its beginning as Hugging Face has it."""
    if name == "lm_head.weight":
        return name
    if not name.startswith("mtp."):
        return f"model.{name}"
    _, depth, rest = name.split(".", 2)
    layer = f"model.layers.{num_layers + int(depth)}"
    return f"{layer}.shared_head.{rest}" if rest == "norm.weight" else f"{layer}.{rest.removeprefix('block.')}"


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors that we keep as one and Hugging Face keeps as many."""
    stem, _, leaf = name.rpartition(".")
    if stem.endswith("gate_up_proj"):
        yield from zip(_gate_up(stem.removesuffix("gate_up_proj")), tensor.chunk(2), strict=True)
    elif leaf == "gate_up_EFD":
        for expert, gate_up_FD in enumerate(tensor):
            yield from zip(_gate_up(f"{stem}.experts.{expert}."), gate_up_FD.chunk(2), strict=True)
    elif leaf == "down_EDF":
        yield from ((f"{stem}.experts.{expert}.down_proj.weight", down_DF) for expert, down_DF in enumerate(tensor))
    else:
        yield name, tensor


def _gate_up(stem: str) -> tuple[str, str]:
    return f"{stem}gate_proj.weight", f"{stem}up_proj.weight"


def _copies(config: ModelConfig) -> dict[str, str]:
    """Tensors that some files hold a second time, and the names of their originals."""
    embedding = "model.embed_tokens.weight"
    head = embedding if config.tie_word_embeddings else "lm_head.weight"
    copies = {"lm_head.weight": embedding} if config.tie_word_embeddings else {}
    for depth in range(config.num_nextn_predict_layers):
        layer = f"model.layers.{config.num_hidden_layers + depth}"
        copies |= {f"{layer}.embed_tokens.weight": embedding, f"{layer}.shared_head.head.weight": head}
    return copies


# --- saving -----------------------------------------------------------------------------------------------------------


def save_model(model: Transformer, folder: Path, *, extra: Mapping[str, bytes] | None = None) -> None:
    """Writes a model as a Hugging Face folder; `folder` changes as a whole or not at all, whatever it held before.

    extra   further files by name (tokenizer.json, recipe.json); begin, end and padding ids are read off the tokenizer

    Raises CapacityError (disk full), CheckpointError (not writable, or a network that no published model type means).
    """
    files = dict(extra or {})
    for name in files:
        if Path(name).name != name or name in _OWN_FILES or name.startswith("."):
            raise CheckpointError(f"extra file {name!r}: give a plain file name other than {', '.join(_OWN_FILES)}")
    special = _special_ids(files)
    config = config_to_hf(model.config) | {"torch_dtype": str(model.dtype).removeprefix("torch.")} | special
    files |= {"config.json": _json(config), "generation_config.json": _json(special)}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in hf_tensors(model).items()}
    temporary = folder.with_name(f"{TEMPORARY}{os.getpid()}-{folder.name}")
    with writing(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        # transformers refuses files that do not say who wrote them.
        write_tensors(temporary / WEIGHTS, tensors, {"format": "pt"})
        for name, content in sorted(files.items()):
            write_atomic(temporary / name, content)
        with writing(folder):
            sync(temporary)
            replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _special_ids(files: Mapping[str, bytes]) -> dict[str, int]:
    """`bos_token_id`, `eos_token_id`, `pad_token_id` from a tokenizer's files, as far as they name them."""
    if "tokenizer.json" not in files or "tokenizer_config.json" not in files:
        return {}
    ids = {token["content"]: token["id"] for token in json.loads(files["tokenizer.json"]).get("added_tokens", [])}
    named = json.loads(files["tokenizer_config.json"])
    return {
        f"{role}_id": ids[named[role]] for role in ("bos_token", "eos_token", "pad_token") if named.get(role) in ids
    }


def _json(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, indent=2, sort_keys=True) + "\n").encode()


# --- loading ----------------------------------------------------------------------------------------------------------


def load_model(folder: Path, *, dtype: torch.dtype, ops: Ops, device: str) -> Transformer:
    """Loads a Hugging Face folder tensor by tensor; needs the memory of the model and of its largest tensor.

    dtype   of the weights in memory; gates stay in fp32

    Raises CheckpointError naming file, tensor and remedy before anything large is allocated.
    """
    config = read_config(folder)
    stored = _stored(folder)
    _check_against(stored, config, ops, folder)
    model = build(config, ops, device=device, dtype=dtype)
    _fill(hf_tensors(model), stored, _copies(config))
    return model


def open_tensors(folder: Path, dtype: torch.dtype) -> tuple[ModelConfig, Callable[[str], Tensor]]:
    """The configuration of a Hugging Face folder, and a function that reads one tensor by our name, in `dtype` but for
    what stays in fp32: for whoever wants a model in other form and never whole. Errors as in `load_model`."""
    config = read_config(folder)
    stored = _stored(folder)
    _check_against(stored, config, REFERENCE, folder)
    model = build(config, REFERENCE, device="meta", dtype=dtype)
    ours = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    def get(name: str) -> Tensor:
        tensor = torch.empty_like(ours[name], device="cpu")
        parts = dict(_parts(_place(name, config.num_hidden_layers), tensor))
        _fill(parts, {part: stored[part] for part in parts}, {})
        return tensor

    return config, get


def _stored(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder with one file or with an index of shards."""
    if (folder / WEIGHTS).exists():
        return read_header(folder / WEIGHTS)
    if not (folder / INDEX).exists():
        pickled = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLED)
        if pickled:
            raise CheckpointError(
                f"{folder / pickled[0]}: a pickle file can run any code when it is opened and is not loaded; "
                f"take the model as {WEIGHTS}"
            )
        raise CheckpointError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}; fetch the model again")
    placed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{folder / INDEX}: weight_map is missing or empty; fetch the file again")
    for name, shard in placed.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{folder / INDEX}: {name[:80]!r} lies in {str(shard)[:80]!r}; only safetensors files of the folder "
                "itself are read: do not use this model"
            )
    return _joined(folder, placed)


def _joined(folder: Path, placed: dict[str, str]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for shard in sorted(set(placed.values())):
        if not (folder / shard).exists():
            raise CheckpointError(f"{folder / shard}: missing, though {INDEX} names it; fetch it")
        for name, tensor in read_header(folder / shard).items():
            if placed.get(name) != shard:
                raise CheckpointError(
                    f"{folder / shard}: holds {name[:80]!r}, which {INDEX} places in {placed.get(name)!r}; "
                    "index and shards are of different models, fetch both again"
                )
            found[name] = tensor
    for name, shard in placed.items():
        if name not in found:
            raise CheckpointError(f"{folder / shard}: lacks {name[:80]!r}, which {INDEX} places there; fetch it again")
    return found


def _check_against(stored: dict[str, Stored], config: ModelConfig, ops: Ops, folder: Path) -> None:
    """The files must hold exactly the tensors that the configuration asks for, in their shapes."""
    layers, experts = config.num_hidden_layers, config.n_routed_experts or 1
    moe_layers = max(layers - config.first_k_dense_replace, 0) if config.is_moe else 0
    least = layers + 3 * experts * moe_layers
    if least > 2 * len(stored):
        # Refused by counting: a hostile configuration must not make us write down all the names.
        raise CheckpointError(
            f"{folder}: config.json asks for more than {least:,} tensors ({layers:,} layers, {experts:,} experts) and "
            f"the files hold {len(stored):,}; fetch configuration and weights of the same model"
        )
    with torch.device("meta"):
        wanted = hf_tensors(Transformer(config, ops))
    missing = sorted(wanted.keys() - stored.keys())
    if missing:
        raise CheckpointError(_describe("lacks", missing, folder, config))
    originals = {name: name for name in wanted} | _copies(config)
    weights = {name: tensor for name, tensor in stored.items() if not _DERIVED.fullmatch(name)}
    surplus = sorted(weights.keys() - originals.keys())
    if surplus:
        raise CheckpointError(_describe("holds", surplus, folder, config))
    for name, tensor in weights.items():
        shape = tuple(wanted[originals[name]].shape)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.path}: {name} has the shape {list(tensor.shape)}, config.json asks for "
                f"{list(shape)}; fetch configuration and weights of the same model"
            )


def _describe(verb: str, names: list[str], folder: Path, config: ModelConfig) -> str:
    layer = re.match(r"model\.layers\.(\d+)\.", names[0])
    if layer and int(layer[1]) >= config.num_hidden_layers:
        remedy = (
            f"layers from {config.num_hidden_layers} on are for multi-token prediction: set num_nextn_predict_layers "
            f"(now {config.num_nextn_predict_layers}) in config.json to as many as the files hold"
        )
    else:
        remedy = "fetch configuration and weights of the same model"
    count = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    kind = "" if verb == "lacks" else ", which config.json does not ask for"
    return f"{folder}: {verb} {names[0][:120]}{count}{kind}; {remedy}"


@torch.no_grad()
def _fill(targets: dict[str, Tensor], stored: dict[str, Stored], copies: dict[str, str]) -> None:
    for path in sorted({tensor.path for tensor in stored.values()}):
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(name for name, tensor in stored.items() if tensor.path == path and name in targets):
                    targets[name].copy_(file.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); fetch the file again") from None
    for name in sorted(copies.keys() & stored.keys()):
        with safe_open(stored[name].path, framework="pt") as file:
            original = targets[copies[name]]
            if not torch.equal(file.get_tensor(name).to(original), original):
                raise CheckpointError(
                    f"{stored[name].path}: {name} differs from {copies[name]}, of which it must be a copy; "
                    "this network has one embedding and one head"
                )
