"""Distillation: a teacher's right answers become a student's demonstrations, and the record says whose they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glasklar import api, distil
from glasklar.audit.documents import documents
from glasklar.audit.facts import RunFacts
from glasklar.audit.replay import Record, replay
from glasklar.audit.verify import verify
from glasklar.data.tokenizer import Tokenizer
from glasklar.engine.request import Completion
from glasklar.errors import DataError, RecipeError
from glasklar.eval.answers import Answer
from glasklar.loading import load
from glasklar.provenance.ledger import read_ledger
from glasklar.provenance.receipt import model_root
from glasklar.provenance.rundir import RunDir
from glasklar.recipe import load_recipe
from glasklar.runtime import Runtime
from glasklar.tasks.base import Problem, Task, split_of
from smoke import SMOKE

STAGE = """
[[stages]]
kind = "distil"
teacher = "{teacher}"
problems = 40
samples = 2
max_tokens = 24
steps = 3
rows = 4
length = 128
checkpoint_every = 2
"""


def recipe(folder: Path, teacher: str, *more: str) -> Path:
    """The smoke recipe, pretrained and then taught."""
    text = SMOKE.read_text(encoding="utf-8").replace('name = "smoke"', 'name = "student"')
    stages, rest = text.split("[[stages]]")[:2], text[text.index("[evaluation]") :]
    path = folder / "student.toml"
    path.write_text("[[stages]]".join(stages) + STAGE.format(teacher=teacher) + "\n".join(more) + "\n" + rest)
    return path


def clever(
    engine: Any, tokenizer: Tokenizer, problems: Sequence[tuple[Task, Problem]], **settings: Any
) -> list[Answer]:
    """A teacher in place of the untrained one: right about every problem but each third, where it says nothing."""
    answers = []
    for number, (task, problem) in enumerate(problems):
        right = number % 3 != 2
        said = [*tokenizer.encode(problem.thought), tokenizer.end_think_id, *tokenizer.encode(problem.answer)]
        ids = [tokenizer.think_id, *(said if right else []), tokenizer.eos_id]
        completion = Completion(ids=ids, logprobs=[0.0] * len(ids), finish="stop")
        answer = Answer(
            task=task, problem=problem, prompt=[1], completion=completion, correct=right, formed=right, thought=True
        )
        answers += [answer] * settings["samples"]
    return answers


@pytest.fixture(scope="module")
def taught(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory, runtime: Runtime) -> Path:
    home = tmp_path_factory.mktemp("student")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distil, "ask", clever)
        return api.train(str(recipe(home, str(smoke_run))), runtime=runtime, home=home)


def test_right_answers_once_each(taught: Path, smoke_run: Path) -> None:
    facts = json.loads((taught / "data" / "facts.json").read_text())["traces"]["traces-01.jsonl"]
    traces = distil.read_traces(taught / "data" / "traces-01.jsonl")
    assert (facts["answers"], facts["right"], facts["kept"]) == (80, 54, 27)
    assert len(traces) == 27
    assert not {trace.number for trace in traces} & set(range(2, 40, 3))
    assert facts["teacher_root"] == model_root(smoke_run / "model")
    loaded = load_recipe(str(taught / "recipe.toml"))
    assert not distil.wrong_lines(loaded, 1, traces)
    assert all(trace.thought for trace in traces)
    mixture = distil.Mixture.of(loaded.tasks)
    drawn = [mixture.draw("train", 3001, trace.number)[1] for trace in traces]
    assert [problem.question for problem in drawn] == [trace.question for trace in traces]
    assert {split_of(problem) for problem in drawn} == {"train"}
    events = [event.event for event in read_ledger(taught / "ledger.jsonl")[0]]
    assert events[:4] == ["run", "data", "tokenizer", "taught"]
    assert events[-1] == "released"


def test_a_teacher_that_is_stopped_is_asked_nothing_twice(
    taught: Path, smoke_run: Path, tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "AT_ONCE", 9)  # five rounds
    asked = 0

    def stopping(*given: Any, **settings: Any) -> list[Answer]:
        nonlocal asked
        asked += 1
        if asked == 4:
            raise KeyboardInterrupt
        return clever(*given, **settings)

    monkeypatch.setattr(distil, "ask", stopping)
    path = recipe(tmp_path, str(smoke_run))
    with pytest.raises(KeyboardInterrupt):
        api.train(str(path), runtime=runtime, home=tmp_path)
    run = tmp_path / "runs" / "student"
    part = run / "data" / "traces-01.part"
    whole = part.read_bytes()
    part.write_bytes(whole[:-5])  # the last of three is torn
    assert verify(run, home=tmp_path).verdict == "holds"
    api.train(str(path), runtime=runtime, home=tmp_path)
    assert asked == 4 + 3  # the third is asked again, the fourth and the fifth
    assert not part.exists()
    facts = json.loads((run / "data" / "facts.json").read_text())["traces"]["traces-01.jsonl"]
    assert (facts["answers"], facts["right"], facts["kept"]) == (80, 54, 27)
    assert verify(run, home=tmp_path).verdict == "holds"


def test_only_the_reply_is_learned(taught: Path) -> None:
    tokenizer = Tokenizer.load(taught / "data")
    traces = distil.read_traces(taught / "data" / "traces-01.jsonl")
    for trace, (ids, weights) in zip(traces, distil.trace_tokens(traces, tokenizer), strict=True):
        learned = [token for token, weight in zip(ids, weights, strict=True) if weight]
        assert tokenizer.decode(learned).replace(" ", "").endswith(trace.answer.replace(" ", ""))
        assert learned[0] == tokenizer.think_id
        assert learned[-1] == tokenizer.eos_id
        assert tokenizer.decode(ids[: len(ids) - len(learned)]).endswith(trace.question)


def test_the_record_holds_and_is_repeated(taught: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    found = verify(taught, home=taught.parent.parent)
    assert found.verdict == "holds", found
    assert "is right, by the task's checker" in str(found)
    monkeypatch.setattr(distil, "ask", clever)
    again = replay(RunDir(taught), Record.stretches, runtime=runtime, home=taught.parent.parent, rebuild_data=True)
    assert again.verdict == "holds", again


def test_the_documents_name_the_teacher(taught: Path) -> None:
    made = documents(RunFacts.read(RunDir(taught)))
    words = "".join(text.decode() for name, text in made.items() if name.endswith((".md", ".html")))
    assert "27 right answers of the model" in words
    assert "made from no other model" not in words
    report = (taught / "report.md").read_text()
    assert "distillation, 3 steps" in report
    assert "| teacher" in report


@pytest.mark.parametrize("change", ["answer", "question", "added"])
def test_forged_answers_are_found(change: str, taught: Path, tmp_path: Path) -> None:
    run = shutil.copytree(taught, tmp_path / "run")
    path = run / "data" / "traces-01.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    trace = json.loads(lines[0])
    if change == "added":
        lines.append(lines[0])
    else:
        lines[0] = json.dumps({**trace, change: "12345"}).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    assert any("traces-01" in entry.subject for entry in verify(run, home=tmp_path).failures)
    # Even where all hashes were made to fit:
    loaded = load_recipe(str(taught / "recipe.toml"))
    assert distil.wrong_lines(loaded, 1, distil.read_traces(path)) == ([] if change == "added" else [1])
    beyond = replace(distil.read_traces(taught / "data" / "traces-01.jsonl")[0], number=40)
    assert distil.wrong_lines(loaded, 1, [beyond]) == [1]


@pytest.mark.parametrize(
    ("teacher", "more", "words"),
    [
        ("nobody", (), "teacher = 'nobody': no model 'nobody'"),
        ("TEACHER", (f'teacher_root = "{"0" * 64}"',), "the recipe asks for 0000"),
        ("TEACHER", ("instruction = '" + "word " * 300 + "'",), "teacher = .*smoke.*: .*256"),
        ("RIGHT", ("length = 8",), "all of its 27 right answers are longer than the rows of length = 8"),
        ("TEACHER", (), "none of its 80 answers is right"),
    ],
)
def test_teachers_that_will_not_do(
    teacher: str,
    more: tuple[str, ...],
    words: str,
    smoke_run: Path,
    tmp_path: Path,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = recipe(tmp_path, str(smoke_run) if teacher in ("TEACHER", "RIGHT") else teacher, *more)
    if teacher == "RIGHT":
        monkeypatch.setattr(distil, "ask", clever)
        path.write_text(path.read_text().replace("length = 128\ncheckpoint_every = 2\n", "checkpoint_every = 2\n"))
    with pytest.raises(DataError, match=words):
        api.train(str(path), runtime=runtime, home=tmp_path)
    assert not (tmp_path / "runs" / "student" / "recipe.json").exists()  # the name is free for the mended recipe


def test_equal_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="samples = 2 at temperature = 0 are all equal"):
        load_recipe(str(recipe(tmp_path, "x", "temperature = 0")))


def test_an_instruction_is_told_to_the_teacher_alone(smoke_run: Path, runtime: Runtime) -> None:
    model = load(smoke_run / "model", runtime)
    assert model.tokenizer is not None
    loaded = load_recipe(str(SMOKE))
    problem = distil.Mixture.of(loaded.tasks).draw("train", 0, 0)
    [answer] = distil.ask(
        distil.Engine(model.network), model.tokenizer, [problem], max_tokens=1, instruction="Only the number."
    )
    assert "\nOnly the number." in model.tokenizer.decode(answer.prompt)
    assert "Only" not in answer.problem.question


def test_a_plan_counts_the_teacher_where_it_is_found(smoke_run: Path, tmp_path: Path) -> None:
    with_teacher = api.plan(str(recipe(tmp_path, str(smoke_run))), hardware="cpu-2-cores", home=tmp_path)
    without = api.plan(str(recipe(tmp_path, "nobody")), hardware="cpu-2-cores", home=tmp_path)
    assert with_teacher.stages[1].flops > without.stages[1].flops > 0
    assert with_teacher.stages[1].hours > without.stages[1].hours
