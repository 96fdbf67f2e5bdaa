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

    gpt-oss keeps experts together, inputs first: ….mlp.gate_up_EFD is ….mlp.experts.gate_up_proj [E, D, 2F] and so on,
    gate_up_bias_EF is ….mlp.experts.gate_up_proj_bias, and ….mlp.gate is ….mlp.router.

All other names are the same in both. Gate weights and correction biases are stored and kept in fp32.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from glasklar.errors import CheckpointError
from glasklar.model.config import ModelConfig
from glasklar.model.hf_config import config_to_hf, read_config, read_json
from glasklar.model.init import build, kept_wide
from glasklar.model.quantised import Weight, read_storage, weights
from glasklar.model.tensor_file import Stored, read_header, read_rows
from glasklar.model.transformer import Transformer
from glasklar.ops.select import Ops
from glasklar.provenance.files import new_folder, write_atomic, write_tensors

__all__ = [
    "Checkpoint",
    "Source",
    "config_to_hf",
    "hf_tensors",
    "load_model",
    "open_checkpoint",
    "read_config",
    "save_model",
]

log = logging.getLogger(__name__)

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
    return {part.name: part.view for own, tensor in ours for part in hf_parts(own, tensor.detach(), model.config)}


@dataclass(frozen=True)
class Part:
    """A tensor as Hugging Face has it: a view of ours; `index`: it is this entry of the named tensor's first axis."""

    name: str
    view: Tensor
    index: int | None = None


def hf_parts(name: str, tensor: Tensor, config: ModelConfig, expert: int | None = None) -> Iterator[Part]:
    """What a parameter of ours is in the files; with `expert`, what its entry for that expert is (`tensor`: that)."""
    stem, _, leaf = _place(name, config.num_hidden_layers).rpartition(".")
    if config.swiglu_limit is not None and ".mlp." in name:
        before, _, own = name.partition(".mlp.")
        view = tensor.mT if leaf in ("gate_up_EFD", "down_EDF") else tensor
        yield Part(f"{_place(before, config.num_hidden_layers)}.mlp.{_CLAMPED[own]}", view, expert)
    elif stem.endswith("gate_up_proj"):
        yield from _halves(stem.removesuffix("gate_up_proj"), tensor)
    elif leaf == "gate_up_EFD":
        for e, gate_up_FD in enumerate(tensor) if expert is None else [(expert, tensor)]:
            yield from _halves(f"{stem}.experts.{e}.", gate_up_FD)
    elif leaf == "down_EDF":
        for e, down_DF in enumerate(tensor) if expert is None else [(expert, tensor)]:
            yield Part(f"{stem}.experts.{e}.down_proj.weight", down_DF)
    else:
        yield Part(f"{stem}.{leaf}", tensor)


