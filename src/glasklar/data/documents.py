"""Sources to documents: text folders, JSON lines, Parquet, data sets of the hub, Python's standard library.

Their order is their content's: neither the order of files nor that of directories matters.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from glasklar.config import Section
from glasklar.errors import DataError
from glasklar.provenance.hashing import SourceTrees, leaf_hash

# Part of the standard library's folder, but not of what one reads it for.
NOT_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")


Reason = Literal["duplicate", "near-duplicate", "evaluation overlap"]


@dataclass(frozen=True)
class Document:
    """One document and where it comes from; all of it is under its hash.

    origin   place inside the source: a relative path, a line number
    date     of the source, ISO 8601, or "" where it has none
    """

    text: str
    source: str
    licence: str
    date: str
    origin: str

    @property
    def hash(self) -> bytes:
        return leaf_hash(self.record())

    def record(self) -> dict[str, str]:
        """What is under its hash. (`asdict` would copy the text: a fifth of the time to prepare a corpus.)"""
        return {
            "text": self.text, "source": self.source, "licence": self.licence, "date": self.date, "origin": self.origin
        }  # fmt: skip


def document_trees(documents: Iterable[Document]) -> SourceTrees:
    """One root over documents, whatever their order; each source has a tree of its own."""
    leaves: dict[str, list[bytes]] = {}
    for document in documents:
        leaves.setdefault(document.source, []).append(document.hash)
    return SourceTrees(leaves)


@dataclass(frozen=True, kw_only=True)
class Removed:
    """A document that is not trained on, and why.

    because_of   hash of the document that stays in its place, or name of the evaluation text that it overlaps with
    detail       how near, or the words in question
    """

    document: Document
    reason: Reason
    because_of: str
    detail: str = ""

    def record(self) -> dict[str, str]:
        """What is listed: everything but the text."""
        named = self.document.record() | {"document": self.document.hash.hex(), "reason": self.reason}
        return {name: value for name, value in named.items() if name != "text"} | {
            "because_of": self.because_of,
            "detail": self.detail,
        }


class TextSource(Section):
    """Every file below `path` that matches one of `globs` is a document."""

    kind: Literal["text"] = "text"
    path: str
    globs: tuple[str, ...] = ("*.txt", "*.md")
    licence: str = "unknown"
    date: str = ""
    max_bytes: int = Field(default=1 << 24, ge=1)


class JsonlSource(Section):
    """Every line of the files at `path` (a file, or a folder with *.jsonl) is a document; its text is in `field`."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    field: str = "text"
    licence: str = "unknown"
    date: str = ""


class ParquetSource(Section):
    """Every row of the files at `path` (a file, or a folder with *.parquet) is a document; its text is in `field`.

    Needs pyarrow: `pip install glasklar[parquet]`.
    """

    kind: Literal["parquet"] = "parquet"
    path: str
    field: str = "text"
    licence: str = "unknown"
    date: str = ""


class HubSource(Section):
    """A data set of the Hugging Face hub at one commit, out of the hub's cache on this machine.

    Training reaches no network; the files come beforehand, when somebody says so:
    `hf download --repo-type dataset ID --revision COMMIT`. Needs huggingface_hub and, for Parquet files, pyarrow:
    `pip install glasklar[hub,parquet]`.

    globs    files to take, by their place in the data set: *.parquet and *.jsonl are understood
    """

    kind: Literal["hub"] = "hub"
    id: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    globs: tuple[str, ...] = ("*.parquet", "*.jsonl")
    field: str = "text"
    licence: str = "unknown"
    date: str = ""


class StdlibSource(Section):
    """The source of the Python standard library of this machine, without its tests: real text that is everywhere."""

    kind: Literal["stdlib"] = "stdlib"
    max_bytes: int = Field(default=1 << 20, ge=1)


AnySource = TextSource | JsonlSource | ParquetSource | HubSource | StdlibSource


def read_documents(source: AnySource) -> list[Document]:
    """The documents of a source, by content hash, each text once. Errors as `read_source`."""
    return read_source(source)[0]


def read_source(source: AnySource) -> tuple[list[Document], list[Removed]]:
    """All documents of a source, by content hash, exact duplicates of a text once (the first origin by name stays);
    and the duplicates.

    Raises DataError for a missing path, an unreadable file, text that is not UTF-8, a source that holds nothing, a
    library that is needed and not installed.
    """
    found = _documents(source)
    by_text: dict[str, Document] = {}
    again: list[Removed] = []
    for document in sorted(found, key=lambda document: document.origin):
        if not document.text.strip():
            continue
        first = by_text.setdefault(document.text, document)
        if first is not document:
            again.append(Removed(document=document, reason="duplicate", because_of=first.hash.hex()))
    if not by_text:
        raise DataError(_nothing(source))
    return sorted(by_text.values(), key=lambda document: document.hash), again


def check_source(source: AnySource) -> None:
    """Reads a source's first document. Raises DataError where `read_source` would for it or for what leads to it."""
    if next(_documents(source), None) is None:
        raise DataError(_nothing(source))


def _documents(source: AnySource) -> Iterator[Document]:
    match source:
        case TextSource():
            return _text_files(source)
        case JsonlSource():
            return _json_lines(source)
        case ParquetSource():
            return _parquet(source)
        case HubSource():
            return _hub(source)
        case StdlibSource():
            return _standard_library(source)


def _nothing(source: AnySource) -> str:
    """What to say of a source without text."""
    place = getattr(source, "path", None) or getattr(source, "id", source.kind)
    if isinstance(source, TextSource | HubSource):
        globs = ", ".join(source.globs)
        return f"source {place!r} ({source.kind}): holds no text in files that match {globs}; check path and globs"
    return f"source {place!r} ({source.kind}): holds no text; check its path"


