"""Packed weights on disk: made once for a model, then mapped into memory by every later start.

A safetensors file: the tensors of `PackedModel`, each at a multiple of 64 bytes, and in its metadata

    layout    how the tensors make up the model: kinds and sizes of the matrices, widths of the layers
    digests   of every tensor's bytes, by pieces
    key       of what it was made from (`key_of`)
    seal      SHA-256 of the other three

A file that does not hold what it says in every byte is made again. The digests are computed when the file is opened for
the first time since the machine was started, or since anything wrote to it: beside a file that passed stands what the
system said of it (`_identity`). They find damage, not malice: whoever can write into the user's own data folder can
replace the model as well.
"""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glasklar.engine.packed import Get, PackedDraft, PackedLayer, PackedMatrix, PackedModel, Packer, packer_of
from glasklar.engine.packed import vector as as_vector
from glasklar.errors import CapacityError, CheckpointError
from glasklar.model.checkpoint import Source, open_checkpoint
from glasklar.model.config import ModelConfig
from glasklar.provenance.files import TEMPORARY, sync, write_atomic, writing
from glasklar.provenance.hashing import canonical_json, sha256_hex

# Of what is stored and how; raise it with every change of cpu/pack.hpp, of the tiles in cpu/matrix.hpp or of `Packer`.
VERSION = 3
HEADER, ALIGNED, PIECE = 1 << 20, 64, 16 << 20
_TYPES = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}
# Of each weights file so many pieces of so many bytes enter its fingerprint.
_SAMPLES, _SAMPLE = 256, 4096
# A file that was written to less than this before it was checked may be written to again in the same tick of its clock.
_SETTLED_NS = 1_000_000_000
log = logging.getLogger(__name__)


class Damaged(Exception):
    """A packed file that is not what it says."""


