"""What a person may get wrong on the command line: a clear error with the remedy, exit code 2, nothing overwritten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from glasklar import cli
from smoke import SMOKE

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}


def glasklar(*arguments: str | Path, home: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "glasklar.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**ENVIRONMENT, "GLASKLAR_HOME": str(home)}, timeout=120
    )


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """What the command prints on stderr when it ends with code 2; within this process, which spares its start."""

    def call(*arguments: str | Path, home: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["glasklar", *map(str, arguments)])
        monkeypatch.setenv("GLASKLAR_HOME", str(home))
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        return capsys.readouterr().err

    with mock.patch.dict(os.environ):  # commands set what libraries read
        yield call


def recipe(folder: Path, *changes: tuple[str, str]) -> Path:
    text = SMOKE.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path = folder / "bad.toml"
    path.write_text(text)
    return path


TASKS = 'kind = "tasks"\ndocuments = 300'
LETTERS = '[[tasks]]\nname = "letters"'
NO_REASON = f"hard = {{ terms = [4, 5] }}\n\n{LETTERS}"
WRONG = {
    "unknown key": (("hidden_size = 32", "hiden_size = 32"), ("hiden_size", "hidden_size")),
    "unknown section": (("[tokenizer]", "[tokeniser]"), ("tokeniser", "tokenizer")),
    "wrong type": (("hidden_size = 32", 'hidden_size = "wide"'), ("model.hidden_size", "wide")),
    "impossible size": (("hidden_size = 32", "hidden_size = -32"), ("model.hidden_size", "-32")),
    "monstrous size": (("hidden_size = 32", "hidden_size = 1000000000000"), ("model.hidden_size", "1000000000000")),
    "unequal vocabularies": (("vocab_size = 320", "vocab_size = 400"), ("400", "320")),
    "unknown task": (('name = "letters"', 'name = "leters"'), ("leters", "letters")),
    "unknown stage": (('kind = "sft"', 'kind = "stf"'), ("stages.1.kind = 'stf'", "did you mean 'sft'?")),
    "unknown source": (('kind = "tasks"', 'kind = "parket"'), ("sources.0.kind = 'parket'", "'parquet'?")),
    "reinforcement of nothing": ((NO_REASON, f"reason = false\n\n{LETTERS}\nreason = false"), ("reason = true",)),
    "missing source": ((TASKS, 'kind = "text"\npath = "/nowhere/at/all"'), ("/nowhere/at/all",)),
    "broken TOML": (("[model]", "[model"), ("bad.toml",)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_recipes_are_refused_before_anything_is_made(refused: Callable[..., str], name: str, tmp_path: Path) -> None:
    change, words = WRONG[name]
    said = refused("train", recipe(tmp_path, change), "--run", tmp_path / "run", home=tmp_path / "home")
    for word in words:
        assert word in said
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())


def test_empty_and_unreadable_sources(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    path = recipe(tmp_path, (TASKS, f'kind = "text"\npath = "{notes}"'))
    empty = glasklar("train", path, "--run", tmp_path / "run", home=tmp_path)
    assert (empty.returncode, "holds no text in files that match" in empty.stderr) == (2, True)
    assert not (tmp_path / "run").exists()
    (notes / "latin.txt").write_bytes("für".encode("latin-1"))
    unreadable = glasklar("train", path, "--run", tmp_path / "run2", home=tmp_path)
    assert (unreadable.returncode, "latin.txt" in unreadable.stderr) == (2, True)


def test_a_run_of_another_recipe_is_left_alone(smoke_run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in sorted(smoke_run.rglob("*")) if path.is_file()}
    other = recipe(tmp_path, ("seed = 3", "seed = 4"))
    result = glasklar("train", other, "--run", smoke_run, home=tmp_path)
    assert result.returncode == 2
    for word in ("seed", "3", "4", "--run"):
        assert word in result.stderr
    assert before == {path: path.read_bytes() for path in sorted(smoke_run.rglob("*")) if path.is_file()}


def test_a_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    result = glasklar("train", SMOKE, "--run", tmp_path / "file" / "run", home=tmp_path)
    assert result.returncode == 2
    assert str(tmp_path / "file") in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_read_only_run_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir(mode=0o500)
    result = glasklar("train", SMOKE, "--run", run, home=tmp_path)
    assert (result.returncode, str(run) in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "sparc"), ("sparc", "spark")),
        (("train", "nowhere.toml"), ("nowhere.toml",)),
        (("chat", "nobody"), ("nobody",)),
        (("plan", "deepseek-v4"), ("deepseek-v4", "deepseek-v3")),
        (("plan", "spark", "--hardware", "abacus"), ("abacus", "cpu-2-cores")),
        (("serve", "nobody", "--port", "99999"), ("--port", "65535")),
        (("generate", "nobody", "--prompt", "x", "--nonsense"), ("--nonsense",)),
        (("dance",), ("dance",)),
        (("generate", "nobody", "--prompt", "x", "--threads", "0"), ("threads = 0",)),
        (("verify", "/etc/hosts"), ("/etc/hosts", "folder")),
    ],
)
def test_wrong_arguments(
    refused: Callable[..., str], arguments: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    said = refused(*arguments, home=tmp_path)
    for word in words:
        assert word in said


@pytest.mark.parametrize(("target", "total"), [("deepseek-v3", 671e9), ("spark", 1.08e6)])
def test_plans_are_one_json_object_on_stdout(target: str, total: float, tmp_path: Path) -> None:
    result = glasklar("plan", target, "--json", home=tmp_path)
    assert result.returncode == 0
    assert json.loads(result.stdout)["params_total"] == pytest.approx(total, rel=0.01)


def test_a_mistyped_path_claims_no_name(tmp_path: Path) -> None:
    path = recipe(tmp_path, (TASKS, 'kind = "text"\npath = "/nowhere/at/all"'))
    result = glasklar("train", path, home=tmp_path)
    assert (result.returncode, "/nowhere/at/all" in result.stderr) == (2, True)
    assert not (tmp_path / "runs").exists()


def test_a_file_is_no_model(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "convert" in refused("serve", tmp_path / "model.gguf", home=tmp_path)


def test_without_arguments_there_is_help_and_no_error(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "error" not in refused(home=tmp_path)


def test_what_stands_in_brackets_is_part_of_the_message(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "model[/bold][gguf]" in refused("chat", "model[/bold][gguf]", home=tmp_path)
