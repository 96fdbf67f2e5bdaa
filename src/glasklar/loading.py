"""From what a person calls a model to a network with its tokenizer: a run, a Hugging Face folder, or a name."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from glasklar.data.foreign import open_tokenizer
from glasklar.data.tokenizer import Tokenizer
from glasklar.engine.cpu.library import CACHES, CacheKind
from glasklar.engine.packed import PackedModel, Quantisation, load_packed
from glasklar.engine.packed_file import kept_packed
from glasklar.engine.paged_runner import logits_of
from glasklar.engine.request import check_ids
from glasklar.errors import CheckpointError, RequestError
from glasklar.hub import RECORD, folder_of, is_id
from glasklar.model.attention import document_mask
from glasklar.model.checkpoint import load_model, read_config
from glasklar.model.config import ModelConfig
from glasklar.model.transformer import Transformer
from glasklar.ops.select import select
from glasklar.provenance.rundir import RunDir
from glasklar.runtime import Precision, Runtime

log = logging.getLogger(__name__)

DTYPES: dict[str, Precision] = {"float32": "fp32", "bfloat16": "bf16"}
Progress = Callable[[int, int], None]
_FOLDER = "a model is a folder with config.json, safetensors and tokenizer, as the hub has it"


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model without its weights: enough to speak for it while another process holds them.

    tokenizer   None for a folder that has none: such a model speaks ids only
    runtime     what it is computed with, its precision included
    quantize    "int8" or "int4": its weights are packed for the engine while they are read
    cache       where packed weights are kept for the next start, if anywhere
    cache_kind  what the engine's cache holds of a token (`Engine`)
    locked      kept packed weights stay in memory
    """

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer | None
    runtime: Runtime
    quantize: str | None = None
    cache: Path | None = None
    cache_kind: CacheKind | None = None
    locked: bool = False

    @property
    def name(self) -> str:
        """What the API calls it: the run's, the hub's or the folder's name."""
        return name_of(self.folder)

    @property
    def single_turn(self) -> bool:
        """Whether it learned from single exchanges only, as models made from a recipe do: earlier turns confuse it."""
        return (self.folder / "recipe.json").is_file()


@dataclass(frozen=True, kw_only=True)
class Model(ModelFolder):
    """A network ready to answer; a quantised one answers and gives logits, and shows nothing of its inside."""

    network: Transformer | PackedModel

    @property
    def transformer(self) -> Transformer:
        """The network with all of its inner values. Raises RequestError where it is packed for answering alone."""
        if isinstance(self.network, PackedModel):
            raise RequestError(
                f"{self.name} is loaded as {self.network.precision} for answering alone; load it without quantize"
            )
        return self.network

    @torch.inference_mode()
    def logits(self, ids: Tensor | list[int]) -> Tensor:
        """Logits [B, T, W] (or [T, W] for one sequence) in fp32; no padding, positions from 0.

        Raises RequestError for an empty sequence and for ids outside the vocabulary.
        """
        wanted = torch.as_tensor(ids)
        if not wanted.numel():
            raise RequestError("logits of no tokens; give at least one")
        check_ids(wanted.flatten().tolist(), self.network.config)
        if isinstance(self.network, PackedModel):
            rows = [logits_of(self.network, row.tolist()) for row in (wanted if wanted.ndim > 1 else [wanted])]
            return torch.stack(rows) if wanted.ndim > 1 else rows[0]
        ids_BT = wanted.to(self.network.head_WD.device)
        single = ids_BT.ndim == 1
        ids_BT = ids_BT[None] if single else ids_BT
        position_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        at = self.network.at(position_BT, document_mask(torch.zeros_like(ids_BT), self.network.dtype))
        logits_BTW = self.network.logits(self.network(ids_BT, at).hidden_BTD).float()
        return logits_BTW[0] if single else logits_BTW


def find_model(name: str, home: Path) -> Path:
    """The Hugging Face folder behind a name. Raises CheckpointError saying where it was looked for.

    name    a run folder (its released model), a folder with a config.json, the name of a run under `home` (a built-in
            recipe's, once it is made), or the hub id of a model that was pulled. Nothing is fetched here.
    """
    for folder in (Path(name), home / "runs" / name):
        for candidate in (folder / "model", folder):
            if (candidate / "config.json").is_file():
                return candidate
        if (folder / "recipe.json").is_file():
            process = RunDir(folder).writer()
            raise CheckpointError(
                f"{folder}: no model released yet; "
                + (f"process {process} is making it" if process else f"go on with: {_training(folder)}")
            )
    if Path(name).is_file():
        kind = "GGUF files are written (glasklar convert), not read" if name.endswith(".gguf") else "it is a file"
        raise CheckpointError(f"{name}: {kind}; {_FOLDER}")
    pulled = folder_of(name, home) if is_id(name) else None
    if pulled is not None and (pulled / RECORD).is_file():
        return pulled
    if Path(name).is_dir():
        raise CheckpointError(f"{name}: has no config.json; {_FOLDER}")
    if pulled is not None:
        state = "only a part of it is" if pulled.is_dir() else "neither a folder nor a model that is"
        raise CheckpointError(f"no model {name!r}: {state} here; fetch it with: glasklar pull {name}")
    runs = home / "runs"
    known = sorted(path.name for path in runs.iterdir()) if runs.is_dir() else []
    near = difflib.get_close_matches(name, known, n=1)
    hint = (
        f"did you mean {near[0]!r}?"
        if near
        else f"runs there: {', '.join(known) or 'none; make one with: glasklar up'}"
    )
    raise CheckpointError(f"no model {name!r}: neither a folder with a config.json nor a run in {runs}; {hint}")


