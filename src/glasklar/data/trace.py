"""From a span of tokens to the training documents that hold it verbatim.

Every window of K = 8 tokens has a fingerprint; of every W = 8 neighbouring windows the index keeps the one with the
smallest (winnowing: Schleimer, Wilkerson, Aiken, SIGMOD 2003). Two texts that share K + W - 1 = 15 tokens share a kept
window, so no such span can be missed. A kept window is stored as its place alone, ordered by its fingerprint: 4 bytes
for every 4.5 tokens. Fingerprints are computed again from the tokens when they are compared.

What is found is overlap, not cause: that a document holds the same words does not show that the answer came from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from glasklar.data.batches import PackedDocuments
from glasklar.data.ngrams import ngram_hashes
from glasklar.errors import CheckpointError, DataError, RequestError
from glasklar.provenance.files import write_atomic

K, W = 8, 8
SHORTEST = K + W - 1
# Most places taken for one fingerprint, and most looked at for those with the longest stretches: boilerplate stands in
# thousands of documents, of which some will do, but the one that goes on like the query must be among them.
MOST_PLACES, MOST_LOOKED_AT = 64, 1 << 17

Ids = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of a query that a document holds.

    start, stop   in the query
    document      number of the document; place: where in it the stretch begins, in tokens
    """

    start: int
    stop: int
    document: int
    place: int


