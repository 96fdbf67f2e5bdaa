"""Forgeries by whoever knows all of this: hashes made to fit, documents written again, everything signed anew."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_verify import at, failures, lines_of, resign, write

from glasklar.audit.documents import write_documents
from glasklar.audit.replay import Record, replay
from glasklar.audit.report import write_report
from glasklar.audit.seal import MODEL_KIND, RUN_KIND
from glasklar.audit.verify import verify
from glasklar.errors import CheckpointError, RecordError
from glasklar.learn.state import load_state, save_state
from glasklar.provenance.hashing import canonical_json, sha256_file
from glasklar.provenance.rundir import ATTESTATION, RunDir
from glasklar.provenance.signing import PAYLOAD_TYPE, Signer, open_envelope, read_envelope
from glasklar.runtime import Runtime

Change = Callable[[list[dict]], None]


@pytest.fixture(scope="module")
def home(smoke_run: Path) -> Path:
    return smoke_run.parents[1]


@pytest.fixture
def run(smoke_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(smoke_run, tmp_path / "run")


def perfect(run: Path, key: Path, change: Change | None = None) -> None:
    """The best that a forger can do: the metrics' marks, the chain, documents, reports and both statements made to fit
    what was changed."""
    lines = lines_of(run)
    if change is not None:
        change(lines)
    metrics = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for line in lines:
        if "metrics" in line["data"]:
            kept = b"".join(metrics[: line["data"]["metrics"]["lines"]])
            line["data"]["metrics"]["sha256"] = hashlib.sha256(kept).hexdigest()
        if line["event"] == "released":
            files = line["data"]["files"]
            line["data"]["files"] = {name: sha256_file(run / "model" / name) for name in files}
    write(run, lines, chained=True)
    write_report(RunDir(run))
    write_documents(RunDir(run))
    resign(run, key)


def edit_metrics(run: Path, change: Callable[[dict], None]) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    for line in lines:
        change(line)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")


def test_a_perfect_forgery_of_nothing_raises_no_alarm(run: Path, home: Path) -> None:
    perfect(run, home)
    assert failures(run, home) == {}


# --- by the maker, who has the key ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["dossier/annex-xi.de.md", "dossier/dossier.en.html", "dossier/bom.cdx.json", "model/README.md", "report.html"],
)
def test_document_edited_and_signed_anew(run: Path, home: Path, name: str) -> None:
    path = run / name
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    resign(run, home)
    assert set(failures(run, home)) == {name}


def test_document_of_another_record(run: Path, home: Path, tmp_path: Path) -> None:
    """All documents made from a prettier ledger, which is then put back."""
    other = shutil.copytree(run, tmp_path / "other")
    perfect(other, home, lambda lines: at(lines, "checkpoint")["data"].update(seconds=0.5))
    for path in [*(other / "dossier").iterdir(), other / "model" / "README.md"]:
        shutil.copy(path, run / path.relative_to(other))
    resign(run, home)
    assert {"dossier/manifest.json", "dossier/dossier.en.html", "model/README.md"} <= set(failures(run, home))


@pytest.mark.parametrize(
    ("field", "value", "claim"),
    [
        ("loss", "0x1.0p-9", "loss"),
        ("gradient_norm", "0x1.0p-9", "gradient norm"),
        ("flops", 1.0e3, "FLOP"),
        ("cost", {"usd": 0.0, "usd_per_kwh": 0.3}, "cost"),
    ],
)
def test_figure_of_a_segment_in_all_places(run: Path, home: Path, field: str, value: object, claim: str) -> None:
    perfect(run, home, lambda lines: at(lines, "checkpoint")["data"].update({field: value}))
    found = failures(run, home)
    assert set(found) == {"figures"}
    assert f"{claim} of 02-rl-00000004" in found["figures"]


def test_evaluation_in_all_places_shows_when_it_is_done_again(run: Path, home: Path, runtime: Runtime) -> None:
    """Nothing in the record contradicts it; the state that was measured does."""

    def prettier(line: dict) -> None:
        if line.get("evaluation") == "after rl":
            line["tasks"]["sum"]["greedy"] = line["mean"]["greedy"] = 0.99

    edit_metrics(run, prettier)
    perfect(run, home, lambda lines: [prettier(line["data"]) for line in lines] and None)
    assert failures(run, home) == {}
    found = replay(RunDir(run), lambda record: record.stretches()[-1:], runtime=runtime)
    assert "after rl (step 4): mean.greedy is" in str(found.failures)
    assert "recorded was 0.99" in str(found.failures)


def test_watched_accuracy_in_all_places_shows_when_it_is_done_again(run: Path, home: Path, runtime: Runtime) -> None:
    def prettier(line: dict) -> None:
        if line.get("evaluation") == "rl step" and line["step"] == 4:
            line["tasks"]["letters"]["length"] = 3.0

    edit_metrics(run, prettier)
    perfect(run, home)
    assert failures(run, home) == {}
    found = replay(RunDir(run), lambda record: [record.leading_to("10")], runtime=runtime)
    assert "rl step (step 4): tasks.letters.length" in str(found.failures)


def test_readiness_in_all_places_shows_when_it_is_done_again(run: Path, home: Path, runtime: Runtime) -> None:
    perfect(run, home, lambda lines: at(lines, "readiness")["data"].update(thinking=0.95))
    assert failures(run, home) == {}
    found = replay(RunDir(run), lambda record: [record.leading_to("6")], runtime=runtime)
    assert "readiness (step 0): thinking is" in str(found.failures)


def insert(copied: str, place: int, data: dict | None = None, **changes: object) -> Change:
    """A change that copies the last line of an event to a place (from the end if negative), with other data."""

    def change(lines: list[dict]) -> None:
        line = json.loads(json.dumps(next(line for line in reversed(lines) if line["event"] == copied)))
        line["data"].update(data or {})
        line.update(changes)
        lines.insert(place if place >= 0 else len(lines) + 1 + place, line)

    return change


def move_time(lines: list[dict]) -> None:
    lines[3]["time"] = "certified on Monday"


OUT_OF_ORDER: dict[str, Change] = {
    "an evaluation before the training": insert("evaluation", 3),
    "a second run": insert("run", 1),
    "a second corpus": insert("data", 2, {"documents": 1}),
    "a checkpoint twice": insert("checkpoint", -2, {"flops": 1e25}),
    "a verdict on readiness after the end": insert("readiness", -2, {"ready": False}),
    "abandoned after its release": insert("released", -1, {"reason": "x", "lost": None}, event="abandoned"),
    "an event that no run has": insert("readiness", -1, event="audited"),
    "a time that is none": move_time,
    "a checkpoint of another stage": lambda lines: at(lines, "checkpoint")["data"].update(stage="pretrain"),
    "a checkpoint left out": lambda lines: lines.remove(at(lines, "checkpoint")),
}


@pytest.mark.parametrize("name", OUT_OF_ORDER)
def test_lines_that_no_run_writes_there(run: Path, home: Path, name: str) -> None:
    perfect(run, home, OUT_OF_ORDER[name])
    assert "order of the ledger" in failures(run, home)


def _last(lines: list[dict], **changes: object) -> dict:
    return {**lines[-1], **changes}


METRICS: dict[str, Callable[[list[dict]], list[dict]]] = {
    "steps after the end": lambda lines: [*lines, {**next(x for x in lines if x.get("stage") == "rl"), "step": 5}],
    "an evaluation under way that was none": lambda lines: [*lines, _last(lines, evaluation="rl step", step=3)],
    "an evaluation of another name": lambda lines: [*lines[:-1], _last(lines, evaluation="before rl"), lines[-1]],
    "the last evaluation left out": lambda lines: lines[:-1],
    "the last evaluation twice": lambda lines: [*lines, lines[-1]],
}


@pytest.mark.parametrize("name", METRICS)
def test_figures_that_no_run_writes_there(run: Path, home: Path, name: str) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in METRICS[name](lines))
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    perfect(run, home)
    assert "order of the metrics" in failures(run, home)


def test_a_replay_that_finds_other_figures_vouches_for_nothing(run: Path, home: Path, runtime: Runtime) -> None:
    def prettier(line: dict) -> None:
        if line.get("evaluation") == "after rl":
            line["tasks"]["sum"]["greedy"] = 0.99

    edit_metrics(run, prettier)
    perfect(run, home, lambda lines: [prettier(line["data"]) for line in lines] and None)
    replay(RunDir(run), lambda record: record.stretches()[-1:], runtime=runtime, signer=Signer.open(home))
    assert not (run / "replays.jsonl").exists()


STRANGE = ["dossier/certificate.html", "dossier/deep/modeling.py", "data/modeling.py", "model/approved/", "approved/"]


@pytest.mark.parametrize("name", STRANGE)
def test_strange_files_and_empty_folders_are_named(run: Path, home: Path, name: str) -> None:
    path = run / name
    path.mkdir(parents=True) if name.endswith("/") else path.parent.mkdir(exist_ok=True)
    if not name.endswith("/"):
        path.write_text("certified")
    resign(run, home)
    assert name in failures(run, home)


def test_an_unfinished_run_has_no_report_and_no_card(run: Path, home: Path) -> None:
    write(run, (lines := lines_of(run))[:-1], chained=True)
    assert lines[-1]["event"] == "released"
    (run / ATTESTATION).unlink()
    found = failures(run, home)
    assert {"report.html", "report.md", "model/README.md", "dossier/manifest.json"} <= set(found)


def test_what_is_signed_is_not_signed_anew(run: Path, home: Path, tmp_path: Path, runtime: Runtime) -> None:
    from glasklar import api
    from smoke import SMOKE

    card = run / "dossier" / "model-card.en.md"
    card.write_text(card.read_text(encoding="utf-8") + "Certified.", encoding="utf-8")
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file() and path.name != ".lock"}
    api.train(str(SMOKE), runtime=runtime, home=tmp_path / "other", run=run)
    assert before == {path: path.read_bytes() for path in before}
    assert "dossier/model-card.en.md" in failures(run, home)


def test_while_a_process_writes_nothing_is_called_false(run: Path, home: Path) -> None:
    (run / "report.html").write_text("half")
    written = (run / "recipe.toml").read_text(encoding="utf-8")
    with (
        RunDir.create_or_open(run, (run / "recipe.json").read_text(encoding="utf-8"), written),
        pytest.raises(CheckpointError, match=f"process {os.getpid()} is writing"),
    ):
        verify(run, home=home)
    assert "report.html" in failures(run, home)


@pytest.mark.parametrize(
    "change",
    [{"data": [1, 2]}, {"data": None}, {"event": ["x"]}, {"event": "checkpoint", "data": {"name": ["x"]}}],
)
def test_lines_of_another_form_are_findings(run: Path, home: Path, change: dict) -> None:
    lines = lines_of(run)
    lines[5].update(change)
    write(run, lines, chained=True)
    assert "ledger.jsonl" in failures(run, home)


def test_second_evaluation_smuggled_in(run: Path, home: Path) -> None:
    """The report shows the last one; there is none at this place of the training."""

    def twice(lines: list[dict]) -> None:
        data = json.loads(json.dumps(at(lines, "evaluation")["data"]))
        data["tasks"]["sum"]["greedy"] = 1.0
        place = next(i for i, line in enumerate(lines) if line["event"] == "checkpoint")
        lines.insert(place + 1, {**at(lines, "evaluation"), "data": data})

    perfect(run, home, twice)
    assert "not the evaluation that belongs there" in failures(run, home)["evaluations"]


def test_training_tokens_in_all_places_show_when_the_data_are_made_again(
    run: Path, home: Path, runtime: Runtime
) -> None:
    from safetensors.numpy import load_file, save_file

    path = run / "data" / "train.safetensors"
    arrays = load_file(path)
    arrays["ids"][10:14] = arrays["ids"][20:24]
    save_file(arrays, path)
    facts = json.loads((run / "data" / "facts.json").read_bytes()) | {"train_file": sha256_file(path)}
    (run / "data" / "facts.json").write_bytes(canonical_json(facts))
    perfect(run, home, lambda lines: at(lines, "data")["data"].update(train_file=facts["train_file"]))
    assert failures(run, home) == {}
    found = replay(RunDir(run), Record.stretches, runtime=runtime, rebuild_data=True)
    assert [entry.subject for entry in found.failures] == ["data"]
    assert "train_file is" in found.failures[0].text


def test_roots_of_sources_must_give_the_root(run: Path, home: Path) -> None:
    def forged(facts: dict) -> None:
        source = next(iter(facts["source_roots"].values()))
        source["root"] = "ab" * 32

    facts = json.loads((run / "data" / "facts.json").read_bytes())
    forged(facts)
    (run / "data" / "facts.json").write_bytes(canonical_json(facts))
    perfect(run, home, lambda lines: forged(at(lines, "data")["data"]))
    assert set(failures(run, home)) == {"source roots"}


def test_weights_patched_in_state_and_model(run: Path, home: Path, runtime: Runtime) -> None:
    """The last state and the released weights agree; the steps before do not lead there."""
    folder = run / "checkpoints" / "02-rl-00000004"
    tensors, meta = load_state(folder)
    name = next(name for name in tensors if name.startswith("master.") and name.endswith("norm.weight"))
    new = save_state(folder, {**tensors, name: tensors[name] * 1.01}, meta)

    def recorded(lines: list[dict]) -> None:
        at(lines, "checkpoint")["data"]["state_hash"] = new

    perfect(run, home, recorded)
    assert "weights" in failures(run, home)  # the model was forgotten
    from glasklar.model.checkpoint import save_model
    from glasklar.recipe import Recipe
    from glasklar.training import state_at

    recipe = Recipe.read(RunDir(run).recipe(), "recipe.json")
    names = ("tokenizer.json", "tokenizer_config.json", "recipe.json")
    extra = {name: (run / "model" / name).read_bytes() for name in names}
    save_model(state_at(recipe, folder, runtime), run / "model", extra=extra)
    perfect(run, home)
    assert failures(run, home) == {}
    found = replay(RunDir(run), lambda record: record.stretches()[-1:], runtime=runtime)
    assert "another state than recorded at 02-rl-00000004" in str(found.failures)


@pytest.mark.parametrize(
    "name", ["model/modeling_glasklar.py", "model/sub/x.json", "checkpoints/02-rl-00000004/notes.txt", "setup.py"]
)
def test_file_added_and_signed(run: Path, home: Path, name: str) -> None:
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("print('hello')\n")
    resign(run, home)
    assert "is no part of a run" in failures(run, home)[name]


def test_model_with_a_statement_of_its_own(run: Path, home: Path, tmp_path: Path) -> None:
    """The model's statement, which travels with it, claims other data; alone it holds, in the run it does not."""
    whole = read_envelope(run / "model" / ATTESTATION, MODEL_KIND)
    claims = {**whole.predicate, "data_root": "ab" * 32}
    forged = Signer.open(home).sign(MODEL_KIND, whole.subjects, claims)
    (run / "model" / ATTESTATION).write_bytes(canonical_json(forged) + b"\n")
    assert failures(run / "model", home) == {}
    statement = read_envelope(run / ATTESTATION, RUN_KIND)
    subjects = {**statement.subjects, f"model/{ATTESTATION}": sha256_file(run / "model" / ATTESTATION)}
    again = Signer.open(home).sign(RUN_KIND, subjects, statement.predicate)
    (run / ATTESTATION).write_bytes(canonical_json(again) + b"\n")
    assert set(failures(run, home)) == {f"model/{ATTESTATION}"}


