"""Oracles: the tensors that were saved; a hash written down here; `kill -9`."""

import hashlib
import json
import random
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from glasklar.errors import CapacityError, CheckpointError
from glasklar.learn.state import checkpoint_name, latest, load_state, prune, save_state, saved_hash


def tensors(step=0):
    generator = torch.Generator().manual_seed(step)
    return {
        "weight": torch.randn(3, 5, generator=generator),
        "half": torch.randn(4, generator=generator).bfloat16(),
        "step": torch.tensor(step),
        "rng": torch.get_rng_state()[:16],
        "transposed": torch.randn(2, 3, generator=generator).T,
        "empty": torch.zeros(0, 7),
    }


META = {"step": 3, "cursor": {"epoch": 1, "row": 17}, "rate": 0.1}


def test_loaded_state_equals_saved_state(tmp_path):
    folder = tmp_path / "checkpoints" / checkpoint_name(0, "pretrain", 3)
    digest = save_state(folder, tensors(), META)
    loaded, meta = load_state(folder)
    assert meta == META
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert saved_hash(folder) == digest
    assert sorted(p.name for p in folder.iterdir()) == ["meta.json", "state.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_state_hash_depends_on_every_part(tmp_path):
    def digest(state, meta):
        return save_state(tmp_path / checkpoint_name(0, "rl", 1), state, meta)

    state = tensors()
    first = digest(state, META)
    assert digest(dict(reversed(state.items())), dict(reversed(META.items()))) == first
    others = [
        digest({**state, "weight": state["weight"].T}, META),
        digest({**state, "weight": state["weight"].view(torch.int32)}, META),
        digest({("Half" if name == "half" else name): tensor for name, tensor in state.items()}, META),
        digest(state, {**META, "step": 4}),
        digest({**state, "weight": state["weight"].nextafter(torch.tensor(9.0))}, META),
    ]
    assert len({first, *others}) == 6


def test_every_flipped_byte_is_found_and_its_file_named(tmp_path):
    folder = tmp_path / checkpoint_name(1, "sft", 20)
    save_state(folder, tensors(), META)
    draw = random.Random(0)
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        for _ in range(150):
            content = bytearray(original)
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match=rf"{path.name}: damaged .* remove 01-sft-00000020"):
                load_state(folder)
        path.write_bytes(original[:-1])
        with pytest.raises(CheckpointError, match=path.name):
            load_state(folder)
        path.unlink()
        with pytest.raises(CheckpointError, match=path.name):
            load_state(folder)
        path.write_bytes(original)
    load_state(folder)


