"""The run folder: what lies where, who may write to it, and that it belongs to one recipe.

RUN/
  recipe.toml       the recipe as its author wrote it
  recipe.json       the same in canonical form, defaults spelled out: what the run is identified by
  ledger.jsonl      hash-chained events
  metrics.jsonl     figures of every step
  checkpoints/      one folder a checkpoint
  model/            the released model
  report.md, report.html
  dossier/          documents about the model
  attestation.json  signed statement over all files above
  replays.jsonl     signed statements of whoever replayed a part of the training
  .lock             held, with the process id in it, by the one process that writes
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from glasklar.errors import CheckpointError
from glasklar.provenance.files import sweep, write_all, write_atomic, writing
from glasklar.provenance.ledger import Ledger
from glasklar.provenance.metrics import Metrics

ATTESTATION = "attestation.json"  # of a run, and of a model's folder
_ABSENT = object()


def home(environ: Mapping[str, str], system: str = sys.platform) -> Path:
    """Where user data live: $GLASKLAR_HOME, otherwise the platform's data folder."""
    if environ.get("GLASKLAR_HOME"):
        return Path(environ["GLASKLAR_HOME"]).expanduser()
    if system == "darwin":
        return Path.home() / "Library" / "Application Support" / "glasklar"
    return Path(environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "glasklar"


def default_run(name: str, environ: Mapping[str, str]) -> Path:
    """The run folder of a recipe that was not given another."""
    return home(environ) / "runs" / name


def write_json(path: Path, value: Any) -> None:
    """A JSON file of a run, laid out for people, replaced in one step. Raises CapacityError or CheckpointError."""
    write_atomic(path, json_text(value))


def json_text(value: Any) -> bytes:
    """JSON laid out for people. Raises ValueError for NaN and infinities."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2).encode() + b"\n"


class RunDir:
    """A run folder. `RunDir(path)` only names the places; `create_or_open` takes the lock and gives the writers."""

    ledger: Ledger
    metrics: Metrics

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def identity_file(self) -> Path:
        return self.path / "recipe.json"

    @property
    def ledger_file(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def dossier(self) -> Path:
        return self.path / "dossier"

    @property
    def attestation_file(self) -> Path:
        return self.path / ATTESTATION

    @property
    def replays_file(self) -> Path:
        return self.path / "replays.jsonl"

    @property
    def report_md(self) -> Path:
        return self.path / "report.md"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"

    @classmethod
    def create_or_open(cls, path: Path, recipe_canonical: str, recipe_toml: str) -> Self:
        """The folder of a run of this recipe, locked until `close`.

        recipe_canonical    `Section.canonical()` of the recipe
        recipe_toml         the recipe as written

        Raises CheckpointError where the folder holds a run of another recipe or something else, is in use or cannot
        be written; CapacityError where the disk is full. Nothing that was there is overwritten.
        """
        run = cls(path)
        run._make()
        run._take_lock()
        try:
            run._claim(recipe_canonical, recipe_toml)
            for folder in (run.path, run.checkpoints):
                sweep(folder)
            run.ledger = Ledger(run.ledger_file)
            run.metrics = Metrics(run.metrics_file)
        except BaseException:
            run.close()
            raise
        return run

    def close(self) -> None:
        """Gives the lock back. The lock file stays, empty: removing it would let two processes lock different files."""
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def withdraw(self) -> None:
        """Takes out all that a run put into its folder, for one that came to nothing; call it with the lock held."""
        with writing(self.path):
            for folder in (path for path in (self.data, self.checkpoints) if path.exists()):
                shutil.rmtree(folder)
            for path in (self.identity_file, self.recipe_file, self.ledger_file, self.metrics_file):
                path.unlink(missing_ok=True)

    def writer(self) -> str | None:
        """Id of the process that has the lock now ("unknown" if it does not say); None if nobody writes."""
        try:
            lock = os.open(self.path / ".lock", os.O_RDONLY)
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(lock)
        finally:
            os.close(lock)
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def recipe(self) -> dict[str, Any]:
        """The recipe of this run, defaults spelled out. Raises CheckpointError where this is no run folder."""
        try:
            return json.loads(self.identity_file.read_bytes())
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: not a run folder: {self.identity_file.name} is missing") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.identity_file}: cannot be read ({error}); restore it from a copy") from None

    def _make(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{self.path}: is a file, not a run folder; choose another --run")
        known = {self.recipe_file.name, ".lock"}
        if self.path.is_dir() and not self.identity_file.exists():
            strange = sorted(
                p.name for p in self.path.iterdir() if p.name not in known and not p.name.startswith(".tmp-")
            )
            if strange:
                raise CheckpointError(
                    f"{self.path}: not a run folder, and not empty ({strange[0]!r} lies in it); choose another --run"
                )
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    def _take_lock(self) -> None:
        path = self.path / ".lock"
        with writing(path):
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(self._lock)
            os.close(self._lock)
            self._lock = None
            raise CheckpointError(
                f"{self.path}: in use by process {holder}; wait for it, stop it, or choose another --run"
            ) from None
        with writing(path):
            os.ftruncate(self._lock, 0)
            write_all(self._lock, f"{os.getpid()}\n".encode())

    def _claim(self, recipe_canonical: str, recipe_toml: str) -> None:
        """Writes the recipe into a new folder; in an old one makes sure that it is the same."""
        if self.identity_file.exists():
            difference = next(differences(self.recipe(), json.loads(recipe_canonical)), None)
            if difference:
                raise CheckpointError(
                    f"{self.path}: holds a run of another recipe: {difference}; choose another --run or remove it"
                )
            return
        write_atomic(self.recipe_file, recipe_toml.encode())
        with writing(self.checkpoints):
            self.checkpoints.mkdir(exist_ok=True)
        write_atomic(self.identity_file, recipe_canonical.encode())  # last: from here on the folder is a run


def _holder(lock: int) -> str:
    return os.pread(lock, 32, 0).decode("ascii", "replace").strip() or "unknown"


def differences(there: Any, here: Any, place: str = "") -> Iterator[str]:
    """Every key in which a run's recipe and a given one differ, in the order of their names, with both values."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            inner = f"{place}.{key}" if place else key
            yield from differences(there.get(key, _ABSENT), here.get(key, _ABSENT), inner)
    elif isinstance(there, list) and isinstance(here, list):
        for index in range(max(len(there), len(here))):
            left, right = (values[index] if index < len(values) else _ABSENT for values in (there, here))
            yield from differences(left, right, f"{place}[{index}]")
    elif there is _ABSENT or here is _ABSENT or type(there) is not type(here) or there != here:
        yield f"{place} = {_show(there)} there, {_show(here)} in this recipe"


def _show(value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
