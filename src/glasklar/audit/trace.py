"""`glasklar trace`: which training documents hold a span verbatim, where they come from, which steps showed them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasklar.corpus import prepare, training_documents
from glasklar.data.batches import PackedDocuments, Packer
from glasklar.data.tokenizer import Tokenizer
from glasklar.data.trace import SHORTEST, Span, TraceIndex
from glasklar.errors import RecordError, RequestError
from glasklar.loading import Model
from glasklar.provenance.hashing import inclusion_proof
from glasklar.provenance.rundir import RunDir
from glasklar.recipe import PretrainStage, Recipe
from glasklar.runtime import Runtime
from glasklar.training import state_at

LABEL = "verbatim overlap with training documents; it does not show that the answer came from them"


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """One stretch of the query in one document.

    start, stop   tokens of the query; text: what they say
    place         token of the document at which it begins
    leaf, proof   the document's hash and its way to the Merkle root of the data (`hashing.proves`)
    steps         pretraining steps that showed the document: [stage, from 0; step, from 1], in order
    """

    start: int
    stop: int
    text: str
    document: int
    place: int
    source: str
    licence: str
    date: str
    origin: str
    leaf: str
    proof: list[tuple[str, str]]
    steps: list[tuple[int, int]]

    def __str__(self) -> str:
        seen = f"{len(self.steps)} steps" if self.steps else "no step"
        return (
            f"{self.stop - self.start} tokens: {self.text!r}\n"
            f"    {self.source}, {self.origin}, licence {self.licence}; shown in {seen}; leaf {self.leaf[:16]}…"
        )


class Tracer:
    """The documents of a run and their index, made once; the index is kept under `cache`.

    Raises DataError where a source of the recipe is gone, RecordError where it is not what it was.
    """

    def __init__(self, run: RunDir, cache: Path) -> None:
        self.run = run
        self.recipe = Recipe.read(run.recipe(), run.identity_file.name)
        corpus = prepare(self.recipe, run.data)
        self.tokenizer, self.packed, self.facts = corpus.tokenizer, corpus.train, corpus.facts
        self.index = cached_index(corpus.train, cache / f"{corpus.facts['train_file']}.safetensors")
        self.documents = training_documents(self.recipe, run.data)
        self.leaves = [document.hash for document in self.documents]
        if len(self.documents) != len(self.packed):
            raise RecordError(f"{run.path}: the sources hold {len(self.documents)} documents, not {len(self.packed)}")

    def find(self, query: Sequence[int], *, shortest: int = SHORTEST, most: int = 8) -> list[Overlap]:
        """Overlaps of at least so many tokens, longest first; `most` documents for one stretch."""
        spans = self.index.find(query, shortest=shortest, most=most)
        steps = self.steps({span.document for span in spans})
        return [self._overlap(span, query, steps[span.document]) for span in spans]

    def find_text(self, text: str, **how: Any) -> list[Overlap]:
        """As `find`, for a text. Its first and last word may be tokenised otherwise than within a document."""
        return self.find(self.tokenizer.encode(text), **how)

    def steps(self, wanted: set[int]) -> dict[int, list[tuple[int, int]]]:
        """Document -> pretraining steps that showed it."""
        found: dict[int, list[tuple[int, int]]] = {document: [] for document in wanted}
        if not wanted:
            return found
        for index, stage in enumerate(self.recipe.stages):
            if isinstance(stage, PretrainStage):
                packer = Packer(self.packed, rows=stage.rows, length=stage.length, seed=self.recipe.seed * 1000 + index)
                for k in range(stage.steps):
                    for document in wanted & packer.documents_in(k):
                        found[document].append((index, k + 1))
        return found

    def likelihoods(self, span: Overlap, query: Sequence[int], runtime: Runtime) -> list[tuple[str, float]]:
        """(checkpoint, mean log-probability of the span's tokens) for every state that is kept, in order.

        The span stands alone after the beginning token, so that all states are asked the same.
        """
        ids = [self.tokenizer.bos_id, *query[span.start : span.stop]]
        folders = sorted(path for path in self.run.checkpoints.iterdir() if path.is_dir())
        return [(folder.name, _mean_logprob(self._model(folder, runtime), ids)) for folder in folders]

    def _model(self, checkpoint: Path, runtime: Runtime) -> Model:
        network = state_at(self.recipe, checkpoint, runtime).requires_grad_(False)
        return Model(network=network, tokenizer=self.tokenizer, folder=checkpoint)

    def _overlap(self, span: Span, query: Sequence[int], steps: list[tuple[int, int]]) -> Overlap:
        document = self.documents[span.document]
        leaf = self.leaves[span.document]
        return Overlap(
            start=span.start,
            stop=span.stop,
            text=self.tokenizer.decode(query[span.start : span.stop], skip_special=False),
            document=span.document,
            place=span.place,
            source=document.source,
            licence=document.licence,
            date=document.date,
            origin=document.origin,
            leaf=leaf.hex(),
            proof=inclusion_proof(self.leaves, leaf),
            steps=steps,
        )


def cached_index(documents: PackedDocuments, path: Path) -> TraceIndex:
    """The index in a file, made if it is not there."""
    if path.is_file():
        return TraceIndex.open(path, documents)
    index = TraceIndex.build(documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    index.save(path)
    return index


def parse_query(tokenizer: Tokenizer, text: str | None, ids: str | None) -> list[int]:
    """Token ids of a text or of a list "3,17,9"; exactly one must be given. Raises RequestError."""
    if (text is None) == (ids is None):
        raise RequestError("give either a text or --ids 3,17,9")
    if text is not None:
        return tokenizer.encode(text)
    try:
        return [int(part) for part in str(ids).split(",")]
    except ValueError:
        raise RequestError(f"--ids {ids!r}: whole numbers separated by commas, please") from None


def as_json(overlaps: Sequence[Overlap], root: object) -> dict[str, Any]:
    return {"label": LABEL, "data_root": root, "overlaps": [asdict(overlap) for overlap in overlaps]}


def _mean_logprob(model: Model, ids: list[int]) -> float:
    logprobs_TW: Tensor = model.logits(ids).log_softmax(-1)
    return logprobs_TW[:-1].gather(1, torch.tensor(ids[1:])[:, None]).mean().item()
