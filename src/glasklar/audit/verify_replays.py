"""The coverage table of a run: which parts of its training somebody computed again, and came to the same state.

Each line of replays.jsonl is a statement signed by whoever did it; lines may come from many machines and many keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from glasklar.audit.findings import Findings
from glasklar.errors import RecordError
from glasklar.provenance.hashing import canonical_json, strict_json
from glasklar.provenance.ledger import Event
from glasklar.provenance.rundir import RunDir
from glasklar.provenance.signing import Statement, open_envelope

REPLAY_KIND = "urn:x-glasklar:replay:v1"


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """replayed: checkpoint's name -> fingerprints of the keys whose owners came to its state again. machines: the
    classes of machine on which they did."""

    checkpoints: list[str]
    replayed: dict[str, list[str]]
    machines: list[str]

    def __str__(self) -> str:
        keys = {key for signers in self.replayed.values() for key in signers}
        done = f"{len(self.replayed)} of {len(self.checkpoints)} segments replayed to equal states"
        return f"{done}, by {len(keys)} key{'s' if len(keys) != 1 else ''}, on {'; '.join(self.machines)}"


def read_replays(run: RunDir) -> list[Statement]:
    """All statements of the table. Raises RecordError naming the line that does not hold."""
    if not run.replays_file.is_file():
        return []
    statements = []
    for number, line in enumerate(run.replays_file.read_bytes().splitlines(keepends=True), start=1):
        where = f"{run.replays_file.name}, line {number}"
        try:
            envelope = strict_json(line)
            if canonical_json(envelope) + b"\n" != line:
                raise RecordError(f"{where}: not in the form in which it was written: it was changed")
        except ValueError:
            raise RecordError(f"{where}: not JSON: it was changed or cut off") from None
        statements.append(open_envelope(envelope, REPLAY_KIND, where))
    return statements


def coverage(events: list[Event], statements: list[Statement]) -> Coverage:
    """What has been replayed; raises RecordError for a statement about other states than the ledger's."""
    recorded = checkpoint_events(events)
    heads = {event.hash for event in events}
    replayed: dict[str, list[str]] = {}
    machines = set()
    for statement in statements:
        for name, state in statement.subjects.items():
            if name not in recorded or recorded[name]["state_hash"] != state:
                raise RecordError(f"a replay signed by {statement.signer[:16]}… is about another state of {name}")
            replayed.setdefault(name, []).append(statement.signer)
        if statement.predicate["ledger_head"] not in heads:
            raise RecordError(f"a replay signed by {statement.signer[:16]}… is about another ledger")
        machine = statement.predicate["machine"]
        machines.add(f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}")
    return Coverage(checkpoints=list(recorded), replayed=replayed, machines=sorted(machines))


def checkpoint_events(events: list[Event]) -> dict[str, dict[str, Any]]:
    """Checkpoint's name -> data of the event that recorded it last, in the order of the training.

    An interrupted run may have recorded one twice.
    """
    found = {event.data["name"]: event.data for event in events if event.event == "checkpoint"}
    return {name: found[name] for name in sorted(found)}


def check_replays(run: RunDir, events: list[Event], found: Findings) -> None:
    if not run.replays_file.is_file():
        found.unchecked("training", "that it took place as recorded: nobody has replayed a part of it yet")
        return

    def check() -> None:
        table = coverage(events, read_replays(run))
        found.holds(run.replays_file.name, str(table))
        left = [name for name in table.checkpoints if name not in table.replayed]
        if left:
            found.unchecked("training", f"segments that nobody has replayed: {', '.join(left)}")

    found.guard(run.replays_file.name, check)
