"""Sources: order, hashes, held-out documents, and what cannot be read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from glasklar.data.documents import JsonlSource, StdlibSource, TextSource, held_out, read_documents
from glasklar.errors import DataError
from glasklar.provenance.hashing import merkle_root


def root(source: TextSource) -> str:
    return merkle_root(document.hash for document in read_documents(source))


def test_two_builds_in_another_order_give_one_root(tmp_path: Path) -> None:
    texts = {f"{i:02d}.txt": f"text number {i}" for i in range(40)}
    roots = set()
    for seed in range(3):
        folder = tmp_path / str(seed) / "notes"
        folder.mkdir(parents=True)
        names = list(texts)
        random.Random(seed).shuffle(names)
        for name in names:
            (folder / name).write_text(texts[name])
        roots.add(root(TextSource(path=str(folder))))
    assert len(roots) == 1
    (tmp_path / "0" / "notes" / "07.txt").write_text("text number 7.")
    assert root(TextSource(path=str(tmp_path / "0" / "notes"))) not in roots


def test_equal_texts_stand_once_and_the_first_name_stays(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.txt"):
        (tmp_path / name).write_text("same")
    [document] = read_documents(TextSource(path=str(tmp_path)))
    assert document.origin == "a.txt"


def test_held_out_depends_on_the_text_alone(tmp_path: Path) -> None:
    for i in range(400):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    documents = read_documents(TextSource(path=str(tmp_path)))
    kept = [document.text for document in documents if held_out(document, 0.1)]
    assert 20 < len(kept) < 60
    assert set(kept) <= {document.text for document in documents if held_out(document, 0.2)}


def test_standard_library_without_its_tests() -> None:
    documents = read_documents(StdlibSource())
    origins = {document.origin for document in documents}
    assert "json/decoder.py" in origins
    assert not any("/test" in f"/{origin}" for origin in origins if origin.startswith("test"))
    assert {document.licence for document in documents} == {"PSF-2.0"}
    assert len(documents) > 300


@pytest.mark.parametrize(
    ("prepare", "source", "words"),
    [
        (lambda p: None, {"path": "nowhere"}, "'.*nowhere' does not exist"),
        (lambda p: None, {}, "holds no text"),
        (lambda p: (p / "a.txt").write_text(" \n"), {}, "holds no text"),
        (lambda p: (p / "a.txt").write_bytes(b"abc\xff"), {}, r"a\.txt: not UTF-8 at byte 3"),
        (lambda p: (p / "a.txt").write_text("x" * 100), {"max_bytes": 10}, "100 bytes exceed max_bytes = 10"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, prepare, source: dict, words: str) -> None:
    prepare(tmp_path)
    where = str(tmp_path / source.pop("path", ""))
    with pytest.raises(DataError, match=words):
        read_documents(TextSource(path=where, **source))


def test_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert {d.text for d in read_documents(JsonlSource(path=str(tmp_path)))} == {"one", "two"}
    for line, words in (("{", "line 3"), ('{"body": "x"}', "'text'"), ('{"text": 3}', "is int, not text")):
        (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n' + line)
        with pytest.raises(DataError, match=words):
            read_documents(JsonlSource(path=str(tmp_path / "a.jsonl")))
