"""`glasklar verify`: every hash and signature of a run or of a model's folder, computed again.

Three layers, each of which catches what the others let through:
    the statement    every file is, to the byte, what its maker signed; none is missing, none was added
    the chain        the ledger's lines follow from one another, and the signed head is its last
    the contents     checkpoints, data, tokenizer, figures and weights are those that the ledger speaks of

The third holds even against a maker who signs anew what was patched together. What none of them can show is that the
training took place as recorded: that takes `glasklar replay`.
"""

from __future__ import annotations

from pathlib import Path

from glasklar.audit.facts import RunFacts
from glasklar.audit.findings import Findings
from glasklar.audit.receipt import check_signer, verify_receipt
from glasklar.audit.seal import MODEL_KIND, RUN_KIND, file_hashes, origin, sealed_files
from glasklar.audit.verify_contents import check_contents, unknown_form
from glasklar.audit.verify_documents import check_documents
from glasklar.audit.verify_order import check_order
from glasklar.audit.verify_replays import check_replays
from glasklar.errors import CheckpointError, RecordError
from glasklar.provenance.environment import files_hash
from glasklar.provenance.ledger import Event, read_ledger
from glasklar.provenance.receipt import model_root
from glasklar.provenance.rundir import ATTESTATION, RunDir
from glasklar.provenance.signing import Statement, read_envelope


def locate(name: str, home: Path) -> Path:
    """What a person names: a path, or the name of a run. Raises CheckpointError where there is neither."""
    for path in (Path(name), home / "runs" / name):
        if path.exists():
            return path
    raise CheckpointError(f"{name!r}: no such file or folder, and no run of this name in {home / 'runs'}")


def verify(
    target: Path, *, home: Path, key: str | None = None, head: str | None = None, model: Path | None = None
) -> Findings:
    """Checks a run folder, the folder of a model released by a run, or a receipt.

    home   where this user's own key lies, to know whether it was the one that signed
    key    fingerprint that the signature must have: what the maker published, learned from elsewhere
    head   hash of the ledger's last line as it was anchored elsewhere
    model  folder of a receipt's model, where it is not among the runs of `home`

    Raises CheckpointError or RecordError where there is nothing to check: no run, no model, no statement with it.
    """
    if target.is_file():
        return verify_receipt(target, home=home, model=model, key=key)
    run = RunDir(target)
    if run.identity_file.is_file() and run.ledger_file.is_file():
        before = run.writer()
        found = _verify_run(run, home, key, head)
        if found.failures and (process := before or run.writer()):
            first = found.failures[0]
            raise CheckpointError(
                f"{target}: process {process} is writing to this run, so what does not fit ({first.subject}: "
                f"{first.text}) may be half-written; verify it when that process is done"
            )
        return found
    if (target / ATTESTATION).is_file():
        return _verify_model(target, home, key, head)
    if (target / "config.json").is_file():
        raise RecordError(
            f"{target}: has no {ATTESTATION}, so nobody claims anything about it that could be checked; "
            "verify the run that made it, or get the folder with its statement"
        )
    raise CheckpointError(f"{target}: neither a run folder, nor a model's folder, nor a receipt (a .json file)")


def _verify_run(run: RunDir, home: Path, key: str | None, head: str | None) -> Findings:
    found = Findings(str(run.path), "run")
    try:
        sealed_files(run.path)
    except RecordError as error:  # what is no plain file is not opened: it may lead elsewhere, or never end
        found.fails("files", str(error))
        return found
    events = _chain(run, found, head)
    ended = any(event.event in ("released", "abandoned") for event in events)
    if run.attestation_file.is_file():
        found.guard(ATTESTATION, lambda: _run_statement(run, events, found, home, key))
    elif ended:
        found.fails(
            ATTESTATION,
            "missing: the run has come to its end, but nobody vouches for its files; its maker signs a released one "
            f"with `glasklar train {run.recipe_file.name} --run …`",
        )
    else:
        found.unchecked(ATTESTATION, "the run is not finished and therefore not signed yet")
    if events:
        found.guard("course", lambda: _course(run, found))
        found.guard("code", lambda: _code(events, found))
        if wrong := unknown_form(events):
            found.fails(
                run.ledger_file.name,
                f"{wrong}, so its contents cannot be checked: it was put together by hand or written by another "
                "version; verify the run with the code that made it",
            )
        else:
            found.guard("order", lambda: check_order(run, events, found))
            check_contents(run, events, found)
            check_documents(run, events, found)
            check_replays(run, events, found)
    _lock(run, found)
    return found


def _course(run: RunDir, found: Findings) -> None:
    """How the run went, failures and interruptions included: nothing of it counts against the record."""
    facts = RunFacts.read(run)
    steps, seconds = facts.lost
    resumed = len(facts.of("resumed"))
    parts = [facts.state, *facts.ends()]
    if resumed:
        parts.append(f"interrupted and resumed {resumed} time{'s' if resumed > 1 else ''}")
    if steps:
        parts.append(f"steps after a checkpoint that were lost or done again: {steps} ({seconds:.0f} s)")
    found.holds("course", "; ".join(parts))


