"""A run's metrics for the page, read on as they grow."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from glasklar.provenance.rundir import RunDir


class RunNews:
    """Lines of metrics.jsonl by number. A run that is resumed cuts its file back; then reading starts anew."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self._path = RunDir(folder).metrics_file
        self._lines: list[dict[str, Any]] = []
        self._read = 0
        self._lock = threading.Lock()

    def after(self, since: int) -> dict[str, Any]:
        """{"lines": those from number `since` on, "next": the number to ask for next time}. A `since` beyond the end
        (the file was cut back) gets everything, and `next` tells by how much."""
        with self._lock:
            self._go_on()
            lines = self._lines if since > len(self._lines) else self._lines[since:]
            return {"lines": lines, "next": len(self._lines)}

    def _go_on(self) -> None:
        size = self._path.stat().st_size if self._path.exists() else 0
        if size < self._read:
            self._lines, self._read = [], 0
        if size == self._read:
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            content = file.read(size - self._read)
        complete = content[: content.rfind(b"\n") + 1]
        self._lines += [json.loads(line) for line in complete.splitlines()]
        self._read += len(complete)
