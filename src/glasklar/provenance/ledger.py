"""The ledger of a run: an append-only file of JSON lines, each holding the hash of the line before.

    {"data":{…},"event":"checkpoint","hash":"…","index":3,"previous":"…","time":"2026-01-20T08:00:00.000Z"}

`hash` is the SHA-256 of the canonical JSON of the line without `hash`; `previous` is the hash of the line before, 64
zeros in the first. Every line is itself canonical JSON, so that a single changed byte anywhere shows. The chain proves
order and completeness to whoever knows its head; against the owner of the file it proves nothing until the head is
kept elsewhere (a signature, a git tag).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from glasklar.errors import CheckpointError
from glasklar.provenance.files import write_all, write_atomic, writing
from glasklar.provenance.hashing import canonical_json, sha256_hex, strict_json

EventName = Literal[
    "run",  # recipe, code, installed versions, machine, threads, flags
    "data",  # roots and counts of the documents
    "tokenizer",
    "taught",  # what the answers of teachers took: seconds, energy, cost; the answers themselves belong to the data
    "readiness",  # whether reinforcement could begin, and the figures that decided it
    "checkpoint",  # see `checkpoint_data`
    "evaluation",
    "released",
    "resumed",  # from which checkpoint; what was recorded after it stays above and is done again
    "failed",  # an error ended the run: which, where, and the work since the last checkpoint
    "stopped",  # its owner did, with Ctrl-C
    "abandoned",  # nobody will go on with it, and why; the last line of such a run
    "repaired",  # a line that a crash had cut short was taken out
]
GENESIS = "0" * 64


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line. `time` is UTC; `data` holds JSON values only, exact floats as hex text (see `exact`)."""

    index: int
    time: str
    event: str
    data: dict[str, Any]
    previous: str
    hash: str

    def line(self) -> bytes:
        return canonical_json(asdict(self)) + b"\n"

    @classmethod
    def make(cls, index: int, time: str, event: str, data: dict[str, Any], previous: str) -> Self:
        body = {"index": index, "time": time, "event": event, "data": data, "previous": previous}
        return cls(**body, hash=sha256_hex(canonical_json(body)))  # type: ignore[arg-type]


def exact(value: float) -> str:
    """A float as hex text ("0x1.8p+1"): no rounding between the run and whoever repeats it."""
    return float(value).hex()


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def checkpoint_data(
    *,
    stage: str,
    step: int,
    state_hash: str,
    loss: float,
    gradient_norm: float,
    flops: float,
    seconds: float,
    energy: dict[str, Any],
    cost: dict[str, float],
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """Data of a `checkpoint` event.

    flops, seconds, energy, cost   of the segment since the checkpoint before (`Energy.record()`, `Energy.cost()`)
    metrics                        `Metrics.mark()`: binds the figures of every step to the chain
    """
    return {
        "stage": stage,
        "step": step,
        "state_hash": state_hash,
        "loss": exact(loss),
        "gradient_norm": exact(gradient_norm),
        "flops": flops,
        "seconds": seconds,
        "energy": energy,
        "cost": cost,
        "metrics": metrics,
    }


def read_ledger(path: Path) -> tuple[list[Event], bytes]:
    """All events of a ledger, its chain verified, and the bytes after the last line break.

    Those bytes are a line being written right now, or one that a crash cut short. Raises CheckpointError naming the
    first line that does not hold.
    """
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no ledger here; is this a run folder?") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    events: list[Event] = []
    for line in lines:
        events.append(_check(path, line, len(events), events[-1].hash if events else GENESIS))
    return events, rest


class Ledger:
    """A ledger open for writing; the caller holds the lock of the run folder.

    Opening verifies the chain. A last line that a crash cut short was never acknowledged; it is taken out, and a
    `repaired` event says what it was.
    """

    def __init__(self, path: Path, clock: Callable[[], str] = utc_now) -> None:
        self.path = path
        self._clock = clock
        self._events: list[Event] = []
        if path.exists():
            self._events, torn = read_ledger(path)
            if torn:
                self._repair(torn)

    @property
    def events(self) -> tuple[Event, ...]:
        return tuple(self._events)

    @property
    def head(self) -> str:
        """Hash of the last line; what a signature or an outside anchor has to hold."""
        return self._events[-1].hash if self._events else GENESIS

    def of(self, event: EventName) -> list[Event]:
        return [entry for entry in self._events if entry.event == event]

    def append(self, event: EventName, data: dict[str, Any]) -> Event:
        """Writes one line and waits until it is on the disk.

        Raises CapacityError or CheckpointError; the file is then as before.
        """
        entry = self._next(event, data)
        with writing(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                length = os.fstat(descriptor).st_size
                try:
                    write_all(descriptor, entry.line())
                    os.fsync(descriptor)
                except OSError:
                    os.ftruncate(descriptor, length)
                    raise
            finally:
                os.close(descriptor)
        self._events.append(entry)
        return entry

    def _next(self, event: EventName, data: dict[str, Any]) -> Event:
        return Event.make(len(self._events), self._clock(), event, data, self.head)

    def _repair(self, torn: bytes) -> None:
        # The note and the removal are one atomic step: no crash in between can lose the line silently.
        note = {"removed": "unfinished last line", "bytes": len(torn), "text": torn.decode("utf-8", "backslashreplace")}
        entry = self._next("repaired", note)
        write_atomic(self.path, b"".join(known.line() for known in [*self._events, entry]))
        self._events.append(entry)


def _check(path: Path, line: bytes, index: int, previous: str) -> Event:
    """The event of a line that is where it should be and what it was when it was written."""
    try:
        values = strict_json(line)
        claimed = Event(**values)
        true = Event.make(claimed.index, claimed.time, claimed.event, claimed.data, claimed.previous)
        unchanged = true.line() == line + b"\n"
    except (ValueError, TypeError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise _broken(path, index, "is not a line of a ledger") from None
    if not unchanged:
        raise _broken(path, index, "does not match its hash: it was changed after it was written")
    if claimed.index != index or claimed.previous != previous:
        raise _broken(path, index, "does not follow the line before: lines were dropped, inserted or reordered")
    return claimed


def _broken(path: Path, index: int, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: line {index + 1} {what}; restore the file from a copy, or start a new run with another --run"
    )
