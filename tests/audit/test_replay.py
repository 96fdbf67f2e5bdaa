"""Replay: honest training comes out equal to the bit, in every stage; a patched state or figure does not."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace as changed
from pathlib import Path

import pytest

from glasklar.audit.findings import Findings
from glasklar.audit.replay import Record, Stretch, draw, replay
from glasklar.audit.verify import verify
from glasklar.errors import RecordError, RequestError
from glasklar.learn.state import load_state, save_state
from glasklar.provenance.ledger import Event
from glasklar.provenance.rundir import RunDir
from glasklar.provenance.signing import Signer
from glasklar.runtime import Runtime

PRETRAINED, SFT, RL = "00-pretrain-00000008", "01-sft-00000004", "02-rl-00000004"


@pytest.fixture
def run(smoke_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(smoke_run, tmp_path / "run")


def rewrite(run: Path, change: Callable[[dict], None]) -> None:
    """Changes the ledger's lines one by one and gives it hashes that fit."""
    previous, out = "0" * 64, []
    for index, text in enumerate((run / "ledger.jsonl").read_bytes().splitlines()):
        line = json.loads(text)
        change(line)
        event = Event.make(index, line["time"], line["event"], line["data"], previous)
        previous = event.hash
        out.append(event.line())
    (run / "ledger.jsonl").write_bytes(b"".join(out))


def texts(found: Findings) -> str:
    return "\n".join(entry.text for entry in found.failures)


def test_whole_training_from_sources_comes_out_equal(run: Path, runtime: Runtime, tmp_path: Path) -> None:
    signer = Signer.open(tmp_path)
    told: list[tuple[str, int, int]] = []
    found = replay(
        RunDir(run), Record.stretches, runtime=runtime, signer=signer, rebuild_data=True,
        progress=lambda *news: told.append(news),
    )  # fmt: skip
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1:] == (16, 16)
    assert found.verdict == "holds", found
    assert "10 of 10 segments" in str(found)
    verified = verify(run, home=tmp_path)
    assert verified.verdict == "holds", verified
    assert not any(entry.subject == "training" for entry in verified.entries)


@pytest.mark.parametrize(
    ("segment", "wanted"),
    [
        ("1", Stretch(start=None, names=["00-pretrain-00000002"])),
        ("5", Stretch(start="00-pretrain-00000008", names=["01-sft-00000002"])),
        (RL, Stretch(start="02-rl-00000003", names=[RL])),
    ],
)
def test_segment_begins_at_the_nearest_kept_state(run: Path, runtime: Runtime, segment: str, wanted: Stretch) -> None:
    assert Record(RunDir(run)).leading_to(segment) == wanted
    assert replay(RunDir(run), lambda record: [record.leading_to(segment)], runtime=runtime).verdict == "holds"
    assert not (run / "replays.jsonl").exists()


def test_unknown_segments_are_refused(run: Path) -> None:
    for segment in ("0", "11", "02-rl-00000009"):
        with pytest.raises(RequestError, match="1 to 10"):
            Record(RunDir(run)).leading_to(segment)


def test_patched_weights_are_found_on_both_sides(run: Path, runtime: Runtime) -> None:
    """A state with other weights, recorded with the hash that it has: before it the end differs, after it the steps."""
    tensors, meta = load_state(run / "checkpoints" / PRETRAINED)
    name = next(name for name in tensors if name.startswith("master.") and name.endswith("embed_tokens.weight"))
    old = json.loads((run / "checkpoints" / PRETRAINED / "meta.json").read_bytes())["state_hash"]
    new = save_state(run / "checkpoints" / PRETRAINED, {**tensors, name: tensors[name] * 1.5}, meta)

    def forge(line: dict) -> None:
        if line["data"].get("state_hash") == old:
            line["data"]["state_hash"] = new

    rewrite(run, forge)
    before = replay(RunDir(run), lambda record: [record.leading_to(PRETRAINED)], runtime=runtime)
    assert f"another state than recorded at {PRETRAINED}" in texts(before)
    assert "only the state does" in texts(before)
    after = replay(RunDir(run), lambda record: [record.leading_to("5")], runtime=runtime)
    assert "first difference: sft step 1: loss is 0x" in texts(after)


