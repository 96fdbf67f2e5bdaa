"""From a recipe's sources to packed tokens in the run folder: documents, hashes, tokenizer, held-out part.

    facts.json           counts, Merkle roots, hashes of the files beside it
    removed.jsonl        documents that are not trained on, and why, by hash (recipes with text of their own)
    tokenizer.json, …    made from the documents
    train.safetensors    packed tokens
    traces-NN.jsonl      a teacher's right answers, for stage number NN (recipes that distil)

Made once per run; a later start finds the files, checks their hashes and goes on.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasklar.data.batches import PackedDocuments
from glasklar.data.chat import demonstration
from glasklar.data.cleaning import near_duplicates, overlaps
from glasklar.data.documents import (
    Document,
    Removed,
    check_source,
    document_trees,
    evaluation_texts,
    held_out,
    read_source,
)
from glasklar.data.procedural import Mixture, TaskSource, demonstrations, documents
from glasklar.data.tokenizer import SPECIAL, Tokenizer
from glasklar.distil import Teachers, Trace, find_teacher, make_traces, read_traces, stages_taught, traces_name
from glasklar.errors import CheckpointError, DataError
from glasklar.provenance.files import write_atomic
from glasklar.provenance.hashing import SourceTrees, canonical_json, sha256_file
from glasklar.recipe import Recipe, SFTStage

TRAIN, REMOVED = "train.safetensors", "removed.jsonl"
# Seeds of evaluations differ from those of training only for clarity: problems are kept apart by their split.
EVALUATION_SEED = 7


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What training reads. `facts` goes into the ledger: counts, bytes, Merkle roots, file hashes. `traces`: what a
    teacher answered, by the number of the stage."""

    tokenizer: Tokenizer
    train: PackedDocuments
    held_out: list[Document]
    traces: dict[int, list[Trace]]
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a recipe's sources hold, sorted out. `removed` is ordered by hash."""

    train: list[Document]
    held_out: list[Document]
    removed: list[Removed]


def prepare(recipe: Recipe, folder: Path, workers: int = 1, teachers: Teachers | None = None) -> Corpus:
    """The corpus of a recipe in `folder`, made if it is not there; `workers` threads look for near-duplicates, and
    `teachers` answer for stages that distil.

    Raises DataError for sources that hold nothing and for teachers that are not there, CheckpointError for files that
    are not what the run recorded.
    """
    facts_path = folder / "facts.json"
    if facts_path.exists():
        return _reopen(recipe, folder)
    folder.mkdir(parents=True, exist_ok=True)
    selection = select(recipe, workers)
    train, kept_out = selection.train, selection.held_out
    sample = random.Random(recipe.seed).sample(train, min(recipe.tokenizer.sample, len(train)))
    tokenizer = Tokenizer.train((_plain(document.text) for document in sample), vocab_size=recipe.tokenizer.vocab_size)
    for name, content in tokenizer.files().items():
        write_atomic(folder / name, content)
    texts = [document.text for document in train]
    packed = PackedDocuments.of(list(_encoded(recipe, train, tokenizer)))
    packed.save(folder / TRAIN)
    trees = document_trees(train)
    facts: dict[str, Any] = {
        "documents": len(train),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": len(packed.ids),
        "root": trees.root,
        "source_roots": _source_roots(train, trees),
        "held_out_documents": len(kept_out),
        "held_out_root": document_trees(kept_out).root,
        "licences": sorted({document.licence for document in train}),
        "tokenizer": tokenizer.hash,
        "train_file": sha256_file(folder / TRAIN),
    }
    if not only_tasks(recipe):
        lines = [canonical_json(removed.record()) + b"\n" for removed in selection.removed]
        write_atomic(folder / REMOVED, b"".join(lines))
        facts["removed"] = dict(Counter(removed.reason for removed in selection.removed))
        facts["removed_file"] = sha256_file(folder / REMOVED)
    if taught := stages_taught(recipe):
        if teachers is None:
            raise DataError(f"{folder}: the answers of {taught[0][1].teacher!r} are missing, and no teacher is at hand")
        with teachers.during():
            facts["traces"] = {
                traces_name(index): make_traces(recipe, index, folder, teachers, tokenizer) for index, _ in taught
            }
    write_atomic(facts_path, canonical_json(facts))
    return Corpus(tokenizer=tokenizer, train=packed, held_out=kept_out, traces=_traces(recipe, folder), facts=facts)