def evaluation_texts(path: str) -> Iterator[tuple[str, str]]:
    """Name and text of every evaluation text of a file: all text of each JSON line, or each line of plain text.

    Raises DataError where the file is missing, unreadable or not JSON.
    """
    place = _existing(path)
    if not place.is_file():
        raise DataError(f"evaluations {path!r}: is a folder; name its files")
    for number, line in enumerate(_read(place, None).split("\n"), start=1):
        if not line.strip():
            continue
        if place.suffix == ".jsonl":
            try:
                line = " ".join(_texts(json.loads(line)))
            except ValueError as error:
                raise DataError(f"{place}: line {number} is no JSON ({error})") from None
        yield f"{place.name}, line {number}", line


def _texts(value: Any) -> Iterator[str]:
    """All text inside a JSON value, in its order."""
    match value:
        case str():
            yield value
        case dict() | list():
            for inner in value.values() if isinstance(value, dict) else value:
                yield from _texts(inner)


def held_out(document: Document, share: float) -> bool:
    """Whether a document is kept from training: decided by its text alone, so that no other order or mix changes it."""
    digest = hashlib.sha256(b"held out\n" + document.text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _text_files(source: TextSource) -> Iterator[Document]:
    folder = _existing(source.path)
    for path in _files(folder):
        relative = path.relative_to(folder).as_posix()
        if _matches(relative, source.globs):
            text = _read(path, source.max_bytes)
            yield Document(text, f"text:{folder.name}", source.licence, source.date, relative)


def _json_lines(source: JsonlSource) -> Iterator[Document]:
    place = _existing(source.path)
    files = [place] if place.is_file() else [path for path in _files(place) if path.suffix == ".jsonl"]
    for path in files:
        for number, text in _lines(path, source.field):
            yield Document(text, f"jsonl:{path.name}", source.licence, source.date, f"{path.name}:{number:09d}")


def _parquet(source: ParquetSource) -> Iterator[Document]:
    place = _existing(source.path)
    files = [place] if place.is_file() else [path for path in _files(place) if path.suffix == ".parquet"]
    for path in files:
        for number, text in _rows(path, source.field):
            yield Document(text, f"parquet:{path.name}", source.licence, source.date, f"{path.name}:{number:09d}")


def _hub(source: HubSource) -> Iterator[Document]:
    folder = _snapshot(source)
    for path in _files(folder):
        relative = path.relative_to(folder).as_posix()
        if path.suffix not in (".parquet", ".jsonl") or not _matches(relative, source.globs):
            continue
        read = _rows if path.suffix == ".parquet" else _lines
        for number, text in read(path, source.field):
            name = f"hub:{source.id}@{source.revision}"
            yield Document(text, name, source.licence, source.date, f"{relative}:{number:09d}")


def _snapshot(source: HubSource) -> Path:
    """Where the hub's cache holds the data set."""
    fetch = f"hf download --repo-type dataset {source.id} --revision {source.revision}"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        raise DataError(
            f"source {source.id!r}: data sets of the hub need huggingface_hub; run: pip install glasklar[hub,parquet]"
        ) from None
    try:
        return Path(snapshot_download(source.id, repo_type="dataset", revision=source.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        raise DataError(f"source {source.id!r}: its files are not on this machine; fetch them with: {fetch}") from None


def _lines(path: Path, field: str) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of every line of a JSON lines file."""
    for number, line in enumerate(_read(path, None).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}: line {number} is no JSON ({error}); mend it or take it out") from None
        if not isinstance(found, dict) or field not in found:
            names = ", ".join(map(repr, found)) if isinstance(found, dict) else f"no object but {line[:40]}"
            raise DataError(f"{path}: line {number} has no {field!r}, only {names}; name one as field")
        text = found[field]
        if not isinstance(text, str):
            raise DataError(f"{path}: line {number}: {field!r} is {type(text).__name__}, not text")
        yield number, text


def _rows(path: Path, field: str) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of every row of a Parquet file; rows without text are left out."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: Parquet needs pyarrow; run: pip install glasklar[parquet]") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise DataError(f"{path}: has no column {field!r}, only {', '.join(columns)}; name one as field")
            kind = file.schema_arrow.field(field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(f"{path}: column {field!r} is {kind}, not text")
            for batch in file.iter_batches(columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if text is not None:
                        yield number, text
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: no readable Parquet file ({error}); convert it or fetch it again") from None


def _standard_library(source: StdlibSource) -> Iterator[Document]:
    folder = Path(sysconfig.get_path("stdlib"))
    name = f"python-stdlib-{platform.python_version()}"
    for path in _files(folder):
        relative = path.relative_to(folder)
        if path.suffix != ".py" or any(part in NOT_LIBRARY for part in relative.parts):
            continue
        if path.stat().st_size <= source.max_bytes:
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a handful of files declare another encoding to test the decoder
            yield Document(text, name, "PSF-2.0", "", relative.as_posix())


def _matches(relative: str, globs: tuple[str, ...]) -> bool:
    name = relative.rpartition("/")[2]
    return any(fnmatch(name, glob) or fnmatch(relative, glob) for glob in globs)


def _existing(path: str) -> Path:
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(f"source path {path!r} does not exist; give an absolute path, or one relative to where you are")
    return place


def _files(folder: Path) -> Iterable[Path]:
    if folder.is_file():
        return [folder]
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _read(path: Path, max_bytes: int | None) -> str:
    if max_bytes is not None and path.stat().st_size > max_bytes:
        raise DataError(
            f"{path}: {path.stat().st_size} bytes exceed max_bytes = {max_bytes}; raise it or exclude the file"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; convert the file or exclude it by globs") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