def test_first_step_with_another_loss_is_named(run: Path, runtime: Runtime, tmp_path: Path) -> None:
    """Figures made prettier, the ledger's marks and hashes made to fit."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if b'"stage": "sft", "step": 3' in line)
    figures = json.loads(lines[place])
    lines[place] = json.dumps({**figures, "loss": figures["loss"] / 2}).encode() + b"\n"
    (run / "metrics.jsonl").write_bytes(b"".join(lines))

    def forge(line: dict) -> None:
        if "metrics" in line["data"]:
            kept = b"".join(lines[: line["data"]["metrics"]["lines"]])
            line["data"]["metrics"]["sha256"] = hashlib.sha256(kept).hexdigest()

    rewrite(run, forge)
    found = replay(RunDir(run), lambda record: [record.leading_to(SFT)], runtime=runtime, signer=Signer.open(tmp_path))
    assert "the recorded figures are not: first at sft step 3: loss is 0x" in texts(found)


def test_another_data_root_is_found_by_making_the_data_again(run: Path, runtime: Runtime) -> None:
    facts = json.loads((run / "data" / "facts.json").read_bytes())
    forged = json.dumps({**facts, "root": "ab" * 32}, sort_keys=True, separators=(",", ":"))
    (run / "data" / "facts.json").write_text(forged)
    rewrite(run, lambda line: line["data"].update(root="ab" * 32) if line["event"] == "data" else None)
    found = replay(RunDir(run), Record.stretches, runtime=runtime, rebuild_data=True)
    assert "other data than recorded: root is" in texts(found)


def test_tolerance_is_no_equality(run: Path, runtime: Runtime, tmp_path: Path) -> None:
    """Where the machine is of another class, close losses leave the claim open; they never confirm it."""
    rewrite(run, lambda line: line["data"].get("machine", {}).update(cpu="Another 9000"))

    def forge(line: dict) -> None:
        if line["data"].get("name") == SFT:
            line["data"]["state_hash"] = "ab" * 32

    rewrite(run, forge)

    def choose(record: Record) -> list[Stretch]:
        return [record.leading_to(SFT)]

    strict = replay(RunDir(run), choose, runtime=runtime)
    assert "cpu Another 9000 there" in texts(strict)
    loose = replay(RunDir(run), choose, runtime=runtime, tolerance=1e-3)
    assert loose.verdict == "holds"
    assert any(entry.verdict == "unchecked" and "no proof" in entry.text for entry in loose.entries)


def test_threads_belong_to_the_class_of_machine(run: Path, runtime: Runtime) -> None:
    other = changed(runtime, threads=runtime.threads + 1)
    rewrite(run, lambda line: line["data"].update(state_hash="ab" * 32) if line["data"].get("name") == SFT else None)
    found = replay(RunDir(run), lambda record: [record.leading_to(SFT)], runtime=other)
    assert f"threads {runtime.threads} there, {other.threads} here" in texts(found)


def test_draw_follows_from_beacon_and_head(run: Path) -> None:
    record = Record(RunDir(run))
    drawn = {beacon: [s.names[-1] for s in draw(record, beacon, 2)] for beacon in map(str, range(20))}
    assert drawn["0"] == [s.names[-1] for s in draw(record, "0", 2)]
    always = set.intersection(*map(set, drawn.values()))
    assert len(always) == 1, "the largest change of weights is always among them, the other one is drawn"
    assert set.union(*map(set, drawn.values())) == {s.names[-1] for s in record.stretches()}
    assert draw(record, "0", 99) == record.stretches()
    with pytest.raises(RequestError, match="beacon"):
        draw(record, " ", 2)


def test_replay_of_another_recipe_is_refused(run: Path, runtime: Runtime) -> None:
    path = run / "recipe.json"
    path.write_text(path.read_text().replace('"seed":3', '"seed":4'))
    with pytest.raises(RecordError, match="not the recipe"):
        replay(RunDir(run), Record.stretches, runtime=runtime)


def test_signed_replay_of_another_state_does_not_count(run: Path, tmp_path: Path, runtime: Runtime) -> None:
    replay(RunDir(run), lambda record: [record.leading_to("1")], runtime=runtime, signer=Signer.open(tmp_path))
    rewrite(run, lambda line: line["data"].update(state_hash="ab" * 32) if line["event"] == "checkpoint" else None)
    found = {entry.subject: entry.text for entry in verify(run, home=tmp_path).failures}
    assert "another state" in found["replays.jsonl"]
