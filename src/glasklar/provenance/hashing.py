"""Hashes that mean the same everywhere: canonical JSON, files, tensors, and documents under one Merkle root."""

from __future__ import annotations

import hashlib
import json
import sys
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAF, NODE = b"\x00", b"\x01"  # a leaf can never be taken for an inner node (RFC 6962 section 2.1)


def canonical_json(value: Any) -> bytes:
    """The one UTF-8 text of a JSON value: sorted keys, no blanks. Raises ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def strict_json(text: bytes | str) -> Any:
    """The value of a JSON text in which no name stands twice: readers differ in which of two they take, so whoever
    signs such a text says two things. Raises ValueError, also for a text that is nested too deep to be read."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
        return value

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("nested too deep") from None


def sha256_hex(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def leaf_hash(document: Mapping[str, Any]) -> bytes:
    """SHA-256(0x00 || canonical JSON)."""
    return hashlib.sha256(LEAF + canonical_json(document)).digest()


class MerkleTree:
    """Tree over leaf hashes, sorted first: the order in which documents came does not matter. A node without a partner
    goes up unchanged. The root of nothing is the SHA-256 of nothing."""

    def __init__(self, leaves: Iterable[bytes]) -> None:
        self._levels = [sorted(leaves)]
        while len(self._levels[-1]) > 1:
            self._levels.append(_level_above(self._levels[-1]))

    @property
    def root(self) -> str:
        [*_, top] = self._levels
        return top[0].hex() if top else sha256_hex(b"")

    def proof(self, leaf: bytes) -> list[tuple[str, str]]:
        """Siblings on the way from `leaf` to the root, each as ("left"|"right", hex hash). ValueError if it is none."""
        index = bisect_left(self._levels[0], leaf)
        if self._levels[0][index : index + 1] != [leaf]:
            raise ValueError(f"{leaf.hex()} is not a leaf of this tree")
        proof = []
        for level in self._levels[:-1]:
            sibling = index ^ 1
            if sibling < len(level):
                proof.append(("left" if sibling < index else "right", level[sibling].hex()))
            index //= 2
        return proof


class SourceTrees:
    """Documents under one root: a tree for each source, and one over the sources' roots. So that a source can be
    checked, left out or counted by itself; a shard of it is an inner node."""

    def __init__(self, leaves: Mapping[str, Iterable[bytes]]) -> None:
        self.trees = {source: MerkleTree(leaves[source]) for source in sorted(leaves)}
        self._top = MerkleTree(bytes.fromhex(tree.root) for tree in self.trees.values())

    @property
    def root(self) -> str:
        return self._top.root

    def proof(self, source: str, leaf: bytes) -> list[tuple[str, str]]:
        """From a document of a source to the root of all; see `MerkleTree.proof`."""
        tree = self.trees[source]
        return tree.proof(leaf) + self._top.proof(bytes.fromhex(tree.root))


def merkle_root(leaves: Iterable[bytes]) -> str:
    return MerkleTree(leaves).root


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
