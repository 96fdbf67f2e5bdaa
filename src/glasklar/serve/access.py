"""Who may call: keys, kept as hashes; and what each has used, day by day. One SQLite file in the user's home.

A key is 256 random bits, so that a plain SHA-256 of it tells nothing (slow hashes are for what people think up). It is
shown once, when it is made.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from glasklar.engine.request import TokenEvent
from glasklar.errors import BusyError, RecordError, RequestError

FILE = "access.sqlite"
PREFIX = "gk-"
NOBODY = ""  # the key of whoever needs none
COUNTS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")
WRITE_EVERY = 1.0  # seconds between writes of what was used
SOME = 64  # tokens that may be counted together, where no quota looks at each

_TABLES = """
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, digest TEXT NOT NULL, created TEXT NOT NULL, revoked TEXT,
    requests_per_minute INTEGER, tokens_per_day INTEGER
);
CREATE UNIQUE INDEX IF NOT EXISTS names ON keys (name) WHERE revoked IS NULL;
CREATE TABLE IF NOT EXISTS usage (
    key TEXT NOT NULL, day TEXT NOT NULL, requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, PRIMARY KEY (key, day)
);
"""


@dataclass(frozen=True, kw_only=True)
class Key:
    """A caller. Limits are None where there are none; tokens are those of prompts and answers; days are UTC's."""

    id: str
    name: str
    digest: str
    created: str
    revoked: str | None = None
    requests_per_minute: int | None = None
    tokens_per_day: int | None = None


