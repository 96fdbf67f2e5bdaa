"""A model made of text alone: measured on the documents that its run kept from training, and on nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from glasklar import api
from glasklar.audit.verify import verify
from glasklar.display import QuietReporter
from glasklar.errors import CheckpointError, DataError, RequestError
from glasklar.loading import load
from glasklar.provenance.ledger import read_ledger
from glasklar.runtime import Runtime
from smoke import SMOKE
from test_corpus import notes

PRETRAINING = """
[[sources]]
kind = "text"
path = "{notes}"
globs = ["*.md"]

[[stages]]
kind = "pretrain"
steps = 2
rows = 2
length = 64

[evaluation]
held_out = {held_out}
"""


class Listens(QuietReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def made(folder: Path, runtime: Runtime, held_out: float, vocabulary: int = 320) -> tuple[Path, Listens]:
    recipe = folder / "text.toml"
    head = SMOKE.read_text().partition("[[tasks]]")[0].replace("vocab_size = 320", f"vocab_size = {vocabulary}")
    recipe.write_text(head + PRETRAINING.format(notes=notes(folder / "notes", files=12), held_out=held_out))
    heard = Listens()
    return api.train(str(recipe), runtime=runtime, home=folder, run=folder / "run", reporter=heard), heard


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory, runtime: Runtime) -> Path:
    return made(tmp_path_factory.mktemp("text"), runtime, 0.4)[0]


def test_it_is_measured_again_as_its_run_measured_it(text_run: Path, runtime: Runtime) -> None:
    result = api.evaluate(load(text_run / "model", runtime))
    events, _ = read_ledger(text_run / "ledger.jsonl")
    [recorded] = (event.data for event in events if event.event == "evaluation")
    assert result["bits_per_byte"] == pytest.approx(recorded["bits_per_byte"], abs=1e-3)
    assert "tasks" not in result


def test_settings_of_tasks_are_refused(text_run: Path, runtime: Runtime) -> None:
    for setting in ({"split": "valid"}, {"problems": 3}, {"samples": 2}):
        with pytest.raises(RequestError, match=f"{next(iter(setting))} = .*without tasks"):
            api.evaluate(load(text_run / "model", runtime), **setting)


def test_without_its_run_nobody_knows_what_it_has_not_seen(text_run: Path, runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="evaluate the run"):
        api.evaluate(load(shutil.copytree(text_run / "model", tmp_path / "copy"), runtime))


def test_other_documents_than_those_kept_are_refused(tmp_path: Path, runtime: Runtime) -> None:
    run, _ = made(tmp_path, runtime, 0.4)
    for path in (tmp_path / "notes").rglob("*.md"):
        path.write_text(path.read_text(encoding="utf-8") + " more", encoding="utf-8")
    with pytest.raises(CheckpointError, match="no longer hold"):
        api.evaluate(load(run / "model", runtime))


def test_a_recipe_that_came_to_nothing_leaves_its_name_to_the_mended_one(tmp_path: Path, runtime: Runtime) -> None:
    with pytest.raises(DataError, match="lower vocab_size"):
        made(tmp_path, runtime, 0.4, vocabulary=30_000)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    run, _ = made(tmp_path, runtime, 0.4)
    assert verify(run, home=tmp_path).verdict == "holds"
    (tmp_path / "notes" / "latin.md").write_bytes("für".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.md"):  # a run that has come to something keeps all it has
        api.train(str(tmp_path / "text.toml"), runtime=runtime, home=tmp_path, run=_unfinished(run))
    assert (run / "ledger.jsonl").exists()


def _unfinished(run: Path) -> Path:
    """The run as it was before its last line said that it was released."""
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))
    return run


def test_where_nothing_is_kept_it_is_said(tmp_path: Path, runtime: Runtime) -> None:
    run, heard = made(tmp_path, runtime, 1e-9)
    assert any("keeps no document" in note for note in heard.notes)
    with pytest.raises(RequestError, match="nothing to measure"):
        api.evaluate(load(run / "model", runtime))
