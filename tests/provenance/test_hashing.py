"""Hashes: a change anywhere shows, a change of layout does not."""

from __future__ import annotations

import hashlib
import random

import pytest
import torch

from glasklar.provenance.hashing import (
    MerkleTree,
    SourceTrees,
    canonical_json,
    leaf_hash,
    merkle_root,
    proves,
    tensor_hash,
)

LEAVES = [leaf_hash({"text": str(i)}) for i in range(37)]


def test_the_tree_by_hand() -> None:
    a, b, c = sorted(LEAVES[:3])
    pair = hashlib.sha256(b"\x01" + a + b).digest()
    assert merkle_root([c, a, b]) == hashlib.sha256(b"\x01" + pair + c).hexdigest()
    assert LEAVES[5] == hashlib.sha256(b'\x00{"text":"5"}').digest()


def test_order_does_not_matter_and_content_does() -> None:
    shuffled = random.Random(0).sample(LEAVES, len(LEAVES))
    assert merkle_root(shuffled) == merkle_root(LEAVES)
    assert merkle_root([*LEAVES[:-1], leaf_hash({"text": "x"})]) != merkle_root(LEAVES)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 37])
def test_proofs_prove_their_leaf_and_no_other(count: int) -> None:
    leaves = LEAVES[:count]
    for leaf in leaves:
        proof = MerkleTree(leaves).proof(leaf)
        assert proves(leaf, proof, merkle_root(leaves))
        assert not proves(leaf_hash({"text": "forged"}), proof, merkle_root(leaves))
    with pytest.raises(ValueError, match="not a leaf"):
        MerkleTree(leaves).proof(leaf_hash({"text": "forged"}))


def test_sources_have_trees_of_their_own_under_one_root() -> None:
    sources = {"a": LEAVES[:5], "b": LEAVES[5:6], "c": LEAVES[6:]}
    trees = SourceTrees(sources)
    assert trees.root == merkle_root(bytes.fromhex(merkle_root(leaves)) for leaves in sources.values())
    for source, leaves in sources.items():
        for leaf in leaves:
            assert proves(leaf, trees.proof(source, leaf), trees.root)
            assert not proves(leaf, trees.proof(source, leaf)[:-1], trees.root)
    assert SourceTrees({"a": LEAVES}).root == merkle_root(LEAVES)
    assert SourceTrees({"a": LEAVES[:5], "b": LEAVES[5:7], "c": LEAVES[7:]}).root != trees.root


def test_tensor_hash_sees_name_type_shape_and_values_but_no_layout() -> None:
    base = torch.arange(6, dtype=torch.float32).view(2, 3)
    known = tensor_hash({"a": base, "b": torch.zeros(2, dtype=torch.bfloat16)})
    assert known == tensor_hash({"b": torch.zeros(2, dtype=torch.bfloat16), "a": base.t().contiguous().t()})
    others = [
        {"a": base + 0.5, "b": torch.zeros(2, dtype=torch.bfloat16)},
        {"a": base.view(3, 2), "b": torch.zeros(2, dtype=torch.bfloat16)},
        {"a": base, "b": torch.zeros(2, dtype=torch.float16)},
        {"a": base, "c": torch.zeros(2, dtype=torch.bfloat16)},
    ]
    assert len({known, *map(tensor_hash, others)}) == 5


def test_canonical_json_has_one_text_and_no_nan() -> None:
    assert canonical_json({"b": 1, "a": "ä"}) == '{"a":"ä","b":1}'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": float("nan")})
