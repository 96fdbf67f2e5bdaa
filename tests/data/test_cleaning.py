"""Near-duplicates and leaks of evaluations are found, by rules that know no order of arrival."""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import replace

import pytest

from glasklar.data.cleaning import Cleaning, near_duplicates, overlaps
from glasklar.data.documents import Document
from glasklar.data.ngrams import words

VOCABULARY = ["".join(pair) for pair in itertools.product("bcdfglmnprst", ("a", "ei", "on", "us"), repeat=1)]
VOCABULARY = [a + b for a in VOCABULARY for b in VOCABULARY]


def text(rng: random.Random, length: int = 200) -> str:
    return " ".join(rng.choices(VOCABULARY, k=length))


def document(content: str, origin: str = "a") -> Document:
    return Document(text=content, source="text:notes", licence="CC0-1.0", date="", origin=origin)


def changed(rng: random.Random, content: str, places: int) -> str:
    """Some words exchanged, letters made large, punctuation added."""
    parts = content.split()
    for place in rng.sample(range(len(parts)), places):
        parts[place] = rng.choice(VOCABULARY)
    return ", ".join(parts).upper()


@functools.cache
def runs_of_words(content: str) -> set[tuple[str, ...]]:
    parts = words(content)
    return {tuple(parts[i : i + 5]) for i in range(len(parts) - 4)}


def jaccard(a: str, b: str) -> float:
    """The definition, on sets of words."""
    one, other = runs_of_words(a), runs_of_words(b)
    return len(one & other) / len(one | other)


def collection() -> list[Document]:
    """300 texts of their own and 100 more that are near to some of them, at all distances."""
    rng = random.Random(1)
    own = [text(rng) for _ in range(300)]
    near = [changed(rng, own[i % 50], i % 10) for i in range(100)]
    return [document(content, f"{i:03d}") for i, content in enumerate([*own, *near])]


def test_what_stays_is_pairwise_far_and_what_goes_is_near_to_what_stays() -> None:
    stay, gone = near_duplicates(collection(), 0.8)
    assert all(jaccard(a.text, b.text) < 0.8 for a, b in itertools.combinations(stay, 2))
    kept = {each.hash.hex(): each for each in stay}
    for removed in gone:
        similarity = jaccard(kept[removed.because_of].text, removed.document.text)
        assert similarity >= 0.8
        assert removed.detail.startswith(f"{similarity:.3f} ")
        assert kept[removed.because_of].hash < removed.document.hash
    assert len(stay) + len(gone) == 400
    assert 30 < len(gone) < 100


def test_neither_order_nor_workers_change_what_stays() -> None:
    documents = collection()
    wanted = near_duplicates(documents, 0.8)
    for seed, workers in ((1, 1), (2, 2), (3, 3), (4, 16)):
        shuffled = random.Random(seed).sample(documents, len(documents))
        stay, gone = near_duplicates(shuffled, 0.8, workers)
        assert (set(stay), gone) == (set(wanted[0]), wanted[1])
        assert stay == [each for each in shuffled if each in stay]


def test_case_and_punctuation_do_not_make_another_document() -> None:
    one = document("The quick brown fox jumps over the lazy dog.")
    two = document("the quick -- brown fox: jumps over THE lazy dog", "b")
    stay, [removed] = near_duplicates([one, two], 1.0)
    assert stay == [min(one, two, key=lambda each: each.hash)]
    assert removed.reason == "near-duplicate"


def test_short_and_wordless_texts() -> None:
    documents = [document(t, str(i)) for i, t in enumerate(["one two", "One, two", "one three", "...", "!!!"])]
    stay, gone = near_duplicates(documents, 0.8)
    assert len(gone) == 1
    assert {"one three", "...", "!!!"} < {each.text for each in stay}


def test_many_copies_leave_one() -> None:
    rng = random.Random(4)
    content = text(rng)
    copies = [replace(document(content), origin=f"{i:04d}") for i in range(500)]
    stay, gone = near_duplicates(copies, 0.8)
    assert stay == [min(copies, key=lambda each: each.hash)]
    assert len(gone) == 499


@pytest.mark.parametrize(("shared", "goes"), [(11, False), (12, True), (40, True)])
def test_twelve_words_of_an_evaluation_are_a_leak(shared: int, goes: bool) -> None:
    rng = random.Random(5)
    question = text(rng, 60)
    piece = " ".join(question.split()[7 : 7 + shared])
    documents = [document(text(rng)), document(f"{text(rng, 50)} {piece.title()}! {text(rng, 50)}", "b")]
    stay, gone = overlaps(documents, [("other", text(rng)), ("exam, question 1", question)], Cleaning())
    assert stay == (documents[:1] if goes else documents)
    if goes:
        [removed] = gone
        assert (removed.reason, removed.because_of) == ("evaluation overlap", "exam, question 1")
        assert removed.detail == " ".join(piece.split()[:12])


def test_a_phrase_that_many_documents_hold_is_no_leak() -> None:
    rng = random.Random(6)
    phrase = text(rng, 14)
    leak = text(rng, 14)
    documents = [document(f"{text(rng, 30)} {phrase} {text(rng, 30)}", str(i)) for i in range(11)]
    documents[3] = replace(documents[3], text=f"{documents[3].text} {leak}")
    evaluation = [("exam", f"{phrase} {text(rng, 5)} {leak}")]
    stay, [removed] = overlaps(documents, evaluation, Cleaning(common=10))
    assert removed.document == documents[3]
    assert removed.detail == " ".join(leak.split()[:12])
    assert overlaps(documents, evaluation, Cleaning(common=11))[0] == []
    assert overlaps(documents, evaluation, Cleaning(common=10), workers=3)[0] == stay


def test_signs_without_blanks_are_words() -> None:
    assert words("Straße 12, 東京タワー!") == ["strasse", "12", *"東京タワ", "ー"]
