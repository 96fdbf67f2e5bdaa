"""What is shown where nobody can see a bar move, and tables in which no row hides another."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from glasklar import api, display
from glasklar.display import TerminalReporter, dollars, evaluation_table, models_table, plan_table, size
from glasklar.loading import models
from glasklar.provenance.rundir import RunDir


def printed(thing: object, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(thing)
    return console.file.getvalue()


def test_in_a_file_there_is_a_line_now_and_then_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 29.0, 31.0, 32.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(now))
    console = Console(file=io.StringIO(), width=200)
    with TerminalReporter(console) as reporter:
        reporter.stage("pretrain", 0, 5)
        for step in range(1, 6):
            reporter.step(
                {"stage": "pretrain", "step": step, "loss": 2.5, "tokens_per_second": 1e4, "seconds_left": 60}
            )
    lines = console.file.getvalue().splitlines()
    assert [line.split()[:2] for line in lines] == [["Pretraining", f"{step}/5"] for step in (1, 4, 5)]
    assert "loss 2.500" in lines[0]
    assert "1:00 left" in lines[0]


def test_every_stage_of_a_plan_has_a_row(tmp_path: Path) -> None:
    plan = api.plan("spark", hardware="cpu-2-cores", home=tmp_path)
    text = printed(plan_table(plan))
    for number, stage in enumerate(plan.stages, start=1):
        assert f"stage {number}, {stage.name}" in text
    assert "0.00" not in text


def test_small_amounts_are_not_shown_as_nothing() -> None:
    assert [size(119_000), size(12_345_678), size(1.5e12)] == ["119 kB", "12.3 MB", "1,500.00 GB"]
    assert [dollars(0.0), dollars(0.004), dollars(1234.5)] == ["0.00 USD", "less than 0.01 USD", "1,234.50 USD"]


def test_of_two_samples_there_is_pass_at_2() -> None:
    scores = {"greedy": 0.5, "length": 3.0, "pass@1": 0.5, "pass@2": 0.75}
    text = printed(evaluation_table({"evaluation": "x", "tasks": {"sum": scores}, "mean": scores}))
    assert "pass@2" in text
    assert "pass@16" not in text
    assert "75%" in text


def test_models_are_listed_with_their_state(smoke_run: Path, tmp_path: Path) -> None:
    assert "glasklar up" in str(models_table(models(tmp_path)))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "smoke").symlink_to(smoke_run)
    (tmp_path / "hub" / "org--name").mkdir(parents=True)
    with RunDir.create_or_open(tmp_path / "runs" / "half", "{}", ""):
        rows = {row["name"]: row for row in models(tmp_path)}
        assert "is making it" in rows["half"]["state"]
    assert rows["smoke"]["state"] == "ready"
    assert rows["smoke"]["bytes"] > 0
    assert (rows["org/name"]["from"], "pull it again" in rows["org/name"]["state"]) == ("hub", True)
    assert {row["name"]: row["state"] for row in models(tmp_path)}["half"] == "unfinished"
    assert "org/name" in printed(models_table(models(tmp_path)), width=60)