class Access:
    """The file. Safe for several threads and processes: a key that is revoked elsewhere is refused at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._keys: list[Key] = []
        self._version = -1
        self._used: dict[tuple[str, str], list[int]] = {}
        self._unwritten: dict[tuple[str, str], list[int]] = {}
        self._written = 0.0
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._db = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript(_TABLES)

    # --- keys ----------------------------------------------------------------------------------------------------

    def add(
        self, name: str, *, requests_per_minute: int | None = None, tokens_per_day: int | None = None
    ) -> tuple[Key, str]:
        """A new key and its secret, which is kept nowhere. Raises RequestError for a name that is taken or unfit."""
        if not name.isprintable() or not 0 < len(name) <= 64 or name != name.strip():
            raise RequestError(f"a key named {name[:80]!r}: use 1 to 64 printable characters")
        for what, value in (("requests per minute", requests_per_minute), ("tokens per day", tokens_per_day)):
            if value is not None and value < 1:
                raise RequestError(f"{what} = {value}: at least 1, or leave it out for no limit")
        secret = PREFIX + secrets.token_urlsafe(32)
        key = Key(
            id=secrets.token_hex(4),
            name=name,
            digest=_digest(secret),
            created=_now().isoformat(timespec="seconds"),
            requests_per_minute=requests_per_minute,
            tokens_per_day=tokens_per_day,
        )
        with self._errors():
            try:
                self._db.execute(
                    "INSERT INTO keys (id, name, digest, created, requests_per_minute, tokens_per_day)"
                    " VALUES (:id, :name, :digest, :created, :requests_per_minute, :tokens_per_day)",
                    vars(key),
                )
            except sqlite3.IntegrityError:
                raise RequestError(f"there is a key named {name!r} already; revoke it or choose another name") from None
            self._version = -1
        return key, secret

    def all_keys(self) -> list[Key]:
        """All, the revoked ones too, in the order in which they were made."""
        with self._errors():
            rows = self._db.execute(
                "SELECT id, name, digest, created, revoked, requests_per_minute, tokens_per_day FROM keys"
                " ORDER BY rowid"
            )
            names = [column[0] for column in rows.description]
            return [Key(**dict(zip(names, row, strict=True))) for row in rows]

    def revoke(self, name: str) -> Key:
        """From now on its requests are refused. Raises RequestError where there is no such key."""
        found = next((key for key in self.all_keys() if name in (key.name, key.id) and key.revoked is None), None)
        if found is None:
            known = ", ".join(key.name for key in self.all_keys() if key.revoked is None) or "none"
            raise RequestError(f"no key named {name!r}; there are: {known}")
        with self._errors():
            now = _now().isoformat(timespec="seconds")
            self._db.execute("UPDATE keys SET revoked = ? WHERE id = ?", (now, found.id))
            self._version = -1
        return found

    def valid(self) -> list[Key]:
        """Keys that are not revoked, read again when another process has written."""
        with self._errors():
            version = self._db.execute("PRAGMA data_version").fetchone()[0]
            if version != self._version:
                self._keys = [key for key in self.all_keys() if key.revoked is None]
                self._version = version
            return self._keys

    def find(self, secret: str) -> Key | None:
        """Whose secret it is. Takes the same time for any secret."""
        digest, found = _digest(secret), None
        for key in self.valid():
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    # --- usage ---------------------------------------------------------------------------------------------------

    def count(self, key: str, **more: int) -> None:
        """Adds to what a key has used today (see COUNTS). Written at most every second, and by `flush`."""
        with self._lock:
            place = key, _today()
            for counts in (self._today(place), self._unwritten.setdefault(place, [0] * len(COUNTS))):
                for name, number in more.items():
                    counts[COUNTS.index(name)] += number
            if time.monotonic() - self._written > WRITE_EVERY:
                self.flush()

    def used_today(self, key: str) -> int:
        """Tokens of prompts and answers."""
        with self._lock:
            counts = self._today((key, _today()))
            return counts[COUNTS.index("prompt_tokens")] + counts[COUNTS.index("completion_tokens")]

    def flush(self) -> None:
        """Writes what has been counted."""
        with self._errors():
            self._written = time.monotonic()
            unwritten, self._unwritten = self._unwritten, {}
            sets = ", ".join(f"{name} = {name} + excluded.{name}" for name in COUNTS)
            self._db.executemany(
                f"INSERT INTO usage (key, day, {', '.join(COUNTS)}) VALUES (?, ?, ?, ?, ?, ?)"
                f" ON CONFLICT (key, day) DO UPDATE SET {sets}",
                [(*place, *counts) for place, counts in unwritten.items()],
            )
            today = _today()
            self._used = {place: counts for place, counts in self._used.items() if place[1] == today}

    def usage(self) -> list[dict[str, Any]]:
        """A row for every key and day: {"key", "name", "day", "requests", …}."""
        self.flush()
        names = {key.id: key.name for key in self.all_keys()} | {NOBODY: "(no key)"}
        with self._errors():
            rows = self._db.execute(f"SELECT key, day, {', '.join(COUNTS)} FROM usage ORDER BY day, key").fetchall()
        return [
            {"name": names.get(row[0], "?"), **dict(zip(("key", "day", *COUNTS), row, strict=True))} for row in rows
        ]

    def close(self) -> None:
        self.flush()
        self._db.close()

    def _today(self, place: tuple[str, str]) -> list[int]:
        """Counts of a key and day, which grow in place; the file knows those from before."""
        if place not in self._used:
            self._used[place] = self._read(place)
        return self._used[place]

    def _read(self, place: tuple[str, str]) -> list[int]:
        row = self._db.execute(f"SELECT {', '.join(COUNTS)} FROM usage WHERE key = ? AND day = ?", place).fetchone()
        return [0] * len(COUNTS) if row is None else list(row)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except (sqlite3.Error, OSError) as error:
                raise RecordError(
                    f"{self.path}: cannot be used ({error}); mend it, move it away to start without keys, or let "
                    "$GLASKLAR_HOME name a folder that can be written"
                ) from error


# --- one request -------------------------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True)
class Visit:
    """One HTTP request: whose it is, and what it has used. What has no request runs in a visit of nobody's.

    key      id of the key, NOBODY where none is needed
    access   where it is counted, if anywhere
    quota    tokens that the key may use in a day
    """

    key: str = NOBODY
    name: str = ""
    access: Access | None = None
    quota: int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    _prompts: set[int] = field(default_factory=set)
    _uncounted: int = 0

    def begin(self, prompt: Sequence[int]) -> bool:
        """Counts a prompt, once for all the answers to it; whether this is the once. Raises BusyError where the quota
        does not allow it."""
        which = hash(tuple(prompt))
        if which in self._prompts:
            self._check(1)
            return False
        self._check(len(prompt))
        self._prompts.add(which)
        self.prompt_tokens += len(prompt)
        self._count(prompt_tokens=len(prompt))
        return True

    def hit(self, cached: int) -> None:
        """Counts prompt tokens that were in the cache."""
        self.cached_tokens += cached
        self._count(cached_tokens=cached)

    def made(self, event: TokenEvent) -> None:
        """Counts a token. Raises BusyError where the quota ends, though not for the last token of an answer."""
        self.completion_tokens += 1
        self._uncounted += 1
        if self.quota is not None or self._uncounted >= SOME:
            self.settle()
        if event.finish is None:
            self._check(1)

    def settle(self) -> None:
        """Counts what `made` has not yet."""
        made, self._uncounted = self._uncounted, 0
        if made:
            self._count(completion_tokens=made)

    def check(self) -> None:
        """Raises BusyError where the quota is used up."""
        self._check(1)

    def _check(self, more: int) -> None:
        if self.quota is None or self.access is None:
            return
        used = self.access.used_today(self.key)
        if used + more > self.quota:
            raise BusyError(
                f"the key {self.name!r} may use {self.quota} tokens a day and has used {used}; it goes on at 00:00 UTC",
                retry_after=_seconds_to_midnight(),
            )

    def _count(self, **more: int) -> None:
        if self.access is not None:
            self.access.count(self.key, **more)


_VISIT: ContextVar[Visit | None] = ContextVar("visit", default=None)


def visit() -> Visit:
    """The request that is being answered here."""
    return _VISIT.get() or Visit()


@contextmanager
def visiting(made: Visit) -> Iterator[Visit]:
    """What runs inside, and the tasks that begin there, belong to this request."""
    token = _VISIT.set(made)
    try:
        yield made
    finally:
        _VISIT.reset(token)


class Rate:
    """Requests a minute, as a bucket that fills evenly: a minute's worth may come at once."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[float, float]] = {}  # key -> what it holds, and when that was

    def take(self, key: str, per_minute: int, now: float) -> float:
        """Takes one; returns 0, or the seconds until there is one."""
        held, then = self._buckets.get(key, (float(per_minute), now))
        held = min(float(per_minute), held + (now - then) * per_minute / 60)
        if held < 1:
            self._buckets[key] = held, now
            return (1 - held) * 60 / per_minute
        self._buckets[key] = held - 1, now
        return 0.0


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _now() -> datetime:
    return datetime.now(UTC)


def _today() -> str:
    return _now().date().isoformat()


def _seconds_to_midnight() -> int:
    now = _now()
    return 86400 - (now.hour * 3600 + now.minute * 60 + now.second)