def kept_packed(
    folder: Path,
    precision: str,
    *,
    cache: Path,
    threads: int,
    locked: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackedModel:
    """As `load_packed`, but from `cache` if the same weights were packed before, else packed and kept there.

    locked   the file stays in memory while the model lives (`lock`)

    Packing needs the memory of the largest layer. Errors as there, and CapacityError where the disk is full.
    """
    opened, packer = open_checkpoint(folder), packer_of(precision, threads)
    key = key_of(folder, precision)
    path = cache / f"{key}.safetensors"

    def found() -> PackedModel:
        model = open_file(path, key, opened.config, packer.library, threads)
        model.held = lock(path, progress) if locked else None
        return model

    if path.exists():
        try:
            return found()
        except Damaged as problem:
            log.warning("%s: %s; the packed weights are made again", path, problem)
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
    opened.check_copies()
    write_file(path, key, opened.config, Source(opened, progress), packer)
    progress(opened.nbytes, opened.nbytes)
    return found()


def lock(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> mmap.mmap:
    """Reads a file and keeps it in memory while the result lives; `progress` is told bytes. Of mapped files the system
    puts aside what has not been read for a while, first of all. Raises CapacityError.

    This is one more mapping, shared and for reading only: that of the tensors is private and writable, and the system
    would copy each page that is to stay there."""
    with path.open("rb") as file:
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = np.frombuffer(held, np.uint8).ctypes.data
    mlock = ctypes.CDLL(None, use_errno=True).mlock
    mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    for begin, size in _pieces(len(held)):
        if mlock(start + begin, size):
            why = os.strerror(ctypes.get_errno())
            raise CapacityError(
                f"{path}: the system does not keep {len(held) / 1e9:.2f} GB in memory ({why}): raise its limit"
                " (ulimit -l), make room, or start without --mlock"
            )
        progress(begin + size, len(held))
    return held


def key_of(folder: Path, precision: str) -> str:
    """SHA-256 of what packed weights depend on: this version, the bits, the configuration, and of each weights file its
    name, size, time of change, header and samples from one end to the other. Reading all of a large model to know it
    would cost what the packed file saves."""
    entries: list[Any] = [VERSION, precision, sha256_hex((folder / "config.json").read_bytes())]
    for path in sorted(folder.glob("*.safetensors")):
        status = path.stat()
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            samples = []
            for i in range(_SAMPLES):
                file.seek(status.st_size * i // _SAMPLES)
                samples.append(file.read(_SAMPLE))
        entries.append(
            [path.name, status.st_size, status.st_mtime_ns, sha256_hex(header), sha256_hex(b"".join(samples))]
        )
    return sha256_hex(canonical_json(entries))


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass
class _Writer:
    """Appends tensors behind the room for the header."""

    file: BinaryIO
    library: ctypes.CDLL
    threads: int
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    digests: dict[str, list[str]] = field(default_factory=dict)
    reached: int = 0

    def add(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.detach().contiguous()
        self.digests[name] = _digests(tensor, self.library, self.threads)
        self._append(name, tensor)
        if gap := -self.reached % ALIGNED:
            self._append(f"gap.{len(self.entries)}", torch.zeros(gap, dtype=torch.uint8))

    def _append(self, name: str, tensor: Tensor) -> None:
        end = self.reached + tensor.nbytes
        self.entries[name] = {
            "dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [self.reached, end],
        }  # fmt: skip
        self.file.write(tensor.view(-1).view(torch.uint8).numpy().data)
        self.reached = end

    def finish(self, layout: dict[str, Any], key: str) -> None:
        stated = {"layout": json.dumps(layout), "digests": json.dumps(self.digests), "key": key}
        metadata = stated | {"seal": sha256_hex(canonical_json(stated))}
        header = json.dumps({"__metadata__": metadata} | self.entries).encode()
        room = HEADER - 8
        if len(header) > room:
            raise CheckpointError(f"a header of {len(header):,} bytes; packed files have room for {room:,}")
        self.file.seek(0)
        self.file.write(room.to_bytes(8, "little") + header.ljust(room))


def write_file(path: Path, key: str, config: ModelConfig, get: Get, packer: Packer) -> None:
    """Packs layer by layer into a file, which appears as a whole."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    layers: list[dict[str, Any]] = []
    try:
        with writing(path), temporary.open("wb") as file:
            file.seek(HEADER)
            writer = _Writer(file, packer.library, packer.threads)
            for i in range(config.num_hidden_layers):
                layer = packer.layer(config, i, get)
                layers.append(_layout_of(layer))
                for name, tensor in layer.tensors(f"layers.{i}."):
                    writer.add(name, tensor)
            layout: dict[str, Any] = {"layers": layers, "precision": packer.precision}
            embedding = get("embed_tokens.weight")
            head = packer.matrix(embedding if config.tie_word_embeddings else get("lm_head.weight"), packer.fine)
            layout["head"] = _matrix_of(head)
            rest = {"embedding": embedding, "final_norm": as_vector(get("norm.weight")), "head": head.data}
            if config.num_nextn_predict_layers:
                draft = packer.draft(config, get)
                layout["draft"] = {
                    "block": _layout_of(draft.block),
                    "join": _matrix_of(draft.join),
                    "vectors": [*draft.vectors],
                }
                rest |= dict(draft.tensors())
            for name, tensor in rest.items():
                writer.add(name, tensor)
            writer.finish(layout, key)
        with writing(path):
            sync(temporary)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _matrix_of(matrix: PackedMatrix) -> list[Any]:
    return [matrix.kind, matrix.outputs, matrix.inputs, matrix.copies, matrix.bias is not None]


def _layout_of(layer: PackedLayer) -> dict[str, Any]:
    return {
        "matrices": {name: _matrix_of(matrix) for name, matrix in layer.matrices.items()},
        "vectors": [*layer.vectors], "hidden": layer.hidden, "expert_hidden": layer.expert_hidden,
        "window": layer.window,
    }  # fmt: skip


# --- reading ----------------------------------------------------------------------------------------------------------


def open_file(path: Path, key: str, config: ModelConfig, library: ctypes.CDLL, threads: int) -> PackedModel:
    """Maps a packed file. Raises Damaged where a byte is not as it was written, or another model was packed."""
    try:
        identity = _identity(path)
        with safe_open(path, framework="pt") as file:
            stated = dict(file.metadata() or {})
            seal = stated.pop("seal", None)
            if stated.get("key") != key or seal != sha256_hex(canonical_json(stated)):
                raise Damaged("its description is damaged or of another model")
            digests = json.loads(stated["digests"])
            tensors = {name: file.get_tensor(name) for name in digests}
    except (OSError, SafetensorError) as error:
        raise Damaged(f"cannot be read ({error})") from None
    checked = path.with_suffix(".checked")
    if identity is None or identity != _checked_as(checked):
        _check(tensors, digests, library, threads)
        if identity is not None:
            try:
                write_atomic(checked, identity.encode())
            except (CapacityError, CheckpointError) as problem:  # a full disk, a folder that is for reading only
                log.info("%s; the next start checks the packed weights again", problem)
    model = _assembled(json.loads(stated["layout"]), tensors, config, library)
    library.glasklar_read_singly(model.embedding.data_ptr(), model.embedding.nbytes)
    return model


def _checked_as(path: Path) -> str | None:
    """The identity that a file had when it was checked."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # there is none, or it is not for us to read: then the weights are checked again
        return None


def _identity(path: Path) -> str | None:
    """What changes when the machine is started again, and whenever a file is written to or exchanged. None where the
    system does not tell, and for a file that was written just now."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
    now, status = time.time_ns(), path.stat()
    if now - status.st_ctime_ns < _SETTLED_NS:
        return None
    return json.dumps([boot, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns])


def _check(tensors: dict[str, Tensor], digests: dict[str, list[str]], library: ctypes.CDLL, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(
            lambda name: (name, _digests(tensors[name], library, 1)), sorted(tensors, key=lambda n: -tensors[n].nbytes)
        )
        wrong = sorted(name for name, digest in found if digest != digests[name])
    if wrong:
        raise Damaged(f"{wrong[0]} is not as it was written")


def _assembled(
    layout: dict[str, Any], tensors: dict[str, Tensor], config: ModelConfig, library: ctypes.CDLL
) -> PackedModel:
    def matrix(name: str, entry: list[Any]) -> PackedMatrix:
        kind, outputs, inputs, copies, biased = entry
        data = tensors[name]
        if data.nbytes != copies * -(-outputs // 16) * library.glasklar_tile_bytes(kind, inputs):
            raise Damaged(f"{name} has {data.nbytes} bytes")
        return PackedMatrix(kind, outputs, inputs, copies, data, tensors[name + ".bias"] if biased else None)

    def layer(prefix: str, entry: dict[str, Any]) -> PackedLayer:
        return PackedLayer(
            {name: matrix(prefix + name, of) for name, of in entry["matrices"].items()},
            {name: tensors[prefix + name] for name in entry["vectors"]},
            entry["hidden"], entry["expert_hidden"], entry["window"],
        )  # fmt: skip

    draft = None
    if (entry := layout.get("draft")) is not None:
        vectors = {name: tensors[f"draft.{name}"] for name in entry["vectors"]}
        draft = PackedDraft(layer("draft.block.", entry["block"]), matrix("draft.join", entry["join"]), vectors)
    layers = [layer(f"layers.{i}.", entry) for i, entry in enumerate(layout["layers"])]
    head = matrix("head", layout["head"])
    return PackedModel(config, tensors["embedding"], tensors["final_norm"], head, layers, draft, layout["precision"])


def _digests(tensor: Tensor, library: ctypes.CDLL, threads: int) -> list[str]:
    def digest(piece: tuple[int, int]) -> str:
        begin, size = piece
        return f"{library.glasklar_digest(tensor.data_ptr() + begin, size):016x}"

    pieces = list(_pieces(tensor.nbytes))
    if threads == 1 or len(pieces) == 1:
        return [digest(piece) for piece in pieces]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(digest, pieces))


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, size, PIECE):
        yield begin, min(PIECE, size - begin)