@dataclass(frozen=True)
class TraceIndex:
    """Kept windows of packed documents.

    places    uint32 [kept]: where each begins in the flat ids, ordered by fingerprint
    first     uint32 [2^bits + 1]: for each beginning of a fingerprint where its places begin
    """

    documents: PackedDocuments
    places: NDArray[np.uint32]
    first: NDArray[np.uint32]

    @classmethod
    def build(cls, documents: PackedDocuments) -> TraceIndex:
        """Raises DataError for more than 2^32 tokens; cut such a corpus into several indexes."""
        if len(documents.ids) >= 1 << 32:
            raise DataError(
                f"{len(documents.ids)} tokens: one index holds {1 << 32} at most; index the corpus in parts"
            )
        prints = ngram_hashes(documents.ids, K)
        places = _winnow(prints)
        # Windows across the end of a document are no text of anybody; a match over them would be cut there anyway.
        places = places[np.searchsorted(documents.starts, places, "right") == np.searchsorted(
            documents.starts, places + K - 1, "right")]  # fmt: skip
        chosen = prints[places]
        order = np.lexsort((places, chosen))
        bits = max(1, len(places).bit_length() - 3)
        heads = chosen[order] >> np.uint64(64 - bits)
        first = np.searchsorted(heads, np.arange((1 << bits) + 1, dtype=np.uint64)).astype(np.uint32)
        return cls(documents, places[order].astype(np.uint32), first)

    @classmethod
    def open(cls, path: Path, documents: PackedDocuments) -> TraceIndex:
        """From a file written by `save`. Raises CheckpointError where it is damaged or of other documents."""
        try:
            arrays = load_file(path)
            index = cls(documents, arrays["places"], arrays["first"])
            if len(documents.ids) != int(arrays["tokens"][0]):
                raise CheckpointError(f"{path}: an index of other documents; remove it to have it made again")
        except (OSError, SafetensorError, LookupError) as error:
            raise CheckpointError(f"{path}: not an index ({error}); remove it to have it made again") from None
        return index

    def save(self, path: Path) -> None:
        """Writes the index beside the tokens, which it does not hold."""
        tokens = np.array([len(self.documents.ids)], np.int64)
        write_atomic(path, save({"places": self.places, "first": self.first, "tokens": tokens}))

    @property
    def nbytes(self) -> int:
        return self.places.nbytes + self.first.nbytes

    def find(self, ids: Sequence[int], *, shortest: int = SHORTEST, most: int = 8) -> list[Span]:
        """The documents that hold stretches of `ids` of at least `shortest` tokens, longest stretches first.

        most   documents named for one stretch; where more hold it, these are the first of the corpus

        Raises RequestError for `shortest` below what the index can promise to find.
        """
        if shortest < SHORTEST:
            raise RequestError(
                f"shortest = {shortest}: spans under {SHORTEST} tokens may be missed; ask for {SHORTEST}"
            )
        query = np.asarray(ids, np.int32)
        if len(query) < shortest:
            return []
        prints = ngram_hashes(query, K)
        found: dict[tuple[int, int], Span] = {}
        for at in _winnow(prints).tolist():
            # Boilerplate: what enough documents are known to hold needs no further ones.
            if sum(span.start <= at and at + K <= span.stop for span in found.values()) >= most:
                continue
            for place in self._places(prints[at], query, at):
                span = self._extend(query, at, place)
                if span.stop - span.start >= shortest:
                    found.setdefault((span.document, span.place - span.start), span)
        spans = sorted(found.values(), key=lambda s: (s.start - s.stop, s.start, s.document, s.place))
        return _limit(spans, most)

    def _places(self, fingerprint: np.uint64, query: Ids, at: int) -> list[int]:
        """Where the window at `at` stands in the corpus; at most MOST_PLACES, those that share most of what is around
        it, and of equal ones the first."""
        bits = (len(self.first) - 1).bit_length() - 1
        head = int(fingerprint >> np.uint64(64 - bits))
        bucket = self.places[self.first[head] : self.first[head + 1]].astype(np.int64)
        flat = self.documents.ids
        if len(bucket) > MOST_PLACES:
            # Ordered by fingerprint: a binary search over fingerprints that are made on the spot.
            low = _bisect(flat, bucket, fingerprint)
            high = _bisect(flat, bucket, fingerprint, after=True)
            bucket = bucket[low : min(high, low + MOST_LOOKED_AT)]
        bucket = bucket[(flat[bucket[:, None] + np.arange(K)] == query[at : at + K]).all(axis=1)]
        if len(bucket) > MOST_PLACES:
            longest = np.argsort(-self._shared(query, at, bucket), kind="stable")[:MOST_PLACES]
            bucket = bucket[np.sort(longest)]
        return bucket.tolist()

    def _shared(self, query: Ids, at: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many tokens around the window each place has in common with the query, inside its document."""
        starts, flat = self.documents.starts, self.documents.ids
        document = np.searchsorted(starts, places, "right") - 1
        begin, end = starts[document], starts[document + 1]
        shared = np.zeros(len(places), np.int64)
        for steps in (range(-1, -at - 1, -1), range(K, len(query) - at)):
            alive = np.arange(len(places))
            for step in steps:
                spot = places[alive] + step
                inside = (begin[alive] <= spot) & (spot < end[alive])
                alive, spot = alive[inside], spot[inside]
                alive = alive[flat[spot] == query[at + step]]
                if not len(alive):
                    break
                shared[alive] += 1
        return shared

    def _extend(self, query: Ids, at: int, place: int) -> Span:
        """The whole common stretch around a common window, inside one document."""
        starts = self.documents.starts
        document = int(np.searchsorted(starts, place, "right")) - 1
        begin, end = int(starts[document]), int(starts[document + 1])
        flat = self.documents.ids
        left = min(at, place - begin)
        before = _common(query[at - left : at][::-1], flat[place - left : place][::-1])
        right = min(len(query) - at, end - place)
        after = _common(query[at : at + right], flat[place : place + right])
        return Span(start=at - before, stop=at + after, document=document, place=place - before - begin)


def _winnow(prints: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Places of the smallest fingerprint (the last of equal ones) of every W neighbours; of all, if there are fewer."""
    if len(prints) == 0:
        return np.zeros(0, np.int64)
    if len(prints) < W:
        return np.array([len(prints) - 1 - int(prints[::-1].argmin())])
    count = len(prints) - W + 1
    best, place = prints[:count].copy(), np.arange(count)
    for i in range(1, W):
        smaller = prints[i : i + count] <= best
        np.copyto(best, prints[i : i + count], where=smaller)
        place[smaller] = np.flatnonzero(smaller) + i
    return np.unique(place)


def _bisect(flat: Ids, bucket: NDArray[np.int64], fingerprint: np.uint64, *, after: bool = False) -> int:
    """First place of a bucket whose window's fingerprint is not below `fingerprint`, or is above it (`after`)."""
    low, high = 0, len(bucket)
    while low < high:
        middle = (low + high) // 2
        at = int(bucket[middle])
        found = ngram_hashes(flat[at : at + K], K)[0]
        if found < fingerprint or (after and found == fingerprint):
            low = middle + 1
        else:
            high = middle
    return low


def _common(a: Ids, b: Ids) -> int:
    """How many tokens two stretches of equal length begin with in common."""
    differ = a != b
    return int(differ.argmax()) if differ.any() else len(a)


def _limit(spans: list[Span], most: int) -> list[Span]:
    """Longest first: at most so many documents for a stretch of the query, none for what a longer stretch covers."""
    kept: list[Span] = []
    for span in spans:
        over = [o for o in kept if o.start <= span.start and span.stop <= o.stop]
        longer = any(o.stop - o.start > span.stop - span.start for o in over)
        if not longer and len(over) < most and all(o.document != span.document for o in over):
            kept.append(span)
    return kept
