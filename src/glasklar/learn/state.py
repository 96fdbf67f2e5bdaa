"""Checkpoints of the training state: exact, complete or absent, and known by their hash.

    CHECKPOINT/
      state.safetensors    weights, optimizer state, random-number state
      meta.json            {"files": {…: SHA-256}, "hash": "…", "meta": {…}, "state_hash": "…"}; `hash` is over the rest

The state hash covers names, types, shapes and bytes of the tensors and the canonical JSON of `meta`, so it does not
depend on how a file lays them out. What differs between two equal runs (seconds, energy, dates) belongs in the ledger,
not in `meta`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from glasklar.errors import CheckpointError
from glasklar.provenance.files import (
    new_folder,
    remove_folder,
    write_atomic,
    write_tensors,
    writing,
)
from glasklar.provenance.hashing import canonical_json, sha256_file, sha256_hex, tensor_hash

_TENSORS = "state.safetensors"
_META = "meta.json"
_NAME = re.compile(r"\d{2}-[a-z]+-\d{8}")


def checkpoint_name(position: int, stage: str, step: int) -> str:
    """Folder name of a checkpoint: "01-sft-00000400". Sorts by time. `position`: of the stage in the recipe's list."""
    return f"{position:02d}-{stage}-{step:08d}"


def state_hash(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    return sha256_hex(canonical_json({"meta": meta, "tensors": tensor_hash(tensors)}))


def save_state(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    """Writes a checkpoint and returns its state hash; `folder` appears whole or not at all, even on kill -9.

    meta    JSON values: step, data cursor, … whatever the next step depends on, and nothing else

    Raises CapacityError (disk full) or CheckpointError (read-only); other checkpoints stay untouched.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = state_hash(ready, meta)
    with new_folder(folder) as temporary:
        write_tensors(temporary / _TENSORS, ready)
        files = {_TENSORS: sha256_file(temporary / _TENSORS)}
        body = {"files": files, "meta": dict(meta), "state_hash": digest}
        write_atomic(temporary / _META, canonical_json({**body, "hash": sha256_hex(canonical_json(body))}))
    return digest


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and meta of a checkpoint. Raises CheckpointError naming the file that is not as written."""
    body = _read_meta(folder)
    path = folder / _TENSORS
    try:
        if sha256_file(path) != body["files"][_TENSORS]:
            raise _damaged(path, "its bytes are not those that were written")
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from None
    if state_hash(tensors, body["meta"]) != body["state_hash"]:
        raise _damaged(folder / _META, "the state does not match its hash")
    return tensors, body["meta"]


def saved_hash(folder: Path) -> str:
    """The state hash a checkpoint claims, without reading its tensors."""
    return _read_meta(folder)["state_hash"]


def latest(checkpoints: Path, known: Collection[str] | None = None) -> Path | None:
    """The newest checkpoint, or None. `known`: only those whose state hash is among these (the ledger's)."""
    for folder in reversed(_list(checkpoints)):
        if known is None or saved_hash(folder) in known:
            return folder
    return None


def prune(checkpoints: Path, keep: int) -> list[Path]:
    """Removes all but the newest `keep` checkpoints and the last of every stage; returns what was removed."""
    folders = _list(checkpoints)
    ends = {folder.name[:2]: folder for folder in folders}.values()
    removed = [folder for folder in folders[: max(0, len(folders) - keep)] if folder not in ends]
    for folder in removed:
        with writing(folder):
            remove_folder(folder)
    return removed


def _list(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    return sorted(path for path in checkpoints.iterdir() if _NAME.fullmatch(path.name))


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / _META
    try:
        content = path.read_bytes()
        body = json.loads(content)
        claimed = body.pop("hash")
        intact = canonical_json({**body, "hash": sha256_hex(canonical_json(body))}) == content
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None
    if not intact:
        raise _damaged(path, f"its content is not the one with the hash {claimed}")
    return body


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: damaged ({why}); restore it from a copy, or remove {path.parent.name} to go on from the one before"
    )
