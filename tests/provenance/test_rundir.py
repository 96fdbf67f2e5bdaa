import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from glasklar.errors import CapacityError, CheckpointError
from glasklar.provenance.rundir import RunDir, default_run, differences, home, write_json

RECIPE = {"name": "tiny", "seed": 1, "stages": [{"kind": "pretrain", "steps": 240}, {"kind": "rl", "steps": 30}]}
CANONICAL = json.dumps(RECIPE, sort_keys=True, separators=(",", ":"))
TOML = 'name = "tiny"\n'


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_created_folder_opens_again(tmp_path):
    path = tmp_path / "runs" / "tiny"
    with RunDir.create_or_open(path, CANONICAL, TOML) as run:
        run.ledger.append("run", {})
        run.metrics.append({"step": 1})
    with RunDir.create_or_open(path, CANONICAL, TOML) as run:
        assert [event.event for event in run.ledger.events] == ["run"]
        assert run.metrics.mark()["lines"] == 1
        assert run.recipe() == RECIPE
    assert run.recipe_file.read_text() == TOML
    assert run.checkpoints.is_dir()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, r"seed = 1 there, 2 in this recipe"),
        ({"seed": True}, r"seed = 1 there, true in this recipe"),
        ({"stages": RECIPE["stages"][:1]}, r'stages\[1\] = {"kind": "rl", "steps": 30} there, nothing in this recipe'),
        ({"stages": [{"kind": "pretrain", "steps": 200}]}, r"stages\[0\]\.steps = 240 there, 200 in this recipe"),
        ({"extra": None}, r"extra = nothing there, null in this recipe"),
    ],
)
def test_run_of_another_recipe_is_refused_and_left_alone(tmp_path, change, named):
    with RunDir.create_or_open(tmp_path, CANONICAL, TOML) as run:
        run.ledger.append("run", {})
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=rf"another recipe: {named}; choose another --run or remove it"):
        RunDir.create_or_open(tmp_path, json.dumps({**RECIPE, **change}), "other")
    assert contents(tmp_path) == before
    RunDir.create_or_open(tmp_path, CANONICAL, TOML).close()  # the lock was given back


def test_differences_are_named_in_order():
    assert [line.split(" ")[0] for line in differences({"b": 1, "a": {"c": 1}}, {"b": 2, "a": {"c": 2}})] == [
        "a.c",
        "b",
    ]
    assert not list(differences(RECIPE, json.loads(CANONICAL)))


def test_strange_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(CheckpointError, match=r"'thesis\.tex' lies in it.*--run"):
        RunDir.create_or_open(tmp_path, CANONICAL, TOML)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(CheckpointError, match="is a file"):
        RunDir.create_or_open(tmp_path / "thesis.tex", CANONICAL, TOML)
    with pytest.raises(CheckpointError, match="not a run folder"):
        RunDir(tmp_path).recipe()


def test_creation_cut_short_is_finished(tmp_path):
    (tmp_path / "recipe.toml").write_text("na")
    (tmp_path / ".tmp-1-recipe.json").write_text("{")
    with RunDir.create_or_open(tmp_path, CANONICAL, TOML) as run:
        assert run.recipe_file.read_text() == TOML
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "checkpoints", "recipe.json", "recipe.toml"]


HOLD = """
import sys
from pathlib import Path
from glasklar.provenance.rundir import RunDir
run = RunDir.create_or_open(Path(sys.argv[1]), sys.argv[2], "")
print("held", flush=True)
sys.stdin.read()
"""


def test_second_process_is_refused_and_told_who_writes(tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), CANONICAL], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match=rf"in use by process {first.pid};"):
            RunDir.create_or_open(tmp_path, CANONICAL, TOML)
        first.kill()
        first.wait()
        RunDir.create_or_open(tmp_path, CANONICAL, TOML).close()


def test_full_disk_is_a_capacity_error(tmp_path):
    """RLIMIT_FSIZE stands for the full disk: it binds root as well."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(CapacityError, match=r"recipe\.toml: no room to write"):
            RunDir.create_or_open(tmp_path / "run", CANONICAL, "x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
    RunDir.create_or_open(tmp_path / "run", CANONICAL, TOML).close()


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EROFS, CheckpointError), (errno.EACCES, CheckpointError), (errno.ENOSPC, CapacityError)],
)
def test_unwritable_folder_names_the_remedy(tmp_path, monkeypatch, number, kind):
    """Root may write anywhere, so the system's refusal is played."""
    RunDir.create_or_open(tmp_path, CANONICAL, TOML).close()
    before = contents(tmp_path)
    opened = os.open

    def refuse(path, flags, *mode, **more):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, flags, *mode, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(kind, match=r"another|free some space"):
        RunDir.create_or_open(tmp_path, CANONICAL, TOML)
    with pytest.raises(kind, match=r"another|free some space"):
        write_json(tmp_path / "facts.json", {})
    monkeypatch.undo()
    assert contents(tmp_path) == before


def test_home_follows_the_environment_given():
    assert home({"GLASKLAR_HOME": "/data/g"}) == Path("/data/g")
    assert home({"XDG_DATA_HOME": "/x"}, "linux") == Path("/x/glasklar")
    assert home({}, "darwin").parts[-3:] == ("Library", "Application Support", "glasklar")
    assert home({}, "linux").parts[-3:] == (".local", "share", "glasklar")
    assert default_run("spark", {"GLASKLAR_HOME": "/data/g"}) == Path("/data/g/runs/spark")
