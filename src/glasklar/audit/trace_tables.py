"""What `trace` looks up, made once for a run and kept in a cache: index of windows, leaves, origins, steps.

    KEY.index.safetensors       kept windows of the packed tokens (`data.trace`)
    KEY.leaves.safetensors      hashes of the documents, and which steps showed what
    KEY.origins.json            source, licence, date and place of each document

KEY is the hash of recipe and training file. A cache is believed in nothing: the leaves must give the data's root, and
a document that is found must hash to its leaf.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from glasklar.corpus import Corpus, training_documents
from glasklar.data.batches import PackedDocuments, Packer
from glasklar.data.documents import Document
from glasklar.data.tokenizer import Tokenizer
from glasklar.data.trace import Span, TraceIndex
from glasklar.errors import RecordError
from glasklar.provenance.files import write_atomic
from glasklar.provenance.hashing import SourceTrees, canonical_json, sha256_hex
from glasklar.recipe import PretrainStage, Recipe

# [shown, 3]: where a piece begins in the flat ids, stage (from 0), step (from 1) that showed it; in this order.
Shown = NDArray[np.int64]


@dataclass(frozen=True)
class Tables:
    """leaves: hash of every document; origins: (source, licence, date, origin) of each; shown: see `Shown`."""

    index: TraceIndex
    packed: PackedDocuments
    trees: SourceTrees
    leaves: list[bytes]
    origins: list[list[str]]
    shown: Shown

    @classmethod
    def open(cls, recipe: Recipe, corpus: Corpus, data: Path, cache: Path) -> Tables:
        """From the cache, or made from the sources and put there. Raises DataError where a source is gone, RecordError
        where the documents are not those under the corpus's root."""
        key = sha256_hex(canonical_json([recipe.hash, corpus.facts["train_file"]]))[:32]
        paths = [cache / f"{key}.{name}" for name in ("index.safetensors", "leaves.safetensors", "origins.json")]
        if not all(path.is_file() for path in paths):
            cache.mkdir(parents=True, exist_ok=True)
            _make(recipe, corpus, data, *paths)
        index, leaves, origins = paths
        try:
            arrays = load_file(leaves)
            hashes = [bytes(leaf) for leaf in arrays["leaves"]]
            places = json.loads(origins.read_bytes())
            shown = arrays["shown"]
        except (OSError, ValueError, SafetensorError, LookupError) as error:
            raise RecordError(f"{leaves}: damaged ({error}); remove it to have it made again") from None
        by_source: dict[str, list[bytes]] = {}
        for (source, *_), leaf in zip(places, hashes, strict=True):
            by_source.setdefault(source, []).append(leaf)
        trees = SourceTrees(by_source)
        if trees.root != corpus.facts["root"] or len(hashes) != len(corpus.train):
            raise RecordError(
                f"{data}: the sources give {len(hashes)} documents with the root {trees.root}, recorded are "
                f"{len(corpus.train)} with {corpus.facts['root']}; if the sources are as they were, remove {leaves}"
            )
        return cls(TraceIndex.open(index, corpus.train), corpus.train, trees, hashes, places, shown)

    def document(self, number: int, tokenizer: Tokenizer) -> Document:
        """A document, its text from the training tokens. Raises RecordError where it is not the one of its leaf."""
        begin, end = self.packed.starts[number : number + 2].tolist()
        text = tokenizer.decode(self.packed.ids[begin + 1 : end - 1].tolist(), skip_special=False)
        document = Document(text, *self.origins[number])
        if document.hash != self.leaves[number]:
            raise RecordError(f"document {number} does not hash to its leaf; remove the trace cache")
        return document

    def proof(self, number: int) -> list[tuple[str, str]]:
        """The way from a document's leaf to the root of the data (`hashing.proves`)."""
        return self.trees.proof(self.origins[number][0], self.leaves[number])

    def steps(self, recipe: Recipe, span: Span) -> list[tuple[int, int]]:
        """(stage from 0, step from 1) of every pretraining step that showed a span or a part of it, in order. What is
        longer than a row is shown in pieces."""
        start = int(self.packed.starts[span.document])
        found = set()
        for index, stage in enumerate(recipe.stages):
            if not isinstance(stage, PretrainStage):
                continue
            first, last = span.place // stage.length, (span.place + span.stop - span.start - 1) // stage.length
            for piece in range(first, last + 1):
                begin = start + piece * stage.length
                low, high = np.searchsorted(self.shown[:, 0], [begin, begin + 1])
                found |= {(index, int(step)) for _, at, step in self.shown[low:high] if at == index}
        return sorted(found)


def _make(recipe: Recipe, corpus: Corpus, data: Path, index: Path, leaves: Path, origins: Path) -> None:
    documents = training_documents(recipe, data)
    if len(documents) != len(corpus.train):
        raise RecordError(f"{data}: the sources hold {len(documents)} documents, recorded are {len(corpus.train)}")
    TraceIndex.build(corpus.train).save(index)
    write_atomic(origins, json.dumps([_place(document) for document in documents], ensure_ascii=False).encode())
    hashes = np.frombuffer(b"".join(document.hash for document in documents), np.uint8).reshape(-1, 32)
    write_atomic(leaves, save({"leaves": hashes, "shown": _shown(recipe, corpus.train)}))


def _place(document: Document) -> list[str]:
    return [value for name, value in asdict(document).items() if name != "text"]


def _shown(recipe: Recipe, packed: PackedDocuments) -> Shown:
    """Which pretraining step showed what."""
    parts = [np.zeros((0, 3), np.int64)]
    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, PretrainStage):
            packer = Packer(packed, rows=stage.rows, length=stage.length, seed=recipe.seed * 1000 + index)
            for k in range(stage.steps):
                begins = packer.shown(k)
                parts.append(np.stack([begins, np.full_like(begins, index), np.full_like(begins, k + 1)], 1))
    shown = np.concatenate(parts)
    return np.ascontiguousarray(shown[np.lexsort((shown[:, 2], shown[:, 1], shown[:, 0]))])
