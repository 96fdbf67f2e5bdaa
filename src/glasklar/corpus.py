"""From a recipe's sources to packed tokens in the run folder: documents, hashes, tokenizer, held-out part.

Made once per run; a later start finds the files, checks their hashes and goes on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glasklar.data.batches import PackedDocuments
from glasklar.data.chat import demonstration
from glasklar.data.documents import Document, held_out, read_documents
from glasklar.data.procedural import Mixture, TaskSource, demonstrations, documents
from glasklar.data.tokenizer import SPECIAL, Tokenizer
from glasklar.errors import CheckpointError
from glasklar.provenance.files import write_atomic
from glasklar.provenance.hashing import canonical_json, merkle_root, sha256_file
from glasklar.recipe import Recipe, SFTStage

TRAIN = "train.safetensors"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What training reads. `facts` goes into the ledger: counts, bytes, Merkle roots, file hashes."""

    tokenizer: Tokenizer
    train: PackedDocuments
    held_out: list[Document]
    facts: dict[str, object]


def prepare(recipe: Recipe, folder: Path) -> Corpus:
    """The corpus of a recipe in `folder`, made if it is not there. Raises DataError for sources that hold nothing and
    CheckpointError for files that are not what the run recorded."""
    facts_path = folder / "facts.json"
    if facts_path.exists():
        return _reopen(recipe, folder)
    folder.mkdir(parents=True, exist_ok=True)
    train, kept_out = split_documents(recipe)
    sample = random.Random(recipe.seed).sample(train, min(recipe.tokenizer.sample, len(train)))
    tokenizer = Tokenizer.train((_plain(document.text) for document in sample), vocab_size=recipe.tokenizer.vocab_size)
    for name, content in tokenizer.files().items():
        write_atomic(folder / name, content)
    texts = [document.text for document in train]
    packed = PackedDocuments.of(list(_encoded(recipe, train, tokenizer)))
    packed.save(folder / TRAIN)
    facts: dict[str, object] = {
        "documents": len(train),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": len(packed.ids),
        "root": merkle_root(document.hash for document in train),
        "held_out_documents": len(kept_out),
        "held_out_root": merkle_root(document.hash for document in kept_out),
        "licences": sorted({document.licence for document in train}),
        "tokenizer": tokenizer.hash,
        "train_file": sha256_file(folder / TRAIN),
    }
    write_atomic(facts_path, canonical_json(facts))
    return Corpus(tokenizer=tokenizer, train=packed, held_out=kept_out, facts=facts)


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
    """Training and held-out documents. Problems have splits of their own; of text, whole documents are held out."""
    train: list[Document] = []
    kept_out: list[Document] = []
    mixture = Mixture.of(recipe.tasks)
    for source in recipe.sources:
        if isinstance(source, TaskSource):
            train += documents(source, mixture, recipe.seed)
            continue
        for document in read_documents(source):
            (kept_out if held_out(document, recipe.evaluation.held_out) else train).append(document)
    return train, kept_out


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
    for name, found, recorded in (
        ("tokenizer.json", tokenizer.hash, facts["tokenizer"]),
        (path.name, sha256_file(path), facts["train_file"]),
    ):
        if found != recorded:
            raise CheckpointError(
                f"{folder / name}: its hash {found[:12]}… is not the recorded {recorded[:12]}…; "
                "the file was changed: remove the folder to have it made again"
            )
    only_tasks = all(isinstance(source, TaskSource) for source in recipe.sources)
    kept_out = [] if only_tasks else split_documents(recipe)[1]
    return Corpus(tokenizer=tokenizer, train=PackedDocuments.open(path), held_out=kept_out, facts=facts)