# --- by others --------------------------------------------------------------------------------------------------------


def test_everything_forged_under_another_key(run: Path, home: Path, tmp_path: Path) -> None:
    perfect(run, tmp_path / "forger", lambda lines: lines.remove(at(lines, "readiness")))
    key = Signer.open(home).fingerprint
    assert "signer" in failures(run, home, key=key)
    assert any(e.subject == "signer" and e.verdict == "unchecked" for e in verify(run, home=home).entries)


def test_key_file_replaced(run: Path, home: Path, tmp_path: Path) -> None:
    """Who swaps the key in the home makes his runs "your own"; the fingerprint published elsewhere tells."""
    published = Signer.open(home).fingerprint
    forger = tmp_path / "forger"
    perfect(run, forger)
    assert Signer.open(forger).fingerprint != published
    assert "not with the key asked for" in failures(run, forger, key=published)["signer"]


def test_older_state_of_the_whole_folder(run: Path, home: Path) -> None:
    """An earlier, honest and signed state of the folder: the anchored head tells that there was a later one."""
    newest = read_envelope(run / ATTESTATION, RUN_KIND).predicate["ledger"]["head"]
    perfect(run, home, lambda lines: lines.remove(at(lines, "evaluation")))
    assert set(failures(run, home, head=newest)) >= {"anchored head"}


