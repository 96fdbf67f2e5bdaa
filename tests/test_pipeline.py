"""A whole run: complete, repeatable to the bit, and resumable from a kill at any moment."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from glasklar import api
from glasklar.audit.replay import Record, replay
from glasklar.audit.verify import verify
from glasklar.errors import CheckpointError
from glasklar.learn.state import saved_hash
from glasklar.provenance.hashing import sha256_file
from glasklar.provenance.ledger import read_ledger
from glasklar.provenance.metrics import read_metrics
from glasklar.provenance.rundir import RunDir
from glasklar.runtime import Runtime
from smoke import SMOKE

KILLS, STEPS = 10, 16


def state_hashes(run: Path) -> dict[str, str]:
    """The last recorded state of every checkpoint step, over all stages."""
    events, _ = read_ledger(run / "ledger.jsonl")
    return {
        f"{event.data['stage']} {event.data['step']}": event.data["state_hash"]
        for event in events
        if event.event == "checkpoint"
    }


def weights(run: Path) -> str:
    return sha256_file(run / "model" / "model.safetensors")


def test_a_run_leaves_everything_that_it_promises(smoke_run: Path) -> None:
    for name in ("recipe.toml", "recipe.json", "ledger.jsonl", "metrics.jsonl", "report.md", "report.html"):
        assert (smoke_run / name).stat().st_size > 0, name
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "recipe.json"):
        assert (smoke_run / "model" / name).stat().st_size > 0, name
    events = [event.event for event in read_ledger(smoke_run / "ledger.jsonl")[0]]
    assert events[:3] == ["run", "data", "tokenizer"]
    assert events[-1] == "released"
    assert events.count("evaluation") == 2


def test_metrics_hold_every_step_once(smoke_run: Path) -> None:
    steps = [(line["stage"], line["step"]) for line in read_metrics(smoke_run / "metrics.jsonl") if "stage" in line]
    wanted = [(kind, step + 1) for kind, count in (("pretrain", 8), ("sft", 4), ("rl", 4)) for step in range(count)]
    assert steps == wanted


def test_a_second_run_gives_the_same_states(smoke_run: Path, tmp_path: Path, runtime: Runtime) -> None:
    again = api.train(str(SMOKE), runtime=runtime, home=tmp_path)
    assert state_hashes(again) == state_hashes(smoke_run)
    assert weights(again) == weights(smoke_run)


def test_the_precision_of_a_recipe_is_kept_to(tmp_path: Path, runtime: Runtime) -> None:
    path = tmp_path / "exact.toml"
    text = SMOKE.read_text(encoding="utf-8").replace('compute = "bf16"', 'compute = "fp32"')
    path.write_text(text.split('[[stages]]\nkind = "sft"')[0] + text[text.index("[evaluation]") :], encoding="utf-8")
    run = api.train(str(path), runtime=runtime, home=tmp_path)
    with safe_open(run / "model" / "model.safetensors", "pt") as tensors:
        kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    assert kinds == {"F32"}
    assert read_ledger(run / "ledger.jsonl")[0][0].data["machine"]["compute"] == "fp32"
    assert verify(run, home=tmp_path).verdict == "holds"
    assert replay(RunDir(run), Record.stretches, runtime=runtime).verdict == "holds"


def test_another_seed_gives_other_states(smoke_run: Path, tmp_path: Path, runtime: Runtime) -> None:
    other = api.train(str(SMOKE), runtime=runtime, home=tmp_path, seed=4)
    assert not set(state_hashes(other).values()) & set(state_hashes(smoke_run).values())


def test_killed_at_random_moments_of_all_stages_it_ends_in_the_same_weights(smoke_run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "glasklar.cli", "train", str(SMOKE), "--run", str(tmp_path / "run")]
    rng = random.Random(5)
    stages = set()
    for step in sorted(rng.sample(range(STEPS), KILLS)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while _progress(tmp_path / "run") < step and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        assert process.poll() is None, "the process was to be killed while it worked"
        process.send_signal(signal.SIGKILL)
        process.wait()
        stages.add(_last_stage(tmp_path / "run"))
    assert stages >= {"pretrain", "sft", "rl"}
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert weights(tmp_path / "run") == weights(smoke_run)
    assert state_hashes(tmp_path / "run") == state_hashes(smoke_run)
    assert _progress(tmp_path / "run") == STEPS


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_says_how_to_go_on(smoke_run: Path, tmp_path: Path, sent: signal.Signals) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "glasklar.cli", "train", str(SMOKE), "--run", str(run)]
    # Shells start what runs in the background deaf to the keyboard, and so would be what the tests start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 120
    while _progress(run) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    events = read_ledger(run / "ledger.jsonl")[0]
    assert [event.event for event in events[-2:]] == ["checkpoint", "stopped"]
    assert events[-1].data["lost"] is None
    assert "nothing is lost" in said
    assert process.returncode == 130
    assert "Traceback" not in said
    again = said.replace("\n", " ").partition("Go on with:")[2].split()
    assert again == ["glasklar", "train", str(SMOKE), "--run", str(run)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert weights(run) == weights(smoke_run)
    assert [line["seconds"] for line in read_metrics(run / "metrics.jsonl")] == sorted(
        line["seconds"] for line in read_metrics(run / "metrics.jsonl")
    )
    resumed = next(event.data for event in read_ledger(run / "ledger.jsonl")[0] if event.event == "resumed")
    assert (resumed["checkpoint"], resumed["lost"]["steps"]) == (events[-2].data["name"], 0)
    assert verify(run, home=tmp_path).verdict == "holds"


def _steps(run: Path) -> list[str]:
    """The stage of every step recorded so far, torn last lines left out."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [line["stage"] for line in map(json.loads, lines) if "stage" in line]


