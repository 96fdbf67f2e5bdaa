"""Pages of the cache on disk: what was computed once is found again later, also after a restart.

A file a page, named by its key, in a folder named by what determines the numbers in it (weights, their form, layout of
the page). Nothing in a file is trusted: it must have the expected size and the hash of its folder, key and contents,
else it is deleted and the page is computed. Where the disk is full or refuses, spilling stops with a warning, and
`failure` says why; requests do not notice. Whoever can read the folder can find out what was asked: it is the user's
alone (mode 700).
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from glasklar.errors import CapacityError, RequestError

log = logging.getLogger(__name__)

VERSION = "1"
MARK = 32  # bytes of the hash before the contents
SUFFIX = ".page"
# A file that is being written longer than this is of a process that was ended.
STALE_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class SpillConfig:
    """Where cold pages go.

    folder      one for all models; each has a folder of its own in it
    model       hash of the weights: pages of other weights must never be taken for this model's
    max_bytes   most that one model's pages take; the longest unused go first
    """

    folder: Path
    model: str
    max_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        if not self.model:
            raise RequestError("spilling to disk needs the hash of the model's weights; `model` is empty")
        if self.max_bytes < 1:
            raise RequestError(f"max_bytes = {self.max_bytes}: must be at least 1")


class Spill:
    """The pages of one model. `layout` names what else than the weights determines a page's bytes.

    Raises CapacityError where the folder cannot be made or read.
    """

    def __init__(self, config: SpillConfig, layout: str) -> None:
        name = hashlib.blake2b(f"{VERSION} {config.model} {layout}".encode(), digest_size=16).hexdigest()
        self.folder, self.max_bytes = config.folder / name, config.max_bytes
        self.failure: str | None = None
        self.written = self.found = self.damaged = 0  # pages
        self._sizes: OrderedDict[bytes, int] = OrderedDict()  # the longest unused first
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for path in self.folder.glob("*.tmp"):
                if (status := _status(path)) is not None and time.time() - status.st_mtime > STALE_SECONDS:
                    path.unlink(missing_ok=True)
            found = [(path, _status(path)) for path in self.folder.glob(f"*{SUFFIX}")]
        except OSError as error:
            raise CapacityError(
                f"{self.folder}: cache pages cannot be kept there ({error}); name another folder"
            ) from None
        entries = [(path, status) for path, status in found if status is not None]
        for path, status in sorted(entries, key=lambda entry: entry[1].st_mtime_ns):
            if (key := _key_of(path)) is not None:
                self._sizes[key] = status.st_size
        self._bytes = sum(self._sizes.values())
        self._shrink(0)

    @property
    def bytes_used(self) -> int:
        return self._bytes

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    def write(self, key: bytes, data: bytes) -> None:
        """Keeps a page, if it is not kept already and spilling has not failed."""
        if self.failure is not None or key in self._sizes or len(data) + MARK > self.max_bytes:
            return
        path = self._path(key)
        temporary = path.with_suffix(f".{os.getpid()}-{id(self)}.tmp")  # other engines may write the same page
        self._shrink(len(data) + MARK)
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(self._mark(key, data))
                file.write(data)
            temporary.replace(path)
        except OSError as error:
            self._fail(error)
            _remove(temporary)
            return
        self._sizes[key] = len(data) + MARK
        self._bytes += len(data) + MARK
        self.written += 1

    def read(self, key: bytes, size: int) -> bytes | None:
        """The page of `size` bytes, or None: it is not there, or not what was written (then it is deleted)."""
        if key not in self._sizes:
            return None
        path = self._path(key)
        try:
            with path.open("rb") as file:
                content = file.read(MARK + size + 1)
        except FileNotFoundError:  # another engine that has this folder needed the room
            self._forget(key)
            return None
        except OSError as error:
            log.warning("%s: a page of the cache cannot be read (%s); it is computed again", path, error)
            content = b""
        data = content[MARK:]
        if len(data) != size or content[:MARK] != self._mark(key, data):
            self.damaged += 1
            log.warning("%s: a page of the cache is damaged; it is deleted and computed again", path)
            self._forget(key)
            return None
        self._sizes.move_to_end(key)
        try:
            os.utime(path)  # the order of use, for the next start
        except OSError as error:
            log.warning("%s: its time of use cannot be noted (%s)", path, error)
        self.found += 1
        return data

    def _mark(self, key: bytes, data: bytes) -> bytes:
        """Hash of the folder's name, the key and the contents."""
        return hashlib.blake2b(self.folder.name.encode() + key + data, digest_size=MARK).digest()

    def _path(self, key: bytes) -> Path:
        return self.folder / (key.hex() + SUFFIX)

    def _shrink(self, more: int) -> None:
        """Makes room for `more` bytes."""
        while self._sizes and self._bytes + more > self.max_bytes:
            self._forget(next(iter(self._sizes)))

    def _forget(self, key: bytes) -> None:
        self._bytes -= self._sizes.pop(key)
        _remove(self._path(key))

    def _fail(self, error: OSError) -> None:
        self.failure = f"cache pages are no longer written to {self.folder}: {error.strerror or error}"
        log.warning("%s; answers are not affected. Make room and start again", self.failure)


def _status(path: Path) -> os.stat_result | None:
    """None where another engine has deleted it meanwhile."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _key_of(path: Path) -> bytes | None:
    try:
        return bytes.fromhex(path.name.removesuffix(SUFFIX))
    except ValueError:  # not ours; left alone
        return None


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: cannot be deleted (%s)", path, error)
