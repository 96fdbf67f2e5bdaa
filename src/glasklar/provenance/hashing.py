"""Hashes that mean the same everywhere: canonical JSON, files, tensors, and documents under one Merkle root."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAF, NODE = b"\x00", b"\x01"  # a leaf can never be taken for an inner node (RFC 6962 section 2.1)


def canonical_json(value: Any) -> bytes:
    """The one UTF-8 text of a JSON value: sorted keys, no blanks. Raises ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def leaf_hash(document: Mapping[str, Any]) -> bytes:
    """SHA-256(0x00 || canonical JSON)."""
    return hashlib.sha256(LEAF + canonical_json(document)).digest()


def merkle_root(leaves: Iterable[bytes]) -> str:
    """Root over leaf hashes, sorted first: the order in which documents came does not matter. A node without a partner
    goes up unchanged. The root of nothing is the SHA-256 of nothing."""
    level = sorted(leaves)
    if not level:
        return sha256_hex(b"")
    while len(level) > 1:
        level = _level_above(level)
    return level[0].hex()


def inclusion_proof(leaves: Sequence[bytes], leaf: bytes) -> list[tuple[str, str]]:
    """Siblings on the way from `leaf` to the root, each as ("left"|"right", hex hash). ValueError if it is not one."""
    level = sorted(leaves)
    index = level.index(leaf)
    proof = []
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):
            proof.append(("left" if sibling < index else "right", level[sibling].hex()))
        level, index = _level_above(level), index // 2
    return proof


def proves(leaf: bytes, proof: Iterable[tuple[str, str]], root: str) -> bool:
    """Whether a proof leads from a leaf to a root."""
    digest = leaf
    for side, sibling in proof:
        pair = bytes.fromhex(sibling) + digest if side == "left" else digest + bytes.fromhex(sibling)
        digest = hashlib.sha256(NODE + pair).digest()
    return digest.hex() == root


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and little-endian bytes of tensors, in the order of their names.

    Independent of file formats; each part is preceded by its length, so that no two states share one text.
    """
    assert sys.byteorder == "little", "raw bytes of tensors are little-endian"
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        head = canonical_json([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        digest.update(len(head).to_bytes(8, "little") + head)
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _level_above(level: list[bytes]) -> list[bytes]:
    pairs = [hashlib.sha256(NODE + level[i] + level[i + 1]).digest() for i in range(0, len(level) - 1, 2)]
    return pairs + level[len(pairs) * 2 :]
