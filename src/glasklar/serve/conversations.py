"""Conversations on the server: one SQLite file for each owner, so that no query can ever mix two of them.

A conversation is a tree: editing a question or asking for another answer adds a branch and takes nothing away. `leaf`
is the message at whose end the reader last was.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from glasklar.errors import CapacityError, RequestError

State = Literal["running", "done", "stopped", "failed", "interrupted"]
VERSION = 1
MOST_CONVERSATIONS, MOST_MESSAGES, MOST_TITLE = 10_000, 2_000, 200

SCHEMA = """
CREATE TABLE conversation (
    id TEXT PRIMARY KEY, title TEXT NOT NULL, created REAL NOT NULL, updated REAL NOT NULL, leaf TEXT
) STRICT;
CREATE TABLE message (
    id TEXT PRIMARY KEY,
    conversation TEXT NOT NULL REFERENCES conversation (id) ON DELETE CASCADE,
    parent TEXT REFERENCES message (id),
    role TEXT NOT NULL, state TEXT NOT NULL, created REAL NOT NULL,
    content TEXT NOT NULL, reasoning TEXT NOT NULL, error TEXT NOT NULL,
    files TEXT NOT NULL, settings TEXT NOT NULL, facts TEXT NOT NULL, trail TEXT NOT NULL
) STRICT;
CREATE INDEX message_of ON message (conversation, created);
"""


class NotFoundError(RequestError):
    """There is no such conversation or message; it may have been deleted meanwhile."""


@dataclass(kw_only=True)
class Entry:
    """A message as it is kept.

    files      texts that came with a question: [{"name", "text"}]
    settings   how an answer was asked for; facts: what it took (see `jobs.py`)
    trail      {"prompt", "ids", "logprobs"} of an answer: its tokens, for a look inside; empty while it is made
    """

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    parent: str | None = None
    role: Literal["user", "assistant"]
    content: str = ""
    reasoning: str = ""
    error: str = ""
    state: State = "done"
    created: float = field(default_factory=time.time)
    files: list[dict[str, str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    trail: dict[str, Any] = field(default_factory=dict)


_COLUMNS = "id, parent, role, content, reasoning, error, state, created, files, settings, facts, trail"
_JSON = ("files", "settings", "facts", "trail")


class Store:
    """The conversations of one owner. May be used from several threads.

    Answers that were being made when a server died are found as "interrupted", with what was saved of them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        path.touch(mode=0o600)
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        with self._errors():
            # WAL: readers never wait for an answer that is being saved. secure_delete: deleted is gone from the file.
            for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON", "secure_delete = ON"):
                self._db.execute(f"PRAGMA {pragma}")
        self._db.create_function("folded", 1, lambda text: str(text).casefold(), deterministic=True)
        self._prepare()

    def _prepare(self) -> None:
        with self._transaction() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in filter(str.strip, SCHEMA.split(";")):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")
            elif version != VERSION:
                raise CapacityError(
                    f"{self.path}: conversations of form {version}, this program knows {VERSION}; use the newer one"
                )
            db.execute("UPDATE message SET state = 'interrupted' WHERE state = 'running'")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise CapacityError(
                f"{self.path}: conversations cannot be kept ({error}); free the disk, or move a damaged file away"
            ) from error

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # --- conversations --------------------------------------------------------------------------------------------

    def create(self, title: str) -> str:
        """Id of a new conversation. Raises RequestError where there are too many."""
        name, now = secrets.token_hex(8), time.time()
        with self._transaction() as db:
            if db.execute("SELECT count(*) FROM conversation").fetchone()[0] >= MOST_CONVERSATIONS:
                raise RequestError(f"there are {MOST_CONVERSATIONS} conversations already; delete some")
            db.execute("INSERT INTO conversation VALUES (?, ?, ?, ?, NULL)", (name, shortened(title), now, now))
        return name

    def all(self, search: str = "") -> list[dict[str, Any]]:
        """{"id", "title", "updated"} of each, the newest first; with `search` those whose title or text holds it."""
        where, values = "", list[str]()
        if search.strip():
            where = """WHERE instr(folded(title), ?1) OR id IN (SELECT conversation FROM message
                       WHERE instr(folded(content), ?1) OR instr(folded(reasoning), ?1))"""
            values = [search.strip().casefold()]
        query = f"SELECT id, title, updated FROM conversation {where} ORDER BY updated DESC, id"
        with self._transaction() as db:
            rows = db.execute(query, values).fetchall()
        return [{"id": row[0], "title": row[1], "updated": row[2]} for row in rows]

    def head(self, conversation: str) -> dict[str, Any]:
        """{"id", "title", "created", "updated", "leaf"}. Raises NotFoundError."""
        with self._transaction() as db:
            return _head(db, conversation)

    def change(self, conversation: str, *, title: str | None = None, leaf: str | None = None) -> None:
        """Gives a conversation another title, or remembers where its reader is."""
        with self._transaction() as db:
            _head(db, conversation)
            if title is not None:
                db.execute("UPDATE conversation SET title = ? WHERE id = ?", (shortened(title), conversation))
            if leaf is not None:
                _entry(db, conversation, leaf)
                db.execute("UPDATE conversation SET leaf = ? WHERE id = ?", (leaf, conversation))

    def delete(self, conversation: str) -> None:
        """Takes a conversation out of the file and of its journal."""
        with self._transaction() as db:
            _head(db, conversation)
            db.execute("UPDATE message SET parent = NULL WHERE conversation = ?", (conversation,))
            db.execute("DELETE FROM conversation WHERE id = ?", (conversation,))
        with self._lock:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    # --- messages -------------------------------------------------------------------------------------------------

    def messages(self, conversation: str) -> list[Entry]:
        """All messages of all branches, in the order in which they were made; without their trails."""
        with self._transaction() as db:
            _head(db, conversation)
            columns = _COLUMNS.replace("trail", "'{}'")
            rows = db.execute(
                f"SELECT {columns} FROM message WHERE conversation = ? ORDER BY created, rowid", (conversation,)
            ).fetchall()
        return [_read(row) for row in rows]

    def message(self, conversation: str, message: str) -> Entry:
        """One message with its trail. Raises NotFoundError."""
        with self._transaction() as db:
            return _entry(db, conversation, message)

    def branch(self, conversation: str, message: str | None) -> list[Entry]:
        """The messages from the first one to this, in order; none for None."""
        known = {entry.id: entry for entry in self.messages(conversation)}
        found: list[Entry] = []
        while message is not None:
            if message not in known:
                raise NotFoundError(f"no message {message!r} in this conversation")
            found.append(known[message])
            message = known[message].parent
        return found[::-1]

    def add(self, conversation: str, *entries: Entry) -> None:
        """Adds messages, all or none; the last one is where the reader is. Raises NotFoundError, and RequestError
        for too many."""
        with self._transaction() as db:
            _head(db, conversation)
            count = db.execute("SELECT count(*) FROM message WHERE conversation = ?", (conversation,)).fetchone()[0]
            if count + len(entries) > MOST_MESSAGES:
                raise RequestError(f"this conversation has {count} messages; go on in a new one")
            for entry in entries:
                if entry.parent is not None:
                    _entry(db, conversation, entry.parent)
                db.execute(
                    f"INSERT INTO message (conversation, {_COLUMNS}) VALUES ({', '.join('?' * 13)})",
                    (conversation, *_written(entry)),
                )
            db.execute(
                "UPDATE conversation SET updated = ?, leaf = ? WHERE id = ?",
                (time.time(), entries[-1].id, conversation),
            )

    def save(self, entry: Entry) -> None:
        """Writes what became of an answer. One that was deleted meanwhile stays deleted."""
        names = ("content", "reasoning", "error", "state", "settings", "facts", "trail")
        values = [json.dumps(getattr(entry, n)) if n in _JSON else getattr(entry, n) for n in names]
        with self._transaction() as db:
            db.execute(f"UPDATE message SET {', '.join(f'{n} = ?' for n in names)} WHERE id = ?", (*values, entry.id))