def _training(folder: Path) -> str:
    return f"glasklar train {folder / 'recipe.toml'} --run {folder}"


def models(home: Path) -> list[dict[str, Any]]:
    """Runs and pulled models under `home`: {"name", "from": "run" or "hub", "bytes" of its weights, "state"}."""
    found = []
    for folder in sorted((home / "runs").glob("*/recipe.json")):
        run = RunDir(folder.parent)
        released, process = (run.model / "config.json").is_file(), run.writer()
        state = "ready" if released else f"process {process} is making it" if process else "unfinished"
        found.append({"name": run.path.name, "from": "run", "bytes": _weights(run.model), "state": state})
    for folder in sorted((home / "hub").glob("*--*")):
        state = "ready" if (folder / RECORD).is_file() else "a part of it is missing: pull it again"
        name = folder.name.replace("--", "/", 1)
        found.append({"name": name, "from": "hub", "bytes": _weights(folder), "state": state})
    return found


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def name_of(folder: Path) -> str:
    """What to call the model of a folder: its run, its hub id, or the folder's own name."""
    if folder.name == "model":
        return folder.absolute().parent.name
    return folder.name.replace("--", "/", 1) if (folder / RECORD).is_file() else folder.absolute().name


def load(
    folder: Path | str,
    runtime: Runtime,
    dtype: str | None = None,
    *,
    quantize: str | None = None,
    cache: Path | None = None,
    locked: bool = False,
    progress: Progress = lambda done, total: None,
) -> Model:
    """Loads network and tokenizer of a Hugging Face folder, piece by piece.

    dtype      "float32" or "bfloat16" (else the runtime's)
    quantize   "int8" or "int4" instead, on the CPU; what is not packed (the embedding table) stays as it is stored
    cache      where quantised weights are kept, so that the next start maps them into memory; None: nowhere
    locked     they stay in memory, also while they are not used
    progress   is told bytes read and bytes in all
    """
    found = open_folder(folder, runtime, dtype, quantize, cache, locked=locked)
    runtime = found.runtime
    network: Transformer | PackedModel
    if quantize is None:
        ops, device = select(runtime), runtime.device
        network = load_model(found.folder, dtype=runtime.dtype, ops=ops, device=device, progress=progress)
        network.requires_grad_(False)
    elif cache is None:
        network = load_packed(found.folder, quantize, threads=runtime.threads, progress=progress)
    else:
        network = kept_packed(
            found.folder, quantize, cache=cache, threads=runtime.threads, locked=locked, progress=progress
        )
    return Model(**vars(found) | {"network": network, "config": network.config})


def open_folder(
    folder: Path | str,
    runtime: Runtime,
    dtype: str | None = None,
    quantize: str | None = None,
    cache: Path | None = None,
    cache_kind: str | None = None,
    locked: bool = False,
) -> ModelFolder:
    """What `load` loads, but for the weights."""
    folder = Path(folder)
    if cache_kind not in (None, *CACHES):
        raise CheckpointError(f"cache type {cache_kind!r}: use one of {', '.join(CACHES)}")
    if dtype is not None:
        if dtype not in DTYPES:
            raise CheckpointError(f"dtype = {dtype!r}: use one of {', '.join(DTYPES)}")
        runtime = replace(runtime, compute=DTYPES[dtype])
    if quantize is not None:
        if quantize not in get_args(Quantisation):
            raise CheckpointError(f"quantize = {quantize!r}: use one of {', '.join(get_args(Quantisation))}")
        if dtype is not None:
            raise CheckpointError(f"quantize = {quantize!r} goes without dtype; leave one of them out")
        if runtime.device != "cpu":
            log.warning("quantize = %r: computed on the CPU; the GPU takes float32 and bfloat16", quantize)
            runtime = replace(runtime, device="cpu")
    if locked and (quantize is None or cache is None):
        raise CheckpointError(
            f"--mlock (locked) with quantize = {quantize!r}, cache = {str(cache)!r}: only packed weights in a file"
            " can be kept in memory; use --quantize int8 or int4, from Python with a cache folder"
        )
    config = read_config(folder)
    tokenizer = open_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    return ModelFolder(
        folder=folder, config=config, tokenizer=tokenizer, runtime=runtime, quantize=quantize, cache=cache,
        cache_kind=cast(CacheKind | None, cache_kind), locked=locked,
    )  # fmt: skip


def packed_under(home: Path) -> Path:
    """Where quantised weights are kept."""
    return home / "cache" / "packed"


def pages_under(home: Path) -> Path:
    """Where pages of the engine's cache are kept, if a server is told to."""
    return home / "cache" / "pages"
