"""Sealing a finished run: signed statements over every file of it, and over the released model by itself.

RUN/attestation.json          all files of the run, the head of its ledger, what it was made from
RUN/model/attestation.json    the files of the model's folder, so that it can be checked where it was copied to

A statement holds no time of its own: sealing what has not changed gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glasklar.errors import RecordError
from glasklar.provenance.files import write_atomic
from glasklar.provenance.hashing import canonical_json, sha256_file
from glasklar.provenance.ledger import Event, read_ledger
from glasklar.provenance.receipt import model_root
from glasklar.provenance.rundir import ATTESTATION, RunDir
from glasklar.provenance.signing import Signer

RUN_KIND, MODEL_KIND = "urn:x-glasklar:run:v1", "urn:x-glasklar:model:v1"


def seal(run: RunDir, signer: Signer) -> None:
    """Signs a released run; one that is not released yet is left alone. Raises RecordError for links in the folder."""
    events, _ = read_ledger(run.ledger_file)
    if not any(event.event == "released" for event in events):
        return
    made_from = origin(events)
    model = {"model_root": model_root(run.model), "ledger_head": events[-1].hash, **made_from}
    _write(run.model / ATTESTATION, signer.sign(MODEL_KIND, file_hashes(run.model), model))
    facts = {"ledger": {"head": events[-1].hash, "events": len(events)}, **made_from}
    _write(run.attestation_file, signer.sign(RUN_KIND, file_hashes(run.path), facts))


def origin(events: list[Event]) -> dict[str, Any]:
    """What a model was made from, as its ledger says: recipe, data, tokenizer, code, last state."""
    of = {event.event: event.data for event in events}
    return {
        "recipe": of["run"]["recipe"],
        "data_root": of["data"]["root"],
        "tokenizer": of["tokenizer"]["hash"],
        "code": of["run"]["code"],
        "state": of["checkpoint"]["state_hash"],
    }


def file_hashes(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of all files of a sealed folder but those that a seal cannot or need not hold."""
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in sealed_files(folder)}


def sealed_files(folder: Path) -> list[Path]:
    """All files below `folder` but its own statement, its lock and the replays that are added later.

    Raises RecordError for a link, which would make the seal depend on files elsewhere.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder).as_posix()
        if inner in (ATTESTATION, ".lock", "replays.jsonl"):
            continue
        if path.is_symlink():
            raise RecordError(f"{path}: a link; a run is sealed with files alone: replace it by what it points to")
        if path.is_file():
            found.append(path)
    return found


def _write(path: Path, envelope: dict[str, Any]) -> None:
    write_atomic(path, canonical_json(envelope) + b"\n")
