"""Verification of runs and models: untouched copies hold, every forgery is found and named."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from glasklar import api
from glasklar.audit.findings import Findings
from glasklar.audit.seal import MODEL_KIND, RUN_KIND, abandon, seal
from glasklar.audit.verify import verify
from glasklar.audit.verify_order import Course
from glasklar.audit.verify_replays import checkpoint_events
from glasklar.display import QuietReporter
from glasklar.errors import CheckpointError, RecordError, RequestError
from glasklar.provenance.hashing import canonical_json, sha256_file
from glasklar.provenance.ledger import Event, read_ledger
from glasklar.provenance.receipt import model_root
from glasklar.provenance.rundir import ATTESTATION, RunDir
from glasklar.provenance.signing import Signer, open_envelope, read_envelope
from glasklar.recipe import load_recipe
from glasklar.runtime import Runtime
from smoke import SMOKE

FLIPS, COPIES = 300, 50


@pytest.fixture(scope="module")
def home(smoke_run: Path) -> Path:
    return smoke_run.parents[1]


@pytest.fixture(scope="module")
def other_run(tmp_path_factory: pytest.TempPathFactory, runtime: Runtime) -> Path:
    return api.train(str(SMOKE), runtime=runtime, home=tmp_path_factory.mktemp("other"), seed=4)


@pytest.fixture
def run(smoke_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(smoke_run, tmp_path / "run")


def failures(run: Path, home: Path, **named: str) -> dict[str, str]:
    return {entry.subject: entry.text for entry in verify(run, home=home, **named).failures}


# --- what holds -------------------------------------------------------------------------------------------------------


def test_untouched_copies_raise_no_alarm(smoke_run: Path, home: Path, tmp_path: Path) -> None:
    for number in range(COPIES):
        copy = shutil.copytree(smoke_run, tmp_path / f"copy {number}", copy_function=shutil.copy)
        found = verify(copy, home=home)
        assert found.verdict == "holds", found
        shutil.rmtree(copy)


def test_model_folder_holds_where_it_was_copied_to(smoke_run: Path, tmp_path: Path) -> None:
    model = shutil.copytree(smoke_run / "model", tmp_path / "elsewhere")
    found = verify(model, home=tmp_path)
    assert found.exit_code == 0
    assert any(entry.subject == "signer" and entry.verdict == "unchecked" for entry in found.entries)
    assert model_root(model) == model_root(smoke_run / "model")


def test_key_and_head_from_outside(smoke_run: Path, home: Path) -> None:
    key = Signer.open(home).fingerprint
    head = read_envelope(smoke_run / ATTESTATION, RUN_KIND).predicate["ledger"]["head"]
    assert failures(smoke_run, home, key=key, head=head) == {}
    assert set(failures(smoke_run, home, key="0" * 64)) == {"signer"}
    assert set(failures(smoke_run, home, head="0" * 64)) == {"anchored head"}
    assert set(failures(smoke_run / "model", home, head="0" * 64)) == {"anchored head"}
    assert failures(smoke_run / "model", home, head=head) == {}


def test_sealing_again_changes_nothing(run: Path, home: Path) -> None:
    before = {path: sha256_file(path) for path in run.rglob("*") if path.is_file()}
    seal(RunDir(run), Signer.open(home))
    assert {path: sha256_file(path) for path in run.rglob("*") if path.is_file()} == before


def test_unfinished_run_is_not_a_failure(run: Path, home: Path) -> None:
    for path in (run / "model", run / "dossier"):
        shutil.rmtree(path, ignore_errors=True)
    for name in (ATTESTATION, "report.md", "report.html"):
        (run / name).unlink()
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(line for line in lines if b'"event":"released"' not in line))
    found = verify(run, home=home)
    assert found.verdict == "holds"
    assert any(entry.subject == ATTESTATION and entry.verdict == "unchecked" for entry in found.entries)


def test_nothing_to_check_is_an_error(tmp_path: Path, run: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a run"):
        verify(tmp_path, home=tmp_path)
    (run / "model" / ATTESTATION).unlink()
    with pytest.raises(RecordError, match="nobody claims"):
        verify(run / "model", home=tmp_path)


def test_exit_codes_for_scripts(run: Path, tmp_path: Path) -> None:
    def code(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "glasklar.cli", "verify", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    good = code(str(run), "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["verdict"] == "holds"
    flip(run / "report.md", 10)
    bad = code(str(run))
    assert bad.returncode == 1
    assert "report.md" in bad.stdout
    assert code(str(tmp_path / "nothing")).returncode == 2


# --- single bytes -----------------------------------------------------------------------------------------------------


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_every_flipped_byte_is_found_and_its_file_named(run: Path, home: Path) -> None:
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.stat().st_size)
    rng = random.Random(6)
    for number in range(FLIPS):
        # Every file at least once, then any.
        path = files[number] if number < len(files) else rng.choice(files)
        place, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        flip(path, place, bit)
        name = path.relative_to(run).as_posix()
        found = failures(run, home)
        assert any(name in subject or name in text for subject, text in found.items()), (name, place, bit, found)
        flip(path, place, bit)
    assert failures(run, home) == {}


# --- forgeries --------------------------------------------------------------------------------------------------------


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_bytes().splitlines()]


def write(run: Path, lines: list[dict], *, chained: bool) -> None:
    """Writes a ledger; `chained`: with hashes that fit, as a forger would who knows how they are made."""
    previous, out = "0" * 64, []
    for index, line in enumerate(lines):
        event = Event(**line)
        if chained:
            event = Event.make(index, event.time, event.event, event.data, previous)
            previous = event.hash
        out.append(event.line())
    (run / "ledger.jsonl").write_bytes(b"".join(out))


def resign(run: Path, key: Path) -> None:
    seal(RunDir(run), Signer.open(key))


def at(lines: list[dict], event: str) -> dict:
    return [line for line in lines if line["event"] == event][-1]


def edit_ledger(run: Path, change: Callable[[list[dict]], None], *, chained: bool) -> None:
    lines = lines_of(run)
    change(lines)
    write(run, lines, chained=chained)


def forged_loss(lines: list[dict]) -> None:
    at(lines, "checkpoint")["data"]["loss"] = "0x1.0p-3"


def forged_state(lines: list[dict]) -> None:
    at(lines, "checkpoint")["data"]["state_hash"] = "ab" * 32


def forged_score(lines: list[dict]) -> None:
    at(lines, "evaluation")["data"]["mean"]["greedy"] = 0.99


def forged_root(lines: list[dict]) -> None:
    at(lines, "data")["data"]["root"] = "cd" * 32


def forged_recipe(lines: list[dict]) -> None:
    at(lines, "run")["data"]["recipe"] = "cd" * 32


def inserted(lines: list[dict]) -> None:
    lines.insert(-1, {**at(lines, "evaluation"), "time": "2026-01-20T08:00:00.000Z"})


def dropped(lines: list[dict]) -> None:
    lines.remove(at(lines, "readiness"))


def reordered(lines: list[dict]) -> None:
    lines[-3], lines[-2] = lines[-2], lines[-3]


def cut(lines: list[dict]) -> None:
    del lines[-1]


@pytest.mark.parametrize("change", [forged_loss, inserted, dropped, reordered])
def test_ledger_edited_by_hand(run: Path, home: Path, change: Callable[[list[dict]], None]) -> None:
    edit_ledger(run, change, chained=False)
    assert "ledger.jsonl" in failures(run, home)


@pytest.mark.parametrize("change", [forged_loss, inserted, dropped, reordered, cut])
def test_ledger_forged_with_hashes_that_fit(run: Path, home: Path, change: Callable[[list[dict]], None]) -> None:
    edit_ledger(run, change, chained=True)
    assert {"signed head", "ledger.jsonl"} <= set(failures(run, home))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (forged_state, "checkpoints/02-rl-00000004"),
        (forged_score, "evaluations"),
        (forged_root, "data/facts.json"),
        (forged_recipe, "recipe.json"),
    ],
)
def test_ledger_forged_and_signed_by_its_own_maker(
    run: Path, home: Path, change: Callable[[list[dict]], None], named: str
) -> None:
    edit_ledger(run, change, chained=True)
    resign(run, home)
    assert named in failures(run, home)


def test_older_ledger_signed_by_somebody_else(run: Path, home: Path, tmp_path: Path) -> None:
    head = read_envelope(run / ATTESTATION, RUN_KIND).predicate["ledger"]["head"]
    edit_ledger(run, lambda lines: lines.remove(at(lines, "evaluation")), chained=True)
    resign(run, tmp_path / "forger")
    found = failures(run, home, head=head, key=Signer.open(home).fingerprint)
    assert {"anchored head", "signer"} <= set(found)


def test_statement_of_another_run(run: Path, other_run: Path, home: Path) -> None:
    shutil.copy(other_run / ATTESTATION, run / ATTESTATION)
    assert {"signed head", "signed origin", "files"} <= set(failures(run, home))


def test_statement_taken_away(run: Path, home: Path) -> None:
    (run / ATTESTATION).unlink()
    assert ATTESTATION in failures(run, home)


def test_statement_about_something_else(run: Path, home: Path) -> None:
    shutil.copy(run / "model" / ATTESTATION, run / ATTESTATION)
    assert "about something else" in failures(run, home)[ATTESTATION]


def test_weights_of_another_run(run: Path, other_run: Path, home: Path) -> None:
    shutil.copy(other_run / "model" / "model.safetensors", run / "model")
    assert {"model/model.safetensors", "weights"} <= set(failures(run, home))
    assert "model.safetensors" in failures(run / "model", home)


def test_weights_swapped_by_the_maker_in_all_places(run: Path, other_run: Path, home: Path) -> None:
    """Ledger, chain and signatures are made to fit: the last state gives it away, and so do the documents."""
    weights = run / "model" / "model.safetensors"
    shutil.copy(other_run / "model" / "model.safetensors", weights)
    lines = lines_of(run)
    at(lines, "released")["data"]["files"]["model.safetensors"] = sha256_file(weights)
    write(run, lines, chained=True)
    resign(run, home)
    found = failures(run, home)
    assert found.pop("weights")
    # All else that speaks up are documents, which still name the weights that the record had before.
    assert all("not the document" in text for text in found.values())


def test_checkpoint_of_another_run(run: Path, other_run: Path, home: Path) -> None:
    name = "01-sft-00000004"
    shutil.rmtree(run / "checkpoints" / name)
    shutil.copytree(other_run / "checkpoints" / name, run / "checkpoints" / name)
    resign(run, home)
    assert "of another run" in failures(run, home)[f"checkpoints/{name}"]


def test_checkpoint_of_another_step(run: Path, home: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "02-rl-00000004")
    shutil.copytree(run / "checkpoints" / "02-rl-00000003", run / "checkpoints" / "02-rl-00000004")
    resign(run, home)
    assert "checkpoints/02-rl-00000004" in failures(run, home)


def test_checkpoint_that_nobody_recorded(run: Path, home: Path) -> None:
    shutil.copytree(run / "checkpoints" / "02-rl-00000003", run / "checkpoints" / "02-rl-00000002x")
    resign(run, home)
    assert "checkpoints/02-rl-00000002x" in failures(run, home)


def test_figures_made_prettier(run: Path, home: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[3] = json.dumps({**json.loads(lines[3]), "loss": 0.01}) + "\n"
    (run / "metrics.jsonl").write_text("".join(lines))
    resign(run, home)
    assert "metrics.jsonl" in failures(run, home)


def test_recipe_of_another_meaning(run: Path, home: Path) -> None:
    path = run / "recipe.toml"
    path.write_text(path.read_text().replace("4e-3", "5e-3"))
    resign(run, home)
    assert set(failures(run, home)) == {"recipe.toml"}


def test_tokenizer_of_another_run(run: Path, other_run: Path, home: Path) -> None:
    shutil.copy(other_run / "model" / "tokenizer.json", run / "model")
    resign(run, home)
    assert "model/tokenizer.json" in failures(run, home)


def test_file_added(run: Path, home: Path) -> None:
    (run / "model" / "modeling_glasklar.py").write_text("print('hello')\n")
    assert "no part of a run" in failures(run, home)["model/modeling_glasklar.py"]
    assert "added later" in failures(run / "model", home)["modeling_glasklar.py"]


def test_file_removed(run: Path, home: Path) -> None:
    (run / "report.html").unlink()
    assert "missing" in failures(run, home)["report.html"]


def test_link_in_place_of_a_file(run: Path, home: Path, tmp_path: Path) -> None:
    shutil.move(run / "report.html", tmp_path / "elsewhere.html")
    (run / "report.html").symlink_to(tmp_path / "elsewhere.html")
    assert any("report.html" in text for text in failures(run, home).values())


def test_something_hidden_in_the_lock(run: Path, home: Path) -> None:
    (run / ".lock").write_text("12 curl evil")
    assert ".lock" in failures(run, home)


# --- envelopes --------------------------------------------------------------------------------------------------------


def test_changed_envelopes_are_refused(home: Path) -> None:
    envelope = Signer.open(home).sign(MODEL_KIND, {"a": "00" * 32}, {"x": 1})
    assert open_envelope(envelope, MODEL_KIND, "e").subjects == {"a": "00" * 32}
    text = canonical_json(envelope).decode()
    rng = random.Random(1)
    for _ in range(100):
        place = rng.randrange(len(text))
        changed = text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]
        try:
            value = json.loads(changed)
        except ValueError:
            continue
        with pytest.raises(RecordError):
            open_envelope(value, MODEL_KIND, "e")


def test_private_key_is_the_owners_alone(tmp_path: Path) -> None:
    signer = Signer.open(tmp_path)
    path = tmp_path / "keys" / "ed25519.pem"
    assert path.stat().st_mode & 0o777 == 0o600
    assert Signer.open(tmp_path).fingerprint == signer.fingerprint
    path.chmod(0o644)
    with pytest.raises(RecordError, match="chmod 600"):
        Signer.open(tmp_path)


# --- runs that came to no good end ------------------------------------------------------------------------------------


def course(found: Findings) -> str:
    return next(entry.text for entry in found.entries if entry.subject == "course")


class Breaks(QuietReporter):
    """Fails at a step of a stage, as a full disk or a diverging loss would."""

    def __init__(self, stage: str, step: int, error: BaseException) -> None:
        self.stage_, self.step_, self.error = stage, step, error

    def step(self, line: dict) -> None:
        if (line["stage"], line["step"]) == (self.stage_, self.step_):
            raise self.error


@pytest.fixture(scope="module")
def broken_run(tmp_path_factory: pytest.TempPathFactory, runtime: Runtime) -> Path:
    """A run that failed in its fifth step and was stopped in its seventh: two interruptions, a step lost with each."""
    home = tmp_path_factory.mktemp("broken")
    for error, step in ((RuntimeError("loss is NaN"), 5), (KeyboardInterrupt(), 7)):
        with pytest.raises(type(error)):
            api.train(str(SMOKE), runtime=runtime, home=home, reporter=Breaks("pretrain", step, error))
    return home / "runs" / "smoke"


def test_failures_stand_in_the_ledger_with_what_they_cost(broken_run: Path) -> None:
    events, _ = read_ledger(broken_run / "ledger.jsonl")
    named = [event.event for event in events if event.event in ("failed", "stopped", "resumed", "checkpoint")]
    assert named == ["checkpoint", "checkpoint", "failed", "resumed", "checkpoint", "stopped"]
    failed, resumed, stopped = (
        next(event.data for event in events if event.event == name) for name in ("failed", "resumed", "stopped")
    )
    assert (failed["kind"], failed["error"]) == ("RuntimeError", "loss is NaN")
    assert failed["lost"]["steps"] == stopped["lost"]["steps"] == resumed["lost"]["steps"] == 1
    assert failed["lost"]["flops"] > 0
    assert failed["lost"]["energy"]["joules"] > 0
    cost = events[-2].data["cost"]
    assert cost["usd"] == pytest.approx(events[-2].data["energy"]["joules"] / 3.6e6 * cost["usd_per_kwh"])


def test_verify_tells_the_course_and_nothing_counts_against_the_record(broken_run: Path, home: Path) -> None:
    found = verify(broken_run, home=home)
    assert found.verdict == "holds", found
    for part in ("stopped by its owner", "failed: loss is NaN", "interrupted and resumed 1 time", "done again: 2 ("):
        assert part in course(found)
    assert any(e.subject == ATTESTATION and e.verdict == "unchecked" for e in found.entries)


def test_broken_run_goes_on_to_the_same_states(
    broken_run: Path, smoke_run: Path, tmp_path: Path, runtime: Runtime
) -> None:
    run = shutil.copytree(broken_run, tmp_path / "runs" / "smoke")
    api.train(str(SMOKE), runtime=runtime, home=tmp_path)

    def states(folder: Path) -> dict[str, str]:
        recorded = checkpoint_events(read_ledger(folder / "ledger.jsonl")[0])
        return {name: data["state_hash"] for name, data in recorded.items()}

    assert states(run) == states(smoke_run)
    found = verify(run, home=tmp_path)
    assert found.verdict == "holds", found
    for part in ("finished", "failed: loss is NaN", "stopped by its owner", "resumed 2 times", "done again: 2 ("):
        assert part in course(found)


def test_abandoned_run_is_signed_and_cannot_be_gone_on_with(broken_run: Path, tmp_path: Path, runtime: Runtime) -> None:
    run = shutil.copytree(broken_run, tmp_path / "runs" / "smoke")
    signer = Signer.open(tmp_path)
    with pytest.raises(RequestError, match="why"):
        abandon(run, " ", signer)
    abandon(run, "the loss diverges", signer)
    found = verify(run, home=tmp_path)
    assert found.verdict == "holds", found
    assert "abandoned: the loss diverges" in course(found)
    assert "done again: 2 (" in course(found)
    with pytest.raises(CheckpointError, match="nothing to abandon"):
        abandon(run, "again", signer)
    with pytest.raises(CheckpointError, match=r"abandoned \(the loss diverges\).*another --run"):
        api.train(str(SMOKE), runtime=runtime, home=tmp_path)
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(line for line in lines if b'"failed"' not in line))
    assert "ledger.jsonl" in {entry.subject for entry in verify(run, home=tmp_path).failures}


def test_a_run_that_failed_before_its_first_step_holds(tmp_path: Path, runtime: Runtime) -> None:
    class Refuses(QuietReporter):
        def note(self, text: str) -> None:
            raise RuntimeError("no such source")

    with pytest.raises(RuntimeError):
        api.train(str(SMOKE), runtime=runtime, home=tmp_path, reporter=Refuses())
    run = tmp_path / "runs" / "smoke"
    for _ in range(2):
        found = verify(run, home=tmp_path)
        assert found.verdict == "holds", found
        assert "failed: no such source" in course(found)
        if not (run / ATTESTATION).exists():
            abandon(run, "the source is gone", Signer.open(tmp_path))


def test_released_run_is_not_abandoned(run: Path, home: Path) -> None:
    with pytest.raises(CheckpointError, match="was released on"):
        abandon(run, "changed my mind", Signer.open(home))


def test_ledger_of_another_form_is_refused_in_words(run: Path, home: Path) -> None:
    def nameless(lines: list[dict]) -> None:
        for line in lines:
            line["data"].pop("name", None)

    edit_ledger(run, nameless, chained=True)
    found = verify(run, home=home)
    assert any("(checkpoint) lacks name" in e.text and "another version" in e.text for e in found.failures), found


def test_run_of_another_code_holds_and_says_so(run: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_by = lines_of(run)[0]["data"]["code"]["files"]
    monkeypatch.setattr("glasklar.audit.verify.files_hash", lambda: made_by)
    assert next(e for e in verify(run, home=home).entries if e.subject == "code").verdict == "holds"
    monkeypatch.setattr("glasklar.audit.verify.files_hash", lambda: "00" * 32)
    found = verify(run, home=home)
    assert found.verdict == "holds"
    said = next(e for e in found.entries if e.subject == "code")
    assert said.verdict == "unchecked"
    assert "the code here is another" in said.text


def test_a_checkpoint_that_was_not_due_comes_before_a_stop(smoke_run: Path) -> None:
    recipe = load_recipe(str(smoke_run / "recipe.toml"))
    events, _ = read_ledger(smoke_run / "ledger.jsonl")
    place = next(i for i, event in enumerate(events) if event.data.get("name") == "00-pretrain-00000004")
    early = replace(events[place], data={**events[place].data, "name": "00-pretrain-00000003", "step": 3})
    stopped = replace(events[place], event="stopped", data={})
    resumed = replace(events[place], event="resumed", data={"checkpoint": "00-pretrain-00000003"})

    def wrong(*between: Event) -> list[str]:
        course = Course(recipe)
        return [why for event in [*events[:place], *between, *events[place:]] if (why := course.take(event))]

    assert not wrong()
    assert not wrong(early, stopped, resumed)
    assert wrong(early)[0].startswith("a checkpoint that was not due")
    assert wrong(early, early, stopped, resumed)
    assert wrong(stopped, resumed)  # from a state that was never recorded


def test_a_run_cut_off_after_its_release_is_said_to_be(run: Path, home: Path, runtime: Runtime) -> None:
    shutil.rmtree(run / "dossier")
    for name in ("report.md", "report.html", ATTESTATION, "model/README.md", f"model/{ATTESTATION}"):
        (run / name).unlink()
    subjects = [entry.subject for entry in verify(run, home=home).failures]
    assert subjects == [ATTESTATION, "documents"]
    api.train(str(run / "recipe.toml"), runtime=runtime, home=home, run=run)
    assert verify(run, home=home).verdict == "holds"
