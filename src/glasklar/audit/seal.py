"""Sealing a run that has come to its end: signed statements over all its files, and over the released model by itself.

RUN/attestation.json          all files of the run, the head of its ledger, what it was made from
RUN/model/attestation.json    the files of the model's folder, so that it can be checked where it was copied to

A statement holds no time of its own: sealing what has not changed gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glasklar.errors import CheckpointError, RecordError, RequestError
from glasklar.provenance.files import write_atomic
from glasklar.provenance.hashing import canonical_json, sha256_file
from glasklar.provenance.ledger import Event, read_ledger
from glasklar.provenance.metrics import read_metrics
from glasklar.provenance.receipt import model_root
from glasklar.provenance.rundir import ATTESTATION, RunDir
from glasklar.provenance.signing import Signer
from glasklar.segment import work_after

UNSEALED = (ATTESTATION, ".lock", "replays.jsonl")
RUN_KIND, MODEL_KIND = "urn:x-glasklar:run:v1", "urn:x-glasklar:model:v1"


def seal(run: RunDir, signer: Signer) -> None:
    """Signs a run that has come to its end, released or abandoned; others are left alone, for they will grow.

    Raises RecordError for links in the folder.
    """
    events, _ = read_ledger(run.ledger_file)
    ended = {event.event for event in events} & {"released", "abandoned"}
    if not ended:
        return
    made_from = origin(events)
    if "released" in ended:
        model = {"model_root": model_root(run.model), "ledger_head": events[-1].hash, **made_from}
        _write(run.model / ATTESTATION, signer.sign(MODEL_KIND, file_hashes(run.model), model))
    facts = {"ledger": {"head": events[-1].hash, "events": len(events)}, **made_from}
    _write(run.attestation_file, signer.sign(RUN_KIND, file_hashes(run.path), facts))


def abandon(path: Path, reason: str, signer: Signer) -> None:
    """Writes into a run's ledger that nobody will go on with it, and why; then signs what there is.

    Raises CheckpointError where this is no run, it is in use, or it is released or abandoned already; RequestError
    without a reason.
    """
    if not reason.strip():
        raise RequestError("reason = '': say why the run is abandoned, for those who read its ledger")
    run = RunDir(path)
    canonical, written = canonical_json(run.recipe()).decode(), run.recipe_file.read_text(encoding="utf-8")
    with RunDir.create_or_open(path, canonical, written) as opened:
        ended = next((e for e in opened.ledger.events if e.event in ("released", "abandoned")), None)
        if ended is not None:
            raise CheckpointError(f"{path}: was {ended.event} on {ended.time}; there is nothing to abandon")
        recorded = opened.ledger.of("checkpoint")
        lost = work_after(recorded[-1].data if recorded else None, read_metrics(opened.metrics_file))
        opened.ledger.append("abandoned", {"reason": reason, "lost": lost})
        seal(opened, signer)


def origin(events: list[Event]) -> dict[str, Any]:
    """What a run was made from, as its ledger says: recipe, data, tokenizer, code, last state. None for what an
    abandoned run did not come to."""
    of = {event.event: event.data for event in events}
    return {
        "recipe": of["run"]["recipe"],
        "data_root": of.get("data", {}).get("root"),
        "tokenizer": of.get("tokenizer", {}).get("hash"),
        "code": of["run"]["code"],
        "state": of.get("checkpoint", {}).get("state_hash"),
    }


def file_hashes(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of all files of a sealed folder but those that a seal cannot or need not hold."""
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in sealed_files(folder)}


def sealed_files(folder: Path) -> list[Path]:
    """All files below `folder` but its own statement, its lock and the replays that are added later.

    Raises RecordError for a link, which would make the seal depend on files elsewhere, and for what is neither file nor
    folder.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise RecordError(f"{path}: a link; a run is sealed with files alone: replace it by what it points to")
        if path.is_dir():
            continue
        if not path.is_file():
            raise RecordError(f"{path}: neither a file nor a folder; remove it")
        if path.relative_to(folder).as_posix() not in UNSEALED:
            found.append(path)
    return found


def _write(path: Path, envelope: dict[str, Any]) -> None:
    write_atomic(path, canonical_json(envelope) + b"\n")
