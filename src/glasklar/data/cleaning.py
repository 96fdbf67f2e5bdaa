"""Documents that are left out of training: near-duplicates, and those that hold pieces of what a model is measured on.

Both by rules on content, never by the order in which documents came, and with a reason for each document.

Near-duplicates   documents whose stretches of five words overlap (Jaccard index) in at least `near_duplicate` of all.
                  Taken by content hash, smallest first: a document goes if one that stays is that near. Candidates come
                  from MinHash (Broder 1997) in 20 bands of 6: of pairs at 0.8 two in a thousand are missed. What a
                  candidate is worth is then counted exactly.
Overlaps          documents that share a stretch of `overlap` words with a text of the evaluation. A stretch that
                  stands in more than `common` documents is a phrase and not a leak, as in GPT-3 (arXiv 2005.14165,
                  appendix C).

Case and punctuation do not count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from pydantic import Field

from glasklar.config import Section
from glasklar.data.documents import Document, Removed
from glasklar.data.ngrams import Hashes, ngram_hashes, stir, word_hashes, words

SHINGLE = 5
BANDS, ROWS = 20, 6
# Survivors in one bucket that a document is compared with: where more are alike without being near, some will do.
MOST_COMPARED = 64
_STRETCH = 4096  # shingles hashed at once: bounds the memory of a long document
_ODD, _OFFSET = (
    stir(np.arange(start, start + BANDS * ROWS, dtype=np.uint64)) | np.uint64(odd) for start, odd in ((1, 1), (1000, 0))
)


Result = TypeVar("Result")


class Cleaning(Section):
    """What is left out. A recipe without this section trains on all documents but those of equal text.

    near_duplicate   share of common stretches of five words from which two documents count as one
    overlap          words in a row that a document may not share with an evaluation
    common           most documents that such a stretch may stand in to count
    evaluations      files of benchmarks to be kept out of training, beside the held-out documents and the recipe's own
                     test problems: *.jsonl (all text of a line is one evaluation text), or plain text (every line)
    """

    near_duplicate: float = Field(default=0.8, gt=0, le=1)
    overlap: int = Field(default=12, ge=5)
    common: int = Field(default=10, ge=1)
    evaluations: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """shingles: hashes of all stretches of five words, sorted, each once. bands: one key for each band of minima."""

    shingles: Hashes
    bands: Hashes


def near_duplicates(
    documents: Sequence[Document], threshold: float, workers: int = 1
) -> tuple[list[Document], list[Removed]]:
    """Those that stay, in their order, and those that go. `workers`: threads; the result does not depend on them."""
    hashes = [document.hash for document in documents]
    order = sorted(range(len(documents)), key=hashes.__getitem__)
    ordered = [documents[place] for place in order]
    sketches = _in_parallel(_sketches, ordered, workers)
    stay: list[int] = []
    gone: list[Removed] = []
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, sketch in enumerate(sketches):
        keys = list(enumerate(sketch.bands.tolist()))
        others = sorted({other for key in keys for other in buckets.get(key, [])})
        near = next(((o, s) for o in others if (s := _jaccard(sketches[o], sketch)) >= threshold), None)
        if near is not None:
            kept, similarity = ordered[near[0]], near[1]
            detail = f"{similarity:.3f} of all stretches of {SHINGLE} words are common"
            gone.append(
                Removed(document=ordered[number], reason="near-duplicate", because_of=kept.hash.hex(), detail=detail)
            )
            continue
        stay.append(number)
        for key in keys:
            if len(buckets[key]) < MOST_COMPARED:
                buckets[key].append(number)
    return [documents[place] for place in sorted(order[number] for number in stay)], gone


def overlaps(
    documents: Sequence[Document], evaluations: Iterable[tuple[str, str]], config: Cleaning, workers: int = 1
) -> tuple[list[Document], list[Removed]]:
    """Those that stay, in their order, and those that go.

    evaluations   name and text of everything that must not be trained on
    """
    width = config.overlap
    names: dict[int, str] = {}
    known: dict[str, int] = {}
    for name, text in evaluations:
        for gram in ngram_hashes(word_hashes(words(text), known), width).tolist():
            names.setdefault(gram, name)
    forbidden = np.array(sorted(names), np.uint64)
    hits = _in_parallel(lambda texts: _hits(texts, forbidden, width), documents, workers)
    grams, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *hits]), return_counts=True)
    phrases = grams[counts > config.common]
    stay: list[Document] = []
    gone: list[Removed] = []
    for document, found in zip(documents, hits, strict=True):
        leaks = np.setdiff1d(found, phrases)
        if len(leaks) == 0:
            stay.append(document)
            continue
        detail, gram = _first(document.text, leaks, width)
        gone.append(Removed(document=document, reason="evaluation overlap", because_of=names[gram], detail=detail))
    return stay, gone


def _in_parallel(
    work: Callable[[list[str]], list[Result]], documents: Sequence[Document], workers: int
) -> list[Result]:
    """`work` on the texts in as many parts as there are workers, joined in their order."""
    texts = [document.text for document in documents]
    size = -(-len(texts) // workers) or 1
    parts = [texts[i : i + size] for i in range(0, len(texts), size)]
    with ThreadPoolExecutor(workers) as pool:
        return [result for part in pool.map(work, parts) for result in part]


def _sketches(texts: list[str]) -> list[Sketch]:
    known: dict[str, int] = {}
    return [_sketch(word_hashes(words(text), known)) for text in texts]


def _sketch(hashes: Hashes) -> Sketch:
    # A text of fewer words than a shingle is one shingle; one without words has none and is near to nothing.
    shingles = np.unique(ngram_hashes(hashes, min(SHINGLE, len(hashes)))) if len(hashes) else hashes
    if len(shingles) == 0:
        return Sketch(shingles=shingles, bands=shingles)
    minima = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(shingles), _STRETCH):
        turned = shingles[start : start + _STRETCH, None] * _ODD + _OFFSET
        np.minimum(minima, turned.min(axis=0), out=minima)
    bands = np.concatenate([ngram_hashes(rows, ROWS) for rows in minima.reshape(BANDS, ROWS)])
    return Sketch(shingles=shingles, bands=bands)


def _jaccard(a: Sketch, b: Sketch) -> float:
    common = len(np.intersect1d(a.shingles, b.shingles, assume_unique=True))
    return common / (len(a.shingles) + len(b.shingles) - common)


def _hits(texts: list[str], forbidden: Hashes, width: int) -> list[Hashes]:
    """For each text the forbidden stretches that it holds, each once."""
    known: dict[str, int] = {}
    return [np.intersect1d(ngram_hashes(word_hashes(words(text), known), width), forbidden) for text in texts]


def _first(text: str, leaks: Hashes, width: int) -> tuple[str, int]:
    """The words of the first leaking stretch, and its hash."""
    parts = words(text)
    grams = ngram_hashes(word_hashes(parts, {}), width)
    place = int(np.isin(grams, leaks).argmax())
    return " ".join(parts[place : place + width]), int(grams[place])
