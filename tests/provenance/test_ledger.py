"""Oracle: a chain recomputed here from nothing but `json` and `hashlib`."""

import hashlib
import json
import os
import random

import pytest

from glasklar.errors import CapacityError, CheckpointError
from glasklar.provenance.ledger import GENESIS, Event, Ledger, checkpoint_data, exact, read_ledger


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", clock=lambda: "2026-01-20T08:00:00.000Z")
    ledger.append("run", {"recipe": {"seed": 1}, "name": "größer"})
    ledger.append("data", {"documents": 3})
    ledger.append("checkpoint", {"step": 10, "loss": exact(0.1)})
    return ledger


def naive_hash(values):
    body = {key: value for key, value in values.items() if key != "hash"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def test_chain_against_naive_recomputation(ledger):
    lines = [json.loads(line) for line in ledger.path.read_text(encoding="utf-8").splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert [line["previous"] for line in lines] == [GENESIS, lines[0]["hash"], lines[1]["hash"]]
    assert [line["hash"] for line in lines] == [naive_hash(line) for line in lines]
    assert ledger.head == lines[-1]["hash"]


def test_reopened_ledger_continues_the_chain(ledger):
    again = Ledger(ledger.path)
    assert again.events == ledger.events
    again.append("released", {})
    events, rest = read_ledger(ledger.path)
    assert [event.event for event in events] == ["run", "data", "checkpoint", "released"]
    assert rest == b""
    assert again.of("checkpoint")[0].data["loss"] == (0.1).hex()


def test_every_changed_byte_is_found(ledger):
    original = ledger.path.read_bytes()
    draw = random.Random(0)
    for _ in range(300):
        content = bytearray(original)
        place = draw.randrange(len(content) - 1)  # without the last line break a line counts as unfinished
        content[place] ^= 1 << draw.randrange(8)
        ledger.path.write_bytes(content)
        line = original[:place].count(b"\n") + 1
        with pytest.raises(CheckpointError, match=f"line {line} "):
            read_ledger(ledger.path)


def forge(lines, index, **changes):
    """A line changed, its own hash recomputed."""
    values = {**json.loads(lines[index]), **changes}
    event = Event.make(*(values[key] for key in ("index", "time", "event", "data", "previous")))
    return [*lines[:index], event.line(), *lines[index + 1 :]]


@pytest.mark.parametrize(
    ("forgery", "line"),
    [
        (lambda lines: [lines[0], lines[2]], 2),
        (lambda lines: [lines[0], lines[2], lines[1]], 2),
        (lambda lines: [lines[0], lines[1], lines[1], lines[2]], 3),
        (lambda lines: forge(lines, 1, data={"documents": 4}), 3),
        (lambda lines: forge(lines, 2, previous=GENESIS), 3),
        (lambda lines: [lines[0].replace(b'"index":0', b'"index": 0'), *lines[1:]], 1),
        (lambda lines: [lines[0].replace(b'"index":0', b'"index":0,"index":0'), *lines[1:]], 1),
        (lambda lines: [b"[]\n", *lines[1:]], 1),
        (lambda lines: [b"\n", *lines], 1),
        (lambda lines: [*lines[:2], b"\xff\n"], 3),
    ],
    ids=[
        "dropped",
        "swapped",
        "doubled",
        "rehashed",
        "unlinked",
        "spaced",
        "key-twice",
        "no-object",
        "empty",
        "no-utf8",
    ],
)
def test_forgeries_are_named(ledger, forgery, line):
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    ledger.path.write_bytes(b"".join(forgery(lines)))
    with pytest.raises(CheckpointError, match=f"line {line} .*--run"):
        Ledger(ledger.path)


def test_chain_that_does_not_begin_at_the_beginning(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(Event.make(1, "2026-01-20T08:00:00.000Z", "run", {}, GENESIS).line())
    with pytest.raises(CheckpointError, match="line 1 does not follow"):
        read_ledger(path)


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_line_cut_short_by_a_crash_is_removed_with_a_note(ledger, kept):
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    torn = lines[2][:kept]
    ledger.path.write_bytes(lines[0] + lines[1] + torn)
    again = Ledger(ledger.path)
    assert [event.event for event in again.events] == ["run", "data", "repaired"]
    assert again.events[-1].data["text"].encode() == torn
    assert read_ledger(ledger.path) == (list(again.events), b"")


def test_full_disk_leaves_the_ledger_as_it_was(ledger, monkeypatch):
    before = ledger.path.read_bytes()
    write = os.write

    def full(descriptor, content):
        if len(content) <= 20:
            raise OSError(28, "No space left on device")
        return write(descriptor, bytes(content[:20]))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CapacityError, match="free some space"):
        ledger.append("released", {"text": "x" * 100})
    monkeypatch.undo()
    assert ledger.path.read_bytes() == before
    ledger.append("released", {})
    assert len(read_ledger(ledger.path)[0]) == 4


def test_missing_ledger_names_the_remedy(tmp_path):
    with pytest.raises(CheckpointError, match="run folder"):
        read_ledger(tmp_path / "ledger.jsonl")


def test_checkpoint_data_keeps_floats_exact():
    data = checkpoint_data(
        stage="rl",
        step=3,
        state_hash="00",
        loss=1 / 3,
        gradient_norm=2,
        flops=1e12,
        seconds=1.5,
        energy={"joules": 15.0, "source": "estimate"},
        cost={"usd": 1e-6, "usd_per_kwh": 0.3},
        metrics={"lines": 3, "sha256": "00"},
    )
    assert float.fromhex(json.loads(json.dumps(data))["loss"]) == 1 / 3
    assert data["gradient_norm"] == "0x1.0000000000000p+1"
