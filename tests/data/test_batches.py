"""Packing: nothing lost, nothing twice, any batch again from its number."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from glasklar.data.batches import PackedDocuments, Packer, pack_rows
from glasklar.errors import CheckpointError, DataError


@pytest.fixture(scope="module")
def documents() -> PackedDocuments:
    rng = np.random.default_rng(0)
    # Every token names its document, so that a mix-up shows.
    return PackedDocuments.of([([d + 1] * int(rng.integers(2, 60)), None) for d in range(500)])


def epoch_rows(packer: Packer) -> int:
    return len(packer._plan(0))


def test_every_token_once_an_epoch(documents: PackedDocuments) -> None:
    packer = Packer(documents, rows=1, length=64, seed=1)
    counted: Counter[int] = Counter()
    for k in range(epoch_rows(packer)):
        batch = packer.batch(k)
        counted.update(batch.ids_BT[batch.segments_BT >= 0].tolist())
    assert counted == Counter(documents.ids.tolist())


def test_a_document_that_fits_is_never_cut(documents: PackedDocuments) -> None:
    packer = Packer(documents, rows=8, length=64, seed=1)
    for k in range(10):
        batch = packer.batch(k)
        for row in range(8):
            for segment in range(int(batch.segments_BT[row].max()) + 1):
                inside = batch.segments_BT[row] == segment
                [document] = set(batch.ids_BT[row][inside].tolist())
                assert inside.sum() == (documents.ids == document).sum()
                assert batch.position_BT[row][inside].tolist() == list(range(int(inside.sum())))
                assert batch.weight_BT[row][inside].tolist() == [0.0] + [1.0] * (int(inside.sum()) - 1)


def test_any_batch_again_from_its_number(documents: PackedDocuments) -> None:
    first, second = (Packer(documents, rows=16, length=64, seed=1) for _ in range(2))
    walked = [first.batch(k) for k in range(60)]
    assert torch.equal(second.batch(47).ids_BT, walked[47].ids_BT)
    assert torch.equal(second.batch(3).segments_BT, walked[3].segments_BT)


def test_seed_and_epoch_change_the_order(documents: PackedDocuments) -> None:
    a, b = (Packer(documents, rows=8, length=64, seed=seed) for seed in (1, 2))
    assert not torch.equal(a.batch(0).ids_BT, b.batch(0).ids_BT)
    per_epoch = epoch_rows(a)
    single = Packer(documents, rows=1, length=64, seed=1)
    assert not torch.equal(single.batch(0).ids_BT, single.batch(per_epoch).ids_BT)


def test_padding_is_small(documents: PackedDocuments) -> None:
    packer = Packer(documents, rows=epoch_rows(Packer(documents, rows=1, length=256, seed=1)), length=256, seed=1)
    assert (packer.batch(0).segments_BT < 0).float().mean() < 0.08  # 500 documents; it falls as they get more


def test_long_documents_are_cut_into_segments_of_their_own() -> None:
    packer = Packer(PackedDocuments.of([(list(range(1, 151)), None)]), rows=3, length=64, seed=0)
    batch = packer.batch(0)
    rows = sorted(batch.ids_BT[batch.segments_BT >= 0].tolist())
    assert rows == list(range(1, 151))
    assert (batch.position_BT.max(), batch.weight_BT.sum()) == (63, 150 - 3)


def test_weights_travel_with_their_tokens() -> None:
    packer = Packer(PackedDocuments.of([([5, 6, 7], [0.0, 0.25, 1.0])]), rows=1, length=8, seed=0)
    assert packer.batch(0).weight_BT[0, :3].tolist() == [0.0, 0.25, 1.0]


def test_rows_of_rollouts_say_where_each_sequence_lies() -> None:
    sequences = [([n] * n, [1.0] * n) for n in (5, 30, 17, 2, 9, 31)]
    packed = pack_rows(sequences, length=32, rows_multiple=4, pad_id=0)
    assert packed.batch.ids_BT.shape == (4, 32)
    for (ids, _), row, start in zip(sequences, packed.rows, packed.starts, strict=True):
        assert packed.batch.ids_BT[row, start : start + len(ids)].tolist() == ids
    with pytest.raises(DataError, match="31 tokens does not fit into rows of 16"):
        pack_rows(sequences, length=16, rows_multiple=4, pad_id=0)


def test_the_file_gives_back_the_arrays(documents: PackedDocuments, tmp_path) -> None:
    documents.save(tmp_path / "a.safetensors")
    again = PackedDocuments.open(tmp_path / "a.safetensors")
    assert all(np.array_equal(getattr(again, name), getattr(documents, name)) for name in ("ids", "starts", "weights"))
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: not a packed token file"):
        PackedDocuments.open(tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="no documents"):
        PackedDocuments.of([])