class Conversations:
    """The stores of all owners in a folder, opened as they are asked for. Without a folder they last until `close`."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._stores: dict[str, Store] = {}
        self._lock = threading.Lock()

    def of(self, owner: str) -> Store:
        """The store of an owner. Its file is named by a hash: an owner's name may hold anything."""
        with self._lock:
            if owner not in self._stores:
                name = hashlib.sha256(owner.encode()).hexdigest()[:32]
                self._stores[owner] = Store(self._place() / f"{name}.sqlite")
            return self._stores[owner]

    def _place(self) -> Path:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            return self.folder
        self._temporary = self._temporary or tempfile.TemporaryDirectory(prefix="glasklar-")
        return Path(self._temporary.name)

    def close(self) -> None:
        with self._lock:
            for store in self._stores.values():
                store.close()
            self._stores.clear()
        if self._temporary is not None:
            self._temporary.cleanup()


def conversations_in(home: Path | None) -> Conversations:
    """Those kept under the user's home; None: nowhere."""
    return Conversations(None if home is None else home / "conversations")


def shortened(title: str) -> str:
    """A title in one line of bounded length, never empty."""
    line = " ".join(title.split())
    return (line if len(line) <= MOST_TITLE else line[: MOST_TITLE - 1] + "…") or "…"


def _head(db: sqlite3.Connection, conversation: str) -> dict[str, Any]:
    names = ("id", "title", "created", "updated", "leaf")
    row = db.execute(f"SELECT {', '.join(names)} FROM conversation WHERE id = ?", (conversation,)).fetchone()
    if row is None:
        raise NotFoundError(f"no conversation {conversation!r}; it may have been deleted")
    return dict(zip(names, row, strict=True))


def _entry(db: sqlite3.Connection, conversation: str, message: str) -> Entry:
    row = db.execute(
        f"SELECT {_COLUMNS} FROM message WHERE conversation = ? AND id = ?", (conversation, message)
    ).fetchone()
    if row is None:
        raise NotFoundError(f"no message {message!r} in this conversation")
    return _read(row)


def _read(row: tuple[Any, ...]) -> Entry:
    values = dict(zip(_COLUMNS.split(", "), row, strict=True))
    return Entry(**{name: json.loads(value) if name in _JSON else value for name, value in values.items()})


def _written(entry: Entry) -> list[Any]:
    values = [getattr(entry, name) for name in _COLUMNS.split(", ")]
    return [json.dumps(v) if n in _JSON else v for n, v in zip(_COLUMNS.split(", "), values, strict=True)]
