"""Figures of every step as JSON lines. Cut back on resume, so that each step stands in it once."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypedDict

from glasklar.errors import CheckpointError
from glasklar.provenance.files import sync, write_all, write_atomic, writing
from glasklar.provenance.hashing import strict_json


class Mark(TypedDict):
    """A place in the metrics: number of lines up to it and the SHA-256 of their bytes. Kept in `checkpoint` events."""

    lines: int
    sha256: str


START: Mark = {"lines": 0, "sha256": hashlib.sha256().hexdigest()}


class Metrics:
    """The metrics of a run, open for writing.

    Lines since the last `mark` are lost if the machine loses power, never if only the process dies: a run goes on
    from a checkpoint, and there is a mark at each.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest = hashlib.sha256()
        self._lines = 0
        if path.exists():
            content = path.read_bytes()
            complete = content[: content.rfind(b"\n") + 1]
            if complete != content:
                write_atomic(path, complete)
            self._count(complete)

    def append(self, line: dict[str, Any]) -> None:
        """Raises CapacityError or CheckpointError; the file is then as before."""
        content = json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with writing(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                length = os.fstat(descriptor).st_size
                try:
                    write_all(descriptor, content)
                except OSError:
                    os.ftruncate(descriptor, length)
                    raise
            finally:
                os.close(descriptor)
        self._count(content)

    def mark(self) -> Mark:
        """This place, after everything up to it is on the disk."""
        if self._lines:
            with writing(self.path):
                sync(self.path)
        return {"lines": self._lines, "sha256": self._digest.hexdigest()}

    def cut(self, mark: Mark) -> None:
        """Takes out all lines after `mark`. Raises CheckpointError where the lines before it are not those marked."""
        content = self.path.read_bytes() if self.path.exists() else b""
        kept = b"".join(content.splitlines(keepends=True)[: mark["lines"]])
        if hashlib.sha256(kept).hexdigest() != mark["sha256"]:
            raise CheckpointError(
                f"{self.path}: the first {mark['lines']} lines are not those of the checkpoint; "
                "restore the file from a copy, or start a new run with another --run"
            )
        if kept != content:
            write_atomic(self.path, kept)
        self._digest, self._lines = hashlib.sha256(), 0
        self._count(kept)

    def _count(self, content: bytes) -> None:
        self._digest.update(content)
        self._lines += content.count(b"\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines; none where there is no file yet. Raises CheckpointError naming a line that is not JSON."""
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            lines.append(strict_json(line))
        except ValueError:
            raise CheckpointError(f"{path}: line {number} is not JSON; restore the file from a copy") from None
    return lines
