"""Trace: every planted span is found, boilerplate stays cheap, and what is found leads back to the data's root."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

from glasklar.audit.trace import Tracer, as_json
from glasklar.data.batches import PackedDocuments, Packer
from glasklar.data.trace import SHORTEST, TraceIndex
from glasklar.errors import CheckpointError, RequestError
from glasklar.provenance.hashing import proves
from glasklar.provenance.rundir import RunDir
from glasklar.recipe import PretrainStage
from glasklar.runtime import Runtime

TOKENS, DOCUMENT, PLANTED = 300_000, 500, 500


def packed(ids: np.ndarray, length: int) -> PackedDocuments:
    starts = np.append(np.arange(0, len(ids), length), len(ids))
    return PackedDocuments(ids.astype(np.int32), starts, np.ones(len(ids), np.float32))


@pytest.fixture(scope="module")
def documents() -> PackedDocuments:
    return packed(np.random.default_rng(1).integers(0, 50_000, TOKENS), DOCUMENT)


@pytest.fixture(scope="module")
def index(documents: PackedDocuments) -> TraceIndex:
    return TraceIndex.build(documents)


def test_planted_spans_are_all_found(index: TraceIndex, documents: PackedDocuments) -> None:
    rng = random.Random(2)
    noise = np.random.default_rng(3)
    missed = []
    for number in range(PLANTED):
        length = SHORTEST if number % 2 else rng.randrange(SHORTEST, 80)
        document = rng.randrange(len(documents))
        place = rng.randrange(DOCUMENT - length + 1)
        begin = int(documents.starts[document]) + place
        before = rng.randrange(40)
        query = noise.integers(50_000, 60_000, before + length + rng.randrange(40))  # ids that no document has
        query[before : before + length] = documents.ids[begin : begin + length]
        found = [(s.start, s.stop, s.document, s.place) for s in index.find(query.tolist())]
        if found != [(before, before + length, document, place)]:
            missed.append((number, found))
    assert missed == []


def test_nothing_is_found_where_nothing_is(index: TraceIndex) -> None:
    query = np.random.default_rng(4).integers(0, 50_000, 2000)
    assert index.find(query.tolist()) == []
    assert index.find([1, 2, 3]) == []


def test_spans_end_with_their_document(documents: PackedDocuments, index: TraceIndex) -> None:
    query = documents.ids[DOCUMENT - 30 : DOCUMENT + 20].tolist()
    assert [(s.start, s.stop, s.document) for s in index.find(query)] == [(0, 30, 0), (30, 50, 1)]


def test_index_is_small(index: TraceIndex) -> None:
    assert index.nbytes < 1.5 * TOKENS


def test_boilerplate_stays_cheap() -> None:
    """The same 200 tokens in 3,000 documents, and a text that only one of them has."""
    rng = np.random.default_rng(5)
    common = rng.integers(0, 5000, 200)
    rows = np.concatenate([np.tile(common, (3000, 1)), rng.integers(0, 5000, (3000, 40))], axis=1)
    index = TraceIndex.build(packed(rows.ravel(), 240))
    own = rows[2718, 180:240]
    began = time.perf_counter()
    spans = index.find([*common.tolist(), *own.tolist()])
    assert time.perf_counter() - began < 0.5  # a tenth of it on an idle machine; without a limit it takes minutes
    assert (200, 260, 2718, 180) in {(s.start, s.stop, s.document, s.place) for s in spans}
    assert any((s.start, s.stop) == (0, 200) for s in spans)
    assert len(spans) <= 20


def test_repeated_token_is_no_trap() -> None:
    index = TraceIndex.build(packed(np.zeros(20_000), 1000))
    assert index.find([0] * 40)[0].stop == 40


def test_saved_index_is_the_same(index: TraceIndex, documents: PackedDocuments, tmp_path: Path) -> None:
    index.save(tmp_path / "index.safetensors")
    again = TraceIndex.open(tmp_path / "index.safetensors", documents)
    query = documents.ids[100:160].tolist()
    assert again.find(query) == index.find(query) != []
    with pytest.raises(CheckpointError, match="other documents"):
        TraceIndex.open(tmp_path / "index.safetensors", packed(documents.ids[:1000], 100))


def test_shorter_spans_than_can_be_promised_are_refused(index: TraceIndex) -> None:
    with pytest.raises(RequestError, match="may be missed"):
        index.find([0] * 40, shortest=14)


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracer(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Tracer:
    return Tracer(RunDir(smoke_run), tmp_path_factory.mktemp("cache"))


def test_a_document_leads_back_to_itself_and_to_the_root(tracer: Tracer) -> None:
    number = max(range(len(tracer.documents)), key=lambda i: len(tracer.documents[i].text))
    begin, end = tracer.packed.starts[number : number + 2]
    query = tracer.packed.ids[begin + 1 : end - 1].tolist()
    best = tracer.find(query)[0]
    document = tracer.documents[number]
    assert (best.document, best.start, best.stop) == (number, 0, len(query))
    assert best.text == document.text
    assert (best.source, best.licence, best.origin) == (document.source, document.licence, document.origin)
    assert proves(bytes.fromhex(best.leaf), best.proof, str(tracer.facts["root"]))
    assert json.loads(json.dumps(as_json([best], "root")))["overlaps"][0]["steps"] is not None


def test_steps_are_those_whose_batches_hold_the_document(tracer: Tracer) -> None:
    stage = tracer.recipe.stages[0]
    assert isinstance(stage, PretrainStage)
    packer = Packer(tracer.packed, rows=stage.rows, length=stage.length, seed=tracer.recipe.seed * 1000)
    number = 17
    begin, end = tracer.packed.starts[number : number + 2]
    needle = tracer.packed.ids[begin:end].tolist()
    seen = []
    for k in range(stage.steps):
        rows = packer.batch(k).ids_BT.tolist()
        if any(row[i : i + len(needle)] == needle for row in rows for i in range(len(row) - len(needle) + 1)):
            seen.append((0, k + 1))
    assert tracer.steps({number})[number] == seen


def test_likelihood_at_every_kept_state(tracer: Tracer, runtime: Runtime) -> None:
    query = tracer.packed.ids[1:40].tolist()
    best = tracer.find(query)[0]
    found = tracer.likelihoods(best, query, runtime)
    assert [name for name, _ in found] == sorted(path.name for path in tracer.run.checkpoints.iterdir())
    assert all(value < 0 for _, value in found)
