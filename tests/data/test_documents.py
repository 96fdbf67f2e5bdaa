"""Sources: order, hashes, held-out documents, and what cannot be read."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from glasklar.data.documents import (
    HubSource,
    JsonlSource,
    ParquetSource,
    StdlibSource,
    TextSource,
    held_out,
    read_documents,
    read_source,
)
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


def test_a_line_separator_inside_a_json_line_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two\x85"}\n{"text": "three"}\n', encoding="utf-8")
    assert {d.text for d in read_documents(JsonlSource(path=str(tmp_path)))} == {"one\u2028two\x85", "three"}


def test_repeated_texts_are_listed_with_what_stays(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text("same")
    [stays], [removed] = read_source(TextSource(path=str(tmp_path)))
    record = removed.record()
    assert (record["origin"], record["reason"], record["because_of"]) == ("b.txt", "duplicate", stays.hash.hex())
    assert "text" not in record


TEXTS = [f"row number {i} of the table" for i in range(20)]


def write_parquet(path: Path, texts: list[str | None]) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    parquet.write_table(table, path, row_group_size=7)


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", [*TEXTS[:9], None])
    write_parquet(tmp_path / "in" / "deep" / "b.parquet", TEXTS[9:])
    (tmp_path / "in" / "readme.md").write_text("no table")
    documents = read_documents(ParquetSource(path=str(tmp_path / "in"), licence="CC0-1.0"))
    assert sorted(d.text for d in documents) == sorted(TEXTS)
    ninth = next(d for d in documents if d.text == TEXTS[8])
    assert (ninth.source, ninth.origin, ninth.licence) == ("parquet:a.parquet", "a.parquet:000000009", "CC0-1.0")


@pytest.mark.parametrize(
    ("content", "field", "wanted"),
    [
        (b"no table", "text", "no readable Parquet file"),
        (None, "body", "only id, text"),
        (None, "id", "int64, not text"),
    ],
)
def test_what_is_wrong_with_a_parquet_file_is_said(
    tmp_path: Path, content: bytes | None, field: str, wanted: str
) -> None:
    write_parquet(tmp_path / "a.parquet", list(TEXTS))
    if content is not None:
        (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=wanted):
        read_documents(ParquetSource(path=str(tmp_path), field=field))


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install glasklar\[parquet\]"):
        read_documents(ParquetSource(path=str(tmp_path)))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_data_set_of_the_hub_comes_from_its_cache_at_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "datasets--org--tables" / "snapshots" / COMMIT
    write_parquet(snapshot / "data" / "train-0.parquet", list(TEXTS))
    write_parquet(snapshot / "data" / "test-0.parquet", ["never to be trained on"])
    (snapshot / "more.jsonl").write_text('{"text": "a line"}\n')
    source = HubSource(id="org/tables", revision=COMMIT, globs=("data/train-*.parquet", "*.jsonl"))
    documents = read_documents(source)
    assert {d.text for d in documents} == {*TEXTS, "a line"}
    assert {d.source for d in documents} == {f"hub:org/tables@{COMMIT}"}
    with pytest.raises(DataError, match=f"hf download --repo-type dataset org/tables --revision {COMMIT[:-1]}8"):
        read_documents(source.replace(revision=f"{COMMIT[:-1]}8"))


@pytest.mark.parametrize("revision", ["main", "v1.0", COMMIT[:12]])
def test_a_branch_is_no_commit(revision: str) -> None:
    with pytest.raises(ValueError, match="revision"):
        HubSource(id="org/tables", revision=revision)