def signed_text(payload: str, home: Path) -> bytes:
    """An envelope around any text, as a maker can sign who writes it by hand."""
    signer = Signer.open(home)
    content = payload.encode()
    encoded = b"DSSEv1 %d %b %d %b" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(content), content)
    signature = {"keyid": signer.fingerprint, "sig": base64.b64encode(signer._key.sign(encoded)).decode()}
    envelope = {
        "payload": base64.b64encode(content).decode(), "payloadType": PAYLOAD_TYPE, "signatures": [signature],
    }  # fmt: skip
    return canonical_json(envelope) + b"\n"


@pytest.mark.parametrize("how", ["a name twice", "blanks", "escapes"])
def test_what_was_signed_can_be_read_in_one_way_only(run: Path, home: Path, how: str) -> None:
    envelope = json.loads((run / ATTESTATION).read_bytes())
    payload = base64.b64decode(envelope["payload"]).decode()
    forged = {
        "a name twice": payload.replace('"ledger":{', '"ledger":{"events":1,"head":"ab"},"ledger":{', 1),
        "blanks": payload.replace(",", ", ", 1),
        "escapes": payload.replace("recipe.json", "recip\\u0065.json", 1),
    }[how]
    assert forged != payload
    (run / ATTESTATION).write_bytes(signed_text(forged, home))
    assert ATTESTATION in failures(run, home)
    (run / ATTESTATION).write_bytes(signed_text(payload, home))
    assert failures(run, home) == {}