def _progress(run: Path) -> int:
    return len(_steps(run))


def _last_stage(run: Path) -> str:
    return (_steps(run) or ["none"])[-1]


def test_another_recipe_under_the_same_name_is_refused(smoke_run: Path, tmp_path: Path, runtime: Runtime) -> None:
    run = shutil.copytree(smoke_run, tmp_path / "run")
    before = {path: sha256_file(path) for path in run.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"another recipe: seed = 3 there, 9 in this recipe"):
        api.train(str(SMOKE), runtime=runtime, home=tmp_path, run=run, seed=9)
    assert {path: sha256_file(path) for path in run.rglob("*") if path.is_file()} == before


def test_a_flipped_byte_in_a_checkpoint_is_named(smoke_run: Path, tmp_path: Path, runtime: Runtime) -> None:
    run = shutil.copytree(smoke_run, tmp_path / "run")
    _undo_release(run)
    newest = max((run / "checkpoints").iterdir(), key=lambda path: path.name)
    damaged = newest / "state.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        api.train(str(SMOKE), runtime=runtime, home=tmp_path, run=run)
    assert not (run / "model").exists()


def test_a_run_without_its_release_releases_the_same_model(smoke_run: Path, tmp_path: Path, runtime: Runtime) -> None:
    run = shutil.copytree(smoke_run, tmp_path / "run")
    _undo_release(run)
    api.train(str(SMOKE), runtime=runtime, home=tmp_path, run=run)
    assert weights(run) == weights(smoke_run)


def _undo_release(run: Path) -> None:
    """As if the process had died between the last checkpoint and the release."""
    shutil.rmtree(run / "model")
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if json.loads(line)["event"] == "checkpoint")
    (run / "ledger.jsonl").write_bytes(b"".join(lines[: last + 1]))


def test_rl_does_not_begin_on_a_model_that_is_not_ready(tmp_path: Path, runtime: Runtime) -> None:
    text = SMOKE.read_text().replace("accuracy = 0.0, margin = 0.0", "accuracy = 0.9, margin = 0.2")
    (tmp_path / "strict.toml").write_text(text)
    run = api.train(str(tmp_path / "strict.toml"), runtime=runtime, home=tmp_path)
    events = {event.event: event.data for event in read_ledger(run / "ledger.jsonl")[0]}
    assert events["readiness"]["ready"] is False
    assert events["released"]["skipped"] == ["rl"]
    assert (run / "model" / "config.json").exists()


def test_checkpoints_know_their_hash(smoke_run: Path) -> None:
    recorded = set(state_hashes(smoke_run).values())
    kept = [saved_hash(folder) for folder in (smoke_run / "checkpoints").iterdir()]
    assert len(kept) >= 3
    assert set(kept) <= recorded


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_is_said_and_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        command = [sys.executable, "-m", "glasklar.cli", "train", str(SMOKE), "--run", str(disk / "run")]
        full = subprocess.run(command, capture_output=True, text=True)
        assert full.returncode == 2, full.stderr
        assert "space" in full.stderr or "full" in full.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert subprocess.run(command, capture_output=True).returncode == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)
