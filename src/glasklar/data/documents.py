"""Sources to documents: text folders, JSON lines, Python's standard library. Their order is their content's."""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from pydantic import Field

from glasklar.config import Section
from glasklar.errors import DataError
from glasklar.provenance.hashing import leaf_hash

# Part of the standard library's folder, but not of what one reads it for.
NOT_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")


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
        return leaf_hash(asdict(self))


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


class StdlibSource(Section):
    """The source of the Python standard library of this machine, without its tests: real text that is everywhere."""

    kind: Literal["stdlib"] = "stdlib"
    max_bytes: int = Field(default=1 << 20, ge=1)


def read_documents(source: TextSource | JsonlSource | StdlibSource) -> list[Document]:
    """All documents of a source, by content hash, exact duplicates of a text once (the first origin by name stays).

    Raises DataError for a missing path, an unreadable file, text that is not UTF-8, a source that holds nothing.
    """
    match source:
        case TextSource():
            found = _text_files(source)
        case JsonlSource():
            found = _json_lines(source)
        case StdlibSource():
            found = _standard_library(source)
    by_text: dict[str, Document] = {}
    for document in sorted(found, key=lambda document: document.origin):
        if document.text.strip():
            by_text.setdefault(document.text, document)
    if not by_text:
        raise DataError(f"source {source.model_dump()}: holds no text; check path and globs")
    return sorted(by_text.values(), key=lambda document: document.hash)


def held_out(document: Document, share: float) -> bool:
    """Whether a document is kept from training: decided by its text alone, so that no other order or mix changes it."""
    digest = hashlib.sha256(b"held out\n" + document.text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _text_files(source: TextSource) -> Iterator[Document]:
    folder = _existing(source.path)
    for path in _files(folder):
        relative = path.relative_to(folder).as_posix()
        if any(fnmatch(path.name, glob) or fnmatch(relative, glob) for glob in source.globs):
            text = _read(path, source.max_bytes)
            yield Document(text, f"text:{folder.name}", source.licence, source.date, relative)


def _json_lines(source: JsonlSource) -> Iterator[Document]:
    place = _existing(source.path)
    files = [place] if place.is_file() else [path for path in _files(place) if path.suffix == ".jsonl"]
    for path in files:
        for number, line in enumerate(_read(path, None).splitlines(), start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[source.field]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}: line {number} is no JSON object with {source.field!r} ({error!r})") from None
            if not isinstance(text, str):
                raise DataError(f"{path}: line {number}: {source.field!r} is {type(text).__name__}, not text")
            yield Document(text, f"jsonl:{path.name}", source.licence, source.date, f"{path.name}:{number:09d}")


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
