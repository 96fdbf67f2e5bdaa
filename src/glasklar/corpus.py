"""From a recipe's sources to packed token files in the run folder: documents, hashes, tokenizer, training and held-out parts.

Made once per run; a later start finds the files, checks their hashes and goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from glasklar.data.batches import PackedDocuments
from glasklar.data.chat import demonstration
from glasklar.data.documents import Document, held_out, read_documents
from glasklar.data.procedural import Mixture, TaskSource, demonstrations, documents
from glasklar.data.tokenizer import Tokenizer
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
    tokenizer = Tokenizer.train(
        (document.text for document in islice(train, recipe.tokenizer.sample)), vocab_size=recipe.tokenizer.vocab_size
    )
    for name, content in tokenizer.files().items():
        write_atomic(folder / name, content)
    texts = [document.text for document in train]
    encoded = [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in tokenizer.encode_many(texts)]
    packed = PackedDocuments.of([(ids, None) for ids in encoded])
    packed.save(folder / TRAIN)
    facts: dict[str, object] = {
        "documents": len(train),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": sum(map(len, encoded)),
        "root": merkle_root(document.hash for document in train),
        "held_out_documents": len(kept_out),
        "held_out_root": merkle_root(document.hash for document in kept_out),
        "licences": sorted({document.licence for document in train}),
        "tokenizer": tokenizer.hash,
        "train_file": sha256_file(folder / TRAIN),
    }
    write_atomic(facts_path, canonical_json(facts))
    return Corpus(tokenizer=tokenizer, train=packed, held_out=kept_out, facts=facts)


def split_documents(recipe: Recipe) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents. Problems of tasks have splits of their own; whole text documents are held out."""
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
    """Ids and loss weights of a stage's demonstrations, from number `first` on; none of its problems is in pretraining's
    seed range, since they are drawn under another seed."""
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