# gpt-oss: ours and theirs, below `mlp.`
_CLAMPED = {
    "gate.weight": "router.weight",
    "gate.bias": "router.bias",
    "gate_up_EFD": "experts.gate_up_proj",
    "gate_up_bias_EF": "experts.gate_up_proj_bias",
    "down_EDF": "experts.down_proj",
    "down_bias_ED": "experts.down_proj_bias",
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


def _halves(stem: str, gate_up: Tensor) -> Iterator[Part]:
    gate, up = gate_up.chunk(2)
    yield Part(f"{stem}gate_proj.weight", gate)
    yield Part(f"{stem}up_proj.weight", up)


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
    with new_folder(folder) as temporary:
        # transformers refuses files that do not say who wrote them.
        write_tensors(temporary / WEIGHTS, tensors, {"format": "pt"})
        for name, content in sorted(files.items()):
            write_atomic(temporary / name, content)


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


Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder whose files hold exactly what its configuration asks for; no numbers are read yet.

    weights   by their names there
    copies    tensors that some files hold a second time, and the names of their originals
    """

    folder: Path
    config: ModelConfig
    weights: dict[str, Weight]
    copies: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Of all tensors in the files."""
        return sum(weight.nbytes for weight in self.weights.values())

    def fill(self, part: Part) -> int:
        """Reads the numbers of a part into its view; returns bytes read."""
        weight = self.weights[part.name]
        for place, numbers in weight.read(part.index):
            part.view[place].copy_(numbers)
        return weight.nbytes if part.index is None else weight.nbytes // weight.shape[0]

    def check_copies(self) -> int:
        """Raises CheckpointError where a second copy is none; returns bytes read."""
        present = [name for name in sorted(self.copies) if name in self.weights]
        for name in present:
            copy, original = self.weights[name], self.weights[self.copies[name]]
            same = copy.scale is None and original.scale is None and copy.shape == original.shape
            for place, numbers in copy.read() if same else ():
                rows = read_rows(original.data, place[0].start, place[0].stop)
                same = same and torch.equal(numbers.float(), rows.float())
            if not same:
                raise CheckpointError(
                    f"{copy.data.path}: {name} differs from {self.copies[name]}, of which it must be a copy; this "
                    "network has one embedding and one head: do not use this model"
                )
        return sum(self.weights[name].nbytes for name in present)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens a folder. Raises CheckpointError naming file, tensor and remedy, before anything large is allocated."""
    config = read_config(folder)
    found = weights(_stored(folder), read_storage(folder))
    found = {name: weight for name, weight in found.items() if not _DERIVED.fullmatch(name)}
    if config.num_nextn_predict_layers and not any(_layer(name) >= config.num_hidden_layers for name in found):
        # As transformers saves DeepSeek-V3: the answers do not depend on these layers, they only draft them.
        log.warning(
            "%s: config.json names layers for multi-token prediction, the files hold none; loaded without", folder
        )
        config = config.replace(num_nextn_predict_layers=0)
    _check_against(found, config, folder)
    return Checkpoint(folder, config, found, _copies(config))


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    ops: Ops,
    device: str,
    progress: Progress = lambda done, total: None,
) -> Transformer:
    """Loads a Hugging Face folder piece by piece: needs the memory of the model and some megabytes.

    dtype      of the weights in memory; gates stay in fp32
    progress   is told bytes read and bytes in all

    Raises CheckpointError as `open_checkpoint`, and for damaged numbers.
    """
    opened = open_checkpoint(folder)
    model = build(opened.config, ops, device=device, dtype=dtype)
    ours = [*model.named_parameters(), *model.named_buffers()]
    parts = [part for name, tensor in ours for part in hf_parts(name, tensor.detach(), opened.config)]
    done = 0
    with torch.no_grad():
        for part in sorted(parts, key=lambda part: opened.weights[part.name].place):
            done += opened.fill(part)
            progress(done, opened.nbytes)
    progress(done + opened.check_copies(), opened.nbytes)
    return model


class Stack:
    """A parameter with an entry for each expert; `stack[e]` reads that one alone."""

    def __init__(self, source: Source, name: str, shape: tuple[int, ...]) -> None:
        self.source, self.name, self.shape = source, name, shape

    def __getitem__(self, expert: int) -> Tensor:
        return self.source.read(self.name, self.shape[1:], expert)


class Source:
    """A network's parameters under our names, each put together from the files when it is asked for. May be called from
    several threads.
    In bf16 where all of its parts are stored so, else in fp32, as gates always.
    """

    def __init__(self, opened: Checkpoint, progress: Progress = lambda done, total: None) -> None:
        self.opened, self.progress = opened, progress
        with torch.device("meta"):
            model = Transformer(opened.config)
        self._ours = {name: tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        self._done, self._lock = 0, Lock()

    def __call__(self, name: str) -> Tensor | Stack:
        shape = tuple(self._ours[name].shape)
        return Stack(self, name, shape) if name.endswith(("_EFD", "_EDF")) else self.read(name, shape)

    def read(self, name: str, shape: tuple[int, ...], expert: int | None = None) -> Tensor:
        config = self.opened.config
        parts = hf_parts(name, torch.empty(shape, device="meta"), config, expert)
        narrow = {self.opened.weights[part.name].dtype for part in parts} == {torch.bfloat16} and not kept_wide(name)
        tensor = torch.empty(shape, dtype=torch.bfloat16 if narrow else torch.float32)
        read = sum(self.opened.fill(part) for part in hf_parts(name, tensor, config, expert))
        with self._lock:
            self._done += read
            self.progress(self._done, self.opened.nbytes)
        return tensor


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


def _check_against(stored: dict[str, Weight], config: ModelConfig, folder: Path) -> None:
    """The files must hold exactly the tensors that the configuration asks for, in their shapes."""
    layers, experts = config.num_hidden_layers, config.n_routed_experts or 1
    separate = config.is_moe and config.swiglu_limit is None
    moe_layers = max(layers - config.first_k_dense_replace, 0) if separate else 0
    least = layers + 3 * experts * moe_layers
    if least > 2 * len(stored):
        # Refused by counting: a hostile configuration must not make us write down all the names.
        raise CheckpointError(
            f"{folder}: config.json asks for more than {least:,} tensors ({layers:,} layers, {experts:,} experts) and "
            f"the files hold {len(stored):,}; fetch configuration and weights of the same model"
        )
    with torch.device("meta"):
        wanted = hf_tensors(Transformer(config))
    missing = sorted(wanted.keys() - stored.keys())
    if missing:
        raise CheckpointError(_describe("lacks", missing, folder, config))
    originals = {name: name for name in wanted} | _copies(config)
    surplus = sorted(stored.keys() - originals.keys())
    if surplus:
        raise CheckpointError(_describe("holds", surplus, folder, config))
    for name, tensor in stored.items():
        shape = tuple(wanted[originals[name]].shape)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.data.path}: {name} has the shape {list(tensor.shape)}, config.json asks for "
                f"{list(shape)}; fetch configuration and weights of the same model"
            )


def _layer(name: str) -> int:
    """Number of the layer that a tensor of a folder belongs to; -1: none."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return int(layer[1]) if layer else -1


def _describe(verb: str, names: list[str], folder: Path, config: ModelConfig) -> str:
    if _layer(names[0]) >= config.num_hidden_layers and config.is_mla:
        remedy = (
            f"layers from {config.num_hidden_layers} on are for multi-token prediction: set num_nextn_predict_layers "
            f"(now {config.num_nextn_predict_layers}) in config.json to as many as the files hold"
        )
    else:
        remedy = "fetch configuration and weights of the same model"
    count = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    kind = "" if verb == "lacks" else ", which config.json does not ask for"
    return f"{folder}: {verb} {names[0][:120]}{count}{kind}; {remedy}"