def test_swapped_tensors_with_a_matching_file_hash_are_found(tmp_path):
    one, two = (tmp_path / checkpoint_name(0, "sft", step) for step in (1, 2))
    save_state(one, tensors(1), META)
    save_state(two, tensors(2), META)
    (one / "state.safetensors").write_bytes((two / "state.safetensors").read_bytes())
    body = json.loads((one / "meta.json").read_bytes())
    del body["hash"]
    body["files"] = json.loads((two / "meta.json").read_bytes())["files"]
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    body["hash"] = hashlib.sha256(text).hexdigest()
    (one / "meta.json").write_bytes(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    with pytest.raises(CheckpointError, match="does not match its hash"):
        load_state(one)


def test_latest_orders_by_stage_then_step(tmp_path):
    assert latest(tmp_path / "none") is None
    hashes = {}
    for position, stage, step in [(1, "sft", 5), (0, "pretrain", 200), (1, "sft", 10), (0, "pretrain", 30)]:
        folder = tmp_path / checkpoint_name(position, stage, step)
        hashes[folder.name] = save_state(folder, tensors(step), META)
    (tmp_path / ".tmp-1-02-rl-00000001").mkdir()
    found = latest(tmp_path)
    assert found is not None
    assert found.name == "01-sft-00000010"
    recorded = latest(tmp_path, known={hashes["00-pretrain-00000030"], "f" * 64})
    assert recorded is not None
    assert recorded.name == "00-pretrain-00000030"
    assert latest(tmp_path, known=[]) is None


def test_prune_keeps_the_newest_and_the_ends_of_stages(tmp_path):
    for position, stage, steps in [(0, "pretrain", (10, 20, 30)), (1, "sft", (5, 10)), (2, "rl", (1, 2, 3, 4))]:
        for step in steps:
            save_state(tmp_path / checkpoint_name(position, stage, step), tensors(), META)
    removed = prune(tmp_path, keep=2)
    kept = sorted(p.name for p in tmp_path.iterdir())
    assert kept == ["00-pretrain-00000030", "01-sft-00000010", "02-rl-00000003", "02-rl-00000004"]
    assert len(removed) == 5


def test_saving_again_replaces(tmp_path):
    folder = tmp_path / checkpoint_name(0, "sft", 1)
    save_state(folder, tensors(1), META)
    save_state(folder, tensors(2), META)
    assert torch.equal(load_state(folder)[0]["weight"], tensors(2)["weight"])
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


@contextmanager
def full_disk(size):
    """No file may grow beyond `size` bytes: a full disk that binds root as well."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_earlier_checkpoints(tmp_path):
    save_state(tmp_path / "00-sft-00000001", {"w": torch.zeros(10)}, {})
    with full_disk(4096):
        with pytest.raises(CapacityError, match=r"state\.safetensors: no room to write"):
            save_state(tmp_path / "00-sft-00000002", {"w": torch.zeros(10000)}, {})
        with pytest.raises(CapacityError, match=r"meta\.json: no room to write"):
            save_state(tmp_path / "00-sft-00000002", {"w": torch.zeros(10)}, {"text": "x" * 5000})
    assert [p.name for p in tmp_path.iterdir()] == ["00-sft-00000001"]
    load_state(tmp_path / "00-sft-00000001")


def test_read_only_folder(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(CheckpointError, match="make the folder writable"):
        save_state(tmp_path / "00-sft-00000001", tensors(), META)
    assert not list(tmp_path.iterdir())


def test_capacity_error_is_told_apart(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.rename", full)
    with pytest.raises(CapacityError):
        save_state(tmp_path / "00-sft-00000001", tensors(), META)
    assert not list(tmp_path.iterdir())


KILLED = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from glasklar.learn.state import checkpoint_name, latest, load_state, prune, save_state

folder, report = Path(sys.argv[1]), Path(sys.argv[2])

def save_for_ever(step):
    while True:
        step += 1
        tensors = {"w": torch.full((30_000,), float(step))}
        save_state(folder / checkpoint_name(0, "pretrain", step), tensors, {"step": step})
        report.with_suffix(".new").write_text(str(step))
        os.replace(report.with_suffix(".new"), report)  # or a kill may find it empty
        prune(folder, keep=2)

draw, step, cut_short = random.Random(0), 0, 0
while step < 20 or cut_short < 5:
    child = os.fork()
    if child == 0:
        save_for_ever(step)
    time.sleep(draw.uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = latest(folder)
    if found:
        tensors, meta = load_state(found)
        step = meta["step"]
        assert torch.equal(tensors["w"], torch.full((30_000,), float(step)))
    text = report.read_text() if report.exists() else ""
    print(json.dumps({"reported": int(text or 0), "found": step}))
    for leftover in folder.glob(".tmp-*"):
        cut_short += 1
        shutil.rmtree(leftover)
"""


def test_kill_at_random_moments_leaves_the_last_complete_checkpoint(tmp_path):
    """Until five kills fell into a save or a removal. The state is never older than the last one reported."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "checkpoints"), str(tmp_path / "report")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    known = 0
    for line in map(json.loads, done.stdout.splitlines()):
        known = max(known, line["reported"])
        assert line["found"] in (known, known + 1), "one more: killed between saving and reporting"
        known = line["found"]