def _traces(recipe: Recipe, folder: Path) -> dict[int, list[Trace]]:
    return {index: read_traces(folder / traces_name(index)) for index, _ in stages_taught(recipe)}


def check_sources(recipe: Recipe, home: Path) -> None:
    """Looks whether every source, every file of evaluations and every teacher is there. Raises DataError, before
    anything is made."""
    for _, stage in stages_taught(recipe):
        find_teacher(stage, home)
    for source in recipe.sources:
        if not isinstance(source, TaskSource):
            check_source(source)
    for path in recipe.cleaning.evaluations if recipe.cleaning else ():
        next(evaluation_texts(path), None)


def _source_roots(train: list[Document], trees: SourceTrees) -> dict[str, dict[str, object]]:
    """What each source gave, and the root of its documents, from which the root of all follows."""
    counts, licences = Counter(document.source for document in train), {d.source: d.licence for d in train}
    return {
        name: {"documents": counts[name], "licence": licences[name], "root": tree.root}
        for name, tree in trees.trees.items()
    }


def _plain(text: str) -> str:
    """A document without special tokens, whose characters must not shape the vocabulary."""
    for token in SPECIAL:
        text = text.replace(token, "\n")
    return text


def _encoded(recipe: Recipe, train: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[float]]]:
    """Ids and loss weights of the documents. Only what the tasks wrote may hold special tokens."""
    weight = next((source.question_weight for source in recipe.sources if isinstance(source, TaskSource)), 1.0)
    for trusted in (False, True):
        texts = [document.text for document in train if _trusted(document) == trusted]
        for body in tokenizer.encode_many(texts, trusted=trusted):
            ids = [tokenizer.bos_id, *body, tokenizer.eos_id]
            asked = ids.index(tokenizer.assistant_id) + 1 if trusted and tokenizer.assistant_id in ids else 0
            yield ids, [weight] * asked + [1.0] * (len(ids) - asked)


def packed_order(train: list[Document]) -> list[Document]:
    """The documents in the order in which their tokens lie in the training file."""
    return sorted(train, key=_trusted)


def _trusted(document: Document) -> bool:
    return document.source.startswith("task:")


def split_documents(recipe: Recipe) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents of a recipe, from its sources."""
    selection = select(recipe)
    return selection.train, selection.held_out


def training_documents(recipe: Recipe, folder: Path) -> list[Document]:
    """The documents behind a prepared corpus, in the order in which their tokens lie in the training file; what was
    removed is taken from the list in `folder`. Errors as `read_source`."""
    return packed_order(_sorted_out(recipe, folder)[0])


def select(recipe: Recipe, workers: int = 1) -> Selection:
    """All sources read and sorted out. Problems have splits of their own; of text, whole documents are held out, and
    what the recipe's `cleaning` names is removed: near-duplicates first, among all text, then training documents that
    overlap with an evaluation. Nothing depends on the order of files or on `workers`."""
    made, text, removed = _read(recipe)
    if recipe.cleaning is not None:
        text, near = near_duplicates(text, recipe.cleaning.near_duplicate, workers)
        removed += near
    kept_out = [document for document in text if held_out(document, recipe.evaluation.held_out)]
    train = [document for document in text if not held_out(document, recipe.evaluation.held_out)]
    if recipe.cleaning is not None:
        train, leaks = overlaps(train, _evaluations(recipe, kept_out), recipe.cleaning, workers)
        removed += leaks
    removed.sort(key=lambda each: each.document.hash)
    return Selection(train=made + train, held_out=kept_out, removed=removed)


def _read(recipe: Recipe) -> tuple[list[Document], list[Document], list[Removed]]:
    """Documents that the tasks make, documents of text, and repetitions within a source of text."""
    made: list[Document] = []
    text: list[Document] = []
    removed: list[Removed] = []
    mixture = Mixture.of(recipe.tasks)
    for source in recipe.sources:
        if isinstance(source, TaskSource):
            made += documents(source, mixture, recipe.seed)
        else:
            found, again = read_source(source)
            text += found
            removed += again
    return made, text, removed


def _evaluations(recipe: Recipe, kept_out: list[Document]) -> Iterator[tuple[str, str]]:
    """Name and text of all that the recipe's model is measured on."""
    assert recipe.cleaning is not None
    for document in kept_out:
        yield f"held out: {document.source}, {document.origin}", document.text
    for hard in (False, True):
        for task in Mixture.of(recipe.tasks, hard=hard).tasks:
            for index in range(recipe.evaluation.problems):
                problem = task.draw("test", EVALUATION_SEED, index)
                yield f"task: {task.name}, test problem {index}", f"{problem.question} {problem.answer}"
    for path in recipe.cleaning.evaluations:
        yield from evaluation_texts(path)