def test_names_that_stand_twice(run: Path, home: Path) -> None:
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    twice = lines[1].replace(b'{"data":{', b'{"data":{"root":"ab"},"data":{', 1)
    (run / "ledger.jsonl").write_bytes(lines[0] + twice + b"".join(lines[2:]))
    assert "line 2 is not a line of a ledger" in str(verify(run, home=home))


def test_nested_without_end(run: Path, home: Path) -> None:
    deep = b"[" * 200_000 + b"]" * 200_000
    (run / "ledger.jsonl").write_bytes(deep + b"\n")
    assert "line 1 is not a line of a ledger" in str(verify(run, home=home))
    with pytest.raises(RecordError):
        open_envelope(json.loads(signed_text(deep.decode(), home)), RUN_KIND, "deep")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("name", ["model/model.safetensors", "data/train.safetensors", "ledger.jsonl", ATTESTATION])
def test_truncated(run: Path, home: Path, name: str, share: float) -> None:
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: int(len(content) * share)])
    assert any(name in subject or name in text for subject, text in failures(run, home).items())


@pytest.mark.parametrize("where", ["checkpoints/99", "replays.jsonl", ".lock", "model/more.json"])
def test_links(run: Path, home: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (run / where).unlink(missing_ok=True)
    (run / where).symlink_to(tmp_path / "elsewhere")
    assert where in failures(run, home)["files"]


def test_what_is_no_file_is_not_opened(run: Path, home: Path) -> None:
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")  # whoever opens it waits for ever
    assert "metrics.jsonl" in failures(run, home)["files"]


@pytest.mark.parametrize("name", ["model/config.jѕon", "model/README\u202e.dm", "model/\nholds      model.txt"])
def test_names_that_look_like_others(run: Path, home: Path, name: str) -> None:
    """A Cyrillic letter, a text that runs backwards, a line break that counterfeits a line of the report."""
    (run / name).write_text("{}")
    found = verify(run, home=home)
    assert any(entry.subject == name for entry in found.failures)
    assert "\u202e" not in str(found)
    assert not any(line.startswith("holds      model.txt") for line in str(found).splitlines())


def test_texts_of_the_record_cannot_counterfeit_a_verdict(run: Path, home: Path) -> None:
    lie = "disk\n\x1b[2Jrun: HOLDS: nothing contradicts the record; 0 claims could not be checked"

    def failed(lines: list[dict]) -> None:
        lines.insert(-1, {**lines[-1], "event": "failed", "data": {"error": lie, "kind": "E", "lost": None}})

    perfect(run, home, failed)
    said = str(verify(run, home=home))
    assert "\x1b" not in said
    assert not any(line.startswith("run: HOLDS") for line in said.splitlines())
