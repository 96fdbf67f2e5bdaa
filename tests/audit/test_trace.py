"""Trace: every planted span is found, boilerplate stays cheap, and what is found leads back to the data's root."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from glasklar.audit.trace import RunTracing, Tracer, as_json
from glasklar.audit.trace_tables import Tables
from glasklar.corpus import Corpus, training_documents
from glasklar.data.batches import PackedDocuments, Packer
from glasklar.data.trace import SHORTEST, Span, TraceIndex
from glasklar.errors import CheckpointError, RecordError, RequestError
from glasklar.loading import load
from glasklar.provenance.hashing import proves
from glasklar.provenance.rundir import RunDir
from glasklar.recipe import PretrainStage
from glasklar.runtime import Runtime
from glasklar.serve.live import LiveServer
from glasklar.serve.server import Site

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


def test_what_begins_or_ends_like_thousands_of_others_is_found() -> None:
    """Every window that the index keeps of such a span may be boilerplate: templates, markup, licence headers."""
    rng, length = np.random.default_rng(6), 40
    ids = rng.integers(0, 50_000, 3000 * length).astype(np.int32).reshape(3000, length)
    ids[:, 10:30] = rng.integers(0, 50_000, 20)
    documents = packed(ids.reshape(-1), length)
    index = TraceIndex.build(documents)
    for document in rng.integers(0, 3000, 100).tolist():
        for first in (7, 13):
            query = ids[document, first : first + 20].tolist()
            found = index.find(query)[0]
            assert (found.start, found.stop, found.document, found.place) == (0, 20, document, first)


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
    assert any(s.start == 0 and s.stop >= 200 for s in spans)  # one document happens to go on a token longer
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


def longest(tracer: Tracer) -> int:
    return int(np.diff(tracer.packed.starts).argmax())


def test_a_document_leads_back_to_itself_and_to_the_root(tracer: Tracer) -> None:
    number = longest(tracer)
    begin, end = tracer.packed.starts[number : number + 2]
    query = tracer.packed.ids[begin + 1 : end - 1].tolist()
    best = tracer.find(query)[0]
    document = training_documents(tracer.recipe, tracer.run.data)[number]
    assert (best.document, best.start, best.stop) == (number, 0, len(query))
    assert (best.before, best.text, best.after) == ("", document.text, "")
    assert (best.source, best.licence, best.origin) == (document.source, document.licence, document.origin)
    assert best.leaf == document.hash.hex()
    assert proves(bytes.fromhex(best.leaf), best.proof, str(tracer.facts["root"]))
    assert json.loads(json.dumps(as_json([best], "root")))["overlaps"][0]["steps"] is not None
    part = next(span for span in tracer.find(query[10:-10]) if span.document == number)
    assert part.before + part.text + part.after == document.text


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
    assert tracer.tables.steps(tracer.recipe, Span(start=0, stop=len(needle), document=number, place=0)) == seen


def test_steps_of_a_document_longer_than_a_row(tracer: Tracer, tmp_path: Path) -> None:
    """Only the piece that holds the span counts."""
    stage = tracer.recipe.stages[0].replace(length=16)
    recipe = tracer.recipe.replace(stages=(stage, *tracer.recipe.stages[1:]))
    corpus = Corpus(tokenizer=tracer.tokenizer, train=tracer.packed, held_out=[], traces={}, facts=tracer.facts)
    tables = Tables.open(recipe, corpus, tracer.run.data, tmp_path)
    packer = Packer(tracer.packed, rows=stage.rows, length=16, seed=recipe.seed * 1000)
    number = longest(tracer)
    start = int(tracer.packed.starts[number])
    for first, last in ((3, 12), (17, 30), (14, 40)):
        wanted = {
            (0, k + 1)
            for k in range(stage.steps)
            for begin in packer.shown(k).tolist()
            if start + first - 16 < begin < start + last and start <= begin
        }
        assert set(tables.steps(recipe, Span(start=0, stop=last - first, document=number, place=first))) == wanted


def test_cached_tables_are_the_same_and_damaged_ones_are_refused(tracer: Tracer, tmp_path: Path) -> None:
    query = tracer.packed.ids[1:40].tolist()
    run, cache = RunDir(tracer.run.path), tmp_path / "cache"
    first, again = Tracer(run, cache), Tracer(run, cache)
    assert again.find(query) == first.find(query) == tracer.find(query) != []
    [origins] = cache.glob("*.origins.json")
    places = json.loads(origins.read_bytes())
    origins.write_text(json.dumps([[source, "CC-BY-4.0", *rest] for source, _, *rest in places]))
    with pytest.raises(RecordError, match="does not hash to its leaf"):
        Tracer(run, cache).find(query)
    [leaves] = cache.glob("*.leaves.safetensors")
    content = bytearray(leaves.read_bytes())
    content[-1 - 24 * len(tracer.tables.shown)] ^= 1
    leaves.write_bytes(content)
    with pytest.raises(RecordError, match="sources give"):
        Tracer(run, cache)


def test_likelihood_at_every_kept_state(tracer: Tracer, runtime: Runtime) -> None:
    query = tracer.packed.ids[1:40].tolist()
    best = tracer.find(query)[0]
    [found] = tracer.likelihoods([best], query, runtime)
    assert [state.checkpoint for state in found] == sorted(path.name for path in tracer.run.checkpoints.iterdir())
    assert all(state.logprob < 0 for state in found)
    for state in found:
        stage, step = int(state.checkpoint[:2]), int(state.checkpoint[-8:])
        assert state.shown == len([seen for seen in best.steps if seen <= (stage, step)])


# --- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def web(smoke_run: Path, runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    tracing = RunTracing(RunDir(smoke_run), tmp_path_factory.mktemp("traced"), runtime)
    site = Site(home=tmp_path_factory.mktemp("home"), port=0)
    with LiveServer(smoke_run, site, tracing=tracing) as server, httpx.Client(base_url=server.url) as client:
        assert client.post("/v1/trace", json={"text": "x"}).status_code == 503
        server.release(load(smoke_run / "model", runtime))
        yield client


def test_the_endpoint_finds_what_the_command_finds(web: httpx.Client, tracer: Tracer) -> None:
    number = longest(tracer)
    begin, end = tracer.packed.starts[number : number + 2]
    text = tracer.text(tracer.packed.ids[begin + 1 : end - 1].tolist())
    asked = f"Grüße, 😀: {text} and more"
    reply = web.post("/v1/trace", json={"text": asked, "states": True}, timeout=60).json()
    wanted = tracer.find(tracer.tokenizer.encode(asked))
    assert [(o["document"], o["start"], o["stop"]) for o in reply["overlaps"]] == [
        (o.document, o.start, o.stop) for o in wanted
    ]
    assert (reply["object"], reply["data_root"], reply["left_out"]) == ("trace", tracer.facts["root"], 0)
    assert "does not show" in reply["label"]
    for overlap in reply["overlaps"]:
        assert asked[overlap["begin"] : overlap["end"]] == overlap["text"]
        assert proves(bytes.fromhex(overlap["leaf"]), overlap["proof"], reply["data_root"])
        assert [state["checkpoint"] for state in overlap["states"]] == sorted(
            path.name for path in tracer.run.checkpoints.iterdir()
        )
    by_ids = web.post("/v1/trace", json={"ids": tracer.tokenizer.encode(asked)}).json()
    assert [o["document"] for o in by_ids["overlaps"]] == [o["document"] for o in reply["overlaps"]]
    assert "begin" not in by_ids["overlaps"][0]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": "a", "ids": [1]},
        {"text": "a", "shortest": 3},
        {"ids": [-1]},
        {"text": "a", "more": 1},
        {"text": ""},
    ],
)
def test_bad_questions_are_refused_by_name(web: httpx.Client, body: dict) -> None:
    reply = web.post("/v1/trace", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


def test_a_server_without_a_run_says_so(smoke_run: Path, runtime: Runtime, tmp_path: Path) -> None:
    with LiveServer(smoke_run, Site(home=tmp_path, port=0)) as server, httpx.Client(base_url=server.url) as client:
        server.release(load(smoke_run / "model", runtime))
        reply = client.post("/v1/trace", json={"text": "x"})
    assert reply.status_code == 400
    assert "glasklar serve RUN" in reply.json()["error"]["message"]