def _sorted_out(recipe: Recipe, folder: Path) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, with what was removed taken from its list."""
    made, text, _ = _read(recipe)
    # How often each: two sources may hold the very same document, of which one stays.
    gone = Counter(line["document"] for line in _removed(folder) if line["reason"] != "duplicate")
    stay = []
    for document in text:
        if gone[document.hash.hex()]:
            gone[document.hash.hex()] -= 1
        else:
            stay.append(document)
    share = recipe.evaluation.held_out
    train = [document for document in stay if not held_out(document, share)]
    return made + train, [document for document in stay if held_out(document, share)]


def _removed(folder: Path) -> list[dict[str, Any]]:
    path = folder / REMOVED
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def only_tasks(recipe: Recipe) -> bool:
    """Whether a recipe has no text of its own."""
    return all(isinstance(source, TaskSource) for source in recipe.sources)


def demonstration_tokens(
    recipe: Recipe, stage: SFTStage, tokenizer: Tokenizer, first: int = 0
) -> Iterator[tuple[list[int], list[float]]]:
    """Ids and loss weights of a stage's demonstrations, from number `first` on. They are drawn under another seed, so
    they are not the problems that pretraining showed (though some may be drawn again by chance)."""
    mixture = Mixture.of(recipe.tasks)
    for problem, shown in demonstrations(mixture, recipe.seed + 1, first, stage.demonstrations, stage.thoughts):
        thought = problem.thought if shown and problem.thought else None
        yield demonstration(tokenizer, problem.question, thought, problem.answer)


def _reopen(recipe: Recipe, folder: Path) -> Corpus:
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.load(folder)
    path = folder / TRAIN
    recorded = {"tokenizer.json": facts["tokenizer"], TRAIN: facts["train_file"]}
    found = {"tokenizer.json": tokenizer.hash, TRAIN: sha256_file(path)}
    if "removed_file" in facts:
        recorded[REMOVED], found[REMOVED] = facts["removed_file"], sha256_file(folder / REMOVED)
    for name, traces in facts.get("traces", {}).items():
        recorded[name], found[name] = traces["file"], sha256_file(folder / name)
    for name, digest in found.items():
        if digest != recorded[name]:
            raise CheckpointError(
                f"{folder / name}: its hash {digest[:12]}… is not the recorded {recorded[name][:12]}…; "
                "the file was changed: remove the folder to have it made again"
            )
    kept_out = [] if only_tasks(recipe) else _sorted_out(recipe, folder)[1]
    if document_trees(kept_out).root != facts["held_out_root"]:
        raise CheckpointError(
            f"{folder}: the sources no longer hold the {facts['held_out_documents']} documents that were kept from "
            "training, so nothing comparable can be measured; restore the sources as they were, or start a new run"
        )
    return Corpus(
        tokenizer=tokenizer,
        train=PackedDocuments.open(path),
        held_out=kept_out,
        traces=_traces(recipe, folder),
        facts=facts,
    )