def _code(events: list[Event], found: Findings) -> None:
    """Whether the code that made the run is the one that checks it. Other code is no fault; it has to be known."""
    there, here = next(event.data["code"] for event in events if event.event == "run"), files_hash()
    git = there.get("git") or {}
    commit = f", commit {git['commit']}{' with changes' if git['dirty'] else ''}" if git else ""
    made_by = f"made by glasklar {there['version']}{commit}, files {there['files'][:16]}…"
    if there["files"] == here:
        found.holds("code", f"{made_by}: the code that runs here")
    else:
        found.unchecked(
            "code",
            f"{made_by}; the code here is another, {here[:16]}…: hashes and signatures are checked all the "
            "same, but for a replay to the bit take the code of that commit",
        )


def _chain(run: RunDir, found: Findings, head: str | None) -> list[Event]:
    """The ledger's events; none where the chain is broken."""
    name = run.ledger_file.name
    try:
        events, torn = read_ledger(run.ledger_file)
    except CheckpointError as error:
        found.fails(name, str(error).split(": ", 1)[-1].split(";")[0])
        return []
    if not events:
        found.fails(name, "is empty")
        return []
    found.holds(name, f"{len(events)} lines, each holds the hash of the line before; head {events[-1].hash}")
    if torn:
        found.fails(name, f"{len(torn)} bytes after the last complete line")
    if head is not None:
        found.expect(
            events[-1].hash == head.lower(),
            "anchored head",
            "the ledger ends where the head from outside says",
            f"the ledger ends with {events[-1].hash}, the head from outside is {head}: another or an older ledger",
        )
    return events


def _run_statement(run: RunDir, events: list[Event], found: Findings, home: Path, key: str | None) -> None:
    statement = read_envelope(run.attestation_file, RUN_KIND)
    _signer(statement, found, home, key)
    _files(run.path, statement, found)
    if not events:
        return
    signed = statement.predicate["ledger"]
    found.expect(
        signed == {"head": events[-1].hash, "events": len(events)},
        "signed head",
        "the signed head is the ledger's last line",
        f"signed were {signed['events']} lines ending with {signed['head']}; the ledger has {len(events)} ending with "
        f"{events[-1].hash}: lines were removed or added after signing, or the statement is an older one",
    )
    claims = {name: value for name, value in statement.predicate.items() if name != "ledger"}
    found.expect(
        claims == origin(events),
        "signed origin",
        "recipe, data root, tokenizer, code and last state in the statement are the ledger's",
        "the statement names another recipe, data root, tokenizer, code or state than the ledger",
    )
    if run.model.is_dir():
        _model_of_run(run, events, statement, found)


def _model_of_run(run: RunDir, events: list[Event], whole: Statement, found: Findings) -> None:
    """The model's own statement, which goes where the model goes, must say what the run's says."""
    statement = read_envelope(run.model / ATTESTATION, MODEL_KIND)
    wanted = {"model_root": model_root(run.model), "ledger_head": events[-1].hash, **origin(events)}
    found.expect(
        statement.predicate == wanted and statement.signer == whole.signer,
        f"model/{ATTESTATION}",
        "says of the model what the ledger says, signed with the same key",
        "says otherwise of the model than the ledger, or is signed with another key",
    )


def _verify_model(folder: Path, home: Path, key: str | None, head: str | None) -> Findings:
    found = Findings(str(folder), "model")
    found.guard(ATTESTATION, lambda: _model_statement(folder, found, home, key, head))
    return found


def _model_statement(folder: Path, found: Findings, home: Path, key: str | None, head: str | None) -> None:
    statement = read_envelope(folder / ATTESTATION, MODEL_KIND)
    _signer(statement, found, home, key)
    _files(folder, statement, found)
    claimed, true = statement.predicate["model_root"], model_root(folder)
    found.expect(
        claimed == true,
        "model root",
        f"{true} follows from the files",
        f"the statement says {claimed}, the files give {true}",
    )
    if head is not None:
        found.expect(
            statement.predicate["ledger_head"] == head.lower(),
            "anchored head",
            "the model belongs to the ledger whose head was given",
            f"the model belongs to the ledger with the head {statement.predicate['ledger_head']}, not {head}",
        )
    found.unchecked(
        "training",
        "that these weights follow from the recipe and data named in the statement: verify and replay the run",
    )


def _signer(statement: Statement, found: Findings, home: Path, key: str | None) -> None:
    found.holds("signature", f"valid, made with the Ed25519 key {statement.signer}")
    check_signer(statement.signer, found, home, key)


def _files(folder: Path, statement: Statement, found: Findings) -> None:
    """Every file against the statement, in both directions."""
    there, signed = file_hashes(folder), statement.subjects
    for name in sorted(there.keys() | signed.keys()):
        if name not in there:
            found.fails(name, "missing: it was there when the statement was signed")
        elif name not in signed:
            found.fails(name, "not in the signed statement: it was added later")
        elif there[name] != signed[name]:
            found.fails(name, f"changed after signing: SHA-256 {there[name][:16]}… instead of {signed[name][:16]}…")
    same = sum(there.get(name) == digest for name, digest in signed.items())
    found.expect(
        there == signed,
        "files",
        f"all {same} files are, to the byte, those that were signed, and there are no others",
        f"{same} of {len(signed)} signed files are as they were signed",
    )


def _lock(run: RunDir, found: Findings) -> None:
    """The lock is no part of the record, but nothing may hide in it: a process id or nothing."""
    path = run.path / ".lock"
    if not path.is_file():
        return
    with path.open("rb") as file:
        holder = file.read(64)
    if holder and not (len(holder) < 64 and holder.strip().isdigit()):
        found.fails(path.name, "holds something else than a process id")
    elif holder:
        found.unchecked(path.name, f"process {int(holder)} is writing to this run, or was killed while it did")
